"""What an endpoint has, remembered: the answer of its last `models` task, kept on disk.

Menus are drawn from it, so that showing one starts no worker. Before the first answer a snapshot that comes with this
package stands in: the lists of A1111 1.10.1 and the worker's own checkpoint and catalog.

    ~/.local/share/a1111/snapshots/3f2a9c.json      one file for an endpoint, named by a hash of its address
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of the endpoint. `sha256` is empty until the endpoint has computed it."""

    name: str
    file: str
    title: str
    sha256: str = ""
    is_default: bool = False

    @property
    def stem(self) -> str:
        return PurePosixPath(self.file).stem

    def is_named(self, text: str) -> bool:
        """Whether A1111 would take the text for this checkpoint: title, with or without hash, file, stem, or a hash."""
        short = self.sha256[:10]
        forms = {self.name, self.file, self.stem, self.title, self.title.partition(" [")[0]}
        if short:
            forms |= {short, self.sha256, f"{self.file} [{short}]", f"{self.stem} [{short}]"}
        return text in forms


@dataclass(frozen=True)
class Snapshot:
    """An endpoint's lists. `is_default`: the endpoint was never asked."""

    models: Mapping[str, Any]
    is_default: bool = False

    @property
    def fingerprint(self) -> str:
        return str(self.models.get("fingerprint", ""))

    @cached_property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The checkpoints, the default one first."""
        found = [_parse_checkpoint(entry) for entry in _objects(self.models.get("checkpoints"))]
        return tuple(sorted(found, key=lambda checkpoint: not checkpoint.is_default))

    @property
    def default_checkpoint(self) -> Checkpoint:
        return self.checkpoints[0]

    def find_checkpoint(self, text: str) -> Checkpoint | None:
        return next((checkpoint for checkpoint in self.checkpoints if checkpoint.is_named(text)), None)

    @property
    def options(self) -> Mapping[str, Any]:
        """The settings that a job may override, with their defaults."""
        found = self.models.get("options")
        return found if isinstance(found, dict) else {}

    def webui(self, name: str) -> Any:
        """A1111's own list by the last part of its path: samplers, upscalers, script-info, …"""
        lists = self.models.get("webui")
        found = lists.get(name) if isinstance(lists, dict) else None
        return default_snapshot().models["webui"].get(name, []) if found is None else found

    def cached(self, kind: str) -> list[Mapping[str, Any]]:
        """The endpoint's cached models of a kind: loras, embeddings, vaes, …"""
        kinds = self.models.get("cached")
        return _objects(kinds.get(kind)) if isinstance(kinds, dict) else []

    @property
    def catalog(self) -> list[Mapping[str, Any]]:
        """The LoRAs that every worker knows by name, cached or not."""
        return _objects(self.models.get("catalog"))

    @cached_property
    def names(self) -> frozenset[str]:
        """Every name in the lists, in lower case."""
        return frozenset(name.casefold() for name in _texts(self.models))


def _parse_checkpoint(entry: Mapping[str, Any]) -> Checkpoint:
    file = str(entry.get("file") or entry.get("name") or "unknown")
    sha256 = str(entry.get("sha256") or "")
    title = f"{file} [{sha256[:10]}]" if sha256 else file
    return Checkpoint(str(entry.get("name") or file), file, title, sha256, entry.get("default") is True)


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _texts(value: Any) -> Iterator[str]:
    """Every text in the values, and every key, of nested JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, member in value.items():
            yield key
            yield from _texts(member)
    elif isinstance(value, Sequence):
        for member in value:
            yield from _texts(member)


@cache
def default_snapshot() -> Snapshot:
    """What stands in for an endpoint that was never asked."""
    text = resources.files(__package__).joinpath("default_snapshot.json").read_text(encoding="utf-8")
    return Snapshot(json.loads(text), is_default=True)


class SnapshotStore:
    """The snapshots of all endpoints in one folder. The folder may be gone or full: then nothing is remembered."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, url: str) -> Snapshot:
        """What is remembered of the endpoint at this address, else the default snapshot."""
        path = self._path(url)
        try:
            snapshot = Snapshot(json.loads(path.read_text(encoding="utf-8")))
            if snapshot.checkpoints:
                return snapshot
            log.warning("%s lists no checkpoint; it is not used", path)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, AttributeError, TypeError) as error:
            log.warning("%s cannot be read (%s); it is not used", path, type(error).__name__)
        return default_snapshot()

    def save(self, url: str, snapshot: Snapshot) -> None:
        """Remember it. It appears whole, or not at all."""
        path = self._path(url)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=self._folder, delete=False) as file:
                part = Path(file.name)
                try:
                    json.dump(snapshot.models, file)
                    file.flush()
                    part.replace(path)
                except BaseException:
                    with contextlib.suppress(OSError):
                        part.unlink()
                    raise
        except OSError as error:
            log.warning("the endpoint's lists are not kept on disk: %s", error.strerror)

    def _path(self, url: str) -> Path:
        return self._folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.json"

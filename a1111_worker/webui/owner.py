"""What the options of somebody else's WebUI were before this worker set them, in a file until they are put back.

    {"CLIP_stop_at_last_layers": {"was": 2, "set": 1},
     "sd_model_checkpoint": {"was": "x.safetensors [0123456789]", "set": "y.safetensors"}}

A worker that is killed leaves the file behind, and its next start takes it over. There is one file for each WebUI.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from a1111_worker.files import write_atomically
from a1111_worker.webui.responses import file_of_title

log = logging.getLogger(__name__)


def owner_file(worker_state_file: Path | None, webui_url: str) -> Path:
    """Where the options of the WebUI at `webui_url` are kept: beside `worker_state_file`, else in a temporary folder of
    this user alone."""
    name = f"webui-options-{hashlib.sha256(webui_url.encode()).hexdigest()[:12]}.json"
    if worker_state_file is not None:
        return worker_state_file.with_name(f"{worker_state_file.name}.{name}")
    return Path(tempfile.gettempdir(), f"a1111-worker-{os.getuid()}", name)


class OwnersOptions:
    """The options of somebody else's WebUI, kept at `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept = self._read()

    def remember(self, now: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
        """Keep the options that this worker is about to set. `now` are all options, `ours` the values it sets.

        An option that has the value that a worker has set keeps what it was before that. Any other value is the
        owner's.
        """
        kept = dict(self._kept)
        for key, value in ours.items():
            if key in now:
                is_ours = key in kept and is_same(key, now[key], kept[key]["set"])
                kept[key] = {"was": kept[key]["was"] if is_ours else now[key], "set": value}
        if kept != self._kept:
            self._kept = kept
            self._write()

    def to_put_back(self, now: Mapping[str, Any]) -> dict[str, Any]:
        """The options that still have the value that this worker set, as they were before. The owner's changes stay."""
        return {
            key: as_number(entry["was"])
            for key, entry in self._kept.items()
            if key in now
            and is_same(key, now[key], entry["set"])
            and entry["was"] is not None
            and not is_same(key, now[key], entry["was"])
        }

    def forget(self) -> None:
        """They are put back."""
        self._kept = {}
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("the file with the WebUI's own options could not be removed: %s", error.strerror)

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            if self._path.stat().st_uid != os.getuid():  # in a temporary folder, anybody's
                return {}
            found = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError):
            log.warning("the file with the WebUI's own options cannot be read; they are lost")
            return {}
        entries = found.items() if isinstance(found, dict) else ()
        return {key: entry for key, entry in entries if isinstance(entry, dict) and entry.keys() == {"was", "set"}}

    def _write(self) -> None:
        try:
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            write_atomically(self._path, json.dumps(self._kept).encode())
        except OSError as error:
            log.warning("if this worker is killed, the WebUI keeps its settings: %s", error.strerror)


def is_same(key: str, value: Any, other: Any) -> bool:
    """Whether two values of an option are the same. A checkpoint has several names: file, stem, title with a hash."""
    if key == "sd_model_checkpoint" and isinstance(value, str) and isinstance(other, str):
        return PurePosixPath(file_of_title(value)).stem == PurePosixPath(file_of_title(other)).stem
    return bool(value == other)


def as_number(value: Any) -> Any:
    """A value of /options as it is set: it shows every number as a float, and CLIP skip 2.0 ends each job of A1111."""
    return int(value) if isinstance(value, float) and value.is_integer() else value

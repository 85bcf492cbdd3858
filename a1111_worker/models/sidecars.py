"""What is known of each model: a sidecar a model, so that no worker ever loses another's knowledge.

    detail_tweaker_xl.safetensors.json
        {"schema": 1, "kind": "lora", "name": "Detail Tweaker XL", "file": "detail_tweaker_xl.safetensors",
         "url": "https://civitai.com/api/download/models/135867", "version_id": 135867, "file_id": 99264,
         "primary": true, "wishes": [], "sha256": "0d9b…", "size": 228452352, "mtime": 1700000000,
         "base_model": "SDXL 1.0", "family": "sdxl", "lora_hash": "9c7…", "trained_words": [],
         "downloaded_at": "2026-01-31T12:00:00Z"}
    detail_tweaker_xl.safetensors.uses      one byte a use, appended; its time is the last use

Knowledge, never the truth: a sidecar that is missing, unreadable, from another schema, or whose size is not the file's
is not believed, and the file is read once to know it again. `version_id` stands there only when the file's bytes are
proven to be that version's: `null` means that someone put the file there by hand (or that CivitAI could not be asked),
whatever its name claims. Such a file's time is compared too, since people replace what they put somewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from a1111_worker.context import Deadline
from a1111_worker.domain import Model, ModelKind, ModelRef, RemoteFile
from a1111_worker.errors import ModelNotFound
from a1111_worker.files import write_atomically
from a1111_worker.models.safetensors import family_of, lora_hash, read_header
from a1111_worker.models.volume import KNOWN, USES, CacheDirectory

log = logging.getLogger(__name__)

SCHEMA = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
_OUR_FILE = re.compile(r"[A-Za-z0-9-][A-Za-z0-9._-]*\.safetensors")
_PIECE = 4 << 20


@dataclass(frozen=True)
class Record:
    """What is known of one model. `wishes` are those of a CivitAI URL (`pruned/fp16`) that this file answers."""

    kind: ModelKind
    name: str
    file: str
    sha256: str
    size: int
    mtime: int = 0
    url: str | None = None
    version_id: int | None = None
    file_id: int | None = None
    primary: bool = True
    wishes: tuple[str, ...] = ()
    base_model: str | None = None
    family: str | None = None
    lora_hash: str | None = None
    trained_words: tuple[str, ...] = ()
    downloaded_at: str | None = None

    def to_json(self) -> bytes:
        fields = {"schema": SCHEMA, **asdict(self), "kind": self.kind.value}
        return json.dumps(fields, ensure_ascii=True).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Record:
        """Raises ValueError for anything that `to_json` did not write."""
        try:
            fields = json.loads(text)
        except RecursionError as error:
            raise ValueError("nested without end") from error
        if not isinstance(fields, dict) or type(fields.get("schema")) is not int or fields["schema"] != SCHEMA:
            raise ValueError("another schema")
        given = {name: kind for name, kind in _FIELDS.items() if name in fields}
        for name, allowed in given.items():
            if not isinstance(fields[name], allowed) or (isinstance(fields[name], bool) and bool not in allowed):
                raise ValueError(f"{name} is not what it should be")
        for name in ("wishes", "trained_words"):
            if not all(isinstance(word, str) for word in fields.get(name, ())):
                raise ValueError(f"{name} is not a list of words")
        values: dict[str, Any] = {name: fields[name] for name in given}
        values["wishes"] = tuple(values.get("wishes", ()))
        values["trained_words"] = tuple(values.get("trained_words", ()))
        try:
            record = cls(**(values | {"kind": ModelKind(values.get("kind"))}))
        except TypeError as error:
            raise ValueError("something is missing") from error
        if not _SHA256.fullmatch(record.sha256):
            raise ValueError("sha256 is not one")
        return record

    def model(self, path: Path, *, downloaded: bool = False, warnings: tuple[str, ...] = ()) -> Model:
        return Model(
            kind=self.kind,
            name=self.name,
            file=self.file,
            path=path,
            sha256=self.sha256,
            size=self.size,
            version_id=self.version_id,
            file_id=self.file_id,
            base_model=self.base_model,
            family=self.family,
            trained_words=self.trained_words,
            lora_hash=self.lora_hash,
            downloaded=downloaded,
            warnings=warnings,
        )


_FIELDS: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "name": (str,),
    "file": (str,),
    "sha256": (str,),
    "size": (int,),
    "mtime": (int,),
    "url": (str, type(None)),
    "version_id": (int, type(None)),
    "file_id": (int, type(None)),
    "primary": (bool,),
    "wishes": (list,),
    "base_model": (str, type(None)),
    "family": (str, type(None)),
    "lora_hash": (str, type(None)),
    "trained_words": (list,),
    "downloaded_at": (str, type(None)),
}


class Sidecars:
    """The sidecars of all shelves. What belongs to a shelf that cannot be written is kept in `notes`, a folder of this
    container: a shared one would take two images' files of one name and size for the same."""

    def __init__(self, notes: Path, owner: str) -> None:
        self._notes = notes
        self._owner = owner
        self._read: dict[Path, tuple[tuple[int, int, int], Record]] = {}
        self._lock = threading.Lock()

    def look(self, shelf: CacheDirectory, file: str) -> Record | None:
        """What is known of a model without reading it; None where that is nothing, or there is no such model."""
        for sidecar in self._sidecars(shelf, file):
            record = self._from(sidecar, shelf, file)
            if record is not None:
                return record
        return None

    def claim(self, shelf: CacheDirectory, file: str) -> Record | None:
        """What was known of a download whose file has another length now: what it was, and where it came from."""
        for sidecar in self._sidecars(shelf, file):
            with contextlib.suppress(OSError, ValueError):
                record = Record.from_json(sidecar.read_bytes())
                comes_from = record.version_id or record.url
                if record.file == file and record.kind is shelf.kind and comes_from is not None:
                    return record
        return None

    def write(self, shelf: CacheDirectory, record: Record) -> Record:
        """Keep what is known of a model that has its final name. Not being able to is no failure."""
        try:
            record = replace(record, mtime=int(shelf.path(record.file).stat().st_mtime))
        except OSError:
            return record
        *_, sidecar = self._sidecars(shelf, record.file) if not shelf.writable else [self._beside(shelf, record.file)]
        try:
            sidecar.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(sidecar, record.to_json())
        except OSError as error:
            log.warning("what is known of %s could not be kept: %s", record.file, error.strerror)
        return record

    def rebuild(
        self,
        shelf: CacheDirectory,
        file: str,
        deadline: Deadline,
        *,
        on_progress: Callable[[int, int], None] | None = None,
        keep: bool = True,
    ) -> Record:
        """Read a model that nothing is known of: proof of the format, SHA-256, family, A1111's hash. `keep` it, too.

        Raises ModelRejected where it is not a safetensors file, ModelNotFound where it is gone.
        """
        path = shelf.path(file)
        began = time.monotonic()
        try:
            header = read_header(path)
            sha256 = sha256_of(path, header.size, deadline, on_progress)
            record = Record(
                kind=shelf.kind,
                name=file.removesuffix(".safetensors"),
                file=file,
                sha256=sha256,
                size=header.size,
                family=family_of(header),
                lora_hash=lora_hash(path, header) if shelf.kind is ModelKind.LORA else None,
            )
        except OSError as error:
            raise ModelNotFound(f"{file} cannot be read from the cache ({error.strerror})") from error
        took = time.monotonic() - began
        log.info("read %s to know it: %.1f MB in %.1f s, sha256 %s", file, header.size / 1e6, took, sha256[:12])
        return self.write(shelf, record) if keep else record

    def forget(self, shelf: CacheDirectory, file: str) -> None:
        """Remove what is known of a model that goes."""
        shelf.forget(file)
        with self._lock:
            for sidecar in self._sidecars(shelf, file):
                self._read.pop(sidecar, None)

    # How often and when a model was used.

    def use(self, shelf: CacheDirectory, file: str) -> None:
        """Count a use: an appended byte, so that no worker's is lost."""
        if not shelf.writable:
            return
        with contextlib.suppress(OSError):
            descriptor = os.open(f"{shelf.path(file)}{USES}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, b".")
            finally:
                os.close(descriptor)

    def uses(self, shelf: CacheDirectory, file: str) -> tuple[int, float]:
        """(how often, when last) by the volume's clock; a model that was never used: when it came."""
        try:
            found = Path(f"{shelf.path(file)}{USES}").stat()
        except OSError:
            try:
                return 0, shelf.path(file).stat().st_mtime
            except OSError:
                return 0, 0.0
        return found.st_size, found.st_mtime

    # Which file a URL outside CivitAI gave: its identity is its bytes, which are not known before it was fetched.

    def file_of_url(self, shelf: CacheDirectory, url: str) -> str | None:
        try:
            file = (shelf.urls / url_key(url)).read_text("ascii").strip()
        except (OSError, ValueError):
            return None
        return file if _OUR_FILE.fullmatch(file) and shelf.size(file) is not None else None

    def remember_url(self, shelf: CacheDirectory, url: str, file: str) -> None:
        with contextlib.suppress(OSError):
            write_atomically(shelf.urls / url_key(url), file.encode("ascii"))

    def _beside(self, shelf: CacheDirectory, file: str) -> Path:
        return shelf.folder / f"{file}{KNOWN}"

    def _sidecars(self, shelf: CacheDirectory, file: str) -> list[Path]:
        beside = self._beside(shelf, file)
        if shelf.writable:
            return [beside]
        folder = hashlib.sha256(os.fsencode(shelf.folder.absolute())).hexdigest()[:16]
        return [beside, self._notes / folder / f"{file}{KNOWN}"]

    def _from(self, sidecar: Path, shelf: CacheDirectory, file: str) -> Record | None:
        try:
            found = os.stat(sidecar)  # noqa: PTH116 - the fast path
            model = os.stat(shelf.path(file))  # noqa: PTH116 - the same
        except OSError:
            return None
        state = (found.st_mtime_ns, found.st_size, found.st_ino)
        with self._lock:
            before, record = self._read.get(sidecar, (None, None))
        if record is None or before != state:
            try:
                record = Record.from_json(sidecar.read_bytes())
            except (OSError, ValueError) as error:
                log.warning("what is known of %s is unreadable and will be found again: %s", file, _reason(error))
                return None
            with self._lock:
                self._read[sidecar] = (state, record)
        if record.file != file or record.kind is not shelf.kind or record.size != model.st_size:
            return None
        if record.version_id is None and record.url is None and record.mtime != int(model.st_mtime):
            return None  # put there by hand, and replaced since
        return record


def record_of(
    shelf_kind: ModelKind, part: Path, file: str, remote: RemoteFile, ref: ModelRef, sha256: str, downloaded_at: str
) -> Record:
    """What is known of a file that just arrived. Raises ModelRejected where it is not a safetensors file."""
    header = read_header(part)
    return Record(
        kind=shelf_kind,
        name=remote.name or ref.name or file.removesuffix(".safetensors"),
        file=file,
        sha256=sha256,
        size=header.size,
        url=remote.url.partition("?")[0].partition("#")[0],
        version_id=remote.version_id,
        file_id=remote.file_id,
        primary=remote.primary,
        wishes=(wish,) if (wish := wish_of(ref)) else (),
        base_model=remote.base_model,
        family=family_of(header, remote.base_model),
        lora_hash=lora_hash(part, header) if shelf_kind is ModelKind.LORA else None,
        trained_words=remote.trained_words,
        downloaded_at=downloaded_at,
    )


def wish_of(ref: ModelRef) -> str:
    """What a CivitAI URL wishes beside the version, as a record keeps it; empty: the version's primary file."""
    return f"{ref.size or ''}/{ref.fp or ''}" if ref.size or ref.fp else ""


def answers(record: Record, ref: ModelRef) -> bool:
    """Whether a model is, proven, the file of the version that a reference means."""
    if record.version_id is None or record.version_id != ref.version_id:
        return False
    if ref.file_id is not None:
        return record.file_id == ref.file_id
    wish = wish_of(ref)
    return wish in record.wishes if wish else record.primary


def sha256_of(path: Path, size: int, deadline: Deadline, on_progress: Callable[[int, int], None] | None = None) -> str:
    """The SHA-256 of a file, as long as there is time."""
    digest = hashlib.sha256()
    done = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            done += len(piece)
            deadline.check()
            if on_progress is not None:
                on_progress(done, size)
    return digest.hexdigest()


def url_key(url: str) -> str:
    """A URL as a name on disk: nothing of it can be read back."""
    return hashlib.sha256(url.encode()).hexdigest()[:32]


def _reason(error: Exception) -> str:
    return (error.strerror or "I/O error") if isinstance(error, OSError) else str(error)[:100]

"""What is known of each model: one sidecar for each, so that no worker ever overwrites another's knowledge.

    detail_tweaker_xl.safetensors.json
        {"schema": 1, "kind": "lora", "name": "Detail Tweaker XL", "file": "detail_tweaker_xl.safetensors",
         "url": "https://civitai.com/api/download/models/135867", "version_id": 135867, "file_id": 99264,
         "primary": true, "wishes": [], "sha256": "0d9b…", "size": 228452352, "mtime": 1700000000,
         "base_model": "SDXL 1.0", "family": "sdxl", "lora_hash": "9c7…", "trained_words": [],
         "downloaded_at": "2026-01-31T12:00:00Z", "restricted": false,
         "source_stem": "add-detail-xl"}
    detail_tweaker_xl.safetensors.uses      one byte a use, appended; its time is the last use

A sidecar may be wrong. It is not believed if it makes no sense, is no regular file, has more than 1
MB, or has another schema or another size than the file. Then the file is read once, as if there were no sidecar.
`version_id` is set only if the file's bytes are verified to be that version's. `null` means that somebody put the file
there by hand (or that CivitAI could not be asked), whatever its name claims. The time of such a file is compared too,
because people replace such files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from a1111_worker.context import Deadline
from a1111_worker.domain import Model, ModelKind, ModelRef
from a1111_worker.errors import ModelNotFound, ModelRejected
from a1111_worker.files import (
    VolumeState,
    error_name,
    look,
    read_small,
    volume_error,
    volume_state,
    write_atomically,
)
from a1111_worker.models.names import SUFFIX
from a1111_worker.models.safetensors import check_kind, family_of, lora_hash, read_header
from a1111_worker.models.volume import SIDECAR, USES, CacheDirectory

log = logging.getLogger(__name__)

SCHEMA = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
_OUR_FILE = re.compile(r"[A-Za-z0-9-][A-Za-z0-9._-]*\.safetensors")
_CHUNK = 4 << 20


@dataclass(frozen=True)
class ModelRecord:
    """What is known of one model.

    `variant_filters` are those of CivitAI URLs (`pruned/fp16`) that select this file. `restricted`: it is a file of
    Hugging Face that was fetched with the token, or that RunPod has put there. Not every caller may have it.
    `source_stem`: what its author calls the file.
    """

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
    variant_filters: tuple[str, ...] = ()
    base_model: str | None = None
    family: str | None = None
    lora_hash: str | None = None
    trained_words: tuple[str, ...] = ()
    downloaded_at: str | None = None
    restricted: bool = False
    source_stem: str | None = None

    @property
    def is_operators(self) -> bool:
        """Whether somebody put the file there by hand, as far as is known."""
        return self.version_id is None and self.url is None

    def to_json(self) -> bytes:
        document: dict[str, Any] = {"schema": SCHEMA}
        for field in fields(self):
            document[_KEYS.get(field.name, field.name)] = getattr(self, field.name)
        return json.dumps(document, ensure_ascii=True).encode()

    @classmethod
    def from_json(cls, text: bytes) -> ModelRecord:
        """Raises ValueError for anything that `to_json` did not write."""
        try:
            document = json.loads(text)
        except RecursionError as error:
            raise ValueError("nested without end") from error
        if not isinstance(document, dict) or type(document.get("schema")) is not int or document["schema"] != SCHEMA:
            raise ValueError("another schema")
        values: dict[str, Any] = {}
        for field in fields(cls):
            key = _KEYS.get(field.name, field.name)
            if key not in document:
                continue
            value, types = document[key], _TYPES[field.name]
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                raise ValueError(f"{key} is not what it should be")
            if isinstance(value, list):
                if not all(isinstance(word, str) for word in value):
                    raise ValueError(f"{key} is not a list of words")
                value = tuple(value)
            values[field.name] = value
        try:
            record = cls(**(values | {"kind": ModelKind(values.get("kind"))}))
        except TypeError as error:
            raise ValueError("something is missing") from error
        if not _SHA256.fullmatch(record.sha256):
            raise ValueError("sha256 is not one")
        return record

    def is_file_of(self, ref: ModelRef) -> bool:
        """Whether this is, verified, the file of the version that a reference means."""
        if self.version_id is None or self.version_id != ref.version_id:
            return False
        if ref.file_id is not None:
            return self.file_id == ref.file_id
        variant = variant_filter(ref)
        return variant in self.variant_filters if variant else self.primary

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
            source_stem=self.source_stem,
            downloaded=downloaded,
            warnings=warnings,
        )


_KEYS = {"variant_filters": "wishes"}
"""Keys of the JSON that are not called like their field."""

_TYPES: dict[str, tuple[type, ...]] = {
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
    "variant_filters": (list,),
    "base_model": (str, type(None)),
    "family": (str, type(None)),
    "lora_hash": (str, type(None)),
    "trained_words": (list,),
    "downloaded_at": (str, type(None)),
    "restricted": (bool,),
    "source_stem": (str, type(None)),
}


def variant_filter(ref: ModelRef) -> str:
    """What a CivitAI URL asks for besides the version (`size/fp`), as a record keeps it. Empty: the primary file."""
    return f"{ref.size or ''}/{ref.fp or ''}" if ref.size or ref.fp else ""


@dataclass(frozen=True)
class Uses:
    """How often a model was used, and when last, by the volume's clock."""

    count: int
    last: float


class Sidecars:
    """The sidecars of all cache directories.

    Those of a directory that cannot be written are kept in `notes`, a folder of this container. In a shared folder,
    files of one name and size in two images would be taken for the same file.
    """

    def __init__(self, notes: Path) -> None:
        self._notes = notes
        self._read: dict[Path, tuple[tuple[int, int, int], ModelRecord]] = {}
        self._lock = threading.Lock()  # guards the dict alone, never a call to the volume

    def find(self, directory: CacheDirectory, file: str) -> ModelRecord | None:
        """What is known of a model without reading it. None if nothing is known, or there is no such model.

        Raises VolumeFailed if the volume does not tell.
        """
        for sidecar in self._sidecars(directory, file):
            record = self._load(sidecar, directory, file)
            if record is not None:
                return record
        return None

    def find_for_changed_file(self, directory: CacheDirectory, file: str) -> ModelRecord | None:
        """What was known of a downloaded model whose file has another size now: what it was, and where it came from."""
        for sidecar in self._sidecars(directory, file):
            with contextlib.suppress(OSError, ValueError):
                record = ModelRecord.from_json(read_small(sidecar))
                source = record.version_id or record.url
                if record.file == file and record.kind is directory.kind and source is not None:
                    return record
        return None

    def write(self, directory: CacheDirectory, record: ModelRecord) -> ModelRecord:
        """Write the sidecar of a model that has its final name. Returns the record as written.

        A sidecar that cannot be written is no failure.
        """
        try:
            record = replace(record, mtime=int(directory.path(record.file).stat().st_mtime))
        except OSError as error:
            log.warning("the sidecar of %s could not be written (%s)", record.file, error_name(error))
            return record
        sidecar = self._sidecars(directory, record.file)[-1]
        try:
            sidecar.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(sidecar, record.to_json())
        except OSError as error:
            log.warning("the sidecar of %s could not be written (%s)", record.file, error_name(error))
        return record

    def rebuild(
        self,
        directory: CacheDirectory,
        file: str,
        deadline: Deadline,
        *,
        on_progress: Callable[[int, int], None] | None = None,
        keep: bool = True,
    ) -> ModelRecord:
        """Read a model of which nothing is known: its format, SHA-256, family, and A1111's hash.

        `keep`: write its sidecar too. Raises ModelRejected if it is no safetensors file, ModelNotFound if it is gone,
        VolumeFailed if it cannot be read.
        """
        path = directory.path(file)
        began = time.monotonic()
        if directory.size(file) is None and look(path) is not None:
            raise ModelRejected(f"{file} is not a regular file")
        try:
            header = read_header(path)
            check_kind(directory.kind, header)
            sha256 = sha256_of(path, header.size, deadline, on_progress)
            record = ModelRecord(
                kind=directory.kind,
                name=file.removesuffix(SUFFIX),
                file=file,
                sha256=sha256,
                size=header.size,
                family=family_of(header, kind=directory.kind),
                lora_hash=lora_hash(path, header) if directory.kind is ModelKind.LORA else None,
            )
        except OSError as error:
            if volume_state(error) is VolumeState.GONE:
                raise ModelNotFound(f"{file} is not in the cache any more") from error
            raise volume_error(error, f"reading {file}") from error
        seconds = time.monotonic() - began
        log.info("read all of %s: %.1f MB in %.1f s, sha256 %s", file, header.size / 1e6, seconds, sha256[:12])
        return self.write(directory, record) if keep else record

    def remove(self, directory: CacheDirectory, file: str) -> None:
        """Remove what is known of a model that is evicted."""
        directory.remove_sidecars(file)
        with self._lock:
            for sidecar in self._sidecars(directory, file):
                self._read.pop(sidecar, None)

    # -- how often and when a model was used

    def count_use(self, directory: CacheDirectory, file: str) -> None:
        """Count a use: an appended byte, so that no worker's use is lost."""
        if not directory.is_writable:
            return
        with contextlib.suppress(OSError):
            # Nonblocking: whatever has this name, it is not waited for.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
            descriptor = os.open(directory.beside(file, USES), flags, 0o644)
            try:
                os.write(descriptor, b".")
            finally:
                os.close(descriptor)

    def uses(self, directory: CacheDirectory, file: str) -> Uses:
        """How often a model was used, and when last. One that was never used counts from when it came.

        Raises VolumeFailed if the volume does not tell.
        """
        if (found := look(directory.beside(file, USES))) is not None:
            return Uses(found.st_size, found.st_mtime)
        model = look(directory.path(file))
        return Uses(0, 0.0 if model is None else model.st_mtime)

    # -- the file of a URL outside CivitAI: its identity is its bytes, which nobody knows before it is fetched

    def file_of_url(self, directory: CacheDirectory, url: str) -> str | None:
        """The file that was fetched from a URL, if it is still there."""
        try:
            file = read_small(directory.urls / url_key(url)).decode("ascii").strip()
        except (OSError, ValueError):
            return None
        return file if _OUR_FILE.fullmatch(file) and directory.size(file) is not None else None

    def remember_url(self, directory: CacheDirectory, url: str, file: str) -> None:
        with contextlib.suppress(OSError):
            write_atomically(directory.urls / url_key(url), file.encode("ascii"))

    def _sidecars(self, directory: CacheDirectory, file: str) -> list[Path]:
        """Where a model's sidecar may lie. The last place is the one that is written."""
        beside = directory.beside(file, SIDECAR)
        if directory.is_writable:
            return [beside]
        folder = hashlib.sha256(os.fsencode(directory.folder.absolute())).hexdigest()[:16]
        return [beside, self._notes / folder / beside.name]

    def _load(self, sidecar: Path, directory: CacheDirectory, file: str) -> ModelRecord | None:
        found, model = look(sidecar), look(directory.path(file))
        if found is None or model is None or not stat.S_ISREG(model.st_mode):
            return None
        state = (found.st_mtime_ns, found.st_size, found.st_ino)
        with self._lock:
            last_state, record = self._read.get(sidecar, (None, None))
        if record is None or last_state != state:
            try:
                record = ModelRecord.from_json(read_small(sidecar))
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and volume_state(error) is VolumeState.BROKEN:
                    raise volume_error(error, f"reading what is known of {file}") from error
                reason = error_name(error) if isinstance(error, OSError) else str(error)[:100]
                log.warning("the sidecar of %s is unreadable, and will be rebuilt: %s", file, reason)
                return None
            with self._lock:
                self._read[sidecar] = (state, record)
        if record.file != file or record.kind is not directory.kind or record.size != model.st_size:
            return None
        if record.version_id is None and record.url is None and record.mtime != int(model.st_mtime):
            return None  # it was put there by hand, and has been replaced since
        return record


def sha256_of(path: Path, size: int, deadline: Deadline, on_progress: Callable[[int, int], None] | None = None) -> str:
    """The SHA-256 of a file. It ends early, with an error, when the deadline does."""
    digest = hashlib.sha256()
    done = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            deadline.check()
            if on_progress is not None:
                on_progress(done, size)
    return digest.hexdigest()


def url_key(url: str) -> str:
    """A URL as a name on disk, from which nothing of the URL can be read back."""
    return hashlib.sha256(url.encode()).hexdigest()[:32]

"""The folders of models: what lies where, and how a file gets there. Nothing here knows what a model is.

    /runpod-volume/models/                          MODELS_DIR: shared by every worker that mounts it
    ├── checkpoints/
    │   ├── jib_mix….safetensors                    a model: it exists when this name exists
    │   ├── jib_mix….safetensors.json               its sidecar: what is known of it (sidecars.py)
    │   ├── jib_mix….safetensors.uses               one byte a use: its size is their count, its mtime the last use
    │   ├── .parts/v1590699.<owner>.part            a partial file, not verified; beside it what its download remembers
    │   ├── .leases/v1590699                        "I am fetching this": kept fresh by its owner (leases.py)
    │   ├── .holds/jib_mix….safetensors.<owner>     "I use this": kept fresh by its owner (holds.py)
    │   ├── .holds/jib_mix….safetensors.evicting    "I am evicting this"
    │   ├── .urls/<digest of a URL>                 the file that a URL outside CivitAI gave
    │   └── .trash/                                 files that are being removed
    ├── loras/…                                     the same again
    └── vae/                                        put there by hand, shown to the WebUI

**A model exists when its final name exists, and that name appears only by renaming a verified file.** Everything else
may vanish at any moment without harm: a lost lease costs a second download, a lost sidecar is rebuilt by reading the
file once, a lost partial file is fetched again. No lock of the file system is used: on some network volumes every
worker gets it. Names with a leading dot are the worker's own. Nothing that a job, a header or CivitAI says becomes a
name except through `slug`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from a1111_worker.domain import ModelKind
from a1111_worker.errors import VolumeFull
from a1111_worker.files import NO_ROOM
from a1111_worker.models.names import SUFFIX, FileIndex

log = logging.getLogger(__name__)

SIDECAR = ".json"
USES = ".uses"

SOURCE_FOLDERS = {ModelKind.CHECKPOINT: ("checkpoints", "Stable-diffusion"), ModelKind.LORA: ("loras", "Lora")}
"""The folders that a source may have for a kind: named like ours, or like the WebUI's. A source may also be flat."""

_TRASH_SECONDS = 60.0  # the worker that evicts a model may still put it back


class UnfinishedDownload(NamedTuple):
    """A partial file on disk. `key` names what is fetched. `size` is the bytes that it takes on the disk. `written` is
    the time of its last change, by the volume's clock."""

    key: str
    path: Path
    size: int
    written: float


class CacheDirectory:
    """One folder with the models of one kind.

    If it is not `is_writable`, models are only read from it. `is_local`: no other worker sees it. `listdir` returns the
    names in a folder.
    """

    def __init__(
        self,
        folder: Path,
        kind: ModelKind,
        *,
        is_writable: bool = False,
        is_local: bool = False,
        listdir: Callable[[Path], list[str]] = os.listdir,
    ) -> None:
        self.folder = folder
        self.kind = kind
        self.is_writable = is_writable
        self.is_local = is_local
        self._listdir = listdir
        self._listing_lock = threading.Lock()  # one thread lists, and the others use its listing
        self._index: FileIndex | None = None
        self._listed_at: int | None = None  # the folder's time before the listing

    def __repr__(self) -> str:
        return f"CacheDirectory({str(self.folder)!r}, {self.kind.value}, is_writable={self.is_writable})"

    @property
    def partial_files(self) -> Path:
        return self.folder / ".parts"

    @property
    def leases(self) -> Path:
        return self.folder / ".leases"

    @property
    def holds(self) -> Path:
        return self.folder / ".holds"

    @property
    def urls(self) -> Path:
        return self.folder / ".urls"

    @property
    def trash(self) -> Path:
        return self.folder / ".trash"

    def prepare(self) -> None:
        """Make the folders. Raises OSError if nothing can be written."""
        for folder in (self.folder, self.partial_files, self.leases, self.holds, self.urls, self.trash):
            folder.mkdir(parents=True, exist_ok=True)

    # -- what is there

    def path(self, file: str) -> Path:
        return self.folder / file

    def size(self, file: str) -> int | None:
        """The size of a model in bytes, or None if there is no such model."""
        try:
            found = (self.folder / file).stat()
        except OSError:
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def index(self, *, fresh: bool = True) -> FileIndex:
        """The models that are there.

        `fresh` looks at the folder's time, and lists the folder again if that has changed. Without it the last listing
        is returned, if there is one; a listing that is under way is not waited for.
        """
        index = self._index
        if index is not None and not fresh:
            return index
        with self._listing_lock:
            try:
                now = self.folder.stat().st_mtime_ns
            except OSError:
                self._index, self._listed_at = None, None
                return FileIndex()
            if self._index is None or now != self._listed_at:
                self._index, self._listed_at = FileIndex.of(self._names_in(self.folder)), now
            return self._index

    def refresh(self) -> FileIndex:
        """List the folder without trusting its time, which some volumes keep in whole seconds."""
        with self._listing_lock:
            self._listed_at = None
        return self.index()

    def free(self) -> int:
        """Bytes that may still be written. An upper bound: a volume's quota may not show."""
        return shutil.disk_usage(self.folder).free

    # -- partial files

    def partial_file(self, key: str, owner: str) -> Path:
        """The path that an owner downloads to. `key` names what is fetched, the same for every worker."""
        return self.partial_files / f"{key}.{owner}.part"

    def adopt_partial_file(self, key: str, owner: str) -> None:
        """Rename a partial file that another owner left, so that it is this owner's. Only one of many workers gets it.

        The newest one is adopted, and the others are removed. The owner's own comes before any other. Call this only
        with the lease of `key`.
        """
        own = self.partial_file(key, owner)
        left = sorted(self._partial_files_of(key), key=_mtime, reverse=True)
        has_own = own in left
        for path in left:
            if path == own:
                continue
            if not has_own and _rename(path, own):
                for beside in self._files_beside(path):
                    _rename(beside, own.with_name(own.name + beside.name[len(path.name) :]))
                has_own = True
            else:
                self.remove_partial_file(path)

    def remove_partial_file(self, path: Path) -> None:
        """Remove a partial file and everything that its download keeps beside it."""
        for each in (*self._files_beside(path), path):
            _unlink(each)

    def unfinished_downloads(self) -> Iterator[UnfinishedDownload]:
        """Every partial file in the folder, whoever owns it."""
        for name in self._names_in(self.partial_files):
            if name.endswith(".part"):
                path = self.partial_files / name
                with contextlib.suppress(OSError):
                    found = path.stat()
                    yield UnfinishedDownload(name.split(".", 1)[0], path, found.st_blocks * 512, found.st_mtime)

    def place(self, partial_file: Path, file: str) -> None:
        """Make a verified partial file the model `file`: written through, renamed, and the rename written through."""
        if not self.is_local:  # a container's own disk is lost with the container
            _sync(partial_file)
        partial_file.replace(self.folder / file)
        if not self.is_local:
            _sync(self.folder)
        self.remove_partial_file(partial_file)

    def _partial_files_of(self, key: str) -> Iterator[Path]:
        for name in self._names_in(self.partial_files):
            if name.startswith(f"{key}.") and name.endswith(".part"):
                yield self.partial_files / name

    def _files_beside(self, path: Path) -> list[Path]:
        return [path.with_name(name) for name in self._names_in(path.parent) if name.startswith(f"{path.name}.")]

    # -- models that go

    def move_to_trash(self, file: str, owner: str) -> Path:
        """Take a model's name away at once, and keep its bytes for the moment. Returns its path in the trash."""
        self.trash.mkdir(exist_ok=True)  # somebody may have removed it
        trashed = self.trash / f"{owner}-{threading.get_ident()}-{file}"
        (self.folder / file).rename(trashed)
        return trashed

    def restore(self, trashed: Path, file: str) -> None:
        """Undo `move_to_trash`, unless somebody has put a model under that name again."""
        with contextlib.suppress(OSError):
            os.link(trashed, self.folder / file)  # unlike a rename it fails if the name exists
            trashed.unlink()
            return
        if not (self.folder / file).exists():  # this file system has no hard links
            _rename(trashed, self.folder / file)

    def remove_sidecars(self, file: str) -> None:
        """Remove what lies beside a model."""
        for suffix in (SIDECAR, USES):
            _unlink(self.folder / f"{file}{suffix}")

    def rename(self, file: str, new_name: str) -> None:
        """Give a model another name, with what lies beside it."""
        (self.folder / file).rename(self.folder / new_name)
        for suffix in (SIDECAR, USES):
            _rename(self.folder / f"{file}{suffix}", self.folder / f"{new_name}{suffix}")

    def sweep(self, older_than: float) -> None:
        """Remove what nobody needs any more: the trash, and partial files untouched for `older_than` seconds.

        Also removed are drafts of that age, which a dead writer left, and sidecars without a model. Ages are by the
        volume's own clock: a file that is made now shows its time.
        """
        now = _volume_time(self.trash)
        if now is None:
            return
        for path in (self.trash / name for name in self._names_in(self.trash)):
            if 0 < _ctime(path) < now - _TRASH_SECONDS:
                _unlink(path)
        for path in (self.partial_files / name for name in self._names_in(self.partial_files)):
            if 0 < _mtime(path) < now - older_than and _unlink(path):
                log.info("removed %s, left unfinished long ago", path.name)
        listing = set(self._names_in(self.folder))
        for name in listing:
            path = self.folder / name
            if name.startswith("."):  # a draft of a writer that died
                if path.is_file() and 0 < _mtime(path) < now - older_than:
                    _unlink(path)
                continue
            model = name.removesuffix(SIDECAR).removesuffix(USES)
            if model != name and model.endswith(SUFFIX) and model not in listing and self.size(model) is None:
                _unlink(path)

    def _names_in(self, folder: Path) -> list[str]:
        try:
            return self._listdir(folder)  # thirty thousand names, not as many Path objects
        except OSError:
            return []


class CacheDirectories:
    """Where models are looked for, in this order: the cache, the local folder, the sources.

    New models are written to the cache. If the cache cannot be written they go to the local folder; if neither can be
    written, nothing is fetched. A source that is the cache itself, or is not a folder, is left out.
    """

    def __init__(self, models_dir: Path, local_dir: Path, sources: Sequence[Path], owner: str) -> None:
        self.models_dir = models_dir
        self.local_dir = local_dir
        self.sources = tuple(
            source for source in dict.fromkeys(sources) if source.is_dir() and not _is_same(source, models_dir)
        )
        self._writable: dict[ModelKind, CacheDirectory | None] = {}
        self._all: dict[ModelKind, list[CacheDirectory]] = {}
        for kind in ModelKind:
            cache = _prepare(CacheDirectory(models_dir / kind.folder, kind), owner)
            self._all[kind] = [cache]
            self._writable[kind] = cache if cache.is_writable else None
            if not cache.is_writable:
                local = _prepare(CacheDirectory(local_dir / kind.folder, kind, is_local=True), owner)
                self._all[kind].append(local)
                self._writable[kind] = local if local.is_writable else None
            for source in self.sources:
                folders = [source / name for name in SOURCE_FOLDERS[kind] if (source / name).is_dir()]
                self._all[kind] += [CacheDirectory(folder, kind) for folder in (*folders, source)]

    def of(self, kind: ModelKind) -> list[CacheDirectory]:
        """Every directory with models of a kind, in the order in which they are searched."""
        return self._all[kind]

    def for_new(self, kind: ModelKind) -> CacheDirectory:
        """The directory that new models of a kind are written to. Raises VolumeFull if there is none."""
        directory = self._writable[kind]
        if directory is None:
            raise VolumeFull("there is no folder that models can be written to", hint="set MODELS_DIR to one")
        return directory

    def writable(self) -> list[CacheDirectory]:
        return [directory for directory in self._writable.values() if directory is not None]

    def folders(self) -> list[Path]:
        """Every folder that a model may lie in."""
        return [directory.folder for directories in self._all.values() for directory in directories]

    def vae_folders(self) -> list[Path]:
        """The folders with VAEs that somebody put into the cache or a source."""
        return [root / name for root in (self.models_dir, *self.sources) for name in ("vae", "VAE")]


def can_write(folder: Path, owner: str) -> bool:
    """Whether files can be made in a folder. A full disk counts as writable: room may be freed on it."""
    probe = folder / f".probe-{owner}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        return error.errno in NO_ROOM
    return True


def _prepare(directory: CacheDirectory, owner: str) -> CacheDirectory:
    """The directory with its folders made, and `is_writable` set if that was possible."""
    try:
        directory.prepare()
        directory.is_writable = can_write(directory.folder, owner)
    except OSError as error:
        log.warning("%s cannot be written: %s", directory.folder, error.strerror)
    return directory


def _is_same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _ctime(path: Path) -> float:
    try:
        return path.stat().st_ctime
    except OSError:
        return 0.0


def _unlink(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return False
    return True


def _rename(source: Path, target: Path) -> bool:
    try:
        source.rename(target)
    except OSError:
        return False
    return True


def _volume_time(folder: Path) -> float | None:
    """What time it is on the volume, or None if nothing can be written there."""
    probe = folder / f".clock-{os.getpid()}-{threading.get_ident()}"
    try:
        probe.touch()
        return _mtime(probe) or None
    except OSError:
        return None
    finally:
        _unlink(probe)


def _sync(path: Path) -> None:
    """Write a file or a folder through to the disk.

    Some network file systems cannot do that to a folder: the rename stands anyway.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EROFS):
            raise
    finally:
        os.close(descriptor)

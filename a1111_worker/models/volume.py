"""The folders of models: what lies where, and how a file gets there. Nothing here knows what a model is.

    /runpod-volume/models/                          MODELS_DIR: shared by every worker that mounts it
    ├── checkpoints/
    │   ├── jib_mix….safetensors                    a model: it exists when this name exists
    │   ├── jib_mix….safetensors.json               its sidecar: what is known of it (sidecars.py)
    │   ├── jib_mix….safetensors.uses               one byte a use: its size is their count, its mtime the last use
    │   ├── .parts/v1590699.<owner>.part            a partial file, not verified; beside it what its download remembers
    │   ├── .parts/alone-v1590699….<owner>.part     the same of an owner without a lease: nobody else goes on with it
    │   ├── .leases/v1590699                        "I am fetching this": kept fresh by its owner (leases.py)
    │   ├── .holds/jib_mix….safetensors.<owner>     "I use this": kept fresh by its owner (holds.py)
    │   ├── .holds/jib_mix….safetensors.evicting    "I am evicting this"
    │   ├── .urls/<digest of a URL>                 the file that a URL outside CivitAI gave
    │   └── .trash/                                 files that are being removed
    ├── loras/… embeddings/… vaes/…                 the same again
    └── vae/                                        VAEs that somebody put there; only read

**A model exists when its final name exists, and that name appears only by renaming a verified file.** Everything else
may vanish at any moment without harm: a lost lease costs a second download, a lost sidecar is rebuilt by reading the
file once, a lost partial file is fetched again. No lock of the file system is used: on some network volumes every
worker gets it. Names with a leading dot are the worker's own. Nothing that a job, a header or CivitAI says becomes a
name except through `slug`. What an error of the volume means: files.py.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from a1111_worker.domain import ModelKind
from a1111_worker.errors import PartialFileLost, VolumeFailed
from a1111_worker.files import (
    VolumeState,
    create_empty,
    error_name,
    look,
    names_in,
    translated,
    volume_error,
    volume_state,
)
from a1111_worker.models.names import MAX_NAME_BYTES, SUFFIX, FileIndex, short_name
from a1111_worker.transfer.partial_file import drop_cached, move_bytes, saved_state

log = logging.getLogger(__name__)

SIDECAR = ".json"
USES = ".uses"

SOURCE_FOLDERS = {
    ModelKind.CHECKPOINT: ("checkpoints", "Stable-diffusion"),
    ModelKind.LORA: ("loras", "Lora"),
    ModelKind.EMBEDDING: ("embeddings",),
    ModelKind.VAE: ("vaes", "vae", "VAE"),
    ModelKind.CONTROLNET: ("controlnet", "ControlNet"),
}
"""The folders that a source may have for a kind: named like ours, or like the WebUI's."""

# A source may also have models of these kinds without a folder for them.
_FLAT = (ModelKind.CHECKPOINT, ModelKind.LORA, ModelKind.CONTROLNET)
_BY_HAND = {ModelKind.VAE: ("vae", "VAE")}  # further folders of the cache, for files that somebody puts there

_ALONE = "alone-"


class UnfinishedDownload(NamedTuple):
    """A partial file on disk. `size` is the bytes that it takes there. `written` is the time of its last change, by the
    volume's clock."""

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
        """The size of a model in bytes, or None if there is no such model: only a regular file is one.

        Raises VolumeFailed if that cannot be found out.
        """
        found = look(self.folder / file)
        return found.st_size if found is not None and stat.S_ISREG(found.st_mode) else None

    def index(self, *, fresh: bool = True) -> FileIndex:
        """The models that are there.

        `fresh` looks at the folder's time, and lists the folder again if that has changed. Without it the last listing
        is returned, if there is one; a listing that is under way is not waited for. Raises VolumeFailed.
        """
        index = self._index
        if index is not None and not fresh:
            return index
        with self._listing_lock:
            found = look(self.folder)
            if found is None:
                self._index, self._listed_at = None, None
                return FileIndex()
            if self._index is None or found.st_mtime_ns != self._listed_at:
                self._index, self._listed_at = FileIndex.of(self._names_in(self.folder)), found.st_mtime_ns
            return self._index

    @property
    def known_files(self) -> frozenset[str]:
        """The files that were there when the folder was listed last. The folder is not looked at."""
        index = self._index
        return index.files if index is not None else frozenset()

    def refresh(self) -> FileIndex:
        """List the folder without trusting its time, which some volumes keep in whole seconds."""
        with self._listing_lock:
            self._listed_at = None
        return self.index()

    def free(self) -> int:
        """Bytes that may still be written. An upper bound: a volume's quota may not show. Raises VolumeFailed."""
        with translated("asking for the free space"):
            found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize

    # -- partial files

    def partial_file(self, key: str, owner: str) -> Path:
        """The path that the owner of the lease of `key` downloads to. `key` is the same for every worker."""
        return self.partial_files / f"{key}.{owner}.part"

    def partial_file_alone(self, key: str, sha256: str | None, owner: str) -> Path:
        """The path that an owner downloads to if it could not make a lease.

        Nobody goes on with such a file, because its owner may be alive. With a hash in its name, no two downloads of
        one process have the same.
        """
        return self.partial_file(f"{_ALONE}{key}-{(sha256 or 'unknown')[:16]}", owner)

    def left_partial_files(self, key: str, owner: str) -> list[Path]:
        """The partial files that other owners of the lease of `key` left, the newest first."""
        own = self.partial_file(key, owner).name
        names = [n for n in self._names_in(self.partial_files) if n.startswith(f"{key}.") and n.endswith(".part")]
        paths = [self.partial_files / name for name in names if name != own]
        return sorted(paths, key=_mtime, reverse=True)

    def adopt_partial_files(self, key: str, owner: str, sha256: str, check: Callable[[], None]) -> None:
        """Go on with what other owners of this lease left: their bytes move into this owner's partial file.

        Call this only with the lease of `key`. `check` is called often, and may raise. A file that is not (known to be)
        of this hash is removed. One that cannot be read stays where it is. Raises VolumeFull.
        """
        own = self.partial_file(key, owner)
        for path in self.left_partial_files(key, owner):
            try:
                state = saved_state(path)
                if state is not None and state.may_be_of(None, sha256):
                    log.info("going on with %s, %.1f MB", path.name, state.present / 1e6)
                    move_bytes(path, own, sha256, check)
            except VolumeFailed as error:
                log.warning("%s is left where it is: %s", path.name, error.message)
            else:
                self.remove_partial_file(path)

    def remove_partial_file(self, path: Path) -> None:
        """Remove a partial file and everything that its download keeps beside it."""
        for each in (*self._files_beside(path), path):
            _unlink(each)

    def unfinished_downloads(self) -> Iterator[UnfinishedDownload]:
        """Every partial file in the folder, whoever owns it."""
        for name in self._names_in(self.partial_files):
            path = self.partial_files / name
            if name.endswith(".part") and (found := look(path)) is not None:
                state = saved_state(path)
                size = min(found.st_size, found.st_blocks * 512) if state is None else state.present
                yield UnfinishedDownload(path, size, found.st_mtime)

    def sign_of_life(self, partial_file: Path) -> Path:
        """The file that changes as long as somebody downloads to a partial file: the lease, else the file itself."""
        key = partial_file.name.split(".", 1)[0]
        return partial_file if key.startswith(_ALONE) else self.leases / key

    def place(self, partial_file: Path, file: str) -> None:
        """Make a verified partial file the model `file`: written through, renamed, and the rename written through.

        Raises PartialFileLost, VolumeFull or VolumeFailed. What the volume could not keep is not in this machine's
        memory then either: a complete partial file has to be read again before it is placed.
        """
        try:
            if not self.is_local:  # a container's own disk is lost with the container
                _sync(partial_file)
            partial_file.replace(self.folder / file)
        except OSError as error:
            if volume_state(error) is VolumeState.GONE:
                raise PartialFileLost("the partial file is gone", hint="try again") from error
            drop_cached(partial_file)
            raise volume_error(error, "writing a model through to the volume") from error
        if not self.is_local:
            try:
                _sync(self.folder)
            except OSError as error:  # the model is there; only a crash of the volume could undo the rename
                log.warning("the name of %s could not be written through (%s)", file, error_name(error))
        self.remove_partial_file(partial_file)

    def _files_beside(self, path: Path) -> list[Path]:
        return [path.with_name(name) for name in self._names_in(path.parent) if name.startswith(f"{path.name}.")]

    # -- models that go

    def move_to_trash(self, file: str, owner: str) -> Path | None:
        """Take a model's name away at once, and keep its bytes for the moment. Returns its path in the trash.

        None: the volume is so full that not even this is possible, and the model was removed. Raises FileNotFoundError
        if there is no such model, or VolumeFailed.
        """
        trashed = self.trash / f"{owner}-{threading.get_ident()}-{short_name(file)}"
        try:
            self.trash.mkdir(exist_ok=True)  # somebody may have removed it
            (self.folder / file).rename(trashed)
        except FileNotFoundError:
            raise
        except OSError as error:
            if volume_state(error) is not VolumeState.FULL:
                raise volume_error(error, "moving a model to the trash") from error
            with translated("removing a model"):
                (self.folder / file).unlink()
            return None
        return trashed

    def restore(self, trashed: Path, file: str) -> None:
        """Undo `move_to_trash`, unless somebody has put a model under that name again."""
        try:
            os.link(trashed, self.folder / file)  # unlike a rename it fails if the name exists
        except FileExistsError:
            pass
        except OSError:  # this file system has no hard links
            if look(self.folder / file) is None:
                with translated("bringing a model back from the trash"):
                    trashed.rename(self.folder / file)
            return
        _unlink(trashed)

    def trashed_files(self) -> Iterator[tuple[Path, int]]:
        """What is in the trash, with its size."""
        for name in self._names_in(self.trash):
            if (found := look(self.trash / name)) is not None:
                yield self.trash / name, found.st_size

    def remove_sidecars(self, file: str) -> None:
        """Remove what lies beside a model."""
        for suffix in (SIDECAR, USES):
            _unlink(self.beside(file, suffix))

    def beside(self, file: str, suffix: str) -> Path:
        """The path of what lies beside a model: its sidecar or its uses."""
        is_short = len(os.fsencode(file)) + len(suffix) <= MAX_NAME_BYTES
        return self.folder / f"{file if is_short else short_name(file)}{suffix}"

    def rename(self, file: str, new_name: str) -> None:
        """Give a model another name, with what lies beside it. Raises VolumeFailed."""
        with translated("giving a model another name"), contextlib.suppress(FileNotFoundError):
            (self.folder / file).rename(self.folder / new_name)
        for suffix in (SIDECAR, USES):
            with contextlib.suppress(OSError):
                self.beside(file, suffix).rename(self.beside(new_name, suffix))

    def sweep(self, older_than: float) -> None:
        """Remove what nobody needs any more: partial files untouched for `older_than` seconds.

        Also removed are drafts of that age, which a dead writer left, and sidecars without a model. Ages are by the
        volume's own clock. Raises VolumeFailed.
        """
        now = self._time()
        if now is None:
            return
        for path in (self.partial_files / name for name in self._names_in(self.partial_files)):
            if 0 < _mtime(path) < now - older_than and _unlink(path):
                log.info("removed %s, left unfinished long ago", path.name)
        listing = set(self._names_in(self.folder))
        for name in listing:
            path = self.folder / name
            if name.startswith("."):  # a draft of a writer that died
                found = look(path)
                if found is not None and stat.S_ISREG(found.st_mode) and found.st_mtime < now - older_than:
                    _unlink(path)
                continue
            model = name.removesuffix(SIDECAR).removesuffix(USES)
            if model != name and model.endswith(SUFFIX) and model not in listing and self.size(model) is None:
                _unlink(path)

    def _time(self) -> float | None:
        """The time by the volume's clock, or None if that cannot be found out. It needs no room on the volume."""
        try:
            os.utime(self.partial_files)
            return self.partial_files.stat().st_mtime
        except OSError:
            return None

    def _names_in(self, folder: Path) -> list[str]:
        return names_in(folder, self._listdir)


class CacheDirectories:
    """Where models are looked for, in this order: the cache, the local folder, the sources.

    New models are written to the cache. If the cache cannot be written they go to the local folder; if neither can be
    written, nothing is fetched. A source that is the cache itself, or cannot be listed, is left out. A model that lies
    somewhere else gets a link in a folder of this container (`linked`).
    """

    def __init__(self, models_dir: Path, local_dir: Path, sources: Sequence[Path], owner: str) -> None:
        self.models_dir = models_dir
        self.local_dir = local_dir
        self.sources = tuple(
            source for source in dict.fromkeys(sources) if _can_list(source) and not _is_same(source, models_dir)
        )
        self._writable: dict[ModelKind, CacheDirectory | None] = {}
        self._all: dict[ModelKind, list[CacheDirectory]] = {}
        self._linked = {kind: CacheDirectory(local_dir / "linked" / kind.folder, kind) for kind in ModelKind}
        for kind in ModelKind:
            cache = _prepare(CacheDirectory(models_dir / kind.folder, kind), owner)
            self._all[kind] = [cache]
            self._writable[kind] = cache if cache.is_writable else None
            if not cache.is_writable:
                local = _prepare(CacheDirectory(local_dir / kind.folder, kind, is_local=True), owner)
                self._all[kind].append(local)
                self._writable[kind] = local if local.is_writable else None
            self._all[kind].append(self._linked[kind])
            by_hand = [models_dir / name for name in _BY_HAND.get(kind, ())]
            for source in self.sources:
                by_hand += [source / name for name in SOURCE_FOLDERS[kind]]
                by_hand += [source] if kind in _FLAT else []
            self._all[kind] += [CacheDirectory(folder, kind) for folder in by_hand if _can_list(folder)]

    def of(self, kind: ModelKind) -> list[CacheDirectory]:
        """Every directory with models of a kind, in the order in which they are searched."""
        return self._all[kind]

    def for_new(self, kind: ModelKind) -> CacheDirectory:
        """The directory that new models of a kind are written to. Raises VolumeFailed if there is none."""
        directory = self._writable[kind]
        if directory is None:
            raise VolumeFailed("there is no folder that models can be written to", hint="set MODELS_DIR to one")
        return directory

    def linked(self, kind: ModelKind) -> CacheDirectory:
        """The folder with links to models of a kind that lie somewhere else."""
        return self._linked[kind]

    def writable(self) -> list[CacheDirectory]:
        return [directory for directory in self._writable.values() if directory is not None]


def can_write(folder: Path, owner: str) -> bool:
    """Whether files can be made in a folder. A full disk counts as writable: room may be freed on it."""
    probe = folder / f".probe-{owner}"
    try:
        create_empty(probe)
        probe.unlink()
    except OSError as error:
        return volume_state(error) is VolumeState.FULL
    return True


def _prepare(directory: CacheDirectory, owner: str) -> CacheDirectory:
    """The directory with its folders made, and `is_writable` set if that was possible."""
    try:
        directory.prepare()
    except OSError as error:
        # On a full volume the models that are there can be evicted, even if our own folders cannot be made yet.
        if volume_state(error) is not VolumeState.FULL or not directory.folder.is_dir():
            log.warning("%s cannot be written (%s)", directory.folder, error_name(error))
            return directory
    directory.is_writable = can_write(directory.folder, owner)
    if not directory.is_writable:
        log.warning("%s cannot be written", directory.folder)
    return directory


def _can_list(folder: Path) -> bool:
    try:
        with os.scandir(folder):
            return True
    except OSError as error:
        if volume_state(error) is not VolumeState.GONE:
            log.warning("%s is not used: it cannot be listed (%s)", folder, error_name(error))
        return False


def _is_same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _unlink(path: Path) -> bool:
    """Remove a file that nobody needs. If that fails, it stays for the next one who looks."""
    try:
        path.unlink()
    except OSError as error:
        if volume_state(error) is not VolumeState.GONE:
            log.warning("%s could not be removed (%s)", path.name, error_name(error))
        return False
    return True


def _sync(path: Path) -> None:
    """Write a file or a folder through to the disk.

    Some network file systems cannot do that to a folder: the rename stands anyway. Raises OSError.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)

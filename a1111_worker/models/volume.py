"""The disk: what lies where, under which name, and how a file gets there. Nothing here knows what a model is.

    /runpod-volume/models/                          MODELS_DIR: shared by every worker that mounts it
    ├── checkpoints/
    │   ├── jib_mix….safetensors                    a model: it exists when this name exists
    │   ├── jib_mix….safetensors.json               what is known of it (registry.py)
    │   ├── jib_mix….safetensors.uses               one byte a use: its size is their count, its mtime the last one
    │   ├── .parts/v1590699.<owner>.part            not proven yet; beside it what its download remembers
    │   ├── .leases/v1590699                        "I am fetching this": kept fresh by its owner (leases.py)
    │   ├── .holds/jib_mix….safetensors.<owner>     "I use this": kept fresh by its owner
    │   ├── .holds/jib_mix….safetensors.evicting    "I am taking this away"
    │   ├── .urls/<digest of a URL>                 the file that a URL outside CivitAI gave
    │   └── .trash/                                 on its way out
    ├── loras/…                                     the same again
    └── vae/                                        put there by hand, shown to the WebUI

    /tmp/webui-models/                              WEBUI_MODELS_DIR: of this container alone
    ├── Stable-diffusion/jib_mix….safetensors  →    links to models, nothing else
    ├── Lora/…
    └── VAE/…

**A model exists when its final name exists, and that name appears only by renaming a proven part.** Everything else may
vanish at any moment without harm: a lost lease costs a second download, a lost sidecar is rebuilt by reading the file
once, a lost part is fetched again. No lock of the file system is ever asked for: on some network volumes they succeed
for everybody. Names with a leading dot are the worker's own; nothing that a job, a header or CivitAI says becomes a
name except through `slug`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import stat
import threading
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from a1111_worker.domain import ModelKind
from a1111_worker.files import NO_ROOM

log = logging.getLogger(__name__)

SUFFIX = ".safetensors"
KNOWN = ".json"
USES = ".uses"

# -- names -------------------------------------------------------------------------------------------------------------

SLUG_LENGTH = 80
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$)", re.IGNORECASE)  # devices, on Windows volumes
_VERSION = re.compile(r"_([1-9][0-9]{0,15})(?:_([1-9][0-9]{0,15}))?\.safetensors$", re.IGNORECASE)
_DIGEST = re.compile(r"_([0-9a-f]{16})\.safetensors$")


def slug(text: str, otherwise: str = "model") -> str:
    """The readable part of a file's name: at most 80 of `[A-Za-z0-9._-]`, whatever the text.

    Never empty, never starting with a dot, never a device of Windows, and never ending like an id (`_12`), so that
    what our names say behind it can be read back.
    """
    plain = unicodedata.normalize("NFKD", text[:1000]).encode("ascii", "ignore").decode()
    plain = re.sub(r"\.safetensors$", "", plain.strip(), flags=re.IGNORECASE)
    plain = re.sub(r"[^A-Za-z0-9.-]+", "_", plain)
    plain = re.sub(r"\.{2,}", ".", plain)
    plain = plain.strip("._-")[:SLUG_LENGTH].rstrip("._-")
    plain = re.sub(r"_(?=[0-9]+$)", "-", plain)
    if not plain or _RESERVED.match(plain):
        plain = f"{otherwise}-{plain}".rstrip("-")[:SLUG_LENGTH]
    return plain


def version_file(name: str, version_id: int, file_id: int | None = None) -> str:
    """The file of a CivitAI version; with `file_id` one that is not the version's primary file."""
    ids = f"{version_id}" if file_id is None else f"{version_id}_{file_id}"
    return f"{slug(name)}_{ids}{SUFFIX}"


def digest_file(name: str, sha256: str) -> str:
    """The file of a model that has no other identity than its bytes."""
    return f"{slug(name)}_{sha256[:16]}{SUFFIX}"


@dataclass(frozen=True)
class Names:
    """The models of a folder, by everything that a name says.

    What a name says of ids is a claim: somebody may have put `my_12.safetensors` there by hand.
    """

    files: frozenset[str] = frozenset()
    by_stem: dict[str, tuple[str, ...]] = field(default_factory=dict)  # casefolded
    by_version: dict[int, tuple[str, ...]] = field(default_factory=dict)
    by_digest: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, listing: Iterable[str]) -> Names:
        by_stem: dict[str, tuple[str, ...]] = {}
        by_version: dict[int, tuple[str, ...]] = {}
        by_digest: dict[str, tuple[str, ...]] = {}
        files = sorted(name for name in listing if name.endswith(SUFFIX) and not name.startswith("."))
        for file in files:
            stem = file[: -len(SUFFIX)].casefold()
            by_stem[stem] = (*by_stem.get(stem, ()), file)
            if version := _VERSION.search(file):
                # `a_12_345` is version 12's file 345, or version 345 of something somebody called `a_12`
                for claimed in {int(digits) for digits in version.groups() if digits}:
                    by_version[claimed] = (*by_version.get(claimed, ()), file)
            if digest := _DIGEST.search(file):
                by_digest[digest[1]] = (*by_digest.get(digest[1], ()), file)
        return cls(frozenset(files), by_stem, by_version, by_digest)

    def named(self, name: str) -> tuple[str, ...]:
        """The files that a bare name means: exactly, else in any case. More than one: it is ambiguous."""
        stem = name.removesuffix(SUFFIX)
        if stem + SUFFIX in self.files:
            return (stem + SUFFIX,)
        return self.by_stem.get(stem.casefold(), ())


# -- one folder --------------------------------------------------------------------------------------------------------


class CacheDirectory:
    """One folder with the models of one kind.

    A shelf that is not `writable` is only looked at. `local` says that no other worker sees it.
    """

    def __init__(self, folder: Path, kind: ModelKind, *, writable: bool = False, local: bool = False) -> None:
        self.folder = folder
        self.kind = kind
        self.writable = writable
        self.local = local
        self._lock = threading.Lock()
        self._names = Names()
        self._seen: int | None = None

    def __repr__(self) -> str:
        return f"CacheDirectory({str(self.folder)!r}, {self.kind.value}, writable={self.writable})"

    @property
    def parts(self) -> Path:
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
        """Make the folders; raises OSError where nothing can be written."""
        for folder in (self.folder, self.parts, self.leases, self.holds, self.urls, self.trash):
            folder.mkdir(parents=True, exist_ok=True)

    def path(self, file: str) -> Path:
        return self.folder / file

    def size(self, file: str) -> int | None:
        """In bytes; None where there is no such model."""
        try:
            found = (self.folder / file).stat()
        except OSError:
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def names(self, *, fresh: bool = True) -> Names:
        """What is there. `fresh` looks at the folder's time and lists again where it changed; without it any listing
        will do, as long as there is one."""
        with self._lock:
            if self._seen is not None and not fresh:
                return self._names
            try:
                now = self.folder.stat().st_mtime_ns
            except OSError:
                self._names, self._seen = Names(), None
                return self._names
            if now != self._seen:
                self._names, self._seen = Names.of(_listed(self.folder)), now
            return self._names

    def list_again(self) -> Names:
        """List without trusting the folder's time, which some volumes keep in whole seconds."""
        with self._lock:
            self._seen = None
        return self.names()

    def free(self) -> int:
        """Bytes that may still be written, an upper bound: a volume's quota may not show."""
        return shutil.disk_usage(self.folder).free

    # What is written.

    def part(self, key: str, owner: str) -> Path:
        """Where an owner fetches a file to. `key` names what is fetched, the same for every worker."""
        return self.parts / f"{key}.{owner}.part"

    def adopt_part(self, key: str, owner: str) -> bool:
        """Make a part that someone else left one's own, by rename: of any number of takers one gets it.

        The newest one is taken, the others are removed. Only for whoever has the lease of `key`.
        """
        mine = self.part(key, owner)
        left = sorted(self._parts_of(key), key=_mtime, reverse=True)
        if mine in left:
            left.remove(mine)
            taken = True
        else:
            taken = False
        for part in left:
            if not taken and _renamed(part, mine):
                for beside in self._beside(part):
                    _renamed(beside, mine.with_name(mine.name + beside.name[len(part.name) :]))
                taken = True
            else:
                self.drop_part(part)
        return taken

    def drop_part(self, part: Path) -> None:
        """Remove a part and all that its download kept beside it."""
        for path in (*self._beside(part), part):
            _unlinked(path)

    def leftovers(self) -> Iterator[tuple[str, Path, int, float]]:
        """Every part: (key, path, bytes it takes, when it was last written)."""
        for name in _listed(self.parts):
            if name.endswith(".part"):
                with contextlib.suppress(OSError):
                    found = (self.parts / name).stat()
                    yield name.split(".", 1)[0], self.parts / name, found.st_blocks * 512, found.st_mtime

    def _parts_of(self, key: str) -> Iterator[Path]:
        for name in _listed(self.parts):
            if name.startswith(f"{key}.") and name.endswith(".part"):
                yield self.parts / name

    def _beside(self, part: Path) -> list[Path]:
        return [part.with_name(name) for name in _listed(part.parent) if name.startswith(f"{part.name}.")]

    def place(self, part: Path, file: str) -> None:
        """Let a proven part become the model `file`: written through, renamed, and the rename written through."""
        if not self.local:  # a container's own disk is lost with the container
            _sync(part)
        part.replace(self.folder / file)
        if not self.local:
            _sync(self.folder)
        self.drop_part(part)

    def take_away(self, file: str, owner: str) -> Path:
        """Take a model's name away at once, its bytes are still there: the place in the trash."""
        self.trash.mkdir(exist_ok=True)  # somebody may have tidied up
        away = self.trash / f"{owner}-{threading.get_ident()}-{file}"
        (self.folder / file).rename(away)
        return away

    def put_back(self, away: Path, file: str) -> None:
        """Undo `take_away`, unless somebody has put the model there again."""
        with contextlib.suppress(OSError):
            os.link(away, self.folder / file)  # unlike a rename it fails where the name exists
            away.unlink()
            return
        if not (self.folder / file).exists():  # no hard links here
            _renamed(away, self.folder / file)

    def forget(self, file: str) -> None:
        """Remove what lies beside a model."""
        for beside in (KNOWN, USES):
            _unlinked(self.folder / f"{file}{beside}")

    def rename(self, file: str, other: str) -> None:
        """Give a model another name, with what lies beside it."""
        (self.folder / file).rename(self.folder / other)
        for beside in (KNOWN, USES):
            _renamed(self.folder / f"{file}{beside}", self.folder / f"{other}{beside}")

    def sweep(self, older_than: float) -> None:
        """Remove what nobody will come back for: the trash, and parts untouched for `older_than` seconds.

        By the volume's own clock: a file made now says what time it is there.
        """
        now = _time_there(self.trash)
        if now is None:
            return
        for path in (self.trash / name for name in _listed(self.trash)):
            if 0 < _ctime(path) < now - _TRASH_SECONDS:
                _unlinked(path)
        for path in (self.parts / name for name in _listed(self.parts)):
            if 0 < _mtime(path) < now - older_than and _unlinked(path):
                log.info("removed %s, left unfinished long ago", path.name)
        listing = set(_listed(self.folder))
        for name in listing:
            path = self.folder / name
            if name.startswith("."):  # a draft of a writer that died
                if path.is_file() and 0 < _mtime(path) < now - older_than:
                    _unlinked(path)
                continue
            model = name.removesuffix(KNOWN).removesuffix(USES)
            if model != name and model.endswith(SUFFIX) and model not in listing and self.size(model) is None:
                _unlinked(path)


_TRASH_SECONDS = 60.0  # whoever takes a model away may still put it back


def can_write(folder: Path, owner: str) -> bool:
    """Whether files can be made in a folder (a full one can be written: something may be freed)."""
    probe = folder / f".probe-{owner}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        return error.errno in NO_ROOM
    return True


# -- what the WebUI sees -----------------------------------------------------------------------------------------------

_WEBUI_FOLDERS = {ModelKind.CHECKPOINT: "Stable-diffusion", ModelKind.LORA: "Lora"}
_VAE = "VAE"


class WebUIFolder:
    """The folder the WebUI is started on: links to proven files, one name each. Other files in it are left alone."""

    def __init__(self, root: Path, owner: str) -> None:
        self._root = root
        self._owner = owner

    def prepare(self, shelves: Iterable[Path]) -> None:
        """Make the folders, and remove every link that leads nowhere or anywhere else than into `shelves`."""
        homes = {os.path.realpath(shelf) for shelf in shelves}
        for name in (*_WEBUI_FOLDERS.values(), _VAE):
            folder = self._root / name
            folder.mkdir(parents=True, exist_ok=True)
            for link in folder.iterdir():
                if link.is_symlink() and not (link.exists() and str(link.readlink().parent) in homes):
                    log.info("removing %s/%s from what the WebUI sees", name, link.name)
                    link.unlink(missing_ok=True)

    def folder(self, kind: ModelKind) -> Path:
        return self._root / _WEBUI_FOLDERS[kind]

    def show(self, kind: ModelKind, path: Path) -> Path:
        """Let the WebUI see a model under its file name."""
        link = self.folder(kind) / path.name
        self._link(link, path)
        return link

    def show_vae(self, path: Path) -> None:
        self._link(self._root / _VAE / path.name, path)

    def _link(self, link: Path, path: Path) -> None:
        target = _target(path)
        with contextlib.suppress(OSError):
            if link.readlink() == target:
                return
        draft = link.with_name(f".{link.name[:120]}.{self._owner}-{threading.get_ident()}")
        draft.unlink(missing_ok=True)
        draft.symlink_to(target)
        draft.replace(link)  # a link under this name may be in use: it changes at once

    def hide(self, kind: ModelKind, path: Path) -> None:
        """Take a model's link away, if it is this one's."""
        link = self.folder(kind) / path.name
        with contextlib.suppress(OSError):
            if link.readlink() == _target(path):
                link.unlink()

    def prune(self) -> None:
        """Remove links whose model another worker has evicted."""
        for name in (*_WEBUI_FOLDERS.values(), _VAE):
            for entry in _listed(self._root / name):
                link = self._root / name / entry
                with contextlib.suppress(OSError):
                    if link.is_symlink() and not link.exists():
                        link.unlink()


# -- helpers -----------------------------------------------------------------------------------------------------------


def _target(path: Path) -> Path:
    """Where a link leads: the real folder, but the model's own name, which may itself be somebody's link."""
    return Path(os.path.realpath(path.parent)) / path.name


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 - thirty thousand names, not as many objects
    except OSError:
        return []


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


def _unlinked(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return False
    return True


def _time_there(folder: Path) -> float | None:
    probe = folder / f".clock-{os.getpid()}-{threading.get_ident()}"
    try:
        probe.touch()
        return _mtime(probe) or None
    except OSError:
        return None
    finally:
        _unlinked(probe)


def _renamed(source: Path, target: Path) -> bool:
    try:
        source.rename(target)
    except OSError:
        return False
    return True


def _sync(path: Path) -> None:
    """Written through to the disk. Some network file systems cannot do that to a folder: the rename stands anyway."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EROFS):
            raise
    finally:
        os.close(descriptor)

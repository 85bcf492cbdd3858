"""The models that are there: found, held, shown to the WebUI, taken away. Nothing here speaks to the network."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from a1111_worker.catalog import LORAS, lora_of_version
from a1111_worker.context import Deadline
from a1111_worker.domain import Model, ModelKind, ModelRef
from a1111_worker.errors import DownloadFailed, ModelNotFound, ModelRejected, VolumeFull
from a1111_worker.models.eviction import MARGIN, Entry, plan_eviction, plan_for_a_full_disk
from a1111_worker.models.leases import Holds, Leases, state_of
from a1111_worker.models.safetensors import read_header
from a1111_worker.models.sidecars import Record, Sidecars, answers
from a1111_worker.models.volume import SUFFIX, CacheDirectory, WebUIFolder, can_write, digest_file

log = logging.getLogger(__name__)

FOLDERS = {ModelKind.CHECKPOINT: ("checkpoints", "Stable-diffusion"), ModelKind.LORA: ("loras", "Lora")}
"""A source's folders of a kind: as ours, as the WebUI's; a source may also be flat."""

_ALONE = "the models folder cannot be written: this model is kept by one worker alone"


@dataclass(frozen=True)
class CheckpointSpec:
    """The fixed checkpoint: where it comes from, the file it is kept as, its title, and its hash where one is known."""

    ref: ModelRef
    file: str
    name: str
    sha256: str | None = None

    def may_be(self, record: Record) -> bool:
        """Whether a file under the checkpoint's name is taken for it: unless something is known to the contrary."""
        if self.sha256 is not None:
            return record.sha256 == self.sha256
        return None in (record.version_id, self.ref.version_id) or record.version_id == self.ref.version_id


@dataclass(frozen=True)
class Found:
    """A model that is there, and what is known of it."""

    shelf: CacheDirectory
    record: Record
    downloaded: bool = False
    warnings: tuple[str, ...] = ()


class CacheDirectories:
    """Where models are looked for, in this order: the cache, the local folder, the sources.

    `home` is where new ones are written: the cache, or where that cannot be written the local folder, or nowhere.
    """

    def __init__(self, models_dir: Path, local: Path, sources: Sequence[Path], owner: str) -> None:
        self.models_dir = models_dir
        self.local = local
        self.sources = tuple(
            source for source in dict.fromkeys(sources) if source.is_dir() and not _same(source, models_dir)
        )
        self._home: dict[ModelKind, CacheDirectory | None] = {}
        self._all: dict[ModelKind, list[CacheDirectory]] = {}
        for kind in ModelKind:
            cache = _prepared(CacheDirectory(models_dir / kind.folder, kind), owner)
            self._all[kind] = [cache]
            self._home[kind] = cache if cache.writable else None
            if not cache.writable:
                here = _prepared(CacheDirectory(local / kind.folder, kind, local=True), owner)
                self._all[kind].append(here)
                self._home[kind] = here if here.writable else None
            for source in self.sources:
                folders = [source / name for name in FOLDERS[kind] if (source / name).is_dir()]
                self._all[kind] += [CacheDirectory(folder, kind) for folder in (*folders, source)]

    def of(self, kind: ModelKind) -> list[CacheDirectory]:
        return self._all[kind]

    def home(self, kind: ModelKind) -> CacheDirectory:
        """The shelf that new models of a kind are written to; raises VolumeFull where there is none."""
        home = self._home[kind]
        if home is None:
            raise VolumeFull("there is no folder that models can be written to", hint="set MODELS_DIR to one")
        return home

    def writable(self) -> list[CacheDirectory]:
        return [home for home in self._home.values() if home is not None]

    def folders(self) -> list[Path]:
        return [shelf.folder for shelves in self._all.values() for shelf in shelves]


def _prepared(shelf: CacheDirectory, owner: str) -> CacheDirectory:
    """A shelf with its folders, `writable` if they could be made."""
    try:
        shelf.prepare()
        shelf.writable = can_write(shelf.folder, owner)
    except OSError as error:
        log.warning("%s cannot be written: %s", shelf.folder, error.strerror)
    return shelf


class ModelCache:
    """The shelves with what is known of their models."""

    def __init__(
        self,
        shelves: CacheDirectories,
        registry: Sidecars,
        holds: Holds,
        leases: Leases,
        webui: WebUIFolder | None,
        *,
        owner: str,
        checkpoint: CheckpointSpec | None = None,
        limit: int | None = None,
    ) -> None:
        self.shelves = shelves
        self.registry = registry
        self._holds = holds
        self._leases = leases
        self._webui = webui
        self._owner = owner
        self._checkpoint = checkpoint
        self.limit = limit
        self._coming: dict[Path, int | None] = {}  # parts, and the sizes that they will have
        self._deciding = threading.Lock()

    # -- finding

    def find(self, ref: ModelRef, *, fresh: bool = False) -> Found | None:
        """The model that a reference means, if it is there and proven. Asks the disk for a few names, nothing more.

        Raises ModelNotFound for a name that means several files.
        """
        for shelf, file in self.candidates(ref, fresh=fresh):
            record = self.registry.look(shelf, file)
            if record is not None and _is_meant(record, ref):
                return Found(shelf, record)
        return None

    def candidates(self, ref: ModelRef, *, fresh: bool = False) -> Iterator[tuple[CacheDirectory, str]]:
        """The files that may be what a reference means, by their names."""
        for shelf in self.shelves.of(ref.kind):
            if ref.version_id is not None:
                names = shelf.names(fresh=fresh)
                known = lora_of_version(ref.version_id) if ref.kind is ModelKind.LORA else None
                if known is not None and known.file in names.files:
                    yield shelf, known.file
                spec = self._checkpoint
                if (
                    spec is not None
                    and (spec.ref.kind, spec.ref.version_id) == (ref.kind, ref.version_id)
                    and spec.file in names.files  # a name that says nothing of its version
                ):
                    yield shelf, spec.file
                for file in names.by_version.get(ref.version_id, ()):
                    yield shelf, file
            elif ref.url is not None:
                if ref.sha256 is not None:
                    for file in shelf.names(fresh=fresh).by_digest.get(ref.sha256[:16], ()):
                        yield shelf, file
                elif (of_url := self.registry.file_of_url(shelf, ref.url)) is not None:
                    yield shelf, of_url
            elif ref.name is not None and ref.model_id is None:
                files = shelf.names().named(ref.name)
                if len(files) > 1:
                    raise ModelNotFound(f"{ref.label} may be any of {', '.join(files[:5])}", hint="write it exactly")
                if files:  # the first shelf that has the name: one name never means two models
                    yield shelf, files[0]
                    return

    def claims(self, ref: ModelRef) -> Iterator[tuple[CacheDirectory, str]]:
        """The files whose names claim to be what is meant, and of which nothing else is proven."""
        for shelf, file in self.candidates(ref, fresh=True):
            record = self.registry.look(shelf, file)
            if ref.file_id is not None and not file.endswith(f"_{ref.version_id}_{ref.file_id}{SUFFIX}"):
                continue  # it claims to be another file of the version
            if record is None or (record.version_id is None and record.url is None):
                yield shelf, file

    def read(
        self,
        shelf: CacheDirectory,
        file: str,
        deadline: Deadline,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Record:
        """What is known of a file that is there, by reading it where nothing is. Raises ModelError."""
        return self.registry.look(shelf, file) or self.registry.rebuild(shelf, file, deadline, on_progress=on_progress)

    def checkpoint(self, spec: CheckpointSpec) -> Found | None:
        """The fixed checkpoint, if it is there under its name and known."""
        for shelf, file in self.named(ModelKind.CHECKPOINT, spec.file):
            record = self.registry.look(shelf, file)
            if record is not None and spec.may_be(record):
                return Found(shelf, replace(record, name=spec.name))
        return None

    def named(self, kind: ModelKind, file: str) -> Iterator[tuple[CacheDirectory, str]]:
        """Where there is a file of exactly this name."""
        for shelf in self.shelves.of(kind):
            if shelf.size(file) is not None:
                yield shelf, file

    def with_bytes(self, shelf: CacheDirectory, sha256: str) -> Record | None:
        """A model from outside CivitAI with these bytes, whatever a job called it."""
        for file in shelf.list_again().by_digest.get(sha256[:16], ()):
            record = self.registry.look(shelf, file)
            if record is not None and record.sha256 == sha256:
                return record
        return None

    def list_again(self, kind: ModelKind) -> None:
        """See what other workers did a moment ago, whatever the folder's time says."""
        for shelf in self.shelves.of(kind):
            shelf.list_again()

    def nearest(self, ref: ModelRef) -> list[str]:
        """Names that are like a reference's, for a hint."""
        stems = {known.stem for known in LORAS} if ref.kind is ModelKind.LORA else set()
        for shelf in self.shelves.of(ref.kind):
            stems |= {file.removesuffix(SUFFIX) for file in shelf.names().files}
        return difflib.get_close_matches(ref.name or "", sorted(stems), n=3)

    # -- using

    def take(self, found: Found, deadline: Deadline) -> Model | None:
        """Hold a model and show it to the WebUI; None where it went in the meantime. `release` it afterwards."""
        shelf, record = found.shelf, found.record
        if shelf.writable:
            self._holds.hold(shelf.holds, record.file, deadline)
        path = shelf.path(record.file)
        if shelf.size(record.file) != record.size:
            self._let_go(shelf, record.file)
            return None
        if self._webui is not None:
            try:
                self._webui.show(record.kind, path)
            except OSError as error:
                self._let_go(shelf, record.file)
                raise VolumeFull(f"the WebUI's folder of models cannot be written ({error.strerror})") from error
        self.registry.use(shelf, record.file)
        warnings = (*found.warnings, _ALONE) if shelf.local else found.warnings
        return record.model(path, downloaded=found.downloaded, warnings=warnings)

    def release(self, model: Model) -> None:
        for shelf in self.shelves.of(model.kind):
            if shelf.folder == model.path.parent:
                self._let_go(shelf, model.file)
                return

    def _let_go(self, shelf: CacheDirectory, file: str) -> None:
        if shelf.writable:
            self._holds.release(shelf.holds, file)

    # -- room

    def stock(self) -> list[tuple[CacheDirectory, Entry]]:
        """Every model there is, sources included. A file of a flat source is of the kind that is known of it."""
        told: dict[Path, tuple[CacheDirectory, Entry]] = {}
        for kind in ModelKind:
            for shelf in self.shelves.of(kind):
                for entry in self._entries_of(shelf):
                    is_new = entry.path not in told or self.registry.look(shelf, entry.file) is not None
                    if entry.path.parent == shelf.folder and is_new:
                        told[entry.path] = shelf, entry
        return list(told.values())

    def entries(self) -> list[Entry]:
        """Everything that takes room where we write, parts included."""
        return [entry for shelf in self.shelves.writable() for entry in self._entries_of(shelf)]

    def _entries_of(self, shelf: CacheDirectory) -> Iterator[Entry]:
        held = self._holds.held(shelf.holds)
        for file in shelf.list_again().files:
            size = shelf.size(file)
            if size is None:
                continue
            keep = "in use" if file in held else None
            if self.is_fixed(shelf.kind, file):
                keep = "the checkpoint"
            yield Entry(shelf.kind, file, shelf.path(file), size, self.registry.uses(shelf, file)[1], keep)
        for key, part, taken, left_at in shelf.leftovers():
            keep = "being fetched" if self._leases.is_alive(shelf.leases / key) else None
            yield Entry(shelf.kind, part.name, part, taken, left_at, keep)

    def is_fixed(self, kind: ModelKind, file: str) -> bool:
        spec = self._checkpoint
        return spec is not None and kind is ModelKind.CHECKPOINT and file == spec.file

    @contextlib.contextmanager
    def room(self, part: Path, size: int | None, what: str, *, kind: ModelKind, limit: int | None) -> Iterator[None]:
        """Have room for all that a part will be, beside what the others of this worker will be; it is its own until the
        block ends. Raises as `make_room`."""
        with self._deciding:
            needed = missing(part, size) + sum(missing(*other) for other in self._coming.items())
            self.make_room(needed, what, kind=kind, limit=limit)
            self._coming[part] = size
        try:
            yield
        finally:
            with self._deciding:
                self._coming.pop(part, None)

    def make_room(self, needed: int, what: str, *, kind: ModelKind, limit: int | None = None) -> None:
        """Have room for `needed` bytes more, by evicting; VolumeFull where that cannot be.

        `limit` is what the cache may take.
        """
        for _ in range(8):  # what was planned may be in use by the time it is to go
            free = self.shelves.home(kind).free()
            if limit is None and free >= needed + MARGIN:
                return
            plan = plan_eviction(self.entries(), needed, limit=limit, free=free)
            if plan.short:
                raise VolumeFull(
                    f"there is no room for {what}: {plan.why}, and {plan.short / 1e9:.2f} GB too little can be freed",
                    hint="enlarge the volume or MODEL_CACHE_LIMIT_GB, or ask for fewer models at once",
                )
            if all(self.evict(entry, plan.why) for entry in plan.remove):
                return
        raise VolumeFull(f"there is no room for {what}: everything that could be freed is in use")

    def clear(self, needed: int, what: str, *, kind: ModelKind) -> None:
        """Have room for `needed` bytes more on a disk that turned out to be full; VolumeFull where that cannot be."""
        entries = self.entries()
        plan = plan_for_a_full_disk(entries, needed, free=self.shelves.home(kind).free())
        if plan.short or not [entry for entry in plan.remove if self.evict(entry, plan.why)]:
            raise VolumeFull(
                f"the disk is full, and not enough may go to make room for {what}",
                hint="enlarge the volume, or ask for fewer models at once",
            )

    def evict(self, entry: Entry, why: str, *, even_fixed: bool = False) -> bool:
        """Take a model away, unless anybody uses it by now. Whether it is gone."""
        if self.is_fixed(entry.kind, entry.file) and not even_fixed:
            return False
        shelf = next(s for s in self.shelves.writable() if entry.path.is_relative_to(s.folder))
        if entry.path.parent == shelf.parts:
            log.info("removing %s, left unfinished: %s", entry.file, why)
            shelf.drop_part(entry.path)
            return True
        with self._holds.claim(shelf.holds, entry.file) as may_go:
            if not may_go:
                return shelf.size(entry.file) is None
            try:
                away = shelf.take_away(entry.file, self._owner)
            except OSError:
                return shelf.size(entry.file) is None
            if entry.file in self._holds.held(shelf.holds):  # a volume that shows other workers' files late
                shelf.put_back(away, entry.file)
                return False
            self.registry.forget(shelf, entry.file)
            if self._webui is not None:
                self._webui.hide(entry.kind, entry.path)
            away.unlink(missing_ok=True)
        log.info("evicted %s %s, %.2f GB: %s", entry.kind.value, entry.file, entry.size / 1e9, why)
        return True

    def set_aside(self, shelf: CacheDirectory, file: str, deadline: Deadline) -> None:
        """Give a file that sits on another model's name the name that its bytes deserve. Nothing is lost."""
        record = self.registry.look(shelf, file)
        try:
            record = record or self.registry.rebuild(shelf, file, deadline)
            other = digest_file(file, record.sha256)
        except ModelRejected:
            other = f"{file}.not-a-model"
        with self._holds.claim(shelf.holds, file) as may_go:
            if not may_go:
                raise DownloadFailed(f"another worker uses a different file under the name {file}", hint="try again")
            shelf.rename(file, other)
            if record is not None:
                self.registry.write(shelf, replace(record, file=other))
        log.warning("%s is not the model that has this name: set aside as %s", file, other)

    def is_taken(self, shelf: CacheDirectory, file: str) -> bool:
        """Whether there is a file of this name, and anybody uses it."""
        return shelf.size(file) is not None and file in self._holds.held(shelf.holds)

    def occupant(self, shelf: CacheDirectory, file: str) -> str | None:
        """The file that has a name, on volumes that tell `A` from `a` and on those that do not."""
        if shelf.size(file) is None:
            return None
        names = shelf.list_again()
        if file in names.files:
            return file
        return next(iter(names.by_stem.get(file.removesuffix(SUFFIX).casefold(), (file,))))

    def tell_living_from_dead(self, deadline: Deadline, *, poll: float = 0.5) -> bool:
        """Watch everybody's holds and leases until each has changed or gone; False where there are none.

        A worker knows of the others anyway; a new process has seen nobody twice yet.
        """
        notes = [path for shelf in self.shelves.writable() for path in self._holds.others(shelf.holds)]
        notes += [path for shelf in self.shelves.writable() for path in shelf.leases.glob("*")]
        unknown = {path: state for path in notes if (state := state_of(path)) is not None}
        if unknown:
            log.warning("watching whether the owners of %d holds and leases still live", len(unknown))
        while unknown:
            deadline.wait(poll)
            self.watch()
            unknown = {path: state for path, state in unknown.items() if state_of(path) == state}
        return bool(notes)

    def watch(self) -> None:
        """What a heartbeat looks after: who else is alive, links that lead nowhere."""
        for shelf in self.shelves.writable():
            self._holds.watch(shelf.holds)
            self._leases.watch(shelf.leases)
        if self._webui is not None:
            self._webui.prune()


def missing(part: Path, size: int | None) -> int:
    """Bytes that a download will still take from the disk."""
    if size is None:
        return 0
    try:
        return max(0, size - part.stat().st_blocks * 512)
    except OSError:
        return size


def show_vaes(webui: WebUIFolder, roots: Sequence[Path]) -> None:
    """Let the WebUI see the VAEs that somebody put into `vae/` of the cache or of a source."""
    for path in (path for root in roots for name in ("vae", "VAE") for path in (root / name).glob(f"*{SUFFIX}")):
        try:
            read_header(path)
            webui.show_vae(path)
        except (ModelRejected, OSError) as error:
            log.warning("the VAE %s is not shown to the WebUI: %s", path.name, error)


def _is_meant(record: Record, ref: ModelRef) -> bool:
    if ref.version_id is not None:
        return answers(record, ref)
    return ref.sha256 is None or ref.url is None or record.sha256 == ref.sha256


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)

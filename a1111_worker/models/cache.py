"""The models on disk: found, held, shown to the WebUI, evicted. Nothing here speaks to the network."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from a1111_worker.catalog import LORAS, lora_of_version
from a1111_worker.context import Deadline
from a1111_worker.domain import Model, ModelKind, ModelRef
from a1111_worker.errors import DownloadFailed, ModelNotFound, ModelRejected, VolumeFull
from a1111_worker.models.eviction import Entry
from a1111_worker.models.holds import Holds
from a1111_worker.models.leases import Leases
from a1111_worker.models.liveness import state_of
from a1111_worker.models.names import SUFFIX, digest_file
from a1111_worker.models.safetensors import read_header
from a1111_worker.models.sidecars import ModelRecord, Sidecars
from a1111_worker.models.volume import CacheDirectories, CacheDirectory
from a1111_worker.models.webui_folder import WebUIFolder
from a1111_worker.similar import nearest

log = logging.getLogger(__name__)

_LOCAL_ONLY = "the models folder cannot be written: this model is kept by one worker alone"


@dataclass(frozen=True)
class CheckpointSpec:
    """The fixed checkpoint: where it comes from, the file it is kept as, its title, and its hash if one is known."""

    ref: ModelRef
    file: str
    name: str
    sha256: str | None = None

    def accepts(self, record: ModelRecord) -> bool:
        """Whether a file under the checkpoint's name counts as it: yes, unless something is known to the contrary."""
        if self.sha256 is not None:
            return record.sha256 == self.sha256
        return None in (record.version_id, self.ref.version_id) or record.version_id == self.ref.version_id


@dataclass(frozen=True)
class CacheSettings:
    """Where the models of one worker lie, and what is kept there.

    `webui_dir` is where the WebUI sees them, None if there is no WebUI. `local_dir` is a folder of this container
    alone, for sidecars of folders that cannot be written, and for models if the cache cannot be written. `sources` are
    folders that models are only read from. `limit` is what the cache may take, in bytes.
    """

    models_dir: Path
    webui_dir: Path | None
    local_dir: Path
    sources: Sequence[Path] = ()
    checkpoint: CheckpointSpec | None = None
    limit: int | None = None


@dataclass(frozen=True)
class CacheHit:
    """A model that is there, and what is known of it. `downloaded`: this process has just fetched it."""

    directory: CacheDirectory
    record: ModelRecord
    downloaded: bool = False
    warnings: tuple[str, ...] = ()


class ModelCache:
    """The cache directories, with what is known of their models and who uses them."""

    def __init__(self, settings: CacheSettings, holds: Holds, leases: Leases) -> None:
        self._owner = holds.owner
        self.directories = CacheDirectories(settings.models_dir, settings.local_dir, settings.sources, self._owner)
        self.sidecars = Sidecars(settings.local_dir / "notes")
        self._holds = holds
        self._leases = leases
        self._webui = None if settings.webui_dir is None else WebUIFolder(settings.webui_dir, self._owner)
        self._checkpoint = settings.checkpoint
        self.limit = settings.limit

    def prepare_webui_folder(self) -> None:
        """Make the folder that the WebUI sees, with the VAEs that somebody put into `vae/` of the cache or a source.

        Raises OSError if it cannot be made.
        """
        if self._webui is None:
            return
        vae_folders = self.directories.vae_folders()
        self._webui.prepare([*self.directories.folders(), *vae_folders])
        for path in (path for folder in vae_folders for path in folder.glob(f"*{SUFFIX}")):
            try:
                read_header(path)
                self._webui.show_vae(path)
            except (ModelRejected, OSError) as error:
                log.warning("the VAE %s is not shown to the WebUI: %s", path.name, error)

    # -- finding a model

    def find(self, ref: ModelRef, *, fresh: bool = False) -> CacheHit | None:
        """The model that a reference means, if it is there and verified. Looks at a few names, and at nothing more.

        Raises ModelNotFound for a name that means several files.
        """
        for directory, file in self.list_candidates(ref, fresh=fresh):
            record = self.sidecars.find(directory, file)
            if record is not None and _is_meant(record, ref):
                return CacheHit(directory, record)
        return None

    def list_candidates(self, ref: ModelRef, *, fresh: bool = False) -> Iterator[tuple[CacheDirectory, str]]:
        """The files that may be what a reference means, by their names."""
        for directory in self.directories.of(ref.kind):
            if ref.version_id is not None:
                for file in self._files_of_version(directory, ref.version_id, fresh=fresh):
                    yield directory, file
            elif ref.url is not None:
                if ref.sha256 is not None:
                    for file in directory.index(fresh=fresh).by_digest.get(ref.sha256[:16], ()):
                        yield directory, file
                elif (of_url := self.sidecars.file_of_url(directory, ref.url)) is not None:
                    yield directory, of_url
            elif ref.name is not None and ref.model_id is None:
                files = directory.index().files_named(ref.name)
                if len(files) > 1:
                    raise ModelNotFound(f"{ref.label} may be any of {', '.join(files[:5])}", hint="write it exactly")
                if files:  # the first directory that has the name counts: one name never means two models
                    yield directory, files[0]
                    return

    def _files_of_version(self, directory: CacheDirectory, version_id: int, *, fresh: bool) -> Iterator[str]:
        index = directory.index(fresh=fresh)
        known = lora_of_version(version_id) if directory.kind is ModelKind.LORA else None
        if known is not None and known.file in index.files:
            yield known.file
        spec = self._checkpoint
        if (
            spec is not None
            and (spec.ref.kind, spec.ref.version_id) == (directory.kind, version_id)
            and spec.file in index.files  # this name does not contain its version
        ):
            yield spec.file
        yield from index.by_version.get(version_id, ())

    def list_unverified(self, ref: ModelRef) -> Iterator[tuple[CacheDirectory, str]]:
        """The files whose names claim to be what a reference means, and of which nothing else is verified."""
        for directory, file in self.list_candidates(ref, fresh=True):
            record = self.sidecars.find(directory, file)
            if ref.file_id is not None and not file.endswith(f"_{ref.version_id}_{ref.file_id}{SUFFIX}"):
                continue  # it claims to be another file of the version
            if record is None or (record.version_id is None and record.url is None):
                yield directory, file

    def identify(
        self,
        directory: CacheDirectory,
        file: str,
        deadline: Deadline,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> ModelRecord:
        """What is known of a file that is there. If nothing is known, the file is read. Raises ModelError."""
        known = self.sidecars.find(directory, file)
        return known or self.sidecars.rebuild(directory, file, deadline, on_progress=on_progress)

    def find_checkpoint(self, spec: CheckpointSpec) -> CacheHit | None:
        """The fixed checkpoint, if it is there under its name and known."""
        for directory in self.directories_with(ModelKind.CHECKPOINT, spec.file):
            record = self.sidecars.find(directory, spec.file)
            if record is not None and spec.accepts(record):
                return CacheHit(directory, replace(record, name=spec.name))
        return None

    def directories_with(self, kind: ModelKind, file: str) -> Iterator[CacheDirectory]:
        """The directories that have a file of exactly this name."""
        for directory in self.directories.of(kind):
            if directory.size(file) is not None:
                yield directory

    def find_same_bytes(self, directory: CacheDirectory, sha256: str) -> ModelRecord | None:
        """A model from outside CivitAI with these bytes, whatever a job called it."""
        for file in directory.refresh().by_digest.get(sha256[:16], ()):
            record = self.sidecars.find(directory, file)
            if record is not None and record.sha256 == sha256:
                return record
        return None

    def refresh(self, kind: ModelKind) -> None:
        """See what other workers did a moment ago, whatever the folders' times are."""
        for directory in self.directories.of(kind):
            directory.refresh()

    def similar_names(self, ref: ModelRef) -> list[str]:
        """Names that are like a reference's, for a hint."""
        stems = {known.stem for known in LORAS} if ref.kind is ModelKind.LORA else set()
        for directory in self.directories.of(ref.kind):
            stems |= {file.removesuffix(SUFFIX) for file in directory.index().files}
        return nearest(ref.name or "", sorted(stems))

    # -- using a model

    def hold(self, hit: CacheHit, deadline: Deadline) -> Model | None:
        """Hold a model, and show it to the WebUI. None if it is gone by now. `release` it afterwards."""
        directory, record = hit.directory, hit.record
        if directory.is_writable:
            self._holds.hold(directory.holds, record.file, deadline)
        path = directory.path(record.file)
        if directory.size(record.file) != record.size:
            self._release(directory, record.file)
            return None
        if self._webui is not None:
            try:
                self._webui.show(record.kind, path)
            except OSError as error:
                self._release(directory, record.file)
                raise VolumeFull(f"the WebUI's folder of models cannot be written ({error.strerror})") from error
        self.sidecars.count_use(directory, record.file)
        warnings = (*hit.warnings, _LOCAL_ONLY) if directory.is_local else hit.warnings
        return record.model(path, downloaded=hit.downloaded, warnings=warnings)

    def release(self, model: Model) -> None:
        """End one `hold` of a model."""
        for directory in self.directories.of(model.kind):
            if directory.folder == model.path.parent:
                self._release(directory, model.file)
                return

    def _release(self, directory: CacheDirectory, file: str) -> None:
        if directory.is_writable:
            self._holds.release(directory.holds, file)

    # -- everything that is there

    def list_models(self) -> list[tuple[CacheDirectory, Entry]]:
        """Every model, those of sources too. A file of a flat source is listed once, with the kind that is known."""
        listed: dict[Path, tuple[CacheDirectory, Entry]] = {}
        for kind in ModelKind:
            for directory in self.directories.of(kind):
                for entry in self._entries(directory):
                    is_better = entry.path not in listed or self.sidecars.find(directory, entry.file) is not None
                    if entry.path.parent == directory.folder and is_better:
                        listed[entry.path] = directory, entry
        return list(listed.values())

    def list_entries(self) -> list[Entry]:
        """Everything that takes room in the directories that are written to, partial files too."""
        return [entry for directory in self.directories.writable() for entry in self._entries(directory)]

    def _entries(self, directory: CacheDirectory) -> Iterator[Entry]:
        held = self._holds.held(directory.holds)
        for file in directory.refresh().files:
            size = directory.size(file)
            if size is None:
                continue
            keep = "in use" if file in held else None
            if self.is_checkpoint(directory.kind, file):
                keep = "the checkpoint"
            last_used = self.sidecars.uses(directory, file).last
            yield Entry(directory.kind, file, directory.path(file), size, last_used, keep)
        for unfinished in directory.unfinished_downloads():
            path = unfinished.path
            keep = "being fetched" if self._leases.is_alive(directory.leases / unfinished.key) else None
            yield Entry(directory.kind, path.name, path, unfinished.size, unfinished.written, keep)

    def is_checkpoint(self, kind: ModelKind, file: str) -> bool:
        """Whether this is the file name of the fixed checkpoint."""
        spec = self._checkpoint
        return spec is not None and kind is ModelKind.CHECKPOINT and file == spec.file

    # -- removing and renaming models

    def evict(self, entry: Entry, why: str, *, even_checkpoint: bool = False) -> bool:
        """Remove a model, unless anybody uses it by now. Returns whether it is gone."""
        if self.is_checkpoint(entry.kind, entry.file) and not even_checkpoint:
            return False
        directory = next(d for d in self.directories.writable() if entry.path.is_relative_to(d.folder))
        if entry.path.parent == directory.partial_files:
            log.info("removing %s, left unfinished: %s", entry.file, why)
            directory.remove_partial_file(entry.path)
            return True
        with self._holds.claim(directory.holds, entry.file) as may_evict:
            if not may_evict:
                return directory.size(entry.file) is None
            try:
                trashed = directory.move_to_trash(entry.file, self._owner)
            except OSError:
                return directory.size(entry.file) is None
            if entry.file in self._holds.held(directory.holds):  # a volume that shows other workers' files late
                directory.restore(trashed, entry.file)
                return False
            self.sidecars.remove(directory, entry.file)
            if self._webui is not None:
                self._webui.hide(entry.kind, entry.path)
            trashed.unlink(missing_ok=True)
        log.info("evicted %s %s, %.2f GB: %s", entry.kind.value, entry.file, entry.size / 1e9, why)
        return True

    def make_name_free(self, directory: CacheDirectory, file: str, sha256: str, deadline: Deadline) -> bool:
        """Free a name for a model with this SHA-256. False if the very model has the name already.

        A different file under the name is renamed after its own bytes, not deleted. Raises DownloadFailed if another
        worker uses it.
        """
        present = _file_under_name(directory, file)
        if present is None:
            return True
        record = self.sidecars.find(directory, present)
        if record is not None and record.sha256 == sha256 and present == file:
            return False
        try:
            record = record or self.sidecars.rebuild(directory, present, deadline)
            new_name = digest_file(present, record.sha256)
        except ModelRejected:
            new_name = f"{present}.not-a-model"
        with self._holds.claim(directory.holds, present) as may_rename:
            if not may_rename:
                raise DownloadFailed(f"another worker uses a different file under the name {present}", hint="try again")
            directory.rename(present, new_name)
            if record is not None:
                self.sidecars.write(directory, replace(record, file=new_name))
        log.warning("%s is a different file under a model's name: renamed to %s", present, new_name)
        return True

    def is_in_use(self, directory: CacheDirectory, file: str) -> bool:
        """Whether there is a file of this name, and anybody uses it."""
        return directory.size(file) is not None and file in self._holds.held(directory.holds)

    # -- other workers

    def observe_other_workers(self, deadline: Deadline, *, poll: float = 0.5) -> bool:
        """Watch all holds and leases of other owners until each has changed or is gone. False if there are none.

        A worker knows the others anyway. A new process has not seen anybody's files twice yet.
        """
        files = [path for directory in self.directories.writable() for path in self._holds.others(directory.holds)]
        files += [path for directory in self.directories.writable() for path in directory.leases.glob("*")]
        undecided = {path: state for path in files if (state := state_of(path)) is not None}
        if undecided:
            log.warning("watching whether the owners of %d holds and leases are alive", len(undecided))
        while undecided:
            deadline.wait(poll)
            self.look_after()
            undecided = {path: state for path, state in undecided.items() if state_of(path) == state}
        return bool(files)

    def look_after(self) -> None:
        """Remove what dead workers left, and links to models that are gone."""
        for directory in self.directories.writable():
            self._holds.watch(directory.holds)
            self._leases.watch(directory.leases)
        if self._webui is not None:
            self._webui.prune()


def _file_under_name(directory: CacheDirectory, file: str) -> str | None:
    """The file that has a name. If the volume does not distinguish `A` from `a`, it may be spelled differently."""
    if directory.size(file) is None:
        return None
    index = directory.refresh()
    if file in index.files:
        return file
    return next(iter(index.by_stem.get(file.removesuffix(SUFFIX).casefold(), (file,))))


def _is_meant(record: ModelRecord, ref: ModelRef) -> bool:
    if ref.version_id is not None:
        return record.is_file_of(ref)
    return ref.sha256 is None or ref.url is None or record.sha256 == ref.sha256

"""The models on disk: found, held, shown to the WebUI, evicted. Nothing here speaks to the network."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from a1111_worker.catalog import LORAS, lora_of_version
from a1111_worker.context import Deadline
from a1111_worker.domain import Model, ModelKind, ModelRef
from a1111_worker.errors import DownloadFailed, ModelNotFound, ModelRejected, VolumeFailed
from a1111_worker.files import VolumeState, names_in, translated, volume_error, volume_state
from a1111_worker.models.eviction import BEING_FETCHED, IN_USE, Entry
from a1111_worker.models.holds import Holds
from a1111_worker.models.hub_cache import CachedHubFile, find_in_hub_cache
from a1111_worker.models.hub_files import HubAccess, hub_file_of
from a1111_worker.models.leases import Leases
from a1111_worker.models.liveness import state_of
from a1111_worker.models.names import SUFFIX, digest_file, is_named, short_name
from a1111_worker.models.sidecars import ModelRecord, Sidecars
from a1111_worker.models.volume import CacheDirectories, CacheDirectory, UnfinishedDownload
from a1111_worker.models.webui_folder import WebUIFolder, make_link
from a1111_worker.similar import nearest
from a1111_worker.webui_names import split_hash

log = logging.getLogger(__name__)

_LOCAL_ONLY = "the models folder cannot be written: only this worker has this model"


@dataclass(frozen=True)
class CheckpointSpec:
    """The fixed checkpoint: where it comes from, the file it is kept as, its title, and its hash if one is known."""

    ref: ModelRef
    file: str
    name: str
    sha256: str | None = None

    def accepts(self, record: ModelRecord) -> bool:
        """Whether a file under the checkpoint's name is taken for it: yes, unless something known contradicts that."""
        if self.sha256 is not None:
            return record.sha256 == self.sha256
        return None in (record.version_id, self.ref.version_id) or record.version_id == self.ref.version_id


@dataclass(frozen=True)
class CacheSettings:
    """Where the models of one worker lie, and what is kept there.

    `webui_dir` is where the WebUI sees them, None if there is no WebUI. `local_dir` is a folder of this container
    alone, for sidecars of folders that cannot be written, and for models if the cache cannot be written. `sources` are
    folders that models are only read from. `limit` is what the cache may take, in bytes. `hub_cache` is RunPod's folder
    with files of Hugging Face, and `hub_access` says which of those files callers may have.
    """

    models_dir: Path
    webui_dir: Path | None
    local_dir: Path
    sources: Sequence[Path] = ()
    checkpoint: CheckpointSpec | None = None
    limit: int | None = None
    hub_cache: Path | None = None
    hub_access: HubAccess = HubAccess()


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
        self._hub_cache = settings.hub_cache
        self._hub_access = settings.hub_access

    def prepare_webui_folder(self) -> None:
        """Make the folder that the WebUI sees. Raises OSError if it cannot be made."""
        if self._webui is not None:
            self._webui.prepare()

    # -- finding a model

    def find(self, ref: ModelRef, *, fresh: bool = False, is_shown: bool = False) -> CacheHit | None:
        """The model that a reference means, if it is there and verified. Looks at a few names, and at nothing more.

        `is_shown`: Hugging Face has just shown the file, so a restricted one counts too. Raises ModelNotFound for a
        name that means several files.
        """
        for directory, file in self.list_candidates(ref, fresh=fresh):
            record = self.sidecars.find(directory, file)
            if record is not None and is_meant(record, ref) and (is_shown or self.is_open(directory, record)):
                return CacheHit(directory, record)
        return None

    def is_open(self, directory: CacheDirectory, record: ModelRecord) -> bool:
        """Whether every caller may have a model, without asking Hugging Face."""
        if not record.restricted and (directory is not self.directories.linked(record.kind) or record.url is not None):
            return True
        file = hub_file_of(record.url)
        return file is not None and self._hub_access.may_use_copy(file)

    def list_candidates(self, ref: ModelRef, *, fresh: bool = False) -> Iterator[tuple[CacheDirectory, str]]:
        """The files that may be what a reference means, by their names."""
        for directory in self.directories.of(ref.kind):
            if ref.version_id is not None:
                for file in self._files_of_version(directory, ref.version_id, fresh=fresh):
                    yield directory, file
            elif ref.url is not None or ref.hub is not None:
                if ref.sha256 is not None:
                    for file in directory.index(fresh=fresh).by_digest.get(ref.sha256[:16], ()):
                        yield directory, file
                elif (of_url := self._file_of_url(directory, ref)) is not None:
                    yield directory, of_url
            elif ref.name is not None and ref.model_id is None:
                files = directory.index().files_named(ref.name)
                if len(files) > 1:
                    raise ModelNotFound(f"{ref.label} may be any of {', '.join(files[:5])}", hint="write it exactly")
                if files:  # only the first directory that has the name: one name never means two models
                    yield directory, files[0]
                    return
        if ref.is_bare_name:
            yield from self._files_shown_as(ref)

    def _files_shown_as(self, ref: ModelRef) -> Iterator[tuple[CacheDirectory, str]]:
        """The files that the WebUI may know by a name with a hash, if no file itself has that name."""
        parts = split_hash(ref.name or "")
        if parts is None:
            return
        for directory in self.directories.of(ref.kind):
            for file in directory.index().files_shown_as(parts[0]):
                yield directory, file

    def _file_of_url(self, directory: CacheDirectory, ref: ModelRef) -> str | None:
        """The file that was fetched from a reference's URL. A branch of Hugging Face may mean another file by now."""
        if ref.hub is not None:
            return self.sidecars.file_of_url(directory, ref.hub.url) if ref.hub.is_pinned else None
        return self.sidecars.file_of_url(directory, ref.url or "")

    def find_last_known(self, ref: ModelRef) -> CacheHit | None:
        """The file that a branch of Hugging Face meant when it was fetched the last time."""
        for directory in self.directories.of(ref.kind):
            file = None if ref.hub is None else self.sidecars.file_of_url(directory, ref.hub.url)
            record = None if file is None else self.sidecars.find(directory, file)
            if record is not None and ref.sha256 in (None, record.sha256) and self.is_open(directory, record):
                return CacheHit(directory, record)
        return None

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

    # -- RunPod's copies of files of Hugging Face

    def find_hub_copy(self, ref: ModelRef) -> CachedHubFile | None:
        """RunPod's copy of the file that a reference means. Nothing of it is verified."""
        if self._hub_cache is None or ref.hub is None:
            return None
        return find_in_hub_cache(self._hub_cache, ref.hub)

    def may_use_copy(self, copy: CachedHubFile) -> bool:
        """Whether every caller may have RunPod's copy, without asking Hugging Face."""
        return self._hub_access.may_use_copy(copy.file)

    def link(self, kind: ModelKind, path: Path, file: str) -> CacheDirectory:
        """Let a file that lies somewhere else have a name in the cache, for this container alone. Nothing is copied.

        Returns the directory of the link. Raises VolumeFailed.
        """
        directory = self.directories.linked(kind)
        with translated("linking a model"):
            directory.folder.mkdir(parents=True, exist_ok=True)
            make_link(directory.path(file), path, self._owner)
        directory.refresh()
        return directory

    # -- using a model

    def hold(self, hit: CacheHit, deadline: Deadline) -> Model | None:
        """Hold a model, and show it to the WebUI. None if it is gone by now. `release` it afterwards."""
        directory, record = hit.directory, hit.record
        model = record.model(
            directory.path(record.file),
            downloaded=hit.downloaded,
            warnings=(*hit.warnings, _LOCAL_ONLY) if directory.is_local else hit.warnings,
        )
        if not self._hold(directory, model, deadline):
            return None
        self.sidecars.count_use(directory, record.file)
        return model

    def is_still_there(self, model: Model, deadline: Deadline) -> bool:
        """Whether a model that is held is still there. It is held and shown to the WebUI again, as in the beginning.

        Another worker may have evicted it: it saw no sign of life while this worker was paused for a minute.
        """
        directory = self._directory_of(model)
        if not self._hold(directory, model, deadline):
            return False
        self._release(directory, model.file)
        return True

    def keep(self, model: Model, deadline: Deadline) -> bool:
        """Hold a model that is held once more. False if it is gone. `release` it afterwards."""
        return self._hold(self._directory_of(model), model, deadline)

    def release(self, model: Model) -> None:
        """End one `hold` of a model."""
        self._release(self._directory_of(model), model.file)

    def _hold(self, directory: CacheDirectory, model: Model, deadline: Deadline) -> bool:
        """Keep a model, and show it to the WebUI. False if it is gone by now; then it is not kept."""
        if directory.is_writable:
            self._holds.hold(directory.holds, model.file, deadline)
        try:
            is_there = directory.size(model.file) == model.size
            if is_there and self._webui is not None:
                with translated("showing a model to the WebUI"):
                    self._webui.show(model)
        except BaseException:
            self._release(directory, model.file)
            raise
        if not is_there:
            self._release(directory, model.file)
        return is_there

    def _directory_of(self, model: Model) -> CacheDirectory:
        return next(found for found in self.directories.of(model.kind) if found.folder == model.path.parent)

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
            try:
                size, last_used = directory.size(file), self.sidecars.uses(directory, file).last
            except VolumeFailed:
                yield Entry(directory.kind, file, directory.path(file), 0, 0.0, "cannot be read")
                continue
            if size is None:
                continue
            keep = IN_USE if short_name(file) in held else None
            if self.is_checkpoint(directory.kind, file):
                keep = "the checkpoint"
            yield Entry(directory.kind, file, directory.path(file), size, last_used, keep)
        for unfinished in directory.unfinished_downloads():
            path = unfinished.path
            keep = BEING_FETCHED if self._is_being_fetched(directory, path) else None
            to_come = self._to_come(directory, unfinished) if keep else 0
            yield Entry(directory.kind, path.name, path, unfinished.size, unfinished.written, keep, to_come)
        for path, size in directory.trashed_files():
            keep = "being removed" if self._leases.is_alive(path) else None  # its worker was killed meanwhile
            yield Entry(directory.kind, path.name, path, size, 0.0, keep)

    def _is_being_fetched(self, directory: CacheDirectory, partial_file: Path) -> bool:
        return self._leases.is_alive(directory.sign_of_life(partial_file))

    def _to_come(self, directory: CacheDirectory, unfinished: UnfinishedDownload) -> int:
        """Bytes that another worker is still adding to a partial file. What this one adds has its room reserved."""
        note = self._leases.read(directory.sign_of_life(unfinished.path))
        if note is None or note.owner == self._owner or note.total is None:
            return 0
        return max(0, note.total - unfinished.size)

    def is_checkpoint(self, kind: ModelKind, file: str) -> bool:
        """Whether this is the file name of the fixed checkpoint."""
        spec = self._checkpoint
        return spec is not None and kind is ModelKind.CHECKPOINT and file == spec.file

    # -- removing and renaming models

    def evict(self, entry: Entry, why: str, *, even_checkpoint: bool = False) -> bool:
        """Remove a model, unless anybody uses it by now. Returns whether it is gone.

        Raises VolumeFailed if it cannot be found out whether it is in use, or the volume refuses its removal.
        """
        if self.is_checkpoint(entry.kind, entry.file) and not even_checkpoint:
            return False
        directory = next(d for d in self.directories.writable() if entry.path.is_relative_to(d.folder))
        if entry.path.parent == directory.partial_files:
            if self._is_being_fetched(directory, entry.path):
                return False
            log.info("removing %s, left unfinished: %s", entry.file, why)
            directory.remove_partial_file(entry.path)
            return True
        if entry.path.parent == directory.trash:
            with translated("emptying the trash"):
                entry.path.unlink(missing_ok=True)
            return True
        with self._holds.claim(directory.holds, entry.file) as may_evict:
            if not may_evict:
                return directory.size(entry.file) is None
            try:
                trashed = directory.move_to_trash(entry.file, self._owner)
            except FileNotFoundError:
                return directory.size(entry.file) is None
            # Without a claim, or on a volume that shows other workers' files late, somebody may hold it by now.
            if trashed is not None and self._is_held_after_all(directory, entry.file, trashed):
                return False
            self.sidecars.remove(directory, entry.file)
            if self._webui is not None:
                self._webui.hide(entry.kind, entry.path)
            if trashed is not None:
                with translated("removing a model"):
                    trashed.unlink(missing_ok=True)
        log.info("evicted %s %s, %.2f GB: %s", entry.kind.value, entry.file, entry.size / 1e9, why)
        return True

    def _is_held_after_all(self, directory: CacheDirectory, file: str, trashed: Path) -> bool:
        """Whether anybody uses a model that is in the trash. Then it is brought back."""
        try:
            is_held = self._holds.is_held(directory.holds, file)
        except VolumeFailed:
            directory.restore(trashed, file)
            raise
        if is_held:
            directory.restore(trashed, file)
        return is_held

    def make_name_free(self, directory: CacheDirectory, file: str, sha256: str, deadline: Deadline) -> bool:
        """Free a name for a model with this SHA-256. False if the very model has the name already.

        A different file under the name is renamed after its own bytes, not deleted. Raises DownloadFailed if another
        worker uses it, VolumeFailed if it cannot be read.
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
            new_name = f"{short_name(present)}.not-a-model"
        except ModelNotFound:  # it is gone by now
            return True
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
        return directory.size(file) is not None and self._holds.is_held(directory.holds, file)

    # -- other workers

    def observe_other_workers(self, deadline: Deadline, *, poll: float = 0.5) -> bool:
        """Watch all holds and leases of other owners, and the trash, until each file has changed or is gone.

        False if there are none. A worker knows the others anyway. A new process has not seen anybody's files twice yet.
        """
        files: list[Path] = []
        for directory in self.directories.writable():
            files += self._holds.others(directory.holds)
            files += [folder / name for folder in (directory.leases, directory.trash) for name in names_in(folder)]
        undecided = {path: state for path in files if (state := state_of(path)) is not None}
        if undecided:
            log.warning("watching whether the owners of %d holds and leases are alive", len(undecided))
        while undecided:
            deadline.wait(poll)
            self.look_after()
            undecided = {path: state for path, state in undecided.items() if state_of(path) == state}
        return bool(files)

    def look_after(self) -> None:
        """Remove what dead workers left, and links to models that are gone. Raises VolumeFailed."""
        for directory in self.directories.writable():
            self._holds.watch(directory.holds)
            self._leases.watch(directory.leases)
            self._leases.watch(directory.trash)
            self._leases.watch_partial_files(directory.partial_files)
        if self._webui is not None:
            self._webui.prune()


def _file_under_name(directory: CacheDirectory, file: str) -> str | None:
    """The file of this name, a model or not. If the volume ignores case, it may be spelled differently."""
    try:
        directory.path(file).lstat()
    except OSError as error:
        if volume_state(error) is not VolumeState.GONE:
            raise volume_error(error, "looking at a file") from error
        return None
    index = directory.refresh()
    if file in index.files:
        return file
    return next(iter(index.by_stem.get(file.removesuffix(SUFFIX).casefold(), (file,))))


def is_meant(record: ModelRecord, ref: ModelRef) -> bool:
    """Whether a reference means the file with this record, which is one of `ModelCache.list_candidates`."""
    if ref.version_id is not None:
        return record.is_file_of(ref)
    if ref.is_bare_name and not is_named(record.file, ref.name or ""):
        parts = split_hash(ref.name or "")
        return parts is not None and record.sha256.startswith(parts[1])
    return ref.sha256 is None or (ref.url is None and ref.hub is None) or record.sha256 == ref.sha256

"""A worker's models: on disk, proven, and kept there until the job ends.

`hold` looks on disk first (library.py); what is missing comes through arrival.py. Which file means what is in volume.py
and registry.py, who may be at work on it in leases.py, what goes when room is needed in eviction.py.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from a1111_worker.context import Deadline, JobContext, ReportProgress
from a1111_worker.domain import HeldModels, Model, ModelKind, ModelRef
from a1111_worker.errors import (
    DownloadFailed,
    InvalidRequest,
    JobCancelled,
    JobTimeout,
    ModelError,
    ModelNotFound,
    ModelRejected,
    VolumeFull,
)
from a1111_worker.heartbeat import Heartbeat
from a1111_worker.models.cache import CacheDirectories, CheckpointSpec, Found, ModelCache, show_vaes
from a1111_worker.models.civitai import CivitAI
from a1111_worker.models.eviction import Entry
from a1111_worker.models.fetcher import Fetcher
from a1111_worker.models.leases import Holds, Leases, Watch, new_owner
from a1111_worker.models.progress import AggregateProgress, FileProgress
from a1111_worker.models.safetensors import families_fit
from a1111_worker.models.sidecars import Record, Sidecars
from a1111_worker.models.volume import SUFFIX, WebUIFolder
from a1111_worker.transfer.download import Downloader

log = logging.getLogger(__name__)

AT_ONCE = 16
PART_LIFE = 24 * 3600.0
"""Seconds after which an unfinished part that nobody came back for is removed."""


REPLACED = "; replaced"


@dataclass(frozen=True)
class VerifyResult:
    """What `verify` found of one model."""

    entry: Entry
    sha256: str | None
    finding: str
    ok: bool


class ModelManager:
    """One worker's models. `close` it, or use it in a `with`.

    `webui_dir` is where the WebUI sees them, None where there is no WebUI. `local` is a folder of this container alone:
    notes on folders that cannot be written, and models where the cache cannot be. `limit` is what the cache may take in
    bytes. `heartbeat`, `stale_after`, `poll` are seconds (leases.py).
    """

    def __init__(
        self,
        models_dir: Path,
        webui_dir: Path | None,
        civitai: CivitAI,
        downloader: Downloader,
        *,
        local: Path,
        sources: Sequence[Path] = (),
        checkpoint: CheckpointSpec | None = None,
        limit: int | None = None,
        heartbeat: float = 10.0,
        stale_after: float = 60.0,
        poll: float = 0.1,
        owner: str | None = None,
    ) -> None:
        self.owner = owner or new_owner()
        self._heartbeat = Heartbeat(heartbeat)
        watch = Watch(stale_after)
        holds = Holds(self.owner, self._heartbeat, watch)
        self._holds = holds
        shelves = CacheDirectories(models_dir, local, sources, self.owner)
        webui = WebUIFolder(webui_dir, self.owner) if webui_dir is not None else None
        leases = Leases(self.owner, self._heartbeat, watch)
        self.library = ModelCache(
            shelves,
            Sidecars(local / "notes", self.owner),
            holds,
            leases,
            webui,
            owner=self.owner,
            checkpoint=checkpoint,
            limit=limit,
        )
        self._arrivals = Fetcher(
            self.library,
            civitai,
            downloader,
            leases,
            owner=self.owner,
            poll=poll,
        )
        self._spec = checkpoint
        self._checkpoint: Model | None = None
        self._checkpoint_lock = threading.Lock()
        self._swept = False
        self._unseen: OSError | None = None  # why nothing can be shown to the WebUI
        if webui is not None:
            vae_roots = (models_dir, *shelves.sources)
            try:
                webui.prepare([*shelves.folders(), *(root / name for root in vae_roots for name in ("vae", "VAE"))])
                show_vaes(webui, vae_roots)
            except OSError as error:
                self._unseen = error
        self._heartbeat.add_listener(self._look_after)

    def close(self) -> None:
        """Let everything go."""
        self._heartbeat.stop()
        self._holds.close()

    def __enter__(self) -> ModelManager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the checkpoint

    def prepare_checkpoint(self, context: JobContext) -> Model:
        """Have the fixed checkpoint on disk, and keep it there as long as this worker lives.

        One that is on disk under its name is used without asking anybody. VolumeFull, before a byte is fetched, where
        nothing can be shown to the WebUI.
        """
        if self._spec is None:
            raise ModelNotFound("no checkpoint is configured")
        if self._unseen is not None:
            raise VolumeFull(
                f"the WebUI's folder of models cannot be made ({self._unseen.strerror})",
                hint="set WEBUI_MODELS_DIR to one",
            ) from self._unseen
        with self._checkpoint_lock:
            there = self._checkpoint
            if there is None or not there.path.exists():
                self._checkpoint = self._fixed(self._spec, context.deadline, AggregateProgress(1, context.report))
            assert self._checkpoint is not None
            return self._checkpoint

    def _fixed(self, spec: CheckpointSpec, deadline: Deadline, show: AggregateProgress) -> Model:
        while True:
            found = self._checkpoint_there(spec, deadline, show)
            if found is None:
                found = self._arrivals.bring(spec.ref, deadline, show.of(spec.ref), spec=spec)
                if not spec.may_be(found.record):
                    raise ModelRejected(
                        f"the checkpoint has the SHA-256 {found.record.sha256[:12]}…, "
                        f"and {(spec.sha256 or '')[:12]}… is configured"
                    )
            model = self.library.take(found, deadline)
            if model is not None:
                return model

    def _checkpoint_there(self, spec: CheckpointSpec, deadline: Deadline, show: AggregateProgress) -> Found | None:
        """The checkpoint under its name, on any shelf: read once where nothing is known of it."""
        if (found := self.library.checkpoint(spec)) is not None:
            return found
        tell = show.of(spec.ref)
        for shelf, file in self.library.named(ModelKind.CHECKPOINT, spec.file):
            try:
                record = self.library.read(shelf, file, deadline, lambda d, t: tell(FileProgress(spec.name, d, t)))
            except ModelError as error:
                log.warning("%s is on disk, and cannot be used: %s", file, error.message)
                continue
            if spec.may_be(record):
                return Found(shelf, replace(record, name=spec.name))
            log.warning("%s is on disk, and is another model: sha256 %s", file, record.sha256[:12])
        return None

    def check(self) -> None:
        """Raise OSError or ModelError where the cache cannot be read any more, or the checkpoint has gone from it."""
        cache = self.library.shelves.of(ModelKind.LORA)[0]
        if cache.writable:  # one that could not be made at the start has the local folder in its place
            next(cache.folder.iterdir(), None)
        if self._checkpoint is None or not self._checkpoint.path.exists():
            raise ModelNotFound("the checkpoint is not on disk any more")

    # -- a job's models

    @contextlib.contextmanager
    def hold(
        self,
        refs: Sequence[ModelRef],
        context: JobContext,
        *,
        tolerate: bool = False,
    ) -> Iterator[HeldModels]:
        """Have every model on disk, and keep it there until the block ends.

        Raises the first ModelError; with `tolerate` those are told in `failures` instead. `foreground` says whether the
        job that wants them is the one the GPU waits for, and is asked again and again: its downloads go before others'.
        """
        taken: list[Model] = []
        try:
            yield self._gather(
                list(dict.fromkeys(refs)), taken, context.deadline, context.report, tolerate, context.is_next
            )
        finally:
            for model in taken:
                self.library.release(model)

    def _gather(
        self,
        refs: list[ModelRef],
        taken: list[Model],
        deadline: Deadline,
        on_progress: ReportProgress,
        tolerate: bool,
        foreground: Callable[[], bool],
    ) -> HeldModels:
        models: dict[ModelRef, Model] = {}
        failures: dict[ModelRef, ModelError] = {}
        missing: list[ModelRef] = []
        for ref in refs:
            model = self._here(ref, deadline)
            if model is None:
                missing.append(ref)
            else:
                taken.append(model)
                models[ref] = model
        if missing:
            self._bring_all(missing, models, failures, taken, deadline, on_progress, tolerate, foreground)
        for ref, model in list(models.items()):
            try:
                models[ref] = self._fitting(model)
            except ModelError as error:
                del models[ref]
                failures[ref] = error
        if failures and not tolerate:
            raise next(failures[ref] for ref in refs if ref in failures)
        return HeldModels(
            {ref: models[ref] for ref in refs if ref in models}, {ref: failures[ref] for ref in refs if ref in failures}
        )

    def _here(self, ref: ModelRef, deadline: Deadline) -> Model | None:
        """A model that is there and known: nobody is asked, nothing is read."""
        try:
            found = self.library.find(ref) or self.library.find(ref, fresh=True)
        except ModelNotFound:  # told again, and properly, by whoever brings it
            return None
        if found is None or (ref.sha256 is not None and found.record.sha256 != ref.sha256):
            return None
        return self.library.take(found, deadline)

    def _bring_all(
        self,
        refs: list[ModelRef],
        models: dict[ModelRef, Model],
        failures: dict[ModelRef, ModelError],
        taken: list[Model],
        deadline: Deadline,
        on_progress: ReportProgress,
        tolerate: bool,
        foreground: Callable[[], bool],
    ) -> None:
        """Bring what is missing, all at once. The first failure ends the others, unless it is tolerated."""
        show = AggregateProgress(len(refs), on_progress)
        # Their own cancellation, so that one failure can stop the others without cancelling the job.
        ours = Deadline(deadline.remaining())
        with deadline.on_cancel(ours.cancel), ThreadPoolExecutor(min(len(refs), AT_ONCE), "models") as threads:
            running: dict[Future[Model], ModelRef] = {}
            for ref in refs:
                context = contextvars.copy_context()  # log lines carry the job's id
                running[threads.submit(context.run, self._bring, ref, ours, show, foreground)] = ref
            for future in as_completed(running):
                ref = running[future]
                error = future.exception()
                if error is None:
                    models[ref] = future.result()
                    taken.append(models[ref])
                elif isinstance(error, ModelError):
                    failures[ref] = error
                if error is not None and not (tolerate and isinstance(error, ModelError)):
                    ours.cancel()
        deadline.check()
        for future in running:
            error = future.exception()
            if error is not None and not isinstance(error, (ModelError, JobCancelled)):
                if isinstance(error, JobTimeout):
                    deadline.wait(1.0)  # ours ends a moment before the job's own
                raise error

    def _bring(
        self, ref: ModelRef, deadline: Deadline, show: AggregateProgress, foreground: Callable[[], bool]
    ) -> Model:
        """A model that is not there, or of which nothing is known."""
        while True:
            found = self._obtain(ref, deadline, show, foreground)
            if ref.sha256 is not None and found.record.sha256 != ref.sha256:
                raise ModelRejected(
                    f"{ref.label} has the SHA-256 {found.record.sha256[:12]}…, and {ref.sha256[:12]}… is wanted"
                )
            model = self.library.take(found, deadline)
            if model is not None:
                show.ready()
                return model

    def _obtain(
        self, ref: ModelRef, deadline: Deadline, show: AggregateProgress, foreground: Callable[[], bool]
    ) -> Found:
        if (ref.version_id, ref.model_id, ref.url) != (None, None, None):
            return self._arrivals.bring(ref, deadline, show.of(ref), foreground=foreground)
        tell = show.of(ref)
        self.library.list_again(ref.kind)
        for shelf, file in self.library.candidates(ref, fresh=True):
            return Found(
                shelf, self.library.read(shelf, file, deadline, lambda d, t: tell(FileProgress(ref.label, d, t)))
            )
        near = self.library.nearest(ref)
        hint = f"did you mean {' or '.join(near)}?" if near else "give its CivitAI URL or version id"
        raise ModelNotFound(f"no model is known by the name {ref.label}", hint=hint)

    def _fitting(self, model: Model) -> Model:
        """A LoRA that can be applied to the checkpoint, with a warning where nobody can tell."""
        checkpoint = self._checkpoint
        if model.kind is not ModelKind.LORA or checkpoint is None:
            return model
        fits = families_fit(model.family, checkpoint.family)
        if fits is False:
            raise ModelRejected(
                f"{model.name} is made for {model.base_model or model.family}, "
                f"and the checkpoint is {checkpoint.base_model or checkpoint.family}",
                hint="use a LoRA of the checkpoint's family",
            )
        if fits is None:
            warning = f"it cannot be told whether {model.name} fits the checkpoint"
            return replace(model, warnings=(*model.warnings, warning))
        return model

    # -- looking after

    def verify(self, deadline: Deadline, *, repair: bool = False) -> Iterator[VerifyResult]:
        """Read every model of the cache and compare it with what is known. `repair` replaces what is damaged."""
        for shelf, entry in self.library.stock():
            if not shelf.writable:
                continue
            known = self.library.registry.look(shelf, entry.file) or self.library.registry.claim(shelf, entry.file)
            spec = self._spec if self.library.is_fixed(entry.kind, entry.file) else None
            is_damaged = True
            try:
                found = self.library.registry.rebuild(shelf, entry.file, deadline, keep=known is None)
            except ModelError as error:
                problem = f"damaged: {error.message}"
            else:
                if known is not None and known.sha256 != found.sha256:
                    problem = f"damaged: its SHA-256 is {found.sha256[:12]}…, and was {known.sha256[:12]}…"
                elif spec is not None and not spec.may_be(found):
                    is_damaged = False
                    problem = f"another model: its SHA-256 is {found.sha256[:12]}…, not {(spec.sha256 or '')[:12]}…"
                else:
                    yield VerifyResult(entry, found.sha256, "proven" if known else "read for the first time", ok=True)
                    continue
            outcome = ""
            if repair and (not is_damaged or self._taken_away(entry, deadline)):
                outcome = self._had_again(entry, known, deadline)
            elif repair:
                outcome = "; in use, and left alone"
            yield VerifyResult(entry, None, f"{problem}{outcome}", ok=outcome == REPLACED)

    def _taken_away(self, entry: Entry, deadline: Deadline) -> bool:
        why = "it is damaged"
        return self.library.evict(entry, why, even_fixed=True) or (
            self.library.tell_living_from_dead(deadline) and self.library.evict(entry, why, even_fixed=True)
        )

    def _had_again(self, entry: Entry, known: Record | None, deadline: Deadline) -> str:
        ref = None if known is None else _source_of(known)
        try:
            if self.library.is_fixed(entry.kind, entry.file):
                self.prepare_checkpoint(JobContext(deadline))
            elif ref is not None:
                with self.hold([ref], JobContext(deadline)):
                    pass
            else:
                return "; removed"
        except (ModelError, InvalidRequest) as error:
            gone = "" if entry.path.exists() else "removed, and "
            return f"; {gone}not to be had again: {error.message}"
        return REPLACED

    def remove(self, name: str) -> list[Entry]:
        """Take models away by their file name or stem, of either kind; ModelNotFound, or ModelError for one in use."""
        stem = name.removesuffix(SUFFIX)
        chosen = [entry for entry in self.library.entries() if entry.file == f"{stem}{SUFFIX}"]
        if not chosen:
            raise ModelNotFound(f"there is no {stem}{SUFFIX} in the cache")
        for entry in chosen:
            if not self.library.evict(entry, "asked for", even_fixed=True):
                raise DownloadFailed(f"{entry.file} is in use")
        return chosen

    def shrink(self, to_bytes: int) -> tuple[Entry, ...]:
        """Evict until the cache takes no more than `to_bytes`; VolumeFull where what must stay is more than that."""
        before = self.library.entries()
        self.library.make_room(0, "nothing more", kind=ModelKind.LORA, limit=to_bytes)
        after = {entry.path for entry in self.library.entries()}
        return tuple(entry for entry in before if entry.path not in after)

    def _look_after(self) -> None:
        self.library.watch()
        if not self._swept:
            self._swept = True
            for shelf in self.library.shelves.writable():
                shelf.sweep(PART_LIFE)


def _source_of(known: Record) -> ModelRef | None:
    """What a model's file can be had by again, if it did not come by hand."""
    if known.version_id is not None:
        return ModelRef(known.kind, known.version_id, None if known.primary else known.file_id)
    if known.url is not None:
        return ModelRef(known.kind, url=known.url, name=known.name, sha256=known.sha256)
    return None

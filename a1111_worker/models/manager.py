"""A worker's models: on disk, verified, and kept there until the job ends.

`hold` looks on disk first (cache.py). What is missing is fetched (fetcher.py). Which file means what is in names.py and
sidecars.py, what lies where in volume.py. Who uses or fetches a model is in holds.py and leases.py, which models are
evicted when room is needed in eviction.py and space.py.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace

from a1111_worker.context import Deadline, JobContext
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
from a1111_worker.models.cache import CacheHit, CacheSettings, CheckpointSpec, ModelCache
from a1111_worker.models.civitai import CivitAI
from a1111_worker.models.eviction import Entry
from a1111_worker.models.fetcher import Fetcher
from a1111_worker.models.holds import Holds
from a1111_worker.models.leases import Leases
from a1111_worker.models.liveness import LivenessMonitor, new_owner
from a1111_worker.models.names import SUFFIX
from a1111_worker.models.progress import AggregateProgress, ReportFile, report_bytes
from a1111_worker.models.safetensors import families_fit
from a1111_worker.models.sidecars import ModelRecord
from a1111_worker.models.space import CacheSpace
from a1111_worker.models.volume import CacheDirectory
from a1111_worker.transfer.download import Downloader

log = logging.getLogger(__name__)

MAX_THREADS = 16
"""Models of one job that are fetched at the same time."""

PARTIAL_FILE_SECONDS = 24 * 3600.0
"""After this time an unfinished download that nobody has gone on with is removed."""

REPLACED = "; replaced"


@dataclass(frozen=True)
class CacheTimings:
    """How often a worker shows that it is alive, looks at the others, and cleans up. Seconds."""

    heartbeat: float = 10.0  # between two touches of its own files, and between two looks at those of others
    stale_after: float = 60.0  # an owner whose file does not change for so long is dead
    poll: float = 0.1  # between two looks while another worker fetches
    sweep: float = 3600.0  # between two removals of what nobody needs any more


@dataclass(frozen=True)
class VerifyResult:
    """What `verify` found out about one model."""

    entry: Entry
    sha256: str | None
    finding: str
    ok: bool


class ModelManager:
    """One worker's models. `close` it, or use it in a `with`."""

    def __init__(
        self,
        settings: CacheSettings,
        civitai: CivitAI,
        downloader: Downloader,
        timings: CacheTimings = CacheTimings(),
    ) -> None:
        self.owner = new_owner()
        self._heartbeat = Heartbeat(timings.heartbeat)
        liveness = LivenessMonitor(timings.stale_after)
        self._holds = Holds(self.owner, self._heartbeat, liveness)
        leases = Leases(self.owner, self._heartbeat, liveness)
        self.cache = ModelCache(settings, self._holds, leases)
        self._fetcher = Fetcher(self.cache, civitai, downloader, leases, poll=timings.poll)
        self._checkpoint_spec = settings.checkpoint
        self._checkpoint: Model | None = None
        self._checkpoint_lock = threading.Lock()
        self._webui_folder_error: OSError | None = None
        try:
            self.cache.prepare_webui_folder()
        except OSError as error:
            self._webui_folder_error = error
        self._sweep_interval = timings.sweep
        self._next_sweep = 0.0
        # It has a heartbeat of its own: on a large or slow volume it takes long, and no sign of life may wait for it.
        self._housekeeping = Heartbeat(timings.heartbeat, name="housekeeping")
        self._housekeeping.add_listener(self._look_after)

    def close(self) -> None:
        """Release everything."""
        self._heartbeat.stop()
        self._holds.close()
        self._housekeeping.stop()

    def __enter__(self) -> ModelManager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the checkpoint

    def prepare_checkpoint(self, context: JobContext) -> Model:
        """Have the fixed checkpoint on disk, and keep it there as long as this worker lives.

        If it is on disk under its name, it is used without asking anybody. Raises VolumeFull, before a byte is fetched,
        if nothing can be shown to the WebUI.
        """
        if self._checkpoint_spec is None:
            raise ModelNotFound("no checkpoint is configured")
        if self._webui_folder_error is not None:
            raise VolumeFull(
                f"the WebUI's folder of models cannot be made ({self._webui_folder_error.strerror})",
                hint="set WEBUI_MODELS_DIR to one",
            ) from self._webui_folder_error
        with self._checkpoint_lock:
            model = self._checkpoint
            if model is None or not model.path.exists():
                model = self._checkpoint = self._obtain_checkpoint(self._checkpoint_spec, context)
            return model

    def _obtain_checkpoint(self, spec: CheckpointSpec, context: JobContext) -> Model:
        report = AggregateProgress(1, context.report).of(spec.ref)
        while True:
            hit = self._find_checkpoint(spec, context.deadline, report)
            if hit is None:
                hit = self._fetcher.fetch(spec.ref, context, report, checkpoint=spec)
                if not spec.accepts(hit.record):
                    raise ModelRejected(
                        f"the checkpoint has the SHA-256 {hit.record.sha256[:12]}…, "
                        f"and {(spec.sha256 or '')[:12]}… is configured"
                    )
            model = self.cache.hold(hit, context.deadline)
            if model is not None:
                return model

    def _find_checkpoint(self, spec: CheckpointSpec, deadline: Deadline, report: ReportFile) -> CacheHit | None:
        """The checkpoint under its name, in any directory. It is read once if nothing is known of it."""
        if (hit := self.cache.find_checkpoint(spec)) is not None:
            return hit
        for directory in self.cache.directories_with(ModelKind.CHECKPOINT, spec.file):
            try:
                record = self.cache.identify(directory, spec.file, deadline, report_bytes(report, spec.name))
            except ModelError as error:
                log.warning("%s is on disk, and cannot be used: %s", spec.file, error.message)
                continue
            if spec.accepts(record):
                return CacheHit(directory, replace(record, name=spec.name))
            log.warning("%s is on disk, and is another model: sha256 %s", spec.file, record.sha256[:12])
        return None

    def check(self) -> None:
        """Raise OSError or ModelError if the cache cannot be read any more, or the checkpoint is not in it any more."""
        cache = self.cache.directories.of(ModelKind.LORA)[0]
        if cache.is_writable:  # if it could not be made at the start, the local folder is used in its place
            next(cache.folder.iterdir(), None)
        if self._checkpoint is None or not self._checkpoint.path.exists():
            raise ModelNotFound("the checkpoint is not on disk any more")

    # -- a job's models

    @contextlib.contextmanager
    def hold(self, refs: Sequence[ModelRef], context: JobContext, *, tolerate: bool = False) -> Iterator[HeldModels]:
        """Have every model on disk, and keep it there until the block ends.

        Raises the first ModelError. With `tolerate` those are in `failures` instead. Downloads of a job that the GPU
        waits for (`context.is_next`) go before others'.
        """
        refs = list(dict.fromkeys(refs))
        with contextlib.ExitStack() as holds:
            outcomes: dict[ModelRef, Model | BaseException] = {}
            for ref in refs:
                if (model := self._hold_known(ref, context.deadline)) is not None:
                    holds.callback(self.cache.release, model)
                    outcomes[ref] = model
            missing = [ref for ref in refs if ref not in outcomes]
            if missing:
                fetched = self._fetch_missing(missing, context, tolerate=tolerate)
                for outcome in fetched.values():
                    if isinstance(outcome, Model):
                        holds.callback(self.cache.release, outcome)
                _raise_unless_tolerable(fetched, context.deadline)
                outcomes |= fetched
            held = self._check_families(refs, outcomes)
            if held.failures and not tolerate:
                raise next(iter(held.failures.values()))
            yield held

    def _hold_known(self, ref: ModelRef, deadline: Deadline) -> Model | None:
        """Hold a model that is there and known. Nobody is asked, and nothing is read."""
        try:
            hit = self.cache.find(ref) or self.cache.find(ref, fresh=True)
        except ModelNotFound:  # `_obtain` finds that too, and its error is complete
            return None
        if hit is None or (ref.sha256 is not None and hit.record.sha256 != ref.sha256):
            return None
        return self.cache.hold(hit, deadline)

    def _fetch_missing(
        self, refs: Sequence[ModelRef], context: JobContext, *, tolerate: bool
    ) -> dict[ModelRef, Model | BaseException]:
        """Have models that are missing, all at once. Returns each one, held, or the error that it ended with.

        The first failure ends the others, unless it is a ModelError and those are tolerated.
        """
        progress = AggregateProgress(len(refs), context.report)
        # A cancellation of their own, so that one failure can end the others without cancelling the job.
        own = replace(context, deadline=Deadline(context.deadline.remaining()))
        with (
            context.deadline.on_cancel(own.deadline.cancel),
            ThreadPoolExecutor(min(len(refs), MAX_THREADS), "models") as threads,
        ):
            futures = {
                # In a copy of the context, so that log lines carry the job's id.
                ref: threads.submit(contextvars.copy_context().run, self._obtain, ref, own, progress)
                for ref in refs
            }
            for future in as_completed(futures.values()):
                error = future.exception()
                if error is not None and not (tolerate and isinstance(error, ModelError)):
                    own.deadline.cancel()
        return {ref: future.exception() or future.result() for ref, future in futures.items()}

    def _obtain(self, ref: ModelRef, context: JobContext, progress: AggregateProgress) -> Model:
        """Have a model that is not there, or of which nothing is known, and hold it."""
        report = progress.of(ref)
        while True:
            if ref.is_bare_name:
                hit = self._identify(ref, context.deadline, report)
            else:
                hit = self._fetcher.fetch(ref, context, report)
            if ref.sha256 is not None and hit.record.sha256 != ref.sha256:
                raise ModelRejected(
                    f"{ref.label} has the SHA-256 {hit.record.sha256[:12]}…, and {ref.sha256[:12]}… was asked for"
                )
            model = self.cache.hold(hit, context.deadline)
            if model is not None:
                progress.count_ready()
                return model

    def _identify(self, ref: ModelRef, deadline: Deadline, report: ReportFile) -> CacheHit:
        """The file that a bare name means. It is read if nothing is known of it."""
        self.cache.refresh(ref.kind)
        for directory, file in self.cache.list_candidates(ref, fresh=True):
            record = self.cache.identify(directory, file, deadline, report_bytes(report, ref.label))
            return CacheHit(directory, record)
        similar = self.cache.similar_names(ref)
        hint = f"did you mean {' or '.join(similar)}?" if similar else "give its CivitAI URL or version id"
        raise ModelNotFound(f"no model is known by the name {ref.label}", hint=hint)

    def _check_families(
        self, refs: Sequence[ModelRef], outcomes: Mapping[ModelRef, Model | BaseException]
    ) -> HeldModels:
        """The models and failures, in the order of `refs`. A LoRA that does not fit the checkpoint is a failure."""
        models: dict[ModelRef, Model] = {}
        failures: dict[ModelRef, ModelError] = {}
        for ref in refs:
            outcome = outcomes[ref]
            if isinstance(outcome, Model):
                try:
                    models[ref] = self._check_family(outcome)
                except ModelError as error:
                    failures[ref] = error
            elif isinstance(outcome, ModelError):
                failures[ref] = outcome
        return HeldModels(models, failures)

    def _check_family(self, model: Model) -> Model:
        """The model if it can be applied to the checkpoint, with a warning if that is unknown. Else ModelRejected."""
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
            return replace(model, warnings=(*model.warnings, f"it is unknown whether {model.name} fits the checkpoint"))
        return model

    # -- care of the cache

    def verify(self, deadline: Deadline, *, repair: bool = False) -> Iterator[VerifyResult]:
        """Read every model of the cache and compare it with what is known. `repair` replaces what is damaged."""
        for directory, entry in self.cache.list_models():
            if directory.is_writable:
                yield self._verify(directory, entry, deadline, repair=repair)

    def _verify(self, directory: CacheDirectory, entry: Entry, deadline: Deadline, *, repair: bool) -> VerifyResult:
        sidecars = self.cache.sidecars
        known = sidecars.find(directory, entry.file) or sidecars.find_for_changed_file(directory, entry.file)
        spec = self._checkpoint_spec if self.cache.is_checkpoint(entry.kind, entry.file) else None
        is_damaged = True
        try:
            found = sidecars.rebuild(directory, entry.file, deadline, keep=known is None)
        except ModelError as error:
            problem = f"damaged: {error.message}"
        else:
            if known is not None and known.sha256 != found.sha256:
                problem = f"damaged: its SHA-256 is {found.sha256[:12]}…, and was {known.sha256[:12]}…"
            elif spec is not None and not spec.accepts(found):
                is_damaged = False
                problem = f"another model: its SHA-256 is {found.sha256[:12]}…, not {(spec.sha256 or '')[:12]}…"
            else:
                return VerifyResult(entry, found.sha256, "proven" if known else "read for the first time", ok=True)
        outcome = ""
        if repair and (not is_damaged or self._evict_damaged(entry, deadline)):
            outcome = self._fetch_again(entry, known, deadline)
        elif repair:
            outcome = "; in use, and left alone"
        return VerifyResult(entry, None, f"{problem}{outcome}", ok=outcome == REPLACED)

    def _evict_damaged(self, entry: Entry, deadline: Deadline) -> bool:
        """Remove a damaged model. If it seems in use, find out first whether its user is alive."""
        why = "it is damaged"
        return self.cache.evict(entry, why, even_checkpoint=True) or (
            self.cache.observe_other_workers(deadline) and self.cache.evict(entry, why, even_checkpoint=True)
        )

    def _fetch_again(self, entry: Entry, known: ModelRecord | None, deadline: Deadline) -> str:
        """Replace a model that was removed, if its source is known. Returns the end of the finding."""
        ref = None if known is None else _source_of(known)
        try:
            if self.cache.is_checkpoint(entry.kind, entry.file):
                self.prepare_checkpoint(JobContext(deadline))
            elif ref is not None:
                with self.hold([ref], JobContext(deadline)):
                    pass
            else:
                return "; removed"
        except (ModelError, InvalidRequest) as error:
            removed = "" if entry.path.exists() else "removed, and "
            return f"; {removed}not to be had again: {error.message}"
        return REPLACED

    def remove(self, name: str) -> list[Entry]:
        """Remove models by their file name or stem, of either kind. Raises ModelNotFound, or ModelError if in use."""
        stem = name.removesuffix(SUFFIX)
        chosen = [entry for entry in self.cache.list_entries() if entry.file == f"{stem}{SUFFIX}"]
        if not chosen:
            raise ModelNotFound(f"there is no {stem}{SUFFIX} in the cache")
        for entry in chosen:
            if not self.cache.evict(entry, "asked for", even_checkpoint=True):
                raise DownloadFailed(f"{entry.file} is in use")
        return chosen

    def shrink(self, to_bytes: int) -> tuple[Entry, ...]:
        """Evict until the cache takes no more than `to_bytes`. Raises VolumeFull if what must stay takes more."""
        before = self.cache.list_entries()
        directory = self.cache.directories.for_new(ModelKind.LORA)
        CacheSpace(self.cache).make_room(0, "nothing more", directory, limit=to_bytes)
        after = {entry.path for entry in self.cache.list_entries()}
        return tuple(entry for entry in before if entry.path not in after)

    def _look_after(self) -> None:
        self.cache.look_after()
        if time.monotonic() >= self._next_sweep:
            self._next_sweep = time.monotonic() + self._sweep_interval
            for directory in self.cache.directories.writable():
                directory.sweep(PARTIAL_FILE_SECONDS)


def _raise_unless_tolerable(outcomes: Mapping[ModelRef, Model | BaseException], deadline: Deadline) -> None:
    """Raise what ended the job rather than one of its models."""
    deadline.check()
    for outcome in outcomes.values():
        if isinstance(outcome, (Model, ModelError, JobCancelled)):  # cancelled: another model's failure ended it
            continue
        if isinstance(outcome, JobTimeout):
            deadline.wait(1.0)  # the job's own deadline ends a moment later, and its error names the right time
        raise outcome


def _source_of(known: ModelRecord) -> ModelRef | None:
    """Where a model's file can be fetched again, if it was not put there by hand."""
    if known.version_id is not None:
        return ModelRef(known.kind, known.version_id, None if known.primary else known.file_id)
    if known.url is not None:
        return ModelRef(known.kind, url=known.url, name=known.name, sha256=known.sha256)
    return None

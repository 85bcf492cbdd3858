"""A worker's models: on disk, verified, and kept there until the job ends.

`hold` looks on disk first (cache.py). What is missing is fetched (fetcher.py). Which file means what is in names.py and
sidecars.py, what lies where in volume.py. Who uses or fetches a model is in holds.py and leases.py, which models are
evicted when room is needed in eviction.py and space.py.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from a1111_worker.context import Deadline, JobContext
from a1111_worker.domain import OWN_ALONE, Checkpoints, HeldModels, Model, ModelKind, ModelRef
from a1111_worker.errors import (
    DownloadFailed,
    JobCancelled,
    JobTimeout,
    ModelError,
    ModelNotFound,
    ModelRejected,
    RoomInUse,
    VolumeFailed,
    VolumeFull,
)
from a1111_worker.files import error_name, look
from a1111_worker.heartbeat import Heartbeat
from a1111_worker.models.cache import CacheHit, CacheSettings, CheckpointSpec, ModelCache, is_meant
from a1111_worker.models.fetcher import Fetcher
from a1111_worker.models.fit import Fit
from a1111_worker.models.holds import Holds
from a1111_worker.models.leases import Leases
from a1111_worker.models.liveness import LivenessMonitor, new_owner
from a1111_worker.models.names import SUFFIX
from a1111_worker.models.progress import AggregateProgress, ReportFile, report_bytes
from a1111_worker.models.sites import ModelSite
from a1111_worker.models.space import RoomWait
from a1111_worker.models.targets import FetchTarget
from a1111_worker.prompt import has_word
from a1111_worker.transfer.download import Downloader

log = logging.getLogger(__name__)

T = TypeVar("T")
_Source = FetchTarget | CacheHit | None

MAX_THREADS = 16
"""Models of one job that are fetched at the same time."""

PARTIAL_FILE_SECONDS = 24 * 3600.0
"""After this time an unfinished download that nobody has gone on with is removed."""


@dataclass(frozen=True)
class CacheTimings:
    """How often a worker shows that it is alive, looks at the others, and cleans up. Seconds."""

    heartbeat: float = 10.0  # between two touches of its own files, and between two looks at those of others
    stale_after: float = 60.0  # an owner whose file does not change for so long is dead
    poll: float = 0.1  # between two looks while another worker fetches
    room_wait: float = 60.0  # how long a job waits until others release the models that take its room
    room_poll: float = 1.0  # between two looks meanwhile
    sweep: float = 3600.0  # between two removals of what nobody needs any more


class ModelManager:
    """One worker's models. `close` it, or use it in a `with`."""

    def __init__(
        self,
        settings: CacheSettings,
        site: ModelSite,
        downloader: Downloader,
        timings: CacheTimings = CacheTimings(),
    ) -> None:
        self.owner = new_owner()
        self._heartbeat = Heartbeat(timings.heartbeat)
        liveness = LivenessMonitor(timings.stale_after)
        self._holds = Holds(self.owner, self._heartbeat, liveness)
        leases = Leases(self.owner, self._heartbeat, liveness)
        self.cache = ModelCache(settings, self._holds, leases)
        self._fetcher = Fetcher(self.cache, site, downloader, leases, poll=timings.poll)
        self.checkpoint_spec = settings.checkpoint
        self._checkpoint: Model | None = None
        self._checkpoint_lock = threading.Lock()
        self._fit = Fit()
        self._kept: list[Model] = []  # checkpoints that the WebUI has loaded, or may have
        self._webui_folder_error: OSError | None = None
        try:
            self.cache.prepare_webui_folder()
        except OSError as error:
            self._webui_folder_error = error
        self._room_wait = functools.partial(RoomWait, seconds=timings.room_wait, poll=timings.room_poll)
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

        If it is on disk under its name, it is used without asking anybody. Raises VolumeFailed, before a byte is
        fetched, if nothing can be shown to the WebUI.
        """
        spec = self.checkpoint_spec
        if spec is None:
            raise ModelNotFound("no checkpoint is configured")
        if self._webui_folder_error is not None:
            raise VolumeFailed(
                f"the WebUI's folder of models cannot be made ({error_name(self._webui_folder_error)})",
                hint="set WEBUI_MODELS_DIR to one",
            ) from self._webui_folder_error
        with self._checkpoint_lock:
            model = self._checkpoint
            if model is not None and not self.cache.is_still_there(model, context.deadline):
                model = None
            wait = self._room_wait(context)
            while model is None:
                try:
                    model = self._obtain_checkpoint(spec, context)
                except RoomInUse as error:
                    wait.pause(error)
            self._checkpoint = model
            return model

    def _obtain_checkpoint(self, spec: CheckpointSpec, context: JobContext) -> Model:
        report = AggregateProgress(1, context.report).of(spec.ref)
        while True:
            hit = self._find_checkpoint(spec, context.deadline, report)
            if hit is None:
                found = self._fetcher.describe(spec.ref, context, report, checkpoint=spec)
                hit = found if isinstance(found, CacheHit) else self._fetcher.fetch(found, context, report)
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
        if self._checkpoint is None or look(self._checkpoint.path) is None:
            raise ModelNotFound("the checkpoint is not on disk any more")

    # -- a job's models

    @contextlib.contextmanager
    def hold(
        self,
        refs: Sequence[ModelRef],
        context: JobContext,
        *,
        tolerate: bool = False,
        checkpoints: Checkpoints = OWN_ALONE,
    ) -> Iterator[HeldModels]:
        """Have every model on disk, and keep it there until the block ends. They must fit the job's checkpoint.

        Raises the first ModelError. With `tolerate` those of LoRAs are in `failures` instead. Downloads of a job that
        the GPU waits for (`context.is_next`) go before others'. If only models in use leave no room, the job releases
        its own and waits. So two jobs never wait for each other.
        """
        refs = list(dict.fromkeys(refs))
        wait = self._room_wait(context)
        held: HeldModels | None = None
        while held is None:
            try:
                held = self._hold_all(refs, context, _Tolerance(tolerate, wait.is_over), checkpoints)
            except RoomInUse as error:
                wait.pause(error)
        with held.holds:
            yield held

    @contextlib.contextmanager
    def keep_loaded(self, checkpoints: Sequence[Model], context: JobContext) -> Iterator[None]:
        """Keep the checkpoints that the WebUI loads in the block, until others are loaded in a later block.

        Without its file A1111 silently draws with another one.
        """
        paths = {checkpoint.path for checkpoint in checkpoints}
        for checkpoint in checkpoints:
            if any(kept.path == checkpoint.path for kept in self._kept):
                continue
            if not self.cache.keep(checkpoint, context.deadline):
                raise DownloadFailed(f"{checkpoint.name} was evicted while its job waited", hint="try again")
            self._kept.append(checkpoint)
        yield
        for other in [kept for kept in self._kept if kept.path not in paths]:
            self._kept.remove(other)
            self.cache.release(other)

    def find(self, ref: ModelRef) -> Model | None:
        """A model that is on disk and known; None if it is not, or the volume does not tell."""
        try:
            hit = self.cache.find(ref)
        except ModelError:
            return None
        return hit.record.model(hit.directory.path(hit.record.file)) if hit else None

    def embeddings_in(self, texts: Sequence[str]) -> tuple[ModelRef, ...]:
        """The embeddings of the cache that texts name by a word which means them in every job.

        That is the WebUI's word for an embedding, and the stem of a file that the operator put there. Nothing is read.
        """
        found: dict[ModelRef, None] = {}
        for directory in self.cache.directories.of(ModelKind.EMBEDDING):
            for file in sorted(directory.index().files):
                record = self.cache.sidecars.find(directory, file)
                words = [file.removesuffix(SUFFIX)] if record is None or record.is_operators else []
                if record is not None and self.cache.is_open(directory, record):
                    words.append(record.model(directory.path(file)).shown)
                for word in words:
                    if any(has_word(text, word) for text in texts):
                        found[ModelRef(ModelKind.EMBEDDING, name=word)] = None
        return tuple(found)

    def hold_again(self, held: HeldModels, context: JobContext) -> HeldModels:
        """The same models, after another look at each: one that is gone by now is fetched again.

        Another worker evicts models of a worker that it thinks dead. This one may have been only paused.
        """
        models, failures = dict(held.models), dict(held.failures)
        for ref, model in held.models.items():
            if self.cache.is_still_there(model, context.deadline):
                continue
            log.warning("%s was evicted while it was held: getting it again", model.file)
            tolerance = _Tolerance(held.is_tolerant, is_last=True)
            models.pop(ref)
            again = self._hold_missing([ref], context, tolerance, held.holds)
            checked = self._check_families([ref], again, tolerance, held.checkpoint)
            models |= checked.models
            failures |= checked.failures
        return replace(held, models=models, failures=failures)

    def _hold_all(
        self, refs: Sequence[ModelRef], context: JobContext, tolerance: _Tolerance, checkpoints: Checkpoints
    ) -> HeldModels:
        """Hold every model, or none if one fails and that is not tolerated."""
        with contextlib.ExitStack() as holds:
            outcomes: dict[ModelRef, Model | ModelError] = {}
            for ref in refs:
                try:
                    model = self._hold_known(ref, context.deadline)
                except ModelError as error:
                    if not tolerance.allows(error):
                        raise
                    outcomes[ref] = error
                    continue
                if model is not None:
                    holds.callback(self.cache.release, model)
                    outcomes[ref] = model
            missing = [ref for ref in refs if ref not in outcomes]
            if missing:
                own = frozenset(model.path for model in outcomes.values() if isinstance(model, Model))
                outcomes |= self._hold_missing(missing, context, tolerance, holds, own)
            named = outcomes.get(checkpoints.main)
            if isinstance(named, ModelError):
                raise named
            held = self._check_families(refs, outcomes, tolerance, named or self._checkpoint)
            held = replace(held, checkpoints=checkpoints, own=self._checkpoint)
            self._check_checkpoints(held)
            return replace(held, holds=holds.pop_all())

    def _hold_known(self, ref: ModelRef, deadline: Deadline) -> Model | None:
        """Hold a model that is there and known. Nobody is asked, and nothing is read."""
        try:
            hit = self.cache.find(ref) or self.cache.find(ref, fresh=True)
        except ModelNotFound:  # `_obtain` finds that too, and its error is complete
            return None
        if hit is None or (ref.sha256 is not None and hit.record.sha256 != ref.sha256):
            return None
        return self.cache.hold(hit, deadline)

    def _hold_missing(
        self,
        refs: Sequence[ModelRef],
        context: JobContext,
        tolerance: _Tolerance,
        holds: contextlib.ExitStack,
        own: frozenset[Path] = frozenset(),
    ) -> dict[ModelRef, Model | ModelError]:
        """Have models that are missing, all at once, and hold them until `holds` is closed.

        Room for all of them is settled before the first byte, and nothing is evicted if they do not fit together with
        `own`, the files that the job holds. Returns each model, or the error that is tolerated. The first failure that
        is not tolerated ends the others, and is raised.
        """
        progress = AggregateProgress(len(refs), context.report)

        def describe(ref: ModelRef, context: JobContext) -> _Source:
            return self._describe(ref, context, progress.of(ref))

        def obtain(ref: ModelRef, context: JobContext) -> Model:
            model = self._obtain(ref, sources.pop(ref), context, progress.of(ref))
            holds.callback(self.cache.release, model)
            progress.count_ready()
            return model

        found = self._for_each(refs, describe, context, tolerance)
        failed = {ref: source for ref, source in found.items() if isinstance(source, ModelError)}
        targets = {ref: source for ref, source in found.items() if isinstance(source, FetchTarget)}
        with contextlib.ExitStack() as room:
            failed |= self._reserve(targets, own, tolerance, room)
            sources = {ref: s for ref, s in found.items() if ref not in failed and not isinstance(s, ModelError)}
            return {**failed, **self._for_each(list(sources), obtain, context, tolerance)}

    def _reserve(
        self,
        targets: Mapping[ModelRef, FetchTarget],
        own: frozenset[Path],
        tolerance: _Tolerance,
        room: contextlib.ExitStack,
    ) -> dict[ModelRef, ModelError]:
        """Have room for everything that a job must download, until `room` is closed.

        If not everything fits and that is tolerated: for as much as fits, in the job's order. Returns the errors of the
        others.
        """
        try:
            room.enter_context(self._fetcher.reserve(list(targets.values()), own))
            return {}
        except VolumeFull as error:
            if not tolerance.allows(error):
                raise
        failed: dict[ModelRef, ModelError] = {}
        for ref, target in targets.items():
            try:
                own = room.enter_context(self._fetcher.reserve([target], own))
            except VolumeFull as error:
                failed[ref] = error
        return failed

    def _for_each(
        self,
        refs: Sequence[ModelRef],
        function: Callable[[ModelRef, JobContext], T],
        context: JobContext,
        tolerance: _Tolerance,
    ) -> dict[ModelRef, T | ModelError]:
        """Call a function for each reference, all at once. Returns what it returned, or the error that is tolerated.

        The first failure that is not tolerated ends the other calls, and is raised.
        """
        # A cancellation of their own, so that one failure can end the others without cancelling the job.
        own = replace(context, deadline=Deadline(context.deadline.remaining()))
        with (
            context.deadline.on_cancel(own.deadline.cancel),
            ThreadPoolExecutor(max(1, min(len(refs), MAX_THREADS)), "models") as threads,
        ):
            futures = {
                # In a copy of the context, so that log lines carry the job's id.
                ref: threads.submit(contextvars.copy_context().run, function, ref, own)
                for ref in refs
            }
            for future in as_completed(futures.values()):
                error = future.exception()
                if error is not None and not tolerance.allows(error):
                    own.deadline.cancel()
        errors = [future.exception() for future in futures.values()]
        _raise_worst([error for error in errors if error and not tolerance.allows(error)], context.deadline)
        outcomes: dict[ModelRef, T | ModelError] = {}
        for ref, future in futures.items():
            error = future.exception()
            outcomes[ref] = error if isinstance(error, ModelError) else future.result()
        return outcomes

    def _describe(self, ref: ModelRef, context: JobContext, report: ReportFile) -> _Source:
        """What a reference means. None: a bare name, which is looked for on disk alone."""
        return None if ref.is_bare_name else self._fetcher.describe(ref, context, report)

    def _obtain(self, ref: ModelRef, source: _Source, context: JobContext, report: ReportFile) -> Model:
        """Have a model that is not there, or of which nothing is known, and hold it."""
        while True:
            if source is None:
                hit = self._identify(ref, context.deadline, report)
            else:
                hit = source if isinstance(source, CacheHit) else self._fetcher.fetch(source, context, report)
            if ref.sha256 is not None and hit.record.sha256 != ref.sha256:
                raise ModelRejected(
                    f"{ref.label} has the SHA-256 {hit.record.sha256[:12]}…, and {ref.sha256[:12]}… was asked for"
                )
            model = self.cache.hold(hit, context.deadline)
            if model is not None:
                return model
            source = self._describe(ref, context, report)

    def _identify(self, ref: ModelRef, deadline: Deadline, report: ReportFile) -> CacheHit:
        """The file that a bare name means. It is read if nothing is known of it."""
        self.cache.refresh(ref.kind)
        for directory, file in self.cache.list_candidates(ref, fresh=True):
            record = self.cache.identify(directory, file, deadline, report_bytes(report, ref.label))
            if is_meant(record, ref) and self.cache.is_open(directory, record):
                return CacheHit(directory, record)
        similar = self.cache.similar_names(ref)
        hint = f"did you mean {' or '.join(similar)}?" if similar else "give its CivitAI URL or version id"
        raise ModelNotFound(f"no model is known by the name {ref.label}", hint=hint)

    def _check_families(
        self,
        refs: Sequence[ModelRef],
        outcomes: Mapping[ModelRef, Model | ModelError],
        tolerance: _Tolerance,
        checkpoint: Model | None,
    ) -> HeldModels:
        """The models and failures, in the order of `refs`. A model that does not fit the checkpoint is a failure.

        Raises the first failure if it is not tolerated. Only a LoRA's ever is.
        """
        models: dict[ModelRef, Model] = {}
        failures: dict[ModelRef, ModelError] = {}
        for ref in refs:
            outcome = outcomes[ref]
            try:
                if isinstance(outcome, ModelError):
                    raise outcome
                models[ref] = self._check_fit(outcome, ref, checkpoint)
            except ModelError as error:
                if ref.kind is not ModelKind.LORA or not tolerance.allows(error):
                    raise
                failures[ref] = error
        return HeldModels(models, failures, tolerance.is_tolerant)

    def _check_checkpoints(self, held: HeldModels) -> None:
        """Raise ModelRejected if A1111 cannot load one of the job's checkpoints, or they are of different families."""
        for model in held.loaded:
            if model is not held.own:
                self._fit.check_loadable(model)
        for other in (held.refiner, held.hires_checkpoint):
            if other is not None and held.checkpoint is not None:
                self._fit.check(other, held.checkpoint)

    def _check_fit(self, model: Model, ref: ModelRef, checkpoint: Model | None) -> Model:
        if model.kind is ModelKind.CHECKPOINT:
            return replace(model, name=ref.name or model.name)  # as the operator calls it
        if model.kind is ModelKind.CONTROLNET or checkpoint is None:
            return model
        return self._fit.check(model, checkpoint)

    def _look_after(self) -> None:
        try:
            self.cache.look_after()
            if time.monotonic() >= self._next_sweep:
                self._next_sweep = time.monotonic() + self._sweep_interval
                for directory in self.cache.directories.writable():
                    directory.sweep(PARTIAL_FILE_SECONDS)
        except VolumeFailed as error:
            log.warning("the cache could not be tidied up: %s", error.message)


@dataclass(frozen=True)
class _Tolerance:
    """Which failures do not end a job: those of its models, if it `is_tolerant`.

    Unless it `is_last`, the job will try again if only models in use leave no room, so that is not tolerated yet.
    """

    is_tolerant: bool
    is_last: bool

    def allows(self, error: BaseException) -> bool:
        may_wait = isinstance(error, RoomInUse) and not self.is_last
        return self.is_tolerant and isinstance(error, ModelError) and not may_wait


def _raise_worst(errors: Sequence[BaseException], deadline: Deadline) -> None:
    """Raise what ended a job, if anything did: what is no model's failure first, a lack of room last."""
    deadline.check()
    errors = [error for error in errors if not isinstance(error, JobCancelled)]  # another failure ended these
    for error in sorted(errors, key=lambda error: (isinstance(error, ModelError), isinstance(error, RoomInUse))):
        if isinstance(error, JobTimeout):
            deadline.wait(1.0)  # the job's own deadline ends a moment later, and its error names the right time
        raise error

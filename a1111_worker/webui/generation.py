"""The policy of generating: one request to the WebUI, looked after until its answer begins, then proven.

Every way in which that can go wrong has its end here, and what of the WebUI is to be believed afterwards:

    refused, nothing was sent        waited for and made ready again, then tried once more
    a bare 404                       waited out, three tries in all: it says nothing about the request
    an HTTPException                 the caller's error, at once
    out of memory                    the weights out of the GPU and back; the second within three jobs: not fit any more
    poisoned by a failed switch      restarted where it is ours, and tried once more: nothing was generated
    lost in the middle               the job's end; whoever comes next makes the WebUI ready again
    silent, or deaf to /interrupt    hung: killed where it is ours
    a job out of time                interrupted; what does not end at once is waited for by whoever comes next
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from a1111_worker.background import BackgroundCall
from a1111_worker.context import Deadline, JobContext, ReportProgress
from a1111_worker.domain import Generation, GenerationRequest, HeldModels, Model, Progress, Stage
from a1111_worker.errors import (
    CheckpointNotLoaded,
    GenerationFailed,
    OutOfMemory,
    RouteMissing,
    WebUIBroken,
    WebUILost,
    WebUIRefused,
    WorkerError,
)
from a1111_worker.images import is_blank
from a1111_worker.webui.client import WebUI, WebUIProgress, WebUIResponse
from a1111_worker.webui.composition import compose, resolve
from a1111_worker.webui.readiness import Readiness
from a1111_worker.webui.verification import GenerationPlan, verify

log = logging.getLogger(__name__)

TRIES = 3  # of a txt2img that was not even begun
OUT_OF_MEMORY_WINDOW = 3  # jobs after an out-of-memory within which a second one says that the worker is not fit


@dataclass(frozen=True)
class StartedGeneration:
    """A generation whose answer has begun: the WebUI is free, the proof is still to come."""

    answer: WebUIResponse
    plan: GenerationPlan
    checkpoint: Model

    def discard(self) -> None:
        """Nobody will finish it: its answer is thrown away."""
        self.answer.close()


class Generator:
    """Generates with one WebUI. `start` is called by one job at a time, `resolve` and `finish` by any."""

    def __init__(self, webui: WebUI, readiness: Readiness, *, generation_timeout: float = 540.0) -> None:
        self._webui = webui
        self._readiness = readiness
        self._generation_timeout = generation_timeout
        self._jobs_since_out_of_memory = OUT_OF_MEMORY_WINDOW + 1
        self._ending: BackgroundCall[None] | None = None  # of a generation that its job could not wait for

    def resolve(self, request: GenerationRequest) -> GenerationRequest:
        """The request with every name in the WebUI's own spelling; InvalidRequest with the nearest names otherwise."""
        return resolve(request, self._readiness.lists)

    def start(
        self,
        request: GenerationRequest,
        held: HeldModels,
        context: JobContext,
    ) -> StartedGeneration:
        """Generate, and return when the answer begins: the next job may start then."""
        plan = compose(request, held)
        self._jobs_since_out_of_memory += 1
        self._wait_for_the_last_one(context)
        self._readiness.ensure_ready(context)
        if plan.body.get("script_name"):
            self._readiness.invalidate()  # after this one: a script may leave settings behind that no job may override
        try:
            return self._start(plan, context)
        except OutOfMemory as error:
            if self._jobs_since_out_of_memory <= OUT_OF_MEMORY_WINDOW:
                error.refresh_worker = True
            self._jobs_since_out_of_memory = 0
            self._readiness.free_memory()
            raise

    def finish(self, started: StartedGeneration, context: JobContext) -> Generation:
        """Read the answer and prove it: of this checkpoint, with these LoRAs, every picture there and none blank."""
        reading = BackgroundCall(started.answer.read, name="webui-call")
        limit = context.deadline.within(self._readiness.timings.silence, what="reading the WebUI's answer")
        try:
            if not reading.wait(limit.remaining(), limit):
                started.answer.cut()
                context.deadline.check()
                raise WebUILost("the WebUI's answer did not come to its end")
            generation = verify(reading.result(), started.plan, started.checkpoint)
        except (WebUILost, CheckpointNotLoaded):
            self._readiness.invalidate()
            raise
        if not started.plan.allow_blank and any(is_blank(image) for image in generation.answer["images"]):
            raise GenerationFailed(
                "a picture came out all one colour",
                hint='try another seed or a lower LoRA scale; "allow_blank": true lets such a picture through',
            )
        return generation

    def warm_up(self, context: JobContext) -> None:
        """A tiny generation, so that the first job does not pay for what is loaded lazily."""
        began = time.monotonic()
        body = {"prompt": "warm-up", "steps": 1, "width": 64, "height": 64, "seed": 0}
        self.finish(self._start(GenerationPlan(body, allow_blank=True), context), context)
        log.info("the WebUI is warm after %.1f s", time.monotonic() - began)

    def _start(self, plan: GenerationPlan, context: JobContext) -> StartedGeneration:
        for attempt in range(1, TRIES + 1):
            try:
                with context.timings.measure(Stage.GENERATE):
                    return StartedGeneration(self._generate(plan.body, context), plan, self._readiness.checkpoint)
            except WebUIRefused:
                self._readiness.invalidate()
                if attempt == TRIES:
                    raise
                self._readiness.ensure_ready(context)
            except RouteMissing:
                if attempt == TRIES:
                    raise
                log.warning(
                    "the WebUI has no txt2img (a bare 404); trying again in %.0f s",
                    self._readiness.timings.recovery_pause,
                )
                context.deadline.wait(self._readiness.timings.recovery_pause)
                self._readiness.wait_until_up(context.deadline)
            except WebUIBroken as error:
                if attempt == TRIES or not self._readiness.restart(error.message):
                    raise
                self._readiness.ensure_ready(context)
            except WebUILost as error:
                self._readiness.invalidate()
                error.refresh_worker = error.refresh_worker or self._readiness.is_given_up
                raise
        raise AssertionError("the loop returns or raises")

    def _generate(self, body: Mapping[str, Any], context: JobContext) -> WebUIResponse:
        limit = context.deadline.within(self._generation_timeout, what="a generation")
        # Longer than the patience below, which judges: the line itself is given up last.
        line = self._generation_timeout + 2 * self._readiness.timings.interrupt_grace + 1.0
        call = BackgroundCall(lambda: self._webui.txt2img(body, timeout=line), name="webui-call")
        heard = time.monotonic()
        while not call.wait(self._readiness.timings.look_every, limit):
            if limit.is_cancelled or limit.remaining() == 0.0:
                self._interrupt(call, context)
                limit.check()
            look = self._look()
            if look is not None:
                heard = time.monotonic()
                _report(look, context.report)
            elif time.monotonic() - heard > self._readiness.timings.silence:
                raise self._hung(call, "the WebUI hangs: it answers nothing any more")
        return call.result()

    def _interrupt(self, call: BackgroundCall[WebUIResponse], context: JobContext) -> None:
        """End the running generation, whose answer is thrown away. Only then is the WebUI free: a job with time left
        timings for that, one without leaves it to whoever generates next."""
        log.info("interrupting the generation")
        timings = self._readiness.timings
        left = (
            0.0
            if context.deadline.is_cancelled
            else min(context.deadline.remaining(), timings.interrupt_grace + timings.death)
        )
        ending = BackgroundCall(lambda: self._end(call), name="webui-call")
        if ending.wait(max(left, timings.interrupt_patience), Deadline()):
            ending.result()
        else:
            log.warning("the WebUI has not ended the generation yet; the next one timings for that")
            self._ending = ending

    def _wait_for_the_last_one(self, context: JobContext) -> None:
        """Until the WebUI has ended what an earlier job left running; it was restarted where it would not."""
        while self._ending is not None:
            if self._ending.wait(self._readiness.timings.look_every, context.deadline):
                ending, self._ending = self._ending, None
                try:
                    ending.result()
                except WebUILost as error:
                    if error.refresh_worker:
                        raise
            context.deadline.check()

    def _end(self, call: BackgroundCall[WebUIResponse]) -> None:
        timings = self._readiness.timings
        grace = Deadline(timings.interrupt_grace)
        while not call.is_done():
            if grace.remaining() == 0.0:
                raise self._hung(call, "the WebUI hangs: it did not end an interrupted generation")
            with contextlib.suppress(WorkerError):
                self._webui.interrupt()  # again and again: one that comes before the generation begins is lost
            call.wait(timings.interrupt_every, grace)
        try:
            call.result().close()
        except WebUILost:
            self._readiness.invalidate()
        except WorkerError:
            pass  # it failed on its own; the job is over all the same

    def _hung(self, call: BackgroundCall[WebUIResponse], sentence: str) -> WebUILost:
        """The WebUI is killed where it is ours; elsewhere this worker is not fit for another job."""
        call.abandon(WebUIResponse.close)
        return WebUILost(sentence, refresh_worker=not self._readiness.restart(sentence))

    def _look(self) -> WebUIProgress | None:
        try:
            return self._webui.progress()
        except WorkerError:
            return None  # a look is not worth a job


def _report(look: WebUIProgress, report: ReportProgress) -> None:
    if look.images > 0:  # −1 while a checkpoint is loaded inside a generation
        report(
            Progress(
                Stage.GENERATE,
                percent=look.progress * 100,
                detail=f"step {look.step} of {look.steps}, image {min(look.image, look.images)} of {look.images}",
                eta_s=look.eta_seconds,
            )
        )

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

from a1111_worker.domain import (
    Deadline,
    Generation,
    GenerationRequest,
    Model,
    ModelRef,
    Progress,
    Report,
    Run,
    Stage,
)
from a1111_worker.errors import CheckpointNotLoaded, GenerationFailed, ModelError, OutOfMemory, WebUILost, WorkerError
from a1111_worker.images import is_blank
from a1111_worker.webui.client import Answer, Call, Look, RouteMissing, WebUI, WebUIPoisoned, WebUIRefused
from a1111_worker.webui.composition import compose, resolve
from a1111_worker.webui.readiness import Readiness
from a1111_worker.webui.verification import Plan, prove

log = logging.getLogger(__name__)

TRIES = 3  # of a txt2img that was not even begun
OUT_OF_MEMORY_WINDOW = 3  # jobs after an out-of-memory within which a second one says that the worker is not fit


@dataclass(frozen=True)
class Started:
    """A generation whose answer has begun: the WebUI is free, the proof is still to come."""

    answer: Answer
    plan: Plan
    checkpoint: Model

    def drop(self) -> None:
        """Nobody will finish it: its answer is thrown away."""
        self.answer.close()


class Generator:
    """Generates with one WebUI. `start` is called by one job at a time, `resolve` and `finish` by any."""

    def __init__(self, webui: WebUI, readiness: Readiness, *, generation_timeout: float = 540.0) -> None:
        self._webui = webui
        self._readiness = readiness
        self._generation_timeout = generation_timeout
        self._jobs_since_out_of_memory = OUT_OF_MEMORY_WINDOW + 1
        self._ending: Call[None] | None = None  # of a generation that its job could not wait for

    def resolve(self, request: GenerationRequest) -> GenerationRequest:
        """The request with every name in the WebUI's own spelling; InvalidRequest with the nearest names otherwise."""
        return resolve(request, self._readiness.lists)

    def start(
        self,
        request: GenerationRequest,
        models: Mapping[ModelRef, Model],
        failures: Mapping[ModelRef, ModelError],
        run: Run,
    ) -> Started:
        """Generate, and return when the answer begins: the next job may start then."""
        plan = compose(request, models, failures)
        self._jobs_since_out_of_memory += 1
        self._wait_for_the_last_one(run)
        self._readiness.ensure(run)
        if plan.body.get("script_name"):
            self._readiness.doubt()  # after this one: a script may leave settings behind that no job may override
        try:
            return self._start(plan, run)
        except OutOfMemory as error:
            if self._jobs_since_out_of_memory <= OUT_OF_MEMORY_WINDOW:
                error.refresh_worker = True
            self._jobs_since_out_of_memory = 0
            self._readiness.free_memory()
            raise

    def finish(self, started: Started, run: Run) -> Generation:
        """Read the answer and prove it: of this checkpoint, with these LoRAs, every picture there and none blank."""
        reading = Call(started.answer.read)
        limit = run.deadline.within(self._readiness.waits.silence, what="reading the WebUI's answer")
        try:
            if not reading.wait(limit.left(), limit):
                started.answer.cut()
                run.deadline.check()
                raise WebUILost("the WebUI's answer did not come to its end")
            generation = prove(reading.result(), started.plan, started.checkpoint)
        except (WebUILost, CheckpointNotLoaded):
            self._readiness.doubt()
            raise
        if not started.plan.allow_blank and any(is_blank(image) for image in generation.answer["images"]):
            raise GenerationFailed(
                "a picture came out all one colour",
                hint='try another seed or a lower LoRA scale; "allow_blank": true lets such a picture through',
            )
        return generation

    def warm_up(self, run: Run) -> None:
        """A tiny generation, so that the first job does not pay for what is loaded lazily."""
        began = time.monotonic()
        body = {"prompt": "warm-up", "steps": 1, "width": 64, "height": 64, "seed": 0}
        self.finish(self._start(Plan(body, allow_blank=True), run), run)
        log.info("the WebUI is warm after %.1f s", time.monotonic() - began)

    def _start(self, plan: Plan, run: Run) -> Started:
        for attempt in range(1, TRIES + 1):
            try:
                with run.stage(Stage.GENERATE):
                    return Started(self._generate(plan.body, run), plan, self._readiness.checkpoint)
            except WebUIRefused:
                self._readiness.doubt()
                if attempt == TRIES:
                    raise
                self._readiness.ensure(run)
            except RouteMissing:
                if attempt == TRIES:
                    raise
                log.warning(
                    "the WebUI has no txt2img (a bare 404); trying again in %.0f s",
                    self._readiness.waits.recovery_pause,
                )
                run.deadline.wait(self._readiness.waits.recovery_pause)
                self._readiness.wait_until_up(run.deadline)
            except WebUIPoisoned as error:
                if attempt == TRIES or not self._readiness.restart(error.sentence):
                    raise
                self._readiness.ensure(run)
            except WebUILost as error:
                self._readiness.doubt()
                error.refresh_worker = error.refresh_worker or self._readiness.is_given_up
                raise
        raise AssertionError("the loop returns or raises")

    def _generate(self, body: Mapping[str, Any], run: Run) -> Answer:
        limit = run.deadline.within(self._generation_timeout, what="a generation")
        # Longer than the patience below, which judges: the line itself is given up last.
        line = self._generation_timeout + 2 * self._readiness.waits.interrupt_grace + 1.0
        call = Call(lambda: self._webui.txt2img(body, timeout=line))
        heard = time.monotonic()
        while not call.wait(self._readiness.waits.look_every, limit):
            if limit.cancelled or limit.left() == 0.0:
                self._interrupt(call, run)
                limit.check()
            look = self._look()
            if look is not None:
                heard = time.monotonic()
                _report(look, run.report)
            elif time.monotonic() - heard > self._readiness.waits.silence:
                raise self._hung(call, "the WebUI hangs: it answers nothing any more")
        return call.result()

    def _interrupt(self, call: Call[Answer], run: Run) -> None:
        """End the running generation, whose answer is thrown away. Only then is the WebUI free: a job with time left
        waits for that, one without leaves it to whoever generates next."""
        log.info("interrupting the generation")
        waits = self._readiness.waits
        left = 0.0 if run.deadline.cancelled else min(run.deadline.left(), waits.interrupt_grace + waits.death)
        ending = Call(lambda: self._end(call))
        if ending.wait(max(left, waits.interrupt_patience), Deadline()):
            ending.result()
        else:
            log.warning("the WebUI has not ended the generation yet; the next one waits for that")
            self._ending = ending

    def _wait_for_the_last_one(self, run: Run) -> None:
        """Until the WebUI has ended what an earlier job left running; it was restarted where it would not."""
        while self._ending is not None:
            if self._ending.wait(self._readiness.waits.look_every, run.deadline):
                ending, self._ending = self._ending, None
                try:
                    ending.result()
                except WebUILost as error:
                    if error.refresh_worker:
                        raise
            run.deadline.check()

    def _end(self, call: Call[Answer]) -> None:
        waits = self._readiness.waits
        grace = Deadline(waits.interrupt_grace)
        while not call.is_done():
            if grace.left() == 0.0:
                raise self._hung(call, "the WebUI hangs: it did not end an interrupted generation")
            with contextlib.suppress(WorkerError):
                self._webui.interrupt()  # again and again: one that comes before the generation begins is lost
            call.wait(waits.interrupt_every, grace)
        try:
            call.result().close()
        except WebUILost:
            self._readiness.doubt()
        except WorkerError:
            pass  # it failed on its own; the job is over all the same

    def _hung(self, call: Call[Answer], sentence: str) -> WebUILost:
        """The WebUI is killed where it is ours; elsewhere this worker is not fit for another job."""
        call.abandon(Answer.close)
        return WebUILost(sentence, refresh_worker=not self._readiness.restart(sentence))

    def _look(self) -> Look | None:
        try:
            return self._webui.progress()
        except WorkerError:
            return None  # a look is not worth a job


def _report(look: Look, report: Report) -> None:
    if look.images > 0:  # −1 while a checkpoint is loaded inside a generation
        report(
            Progress(
                Stage.GENERATE,
                percent=look.progress * 100,
                detail=f"step {look.step} of {look.steps}, image {min(look.image, look.images)} of {look.images}",
                eta_s=look.eta_seconds,
            )
        )

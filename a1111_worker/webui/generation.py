"""The policy of generating: a request to the WebUI, supervised until its answer begins, and the answer's verification.

What can go wrong, and what the worker does then:

    the connection is refused        nothing was sent: prepare the WebUI again; three tries in all
    a bare 404                       nothing about the request: wait, then try again; three tries in all
    an HTTPException                 the job fails at once: its request is wrong
    out of memory                    the job fails; the weights leave the GPU and come back. If it is the second time
                                     within three jobs, the worker is replaced
    a failed switch has broken it    nothing was generated: restart the WebUI if start.sh owns it; three tries in all
    lost during the generation       the job fails; the next job prepares the WebUI again
    hangs: silent, or does not end   the job fails; the WebUI is killed if start.sh owns it
        an interrupted generation
    the job's time is up             interrupt; if the generation does not end at once, the next job waits for its end
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from a1111_worker.background import BackgroundCall
from a1111_worker.context import Deadline, JobContext
from a1111_worker.domain import (
    AppliedEmbedding,
    Generation,
    GenerationRequest,
    HeldModels,
    Model,
    PictureFacts,
    Progress,
    Stage,
    Task,
    UpscaleRequest,
    Upscaling,
)
from a1111_worker.errors import (
    CheckpointNotLoaded,
    GenerationFailed,
    OutOfMemory,
    RouteMissing,
    WebUIBroken,
    WebUILost,
    WebUIRefused,
    WebUISilent,
    WorkerError,
)
from a1111_worker.images import is_blank
from a1111_worker.request.extensions import detected_maps
from a1111_worker.request.fields import DEFAULT_LIMITS, Limits
from a1111_worker.webui.checkpoint import listed_title
from a1111_worker.webui.client import WebUI, WebUIResponse
from a1111_worker.webui.composition import compose
from a1111_worker.webui.extensions import listed_models
from a1111_worker.webui.extras import read_extras, resolve_extras, used_in_extras
from a1111_worker.webui.progress import GenerationProgress
from a1111_worker.webui.readiness import Readiness
from a1111_worker.webui.resolution import FindEmbeddings, resolve
from a1111_worker.webui.responses import WebUIProgress
from a1111_worker.webui.running import RunningRequest
from a1111_worker.webui.upscalers import used_upscalers
from a1111_worker.webui.verification import INTERRUPTED, GenerationPlan, PromptUse, verify

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_TRIES = 3  # of a generation that has not begun
OUT_OF_MEMORY_WINDOW = 3  # jobs after an out-of-memory; with a second one among them, the worker is replaced


@dataclass(frozen=True)
class StartedGeneration:
    """A generation whose answer has begun: the WebUI can take the next request. The answer is not verified yet.

    `interrupted_job` is the WebUI's job that somebody else has interrupted, by its `job_timestamp`; None if unknown.
    """

    answer: WebUIResponse
    plan: GenerationPlan
    checkpoint: Model
    interrupted_job: str | None = None

    def discard(self) -> None:
        """Drop the answer: nobody will finish this generation."""
        self.answer.close()


@dataclass(frozen=True)
class Proof:
    """What the last verified picture has shown: A1111's version, and which process of it uses which checkpoint."""

    webui_version: str
    instance_id: str
    sha256: str


class _KnownUses:
    """The embeddings that A1111 was seen to use, with their prompts, in the life of one process of the WebUI."""

    _MOST = 10_000

    def __init__(self) -> None:
        self._instance_id = ""
        self._uses: dict[PromptUse, None] = {}  # an ordered set: the oldest goes first

    def of(self, instance_id: str) -> Collection[PromptUse]:
        return self._uses if instance_id == self._instance_id else ()

    def remember(self, instance_id: str, embeddings: Sequence[AppliedEmbedding]) -> None:
        if instance_id != self._instance_id:
            self._instance_id, self._uses = instance_id, {}
        for embedding in embeddings:
            if embedding.loaded:
                self._uses |= {(embedding.model.shown, text): None for text in embedding.prompts}
        for use in list(self._uses)[: -self._MOST]:
            del self._uses[use]


class Generator:
    """Generates with one WebUI. Only one job at a time may call `start`; any job may call `resolve` and `finish`."""

    def __init__(
        self, webui: WebUI, readiness: Readiness, *, generation_timeout: float = 540.0, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        self._webui = webui
        self._limits = limits
        self._readiness = readiness
        self._generation_timeout = generation_timeout
        self._jobs_since_out_of_memory = OUT_OF_MEMORY_WINDOW + 1
        self._interruption: BackgroundCall[None] | None = None  # of a generation whose job could not wait for its end
        self.proof: Proof | None = None
        self._uses = _KnownUses()
        self._vaes_shown: tuple[str, frozenset[str]] = ("", frozenset())  # to which process of the WebUI, which files

    @property
    def is_checkpoint_proven(self) -> bool:
        """Whether a picture has shown that this process of the WebUI uses the checkpoint that it has loaded."""
        proof, readiness = self.proof, self._readiness
        return (
            proof is not None
            and readiness.is_ready
            and (proof.instance_id, proof.sha256) == (readiness.instance_id, readiness.checkpoint.sha256)
        )

    def resolve(
        self, request: GenerationRequest, find_embeddings: FindEmbeddings = lambda texts: ()
    ) -> GenerationRequest:
        """The request with every name in the WebUI's own spelling; InvalidRequest with the nearest names otherwise."""
        return resolve(request, self._readiness.lists, self._limits, find_embeddings)

    def resolve_upscale(self, request: UpscaleRequest) -> UpscaleRequest:
        """The same for a job that enlarges pictures."""
        return resolve_extras(request, self._readiness.lists)

    def start(self, request: GenerationRequest, held: HeldModels, context: JobContext) -> StartedGeneration:
        """Generate, and return when the answer begins. From then on the next job may start."""
        plan = compose(request, held, self._readiness.lists.of_task(request.task).script_axes)
        with self._watch_memory():
            self._wait_for_interruption(context)
            self._readiness.ensure_ready(context, held.checkpoint or self._readiness.own_checkpoint)
            self._show_vae(plan.vae)
            if plan.body.get("script_name"):
                self._readiness.expect_script()
            return self._generate(plan, context)

    def upscale(self, request: UpscaleRequest, context: JobContext) -> Upscaling:
        """Enlarge the pictures of a job, one after the other. Each is verified."""
        with self._watch_memory(), context.times.measure(Stage.GENERATE):
            self._wait_for_interruption(context)
            self._readiness.ensure_ready(context)
            made = []
            for index in range(len(request.images)):
                detail = f"picture {index + 1} of {len(request.images)}"
                context.report(Progress(Stage.GENERATE, 100 * index / len(request.images), detail))
                once = functools.partial(self._upscale_once, request, index, context)
                made.append(self._try(once, Task.UPSCALE, context))
        answer = {"images": [image for image, _, _ in made], "html_info": made[-1][1]}
        version = self.proof.webui_version if self.proof else None
        return Upscaling(answer, tuple(facts for _, _, facts in made), version, request.warnings)

    def _upscale_once(self, request: UpscaleRequest, index: int, context: JobContext) -> tuple[str, str, PictureFacts]:
        used = used_in_extras(request.body)
        self._readiness.prove_upscalers(used)
        body = {**request.body, "image": request.images[index]}
        answer = self._run(lambda timeout: self._webui.upscale(body, timeout=timeout), context)
        interrupted = self._readiness.find_interrupted_job()
        found = read_extras(self._read(answer, context), request.sizes[index], used[0][1] if used else None)
        if interrupted is not None:
            raise GenerationFailed("the WebUI did not finish the picture", hint=INTERRUPTED)
        return found

    @contextlib.contextmanager
    def _watch_memory(self) -> Iterator[None]:
        """Inside the block a job uses the GPU. If its memory is not enough, the weights leave it and come back."""
        self._jobs_since_out_of_memory += 1
        try:
            yield
        except OutOfMemory as error:
            if self._jobs_since_out_of_memory <= OUT_OF_MEMORY_WINDOW:
                error.refresh_worker = True
            self._jobs_since_out_of_memory = 0
            self._readiness.free_memory()
            raise

    def finish(self, started: StartedGeneration, context: JobContext) -> Generation:
        """Read and verify the answer: made with this checkpoint and these LoRAs, all images there and none blank."""
        try:
            answer = self._read(started.answer, context)
            self._check_new_hashes(started.plan)
            generation = verify(
                answer,
                started.plan,
                started.checkpoint,
                interrupted_job=started.interrupted_job,
                known_uses=self._uses.of(self._readiness.instance_id),
            )
            self._uses.remember(self._readiness.instance_id, generation.embeddings)
            self.proof = Proof(generation.webui_version, self._readiness.instance_id, started.checkpoint.sha256)
        except (WebUILost, CheckpointNotLoaded):
            self._readiness.invalidate()
            raise
        if _came_out_blank(generation, started.plan):
            raise GenerationFailed(
                "a picture came out all one colour",
                hint='try another seed or a lower LoRA scale; with "allow_blank": true such a picture is no error',
            )
        return generation

    def warm_up(self, context: JobContext) -> None:
        """Run a tiny generation: it proves the checkpoint, and the first job does not pay for what is loaded lazily."""
        began = time.monotonic()
        body = {"prompt": "warm-up", "steps": 1, "width": 64, "height": 64, "seed": 0}
        generation = self.finish(self._generate(GenerationPlan(body, allow_blank=True), context), context)
        name = generation.checkpoint.name
        log.info("the WebUI is warm after %.1f s, and has proven that it uses %s", time.monotonic() - began, name)

    def _show_vae(self, vae: Model | None) -> None:
        """Have the WebUI list a VAE: it looks for new files only if it is asked to. (Embeddings it finds by itself.)"""
        instance = self._readiness.instance_id
        shown = self._vaes_shown[1] if self._vaes_shown[0] == instance else frozenset()
        if vae is not None and vae.shown_file not in shown:
            self._webui.refresh_vaes()
            self._vaes_shown = (instance, shown | {vae.shown_file})

    # -- start: the tries, and each of them

    def _generate(self, plan: GenerationPlan, context: JobContext) -> StartedGeneration:
        def generate_once() -> StartedGeneration:
            self._prove_upscalers(plan)
            return self._generate_once(self._with_titles(self._with_listed_models(plan)), context)

        return self._try(generate_once, plan.task, context)

    def _try(self, once: Callable[[], T], task: Task, context: JobContext) -> T:
        """What `once` returns, with the tries of this module's table."""
        for attempt in range(1, MAX_TRIES + 1):
            is_last = attempt == MAX_TRIES
            try:
                return once()
            except WebUIRefused:
                self._readiness.invalidate()
                if is_last:
                    raise
                self._readiness.ensure_ready(context)
            except RouteMissing:
                if is_last:
                    raise
                pause = self._readiness.timings.recovery_pause
                log.warning("the WebUI has no %s (a bare 404); trying again in %.0f s", task.value, pause)
                context.deadline.wait(pause)
                self._readiness.wait_until_up(context.deadline)
            except WebUIBroken as error:
                if is_last or not self._readiness.restart(error.message):
                    raise
                self._readiness.ensure_ready(context)
            except WebUILost as error:
                self._readiness.invalidate()
                error.refresh_worker = error.refresh_worker or self._readiness.is_given_up
                raise
        raise AssertionError("the loop returns or raises")

    def _with_listed_models(self, plan: GenerationPlan) -> GenerationPlan:
        """The plan with ControlNet's own names for models that have just been shown."""
        if not plan.controlnet_models:
            return plan
        return replace(plan, body=listed_models(plan.body, plan.controlnet_models, self._webui))

    def _with_titles(self, plan: GenerationPlan) -> GenerationPlan:
        """The plan with the titles under which the WebUI lists the checkpoints that it loads during the job."""
        if not plan.loaded_meanwhile:
            return plan
        self._webui.refresh_checkpoints()
        listed = self._webui.checkpoints()
        titles = {field: listed_title(model, listed) for field, model in plan.loaded_meanwhile.items()}
        return replace(plan, body={**plan.body, **titles})

    def _check_new_hashes(self, plan: GenerationPlan) -> None:
        """Raise CheckpointNotLoaded if a checkpoint without a hash got another one than its file's as it was loaded."""
        new = [model for field, model in plan.loaded_meanwhile.items() if plan.body[field] == model.shown_file]
        listed = self._webui.checkpoints() if new else ()
        for model in new:
            listed_title(model, listed)

    def _prove_upscalers(self, plan: GenerationPlan) -> None:
        axes = self._readiness.lists.of_task(plan.task).script_axes
        self._readiness.prove_upscalers(used_upscalers(plan.body, self._limits.max_images, axes))

    def _generate_once(self, plan: GenerationPlan, context: JobContext) -> StartedGeneration:
        progress = GenerationProgress(plan.body)
        send = self._webui.img2img if plan.task is Task.IMG2IMG else self._webui.txt2img

        def report(look: WebUIProgress) -> None:
            if (found := progress.report(look)) is not None:
                context.report(found)

        if plan.loaded_meanwhile:
            self._readiness.invalidate()  # another checkpoint is loaded afterwards, and the option still names ours
        with context.times.measure(Stage.GENERATE):
            answer = self._run(lambda timeout: send(plan.body, timeout=timeout), context, report, previews=plan.preview)
            return StartedGeneration(answer, plan, self._readiness.checkpoint, self._readiness.find_interrupted_job())

    def _run(
        self,
        send: Callable[[float], WebUIResponse],
        context: JobContext,
        report: Callable[[WebUIProgress], None] | None = None,
        *,
        previews: bool = False,
    ) -> WebUIResponse:
        """The answer to a long request, which `send` sends with a timeout. Interrupted if its time is up."""
        timings = self._readiness.timings
        # The request itself times out last: before that, the worker has decided whether the WebUI hangs.
        timeout = self._generation_timeout + 2 * timings.interrupt_grace + 1.0
        limit = context.deadline.within(self._generation_timeout, what="a generation")
        request = RunningRequest(self._webui, lambda: send(timeout), activity="generates", timings=timings)
        try:
            has_ended = request.wait(limit, report, previews=previews)
        except WebUISilent as error:
            raise self._kill(request, error) from error
        if not has_ended:
            self._interrupt(request, context)
            limit.check()
        return request.result()

    # -- the interruption of a generation whose time is up, or whose job was cancelled

    def _interrupt(self, request: RunningRequest[WebUIResponse], context: JobContext) -> None:
        """End the running generation and drop its answer. Only after that can the WebUI take the next request.

        A job with time left waits for the end. A job without leaves that to the next one.
        """
        log.info("interrupting the generation")
        timings = self._readiness.timings
        deadline = context.deadline
        time_left = 0.0 if deadline.is_cancelled else min(deadline.remaining(), timings.interrupt_grace + timings.death)
        interruption = BackgroundCall(lambda: self._end(request), name="webui-call")
        if interruption.wait(max(time_left, timings.interrupt_patience), Deadline()):
            interruption.result()
        else:
            log.warning("the WebUI has not ended the generation yet; the next job waits for that")
            self._interruption = interruption

    def _wait_for_interruption(self, context: JobContext) -> None:
        """Return when the WebUI has ended what an earlier job left running, or was killed because it did not."""
        while self._interruption is not None:
            if self._interruption.wait(self._readiness.timings.progress_interval, context.deadline):
                interruption, self._interruption = self._interruption, None
                try:
                    interruption.result()
                except WebUILost as error:
                    if error.refresh_worker:
                        raise
            context.deadline.check()

    def _end(self, request: RunningRequest[WebUIResponse]) -> None:
        try:
            request.interrupt()
        except WebUISilent as error:
            raise self._kill(request, error) from error
        try:
            request.result().close()
        except WebUILost:
            self._readiness.invalidate()
        except WorkerError:
            pass  # the generation failed by itself, and its job is over in any case

    def _kill(self, request: RunningRequest[WebUIResponse], error: WebUISilent) -> WebUILost:
        """Kill a WebUI that hangs, if start.sh owns it. If not, this worker must be replaced."""
        request.abandon(WebUIResponse.close)
        return WebUILost(error.message, refresh_worker=not self._readiness.restart(error.message))

    # -- finish

    def _read(self, answer: WebUIResponse, context: JobContext) -> object:
        silence = self._readiness.timings.silence
        limit = context.deadline.within(silence, what="reading the WebUI's answer")
        reading = BackgroundCall(answer.read, name="webui-call")
        if not reading.wait(limit.remaining(), limit):
            answer.abort()
            context.deadline.check()
            raise WebUILost("the WebUI's answer did not come to its end")
        return reading.result()


def _came_out_blank(generation: Generation, plan: GenerationPlan) -> bool:
    """Whether a picture is all one colour that should not be. One that was drawn from such a picture may be."""
    if plan.allow_blank or not any(map(is_blank, _generated(generation, plan))):
        return False
    return not any(map(is_blank, plan.body.get("init_images", ())))


def _generated(generation: Generation, plan: GenerationPlan) -> list[str]:
    """The pictures without the maps of ControlNet's annotators, which may well be one colour."""
    images: list[str] = generation.answer["images"]
    if not detected_maps(plan.body):
        return images
    return [image for image, facts in zip(images, generation.pictures, strict=True) if facts.seed is not None]

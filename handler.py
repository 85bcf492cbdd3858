"""The entry point: RunPod's jobs in, verified images out. `run_job` is a job from its input to its answer.

    python handler.py --test_input '{"input": {"prompt": "a lighthouse"}}'   one job, here
    python handler.py --rp_serve_api                                         the SDK's local API
    python handler.py                                                        RunPod's queue, or test_input.json
    python handler.py --schema                                               the JSON Schema of jobs and answers
    python handler.py --help                                                 all arguments

Settings come from the environment: docs/subsystems/container-management.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from a1111_worker import logs
from a1111_worker.arguments import Arguments, BadArguments, check_api_address, check_test_file, parse_arguments
from a1111_worker.config import Config, find_misspelt_settings, prepare_sdk_environment, runs_test_file
from a1111_worker.context import Deadline, JobContext
from a1111_worker.delivery.bucket import Bucket
from a1111_worker.delivery.deliver import Delivery, save_images
from a1111_worker.domain import (
    GenerationRequest,
    HealthRequest,
    ModelsRequest,
    OnLoraError,
    PngInfoRequest,
    PrefetchRequest,
    Request,
    Stage,
    Task,
    UpscaleRequest,
)
from a1111_worker.errors import ConfigError, Internal, JobCancelled, WebUINotReady, WorkerError
from a1111_worker.job.gpu_queue import GpuQueue, PreparationOrder
from a1111_worker.job.health import HealthReporter
from a1111_worker.job.memory import release_free_memory, use_few_arenas
from a1111_worker.job.run import JobRunner
from a1111_worker.job.shutdown import Shutdown, job_seconds
from a1111_worker.job.status import StatusPage
from a1111_worker.models.read_ahead import read_ahead
from a1111_worker.pictures.fetch import PictureFetcher
from a1111_worker.pictures.prepare import PicturePreparer
from a1111_worker.queries.health import HealthQuery
from a1111_worker.queries.models import ModelsQuery
from a1111_worker.queries.png_info import PngInfoQuery
from a1111_worker.queries.prefetch import PrefetchQuery
from a1111_worker.request.extensions import fill_units
from a1111_worker.request.fields import Limits
from a1111_worker.request.img2img import fit_pictures
from a1111_worker.request.json_schema import job_schema
from a1111_worker.request.parse import names_task, parse_request
from a1111_worker.request.picture_fields import image_policy
from a1111_worker.request.upscale import fit_upscale
from a1111_worker.webui.client import WebUI
from a1111_worker.webui.generation import Generator, StartedGeneration
from a1111_worker.webui.owner import OwnersOptions, owner_file
from a1111_worker.webui.readiness import Readiness
from a1111_worker.webui.supervisor import Supervisor
from a1111_worker.webui.timings import WebUITimings
from model_manager import HeldModels, ModelManager, checkpoint_refs, open_manager, own_checkpoint_ref

log = logging.getLogger("worker")


async def run_job(worker: Worker, job: dict[str, Any]) -> dict[str, Any]:
    """A job from its input to its answer, or a WorkerError. A cancelled job leaves nothing running behind it."""
    async with worker.open_job(job) as context:
        request = await worker.jobs.run(context, worker.read_request, job.get("input"))
        return await _TASKS[type(request)](worker, request, context)


async def generate(worker: Worker, request: GenerationRequest, context: JobContext) -> dict[str, Any]:
    """Pictures, made with the job's models at its turn at the GPU, verified, and delivered."""
    jobs = worker.jobs
    async with jobs.enter(context, Stage.MODELS, worker.models_for(request, context)) as held:
        async with worker.gpu.turn(context):
            started = await jobs.run(context, worker.start, request, held, undo=StartedGeneration.discard)
        with context.times.measure(Stage.DELIVER):
            generation = await jobs.run(context, worker.generator.finish, started)
            generation = await jobs.run(context, worker.models_query.add_menus, generation, request)
    return await jobs.run(context, worker.delivery.deliver, generation, request.output)


async def upscale(worker: Worker, request: UpscaleRequest, context: JobContext) -> dict[str, Any]:
    """Pictures of the job, enlarged at its turn at the GPU, and delivered."""
    jobs = worker.jobs
    async with worker.gpu.turn(context):
        upscaling = await jobs.run(context, worker.generator.upscale, request)
    upscaling = await jobs.run(context, worker.models_query.add_menus, upscaling, request)
    return await jobs.run(context, worker.delivery.deliver, upscaling, request.output)


async def png_info(worker: Worker, request: PngInfoRequest, context: JobContext) -> dict[str, Any]:
    """What a picture's file says about how it was made."""
    return await worker.jobs.run(context, worker.png_info_query.answer, request)


async def models(worker: Worker, _request: ModelsRequest, context: JobContext) -> dict[str, Any]:
    """What a client's menus show."""
    return await worker.jobs.run(context, worker.models_query.answer)


async def prefetch(worker: Worker, request: PrefetchRequest, context: JobContext) -> dict[str, Any]:
    """Models brought into the cache, for later jobs."""
    return await worker.jobs.run(context, worker.prefetch_query.answer, request)


async def health(worker: Worker, _request: HealthRequest, context: JobContext) -> dict[str, Any]:
    """How this worker is. It never waits for the GPU."""
    return await worker.jobs.run(context, worker.health_query.answer)


_TASKS: Mapping[type, Callable[[Worker, Any, JobContext], Awaitable[dict[str, Any]]]] = {
    GenerationRequest: generate,
    UpscaleRequest: upscale,
    PngInfoRequest: png_info,
    ModelsRequest: models,
    PrefetchRequest: prefetch,
    HealthRequest: health,
}


class Worker:
    """The parts, built from the settings, and what they share from job to job."""

    def __init__(
        self, config: Config, *, models: ModelManager | None = None, timings: WebUITimings | None = None
    ) -> None:
        self._config = config
        self.limits = _limits(config)
        status = StatusPage(config.runpod.output_url, config.runpod.api_key) if config.runpod else StatusPage(None)
        self.jobs = JobRunner(2 * config.jobs_in_flight + 2, status)
        self.models = models or open_manager(config)
        timings = timings or WebUITimings()
        self._webui = WebUI(config.webui_url, timeout=timings.silence)
        self.readiness = Readiness(
            self._webui,
            Supervisor(config.webui_state_file),
            ready_timeout=config.webui_ready_timeout,
            timings=timings,
            owner=None
            if config.webui_state_file
            else OwnersOptions(owner_file(config.worker_state_file, config.webui_url)),
        )
        self.generator = Generator(
            self._webui, self.readiness, generation_timeout=config.generation_timeout, limits=self.limits
        )
        policy = image_policy(config.image_hosts)
        self.pictures = PicturePreparer(PictureFetcher(policy) if policy else None)
        self.delivery = Delivery(Bucket(config.bucket) if config.bucket else None)
        self.gpu = GpuQueue()
        self._preparation = PreparationOrder()
        self.shutdown = Shutdown(config.shutdown_grace)
        self.health = HealthReporter(config.worker_state_file, self._is_webui_up)
        self.models_query = ModelsQuery(self._webui, self.readiness, self.generator, self.models, self.limits)
        self.png_info_query = PngInfoQuery(self.pictures, self.models_query)
        self.prefetch_query = PrefetchQuery(self.models, self.readiness, self.models_query, self.limits)
        self.health_query = HealthQuery(self.health, self.generator, self.models)
        self.broken: WorkerError | None = None

    def close(self) -> None:
        """End what the worker started. No job may be running."""
        self.health.close()
        self.jobs.close()
        self.models.close()
        self.readiness.close()
        self._webui.close()
        self.delivery.close()

    def boot(self, deadline: Deadline | None = None) -> None:
        """Bring the checkpoint onto the disk and the WebUI up, both at once; then load the checkpoint and warm up.

        Without a deadline it may take BOOT_TIMEOUT. Raises WorkerError if it fails, JobCancelled if the deadline is
        cancelled, ConfigError for a bucket setting that can never work.
        """
        context = JobContext(deadline or Deadline(self._config.boot_timeout, what="the boot"))
        if not self.readiness.is_started_by_us:
            self.readiness.wait_until_up(context.deadline)  # nothing starts one: find that out before the download
        with ThreadPoolExecutor(max_workers=3, thread_name_prefix="boot") as threads:
            bucket = threads.submit(self.delivery.prepare)
            up = threads.submit(self.readiness.wait_until_up, context.deadline)
            checkpoint = threads.submit(self.models.prepare_checkpoint, context)
            _wait_for_all([bucket, up, checkpoint], context.deadline)
        model = checkpoint.result()
        log.info("the checkpoint is %s, %s", model.file, "downloaded" if model.downloaded else "nothing to download")
        self.models_query.list_cache()
        self.readiness.prepare(model, context)
        if self._config.warmup:
            self.generator.warm_up(context)
        log.info("ready for jobs")

    async def handle(self, job: dict[str, Any]) -> dict[str, Any]:
        """What RunPod calls. Returns an answer for every job but a cancelled one."""
        with logs.of_job(str(job.get("id"))):
            try:
                if self.broken is not None:
                    return self.broken.answer()
                answer = await run_job(self, job)
                self._save(job, answer)
                self.jobs.submit_later(release_free_memory, delay=0.5)  # by then the SDK has sent the answer
                self.health_query.count("COMPLETED")
                return answer
            except WorkerError as error:
                answer = error.answer()
                log.warning("the job failed: %s%s", answer["error"], f" ({error.hint})" if error.hint else "")
                self.health_query.count(error.code)
                return answer
            except asyncio.CancelledError:
                log.info("the job was cancelled")
                raise
            except Exception:
                log.exception("the job failed because of a bug in this worker")
                self.health_query.count(Internal.code)
                return Internal("the worker failed; its log says why, under the job's id").answer()

    @contextlib.asynccontextmanager
    async def open_job(self, job: dict[str, Any]) -> AsyncIterator[JobContext]:
        """A job's context: its time runs, its progress is sent to RunPod, and the worker's shutdown may cancel it."""
        patience = self.readiness.timings.interrupt_patience
        is_prefetch = names_task(job.get("input"), Task.PREFETCH)
        timeout = self._config.prefetch_timeout if is_prefetch else self._config.job_timeout
        deadline = Deadline(job_seconds(job, timeout, interrupt_patience=patience))
        with self.shutdown.may_cancel(deadline):
            async with self.jobs.open(str(job["id"]), deadline) as context:
                yield context

    def read_request(self, raw: object, context: JobContext) -> Request:
        """The request that a job's raw input means, every name in the WebUI's own spelling. InvalidRequest otherwise.

        Its pictures are fetched and decoded. It runs in a thread: 20 kB of LoRA tags take a second of the processor.
        """
        request = parse_request(raw, self.limits)
        if isinstance(request, UpscaleRequest):
            request = self.generator.resolve_upscale(request)
            return fit_upscale(request, self.pictures.prepare(request.pictures, context), self.limits)
        if not isinstance(request, GenerationRequest):
            return request
        pictures = self.pictures.prepare(request.pictures, context)
        request = fill_units(request, pictures)
        if request.task is Task.IMG2IMG:
            request = fit_pictures(request, pictures, self.limits)
        return self.generator.resolve(request, self.models.embeddings_in)

    @contextlib.contextmanager
    def models_for(self, request: GenerationRequest, context: JobContext) -> Iterator[HeldModels]:
        """Have the models of a job on disk, and keep them there until the block ends."""
        with self._preparation.join() as place:
            context = replace(context, is_next=place.is_first)
            tolerate = request.on_lora_error is OnLoraError.WARN
            with self.models.hold(request.models, context, tolerate=tolerate, checkpoints=request.checkpoints) as held:
                place.leave()
                with read_ahead([] if self.gpu.is_free else self._checkpoints_to_load(held)):
                    yield held

    def _checkpoints_to_load(self, held: HeldModels) -> list[Path]:
        """The files of a job's checkpoints, without the one that is loaded now, or is being loaded."""
        loaded = self.readiness.checkpoint.path
        return [model.path for model in held.loaded if model.path != loaded]

    def start(self, request: GenerationRequest, held: HeldModels, context: JobContext) -> StartedGeneration:
        """Generate with models that are still there: another worker may have evicted one while this one was paused."""
        held = self.models.hold_again(held, context)
        with self.models.keep_loaded(held.loaded, context):
            return self.generator.start(request, held, context)

    def jobs_in_flight(self, _current: int) -> int:
        """How many jobs the SDK may hold: its `concurrency_modifier`. It calls this in its loop before every take."""
        self.shutdown.listen()
        self.health.watch_ping_process()
        return self._config.jobs_in_flight

    def check_fitness(self) -> None:
        """The SDK's last question before it takes jobs: whether the cache can be read.

        The WebUI is not asked: a failed check ends the process, and a broken worker still has to answer waiting jobs.
        """
        if self.broken is None:
            self.models.check()

    def _is_webui_up(self) -> bool:
        return not self.gpu.is_free or self.readiness.check_idle()  # a job that has the GPU watches the WebUI itself

    def _save(self, job: dict[str, Any], answer: dict[str, Any]) -> None:
        if self._config.output_dir is None or self._config.runpod is not None or "images" not in answer:
            return
        for path in save_images(self._config.output_dir, str(job["id"]), answer):
            log.info("wrote %s", path)


def _limits(config: Config) -> Limits:
    """What the settings allow a job."""
    listed = checkpoint_refs(config)
    may_choose = bool(listed) or config.any_checkpoint
    return Limits(
        config.max_steps,
        config.max_pixels,
        config.max_images,
        config.model_hosts,
        has_bucket=config.bucket is not None,
        image_hosts=config.image_hosts,
        max_input_images=config.max_input_images,
        max_upscale_pixels=config.max_upscale_pixels,
        checkpoints=((config.checkpoint_name, own_checkpoint_ref(config)), *listed) if may_choose else (),
        max_checkpoint_bytes=config.max_checkpoint_bytes if config.any_checkpoint else None,
    )


def _wait_for_all(futures: Sequence[Future[Any]], deadline: Deadline) -> None:
    """Return when all are done. The first failure cancels the others, and is raised."""
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in futures:
        if future in done and future.exception() is not None:
            deadline.cancel()
            future.result()


def main() -> None:
    """Start the worker as the arguments and the environment say."""
    use_few_arenas()
    stop = _StopSignals()
    try:
        arguments = parse_arguments(sys.argv[1:])
        if arguments.wants_schema:
            sys.stdout.write(json.dumps(job_schema(), indent=1, ensure_ascii=False) + "\n")
            return
        config = Config.from_env(os.environ)
        logs.configure(config.log_level, config.log_format)
        _warn_of_misspelt_settings()
        _check_local_run(arguments)
        prepare_sdk_environment(os.environ)
        boot = Deadline(config.boot_timeout, what="the boot")
        with stop.cancelling(boot), ThreadPoolExecutor(max_workers=1, thread_name_prefix="main") as threads:
            booted = threads.submit(_build_and_boot, config, boot)
            import runpod  # 1.6 s, while the WebUI starts and the checkpoint arrives

            worker = booted.result()
    except BadArguments as error:
        _end(str(error), 2)
    except JobCancelled:
        _end(f"stopped by {stop.name} before the worker was ready", 128 + stop.number)
    except ConfigError as error:
        sys.exit(str(error))
    try:
        if worker.broken is not None and config.runpod is None:
            sys.exit(1)
        runpod.serverless.register_fitness_check(worker.check_fitness)
        # The local API ends with this signal too: its server raises it again when it is down.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        worker.health.remember_children()
        runpod.serverless.start({"handler": worker.handle, "concurrency_modifier": worker.jobs_in_flight})
    finally:
        worker.close()  # also releases its holds on the volume, so that no other worker waits until they are stale


def _warn_of_misspelt_settings() -> None:
    for name, near in find_misspelt_settings(os.environ).items():
        suggestion = f"; did you mean {' or '.join(near)}?" if near else ""
        log.warning("%s is set, but no setting has that name%s", name, suggestion)


def _check_local_run(arguments: Arguments) -> None:
    """Raise BadArguments if the SDK will find no job for a local run, or no port for the local API."""
    if arguments.serves_api:
        check_api_address(arguments.api_host, arguments.api_port)
    elif runs_test_file(os.environ) and not arguments.has_test_input:
        check_test_file(Path("test_input.json"))


def _end(message: str, status: int) -> NoReturn:
    sys.stderr.write(f"handler.py: {message}\n")
    sys.exit(status)


class _StopSignals:
    """Ctrl-C and TERM during the boot. `number` is the one that came."""

    def __init__(self) -> None:
        self.number = signal.SIGINT

    @property
    def name(self) -> str:
        return "Ctrl-C" if self.number == signal.SIGINT else self.number.name

    @contextlib.contextmanager
    def cancelling(self, deadline: Deadline) -> Iterator[None]:
        """Inside the block, either cancels the deadline, so that leases are released. A second one ends the process."""

        def cancel(number: int, _frame: object) -> None:
            self.number = signal.Signals(number)
            signal.signal(number, signal.SIG_DFL)
            deadline.cancel()

        previous = {number: signal.signal(number, cancel) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _build_and_boot(config: Config, deadline: Deadline) -> Worker:
    """A worker that is ready, or broken. ConfigError and JobCancelled end the start.

    A worker that ended here would leave the jobs that wait for it IN_QUEUE until they expire. On RunPod a broken worker
    answers each of them with the reason instead, and is replaced.
    """
    worker = Worker(config)
    worker.health.start()
    try:
        worker.boot(deadline)
        worker.health.set_state("ready")
    except (ConfigError, JobCancelled):
        worker.close()
        raise
    except WorkerError as error:
        hint = f" ({error.hint})" if error.hint else ""
        log.error("the worker cannot start: %s: %s%s", error.code, error.message, hint)
        worker.broken = WebUINotReady(f"this worker could not start: {error.code}: {error.message}", hint=error.hint)
    except Exception:
        log.exception("the worker cannot start because of a bug in it")
        worker.broken = WebUINotReady("this worker could not start; its log says why")
    if worker.broken is not None:
        worker.health.set_state("broken")
    return worker


if __name__ == "__main__":
    main()

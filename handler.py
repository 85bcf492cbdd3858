"""The front door: RunPod's jobs in, proven images out. `run_job` tells a job's whole story.

    python handler.py --test_input '{"input": {"prompt": "a lighthouse"}}'   one job, here
    python handler.py --rp_serve_api                                         the SDK's local API
    python handler.py                                                        RunPod's queue, or test_input.json

Settings come from the environment: docs/subsystems/container-management.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

from a1111_worker import logs
from a1111_worker.config import Config, settle_sdk
from a1111_worker.delivery.deliver import Bucket, Delivery, save_pictures
from a1111_worker.domain import Deadline, GenerationRequest, OnLoraError, Run, Stage
from a1111_worker.errors import ConfigError, Internal, WebUINotReady, WorkerError
from a1111_worker.job import memory
from a1111_worker.job.health import Lookout
from a1111_worker.job.run import Shutdown, Story, Turns, seconds_for, telling
from a1111_worker.job.status import StatusPage
from a1111_worker.request.parse import Limits, parse_request
from a1111_worker.webui.client import WebUI
from a1111_worker.webui.generation import Generator, Started
from a1111_worker.webui.readiness import Readiness, Waits
from a1111_worker.webui.supervisor import Supervisor
from model_manager import Held, ModelManager, open_manager

log = logging.getLogger("worker")


async def run_job(worker: Worker, job: dict[str, Any]) -> dict[str, Any]:
    """A job's whole story: its answer, or a WorkerError. A cancelled job leaves nothing running behind it."""
    async with worker.telling(job) as story:
        request = worker.generator.resolve(parse_request(job.get("input"), worker.limits))
        async with story.holding(Stage.MODELS, worker.models_of(request, story)) as held:
            async with worker.gpu.next(story):
                start = partial(worker.generator.start, request, held.models, held.failures, story)
                started = await story.blocking(start, undo=Started.drop)
            with story.stage(Stage.DELIVER):
                generation = await story.blocking(worker.generator.finish, started, story)
        return await story.blocking(worker.delivery.deliver, story.job_id, generation, request.output, story)


class Worker:
    """The parts, built from the settings, and what they share from job to job."""

    def __init__(self, config: Config, *, models: ModelManager | None = None, waits: Waits | None = None) -> None:
        self._config = config
        self._threads = ThreadPoolExecutor(max_workers=2 * config.jobs_in_flight + 2, thread_name_prefix="job")
        self._status = (
            StatusPage(config.runpod.output_url, config.runpod.api_key) if config.runpod else StatusPage(None)
        )
        self.limits = Limits(
            config.max_steps,
            config.max_pixels,
            config.max_images,
            config.model_hosts,
            has_bucket=config.bucket is not None,
        )
        self.delivery = Delivery(Bucket(config.bucket) if config.bucket else None)
        self.models = models or open_manager(config)
        waits = waits or Waits()
        self._webui = WebUI(config.webui_url, timeout=waits.silence)
        self.readiness = Readiness(
            self._webui,
            Supervisor(config.webui_state_file),
            ready_timeout=config.webui_ready_timeout,
            waits=waits,
        )
        self.generator = Generator(self._webui, self.readiness, generation_timeout=config.generation_timeout)
        self.gpu = Turns()
        self._preparing: list[Story] = []  # in the order in which they came
        self.shutdown = Shutdown(config.shutdown_grace)
        self.lookout = Lookout(
            config.worker_state_file,
            # While a job has the GPU, that job looks.
            lambda: not self.gpu.is_free or self.readiness.look_after(),
        )
        self.broken: WorkerError | None = None

    def close(self) -> None:
        """End what the worker started; nothing may be under way."""
        self.lookout.close()
        self._threads.shutdown()
        self.models.close()
        self.readiness.close()
        self._webui.close()
        self.delivery.close()
        self._status.close()

    def boot(self) -> None:
        """The checkpoint on disk and the WebUI up, both at once; then the switch. WorkerError where that failed."""
        deadline = Deadline(self._config.boot_timeout, what="the boot")
        if not self.readiness.is_started_by_us:
            self.readiness.wait_until_up(deadline)  # nobody starts one: settled before a byte is fetched
        with ThreadPoolExecutor(max_workers=3, thread_name_prefix="boot") as threads:
            threads.submit(self.delivery.prepare)
            up = threads.submit(self.readiness.wait_until_up, deadline)
            checkpoint = threads.submit(self.models.prepare_checkpoint, deadline=deadline)
            _both(up, checkpoint, deadline)
        model = checkpoint.result()
        log.info("the checkpoint is %s, %s", model.file, "downloaded" if model.downloaded else "nothing to download")
        self.readiness.prepare(model, Run(deadline))
        if self._config.warmup:
            self.generator.warm_up(Run(deadline))
        log.info("ready for jobs")

    async def handle(self, job: dict[str, Any]) -> dict[str, Any]:
        """What RunPod calls. Always an answer; only a cancelled job has none."""
        with logs.of_job(str(job.get("id"))):
            try:
                if self.broken is not None:
                    return self.broken.answer()
                answer = await run_job(self, job)
                self._save(job, answer)
                # Once the SDK has sent the answer and let go of it.
                asyncio.get_running_loop().call_later(0.5, self._tidy)
                return answer
            except WorkerError as error:
                log.warning("the job failed: %s: %s", error.code, error.sentence)
                return error.answer()
            except asyncio.CancelledError:
                log.info("the job was cancelled")
                raise
            except Exception:
                log.exception("the job met a bug of ours")
                return Internal("the worker failed; its log tells why under the job's id").answer()

    @contextlib.asynccontextmanager
    async def telling(self, job: dict[str, Any]) -> AsyncIterator[Story]:
        """The job's story: its time runs, its log lines carry its id, its progress is shown; a shutdown may end it."""
        deadline = Deadline(seconds_for(job, self._config.job_timeout))
        with self.shutdown.may_end(deadline):
            async with telling(str(job["id"]), deadline, self._threads, self._status) as story:
                yield story

    @contextlib.contextmanager
    def models_of(self, request: GenerationRequest, story: Story) -> Iterator[Held]:
        """The LoRAs of a job, to be held while it runs. Of the jobs that prepare, the line is the oldest one's first:
        it is the one that the GPU waits for, or will next."""
        self._preparing.append(story)
        try:
            with self.models.hold(
                [wish.ref for wish in request.loras],
                on_progress=story.report,
                deadline=story.deadline,
                tolerate=request.on_lora_error is OnLoraError.WARN,
                foreground=lambda: self._preparing[0] is story,
            ) as held:
                self._preparing.remove(story)
                yield held
        finally:
            with contextlib.suppress(ValueError):
                self._preparing.remove(story)

    def jobs_in_flight(self, _current: int) -> int:
        """How many jobs the SDK may hold: its `concurrency_modifier`, which it calls in its loop before every take."""
        self.shutdown.listen()
        return self._config.jobs_in_flight

    def check_fitness(self) -> None:
        """The SDK's last question before it takes jobs: whether the cache can be read. Nothing about the WebUI, since a
        failed check ends the process, and a broken worker still has to answer the jobs that wait."""
        if self.broken is None:
            self.models.check()

    def _tidy(self) -> None:
        with contextlib.suppress(RuntimeError):  # the worker is ending
            self._threads.submit(memory.give_back)

    def _save(self, job: dict[str, Any], answer: dict[str, Any]) -> None:
        if self._config.output_dir is None or self._config.runpod is not None:
            return
        for path in save_pictures(self._config.output_dir, str(job["id"]), answer):
            log.info("wrote %s", path)


def _both(one: Future[Any], other: Future[Any], deadline: Deadline) -> None:
    """Return when both are done; the first failure ends the other."""
    done, _ = wait((one, other), return_when=FIRST_EXCEPTION)
    for failed in done:
        if failed.exception() is not None:
            deadline.cancel()
            failed.result()


def main() -> None:
    """Start the worker as the arguments and the environment say."""
    try:
        config = Config.from_env(os.environ)
        logs.configure(config.log_level, config.log_format)
        settle_sdk(os.environ)
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="main") as threads:
            booted = threads.submit(_build_and_boot, config)
            import runpod  # 1.6 s, while the WebUI starts and the checkpoint arrives

            worker = booted.result()
    except ConfigError as error:
        sys.exit(str(error))
    try:
        if worker.broken is not None and config.runpod is None:
            sys.exit(1)
        runpod.serverless.register_fitness_check(worker.check_fitness)
        # What the local API ends with, too: its server raises the signal again when it is down.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        runpod.serverless.start({"handler": worker.handle, "concurrency_modifier": worker.jobs_in_flight})
    finally:
        worker.close()  # its holds on the volume too: nobody has to wait until they are stale


def _build_and_boot(config: Config) -> Worker:
    """A worker that is ready, or broken: one that ended here would leave the jobs that wait for it IN_QUEUE until they
    expire. On RunPod each of them gets the reason instead, and the worker is replaced."""
    worker = Worker(config)
    worker.lookout.start()
    try:
        worker.boot()
        worker.lookout.say("ready")
    except WorkerError as error:
        hint = f" ({error.hint})" if error.hint else ""
        log.error("the worker cannot start: %s: %s%s", error.code, error.sentence, hint)
        worker.broken = WebUINotReady(f"this worker could not start: {error.code}: {error.sentence}", hint=error.hint)
    except Exception:
        log.exception("the worker met a bug of ours while it started")
        worker.broken = WebUINotReady("this worker could not start; its log tells why")
    if worker.broken is not None:
        worker.lookout.say("broken")
    return worker


if __name__ == "__main__":
    main()

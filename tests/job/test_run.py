"""A job's blocking work in threads, and its clean end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from a1111_worker import logs
from a1111_worker.context import Deadline, JobContext
from a1111_worker.domain import Progress, Stage
from a1111_worker.job.run import JobRunner
from a1111_worker.job.status import StatusPage
from sandbox.server import Exchange, Server
from tests.support import wait_until


class StatusServer(Server):
    """Takes progress; holds its answers back while `may_answer` is not set."""

    def __init__(self) -> None:
        super().__init__()
        self.arrived = threading.Event()
        self.may_answer = threading.Event()
        self.may_answer.set()

    def answer(self, exchange: Exchange) -> None:
        self.arrived.set()
        self.may_answer.wait(10)
        exchange.send(200, b"{}")

    def page(self) -> StatusPage:
        return StatusPage(f"{self.url}/done/$ID?x=1", "key", interval=0.0)


class SlowResource:
    """A context manager that waits to be entered and left until it may."""

    def __init__(self) -> None:
        self.entering, self.may_enter = threading.Event(), threading.Event()
        self.leaving, self.may_leave = threading.Event(), threading.Event()
        self.is_held = False

    def __enter__(self) -> None:
        self.entering.set()
        self.may_enter.wait(10)
        self.is_held = True

    def __exit__(self, *_: object) -> None:
        self.leaving.set()
        self.may_leave.wait(10)  # a network volume that is slow to unlink
        self.is_held = False


@contextlib.contextmanager
def runner(status: StatusPage | None = None) -> Iterator[JobRunner]:
    made = JobRunner(4, status or StatusPage(None))
    try:
        yield made
    finally:
        made.close()


def run(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), timeout=30))


def senders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("progress")]


def test_blocking_work_runs_beside_the_loop() -> None:
    async def scene() -> None:
        with runner() as jobs:
            here = threading.get_ident()

            there = await jobs.run(JobContext(), lambda context: threading.get_ident())

            assert there != here

    run(scene)


def test_a_function_gets_its_arguments_and_the_jobs_context() -> None:
    async def scene() -> None:
        with runner() as jobs:
            context = JobContext(job_id="job-1")

            result = await jobs.run(context, lambda *arguments: arguments, 1, 2)

            assert result == (1, 2, context)

    run(scene)


def test_log_lines_of_a_thread_carry_the_jobs_id(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    caplog.handler.addFilter(logs.add_job_id)

    async def job(jobs: JobRunner, job_id: str) -> None:
        with logs.of_job(job_id):
            await jobs.run(JobContext(), lambda context: logging.getLogger("worker").info("from %s", job_id))

    async def scene() -> None:
        with runner() as jobs:
            await asyncio.gather(job(jobs, "job-1"), job(jobs, "job-2"))

    run(scene)

    assert sorted((record.getMessage(), record.__dict__["job"]) for record in caplog.records) == [
        ("from job-1", "job-1"),
        ("from job-2", "job-2"),
    ]


def test_a_cancelled_job_ends_only_when_its_thread_has_ended() -> None:
    async def scene() -> None:
        with runner() as jobs:
            inside, unblocked, may_end, ended = (threading.Event() for _ in range(4))

            def work(context: JobContext) -> None:
                with context.deadline.on_cancel(unblocked.set):
                    inside.set()
                    may_end.wait(10)
                ended.set()

            job = asyncio.ensure_future(jobs.run(JobContext(), work))
            await asyncio.to_thread(inside.wait, 10)
            job.cancel()
            await asyncio.to_thread(unblocked.wait, 10)
            job.cancel()  # an impatient platform
            await asyncio.sleep(0)
            was_running = not job.done()
            may_end.set()
            with pytest.raises(asyncio.CancelledError):
                await job

            assert was_running
            assert ended.is_set()

    run(scene)


def test_the_result_of_a_cancelled_job_is_undone() -> None:
    async def scene() -> None:
        with runner() as jobs:
            inside, may_end = threading.Event(), threading.Event()
            undone: list[str] = []

            def work(context: JobContext) -> str:
                inside.set()
                may_end.wait(10)
                return "an answer that nobody will read"

            job = asyncio.ensure_future(jobs.run(JobContext(), work, undo=undone.append))
            await asyncio.to_thread(inside.wait, 10)
            job.cancel()
            may_end.set()
            with pytest.raises(asyncio.CancelledError):
                await job

            assert undone == ["an answer that nobody will read"]

    run(scene)


def test_leaving_a_slow_resource_does_not_stop_the_loop() -> None:
    async def scene() -> None:
        resource = SlowResource()
        resource.may_enter.set()

        async def job() -> None:
            async with jobs.enter(JobContext(), Stage.MODELS, resource):
                pass

        with runner() as jobs:
            running = asyncio.ensure_future(job())
            await asyncio.to_thread(resource.leaving.wait, 10)  # the loop still runs
            is_over = running.done()
            resource.may_leave.set()
            await running

        assert resource.leaving.is_set() and not is_over

    run(scene)


def test_an_error_of_leaving_is_raised() -> None:
    @contextlib.contextmanager
    def resource() -> Iterator[None]:
        yield
        raise OSError("the volume is gone")

    async def scene() -> None:
        with runner() as jobs:
            async with jobs.enter(JobContext(), Stage.MODELS, resource()):
                pass

    with pytest.raises(OSError, match="the volume is gone"):
        run(scene)


def test_a_resource_is_left_if_the_job_is_cancelled_while_it_is_entered() -> None:
    async def scene() -> None:
        resource = SlowResource()
        resource.may_leave.set()

        async def job() -> None:
            async with jobs.enter(JobContext(), Stage.MODELS, resource):
                raise AssertionError("a cancelled job does not go on")

        with runner() as jobs:
            running = asyncio.ensure_future(job())
            await asyncio.to_thread(resource.entering.wait, 10)
            running.cancel()
            resource.may_enter.set()
            with pytest.raises(asyncio.CancelledError):
                await running

        assert resource.leaving.is_set() and not resource.is_held

    run(scene)


def test_a_job_that_is_cancelled_while_it_leaves_a_resource_ends_when_that_is_left() -> None:
    async def scene() -> None:
        resource, context = SlowResource(), JobContext()
        resource.may_enter.set()

        async def job() -> None:
            async with jobs.enter(context, Stage.MODELS, resource):
                pass

        with runner() as jobs:
            running = asyncio.ensure_future(job())
            await asyncio.to_thread(resource.leaving.wait, 10)
            for _ in range(2):
                running.cancel()
                await asyncio.sleep(0)
            is_over = running.done()
            resource.may_leave.set()
            with pytest.raises(asyncio.CancelledError):
                await running

        assert not is_over and not resource.is_held
        assert context.deadline.is_cancelled

    run(scene)


def test_no_progress_is_sent_after_a_cancellation_while_the_models_are_still_released() -> None:
    async def scene(server: StatusServer) -> None:
        resource, waiting = SlowResource(), asyncio.Event()
        resource.may_enter.set()

        async def job() -> None:
            async with (
                jobs.open("job-1", Deadline()) as context,
                jobs.enter(context, Stage.MODELS, resource),
            ):
                context.report(Progress(Stage.MODELS))
                await asyncio.to_thread(server.arrived.wait, 10)
                context.report(Progress(Stage.QUEUE))  # to be sent when the first request has its answer
                waiting.set()
                await asyncio.Event().wait()  # as a job waits for the GPU

        with runner(server.page()) as jobs:
            running = asyncio.ensure_future(job())
            await waiting.wait()
            running.cancel()
            await asyncio.to_thread(resource.leaving.wait, 10)
            server.may_answer.set()
            await asyncio.to_thread(lambda: wait_until(lambda: not senders(), "the sender's end"))
            resource.may_leave.set()
            with pytest.raises(asyncio.CancelledError):
                await running

    with StatusServer() as server:
        server.may_answer.clear()
        run(lambda: scene(server))

        assert [asked.json()["output"]["stage"] for asked in server.asked] == ["models"]


def test_no_progress_is_sent_after_the_deadline_was_cancelled() -> None:
    async def scene(server: StatusServer) -> None:
        deadline = Deadline()
        with runner(server.page()) as jobs:
            async with jobs.open("job-1", deadline) as context:
                await asyncio.to_thread(deadline.cancel)
                context.report(Progress(Stage.GENERATE, percent=50))

    with StatusServer() as server:
        run(lambda: scene(server))

        assert server.asked == []


def test_a_job_leaves_no_sender_behind() -> None:
    async def scene(server: StatusServer) -> None:
        with runner(server.page()) as jobs:
            async with jobs.open("job-1", Deadline()) as context:
                context.report(Progress(Stage.MODELS))
                had_a_sender = bool(senders())

        assert had_a_sender and not senders()

    with StatusServer() as server:
        run(lambda: scene(server))


def test_work_that_comes_later_is_done_in_a_thread() -> None:
    async def scene() -> None:
        done = threading.Event()
        with runner() as jobs:
            jobs.submit_later(done.set, delay=0.001)

            assert await asyncio.to_thread(done.wait, 10)

    run(scene)


def test_work_that_comes_later_than_the_workers_end_is_not_done() -> None:
    calls: list[bool] = []

    async def scene() -> None:
        errors: list[Any] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: errors.append(context))
        with runner() as jobs:
            jobs.submit_later(lambda: calls.append(True), delay=0.001)
        after = loop.create_future()
        loop.call_later(0.002, after.set_result, None)  # comes after it
        await after

        assert errors == []

    run(scene)

    assert calls == []

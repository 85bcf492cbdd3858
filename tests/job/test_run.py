"""A job's blocking work in threads, and its clean end."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from a1111_worker.context import Deadline, JobContext
from a1111_worker.domain import Progress, Stage
from a1111_worker.job.run import JobRunner
from a1111_worker.job.status import StatusPage
from sandbox.server import Exchange, Server


@contextlib.contextmanager
def runner(status: StatusPage | None = None) -> Iterator[JobRunner]:
    made = JobRunner(4, status or StatusPage(None))
    try:
        yield made
    finally:
        made.close()


def run(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), timeout=30))


def test_what_blocks_runs_beside_the_loop() -> None:
    async def scene() -> None:
        with runner() as jobs:
            context = JobContext()
            here = threading.get_ident()

            there = await jobs.run(context, threading.get_ident)

            assert there != here

    run(scene)


def test_a_cancelled_job_ends_only_when_its_thread_has_ended() -> None:
    async def scene() -> None:
        with runner() as jobs:
            context = JobContext()
            inside, told, may_end, ended = (threading.Event() for _ in range(4))

            def work() -> None:
                with context.deadline.on_cancel(told.set):
                    inside.set()
                    may_end.wait(10)
                ended.set()

            job = asyncio.ensure_future(jobs.run(context, work))
            await asyncio.to_thread(inside.wait, 10)
            job.cancel()
            await asyncio.to_thread(told.wait, 10)
            job.cancel()  # an impatient platform
            await asyncio.sleep(0)
            still_there = not job.done()
            may_end.set()
            with pytest.raises(asyncio.CancelledError):
                await job

            assert still_there
            assert ended.is_set()

    run(scene)


def test_what_blocks_to_be_left_does_not_stop_the_loop() -> None:
    async def scene() -> None:
        leaving, may_leave = threading.Event(), threading.Event()

        @contextlib.contextmanager
        def resource() -> Iterator[None]:
            yield
            leaving.set()
            may_leave.wait(10)  # a network volume that is slow to unlink

        async def job() -> None:
            async with jobs.enter(JobContext(), Stage.MODELS, resource()):
                pass

        with runner() as jobs:
            running = asyncio.ensure_future(job())
            await asyncio.to_thread(leaving.wait, 10)  # the loop still runs
            is_over = running.done()
            may_leave.set()
            await running

        assert leaving.is_set() and not is_over

    run(scene)


def test_what_goes_wrong_while_it_is_left_is_told() -> None:
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


def test_what_was_entered_while_the_job_was_cancelled_is_left_again() -> None:
    async def scene() -> None:
        with runner() as jobs:
            context = JobContext()
            entering, may_enter = threading.Event(), threading.Event()
            left: list[bool] = []

            @contextlib.contextmanager
            def resource() -> Iterator[None]:
                entering.set()
                may_enter.wait(10)
                try:
                    yield
                finally:
                    left.append(True)

            async def job() -> None:
                async with jobs.enter(context, Stage.MODELS, resource()):
                    raise AssertionError("a cancelled job does not go on")

            running = asyncio.ensure_future(job())
            await asyncio.to_thread(entering.wait, 10)
            running.cancel()
            may_enter.set()
            with pytest.raises(asyncio.CancelledError):
                await running

            assert left == [True]

    run(scene)


def test_what_came_of_a_cancelled_job_is_undone() -> None:
    async def scene() -> None:
        with runner() as jobs:
            context = JobContext()
            inside, may_end = threading.Event(), threading.Event()
            undone: list[str] = []

            def work() -> str:
                inside.set()
                may_end.wait(10)
                return "an answer that nobody will read"

            job = asyncio.ensure_future(jobs.run(context, work, undo=undone.append))
            await asyncio.to_thread(inside.wait, 10)
            job.cancel()
            may_end.set()
            with pytest.raises(asyncio.CancelledError):
                await job

            assert undone == ["an answer that nobody will read"]

    run(scene)


def test_a_cancelled_job_shows_nothing_any_more() -> None:
    class Platform(Server):
        def answer(self, exchange: Exchange) -> None:
            exchange.send(200, b"{}")

    async def scene(platform: Platform) -> None:
        page = StatusPage(f"{platform.url}/done/$ID?x=1", "key", interval=0.0)
        deadline = Deadline()
        with runner(page) as jobs:
            async with jobs.open("job-1", deadline) as context:
                await asyncio.to_thread(deadline.cancel)
                context.report(Progress(Stage.GENERATE, percent=50))

    with Platform() as platform:
        run(lambda: scene(platform))

        assert platform.asked == []


def test_a_job_leaves_no_sender_behind() -> None:
    async def scene() -> None:
        with runner() as jobs:
            async with jobs.open("job-1", Deadline()) as context:
                context.report(Progress(Stage.MODELS))

        assert not [thread for thread in threading.enumerate() if thread.name.startswith("progress")]

    run(scene)

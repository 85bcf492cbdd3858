"""A job's way through the worker, and its clean end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from a1111_worker.domain import Deadline, Progress, Stage, unreported
from a1111_worker.errors import JobCancelled, JobTimeout
from a1111_worker.job.run import Shutdown, Story, Turns, seconds_for, telling
from a1111_worker.job.status import StatusPage
from sandbox.server import Exchange, Server


@contextlib.contextmanager
def a_story(seconds: float = 60.0) -> Iterator[Story]:
    with ThreadPoolExecutor(max_workers=4) as threads:
        yield Story("job-1", Deadline(seconds), unreported, threads)


def run(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), timeout=30))


def test_what_blocks_runs_beside_the_loop() -> None:
    async def scene() -> None:
        with a_story() as story:
            here = threading.get_ident()

            there = await story.blocking(threading.get_ident)

            assert there != here

    run(scene)


def test_a_cancelled_job_ends_only_when_its_thread_has_ended() -> None:
    async def scene() -> None:
        with a_story() as story:
            inside, told, may_end, ended = (threading.Event() for _ in range(4))

            def work() -> None:
                with story.deadline.on_cancel(told.set):
                    inside.set()
                    may_end.wait(10)
                ended.set()

            job = asyncio.ensure_future(story.blocking(work))
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


def test_what_was_entered_while_the_job_was_cancelled_is_left_again() -> None:
    async def scene() -> None:
        with a_story() as story:
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
                async with story.holding(Stage.MODELS, resource()):
                    raise AssertionError("a cancelled job does not go on")

            running = asyncio.ensure_future(job())
            await asyncio.to_thread(entering.wait, 10)
            running.cancel()
            may_enter.set()
            with pytest.raises(asyncio.CancelledError):
                await running

            assert left == [True]

    run(scene)


def test_the_gpu_is_had_by_one_job_at_a_time_in_order() -> None:
    async def scene() -> None:
        with a_story() as story:
            gpu = Turns()
            order: list[str] = []

            async def job(name: str) -> None:
                async with gpu.next(story):
                    order.append(f"{name} begins")
                    await asyncio.sleep(0)
                    order.append(f"{name} ends")

            await asyncio.gather(*(job(name) for name in "abc"))

            assert order == [f"{name} {what}" for name in "abc" for what in ("begins", "ends")]

    run(scene)


def test_a_job_that_waits_says_where_it_stands() -> None:
    async def scene() -> None:
        looks: list[Progress] = []
        with ThreadPoolExecutor() as threads:
            story = Story("job-1", Deadline(), looks.append, threads)
            gpu = Turns()

            async with gpu.next(story):
                waiting = asyncio.ensure_future(gpu.next(story).__aenter__())
                await asyncio.sleep(0)
            await waiting

            assert [look.detail for look in looks] == ["waits for the GPU, place 1 in the queue"]

    run(scene)


def test_a_job_that_moves_up_says_so() -> None:
    async def scene() -> None:
        looks: list[str] = []
        with ThreadPoolExecutor() as threads:
            first = Story("job-1", Deadline(), lambda look: None, threads)
            last = Story("job-2", Deadline(), lambda look: looks.append(look.detail), threads)
            gpu = Turns()

            async with gpu.next(first):
                second = asyncio.ensure_future(gpu.next(first).__aenter__())
                await asyncio.sleep(0)
                third = asyncio.ensure_future(gpu.next(last).__aenter__())
                await asyncio.sleep(0)
            await second
            third.cancel()

            assert looks == [f"waits for the GPU, place {place} in the queue" for place in (2, 1)]

    run(scene)


def test_what_came_of_a_cancelled_job_is_undone() -> None:
    async def scene() -> None:
        with a_story() as story:
            inside, may_end = threading.Event(), threading.Event()
            undone: list[str] = []

            def work() -> str:
                inside.set()
                may_end.wait(10)
                return "an answer that nobody will read"

            job = asyncio.ensure_future(story.blocking(work, undo=undone.append))
            await asyncio.to_thread(inside.wait, 10)
            job.cancel()
            may_end.set()
            with pytest.raises(asyncio.CancelledError):
                await job

            assert undone == ["an answer that nobody will read"]

    run(scene)


def test_a_cancelled_job_that_waits_never_holds_the_gpu() -> None:
    async def scene() -> None:
        with a_story() as story:
            gpu = Turns()

            async with gpu.next(story):
                waiting = asyncio.ensure_future(gpu.next(story).__aenter__())
                await asyncio.sleep(0)
                waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

            async with gpu.next(story):
                pass

    run(scene)


def test_a_job_whose_time_is_up_stops_waiting() -> None:
    async def scene() -> None:
        with a_story() as story, a_story(seconds=0.01) as short:
            gpu = Turns()

            async with gpu.next(story):
                with pytest.raises(JobTimeout):
                    await gpu.next(short).__aenter__()

            async with gpu.next(story):
                pass

    run(scene)


def test_a_job_that_the_shutdown_ends_stops_waiting() -> None:
    async def scene() -> None:
        with a_story() as story, a_story() as ended:
            gpu = Turns()

            async with gpu.next(story):
                waiting = asyncio.ensure_future(gpu.next(ended).__aenter__())
                await asyncio.sleep(0)
                await asyncio.to_thread(ended.deadline.cancel)
                with pytest.raises(JobCancelled):
                    await waiting

            assert gpu.is_free

    run(scene)


def test_the_gpu_goes_on_to_the_next_when_one_that_waits_is_cancelled_at_the_handover() -> None:
    async def scene() -> None:
        with a_story() as story:
            gpu = Turns()
            first = gpu.next(story)
            await first.__aenter__()
            second = asyncio.ensure_future(gpu.next(story).__aenter__())
            third = asyncio.ensure_future(gpu.next(story).__aenter__())
            await asyncio.sleep(0)

            await first.__aexit__(None, None, None)  # handed to the second …
            second.cancel()  # … which never wakes up to take it
            await asyncio.wait({second, third})

            assert second.cancelled()
            assert third.done() and third.exception() is None

    run(scene)


def test_a_shutdown_cancels_what_runs_and_what_comes_after() -> None:
    async def scene() -> None:
        shutdown = Shutdown(grace=0.0)
        running, late = Deadline(), Deadline()

        with shutdown.may_end(running):
            shutdown.listen()
            signal.raise_signal(signal.SIGTERM)
            with contextlib.suppress(JobCancelled):
                await asyncio.to_thread(running.wait, 10)
        with shutdown.may_end(late):
            pass

        assert running.cancelled and late.cancelled

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        run(scene)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_shutdown_calls_whoever_heard_term_before() -> None:
    heard: list[int] = []

    async def scene() -> None:
        Shutdown(grace=100.0).listen()

        signal.raise_signal(signal.SIGTERM)

        assert heard == [signal.SIGTERM]

    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        run(scene)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_cancelled_job_shows_nothing_any_more() -> None:
    class Platform(Server):
        def answer(self, exchange: Exchange) -> None:
            exchange.send(200, b"{}")

    async def scene(platform: Platform) -> None:
        page = StatusPage(f"{platform.url}/done/$ID?x=1", "key", interval=0.0)
        deadline = Deadline()
        with ThreadPoolExecutor() as threads:
            async with telling("job-1", deadline, threads, page) as story:
                await asyncio.to_thread(deadline.cancel)
                story.report(Progress(Stage.GENERATE, percent=50))
        page.close()

    with Platform() as platform:
        run(lambda: scene(platform))

        assert platform.asked == []


def test_a_story_leaves_no_sender_behind() -> None:
    async def scene() -> None:
        with ThreadPoolExecutor() as threads:
            async with telling("job-1", Deadline(), threads, StatusPage(None)) as story:
                story.report(Progress(Stage.MODELS))

        assert not [thread for thread in threading.enumerate() if thread.name.startswith("progress")]

    run(scene)


# the job, and the seconds it has of 570
TIMES = [
    ({}, 570.0),
    ({"policy": None}, 570.0),
    ({"policy": {"executionTimeout": 60_000}}, 54.0),  # a tenth is kept back for the answer
    ({"policy": {"executionTimeout": 600_000}}, 570.0),
    ({"policy": {"executionTimeout": 3_600_000}}, 570.0),  # ours is shorter
    ({"policy": {"executionTimeout": "soon"}}, 570.0),
    ({"policy": {"executionTimeout": True}}, 570.0),
    ({"policy": {"executionTimeout": -5}}, 570.0),
    ({"policy": {"executionTimeout": float("nan")}}, 570.0),
    ({"policy": {"executionTimeout": 10**400}}, 570.0),
]


@pytest.mark.parametrize(("job", "seconds"), TIMES)
def test_a_shorter_time_of_the_jobs_own_wins(job: dict[str, Any], seconds: float) -> None:
    assert seconds_for(job, 570.0) == seconds

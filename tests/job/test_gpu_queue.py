"""The GPU as a FIFO lock, and the order of the jobs that prepare."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from a1111_worker.context import Deadline, JobContext
from a1111_worker.domain import Progress
from a1111_worker.errors import JobCancelled, JobTimeout
from a1111_worker.job.gpu_queue import GpuQueue, PreparationOrder


def run(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), timeout=30))


def test_one_job_at_a_time_has_the_gpu_in_the_order_of_arrival() -> None:
    async def scene() -> None:
        context, gpu = JobContext(), GpuQueue()
        order: list[str] = []

        async def job(name: str) -> None:
            async with gpu.turn(context):
                order.append(f"{name} begins")
                await asyncio.sleep(0)
                order.append(f"{name} ends")

        await asyncio.gather(*(job(name) for name in "abc"))

        assert order == [f"{name} {what}" for name in "abc" for what in ("begins", "ends")]

    run(scene)


def test_a_job_that_waits_reports_its_place() -> None:
    async def scene() -> None:
        reported: list[Progress] = []
        context = JobContext(report=reported.append)
        gpu = GpuQueue()

        async with gpu.turn(context):
            waiting = asyncio.ensure_future(gpu.turn(context).__aenter__())
            await asyncio.sleep(0)
        await waiting

        assert [progress.detail for progress in reported] == ["waits for the GPU, place 1 in the queue"]

    run(scene)


def test_a_job_that_moves_up_reports_its_new_place() -> None:
    async def scene() -> None:
        reported: list[str] = []
        first = JobContext()
        last = JobContext(report=lambda progress: reported.append(progress.detail))
        gpu = GpuQueue()

        async with gpu.turn(first):
            second = asyncio.ensure_future(gpu.turn(first).__aenter__())
            await asyncio.sleep(0)
            third = asyncio.ensure_future(gpu.turn(last).__aenter__())
            await asyncio.sleep(0)
        await second
        third.cancel()

        assert reported == [f"waits for the GPU, place {place} in the queue" for place in (2, 1)]

    run(scene)


def test_a_job_that_is_cancelled_while_it_waits_never_gets_the_gpu() -> None:
    async def scene() -> None:
        context, gpu = JobContext(), GpuQueue()

        async with gpu.turn(context):
            waiting = asyncio.ensure_future(gpu.turn(context).__aenter__())
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert not gpu.is_free  # the first job still has it

        async with gpu.turn(context):
            pass

    run(scene)


def test_a_job_whose_time_is_up_stops_waiting() -> None:
    async def scene() -> None:
        context, short = JobContext(), JobContext(Deadline(0.01))
        gpu = GpuQueue()

        async with gpu.turn(context):
            with pytest.raises(JobTimeout):
                await gpu.turn(short).__aenter__()
            assert not gpu.is_free  # the first job still has it

        async with gpu.turn(context):
            pass

    run(scene)


def test_a_job_that_the_shutdown_cancels_stops_waiting() -> None:
    async def scene() -> None:
        context, ended = JobContext(), JobContext()
        gpu = GpuQueue()

        async with gpu.turn(context):
            waiting = asyncio.ensure_future(gpu.turn(ended).__aenter__())
            await asyncio.sleep(0)
            await asyncio.to_thread(ended.deadline.cancel)
            with pytest.raises(JobCancelled):
                await waiting
            assert not gpu.is_free  # the first job still has it

        assert gpu.is_free

    run(scene)


def test_the_gpu_passes_on_if_the_next_job_is_cancelled_at_the_handover() -> None:
    async def scene() -> None:
        context, gpu = JobContext(), GpuQueue()
        first = gpu.turn(context)
        await first.__aenter__()
        second = asyncio.ensure_future(gpu.turn(context).__aenter__())
        third = asyncio.ensure_future(gpu.turn(context).__aenter__())
        await asyncio.sleep(0)

        await first.__aexit__(None, None, None)  # handed to the second …
        second.cancel()  # … which never wakes up to take it
        await asyncio.wait({second, third})

        assert second.cancelled()
        assert third.done() and third.exception() is None

    run(scene)


def test_the_oldest_job_that_prepares_is_the_first() -> None:
    order = PreparationOrder()

    with order.join() as first:
        with order.join() as second:
            assert (first.is_first(), second.is_first()) == (True, False)

            first.leave()

            assert (first.is_first(), second.is_first()) == (False, True)
        assert not second.is_first()

"""The shutdown, and the time that a job has."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from a1111_worker.context import Deadline
from a1111_worker.errors import JobCancelled
from a1111_worker.job.shutdown import ANSWER_SECONDS, Shutdown, cancel_delay, job_seconds


def run(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), timeout=30))


def test_a_shutdown_cancels_running_jobs_and_jobs_that_come_later() -> None:
    async def scene() -> None:
        shutdown = Shutdown(grace=0.0)
        running, late = Deadline(), Deadline()

        with shutdown.may_cancel(running):
            shutdown.listen()
            signal.raise_signal(signal.SIGTERM)
            with contextlib.suppress(JobCancelled):
                await asyncio.to_thread(running.wait, 10)
        with shutdown.may_cancel(late):
            pass

        assert running.is_cancelled and late.is_cancelled

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        run(scene)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_shutdown_calls_the_signal_handler_that_was_there_before() -> None:
    received: list[int] = []

    async def scene() -> None:
        Shutdown(grace=100.0).listen()

        signal.raise_signal(signal.SIGTERM)

        assert received == [signal.SIGTERM]

    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        run(scene)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("grace", "seconds"), [(0.0, 0.0), (4.0, 2.0), (6.0, 3.0), (8.0, 5.0), (60.0, 57.0)])
def test_a_job_that_is_cancelled_has_time_to_answer_within_the_grace(grace: float, seconds: float) -> None:
    assert cancel_delay(grace) == seconds


# the job, and the seconds it has of 570, if an interrupted generation is waited for 1 s
TIMES = [
    ({}, 570.0),
    ({"policy": None}, 570.0),
    ({"policy": {"executionTimeout": 60_000}}, 54.0),  # a tenth is kept back
    ({"policy": {"executionTimeout": 600_000}}, 570.0),  # at most 30 s
    ({"policy": {"executionTimeout": 20_000}}, 17.0),  # at least 1 s for the interrupt and 2 s for the answer
    ({"policy": {"executionTimeout": 8_000}}, 5.0),
    ({"policy": {"executionTimeout": 5_000}}, 2.0),  # the shortest one that RunPod takes
    ({"policy": {"executionTimeout": 2_000}}, 0.5),  # RunPod takes none of these; the job still has a quarter
    ({"policy": {"executionTimeout": 3_600_000}}, 570.0),  # ours is shorter
    ({"policy": {"executionTimeout": "soon"}}, 570.0),
    ({"policy": {"executionTimeout": True}}, 570.0),
    ({"policy": {"executionTimeout": -5}}, 570.0),
    ({"policy": {"executionTimeout": float("nan")}}, 570.0),
    ({"policy": {"executionTimeout": 10**400}}, 570.0),
]


@pytest.mark.parametrize(("job", "seconds"), TIMES)
def test_a_job_has_its_own_time_if_that_is_shorter(job: dict[str, Any], seconds: float) -> None:
    assert job_seconds(job, 570.0, interrupt_patience=1.0) == seconds


@pytest.mark.parametrize("patience", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("timeout", [20.0, 31.0, 60.0, 600.0])
def test_what_is_kept_back_is_enough_for_the_interrupt_and_the_answer(timeout: float, patience: float) -> None:
    job = {"policy": {"executionTimeout": timeout * 1000}}

    kept_back = timeout - job_seconds(job, 10_000.0, interrupt_patience=patience)

    assert kept_back >= patience + ANSWER_SECONDS

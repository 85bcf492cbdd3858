"""Deadlines and their cancellation."""

from __future__ import annotations

import threading

import pytest

from a1111_worker.context import Deadline, Timings
from a1111_worker.domain import Stage
from a1111_worker.errors import JobCancelled, JobTimeout


def test_a_deadline_without_end_never_raises() -> None:
    deadline = Deadline()

    deadline.check()
    deadline.wait(0.0)

    assert not deadline.is_cancelled


def test_a_deadline_that_is_over_says_whose_time_is_up() -> None:
    deadline = Deadline(0.0, what="the boot")

    with pytest.raises(JobTimeout, match="the time of the boot is up"):
        deadline.check()


def test_a_part_of_a_deadline_never_outlives_it() -> None:
    deadline = Deadline(1e-9)

    part = deadline.within(100.0, what="a generation")

    assert part.remaining() == 0.0
    with pytest.raises(JobTimeout, match=r"the time of the job is up \(1e-09 s\)"):
        part.check()


def test_whoever_waits_is_woken_when_it_is_cancelled() -> None:
    deadline = Deadline()
    part = deadline.within(100.0)
    outcome: list[BaseException] = []

    def wait() -> None:
        try:
            part.wait(100.0)
        except JobCancelled as error:
            outcome.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    deadline.cancel()
    waiting.join(timeout=10)

    assert isinstance(outcome[0], JobCancelled)


def test_what_blocks_is_unblocked_once_and_only_inside_its_block() -> None:
    deadline = Deadline()
    inside: list[str] = []
    outside: list[str] = []

    with deadline.on_cancel(lambda: outside.append("unblocked")):
        pass
    with deadline.on_cancel(lambda: inside.append("unblocked")):
        deadline.cancel()
        deadline.cancel()

    assert (inside, outside) == (["unblocked"], [])


def test_what_begins_to_block_after_the_cancellation_is_unblocked_at_once() -> None:
    deadline = Deadline()
    deadline.cancel()
    unblocked: list[bool] = []

    with deadline.on_cancel(lambda: unblocked.append(True)):
        pass

    assert unblocked == [True]


def test_timings_name_every_stage() -> None:
    measured = Timings()

    with measured.measure(Stage.GENERATE):
        pass

    timings = measured.seconds()
    assert list(timings) == ["models", "queue", "switch", "generate", "deliver", "total"]
    assert timings["generate"] > 0 and timings["models"] == 0

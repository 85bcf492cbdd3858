"""Deadlines and their cancellation."""

from __future__ import annotations

import math
import threading

import pytest

from a1111_worker.context import Deadline, StageTimes
from a1111_worker.domain import Stage
from a1111_worker.errors import JobCancelled, JobTimeout


def test_a_deadline_without_end_never_raises() -> None:
    deadline = Deadline()

    deadline.check()
    deadline.wait(0.0)

    assert not deadline.is_cancelled


def test_the_error_of_a_deadline_names_whose_time_is_up() -> None:
    deadline = Deadline(0.0, what="the boot")

    with pytest.raises(JobTimeout, match="the time of the boot is up"):
        deadline.check()


def test_a_deadline_within_another_never_ends_later() -> None:
    deadline = Deadline(1e-9)

    child = deadline.within(100.0, what="a generation")

    assert child.remaining() == 0.0
    with pytest.raises(JobTimeout, match=r"the time of the job is up \(1e-09 s\)"):
        child.check()


def test_a_cancellation_wakes_a_thread_that_waits() -> None:
    deadline = Deadline()
    child = deadline.within(100.0)
    outcome: list[BaseException] = []

    def wait() -> None:
        try:
            child.wait(100.0)
        except JobCancelled as error:
            outcome.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    deadline.cancel()
    waiting.join(timeout=10)

    assert isinstance(outcome[0], JobCancelled)


def test_a_cancellation_unblocks_once_and_only_inside_the_block() -> None:
    deadline = Deadline()
    inside: list[str] = []
    outside: list[str] = []

    with deadline.on_cancel(lambda: outside.append("unblocked")):
        pass
    with deadline.on_cancel(lambda: inside.append("unblocked")):
        deadline.cancel()
        deadline.cancel()

    assert (inside, outside) == (["unblocked"], [])


def test_a_block_that_begins_after_the_cancellation_is_unblocked_at_once() -> None:
    deadline = Deadline()
    deadline.cancel()
    unblocked: list[bool] = []

    with deadline.on_cancel(lambda: unblocked.append(True)):
        pass

    assert unblocked == [True]


def test_a_deadline_whose_time_is_up_unblocks() -> None:
    unblocked = threading.Event()

    with Deadline(0.01).on_end(unblocked.set):
        assert unblocked.wait(10)


@pytest.mark.parametrize("seconds", [100.0, math.inf])
def test_a_cancellation_unblocks_before_the_time_is_up(seconds: float) -> None:
    deadline = Deadline(seconds)
    unblocked = threading.Event()

    with deadline.on_end(unblocked.set):
        was_unblocked = unblocked.is_set()
        deadline.cancel()

        assert not was_unblocked and unblocked.is_set()


def test_after_the_block_nothing_is_unblocked() -> None:
    deadline = Deadline(0.2)
    unblocked, later = threading.Event(), threading.Event()

    with deadline.on_end(unblocked.set):
        pass
    with deadline.on_end(later.set):
        assert later.wait(10)
    deadline.cancel()

    assert not unblocked.is_set()


def test_the_times_have_every_stage_and_the_total() -> None:
    measured = StageTimes()

    with measured.measure(Stage.GENERATE):
        pass

    times = measured.seconds()
    assert list(times) == ["models", "queue", "switch", "generate", "deliver", "total"]
    assert times["generate"] > 0 and times["models"] == 0

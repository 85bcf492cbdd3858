"""A blocking call in a thread of its own."""

from __future__ import annotations

import threading

import pytest

from a1111_worker.background import BackgroundCall
from a1111_worker.context import Deadline


def test_a_cancelled_deadline_wakes_only_its_own_waiter() -> None:
    release = threading.Event()
    call = BackgroundCall(lambda: release.wait(20), name="call")
    cancelled, other = Deadline(), Deadline()
    cancelled.cancel()

    assert not call.wait(20, cancelled)
    release.set()
    assert call.wait(20, other)


def test_a_call_returns_or_raises_what_its_function_did() -> None:
    good, bad = BackgroundCall(lambda: 7, name="call"), BackgroundCall(lambda: 1 // 0, name="call")

    assert good.wait(10, Deadline()) and bad.wait(10, Deadline())

    assert good.result() == 7
    with pytest.raises(ZeroDivisionError):
        bad.result()


@pytest.mark.parametrize("is_early", [True, False])
def test_the_result_of_an_abandoned_call_is_disposed_of(is_early: bool) -> None:
    release, disposed = threading.Event(), threading.Event()
    results: list[int] = []

    def function() -> int:
        release.wait(20)
        return 7

    def dispose(result: int) -> None:
        results.append(result)
        disposed.set()

    call = BackgroundCall(function, name="call")
    if is_early:
        call.abandon(dispose)
        release.set()
    else:
        release.set()
        call.wait(20, Deadline())
        call.abandon(dispose)

    assert disposed.wait(20)
    assert results == [7]


def test_a_failure_of_an_abandoned_call_is_dropped() -> None:
    results: list[float] = []
    call = BackgroundCall(lambda: 1 / 0, name="call")

    call.wait(20, Deadline())
    call.abandon(results.append)

    assert results == []

"""Listeners that are called again and again."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from a1111_worker.heartbeat import Heartbeat
from tests.support import wait_until


@pytest.fixture
def heartbeat() -> Iterator[Heartbeat]:
    heartbeat = Heartbeat(0.005, name="test heartbeat")
    yield heartbeat
    heartbeat.stop()


def is_running() -> bool:
    return any(thread.name == "test heartbeat" for thread in threading.enumerate())


def test_listeners_are_called_again_and_again_in_their_order(heartbeat: Heartbeat) -> None:
    calls: list[str] = []
    heartbeat.add_listener(lambda: calls.append("first"))
    heartbeat.add_listener(lambda: calls.append("second"))

    wait_until(lambda: calls.count("second") >= 3, "three beats")
    heartbeat.stop()

    in_turn = calls[calls.index("second") - 1 :]  # a beat may come before the second listener
    assert in_turn == ["first", "second"] * (len(in_turn) // 2)


def test_a_listener_that_fails_is_logged_and_called_again(
    heartbeat: Heartbeat, caplog: pytest.LogCaptureFixture
) -> None:
    failures, calls = [], []

    def fail() -> None:
        failures.append(1)
        raise ValueError("of the listener")

    heartbeat.add_listener(fail)
    heartbeat.add_listener(lambda: calls.append(1))

    wait_until(lambda: len(failures) >= 2 and len(calls) >= 2, "two beats")

    assert "of the listener" in caplog.text


def test_a_removed_listener_is_not_called_any_more(heartbeat: Heartbeat) -> None:
    removed_calls: list[int] = []
    calls: list[int] = []

    def removed() -> None:
        removed_calls.append(1)

    heartbeat.add_listener(removed)
    heartbeat.add_listener(lambda: calls.append(len(removed_calls)))
    wait_until(lambda: removed_calls, "a beat")
    heartbeat.remove_listener(removed)
    wait_until(lambda: len(set(calls[-3:])) == 1 and len(calls) > 3, "three beats without it")

    assert len(removed_calls) == calls[-1]


def test_the_thread_starts_with_the_first_listener_and_ends_with_stop(heartbeat: Heartbeat) -> None:
    states = [is_running()]
    heartbeat.add_listener(lambda: None)
    states.append(is_running())
    heartbeat.stop()
    states.append(is_running())
    heartbeat.add_listener(lambda: None)
    states.append(is_running())

    assert states == [False, True, False, False]


def test_a_heartbeat_without_listeners_can_be_stopped(heartbeat: Heartbeat) -> None:
    heartbeat.stop()

    assert not is_running()

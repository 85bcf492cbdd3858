"""The worker's health on disk, and the checks of an idle WebUI."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from a1111_worker.job.health import HealthReporter
from tests.support import wait_until


class FakeWebUI:
    """What `is_webui_up` asks: up or not, and how often it was asked."""

    def __init__(self) -> None:
        self.is_up = True
        self.checks = 0

    def check(self) -> bool:
        self.checks += 1
        return self.is_up


@contextlib.contextmanager
def reporter(state_file: Path | None, check: Callable[[], bool], interval: float = 0.005) -> Iterator[HealthReporter]:
    health = HealthReporter(state_file, check, interval=interval)
    health.start()
    try:
        yield health
    finally:
        health.close()


def read(state_file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(state_file.read_bytes())
    return found


def beats_again(state_file: Path) -> bool:
    """Whether there is another heartbeat."""
    since = read(state_file)["heartbeat"]
    return wait_until(lambda: bool(read(state_file)["heartbeat"] > since), "the next heartbeat")


@pytest.fixture
def state_file(tmp_path: Path) -> Path:
    return tmp_path / "worker.state.json"


def test_a_worker_that_boots_is_booting_and_its_webui_is_down(state_file: Path) -> None:
    before = time.time()

    with reporter(state_file, FakeWebUI().check, interval=3600.0):
        found = read(state_file)

    assert (found["state"], found["webui"]) == ("booting", "down")
    assert before <= found["heartbeat"] <= time.time()


def test_a_new_state_is_written_at_once(state_file: Path) -> None:
    with reporter(state_file, FakeWebUI().check, interval=3600.0) as health:
        health.set_state("ready")
        ready = read(state_file)
        health.set_state("broken")
        broken = read(state_file)

    assert (ready["state"], ready["webui"]) == ("ready", "up")
    assert broken["state"] == "broken"


def test_the_heartbeat_goes_on_in_every_state(state_file: Path) -> None:
    with reporter(state_file, FakeWebUI().check) as health:
        for state in ("booting", "ready", "broken"):
            if state != "booting":
                health.set_state(state)
            assert beats_again(state_file), state


def test_a_webui_that_goes_down_and_comes_back_is_reported(state_file: Path) -> None:
    webui = FakeWebUI()
    with reporter(state_file, webui.check) as health:
        health.set_state("ready")

        webui.is_up = False
        went_down = wait_until(lambda: read(state_file)["webui"] == "down", "the next health")
        webui.is_up = True
        came_back = wait_until(lambda: read(state_file)["webui"] == "up", "the next health")

    assert went_down and came_back


@pytest.mark.parametrize("state", ["booting", "broken"])
def test_the_webui_is_checked_only_while_the_worker_is_ready(state_file: Path, state: str) -> None:
    webui = FakeWebUI()
    with reporter(state_file, webui.check) as health:
        health.set_state(state)
        for _ in range(3):
            assert beats_again(state_file)

    assert webui.checks == 0


def test_a_webui_is_checked_without_a_state_file_too() -> None:
    webui = FakeWebUI()

    with reporter(None, webui.check) as health:
        health.set_state("ready")
        was_checked = wait_until(lambda: webui.checks > 2, "three checks")

    assert was_checked


def test_a_state_file_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with reporter(tmp_path / "no such folder" / "state", FakeWebUI().check, interval=3600.0) as health:
        health.set_state("ready")

    assert caplog.text.count("the worker's state cannot be written: No such file or directory") == 2


def test_a_check_that_fails_does_not_end_the_heartbeat(state_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    failures = [OSError("a bug")]

    def check() -> bool:
        if failures:
            raise failures.pop()
        return False

    with reporter(state_file, check) as health:
        health.set_state("ready")
        went_on = wait_until(lambda: read(state_file)["webui"] == "down", "the next health")

    assert went_on
    assert "a heartbeat failed" in caplog.text


def wait_forever() -> None:
    threading.Event().wait()


@contextlib.contextmanager
def child() -> Iterator[BaseProcess]:
    """A child as the SDK starts its ping process: a daemon that never ends by itself (runpod 1.12, rp_ping.py)."""
    process = multiprocessing.get_context("spawn").Process(target=wait_forever, daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def test_without_a_ping_process_none_is_reported(state_file: Path) -> None:
    with reporter(state_file, FakeWebUI().check) as health:
        before = read(state_file)["ping"]
        health.remember_children()
        health.watch_ping_process()
        with child():  # of somebody else: the SDK has started by now
            health.watch_ping_process()
            assert beats_again(state_file)
            after = read(state_file)["ping"]
        assert beats_again(state_file)

    assert (before, after, read(state_file)["ping"]) == ("none", "none", "none")


def test_a_ping_process_that_dies_is_reported_and_logged_once(
    state_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with reporter(state_file, FakeWebUI().check) as health, child() as other:
        health.remember_children()
        with child() as ping:
            health.watch_ping_process()
            at_first = read(state_file)["ping"]
            other.kill()
            other.join()
            assert beats_again(state_file)
            without_the_other = read(state_file)["ping"]

            ping.kill()
            was_reported = wait_until(lambda: read(state_file)["ping"] == "down", "the next health")
            assert beats_again(state_file)

    assert (at_first, without_the_other, was_reported) == ("up", "up", True)
    assert caplog.text.count("the SDK's ping process has died (status -9)") == 1


def test_a_ping_process_is_watched_in_a_broken_worker_too(state_file: Path) -> None:
    with reporter(state_file, FakeWebUI().check) as health:
        health.set_state("broken")
        health.remember_children()
        with child() as ping:
            health.watch_ping_process()
            ping.kill()
            was_reported = wait_until(lambda: read(state_file)["ping"] == "down", "the next health")

    assert was_reported


def test_a_reader_never_finds_half_a_state(state_file: Path) -> None:
    found: list[str] = []
    with reporter(state_file, FakeWebUI().check, interval=0.0005) as health:

        def write() -> None:
            for _ in range(200):
                health.set_state("ready")

        writing = [threading.Thread(target=write) for _ in range(2)]
        for thread in writing:
            thread.start()
        while any(thread.is_alive() for thread in writing):
            found.append(read(state_file)["state"])
        for thread in writing:
            thread.join()

    assert set(found) <= {"booting", "ready"}
    assert [path.name for path in state_file.parent.iterdir()] == [state_file.name]


def test_a_reporter_that_was_never_started_can_be_closed(state_file: Path) -> None:
    HealthReporter(state_file, FakeWebUI().check).close()

    assert not state_file.exists()

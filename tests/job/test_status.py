"""What RunPod's /status is told, and when."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from a1111_worker.domain import Progress, Stage
from a1111_worker.job.status import StatusPage, as_output
from sandbox.server import Exchange, Server


class Platform(Server):
    """Takes looks, in order; holds them back while `open` is not set."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.open.set()
        self.arrived = threading.Semaphore(0)
        self.status = 200

    def answer(self, exchange: Exchange) -> None:
        self.arrived.release()
        self.open.wait(10)
        exchange.send(self.status, b"{}")

    def looks(self) -> list[dict[str, object]]:
        return [asked.json()["output"] for asked in self.asked]


@pytest.fixture
def platform() -> Iterator[Platform]:
    with Platform() as server:
        yield server


def page(platform: Platform, interval: float = 0.0) -> StatusPage:
    return StatusPage(f"{platform.url}/job-done/pod/$ID?gpu=1", "key", interval=interval)


def at(percent: float) -> Progress:
    return Progress(Stage.GENERATE, percent=percent)


def test_a_look_arrives_as_the_sdk_would_send_it(platform: Platform) -> None:
    status = page(platform).of("job-1")

    status.report(Progress(Stage.MODELS, percent=12.34, detail="1 of 2", eta_s=3.21, facts={"bytes": 7}))
    assert platform.arrived.acquire(timeout=10)
    status.close()

    asked = platform.asked[0]
    assert asked.path == "/job-done/pod/job-1"
    assert dict(asked.query) == {"gpu": "1", "isStream": "false"}
    assert asked.headers["authorization"] == "key"
    assert asked.headers["x-request-id"] == "job-1"
    assert asked.json() == {
        "status": "IN_PROGRESS",
        "output": {"stage": "models", "percent": 12.3, "detail": "1 of 2", "eta_s": 3.2, "bytes": 7},
    }


def test_while_one_look_is_in_flight_only_the_newest_waits(platform: Platform) -> None:
    platform.open.clear()
    status = page(platform).of("job-1")

    status.report(at(1))
    assert platform.arrived.acquire(timeout=10)
    for percent in range(2, 50):
        status.report(at(percent))
    platform.open.set()
    assert platform.arrived.acquire(timeout=10)
    status.close()

    assert [look["percent"] for look in platform.looks()] == [1, 49]


def test_closing_waits_for_the_look_in_flight_and_drops_the_next(platform: Platform) -> None:
    platform.open.clear()
    status = page(platform).of("job-1")
    status.report(at(1))
    assert platform.arrived.acquire(timeout=10)
    status.report(at(2))
    closed = threading.Event()

    def close() -> None:
        status.close()
        closed.set()

    closing = threading.Thread(target=close)
    closing.start()
    still_open = not closed.wait(0.05)
    platform.open.set()
    closing.join(timeout=10)

    assert still_open and closed.is_set()
    assert len(platform.asked) == 1


def test_nothing_is_sent_after_closing(platform: Platform) -> None:
    status = page(platform).of("job-1")

    status.close()
    status.report(at(1))
    status.close()

    assert platform.asked == []


def test_looks_keep_their_distance(platform: Platform) -> None:
    status = page(platform, interval=3600.0).of("job-1")

    status.report(at(1))
    assert platform.arrived.acquire(timeout=10)
    status.report(at(2))
    status.close()

    assert [look["percent"] for look in platform.looks()] == [1]


def test_a_platform_that_refuses_looks_costs_nothing_but_a_line(
    platform: Platform, caplog: pytest.LogCaptureFixture
) -> None:
    platform.status = 500
    status = page(platform).of("job-1")

    status.report(at(1))
    assert platform.arrived.acquire(timeout=10)
    status.close()

    assert "was not taken" in caplog.text


def test_without_a_platform_nobody_is_told() -> None:
    status = StatusPage(None).of("job-1")

    status.report(at(1))

    assert not status.is_sending
    status.close()


def test_a_look_stays_within_its_bounds() -> None:
    assert as_output(Progress(Stage.QUEUE, percent=101.0, eta_s=-3.0)) == {
        "stage": "queue",
        "percent": 100.0,
        "eta_s": 0.0,
    }

"""What is sent to RunPod for /status, and when."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from a1111_worker.domain import Progress, Stage
from a1111_worker.job.status import StatusPage, format_progress
from sandbox.server import Exchange, Server


class Platform(Server):
    """Takes progress, in order; holds its answers back while `open` is not set."""

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

    def percents(self) -> list[object]:
        return [asked.json()["output"]["percent"] for asked in self.asked]


@pytest.fixture
def platform() -> Iterator[Platform]:
    with Platform() as server:
        yield server


def page(platform: Platform, interval: float = 0.0) -> StatusPage:
    return StatusPage(f"{platform.url}/job-done/pod/$ID?gpu=1", "key", interval=interval)


def at(percent: float) -> Progress:
    return Progress(Stage.GENERATE, percent=percent)


def test_progress_is_a_request_as_the_sdk_would_make_it(platform: Platform) -> None:
    status = page(platform).job_status("job-1")

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


def test_while_a_request_is_in_flight_only_the_newest_progress_waits(platform: Platform) -> None:
    platform.open.clear()
    status = page(platform).job_status("job-1")

    status.report(at(1))
    assert platform.arrived.acquire(timeout=10)
    for percent in range(2, 50):
        status.report(at(percent))
    platform.open.set()
    assert platform.arrived.acquire(timeout=10)
    status.close()

    assert platform.percents() == [1, 49]


def test_progress_is_sent_once(platform: Platform) -> None:
    status = page(platform).job_status("job-1")

    status.report(at(1))
    assert platform.arrived.acquire(timeout=10)
    was_sent_again = platform.arrived.acquire(timeout=0.1)
    status.close()

    assert not was_sent_again
    assert platform.percents() == [1]


def test_closing_waits_for_the_request_in_flight_and_drops_what_was_not_sent(platform: Platform) -> None:
    platform.open.clear()
    status = page(platform).job_status("job-1")
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
    status = page(platform).job_status("job-1")

    status.close()
    status.report(at(1))
    status.close()

    assert platform.asked == []


def test_two_requests_of_a_job_are_an_interval_apart(platform: Platform) -> None:
    status = page(platform, interval=3600.0).job_status("job-1")

    status.report(at(1))
    assert platform.arrived.acquire(timeout=10)
    status.report(at(2))
    status.close()

    assert platform.percents() == [1]


def test_a_platform_that_refuses_progress_costs_nothing_but_a_log_line(
    platform: Platform, caplog: pytest.LogCaptureFixture
) -> None:
    platform.status = 500
    status = page(platform).job_status("job-1")

    status.report(at(1))
    assert platform.arrived.acquire(timeout=10)
    status.close()

    assert "was not taken" in caplog.text


def test_progress_that_is_not_json_costs_nothing_but_a_log_line(
    platform: Platform, caplog: pytest.LogCaptureFixture
) -> None:
    page(platform).post("job-1", Progress(Stage.MODELS, facts={"mb_per_s": float("nan")}))

    assert platform.asked == []
    assert "was not taken: ValueError" in caplog.text


def test_without_a_platform_nothing_is_sent() -> None:
    status = StatusPage(None).job_status("job-1")

    status.report(at(1))

    assert not status.is_sending
    status.close()


def test_progress_stays_within_its_bounds() -> None:
    assert format_progress(Progress(Stage.QUEUE, percent=101.0, eta_s=-3.0)) == {
        "stage": "queue",
        "percent": 100.0,
        "eta_s": 0.0,
    }

"""A long request to the WebUI while it runs."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from a1111_worker.context import Deadline
from a1111_worker.errors import GenerationFailed, WebUISilent
from a1111_worker.webui.client import WebUI, WebUIResponse
from a1111_worker.webui.responses import WebUIProgress
from a1111_worker.webui.running import RunningRequest
from sandbox.server import Exchange, Server
from tests.support import QUICK

STATE = {"job_no": 0, "job_count": 1, "sampling_step": 3, "sampling_steps": 20}


class GeneratingWebUI(Server):
    """Generates until `ended` is set, or until it got `ends_after` interrupts."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = threading.Event()
        self.is_silent = False
        self.interrupts = 0
        self.ends_after = 10**9
        self.fails = False

    def answer(self, exchange: Exchange) -> None:
        endpoint = exchange.asked.path.rpartition("/")[2]
        if endpoint == "txt2img":
            self.ended.wait(20)
            exchange.send_json(
                500 if self.fails else 200, {"error": "TypeError", "errors": "odd"} if self.fails else {}
            )
        elif endpoint == "interrupt":
            self.interrupts += 1
            if self.interrupts >= self.ends_after:
                self.ended.set()
            exchange.send_json(200, {})
        elif self.is_silent:
            exchange.hold(20)
        else:
            exchange.send_json(200, {"progress": 0.15, "eta_relative": 2.0, "state": STATE})


@pytest.fixture
def server() -> Iterator[GeneratingWebUI]:
    with GeneratingWebUI() as webui:
        yield webui


Generate = Callable[..., RunningRequest[WebUIResponse]]


@pytest.fixture
def generate(server: GeneratingWebUI) -> Iterator[Generate]:
    """Starts a generation. It ends with the test at the latest, and its answer is closed."""
    requests: list[RunningRequest[WebUIResponse]] = []
    client = WebUI(server.url, short_timeout=0.1)

    def start(**timings: float) -> RunningRequest[WebUIResponse]:
        request = RunningRequest(
            client, lambda: client.txt2img({}, timeout=20), activity="generates", timings=replace(QUICK, **timings)
        )
        requests.append(request)
        return request

    yield start

    server.ended.set()
    server.is_silent = False
    for request in requests:
        request.wait(Deadline(20))
        with contextlib.suppress(GenerationFailed):
            request.result().close()
    client.close()


def test_its_progress_is_reported_until_it_ends(server: GeneratingWebUI, generate: Generate) -> None:
    reported: list[WebUIProgress] = []

    def on_progress(progress: WebUIProgress) -> None:
        reported.append(progress)
        if len(reported) == 2:
            server.ended.set()

    request = generate()

    assert request.wait(Deadline(20), on_progress)
    assert request.result().read() == {}
    assert (reported[0].step, reported[0].steps, reported[0].eta_seconds) == (3, 20, 2.0)


def test_its_failure_is_raised_by_its_result(server: GeneratingWebUI, generate: Generate) -> None:
    server.fails = True
    server.ended.set()
    request = generate()

    assert request.wait(Deadline(20))

    with pytest.raises(GenerationFailed):
        request.result()


def test_a_deadline_that_is_over_ends_the_wait_but_not_the_request(server: GeneratingWebUI, generate: Generate) -> None:
    request = generate()

    assert not request.wait(Deadline(0.05))

    server.ended.set()
    assert request.wait(Deadline(20))


def test_a_cancellation_ends_the_wait(server: GeneratingWebUI, generate: Generate) -> None:
    deadline = Deadline()

    assert not generate().wait(deadline, lambda progress: deadline.cancel())


def test_a_webui_that_answers_nothing_while_it_works_hangs(server: GeneratingWebUI, generate: Generate) -> None:
    server.is_silent = True

    with pytest.raises(WebUISilent, match="it answers nothing while it generates"):
        generate(silence=0.2).wait(Deadline(20))


def test_one_failed_look_at_a_long_generation_is_no_hang(server: GeneratingWebUI, generate: Generate) -> None:
    request, began = generate(silence=1.0), time.monotonic()

    def on_progress(_: WebUIProgress) -> None:
        server.is_silent = time.monotonic() - began > 1.1  # by now it has worked for longer than it may be silent

    def end(exchange: Exchange) -> bool:
        if server.is_silent and exchange.asked.path.endswith("/progress"):
            server.ended.set()
        return False

    server.before.append(end)

    assert request.wait(Deadline(20), on_progress)


def test_an_interrupt_is_repeated_until_the_generation_ends(server: GeneratingWebUI, generate: Generate) -> None:
    server.ends_after = 3
    request = generate(interrupt_grace=20)

    request.interrupt()

    assert server.interrupts >= 3
    assert request.result().read() == {}


def test_a_webui_that_does_not_end_an_interrupted_generation_hangs(server: GeneratingWebUI, generate: Generate) -> None:
    with pytest.raises(WebUISilent, match="it did not end an interrupted generation"):
        generate(interrupt_grace=0.1).interrupt()


def test_the_result_of_an_abandoned_request_is_disposed_of(server: GeneratingWebUI, generate: Generate) -> None:
    disposed = threading.Event()

    def dispose(response: WebUIResponse) -> None:
        response.close()
        disposed.set()

    generate().abandon(dispose)
    server.ended.set()

    assert disposed.wait(20)

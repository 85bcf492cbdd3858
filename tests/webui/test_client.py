"""The client of A1111's API, on answers recorded from the real one and on answers no WebUI should give."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from a1111_worker.background import BackgroundCall
from a1111_worker.context import Deadline
from a1111_worker.errors import (
    GenerationFailed,
    InvalidRequest,
    OutOfMemory,
    RouteMissing,
    WebUIBroken,
    WebUILost,
    WebUINotReady,
    WebUIRefused,
    WebUISilent,
    WorkerError,
)
from a1111_worker.webui.client import WebUI, parse_error, without_paths
from sandbox.server import Exchange, Server
from tests.support import free_port

DATA = Path(__file__).parent.parent / "data" / "webui-1.9.3"


class Scripted(Server):
    """Answers each request with the next of `acts`, or with an empty object if none is left."""

    def __init__(self) -> None:
        super().__init__()
        self.acts: list[Callable[[Exchange], None]] = []

    def answer(self, exchange: Exchange) -> None:
        act = self.acts.pop(0) if self.acts else lambda it: it.send_json(200, {})
        act(exchange)


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as scripted:
        yield scripted


def client(server: Server, timeout: float = 5.0) -> WebUI:
    return WebUI(server.url, timeout=timeout, backoff=0.0)


def recorded(name: str) -> tuple[int, bytes]:
    response = json.loads((DATA / f"{name}.json").read_text())["response"]
    return response["status"], json.dumps(response["body"]).encode()


def shape(name: str, text: str) -> bytes:
    return json.dumps({"error": name, "detail": "", "body": "", "errors": text}).encode()


# the recording, its error, and words that must be in the message
RECORDED: list[tuple[str, type[WorkerError], str]] = [
    ("err_unknown_sampler", InvalidRequest, "Sampler not found"),  # a 404 that is about the request
    ("err_unknown_script", InvalidRequest, "Script 'Nope' not found"),
    ("err_alwayson_selectable", InvalidRequest, "selectable script"),
    ("err_steps_string", InvalidRequest, "steps: value is not a valid integer"),
    ("err_no_body", InvalidRequest, "field required"),
    ("unknown_path", RouteMissing, "not there"),  # a 404 that is not about the request
    ("txt2img_GET_405", RouteMissing, "not there"),
    ("auth_none", InvalidRequest, "Not authenticated"),
    ("err_steps_0", GenerationFailed, "ZeroDivisionError"),
    ("err_nan_unet", GenerationFailed, "NaN"),
    ("err_hr_unknown_upscaler", GenerationFailed, "could not find upscaler named Nope"),
    ("err_options_unknown_key", GenerationFailed, "KeyError"),
]


@pytest.mark.parametrize(("name", "error", "words"), RECORDED)
def test_each_recorded_failure_has_its_own_error(name: str, error: type[WorkerError], words: str) -> None:
    found = parse_error(*recorded(name))

    assert type(found) is error
    assert words.lower() in found.message.lower()


# status, body, error
FURTHER: list[tuple[int, bytes, type[WorkerError]]] = [
    (500, shape("OutOfMemoryError", "CUDA out of memory. Tried to allocate 20.00 MiB"), OutOfMemory),
    (500, shape("RuntimeError", "CUDA error: CUDA out of memory."), OutOfMemory),  # older torch raises it so
    (500, shape("NansException", "A tensor with all NaNs was produced in Unet."), GenerationFailed),
    (500, shape("AttributeError", "'NoneType' object has no attribute 'lowvram'"), WebUIBroken),
    (500, shape("AttributeError", "'NoneType' object has no attribute 'other'"), GenerationFailed),
    (500, shape("AssertionError", ""), GenerationFailed),
    (502, b"<html>Bad Gateway</html>", WebUILost),  # a proxy, not the WebUI
    (500, b"Internal Server Error", WebUILost),
    (500, b"", WebUILost),
    (404, b"[]", WebUILost),
    (422, b'{"detail": []}', InvalidRequest),
    (422, b'{"detail": ["odd"]}', InvalidRequest),
    (422, b'{"detail": [{"loc": 7, "msg": "odd"}]}', InvalidRequest),
    (422, b'{"detail": [{"loc": null}]}', InvalidRequest),
    (500, b"[" * 100_000, WebUILost),  # nested deeper than JSON is read
]


@pytest.mark.parametrize(("status", "body", "error"), FURTHER)
def test_other_failures_have_their_error_too(status: int, body: bytes, error: type[WorkerError]) -> None:
    assert type(parse_error(status, body)) is error


def test_no_path_of_the_container_reaches_a_message() -> None:
    text = "[Errno 2] No such file: '/stable-diffusion-webui/models/VAE/x y.pt'\n  at C:\\models\\x.pt, 1/2 done"

    assert without_paths(text) == "[Errno 2] No such file: '<path>' at <path>, 1/2 done"


def test_a_refused_connection_is_another_error_than_a_broken_one(server: Scripted) -> None:
    server.acts = [Exchange.reset] * 5

    with pytest.raises(WebUIRefused):
        WebUI(f"http://127.0.0.1:{free_port()}", backoff=0.0).set_options({})
    with pytest.raises(WebUILost) as broken:
        client(server).set_options({})

    assert not isinstance(broken.value, WebUIRefused)


def test_a_request_that_may_be_repeated_is_repeated(server: Scripted) -> None:
    server.acts = [
        lambda it: it.send(502),
        lambda it: it.send(503),
        lambda it: it.send(503, headers={"retry-after": "9" * 5_000}),  # more digits than Python converts
    ]

    client(server).refresh_checkpoints()

    assert len(server.asked) == 4


@pytest.mark.parametrize("act", [lambda it: it.send(502), Exchange.reset, Exchange.cut])
def test_a_generation_is_never_requested_twice(server: Scripted, act: Callable[[Exchange], None]) -> None:
    server.acts = [act]

    with pytest.raises(WebUILost):
        client(server).txt2img({"prompt": "x"}, timeout=5)

    assert len(server.asked) == 1


def half(exchange: Exchange) -> None:
    exchange.begin(200, {"content-length": "1000", "content-type": "application/json"})
    exchange.write(b'{"images": ["iVBOR')
    exchange.cut()


def sends(answer: bytes) -> Callable[[Exchange], None]:
    """The answer is these bytes after the status line, then FIN."""

    def act(exchange: Exchange) -> None:
        exchange.write(b"HTTP/1.1 200 OK\r\n" + answer)
        exchange.cut()

    return act


NO_JSON = [
    half,
    sends(b"Content-Length: " + b"9" * 5_000 + b"\r\n\r\n{"),  # more digits than Python converts
    sends(b"Content-Length: " + b"9" * 30 + b"\r\n\r\n{}"),  # more bytes than an index has
    sends(b"Content-Length: " + b"9" * 15 + b"\r\n\r\n{}"),  # more bytes than there is memory
    sends(b"Transfer-Encoding: chunked\r\n\r\n" + b"9" * 5_000 + b"\r\n{}"),
    sends(b"Transfer-Encoding: chunked\r\n\r\n-5\r\n{}"),
    lambda it: it.send(200, b"<html>hello</html>"),
    lambda it: it.send(200, b""),
    lambda it: it.send(200, b"[" * 100_000),  # nested deeper than JSON is read
]


@pytest.mark.parametrize("act", NO_JSON)
def test_half_an_answer_and_no_json_are_a_lost_webui(server: Scripted, act: Callable[[Exchange], None]) -> None:
    server.acts = [act]

    with pytest.raises(WebUILost):
        client(server).txt2img({"prompt": "x"}, timeout=5).read()


def test_a_silent_webui_is_given_up(server: Scripted) -> None:
    released = threading.Event()

    def silent(exchange: Exchange) -> None:
        released.wait(10)
        exchange.cut()

    server.acts = [silent] * 5

    with pytest.raises(WebUILost):
        client(server, timeout=0.05).progress()
    released.set()


def test_the_webui_is_not_asked_to_compress(server: Scripted) -> None:
    client(server).set_options({})

    assert server.asked[0].headers["accept-encoding"] == "identity"


def test_progress_tells_the_step_and_the_image(server: Scripted) -> None:
    found = json.loads((DATA / "progress_running_skip_image.json").read_text())["response"]["body"]
    server.acts = [lambda it: it.send_json(200, found)]

    progress = client(server).progress()

    assert server.asked[0].query["skip_current_image"] == "true"
    assert (progress.image, progress.images, progress.step, progress.steps) == (1, 2, 24, 60)
    assert progress.progress == pytest.approx(0.21)


def test_connections_are_kept(server: Scripted) -> None:
    webui = client(server)
    ports: set[Any] = set()

    def remember(exchange: Exchange) -> None:
        ports.add(exchange.client_address)
        exchange.send_json(200, {})

    server.acts = [remember] * 3

    for _ in range(3):
        webui.set_options({})

    assert len(ports) == 1


def test_a_request_that_timed_out_is_not_repeated(server: Scripted) -> None:
    webui = client(server, timeout=0.2)

    def silent(exchange: Exchange) -> None:
        exchange.hold(20)

    server.acts = [silent] * 2

    with pytest.raises(WebUISilent):
        webui.set_options({"sd_model_checkpoint": "x"})

    assert len(server.asked) == 1


def test_reading_an_answer_can_be_aborted(server: Scripted) -> None:
    begun = threading.Event()

    def half(exchange: Exchange) -> None:
        exchange.begin(200, {"content-type": "application/json", "content-length": "1000"})
        exchange.flush()
        begun.set()
        exchange.hold(20)

    server.acts = [half]
    answer = client(server, timeout=30).txt2img({}, timeout=30)
    reading = BackgroundCall(answer.read, name="call")
    begun.wait(10)

    answer.abort()

    assert reading.wait(10, Deadline())
    with pytest.raises(WebUILost):
        reading.result()


def test_a_route_that_is_missing_is_no_fault_of_the_request() -> None:
    assert issubclass(RouteMissing, WebUINotReady)

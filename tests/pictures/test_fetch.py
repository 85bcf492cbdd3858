"""The bytes behind a URL: a real server, and everything that it may do wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from a1111_worker.context import Deadline
from a1111_worker.errors import DownloadFailed, JobCancelled
from a1111_worker.pictures.fetch import PictureFetcher
from a1111_worker.pictures.source import MAX_PICTURE_BYTES, BadPicture
from a1111_worker.transfer.egress import EgressPolicy
from sandbox.server import Exchange, Server

PICTURE = b"\x89PNG and so on"


class PictureHost(Server):
    """Answers each path as `answers` says."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: dict[str, Callable[[Exchange], object]] = {}
        self.asked_for = threading.Event()

    def answer(self, exchange: Exchange) -> None:
        self.asked_for.set()
        if exchange.asked.path in self.answers:
            self.answers[exchange.asked.path](exchange)
        else:
            exchange.send(200, PICTURE)


@pytest.fixture
def host() -> Iterator[PictureHost]:
    with PictureHost() as server:
        yield server


def fetcher(host: PictureHost, *, seconds: float = 30.0) -> PictureFetcher:
    return PictureFetcher(EgressPolicy([host.url]), seconds=seconds)


def test_a_picture_is_fetched_through_redirects_without_anything_of_ours(host: PictureHost) -> None:
    host.answers["/a"] = lambda exchange: exchange.send(302, headers={"location": "/b?x=1"})
    host.answers["/b"] = lambda exchange: exchange.send(200, PICTURE, {"set-cookie": "seen=1"})

    data = fetcher(host).fetch(f"{host.url}/a", Deadline())

    assert data == PICTURE
    assert [(asked.path, dict(asked.query)) for asked in host.asked] == [("/a", {}), ("/b", {"x": "1"})]
    assert all({"authorization", "cookie"}.isdisjoint(asked.headers) for asked in host.asked)


def begin_with(length: int) -> Callable[[Exchange], object]:
    def answer(exchange: Exchange) -> None:
        exchange.begin(200, {"content-length": str(length)})
        exchange.write(PICTURE)
        exchange.cut()

    return answer


def endless(exchange: Exchange) -> None:
    exchange.begin(200, {})
    for _ in range(MAX_PICTURE_BYTES // 100_000 + 2):
        exchange.write(bytes(100_000))


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda exchange: exchange.send(404), BadPicture, "cannot be fetched: its host answered 404"),
        (lambda exchange: exchange.send(403), BadPicture, "its host answered 403"),
        (lambda exchange: exchange.send(204), BadPicture, "its host answered 204"),
        (lambda exchange: exchange.send(500), DownloadFailed, "its host answered 500"),
        (lambda exchange: exchange.send(429), DownloadFailed, "its host answered 429"),
        (begin_with(MAX_PICTURE_BYTES + 1), BadPicture, "is larger than 20 MB"),
        (endless, BadPicture, "is larger than 20 MB"),
        (begin_with(1_000), DownloadFailed, "the connection to its host failed"),  # cut
        (lambda exchange: exchange.reset(), DownloadFailed, "the connection to its host failed"),
        (
            lambda exchange: exchange.send(302, headers={"location": "http://169.254.169.254/latest/meta-data"}),
            BadPicture,
            "is refused: http://169.254.169.254 is not among",
        ),
        (lambda exchange: exchange.send(302, headers={"location": "/a"}), BadPicture, "go in a circle"),
    ],
)
def test_each_fault_of_a_host_has_its_error(
    answer: Callable[[Exchange], object], error: type[Exception], message: str, host: PictureHost
) -> None:
    host.answers["/a"] = answer

    with pytest.raises(error, match=message):
        fetcher(host).fetch(f"{host.url}/a", Deadline())


@pytest.mark.parametrize("begins", [True, False], ids=["within the picture", "before an answer"])
def test_a_host_that_is_silent_is_given_up(begins: bool, host: PictureHost) -> None:
    def answer(exchange: Exchange) -> None:
        if begins:
            exchange.begin(200, {"content-length": "1000"})
            exchange.write(PICTURE)
        exchange.hold()

    host.answers["/a"] = answer

    with pytest.raises(DownloadFailed, match=r"its host took longer than 0\.2 s"):
        fetcher(host, seconds=0.2).fetch(f"{host.url}/a", Deadline())


def test_a_host_that_sends_byte_by_byte_is_given_up_too(host: PictureHost) -> None:
    def answer(exchange: Exchange) -> None:
        exchange.begin(200, {"content-length": "100000"})
        while not exchange.gone(0.02):
            exchange.write(b"x")
            exchange.flush()

    host.answers["/a"] = answer

    with pytest.raises(DownloadFailed, match="its host took longer"):
        fetcher(host, seconds=0.3).fetch(f"{host.url}/a", Deadline())


def test_a_cancelled_job_does_not_wait_for_its_picture(host: PictureHost) -> None:
    host.answers["/a"] = lambda exchange: exchange.hold()
    deadline = Deadline()

    def cancel() -> None:
        host.asked_for.wait()
        deadline.cancel()

    threading.Thread(target=cancel).start()

    with pytest.raises(JobCancelled):
        fetcher(host).fetch(f"{host.url}/a", deadline)

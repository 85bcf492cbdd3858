"""What every server of the sandbox makes of a request."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from sandbox.server import Exchange, Server


class Echo(Server):
    """Answers with the body that it was sent."""

    def answer(self, exchange: Exchange) -> None:
        exchange.send(200, exchange.asked.body)


@pytest.fixture
def echo() -> Iterator[Echo]:
    with Echo() as server:
        yield server


def test_a_body_in_chunks_is_read_to_its_end(echo: Echo) -> None:
    connection = http.client.HTTPConnection(urlsplit(echo.url).netloc, timeout=10)

    for chunks in ([b'{"prompt":', b' "a cat"}'], [b"x" * 100_000], []):
        connection.request("POST", "/job", iter(chunks), encode_chunked=True)
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b"".join(chunks))
    connection.close()

    assert len(echo.asked) == 3  # the chunks are no requests


@pytest.mark.parametrize(
    ("sent", "bodies"),
    [
        # An extension of a chunk and a trailer are no part of the body (RFC 9112, 7.1.1 and 7.1.2).
        (b"4;name=value\r\nwhat\r\n0\r\nDigest: x\r\n\r\n", [b"what"]),
        (b"4\r\nwh", []),  # the client left
        (b"four\r\nwhat\r\n0\r\n\r\n", []),
    ],
)
def test_only_a_whole_body_is_a_request(echo: Echo, sent: bytes, bodies: list[bytes]) -> None:
    host, port = urlsplit(echo.url).netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(b"POST /job HTTP/1.1\r\nHost: echo\r\nTransfer-Encoding: chunked\r\n\r\n" + sent)
        client.shutdown(socket.SHUT_WR)
        while client.recv(4096):
            pass

    assert [asked.body for asked in echo.asked] == bodies

"""What an answer of the storage means."""

from __future__ import annotations

import http.client
import socket
import ssl

import pytest

from a1111_worker.errors import DownloadFailed, ModelRejected
from a1111_worker.transfer.connection import (
    Answer,
    FileChanged,
    FileGone,
    LinkRefused,
    RangesUnsupported,
    StorageBusy,
    TemporaryFault,
    judge,
    network_fault,
)

DIGITS = "9" * 5_000


def headers(**given: str) -> http.client.HTTPMessage:
    message = http.client.HTTPMessage()
    for name, value in given.items():
        message[name.replace("_", "-")] = value
    return message


@pytest.mark.parametrize(
    ("status", "answer", "start", "end", "expected"),
    [
        (206, {"Content_Range": "bytes 10-19/100"}, 10, 20, Answer(10, 20, 100, None, True)),
        (
            206,
            {"Content_Range": "bytes 10-14/100"},
            10,
            20,
            Answer(10, 15, 100, None, True),
        ),  # less than asked for
        (206, {"Content_Range": "bytes 0-9/*", "ETag": '"a"'}, 0, 20, Answer(0, 10, None, '"a"', True)),
        (
            206,
            {"Content_Range": "bytes 0-9/100", "ETag": 'W/"a"'},
            0,
            20,
            Answer(0, 10, 100, None, True),
        ),  # weak
        (200, {"Content_Length": "100"}, 10, 20, Answer(0, 100, 100, None, False)),
        (
            200,
            {"Transfer_Encoding": "chunked", "Content_Length": "9"},
            0,
            20,
            Answer(0, None, None, None, False),
        ),
        (200, {}, 0, None, Answer(0, None, None, None, False)),
        (206, {"Content_Range": "bytes 11-19/100"}, 10, 20, TemporaryFault),
        (206, {"Content_Range": "bytes 10-20/100"}, 10, 20, TemporaryFault),  # more than asked for
        (206, {"Content_Range": "bytes 10-19/15"}, 10, 20, TemporaryFault),
        (206, {"Content_Range": "bytes 10-19/100", "Content_Length": "9"}, 10, 20, TemporaryFault),
        (206, {"Content_Type": "multipart/byteranges; boundary=x"}, 10, 20, TemporaryFault),
        # more digits than Python converts
        (200, {"Content_Length": DIGITS}, 0, 20, TemporaryFault),
        (206, {"Content_Range": "bytes 10-19/100", "Content_Length": DIGITS}, 10, 20, TemporaryFault),
        (206, {"Content_Range": f"bytes {DIGITS}-19/100"}, 10, 20, TemporaryFault),
        (206, {"Content_Range": f"bytes 10-{DIGITS}/100"}, 10, 20, TemporaryFault),
        (206, {"Content_Range": f"bytes 10-19/{DIGITS}"}, 10, 20, TemporaryFault),
        (503, {"Retry_After": DIGITS}, 0, 20, StorageBusy),
        (200, {"Content_Length": "ten"}, 0, 20, TemporaryFault),
        (200, {"Content_Length": "-5"}, 0, 20, TemporaryFault),
        (200, {"Content_Length": ""}, 0, 20, Answer(0, None, None, None, False)),
        (206, {"Content_Range": "bytes 0-9/100"}, 0, None, TemporaryFault),  # no part was asked for
        (200, {"Content_Encoding": "gzip"}, 0, 20, DownloadFailed),
        (200, {"Content_Type": "text/html; charset=utf-8"}, 0, 20, ModelRejected),
        (416, {"Content_Range": "bytes */0"}, 0, 20, ModelRejected),
        (416, {}, 0, 20, RangesUnsupported),
        (416, {"Content_Range": "bytes */50"}, 60, 80, FileChanged),
        (400, {}, 0, 20, LinkRefused),
        (401, {}, 0, 20, LinkRefused),
        (403, {}, 0, 20, LinkRefused),
        (404, {}, 0, 20, FileGone),
        (410, {}, 0, 20, FileGone),
        (408, {}, 0, 20, TemporaryFault),
        (500, {}, 0, 20, TemporaryFault),
        (520, {"Content_Type": "text/html"}, 0, 20, TemporaryFault),  # Cloudflare's page is not the file's
        (429, {}, 0, 20, StorageBusy),
        (503, {"Retry_After": "7"}, 0, 20, StorageBusy),
        (204, {}, 0, 20, DownloadFailed),
        (418, {}, 0, 20, DownloadFailed),
    ],
)
def test_what_an_answer_means(
    status: int, answer: dict[str, str], start: int, end: int | None, expected: Answer | type[Exception]
) -> None:
    try:
        found: object = judge(status, headers(**answer), start, end)
    except Exception as error:
        found = type(error)

    assert found == expected


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        ("7", 7.0, 7.0),
        ("soon", 0.0, 0.0),
        ("-5", 0.0, 0.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0, 0.0),  # past
        ("Wed, 21 Oct 2099 07:28:00 GMT", 1e8, 1e11),
    ],
)
def test_how_long_a_busy_storage_asks_to_wait(text: str, least: float, most: float) -> None:
    with pytest.raises(StorageBusy) as caught:
        judge(503, headers(Retry_After=text), 0, 1)

    assert least <= caught.value.retry_after <= most


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (socket.gaierror(-2, "Name or service not known"), "no address"),
        (TimeoutError("timed out"), "silent"),
        (ConnectionResetError(104, "Connection reset by peer"), "broke"),
        (http.client.BadStatusLine("x"), r"failed \(BadStatusLine\)"),
        (OSError(113, "No route to host"), r"failed \(OSError\)"),
    ],
)
def test_a_network_error_is_a_fault_in_words(error: Exception, words: str) -> None:
    with pytest.raises(TemporaryFault, match=words):
        raise network_fault(error)


def test_an_invalid_certificate_is_not_tried_again() -> None:
    with pytest.raises(DownloadFailed, match="no valid certificate"):
        raise network_fault(ssl.SSLCertVerificationError("self-signed certificate"))

"""One connection of a download: it fetches what it is told to, in a thread of its own, and says what came of it.

What an answer of the storage means stands in `judge`; what follows from that, and what is fetched next, is decided by
the `Work` it belongs to (`download`).
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from a1111_worker.errors import DownloadFailed, ModelRejected
from a1111_worker.origins import Origin
from a1111_worker.transfer.egress import USER_AGENT, EgressPolicy, Route, open_connection
from a1111_worker.transfer.ranges import ByteRange, Tuning


@dataclass(frozen=True)
class Link:
    url: str
    number: int
    born: float


@dataclass(frozen=True)
class RangeRequest:
    """One request: for `span` (None: for the whole file, ranges being unknown here), by a link."""

    span: ByteRange | None
    link: Link
    etag: str | None


class Work(Protocol):
    """What a connection belongs to. Everything may be called from its thread; `leave` is the last thing it does."""

    policy: EgressPolicy
    tuning: Tuning

    def next_errand(self, line: Line) -> RangeRequest | None: ...
    def admit(self, errand: RangeRequest, body: Body, url: str) -> ByteRange: ...
    def write(self, span: ByteRange, view: memoryview, *, steady: bool) -> None: ...
    def ended(self, span: ByteRange) -> None: ...
    def release(self, span: ByteRange) -> None: ...
    def trouble(self, line: Line, errand: RangeRequest, fault: Fault) -> None: ...
    def fail(self, error: BaseException) -> None: ...
    def leave(self, line: Line) -> None: ...


class Line:
    """One connection at a time, in a thread: errand after errand until there is none, or one goes wrong."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._tuning = work.tuning
        self._connection: http.client.HTTPConnection | None = None
        self._response: http.client.HTTPResponse | None = None
        self._origin: Origin | None = None
        self._guard = threading.Lock()
        self._handle: socket.socket | None = None
        self._aborted = False
        self._view = memoryview(bytearray(self._tuning.buffer))
        self._thread = threading.Thread(target=self._run, name="download-line", daemon=True)
        self.received = 0
        self.mark = (time.monotonic(), 0)
        self.first_byte = 0.0  # seconds from the last request to its answer
        self.flowing = False  # the last answer brings bytes
        self.steady = False  # and enough of them to try again at once when it breaks
        self.retire = False

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def abort(self) -> None:
        """Unblock it, whatever it waits for, and let it end."""
        with self._guard:
            self._aborted = True
            if self._handle is not None:
                with contextlib.suppress(OSError):
                    self._handle.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        work = self._work
        try:
            while (errand := work.next_errand(self)) is not None:
                self.flowing = self.steady = False
                try:
                    self._carry(errand)
                except Fault as fault:
                    work.trouble(self, errand, fault)
                    break
                except ssl.SSLCertVerificationError as error:
                    raise DownloadFailed("the storage has no valid certificate") from error
                except (OSError, http.client.HTTPException) as error:
                    work.trouble(self, errand, Hiccup(_in_words(error)))
                    break
                finally:
                    if errand.span is not None:
                        work.release(errand.span)
        except BaseException as error:
            work.fail(error)
        finally:
            self._disconnect()
            work.leave(self)

    def _carry(self, errand: RangeRequest) -> None:
        start, end = (errand.span.at, errand.span.end) if errand.span else (0, None)
        headers = {"User-Agent": USER_AGENT, "Accept": "*/*", "Accept-Encoding": "identity"}
        if end is not None:
            headers["Range"] = f"bytes={start}-{end - 1}"
            if errand.etag:
                headers["If-Range"] = errand.etag
        route = Route(errand.link.url, self._tuning.max_hops)
        response = self._ask(route.url, headers)
        while route.turns(response.status, response.headers.get("Location")):
            self._disconnect()
            response = self._ask(route.url, headers)
        body = judge(response.status, response.headers, start, end)
        span = self._work.admit(errand, body, route.url)
        try:
            self._receive(response, span, body)
        finally:
            if span is not errand.span:
                self._work.release(span)

    def _ask(self, url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        origin = self._work.policy.check(url)
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if self._connection is not None and self._origin == origin:
            with contextlib.suppress(ConnectionError):  # kept alive, and closed by the server at this very moment
                return self._send(self._connection, target, headers)
        self._disconnect()
        self._origin = origin
        self._connection = open_connection(
            self._work.policy, origin, timeout=self._tuning.connect_seconds, on_socket=self._hold
        )
        self._connection.connect()
        self._connection.sock.settimeout(self._tuning.stall_seconds)
        return self._send(self._connection, target, headers)

    def _send(
        self, connection: http.client.HTTPConnection, target: str, headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        began = time.monotonic()
        connection.request("GET", target, headers=headers)
        self._response = connection.getresponse()
        self.first_byte = time.monotonic() - began
        return self._response

    def _hold(self, connecting: socket.socket) -> None:
        with self._guard:
            if self._aborted:
                raise ConnectionAbortedError("stopped")
            if self._handle is not None:
                self._handle.close()
            self._handle = connecting.dup()  # TLS takes the socket itself away

    def _disconnect(self) -> None:
        if self._response is not None:  # it holds the socket where the server said that it will close
            self._response.close()
            self._response = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        with self._guard:
            if self._handle is not None:
                self._handle.close()
                self._handle = None

    def _receive(self, response: http.client.HTTPResponse, span: ByteRange, body: Body) -> None:
        """Write what an answer brings where it belongs; what came counts, however it ends."""
        read = _reader(response)
        expected = None if body.end is None else body.end - body.start
        got = filled = 0
        flushed = time.monotonic()
        over = False
        try:
            while not over:
                room = min(len(self._view) - filled, span.left - filled)
                if expected is not None:
                    room = min(room, expected - got)
                if room > 0:
                    count = read(self._view[filled : filled + room])
                    got += count
                    filled += count
                    self.received += count
                    self.flowing = True
                    over = not count or self.retire
                else:
                    over = True
                now = time.monotonic()
                if filled >= self._tuning.flush or now - flushed > 0.5:
                    self._flush(span, filled, got)
                    filled, flushed = 0, now
        finally:
            if filled:
                self._flush(span, filled, got)
        if expected is None:
            if not span.left and read(self._view[:1]):
                raise ModelRejected("more bytes came than the model has")
            if not self.retire:
                self._work.ended(span)
            self._disconnect()
        elif got == expected and not response.will_close and not (response.chunked and read(self._view[:1])):
            response.close()  # the connection is ready for the next request
        else:
            self._disconnect()
            if room > 0 and not self.retire:
                raise Hiccup("the connection ended too early")

    def _flush(self, span: ByteRange, count: int, got: int) -> None:
        self.steady = self.steady or got >= 64 * 1024
        self._work.write(span, self._view[: min(count, span.left)], steady=self.steady)


# --- what an answer means


class Fault(Exception):
    """An answer, or the lack of one, that something can be done about; the text is for the log and the caller."""


class Hiccup(Fault):
    """Try again."""


class Busy(Fault):
    def __init__(self, reason: str, retry_after: float) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class LinkRefused(Fault):
    """Ask for the link again."""


class Gone(Fault):
    """Ask for the link once more, then believe it."""


class Changed(Fault):
    """It is another file than before."""


class Unranged(Fault):
    """There are no ranges here."""


@dataclass(frozen=True)
class Body:
    """The bytes that an answer brings: from `start` to before `end`, of `total`; None where it does not say."""

    start: int
    end: int | None
    total: int | None
    etag: str | None
    ranged: bool


def judge(status: int, headers: http.client.HTTPMessage, start: int, end: int | None) -> Body:
    """What an answer to a request for the bytes from `start` to before `end` (None: for all of them) brings.

    Raises a Fault where something can be done about it, else a ModelError.
    """
    if status in (400, 401, 403):
        raise LinkRefused(f"the storage refused the link ({status})")
    if status in (404, 410):
        raise Gone(f"the storage does not have it ({status})")
    if status == 416:
        _refuse_empty(headers, start)
        raise Unranged("the storage cannot send a part of it") if start == 0 else Changed("it ends before")
    if status in (429, 503):
        raise Busy(f"the storage is busy ({status})", _retry_after(headers.get("Retry-After")))
    if status in (408, 425) or status >= 500:
        raise Hiccup(f"the storage answered {status}")
    if status not in (200, 206):
        raise DownloadFailed(f"the storage answered {status}")
    if headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
        raise DownloadFailed("the storage sends it compressed, although it was asked not to")
    kind = headers.get_content_type() if headers.get("Content-Type") else ""
    if kind in ("text/html", "application/xhtml+xml"):
        raise ModelRejected("a web page came where a model was asked for")
    etag = headers.get("ETag", "").strip()
    strong = etag if re.fullmatch(r'"[^"]+"', etag) else None
    length = _length(headers)
    if status == 200:
        return Body(0, length, length, strong, ranged=False)
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers.get("Content-Range", "").strip(), re.IGNORECASE)
    if not found or end is None:
        raise Hiccup("the storage does not say which part it sends")
    first, last, total = int(found[1]), int(found[2]) + 1, None if found[3] == "*" else int(found[3])
    if first != start or last <= first or last > end or (total is not None and last > total):
        raise Hiccup("the storage sends another part than the one asked for")
    if length is not None and length != last - first:
        raise Hiccup("the storage announces another length than the part has")
    return Body(first, last, total, strong, ranged=True)


def _refuse_empty(headers: http.client.HTTPMessage, start: int) -> None:
    if start == 0 and re.fullmatch(r"bytes \*/0", headers.get("Content-Range", "").strip(), re.IGNORECASE):
        raise ModelRejected("the file is empty")


def _length(headers: http.client.HTTPMessage) -> int | None:
    if "chunked" in headers.get("Transfer-Encoding", "").lower():
        return None
    text = headers.get("Content-Length", "").strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _retry_after(text: str | None) -> float:
    """Seconds, 0 where it says nothing: a number or a date (RFC 9110, 10.2.3)."""
    if not text:
        return 0.0
    if text.strip().isascii() and text.strip().isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _reader(response: http.client.HTTPResponse) -> Callable[[memoryview], int]:
    """How to read what is there into one's own buffer. It returns 0 at the end, a promised length or not: count."""
    if response.chunked or response.fp is None:

        def read(view: memoryview) -> int:
            data = response.read1(len(view))
            view[: len(data)] = data
            return len(data)

        return read
    return response.fp.readinto1


def _in_words(error: Exception) -> str:
    if isinstance(error, socket.gaierror):
        return "the host has no address"
    if isinstance(error, TimeoutError):
        return "the storage was silent"
    if isinstance(error, ConnectionError):
        return "the connection broke"
    return f"the connection failed ({type(error).__name__})"

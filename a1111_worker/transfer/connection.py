"""One HTTP connection: it sends a request for a range of bytes, judges the answer, and reads the bytes.

It knows nothing of the download that it works for. What an answer of the storage means is decided in `judge`; what
follows from that is decided in `download`.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from a1111_worker.errors import DownloadFailed, ModelRejected
from a1111_worker.origins import Origin
from a1111_worker.retry import parse_retry_after
from a1111_worker.transfer.egress import USER_AGENT, EgressPolicy, Route, open_connection
from a1111_worker.transfer.ranges import ByteRange, Tuning

NETWORK_ERRORS = (OSError, http.client.HTTPException)
"""What a connection may raise while it connects, sends or reads: see `network_fault`."""

_SIZE = "[0-9]{1,18}"  # no file is larger, and Python converts no more than 4,300 digits
_CONTENT_RANGE = re.compile(rf"bytes ({_SIZE})-({_SIZE})/({_SIZE}|\*)", re.IGNORECASE)


@dataclass(frozen=True)
class Answer:
    """The bytes that an answer contains: from `start` to before `end`, of `total`; None if it does not say.

    `is_partial`: it is an answer to a range request (206). Else it contains the whole file.
    """

    start: int
    end: int | None
    total: int | None
    etag: str | None
    is_partial: bool

    @property
    def length(self) -> int | None:
        return None if self.end is None else self.end - self.start


class Connection:
    """A connection that is opened by its first request, and kept for the next one if possible.

    One thread uses it. Any thread may read its counters, and `abort` it.
    """

    def __init__(self, policy: EgressPolicy, tuning: Tuning) -> None:
        self._policy = policy
        self._tuning = tuning
        self._http: http.client.HTTPConnection | None = None
        self._origin: Origin | None = None
        self._response: http.client.HTTPResponse | None = None
        self._unread: int | None = 0  # bytes of the present answer; None: it has no announced end
        self._socket = AbortableSocket()
        self.url = ""  # of the present answer, behind all redirects
        self.answer_seconds = 0.0  # from the last request to its answer
        self.received = 0  # bytes, of all answers
        self.buffer = memoryview(bytearray(tuning.buffer_bytes))  # its user's; new memory is slower than memory in use

    @property
    def is_read(self) -> bool:
        """The announced end of the present answer is reached."""
        return self._unread == 0

    @property
    def is_aborted(self) -> bool:
        return self._socket.is_aborted

    def abort(self) -> None:
        """Unblock its user, whatever it waits for. Every later use fails."""
        self._socket.abort()

    def ask(self, url: str, byte_range: ByteRange | None, etag: str | None) -> Answer:
        """Request a range, or the whole file; follow the redirects, and judge the answer.

        Raises RequestFault, ModelError, OriginRefused or one of the NETWORK_ERRORS.
        """
        headers = {"User-Agent": USER_AGENT, "Accept": "*/*", "Accept-Encoding": "identity"}
        start, end = 0, None
        if byte_range is not None:
            start, end = byte_range.start, byte_range.end
            headers["Range"] = f"bytes={start}-{end - 1}"
            if etag:
                headers["If-Range"] = etag
        route = Route(url)
        response = self._get(route.url, headers)
        while route.follow(response.status, response.headers.get("Location")):
            self.close()
            response = self._get(route.url, headers)
        answer = judge(response.status, response.headers, start, end)
        self.url, self._unread = route.url, answer.length
        return answer

    def read_into(self, view: memoryview) -> int:
        """Read bytes that have come, never beyond the announced end. Returns how many.

        0 is the end of the answer, whether or not the announced length has come: the caller looks at `is_read`.
        """
        assert self._response is not None
        view = view if self._unread is None else view[: self._unread]
        if self._response.chunked or self._response.fp is None:
            data = self._response.read1(len(view))[: len(view)]  # more if a chunk says that its size is negative
            view[: len(data)] = data
            count = len(data)
        else:  # without a copy
            count = self._response.fp.readinto1(view)
        self.received += count
        if self._unread is not None:
            self._unread -= count
        return count

    def has_more(self) -> bool:
        """Whether one more byte comes than were read, or announced."""
        assert self._response is not None
        return len(self._response.read1(1)) > 0

    def finish(self) -> None:
        """Keep the connection for the next request if the answer was read to its end, else close it."""
        response = self._response
        if self.is_read and response and not response.will_close and not (response.chunked and self.has_more()):
            response.close()
        else:
            self.close()

    def close(self) -> None:
        """Close it. The next request opens it anew."""
        if self._response is not None:  # it owns the socket if the server announced that it will close
            self._response.close()
            self._response = None
        if self._http is not None:
            self._http.close()
            self._http = None
        self._socket.close()

    def _get(self, url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        origin = self._policy.check(url)
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if self._http is not None and self._origin == origin:
            with contextlib.suppress(ConnectionError):  # kept alive, and closed by the server at this very moment
                return self._send(self._http, target, headers)
        self.close()
        self._origin = origin
        self._http = open_connection(
            self._policy, origin, timeout=self._tuning.connect_seconds, on_socket=self._socket.attach
        )
        self._http.sock.settimeout(self._tuning.stall_seconds)
        return self._send(self._http, target, headers)

    def _send(
        self, opened: http.client.HTTPConnection, target: str, headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        began = time.monotonic()
        opened.request("GET", target, headers=headers)
        self._response = opened.getresponse()
        self.answer_seconds = time.monotonic() - began
        return self._response


class AbortableSocket:
    """A second handle of a connection's socket, through which any thread can shut it down."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handle: socket.socket | None = None
        self.is_aborted = False

    def attach(self, connecting: socket.socket) -> None:
        with self._lock:
            if self.is_aborted:
                raise ConnectionAbortedError("stopped")
            if self._handle is not None:
                self._handle.close()
            self._handle = connecting.dup()  # TLS takes the socket itself away

    def abort(self) -> None:
        with self._lock:
            self.is_aborted = True
            if self._handle is not None:
                with contextlib.suppress(OSError):
                    self._handle.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._lock:
            if self._handle is not None:
                self._handle.close()
                self._handle = None


# --- what an answer means


class RequestFault(Exception):
    """An answer, or the lack of one, that something can be done about. Its text is for the log and the caller."""


class TemporaryFault(RequestFault):
    """Try again."""


class StorageBusy(RequestFault):
    """Use fewer connections, or try again after `retry_after` seconds (0: the storage does not say)."""

    def __init__(self, reason: str, retry_after: float) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class LinkRefused(RequestFault):
    """Get another link."""


class FileGone(RequestFault):
    """Get another link, once; then believe it."""


class FileChanged(RequestFault):
    """It is another file than before."""


class RangesUnsupported(RequestFault):
    """The storage has no ranges of this file."""


def judge(status: int, headers: http.client.HTTPMessage, start: int, end: int | None) -> Answer:
    """What an answer contains, to a request for the bytes from `start` to before `end` (None: for the whole file).

    Raises a RequestFault if something can be done about it, else a ModelError.
    """
    _check_status(status, headers, start)
    if headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
        raise DownloadFailed("the storage sends it compressed, although it was asked not to")
    media_type = headers.get_content_type() if headers.get("Content-Type") else ""
    if media_type in ("text/html", "application/xhtml+xml"):
        raise ModelRejected("the storage sent a web page instead of a model")
    etag = headers.get("ETag", "").strip()
    strong_etag = etag if re.fullmatch(r'"[^"]+"', etag) else None
    length = _content_length(headers)
    if status == 200:
        return Answer(0, length, length, strong_etag, is_partial=False)
    found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", "").strip())
    if not found or end is None:
        raise TemporaryFault("the storage does not say which part it sends")
    first, stop, total = int(found[1]), int(found[2]) + 1, None if found[3] == "*" else int(found[3])
    if first != start or stop <= first or stop > end or (total is not None and stop > total):
        raise TemporaryFault("the storage sends another part than the one asked for")
    if length is not None and length != stop - first:
        raise TemporaryFault("the storage announces another length than the part has")
    return Answer(first, stop, total, strong_etag, is_partial=True)


def _check_status(status: int, headers: http.client.HTTPMessage, start: int) -> None:
    if status in (400, 401, 403):
        raise LinkRefused(f"the storage refused the link ({status})")
    if status in (404, 410):
        raise FileGone(f"the storage does not have it ({status})")
    if status == 416:
        raise _unsatisfiable(headers, start)
    if status in (429, 503):
        raise StorageBusy(f"the storage is busy ({status})", parse_retry_after(headers.get("Retry-After")) or 0.0)
    if status not in (200, 206):
        is_temporary = status in (408, 425) or status >= 500
        raise (TemporaryFault if is_temporary else DownloadFailed)(f"the storage answered {status}")


def _unsatisfiable(headers: http.client.HTTPMessage, start: int) -> Exception:
    """What a 416 means. The file has no byte `start`: it is shorter than it was, or empty."""
    if start > 0:
        return FileChanged("the file ends earlier than before")
    if re.fullmatch(r"bytes \*/0", headers.get("Content-Range", "").strip(), re.IGNORECASE):
        return ModelRejected("the file is empty")
    return RangesUnsupported("the storage cannot send a part of it")


def _content_length(headers: http.client.HTTPMessage) -> int | None:
    """The announced length of an answer; None if it has none. An invalid one ends the answer (RFC 9112, 6.3)."""
    text = headers.get("Content-Length", "").strip()
    if not text or "chunked" in headers.get("Transfer-Encoding", "").lower():
        return None
    if not re.fullmatch(_SIZE, text):
        raise TemporaryFault("the storage announces a length that is no number")
    return int(text)


def network_fault(error: Exception) -> RequestFault | DownloadFailed:
    """What one of the NETWORK_ERRORS means, in words that contain no host and no URL."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return DownloadFailed("the storage has no valid certificate")
    if isinstance(error, socket.gaierror):
        return TemporaryFault("the host has no address")
    if isinstance(error, TimeoutError):
        return TemporaryFault("the storage was silent")
    if isinstance(error, ConnectionError):
        return TemporaryFault("the connection broke")
    return TemporaryFault(f"the connection failed ({type(error).__name__})")

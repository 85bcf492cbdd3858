"""A real HTTP/1.1 server on loopback, one thread per connection. Every server of the sandbox is built on it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import IO, Any
from urllib.parse import parse_qsl, urlsplit


@dataclass(frozen=True)
class ReceivedRequest:
    """One request as it was received. Header names are in lower case."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    def json(self) -> Any:
        return json.loads(self.body)


class Exchange:
    """A request and every way to answer it, correct ones and broken ones."""

    def __init__(self, handler: BaseHTTPRequestHandler, asked: ReceivedRequest) -> None:
        self._handler = handler
        self.asked = asked

    @property
    def client_address(self) -> tuple[str, int]:
        """The client's address and port. Each connection has its own."""
        host, port = self._handler.client_address
        return str(host), int(port)

    def send(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        """Answer with a body. Content-Length is its true length unless `headers` has another one."""
        given = {name.lower(): value for name, value in (headers or {}).items()}
        given.setdefault("content-length", str(len(body)))
        self.begin(status, given)
        if self.asked.method != "HEAD":
            self.write(body)

    def send_json(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(value, separators=(",", ":")).encode()
        self.send(status, body, {"content-type": "application/json", **(headers or {})})

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """Send the status line and the headers only. The caller writes the body."""
        self._handler.send_response(status)
        for name, value in headers.items():
            self._handler.send_header(name, value)
        if "content-length" not in headers and "transfer-encoding" not in headers:
            self._handler.send_header("connection", "close")
            self._handler.close_connection = True
        self._handler.end_headers()

    def write(self, data: bytes) -> None:
        self._handler.wfile.write(data)

    def flush(self) -> None:
        self._handler.wfile.flush()

    def send_file(self, file: IO[bytes], offset: int, count: int) -> None:
        """Send `count` bytes of a file as the body, with `sendfile`."""
        self._handler.wfile.flush()
        while count:
            sent = os.sendfile(self._handler.connection.fileno(), file.fileno(), offset, count)
            if not sent:
                raise ConnectionError("the file became shorter while it was sent")
            offset += sent
            count -= sent

    @property
    def client(self) -> int:
        """The client's port, which identifies the connection."""
        return int(self._handler.client_address[1])

    def gone(self, seconds: float = 0.0) -> bool:
        """Wait up to `seconds` for the client to close the connection; whether it did."""
        connection, end = self._handler.connection, time.monotonic() + seconds
        while True:
            left = max(0.0, end - time.monotonic())
            readable, _, _ = select.select([connection], [], [], left)  # readable too if the server stops
            if not readable:
                return False
            if not connection.recv(1, socket.MSG_PEEK):
                return True
            if not left:
                return False
            time.sleep(min(left, 0.05))  # it has sent its next request already, so it is still there

    def hold(self, seconds: float | None = None) -> bool:
        """Send nothing for `seconds` (None: for ever). False if the client left or the server stopped before that."""
        self._handler.wfile.flush()
        return not self.gone(365 * 86_400.0 if seconds is None else seconds)

    def cut(self) -> None:
        """Close the connection with FIN, even if bytes of the body are missing."""
        self._handler.close_connection = True

    def reset(self) -> None:
        """Close the connection with RST, after the client has received what was written before."""
        self._handler.wfile.flush()
        unsent = bytearray(4)
        for _ in range(200):  # at most a second: a client that does not read is reset anyway
            fcntl.ioctl(self._handler.connection, termios.TIOCOUTQ, unsent)
            if not any(unsent):
                break
            time.sleep(0.005)
        self._handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._handler.close_connection = True
        self._handler.connection.close()


class Server:
    """A context manager, or `start` and `stop`. A subclass answers requests in `answer`.

    `asked` lists every request so far. The functions in `before` see each request first; one that returns True has
    answered it.
    """

    def __init__(self, port: int = 0) -> None:
        self.asked: list[ReceivedRequest] = []
        self.before: list[Callable[[Exchange], bool]] = []
        self._stopping = False
        self._connections: set[socket.socket] = set()
        self._http = _HTTPServer(port, self)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True, name=self.name)

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def answer(self, exchange: Exchange) -> None:
        raise NotImplementedError

    @property
    def is_up(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        if self._thread.is_alive():
            self._http.shutdown()
            self._thread.join()
        self._http.server_close()
        for connection in list(self._connections):  # disconnect the clients, as a killed process does
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Any:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        url = urlsplit(handler.path)
        asked = ReceivedRequest(
            method=handler.command,
            path=url.path,
            query=dict(parse_qsl(url.query, keep_blank_values=True)),
            headers={name.lower(): value for name, value in handler.headers.items()},
            body=_read_body(handler),
        )
        self.asked.append(asked)
        exchange = Exchange(handler, asked)
        if any(answers(exchange) for answers in list(self.before)):
            return
        self.answer(exchange)


def _read_body(handler: BaseHTTPRequestHandler) -> bytes:
    """The body of a request, of an announced length or in chunks (RFC 9112, 7.1). ValueError if it is cut or wrong."""
    if "chunked" not in handler.headers.get("transfer-encoding", "").lower():
        return handler.rfile.read(int(handler.headers.get("content-length") or 0))
    body = bytearray()
    while size := int(handler.rfile.readline().partition(b";")[0], 16):
        body += handler.rfile.read(size)
        handler.rfile.readline()
    while handler.rfile.readline().strip():
        pass  # trailers
    return bytes(body)


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, owner: Server) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.owner = owner

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not self.owner._stopping:
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """One connection. It hands its requests to the server."""

    server: _HTTPServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 64 * 1024

    def setup(self) -> None:
        super().setup()
        self.server.owner._connections.add(self.connection)

    def finish(self) -> None:
        self.server.owner._connections.discard(self.connection)
        for file in (self.wfile, self.rfile):  # close both: if the client left, its socket would stay open
            with contextlib.suppress(OSError):
                file.close()

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError, ValueError):  # the client left, or the answer was reset
            self.close_connection = True

    def handle_expect_100(self) -> bool:
        super().handle_expect_100()
        self.wfile.flush()  # the client waits for this
        return True

    def do_GET(self) -> None:
        self.server.owner._serve(self)

    do_POST = do_HEAD = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass

"""HTTP on one port: each request is handed to the routes, and their answer is sent as JSON. One thread a connection."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import socketserver
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import parse_qsl, urlsplit

from local_queue.routes import Answer, Request

_SILENCE = 60.0  # seconds without a byte, after which a connection is closed
_DISCARDED = 64 << 20  # bytes of a refused body that are read, so that the client reads the answer; above it, it is cut
_PIECE = 1 << 16


class Routes(Protocol):
    """What answers requests."""

    @property
    def largest_body(self) -> int: ...

    def refuse(self, headers: Mapping[str, str]) -> Answer | None: ...

    def too_large(self, path: str) -> Answer: ...

    def answer(self, request: Request) -> Answer: ...


class QueueServer:
    """A server on `host` and `port` (0: a free one), from `start` to `stop`. OSError if it cannot listen there."""

    def __init__(self, host: str, port: int, routes: Routes) -> None:
        self._http = _HTTPServer(host, port, routes)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.1,), daemon=True, name="http")

    @property
    def port(self) -> int:
        return int(self._http.server_address[1])

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Take no further connection, and return when the requests that came have their answers, or after 2 s."""
        if self._thread.is_alive():
            self._http.shutdown()
            self._thread.join()
        self._http.server_close()
        with self._http.idle:
            self._http.idle.wait_for(lambda: not self._http.answering, 2.0)


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, routes: Routes) -> None:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family = family
        self.routes = routes
        self.answering = 0  # requests
        self.idle = threading.Condition()
        super().__init__(address[:2], _Handler)  # type: ignore[arg-type] # both families begin with host and port

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own would also look the host's name up in the DNS


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: _HTTPServer
    protocol_version = "HTTP/1.1"
    server_version = "local_queue"
    sys_version = ""
    timeout = _SILENCE
    disable_nagle_algorithm = True
    wbufsize = 1 << 16

    def do_GET(self) -> None:
        with self.server.idle:
            self.server.answering += 1
        try:
            self._answer()
            self.wfile.flush()
        finally:
            with self.server.idle:
                self.server.answering -= 1
                self.server.idle.notify_all()

    do_POST = do_HEAD = do_PUT = do_DELETE = do_OPTIONS = do_GET

    def _answer(self) -> None:
        routes = self.server.routes
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        size = self._content_length()
        if refusal := routes.refuse(headers):
            self._send(refusal, unread=size)
        elif size is None:
            self._send(Answer(411, {"error": "Content-Length is required"}), unread=None)
        elif size > routes.largest_body:
            self._send(routes.too_large(url.path), unread=size)
        else:
            query = dict(parse_qsl(url.query, keep_blank_values=True))
            body = self.rfile.read(size)
            self._send(routes.answer(Request(self.command, url.path, query, headers, body, self._is_gone)))

    def _content_length(self) -> int | None:
        """The length of the body; None if it is not said, or makes no sense."""
        text = self.headers.get("content-length", "0")
        is_plain = text.isascii() and text.isdigit() and len(text) < 19 and "transfer-encoding" not in self.headers
        return int(text) if is_plain else None

    def _send(self, answer: Answer, *, unread: int | None = 0) -> None:
        """Send an answer. `unread`: the bytes of the body that nobody has read; None: unknown."""
        if unread is None or unread > _DISCARDED:
            self.close_connection = True
        else:
            while unread:
                unread -= len(self.rfile.read(min(unread, _PIECE))) or unread
        body = b"" if answer.value is None else json.dumps(answer.value, separators=(",", ":")).encode()
        self.send_response(answer.status)
        if answer.value is not None:
            self.send_header("Content-Type", "application/json")
        if answer.status != 204:
            self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _is_gone(self) -> bool:
        """Whether the client has closed the connection."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        try:
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def handle_expect_100(self) -> bool:
        super().handle_expect_100()
        self.wfile.flush()  # the client waits for this
        return True

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().handle_one_request()
            return
        self.close_connection = True

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        pass  # a path has a job's id, and an error of a client is the client's

"""A server in a process of its own, for benches: files with ranges, over a network that may be slow and may break.

    python -m benchmarks.throttle FOLDER [--rate BYTES_A_SECOND] [--line BYTES_A_SECOND] [--latency SECONDS]
                                         [--reset-every BYTES] [--slow-rate BYTES_A_SECOND]

It prints its port. It answers `GET /<name>` with a file, and `GET /-/counts` with what it did: {"bytes", "requests",
"connections"}. Each connection has its own rate; with a slow rate, every eighth one has that. All connections share the
line. The server waits for the latency when a connection is opened, and before every answer. After every so many bytes,
of all connections together, the connection that sends them is reset. Without a rate it only calls sendfile, so that the
client is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SLICE = 256 * 1024  # sent at once by a throttled connection
_SLOW_ONE_OF = 8
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Throttle:
    """Where a running server listens."""

    url: str

    def link(self, name: str) -> str:
        return f"{self.url}/{name}"

    def counts(self) -> dict[str, int]:
        with urllib.request.urlopen(f"{self.url}/-/counts", timeout=10) as answer:
            counts: dict[str, int] = json.load(answer)
            return counts


@contextlib.contextmanager
def serving(folder: Path, **network: float) -> Iterator[Throttle]:
    """A server process while the block runs. `network`: `rate`, `line`, `latency`, `reset_every`, `slow_rate`."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in network.items()]
    command = [sys.executable, "-m", "benchmarks.throttle", str(folder), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=_ROOT)
    try:
        assert process.stdout
        yield Throttle(f"http://127.0.0.1:{int(process.stdout.readline())}")
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


class _Server:
    def __init__(self, folder: Path, network: argparse.Namespace) -> None:
        self._folder = folder
        self._network = network
        self._reset_every = network.reset_every
        self._lock = threading.Lock()
        self._until_reset = network.reset_every or 0
        self._line_is_free_at = 0.0
        self.counts = {"bytes": 0, "requests": 0, "connections": 0}
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)

    def run(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._count("connections", 1)
        rate = self._network.rate
        if self._network.slow_rate and self.counts["connections"] % _SLOW_ONE_OF == _SLOW_ONE_OF // 2:
            rate = self._network.slow_rate
        with contextlib.suppress(OSError), connection, connection.makefile("rb") as reader:
            time.sleep(self._network.latency)
            while request := reader.readline():
                headers = {}
                while (header := reader.readline().strip()) != b"":
                    name, _, value = header.partition(b":")
                    headers[name.strip().lower().decode()] = value.strip().decode()
                self._answer(connection, request.split()[1].decode(), headers, rate)

    def _answer(self, connection: socket.socket, path: str, headers: dict[str, str], rate: float | None) -> None:
        if path == "/-/counts":
            body = json.dumps(self.counts).encode()
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            return
        self._count("requests", 1)
        with (self._folder / path.lstrip("/").partition("?")[0]).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", ""))
            start = int(found[1]) if found else 0
            end = min(size, int(found[2]) + 1) if found and found[2] else size
            status = f"206 Partial Content\r\nContent-Range: bytes {start}-{end - 1}/{size}" if found else "200 OK"
            head = (
                f'HTTP/1.1 {status}\r\nContent-Length: {end - start}\r\nETag: "{size}"\r\nAccept-Ranges: bytes\r\n\r\n'
            )
            time.sleep(self._network.latency)
            connection.sendall(head.encode())
            self._send(connection, file.fileno(), range(start, end), rate)

    def _send(self, connection: socket.socket, file: int, part: range, rate: float | None) -> None:
        began, at = time.monotonic(), part.start
        while at < part.stop:
            most = min(part.stop - at, _SLICE if rate else 1 << 22)
            self._wait_for_line(most)
            count = os.sendfile(connection.fileno(), file, at, most)
            at += count
            if self._count("bytes", count):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                raise ConnectionResetError
            if rate:
                time.sleep(max(0.0, (at - part.start) / rate - (time.monotonic() - began)))

    def _wait_for_line(self, count: int) -> None:
        if self._network.line:
            with self._lock:
                now = time.monotonic()
                self._line_is_free_at = max(now, self._line_is_free_at) + count / self._network.line
                wait = self._line_is_free_at - now
            time.sleep(wait)

    def _count(self, what: str, count: int) -> bool:
        """Count what was done. Returns whether the connection must be reset now."""
        with self._lock:
            self.counts[what] += count
            if what != "bytes" or not self._reset_every:
                return False
            self._until_reset -= count
            if self._until_reset > 0:
                return False
            self._until_reset = self._reset_every
            return True


def main(arguments: list[str] | None = None) -> Any:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throttle", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rate", type=float, help="bytes a second of each connection")
    parser.add_argument("--line", type=float, help="bytes a second of all connections together")
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--reset-every", type=int)
    parser.add_argument("--slow-rate", type=float, help="bytes a second of every eighth connection")
    given = parser.parse_args(arguments)
    server = _Server(given.folder, given)
    print(server.listener.getsockname()[1], flush=True)
    server.run()


if __name__ == "__main__":
    main()

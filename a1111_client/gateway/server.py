"""The gateway as a process: one port, ended by Ctrl-C, which cancels the jobs that are still open."""

from __future__ import annotations

import contextlib
import socket
from types import FrameType
from typing import Any

import uvicorn

from a1111_client.gateway.app import create_app
from a1111_client.gateway.guard import Access
from a1111_client.gateway.jobs import OpenJobs
from a1111_client.gateway.runner import Runner

_GRACE = 3  # seconds that open requests have to end after Ctrl-C
_KEEP_ALIVE = 30  # as A1111's own


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0: on any free port. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=128)


def serve(runner: Runner, access: Access, listening: socket.socket) -> None:
    """Answer on the socket until SIGINT or SIGTERM."""
    app = create_app(runner, access)
    config = uvicorn.Config(
        app,
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_GRACE,
    )
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again when all is ended
        _Server(config, app.state.gateway.jobs).run(sockets=[listening])


class _Server(uvicorn.Server):
    """Ends open jobs with the first signal, so that their clients have an answer and RunPod is told."""

    def __init__(self, config: uvicorn.Config, jobs: OpenJobs) -> None:
        super().__init__(config)
        self._jobs = jobs

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        for job in self._jobs.all():
            job.interrupted.set()
        super().handle_exit(sig, frame)


def address(listening: socket.socket) -> str:
    """The address as a browser takes it."""
    found: tuple[Any, ...] = listening.getsockname()
    host = f"[{found[0]}]" if ":" in found[0] else found[0]
    return f"http://{host}:{found[1]}"

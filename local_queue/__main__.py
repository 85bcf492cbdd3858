"""A local endpoint: RunPod's queue on this machine, and a worker that takes its jobs.

    python -m local_queue --port 8000 -- python handler.py

It ends with the worker, and with its status. A worker that asks to be replaced (`refresh_worker`) is started again.
Ctrl-C lets a running job finish within the worker's own grace; a second one ends everything at once.

LOCAL_API_KEY is the key that callers send as `Authorization: Bearer …`. Beyond this machine (--host) it must be set.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from types import FrameType

from local_queue.access import is_loopback
from local_queue.jobs import JobEvent, JobQueue, QueueLimits
from local_queue.routes import CallerRoutes, WorkerRoutes
from local_queue.server import QueueServer
from local_queue.worker import WorkerProcess, new_key, worker_environment

LONG_POLL = 60.0
"""Seconds for which the worker's request for a job is held open."""

log = logging.getLogger("local_queue")


class LocalEndpoint:
    """One worker at a time in front of one queue."""

    def __init__(self, command: Sequence[str], limits: QueueLimits) -> None:
        self.queue = JobQueue(limits, self._note)
        self._command = command
        self._worker = ""  # the name of the one that runs
        self._process: WorkerProcess | None = None
        self._is_replacing = False
        self._signal = 0

    def run(self, environ: Mapping[str, str]) -> int:
        """Run the worker until it ends by itself or a signal asks for it. Its status. OSError: it cannot start."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        key = new_key()
        server = QueueServer("127.0.0.1", 0, WorkerRoutes(self.queue, key, long_poll=LONG_POLL))
        server.start()
        url, started = f"http://127.0.0.1:{server.port}", 0
        while not self._was_signalled():
            started += 1
            self._worker, self._is_replacing = f"local-{started}", False
            self.queue.worker_starts(self._worker)
            self._process = WorkerProcess(self._command, worker_environment(environ, url, key, self._worker))
            if self._was_signalled():
                self._end_worker()  # the signal came before there was a process
            status = self._process.wait()
            self.queue.worker_ended(self._worker)
            if not self._is_replacing and not self._was_signalled():
                log.info("the worker ended with status %d", status)
                return status
            log.info("the worker has ended")
        return 128 + self._signal

    def _was_signalled(self) -> bool:
        return self._signal != 0

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Noted first of all: another signal may interrupt what follows.
        is_second, self._signal = self._was_signalled(), number
        if not is_second:
            log.info("the end waits for the job that runs; a second signal ends it at once")
        elif self._process is not None:
            self._process.kill()
        self._end_worker()

    def _end_worker(self) -> None:
        if self._process is not None:
            self._process.stop()
            self.queue.dismiss(self._worker)

    def _note(self, event: JobEvent) -> None:
        job = event.job
        if event.kind == "ready":
            log.info("the worker asks for jobs")
        elif event.kind == "queued" and job:
            log.info("%s: queued", job.id)
        elif event.kind == "ended" and job:
            seconds = (job.ended or 0.0) - job.submitted
            log.info("%s: %s after %.1f s, %.1f kB", job.id, job.status, seconds, job.answer_bytes / 1000)
        elif event.kind == "lost" and job:
            log.warning("%s: its answer is lost: %s", job.id, event.detail)
        elif event.kind == "stop pod" and event.worker == self._worker and not self._signal:
            log.warning("the worker asks to be replaced: it ends, and is started again")
            self._is_replacing = True
            self._end_worker()


def main(words: Sequence[str]) -> int:
    options, command = _parse(words)
    logging.basicConfig(level=logging.INFO, format="queue | %(message)s", stream=sys.stderr)
    key = os.environ.get("LOCAL_API_KEY", "").strip() or None
    if key is None and not is_loopback(options.host):
        sys.stderr.write(
            f"local_queue: --host {options.host} opens the GPU to other machines: set LOCAL_API_KEY first\n"
        )
        return 2
    endpoint = LocalEndpoint(command, QueueLimits(execution_timeout=options.execution_timeout))
    allowed = {
        options.host.lower(),
        *(name.strip().lower() for name in options.allowed_hosts.split(",") if name.strip()),
    }
    try:
        server = QueueServer(options.host, options.port, CallerRoutes(endpoint.queue, key, allowed))
    except (OSError, UnicodeError) as error:
        sys.stderr.write(f"local_queue: cannot listen on {options.host}, port {options.port}: {error}\n")
        return 1
    server.start()
    shown = f"[{options.host}]" if ":" in options.host else options.host
    log.info("listening on http://%s:%d%s", shown, server.port, "; callers send the key" if key else "")
    try:
        return endpoint.run(os.environ)
    except OSError as error:
        sys.stderr.write(f"local_queue: {command[0]}: {error.strerror}\n")
        return 127
    finally:
        endpoint.queue.close()
        server.stop()


def _parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the worker's command after `--`."""
    ours, command = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(
        prog="python -m local_queue",
        usage="%(prog)s [options] -- COMMAND OF THE WORKER",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="where callers reach it (127.0.0.1); elsewhere LOCAL_API_KEY must be set")
    add("--port", type=_port, default=8000, help="(8000); 0: a free one")
    add("--allowed-hosts", default="", metavar="NAME,…", help="names that callers may use for this machine")
    add("--execution-timeout", type=float, default=600.0, metavar="SECONDS", help="RunPod's setting of that name (600)")
    options = parser.parse_args(ours)
    if not command:
        parser.error("the worker's command is missing: … -- python handler.py")
    return options, list(command)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= 65535):
        raise argparse.ArgumentTypeError("takes a port from 0 to 65535")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

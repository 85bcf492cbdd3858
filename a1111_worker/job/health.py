"""The worker's health, for the container's health check: its state on disk, and whether the WebUI answers.

    {"state": "booting" | "ready" | "broken", "heartbeat": 1789000000.1,
     "webui": "up" | "down", "ping": "none" | "up" | "down"}

While the worker is ready, every heartbeat checks an idle WebUI. A WebUI that hangs between two jobs would otherwise be
found by the next job, and cost it.

`ping` is the SDK's ping process: RunPod hears of this worker by it alone. The SDK starts it as a child of this process
just before it asks for the first job, and never looks at it again (runpod 1.12, rp_ping.py). If it dies, for example
because memory ran out, the worker goes on with its jobs, and RunPod counts it as gone. `none`: the SDK has not started
one, as off RunPod.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from a1111_worker.files import write_atomically
from a1111_worker.heartbeat import Heartbeat

log = logging.getLogger(__name__)


class HealthReporter:
    """Writes `state_file` every `interval` seconds, and whenever the state changes. With None it writes nothing.

    `is_webui_up` returns whether the WebUI answers, and may restart a WebUI that does not.
    """

    def __init__(self, state_file: Path | None, is_webui_up: Callable[[], bool], *, interval: float = 10.0) -> None:
        self._state_file = state_file
        self._is_webui_up = is_webui_up
        self.state = "booting"
        self._webui = "down"
        self._ping = "none"
        self._ping_process: BaseProcess | None = None
        self._children: set[BaseProcess] | None = None
        self._lock = threading.Lock()
        self._heartbeat = Heartbeat(interval, name="health")  # its own: a check of the WebUI may take 30 s

    def start(self) -> None:
        self._write()
        self._heartbeat.add_listener(self._beat)

    def set_state(self, state: str) -> None:
        """Report this state from now on: "ready" or "broken"."""
        self.state = state
        self._webui = "up" if state == "ready" else self._webui
        self._write()

    def remember_children(self) -> None:
        """Call it just before the SDK starts: these children of this process are not the SDK's."""
        self._children = set(multiprocessing.active_children())

    def watch_ping_process(self) -> None:
        """Call it when the SDK asks for the first job: a new child is its ping process. Later calls do nothing."""
        if self._children is None:
            return
        new = set(multiprocessing.active_children()) - self._children
        self._children = None
        if new:
            self._ping_process, self._ping = new.pop(), "up"
            self._write()

    def close(self) -> None:
        self._heartbeat.stop()

    def _beat(self) -> None:
        self._look_at_ping_process()
        if self.state == "ready":
            self._webui = "up" if self._is_webui_up() else "down"
        self._write()

    def _look_at_ping_process(self) -> None:
        process = self._ping_process
        if process is None or self._ping == "down" or process.is_alive():
            return
        self._ping = "down"
        log.error(
            "the SDK's ping process has died (status %s): RunPod hears nothing of this worker any more",
            process.exitcode,
        )

    def _write(self) -> None:
        if self._state_file is None:
            return
        try:
            with self._lock:  # so that a heartbeat never replaces a newer state by an older one
                health = {"state": self.state, "heartbeat": time.time(), "webui": self._webui, "ping": self._ping}
                write_atomically(self._state_file, json.dumps(health).encode())
        except OSError as error:
            log.warning("the worker's state cannot be written: %s", error.strerror)

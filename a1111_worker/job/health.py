"""The worker's health, for the container's health check: its state on disk, and whether the WebUI answers.

    {"state": "booting" | "ready" | "broken", "heartbeat": 1789000000.1, "webui": "up" | "down"}

An idle WebUI is looked at with every beat: one that hangs between two jobs would otherwise cost the next job.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from a1111_worker.files import write_atomically
from a1111_worker.heartbeat import Heartbeat

log = logging.getLogger(__name__)


class HealthReporter:
    """Writes `state_file` every `interval` seconds (None: nowhere).

    `is_webui_up` tells whether the WebUI answers; it may restart one that does not. It is asked while the worker is
    ready.
    """

    def __init__(self, state_file: Path | None, is_webui_up: Callable[[], bool], *, interval: float = 10.0) -> None:
        self._state_file = state_file
        self._is_webui_up = is_webui_up
        self._state = "booting"
        self._webui = "down"
        self._lock = threading.Lock()
        self._heartbeat = Heartbeat(interval, name="health")  # its own: a look at the WebUI may take 30 s

    def start(self) -> None:
        self._write()
        self._heartbeat.add_listener(self._beat)

    def set_state(self, state: str) -> None:
        """The worker's state from now on."""
        self._state = state
        self._webui = "up" if state == "ready" else self._webui
        self._write()

    def close(self) -> None:
        self._heartbeat.stop()

    def _beat(self) -> None:
        if self._state == "ready":
            self._webui = "up" if self._is_webui_up() else "down"
        self._write()

    def _write(self) -> None:
        if self._state_file is None:
            return
        health = json.dumps({"state": self._state, "heartbeat": time.time(), "webui": self._webui})
        try:
            with self._lock:
                write_atomically(self._state_file, health.encode())
        except OSError as error:
            log.warning("the worker's state cannot be written: %s", error.strerror)

"""The worker's own heartbeat: every few seconds its state on disk for the container's health check, and a look at an
idle WebUI, since one that hangs between two jobs would otherwise cost the next one.

    {"state": "booting" | "ready" | "broken", "heartbeat": 1789000000.1, "webui": "up" | "down"}
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)


class Lookout:
    """`is_up` tells whether the WebUI answers (and sees to it where it does not); asked every `every` seconds."""

    def __init__(self, state_file: Path | None, is_up: Callable[[], bool], *, every: float = 10.0) -> None:
        self._state_file = state_file
        self._is_up = is_up
        self._every = every
        self._state = "booting"
        self._webui = "down"
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="lookout")

    def start(self) -> None:
        self._write()
        self._thread.start()

    def say(self, state: str) -> None:
        """The worker's state from now on."""
        self._state = state
        self._webui = "up" if state == "ready" else self._webui
        self._write()

    def close(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._every):
            if self._state == "ready":
                self._webui = "up" if self._is_up() else "down"
            self._write()

    def _write(self) -> None:
        if self._state_file is None:
            return
        said = json.dumps({"state": self._state, "heartbeat": time.time(), "webui": self._webui})
        new = self._state_file.with_name(f"{self._state_file.name}.new")
        try:
            with self._lock:
                new.write_text(said, encoding="utf-8")
                new.replace(self._state_file)
        except OSError as error:
            log.warning("the worker's state cannot be written: %s", error.strerror)

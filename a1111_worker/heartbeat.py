"""One thread that calls its listeners every few seconds, as long as the worker lives."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class Heartbeat:
    """Calls every listener every `interval` seconds, in the order in which they were added.

    A listener that fails is logged, and called again with the next beat. The thread starts with the first listener. A
    listener that may block for long gets a heartbeat of its own, so that it holds up no other.
    """

    def __init__(self, interval: float, *, name: str = "heartbeat") -> None:
        self._interval = interval
        self._name = name
        self._listeners: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def add_listener(self, listener: Callable[[], None]) -> None:
        with self._lock:
            self._listeners.append(listener)
            if self._thread is None and not self._stopped.is_set():
                self._thread = threading.Thread(target=self._run, daemon=True, name=self._name)
                self._thread.start()

    def remove_listener(self, listener: Callable[[], None]) -> None:
        with self._lock:
            self._listeners.remove(listener)

    def stop(self) -> None:
        """End the thread, and return when it has ended."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            with self._lock:
                listeners = list(self._listeners)
            for listener in listeners:
                try:
                    listener()
                except Exception:
                    log.exception("a heartbeat failed")

"""What the log, and whoever waits for a file, are told while it comes."""

from __future__ import annotations

import logging
from collections.abc import Callable

log = logging.getLogger(__name__)

OnBytes = Callable[[int, "int | None"], None]
"""Gets the bytes on disk and the file's size (None: unknown), some four times a second, from one thread."""


class ProgressReporter:
    """Reports how much of one file is on disk: each tenth to the log, and more often to `on_bytes`."""

    def __init__(self, label: str, on_bytes: OnBytes | None) -> None:
        self._label = label
        self._on_bytes = on_bytes
        self._tenths = 0  # of the file that the log has
        self._reported_at = -1.0

    def report_sometimes(self, now: float, done: int, size: int | None) -> None:
        """Report four times a second."""
        if now - self._reported_at >= 0.25:
            self._reported_at = now
            self.report(done, size)

    def report(self, done: int, size: int | None) -> None:
        """Log each tenth of the file, and tell who waits."""
        if size and self._tenths < (tenths := done * 10 // size) < 10:
            self._tenths = tenths
            log.info("%s: %d %% of %.1f MB are on disk", self._label, tenths * 10, size / 1e6)
        if self._on_bytes is None:
            return
        try:
            self._on_bytes(done, size)
        except Exception:
            log.exception("%s: its progress could not be reported", self._label)

"""What the thread that waits for a download looks at now and then: slow connections, a slow file, progress."""

from __future__ import annotations

import logging
from collections.abc import Callable

from a1111_worker.errors import DownloadFailed
from a1111_worker.origins import origin_of
from a1111_worker.transfer.concurrency import too_slow
from a1111_worker.transfer.connection import Connection
from a1111_worker.transfer.state import DownloadState

log = logging.getLogger(__name__)

OnBytes = Callable[[int, "int | None"], None]
"""Gets the bytes on disk and the file's size (None: unknown), some four times a second, from one thread."""


class RunningTime:
    """The seconds for which this process ran. Who was slow is judged by them.

    Nothing is received while the process is stopped (a paused container, a frozen machine), however fast the storage
    is. So the time between two calls of `advance` counts up to `longest_step` seconds, and no more. Whoever calls it
    does so many times a second.
    """

    def __init__(self, now: float, longest_step: float) -> None:
        self.seconds = 0.0
        self._now = now
        self._longest_step = longest_step

    def advance(self, now: float) -> float:
        """The seconds so far. `now` is on the monotonic clock."""
        self.seconds += min(now - self._now, self._longest_step)
        self._now = now
        return self.seconds


class Monitor:
    """`look` decides itself what is due. `save` is called when a crash would cost too many bytes.

    `now` is a RunningTime's.
    """

    def __init__(self, state: DownloadState, save: Callable[[], None], on_bytes: OnBytes | None, now: float) -> None:
        self._state = state
        self._save = save
        self._saved_at = now
        self._progress = ProgressReporter(state, on_bytes, now)
        self._connection_marks: dict[Connection, tuple[float, int]] = {}  # when each was judged, and its bytes then
        self._rate_mark = (now, 0)
        self._rate_connections = 0
        self._speed_mark = (now, state.received)

    def look(self, now: float) -> None:
        with self._state.changed:
            self._replace_slow_connections(now)
            self._measure_rate(now)
            self._check_speed(now)
        self._save_sometimes(now)
        self._progress.report_sometimes(now)

    def report_end(self) -> None:
        self._progress.report()

    def _replace_slow_connections(self, now: float) -> None:
        state = self._state
        marks = {each: self._connection_marks.get(each, (now, 0)) for each in state.connections}
        due = {each: mark for each, mark in marks.items() if now - mark[0] >= state.tuning.stall_seconds}
        speeds = [(each.received - received) / (now - began) for each, (began, received) in due.items()]
        for each, is_slow, speed in zip(due, too_slow(speeds, state.tuning.min_speed), speeds, strict=True):
            marks[each] = (now, each.received)
            if is_slow:
                log.warning("%s: a connection at %.0f kB/s is replaced", state.label, speed / 1e3)
                each.abort()
        self._connection_marks = marks

    def _measure_rate(self, now: float) -> None:
        connections, throughput = self._state.connections, self._state.throughput
        began, received = self._rate_mark
        if connections.flowing > self._rate_connections:
            throughput.rate = 0.0  # more are at work than were measured
        elif now - began >= 0.25:
            rate = (connections.received - received) / (now - began)
            throughput.set_rate(rate, len(connections), connections.slowest_answer)
        else:
            return
        self._rate_mark, self._rate_connections = (now, connections.received), connections.flowing

    def _check_speed(self, now: float) -> None:
        """End the download if it was too slow for too long.

        The time does not count while other files have all the connections, or while only the hash is computed.
        """
        state, tuning = self._state, self._state.tuning
        began, received_then = self._speed_mark
        seconds, received = now - began, state.received - received_then
        is_working = state.allowed_connections > 0 and not state.file.is_complete
        if is_working and seconds < tuning.patience_seconds:
            return
        if is_working and received < tuning.min_speed * seconds:
            state.fail(
                DownloadFailed(f"{state.label} cannot be downloaded: {received / 1e3:,.0f} kB came in {seconds:.3g} s")
            )
        self._speed_mark = (now, state.received)

    def _save_sometimes(self, now: float) -> None:
        unsaved, tuning = self._state.file.unsaved_bytes, self._state.tuning
        if unsaved >= tuning.remember_bytes or (unsaved and now - self._saved_at >= tuning.remember_seconds):
            self._saved_at = now
            self._save()


class ProgressReporter:
    """Tells the log and the caller how far a file is."""

    def __init__(self, state: DownloadState, on_bytes: OnBytes | None, now: float) -> None:
        self._state = state
        self._on_bytes = on_bytes
        self._reported_at = now - 1
        self._tenths: int | None = None  # tenths of the file that the log has

    def report_sometimes(self, now: float) -> None:
        """Report four times a second, once something is known of the file."""
        if now - self._reported_at < 0.25:
            return
        self._reported_at = now
        if self._state.file.ranges is not None:
            self.report()

    def report(self) -> None:
        done, size = self._log_progress()
        if self._on_bytes is None:
            return
        try:
            self._on_bytes(done, size)
        except Exception:
            log.exception("%s: its progress could not be reported", self._state.label)

    def _log_progress(self) -> tuple[int, int | None]:
        """Log each tenth of the file. Returns the bytes on disk and the file's size."""
        state = self._state
        with state.changed:
            done, size, link = state.file.done, state.file.size, state.link.current
            received, connections = state.received, len(state.connections)
        if not size:
            return done, size
        tenths = done * 10 // size
        if self._tenths is None:
            if link:
                origin = origin_of(link.url)
                log.info("%s: %.1f MB from %s", state.label, size / 1e6, origin)
        elif self._tenths < tenths < 10:
            args = (state.label, tenths * 10, received / 1e6, connections)
            log.info("%s: %d %%, %.1f MB received, %d connections", *args)
        self._tenths = max(tenths, self._tenths or 0)
        return done, size

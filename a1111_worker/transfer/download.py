"""From a signed link to bytes on disk, as fast as the network allows: over several connections, resumable at any byte.

`Downloader.fetch` gives the connections of a file ranges of it in order. A connection for which no range is left takes
half of the largest remainder. The bytes that a connection received count, however it ended. Which bytes are on disk is
saved beside the partial file (`partial_file`), so that another process can go on if this one dies. The SHA-256 is
computed while the bytes arrive.

`connection.judge` decides what an answer of the storage means, and `state.DownloadState.handle_fault` what follows:

    200, 206          the bytes, if they are of the same file (ETag, total size), complete and not compressed
    400, 401, 403     the link is old: get another one, at most `link_renewals` times
    404, 410          get another link once, then MODEL_NOT_FOUND
    416               another file than before: start over; for the first byte: the file is empty, or has no ranges
    429, 503          too many connections: use fewer, and wait (Retry-After, within reason)
    408, 425, 5xx     try again, with jitter, `tries` times without progress
    HTML, other size  MODEL_REJECTED
    anything else     DOWNLOAD_FAILED
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from a1111_worker.context import JobContext
from a1111_worker.errors import DownloadFailed, ModelRejected
from a1111_worker.origins import OriginRefused
from a1111_worker.transfer.concurrency import ConcurrencyTuner, ConnectionDemand, ConnectionLimit
from a1111_worker.transfer.connection import Connection, FileChanged
from a1111_worker.transfer.egress import EgressPolicy
from a1111_worker.transfer.monitor import Monitor, OnBytes, RunningTime
from a1111_worker.transfer.partial_file import PartialFile, StreamingHasher
from a1111_worker.transfer.range_worker import RangeWorker
from a1111_worker.transfer.ranges import ByteRanges, Tuning
from a1111_worker.transfer.state import DownloadState, FileState

__all__ = ["Downloader", "Fetched", "OnBytes", "Source"]

log = logging.getLogger(__name__)

_END_SECONDS = 0.8  # how long the end of a download waits for its threads


@dataclass(frozen=True)
class Source:
    """A file to fetch. `label` is how messages and log lines name it.

    `link` returns a URL of the file's bytes, or raises one of our errors. It is called once a file, and again only if
    the last URL is old or was refused. `size` is exact, in bytes. `sha256` tells whether what an earlier download left
    is of the same file; the bytes are not judged by it. None: unknown.
    """

    label: str
    link: Callable[[], str]
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Fetched:
    """A partial file that is complete. `sha256` is what it has; the caller judges whether that is right.

    `received` bytes came over the network, at most over so many `connections` at once; `resumed` bytes were there.
    """

    size: int
    sha256: str
    received: int
    resumed: int
    connections: int


class Downloader:
    """Fetches files for a whole worker: at most `tuning.connections` at once, shared by all files being fetched."""

    def __init__(self, policy: EgressPolicy, tuning: Tuning | None = None) -> None:
        self.policy = policy
        self.tuning = tuning or Tuning()
        self.limit = ConnectionLimit(self.tuning.connections)

    def fetch(self, source: Source, path: Path, context: JobContext, on_bytes: OnBytes | None = None) -> Fetched:
        """Have the complete file at `path`. It goes on where an earlier download of the same file stopped.

        Files of a job that is next at the GPU go first. The partial file, and what is saved beside it, stay on disk
        whatever happens; only if there was no room for a new file is it removed. Raises ModelError, or what the
        deadline raises: every connection is closed and every thread has ended by then.
        """
        download = Download(self, source, path, context, on_bytes)
        try:
            return download.run()
        except OriginRefused as error:
            raise ModelRejected(f"{source.label} is somewhere that may not be reached: {error}") from error
        finally:
            self.limit.forget(download)


class Download:
    """One file on its way. `run` is what the thread that asked for it does; every connection has a RangeWorker."""

    def __init__(
        self, downloader: Downloader, source: Source, path: Path, context: JobContext, on_bytes: OnBytes | None
    ) -> None:
        tuning = downloader.tuning
        self._downloader = downloader
        self._source = source
        self._context = context
        self._on_bytes = on_bytes
        self._state = DownloadState(FileState(source.label, source.size, tuning), PartialFile(path), tuning)
        self._workers: list[RangeWorker] = []
        self._tuner: ConcurrencyTuner | None = None
        self._running = RunningTime(time.monotonic(), tuning.longest_step)

    def run(self) -> Fetched:
        began = time.monotonic()
        state = self._state
        try:
            with self._context.deadline.on_cancel(state.stop):
                self._resume()
                resumed = state.file.done
                while (sha256 := self._receive_and_hash()) is None:
                    state.start_over()
                    self._tuner = None
                    resumed = 0
        finally:
            self._close()
        return self._fetched(sha256, resumed, time.monotonic() - began)

    def _resume(self) -> None:
        """Go on with what an earlier download of the same file left."""
        state, source = self._state, self._source
        saved = state.part.load_state()
        if saved is None:
            return
        if not saved.may_be_of(source.size, source.sha256):
            log.info("%s: what an earlier download left is of another file; it starts over", source.label)
            return
        ranges = ByteRanges(saved.size, saved.done)
        if not ranges.left and not (source.size or source.sha256):
            return  # complete, but of which file? No answer will tell.
        state.file.resume(ranges, saved.etag)
        log.info("%s: %.1f MB of it are on disk already, from an earlier download", state.label, state.file.done / 1e6)
        state.part.allocate(saved.size)

    def _receive_and_hash(self) -> str | None:
        """Have all bytes on disk. Returns their SHA-256; None if the download must start over."""
        state = self._state
        hasher = state.hasher = StreamingHasher(state.part, state.contiguous)
        try:
            self._receive()
        except FileChanged:
            hasher.stop()
            return None
        hasher.wake()
        while not hasher.finished.wait(self._pause()):
            self._context.deadline.check()
        self._context.deadline.check()
        if hasher.sha256 is None:
            raise hasher.error or DownloadFailed(f"{state.label} cannot be read back from the volume")
        return hasher.sha256

    def _receive(self) -> None:
        """Have all bytes on disk. Raises FileChanged if the download must start over."""
        state = self._state
        if state.file.is_complete:
            return
        if state.link.current is None:
            self._get_link()
        monitor = Monitor(state, self._save, self._on_bytes, self._running.seconds)
        while not state.is_over():
            now = self._running.advance(time.monotonic())
            self._context.deadline.check()
            if state.needs_link():
                self._get_link()
            else:
                self._adjust_connections()
                monitor.look(now)
                state.wait(self._pause())
        monitor.report_end()
        self._save()

    def _pause(self) -> float:
        """Seconds until the next look."""
        return min(self._state.tuning.poll_seconds, self._context.deadline.remaining())

    def _get_link(self) -> None:
        url, link = self._source.link(), self._state.link
        origin = self._downloader.policy.check(url)
        with self._state.changed:
            is_first = link.current is None
            link.renew(url, time.monotonic())
        if not is_first:
            log.info("%s: a new link, at %s", self._state.label, origin)

    def _adjust_connections(self) -> None:
        """Have as many connections as are allowed and useful."""
        now, state, limit = time.monotonic(), self._state, self._downloader.limit
        with state.changed:
            demanded, useful = self._demand(now)
            is_next = self._context.is_next()
            state.allowed_connections = limit.share(self, ConnectionDemand(demanded, is_next))
            # Another file needs the connections now, not at the end of their ranges, which may be minutes away.
            state.connections.retire_beyond(max(state.allowed_connections, int(is_next)))
            if state.retries.restart_reason or now < state.retries.retry_at:
                return
            while len(state.connections) < min(state.allowed_connections, useful) and limit.acquire():
                self._start_worker()

    def _start_worker(self) -> None:
        connection = Connection(self._downloader.policy, self._state.tuning)
        worker = RangeWorker(self._state, connection, self._downloader.limit)
        self._state.connections.add(connection)
        self._workers = [*(each for each in self._workers if each.is_alive()), worker]
        worker.start()

    def _demand(self, now: float) -> tuple[int, int]:
        """How many connections the file would like to have, and how many of them could be busy at this moment."""
        state, file, tuning = self._state, self._state.file, self._state.tuning
        most = state.retries.max_connections(now)
        if file.ranges is None or not file.is_confirmed:
            left = file.ranges.left if file.ranges else file.expected_size
            return min(most, _start_connections(left, tuning)), 1
        if not file.has_ranges:
            return 1, 1
        if self._tuner is None:
            self._tuner = _tuner_of(file.ranges.left, tuning)
        connections = self._tuner.observe(self._running.seconds, state.received, state.connections.flowing)
        least = max(tuning.min_range_bytes, state.throughput.min_steal_bytes)
        useful = min(connections, most, file.ranges.useful_connections(least))
        return useful, useful

    def _save(self) -> None:
        """Save which bytes are on disk, for a later download."""
        with self._state.changed:
            snapshot = self._state.file.snapshot(self._source.sha256)
        if snapshot is not None:
            self._state.part.save_state(snapshot)

    def _close(self) -> None:
        """End every thread, save which bytes are on disk, and close the partial file."""
        state = self._state
        state.stop()
        until = time.monotonic() + _END_SECONDS
        is_hashing = state.hasher is not None and not state.hasher.stop(_END_SECONDS)
        for worker in self._workers:
            worker.join(max(0.0, until - time.monotonic()))
        is_receiving = state.abandon()
        if is_receiving or is_hashing:
            log.warning("%s: a thread of its download is still blocked", state.label)
        if not state.file.is_complete or state.file.unsaved_bytes:
            self._save()
        if not is_receiving and not is_hashing:
            state.part.close()

    def _fetched(self, sha256: str, resumed: int, seconds: float) -> Fetched:
        state = self._state
        size, received, connections = state.file.done, state.received, state.connections.peak
        speed = received / 1e6 / max(seconds, 1e-3)
        log.info(
            "%s: %.1f MB received in %.1f s, %.0f MB/s over up to %d connections; all %.1f MB are on disk",
            *(state.label, received / 1e6, seconds, speed, connections, size / 1e6),
        )
        return Fetched(size, sha256, received, resumed, connections)


def _start_connections(left: int | None, tuning: Tuning) -> int:
    """How many connections a file begins with, of which so many bytes are missing (None: unknown)."""
    if left is None or left > 4 * tuning.small_file_bytes:
        return tuning.start_connections
    return 1 if left <= tuning.small_file_bytes else 2


def _tuner_of(left: int, tuning: Tuning) -> ConcurrencyTuner:
    start = _start_connections(left, tuning)
    most = max(1, min(tuning.connections, left // (tuning.small_file_bytes // 2))) if start > 2 else start
    return ConcurrencyTuner(start, most, tuning)

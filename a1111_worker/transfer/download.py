"""From a signed link to bytes on disk, as fast as the network allows: over several connections, resumable at any byte.

`Downloader.fetch` gives the connections of a file ranges of it in order (`ranges`). The bytes that a connection
received count, however it ended. Which bytes are on disk is saved beside the partial file (`partial_file`), so that
another process can go on if this one dies. The SHA-256 is computed while the bytes arrive.

The thread that wants the file decides everything: what is requested next, over how many connections, and what follows
from a fault. Every request has a thread of its own (`range_fetch`), which only copies bytes and reports.

`connection.judge` decides what an answer of the storage means, and `Download._handle_fault` what follows:

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
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from a1111_worker.context import JobContext
from a1111_worker.errors import DownloadFailed, ModelError, ModelRejected
from a1111_worker.origins import OriginRefused
from a1111_worker.transfer.budget import ConnectionBudget, Demand
from a1111_worker.transfer.connection import (
    NETWORK_ERRORS,
    FileChanged,
    FileGone,
    LinkRefused,
    RangesUnsupported,
    RequestFault,
    StorageBusy,
    network_fault,
)
from a1111_worker.transfer.egress import EgressPolicy
from a1111_worker.transfer.incoming_file import IncomingFile, Source
from a1111_worker.transfer.partial_file import PartialFile
from a1111_worker.transfer.pool import ConnectionPool
from a1111_worker.transfer.progress import OnBytes, ProgressReporter
from a1111_worker.transfer.range_fetch import RangeFetch
from a1111_worker.transfer.ranges import ByteRange, ByteRanges, Tuning, plan_theft, range_size
from a1111_worker.transfer.retries import Links, Retries
from a1111_worker.transfer.speed import SpeedCheck

__all__ = ["Downloader", "Fetched", "OnBytes", "Source"]

log = logging.getLogger(__name__)

_END_SECONDS = 0.8  # how long the end of a download waits for its threads


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
        self.budget = ConnectionBudget(self.tuning.connections)

    def fetch(self, source: Source, path: Path, context: JobContext, on_bytes: OnBytes | None = None) -> Fetched:
        """Have the complete file at `path`. It goes on where an earlier download of the same file stopped.

        Files of a job that is next at the GPU go first. The partial file, and what is saved beside it, stay on disk
        whatever happens; only if there was no room for a new file is it removed. Raises ModelError, or what the
        deadline raises: every connection is closed and every thread has ended by then.
        """
        part = PartialFile(path)
        try:
            file = IncomingFile(source, part, self.tuning)
        except ModelError:
            part.close()
            raise
        try:
            return Download(self, source, file, context).run(ProgressReporter(source.label, on_bytes))
        except OriginRefused as error:
            raise ModelRejected(f"{source.label} is somewhere that may not be reached: {error}") from error


class Download:
    """One file on its way. `run` is what the thread that wants it does."""

    def __init__(self, downloader: Downloader, source: Source, file: IncomingFile, context: JobContext) -> None:
        tuning = downloader.tuning
        self._downloader = downloader
        self._tuning = tuning
        self._source = source
        self._file = file
        self._context = context
        self._pool = ConnectionPool(downloader.policy, tuning, downloader.budget)
        self._links = Links(source.label, tuning)
        self._retries = Retries(tuning)
        self._restart: RequestFault | None = None  # why it starts over, as soon as no connection is at work

    def run(self, progress: ProgressReporter) -> Fetched:
        began, file, pool = time.monotonic(), self._file, self._pool
        try:
            file.resume()
            self._receive(progress)
        finally:
            self._close()
        log.info(
            "%s: %.1f MB received in %.1f s over up to %d connections; all %.1f MB are on disk",
            *(self._source.label, pool.received / 1e6, time.monotonic() - began, pool.most, file.done / 1e6),
        )
        return Fetched(file.done, file.sha256, pool.received, file.resumed, pool.most)

    def _receive(self, progress: ProgressReporter) -> None:
        """Have all bytes on disk, and their SHA-256."""
        file, pool, tuning = self._file, self._pool, self._tuning
        speed = SpeedCheck(tuning.patience_seconds, tuning.longest_step, time.monotonic())
        while not file.is_hashed:
            self._context.deadline.check()
            now = time.monotonic()
            # It cannot come if only the hash is missing, or if other files have all the connections.
            can_come = not file.is_complete and self._request_ranges()
            if speed.is_too_slow(now, pool.received, tuning.min_speed if can_come else 0.0):
                least = tuning.min_speed * tuning.patience_seconds / 1e3
                raise self._failed(f"fewer than {least:,.0f} kB came in {tuning.patience_seconds:.3g} s")
            file.save_sometimes(now)
            progress.report_sometimes(now, file.done, file.size)
            pause = 0.0 if file.hash_some() else min(tuning.poll_seconds, self._context.deadline.remaining())
            for fetch in pool.reports(pause):
                self._handle(fetch)
        progress.report(file.done, file.size)

    # -- requests

    def _request_ranges(self) -> bool:
        """Have as many requests at work as are allowed and useful. Returns whether any are allowed."""
        now, file, pool = time.monotonic(), self._file, self._pool
        allowed = self._allowed_connections(now)
        if self._restart is not None and not pool.at_work:
            self._start_over()
        if self._restart is None and self._links.is_due(now):
            self._renew_link()
        while self._restart is None and now >= self._retries.retry_at:
            if len(pool.at_work) >= allowed or not pool.has_room():
                break
            byte_range = self._next_range(allowed, now)
            if byte_range is None:
                break
            pool.fetch(file, self._links.current, byte_range)
        pool.close_idle()
        return allowed > 0

    def _allowed_connections(self, now: float) -> int:
        """How many connections this file may have now. Those that it has beyond them are given up."""
        file, tuning, at_work = self._file, self._tuning, self._pool.at_work
        demanded = tuning.connections if file.left is None else -(-file.left // tuning.min_range_bytes)
        # One more than are at work, so that it can take over from a slow one.
        demanded = min(max(demanded, len(at_work) + 1), self._retries.max_connections(now))
        is_next = self._context.is_next()
        allowed = self._downloader.budget.share(self._pool, Demand(demanded, is_next))
        if file.ranges is not None and file.has_ranges:
            # Another file needs them now, not at the end of their ranges, which may be minutes away.
            for fetch in at_work[max(allowed, int(is_next)) :]:
                file.ranges.release(file.ranges.steal(fetch.byte_range, fetch.byte_range.left))
                fetch.abort()
        return allowed

    def _next_range(self, connections: int, now: float) -> ByteRange | None:
        """What to request next; None if there is nothing."""
        file, ranges = self._file, self._file.ranges
        if self._pool.at_work and not (file.is_confirmed and file.has_ranges):
            return None
        if ranges is None:  # the first answer says what the file is
            return ByteRange(0, self._tuning.min_range_bytes)
        size = range_size(file.done, ranges.unclaimed, connections, self._tuning)
        return self._steal(ranges, now) or ranges.claim(size)

    def _steal(self, ranges: ByteRanges, now: float) -> ByteRange | None:
        """A part of a range that is requested already. While others are not, only of one that is far behind."""
        pool, tuning = self._pool, self._tuning
        idle_speed = max(pool.speed, tuning.min_speed)
        theft = plan_theft(pool.paces(now), idle_speed, tuning, ranges.unclaimed > 0)
        if theft is None:
            return None
        stolen = ranges.steal(*theft)
        for fetch in pool.at_work:
            if fetch.byte_range is theft[0] and not fetch.byte_range.left:
                fetch.abort()
        return stolen

    def _renew_link(self) -> None:
        url = self._source.link()
        origin = self._downloader.policy.check(url)
        log.info("%s: a link, at %s", self._source.label, origin)
        self._links.renew(url, time.monotonic())

    # -- what came of them

    def _handle(self, fetch: RangeFetch) -> None:
        """Take note of an answer, or of the end of a request."""
        if fetch not in self._pool.at_work:
            return  # it was over when its answer was noted
        if fetch.is_answered:
            self._links.redirect(fetch.link, fetch.connection.url)
            self._file.is_confirmed = True
        if not fetch.is_over:
            return
        is_missed, error = fetch.byte_range.left > 0, fetch.error
        self._pool.end(fetch)
        if self._file.ranges is not None:
            self._file.ranges.release(fetch.byte_range)
        if isinstance(error, NETWORK_ERRORS):
            error = network_fault(error)
        if isinstance(error, RequestFault):
            log.debug("%s: %s", self._source.label, error)
            if is_missed and self._restart is None:
                self._handle_fault(fetch, error)
        elif isinstance(error, ModelError) and self._source.label not in error.message:
            raise type(error)(f"{self._source.label}: {error.message}", hint=error.hint) from error
        elif error is not None:
            raise error

    def _handle_fault(self, fetch: RangeFetch, fault: RequestFault) -> None:
        """Decide what follows from a request that failed. Raises ModelError if the download has failed with it."""
        now, file, retries = time.monotonic(), self._file, self._retries
        others = sum(other.received > 0 for other in self._pool.at_work)
        is_stream = file.ranges is not None and not file.has_ranges  # nothing of it can be resumed
        if isinstance(fault, (LinkRefused, FileGone)):
            self._links.refuse(fetch.link, fault)
        elif isinstance(fault, StorageBusy) and others:
            retries.cap_connections(others, now)
        elif isinstance(fault, (FileChanged, RangesUnsupported)):
            if isinstance(fault, RangesUnsupported):
                file.has_ranges = False
            if file.ranges is not None:
                retries.count_restart(self._source.label, fault)
                self._restart = fault
                self._pool.abort()
        else:
            pause = min(fault.retry_after, self._tuning.retry_after_most) if isinstance(fault, StorageBusy) else 0.0
            if not retries.count_failure(fetch.began, now, 0 if is_stream else file.done, pause):
                raise self._failed(str(fault)) from fault
            if is_stream:
                self._restart = fault

    def _start_over(self) -> None:
        log.warning("%s: %s; it starts over", self._source.label, self._restart)
        self._file.start_over()
        self._restart = None

    def _failed(self, reason: str) -> DownloadFailed:
        return DownloadFailed(f"{self._source.label} cannot be downloaded: {reason}")

    def _close(self) -> None:
        """End every thread, save which bytes are on disk, and close the partial file."""
        file, part = self._file, self._file.part
        blocked = self._pool.close(_END_SECONDS)
        if not file.is_complete or file.unsaved:
            file.save()
        if not blocked:
            part.close()
            return
        log.warning("%s: a thread of its download is still blocked", self._source.label)

        def close_when_ended() -> None:  # if it wakes up, it must not write to what is another file by then
            for fetch in blocked:
                fetch.join(None)
            part.close()

        threading.Thread(target=close_when_ended, name="download-close", daemon=True).start()

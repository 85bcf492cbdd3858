"""What the threads of one download share: the file, its link, the failures so far, the connections.

The thread that asked for the file and the threads of its connections meet only here. The policy is here too: which
connection requests which bytes, and what follows if it does not get them (`DownloadState.handle_fault`).

`DownloadState` has a lock. The objects that it consists of have none: each is used under that lock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

from a1111_worker.errors import DownloadFailed, ModelError, ModelNotFound, ModelRejected
from a1111_worker.retry import Backoff
from a1111_worker.transfer.connection import (
    Connection,
    FileChanged,
    FileGone,
    Link,
    LinkRefused,
    RangeRequest,
    RangeResponse,
    RangesUnsupported,
    RequestFault,
    StorageBusy,
    TemporaryFault,
)
from a1111_worker.transfer.partial_file import PartialFile, PartialFileState, StreamingHasher
from a1111_worker.transfer.ranges import ByteRange, ByteRanges, Tuning, longest_range, range_size

log = logging.getLogger(__name__)


class DownloadState:
    """The verbs may be called from any thread. `changed` is their lock, and is notified if somebody may wait for it.

    Its other attributes are guarded by that lock too. A thread that has it may take it again. The thread that asked for
    the file sets `allowed_connections` and `hasher`.
    """

    def __init__(self, file: FileState, part: PartialFile, tuning: Tuning) -> None:
        self.label = file.label
        self.tuning = tuning
        self.part = part
        self.changed = threading.Condition()
        self.file = file
        self.link = LinkState(file.label, tuning)
        self.retries = RetryState(tuning)
        self.throughput = Throughput(tuning)
        self.connections = OpenConnections()
        self.allowed_connections = 1
        self.hasher: StreamingHasher | None = None
        self.failure: BaseException | None = None
        self.is_stopped = False
        self._is_abandoned = False

    # -- for every thread

    @property
    def received(self) -> int:
        """Bytes that came over all connections, whether they are on disk yet or not."""
        with self.changed:
            return self.connections.received

    def contiguous(self) -> tuple[int, bool]:
        """How many bytes are there without a gap, and whether these are all."""
        with self.changed:
            ranges = self.file.ranges
            return (ranges.contiguous, not ranges.left) if ranges else (0, False)

    def fail(self, error: BaseException) -> None:
        """End the download with an error. Only the first one counts."""
        if isinstance(error, ModelError) and self.label not in error.message:
            error = type(error)(f"{self.label}: {error.message}", hint=error.hint)
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()

    # -- for the thread that asked for the file

    def stop(self) -> None:
        """Unblock every thread. None of them begins anything any more."""
        with self.changed:
            self.is_stopped = True
            self.connections.abort()
            self.changed.notify_all()

    def abandon(self) -> bool:
        """Wait for the connections no longer. Returns whether one is still blocked; the last of them closes the part.

        A thread may hang in a name server, or in a volume that does not answer. If it wakes up, it must not write to a
        file descriptor that is another file's by then.
        """
        with self.changed:
            self._is_abandoned = len(self.connections) > 0
            return self._is_abandoned

    def is_over(self) -> bool:
        """Whether every byte is on disk, and no connection is at work any more.

        Raises what the download failed with, or FileChanged if it must start over.
        """
        with self.changed:
            if self.failure:
                raise self.failure
            if len(self.connections):
                return False
            if self.retries.restart_reason:
                raise FileChanged(str(self.retries.restart_reason))
            return self.file.is_complete

    def needs_link(self) -> bool:
        """Whether no request can be sent until there is another link."""
        with self.changed:
            return self.link.is_renewal_due and not self.retries.restart_reason

    def start_over(self) -> None:
        """Forget every byte. Raises DownloadFailed if that happens too often."""
        with self.changed:
            reason = self.retries.restart(self.label)
            log.warning("%s: %s; it starts over", self.label, reason)
            self.file.forget()
            self.part.clear()

    def wait(self, seconds: float) -> None:
        """Wait for a change, unless it has happened already: then no connection would notify of it any more."""
        with self.changed:
            is_over = self.file.is_complete and not len(self.connections)
            if not (self.failure or self.is_stopped or is_over):
                self.changed.wait(seconds)

    # -- for the connections' threads

    def next_request(self, connection: Connection) -> RangeRequest | None:
        """What a connection requests next; None if it should end."""
        with self.changed:
            if self._should_end(connection):
                return None
            link = self.link.fresh(time.monotonic())
            if link is None:
                return None
            if not self.file.has_ranges:
                return RangeRequest(None, link, None) if connection is self.connections.oldest else None
            ranges, tuning = self.file.ranges, self.tuning
            if ranges is None:
                first = range_size(
                    self.file.expected_size or 0,
                    tuning.start_connections,
                    tuning.small_file_bytes,
                    tuning.max_range_bytes,
                )
                return RangeRequest(ByteRange(0, first), link, None)
            byte_range = ranges.claim(self._range_size(ranges)) or ranges.steal(self.throughput.min_steal_bytes)
            return RangeRequest(byte_range, link, self.file.etag) if byte_range else None

    def accept(self, request: RangeRequest, response: RangeResponse, url: str) -> ByteRange:
        """Check an answer against what is known of the file. Returns the range that its bytes fill.

        `url` is where it came from, behind all redirects. Raises RequestFault or ModelError.
        """
        total = self.file.total_size(response)
        with self.changed:
            if self.is_stopped:
                raise TemporaryFault("stopped")
            self.link.redirect(request.link, url)
            if self.file.ranges is not None and request.byte_range is not None:
                self.file.confirm(response, total)
                return request.byte_range
        return self._open(response, total)

    def write(self, connection: Connection, byte_range: ByteRange, view: memoryview) -> None:
        """Write the next bytes of a range, as far as it was not stolen meanwhile. They count, whatever comes after."""
        view = view[: byte_range.left]
        self.part.write(view, byte_range.start)
        with self.changed:
            self.file.advance(byte_range, len(view))
            if connection.is_steady and self.file.has_ranges:
                self.retries.count_progress()
            if self.file.unsaved_bytes >= self.tuning.remember_bytes or self.file.is_complete:
                self.changed.notify_all()

    def end_file(self, byte_range: ByteRange) -> None:
        """An answer without a length ended, and so does the file, unless it is known to be longer."""
        with self.changed:
            size = self.file.end_at(byte_range)
        self.file.check_size(size)
        self.part.truncate(size)

    def release(self, byte_range: ByteRange) -> None:
        """Let other connections fetch what is left of a range."""
        with self.changed:
            if self.file.ranges is not None:
                self.file.ranges.release(byte_range)

    def handle_fault(self, connection: Connection, request: RangeRequest, fault: RequestFault) -> None:
        """Decide what follows from a request that failed. Raises ModelError if the download has failed with it."""
        now = time.monotonic()
        with self.changed:
            if self.is_stopped or self.failure or self.retries.restart_reason:
                return
            log.debug("%s: %s", self.label, fault)
            others = sum(other.is_flowing for other in self.connections if other is not connection)
            if isinstance(fault, FileChanged):
                self._restart(fault)
            elif isinstance(fault, RangesUnsupported):
                self.file.has_ranges = False
                if self.file.ranges is not None:
                    self._restart(fault)
            elif isinstance(fault, (LinkRefused, FileGone)):
                self.link.refuse(request.link, fault)
            elif isinstance(fault, StorageBusy) and others:
                self.retries.cap_connections(others, now)
            else:
                self._try_again(connection, fault, now)

    def leave(self, connection: Connection) -> None:
        """A connection's thread ends: this is the last thing that it does."""
        with self.changed:
            self.connections.remove(connection)
            self.changed.notify_all()
            is_last_one = self._is_abandoned and not len(self.connections)
        if is_last_one:
            self.part.close()

    def _should_end(self, connection: Connection) -> bool:
        return bool(
            self.is_stopped
            or self.failure
            or self.retries.restart_reason
            or self.link.is_renewal_due
            or connection.is_retired
            or self.file.is_complete
            or len(self.connections) > max(1, self.allowed_connections)
        )

    def _range_size(self, ranges: ByteRanges) -> int:
        least, most = self.tuning.min_range_bytes, float(self.tuning.max_range_bytes)
        count = max(len(self.connections), min(self.allowed_connections, self.tuning.start_connections))
        if self.hasher:
            backlog = ranges.contiguous - self.hasher.hashed_bytes
            most = min(most, longest_range(backlog, self.hasher.speed, self.throughput.rate, count))
        return range_size(ranges.unclaimed, count, least, most)

    def _open(self, response: RangeResponse, total: int | None) -> ByteRange:
        """The first answer of a download says what the file is. Have room for it."""
        if total is not None:
            self.file.check_size(total)
        size = self.file.expected_size if total is None else total
        if size is not None:
            try:
                self.part.allocate(size)
            except ModelError:
                self.part.path.unlink(missing_ok=True)
                raise
        with self.changed:
            byte_range = self.file.open(response, total)
            self.changed.notify_all()
        return byte_range

    def _restart(self, fault: RequestFault) -> None:
        self.retries.require_restart(fault)
        self.connections.abort()

    def _try_again(self, connection: Connection, fault: RequestFault, now: float) -> None:
        wait = min(fault.retry_after, self.tuning.retry_after_most) if isinstance(fault, StorageBusy) else 0.0
        if not self.file.has_ranges and self.file.ranges is not None:
            self.retries.restart_reason = fault  # without ranges nothing can be resumed
        elif connection.is_steady and not wait:
            return
        if not self.retries.count_failure(now, wait):
            raise DownloadFailed(f"{self.label} cannot be downloaded: {fault}") from fault


class OpenConnections:
    """The connections of a download, the oldest first.

    `received` counts the bytes of all its connections, ended ones included, whether they are on disk yet or not.
    """

    def __init__(self) -> None:
        self._open: list[Connection] = []
        self._received_before = 0  # by connections that have ended
        self.peak = 0

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Connection]:
        return iter(self._open)

    @property
    def oldest(self) -> Connection:
        return self._open[0]

    @property
    def received(self) -> int:
        return self._received_before + sum(connection.received for connection in self._open)

    @property
    def flowing(self) -> int:
        """How many have received bytes."""
        return sum(connection.received > 0 for connection in self._open)

    @property
    def slowest_answer(self) -> float:
        """Seconds from a request to its answer, of the slowest one."""
        return max((connection.answer_seconds for connection in self._open), default=0.0)

    def add(self, connection: Connection) -> None:
        self._open.append(connection)
        self.peak = max(self.peak, len(self._open))

    def remove(self, connection: Connection) -> None:
        self._open.remove(connection)
        self._received_before += connection.received

    def retire_beyond(self, count: int) -> None:
        """Give up the newest ones, all but `count`."""
        for connection in self._open[count:]:
            connection.retire()

    def abort(self) -> None:
        for connection in self._open:
            connection.abort()


class FileState:
    """What is known of a file, and which of its bytes are on disk.

    `label` is how messages name it. `expected_size` is what the caller knows of its size, in bytes; None: nothing.
    `is_confirmed`: an answer of this download agreed with what is known. Until then only one connection asks.
    """

    def __init__(self, label: str, expected_size: int | None, tuning: Tuning) -> None:
        self.label = label
        self.expected_size = expected_size
        self._max_size = tuning.max_file_bytes
        if expected_size is not None:
            self.check_size(expected_size)
        self.ranges: ByteRanges | None = None
        self.etag: str | None = None
        self.has_ranges = True  # the storage answers range requests, as far as known
        self.is_confirmed = False
        self.unsaved_bytes = 0
        self._is_size_unknown = False
        self._ignored_ranges = 0

    @property
    def size(self) -> int | None:
        """The file's size, None while it is unknown."""
        return None if self.ranges is None or self._is_size_unknown else self.ranges.size

    @property
    def done(self) -> int:
        """Bytes on disk."""
        return self.ranges.size - self.ranges.left if self.ranges else 0

    @property
    def is_complete(self) -> bool:
        return self.ranges is not None and not self.ranges.left

    def resume(self, ranges: ByteRanges, etag: str | None) -> None:
        """Go on with the bytes of an earlier download."""
        self.ranges, self.etag = ranges, etag

    def snapshot(self, sha256: str | None) -> PartialFileState | None:
        """What to save; None if another download could not go on with it."""
        if self.ranges is None or not self.has_ranges or self._is_size_unknown:
            return None
        self.unsaved_bytes = 0
        return PartialFileState(self.ranges.size, self.etag, sha256, tuple(self.ranges.done()))

    def forget(self) -> None:
        """Start over with a file of which nothing is known."""
        self.ranges = self.etag = None
        self.is_confirmed = self._is_size_unknown = False
        self.unsaved_bytes = 0

    def total_size(self, response: RangeResponse) -> int | None:
        """The size of the whole file that an answer is of; None if neither the answer nor the caller knows."""
        if not response.is_partial or response.total is not None:
            return response.total
        if self.expected_size is None:
            raise RangesUnsupported("the storage does not say how long it is")
        return self.expected_size

    def open(self, response: RangeResponse, total: int | None) -> ByteRange:
        """Begin a file with its first answer. Returns the range that its bytes fill."""
        size = total or self.expected_size or self._max_size
        self.ranges, self.etag, self.has_ranges = ByteRanges(size), response.etag, response.is_partial
        self._is_size_unknown = total is None
        self.is_confirmed = True
        byte_range = self.ranges.claim(size if response.end is None else response.end)
        assert byte_range is not None
        return byte_range

    def confirm(self, response: RangeResponse, total: int | None) -> None:
        """Check that an answer is of the same file, and contains the bytes that were asked for."""
        assert self.ranges is not None
        if total != self.ranges.size or (self.etag and response.etag and response.etag != self.etag):
            raise FileChanged("it is another file than before")
        if not response.is_partial:
            if self.etag and not response.etag:
                raise FileChanged("it is another file than before")
            # The same file, but all of it: this server ignores Range at times, or from now on.
            self._ignored_ranges += 1
            if self._ignored_ranges >= 3:
                raise RangesUnsupported("the storage sends no parts any more")
            raise TemporaryFault("the storage sent all instead of a part")
        self.is_confirmed = True

    def advance(self, byte_range: ByteRange, count: int) -> None:
        """The next `count` bytes of a range are on disk."""
        assert self.ranges is not None
        self.ranges.advance(byte_range, count)
        self.unsaved_bytes += count

    def end_at(self, byte_range: ByteRange) -> int:
        """The file ends where this range has come to. Returns its size."""
        assert self.ranges is not None
        if self.expected_size is not None and byte_range.left:
            raise TemporaryFault("it ended too early")
        self._is_size_unknown = False
        self.ranges.end_at(byte_range.start)
        return byte_range.start

    def check_size(self, size: int) -> None:
        """Raise ModelRejected if this cannot be the size of the file."""
        if size > self._max_size:
            raise ModelRejected(f"{self.label} is too large: {size:,} bytes, at most {self._max_size:,}")
        if size == 0:
            raise ModelRejected(f"{self.label} is empty")
        if self.expected_size is not None and size != self.expected_size:
            raise ModelRejected(f"{self.label} has {size:,} bytes instead of {self.expected_size:,}")


class LinkState:
    """The link that requests use, and how often one was refused."""

    def __init__(self, label: str, tuning: Tuning) -> None:
        self._label = label
        self._max_age = tuning.link_seconds
        self._max_refusals = tuning.link_renewals
        self.current: Link | None = None
        self.is_renewal_due = False
        self._refusals = 0
        self._misses = 0

    def renew(self, url: str, now: float) -> None:
        """Use another URL from now on."""
        number = self.current.number + 1 if self.current else 0
        self.current = Link(url, number, now)
        self.is_renewal_due = False

    def fresh(self, now: float) -> Link | None:
        """The link for another request. None if there is none; if it is too old, a new one is due."""
        if self.current is not None and now - self.current.created > self._max_age:
            self.is_renewal_due = True
            return None
        return self.current

    def redirect(self, link: Link, url: str) -> None:
        """A request with a link was answered from `url`: the next requests go there at once."""
        if self.current is link and link.url != url:
            self.current = replace(link, url=url)

    def refuse(self, link: Link, fault: RequestFault) -> None:
        """The storage refused a link: a new one is due. Raises ModelError if that happens too often."""
        if self.current is None or link.number != self.current.number:
            return  # an older link: the present one may be good
        if isinstance(fault, FileGone):
            self._misses += 1
            if self._misses > 1:
                raise ModelNotFound(f"{self._label} is gone from the storage") from fault
        else:
            self._refusals += 1
            if self._refusals > self._max_refusals:
                raise DownloadFailed(f"{self._label} cannot be downloaded: {fault}, and every new one too") from fault
        self.is_renewal_due = True


class RetryState:
    """Failures in a row, when to try again (`retry_at`), restarts, and a limit for a storage that is busy.

    Times are seconds of the caller's clock.
    """

    def __init__(self, tuning: Tuning) -> None:
        self._tuning = tuning
        self._backoff = Backoff(tuning.pause, tuning.pause_most)
        self.failures = 0
        self.retry_at = 0.0
        self.restart_reason: RequestFault | None = None
        self._restarts = 0
        self._cap = tuning.connections
        self._cap_until = 0.0

    def count_failure(self, now: float, pause: float = 0.0) -> bool:
        """Try again, after `pause` seconds at least. False if there were too many failures without progress.

        Connections that fail together are one failure.
        """
        if now >= self.retry_at:
            self.failures += 1
            self.retry_at = now + self._backoff.next_pause()
        self.retry_at = max(self.retry_at, now + pause)
        return self.failures < self._tuning.tries

    def count_progress(self) -> None:
        self.failures = 0
        self._backoff.reset()

    def cap_connections(self, count: int, now: float) -> None:
        """The storage is busy: use at most `count` connections for a while."""
        self._cap, self._cap_until = count, now + self._tuning.retune_seconds

    def max_connections(self, now: float) -> int:
        return self._cap if now < self._cap_until else self._tuning.connections

    def require_restart(self, reason: RequestFault) -> None:
        """The file changed, or the storage has no ranges: all connections must end, then it starts over."""
        self.restart_reason = reason
        self._restarts += 1

    def restart(self, label: str) -> RequestFault | None:
        """Start over. Returns why; raises DownloadFailed if that happens too often."""
        reason, self.restart_reason = self.restart_reason, None
        if self._restarts > self._tuning.restarts:
            raise DownloadFailed(f"{label} changed while it was downloaded ({reason})")
        return reason


class Throughput:
    """How fast the file comes, as last measured, and what follows from it."""

    def __init__(self, tuning: Tuning) -> None:
        self.rate = 0.0  # bytes a second, over all connections; 0: unknown
        self.min_steal_bytes = tuning.min_steal_bytes
        self._least_steal_bytes = tuning.min_steal_bytes

    def set_rate(self, rate: float, connections: int, answer_seconds: float) -> None:
        """Keep a measured rate. A stolen range should last at least twice as long as its request takes."""
        self.rate = rate
        each = rate / max(1, connections)
        self.min_steal_bytes = max(self._least_steal_bytes, int(each * max(0.1, 2 * answer_seconds)))

"""From a signed link to bytes on disk, at the line's rate: ranges over several connections, resumable at any byte.

`Downloader.fetch` gives a file's connections pieces of it in order; one that has nothing left to begin takes half of
the largest remainder. What a connection received counts, however it ended; what is on disk is remembered beside the
part (`part`), so that another process goes on where this one died. The SHA-256 is computed while the bytes arrive.

What an answer of the storage means, in one place: `judge`. What follows from it: `_Transfer.trouble`.

    200, 206          the bytes, if they are those of the same file (ETag, total size), whole and unpacked
    400, 401, 403     the link is old: another one is asked for, at most `renewals` times
    404, 410          once another link, then MODEL_NOT_FOUND
    416               another file than before: start over; for the first byte: the file is empty, or without ranges
    429, 503          too many connections: fewer of them, and a wait (Retry-After, within reason)
    408, 425, 5xx     tried again, with jitter, `tries` times without progress
    HTML, other size  MODEL_REJECTED
    anything else     DOWNLOAD_FAILED
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from a1111_worker.context import JobContext
from a1111_worker.errors import DownloadFailed, ModelError, ModelNotFound, ModelRejected
from a1111_worker.origins import OriginRefused
from a1111_worker.transfer.connection import (
    Body,
    Busy,
    Changed,
    Fault,
    Gone,
    Hiccup,
    Line,
    Link,
    LinkRefused,
    RangeRequest,
    Unranged,
)
from a1111_worker.transfer.egress import EgressPolicy
from a1111_worker.transfer.partial_file import PartialFile, PartialFileState, StreamingHasher
from a1111_worker.transfer.ranges import (
    ByteRange,
    ByteRanges,
    ConcurrencyTuner,
    Patience,
    Tuning,
    Want,
    longest_piece,
    piece_size,
    shares,
    too_slow,
)

log = logging.getLogger(__name__)

OnBytes = Callable[[int, "int | None"], None]
"""Gets the bytes on disk and the file's size (None: unknown), some four times a second, from one thread."""


@dataclass(frozen=True)
class Source:
    """A file to fetch. `label` is how messages and log lines name it.

    `link` returns a URL of the file's bytes, or raises one of our errors. It is called once a file, and again only if the
    last URL is old or was refused. `size` is exact, in bytes. `sha256` tells whether what an earlier download left is of
    the same file; the bytes are not judged by it. None: unknown.
    """

    label: str
    link: Callable[[], str]
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Fetched:
    """A part that is complete. `sha256` is what it has, judged by whoever knows what it should be."""

    size: int
    sha256: str
    received: int
    resumed: int
    connections: int
    seconds: float


class Downloader:
    """Fetches files for a whole worker: at most `tuning.connections` at once, shared by all that is being fetched."""

    def __init__(self, policy: EgressPolicy, tuning: Tuning | None = None) -> None:
        self._policy = policy
        self._tuning = tuning or Tuning()
        self._lock = threading.Lock()
        self._wants: dict[object, Want] = {}
        self._open = 0

    def fetch(
        self,
        source: Source,
        path: Path,
        context: JobContext,
        on_bytes: OnBytes | None = None,
    ) -> Fetched:
        """Have the file at `path`, complete, going on where an earlier download of the same file stopped.

        Files of a job that is next at the GPU go first. The part, and what is remembered of it beside it, stay on disk whatever happens; only where there was no room for a
        new part it is gone. Raises ModelError, or what `deadline` raises: every connection is closed and every thread
        has ended by then.
        """
        transfer = _Transfer(self, source, path, context, on_bytes)
        try:
            return transfer.run()
        except OriginRefused as error:
            raise ModelRejected(f"{source.label} is somewhere that may not be reached: {error}") from error
        finally:
            with self._lock:
                self._wants.pop(transfer, None)

    def allowed(self, transfer: object, want: Want) -> int:
        """How many connections a transfer may have now, of those it wants."""
        with self._lock:
            self._wants[transfer] = want
            given = shares(self._tuning.connections, list(self._wants.values()))
            return given[list(self._wants).index(transfer)]

    def acquire(self) -> bool:
        with self._lock:
            if self._open >= self._tuning.connections:
                return False
            self._open += 1
            return True

    def release(self) -> None:
        with self._lock:
            self._open -= 1


class _Transfer:
    """One file on its way. `run` is the thread of whoever asked; every connection is a `Line` with its own."""

    def __init__(
        self,
        downloader: Downloader,
        source: Source,
        path: Path,
        context: JobContext,
        on_bytes: OnBytes | None,
    ) -> None:
        self.policy = downloader._policy
        self.tuning = downloader._tuning
        self._downloader = downloader
        self._source = source
        self._path = path
        self._expected = source.size
        self._sha256 = source.sha256
        self._label = source.label
        self._is_next = context.is_next
        self._deadline = context.deadline
        self._on_bytes = on_bytes

        self._changed = threading.Condition()  # guards all below
        self.stopped = False
        self._failure: BaseException | None = None
        self._lines: list[Line] = []
        self._abandoned = False
        self._ranges: ByteRanges | None = None
        self._etag: str | None = None
        self._opened = False  # an answer of this run confirmed what the file is
        self._open_ended = False  # nobody said how long it is
        self._ranged = True
        self._restart: Fault | None = None
        self._restarts = 0
        self._ignored = 0
        self._link: Link | None = None
        self._renew = False
        self._refused = 0
        self._gone = 0
        self._patience = Patience(self.tuning.tries, self.tuning.pause, self.tuning.pause_most)
        self._ceiling = self.tuning.connections
        self._ceiling_until = 0.0
        self._growth: ConcurrencyTuner | None = None
        self._allowed = 1
        self._steal_least = self.tuning.steal_least
        self._rate = 0.0  # bytes a second, over all connections
        self._prover: StreamingHasher | None = None
        self._unsaved = 0
        self._received_before = 0  # by lines that have ended
        self._peak = 0

    # -- the asking thread

    def run(self) -> Fetched:
        began = time.monotonic()
        if self._expected is not None:
            self._refuse_size(self._expected)
        self.part = PartialFile(self._path)
        try:
            with self._deadline.on_cancel(self._stop):
                self._recall()
                resumed = self._done
                while True:
                    self._prover = StreamingHasher(self.part, self._front)
                    try:
                        self._receive()
                        sha256 = self._proof(self._prover)
                        break
                    except Changed:
                        if self._prover:
                            self._prover.stop()
                        self._start_over()
                        resumed = 0
        finally:
            self._close()
        assert self._ranges is not None
        seconds = time.monotonic() - began
        fetched = Fetched(self._ranges.size, sha256, self._received, resumed, self._peak, seconds)
        log.info(
            "%s: %.1f MB in %.1f s, %.0f MB/s over up to %d connections, %.1f MB were there",
            *(self._label, fetched.size / 1e6, seconds, fetched.received / 1e6 / max(seconds, 1e-3), self._peak),
            resumed / 1e6,
        )
        return fetched

    def _recall(self) -> None:
        memory = self.part.recall()
        if memory is None:
            return
        if (self._expected or memory.size) != memory.size or (self._sha256 or memory.sha256) != (
            memory.sha256 or self._sha256
        ):
            log.info("%s: what an earlier download left is of another file, it starts over", self._label)
            return
        ranges = ByteRanges(memory.size, memory.done)
        if not ranges.left and not (self._expected or self._sha256):
            return  # complete, but of what? No answer will tell.
        self._ranges, self._etag = ranges, memory.etag
        self.part.settle(memory.size)

    def _receive(self) -> None:
        """Have all bytes on disk. Raises Changed when it must start over."""
        if self._complete():
            return
        if self._link is None:
            self._ask_link(renew=False)
        watch = _Watch(self)
        while True:
            with self._changed:
                self._check()
                if self._restart and not self._lines:
                    raise Changed(str(self._restart)) from None
                if self._complete() and not self._lines:
                    break
                renew = self._renew and not self._restart
                if not renew:
                    self._man()
            if renew:
                self._ask_link(renew=True)
                continue
            watch.look()
            with self._changed:
                # Only what a line has not told of since is waited for: it notifies under this lock.
                if not (self._failure or self.stopped or (self._complete() and not self._lines)):
                    self._changed.wait(min(self.tuning.tick, self._deadline.remaining()))
        watch.report(last=True)
        self._remember()

    def _check(self) -> None:
        if self._failure:
            raise self._failure
        self._deadline.check()

    def _man(self) -> None:
        """Have as many connections as are allowed and useful."""
        now = time.monotonic()
        if now >= self._ceiling_until:
            self._ceiling = self.tuning.connections
        want, useful = self._want(now)
        foreground = self._is_next()
        self._allowed = self._downloader.allowed(self, Want(want, foreground))
        # Another file needs the connections now, not at the end of their pieces, which may be minutes away.
        for line in self._lines[max(self._allowed, int(foreground)) :]:
            line.retire = True
        if self._restart or now < self._patience.until:
            return
        while len(self._lines) < min(self._allowed, useful) and self._downloader.acquire():
            line = Line(self)
            self._lines.append(line)
            self._peak = max(self._peak, len(self._lines))
            line.start()

    def _want(self, now: float) -> tuple[int, int]:
        """How many connections it would like to have, and how many of them can be busy at this moment."""
        tuning = self.tuning
        if self._ranges is None or not self._opened:
            guess = self._ranges.left if self._ranges else self._expected
            return min(self._ceiling, _lines_at_start(guess, tuning)), 1
        if not self._ranged:
            return 1, 1
        if self._growth is None:
            most = max(1, min(tuning.connections, self._ranges.left // (tuning.small // 2)))
            start = _lines_at_start(self._ranges.left, tuning)
            self._growth = ConcurrencyTuner(
                start, most if start > 2 else start, settle=tuning.settle, again=tuning.grow_again
            )
        flowing = sum(1 for line in self._lines if line.received)
        lines = min(self._growth.observe(now, self._received, flowing), self._ceiling)
        useful = min(lines, self._ranges.useful(max(tuning.piece_least, self._steal_least)))
        return useful, useful

    def _ask_link(self, *, renew: bool) -> None:
        url = self._source.link()
        origin = self.policy.check(url)
        with self._changed:
            number = self._link.number + 1 if self._link else 0
            self._link = Link(url, number, time.monotonic())
            self._renew = False
        if renew:
            log.info("%s: a new link, at %s", self._label, origin)

    def _start_over(self) -> None:
        with self._changed:
            if self._restarts > self.tuning.restarts:
                raise DownloadFailed(f"{self._label} changed while it was downloaded ({self._restart})")
            log.warning("%s: %s, it starts over", self._label, self._restart)
            self._restart = None
            self._ranges = self._etag = self._growth = None
            self._opened = self._open_ended = False
            self._unsaved = 0
            self.part.forget()

    def _proof(self, prover: StreamingHasher) -> str:
        prover.wake()
        while not prover.done.wait(min(self.tuning.tick, self._deadline.remaining())):
            self._check()
        self._check()
        if prover.sha256 is None:
            raise DownloadFailed(f"{self._label} cannot be read back from the volume") from prover.error
        return prover.sha256

    def _stop(self) -> None:
        """Unblock every thread; none begins anything any more."""
        with self._changed:
            self.stopped = True
            for line in self._lines:
                line.abort()
            self._changed.notify_all()

    def _close(self) -> None:
        self._stop()
        until = time.monotonic() + 0.8
        ended = self._prover is None or self._prover.stop(0.8)
        for line in list(self._lines):
            line.join(max(0.0, until - time.monotonic()))
        with self._changed:
            # A thread may hang in a name server or in a volume that does not answer: it must never write to a file
            # number that is another file's by then, so the last one out closes it.
            self._abandoned = bool(self._lines)
        if self._abandoned or not ended:
            log.warning("%s: a thread of its download is still blocked", self._label)
        if not self._complete() or self._unsaved:
            self._remember()
        if not self._abandoned and ended:
            self.part.close()

    def _remember(self) -> None:
        with self._changed:
            if self._ranges is None or not self._ranged or self._open_ended:
                return
            self._unsaved = 0
            memory = PartialFileState(self._ranges.size, self._etag, self._sha256, tuple(self._ranges.done()))
        self.part.remember(memory)

    @property
    def _done(self) -> int:
        return self._ranges.size - self._ranges.left if self._ranges else 0

    def _complete(self) -> bool:
        return self._ranges is not None and not self._ranges.left

    @property
    def _received(self) -> int:
        return self._received_before + sum(line.received for line in self._lines)

    def _front(self) -> tuple[int, bool]:
        with self._changed:
            return (self._ranges.front, not self._ranges.left) if self._ranges else (0, False)

    # -- the connections' threads

    def next_errand(self, line: Line) -> RangeRequest | None:
        """What a connection does next; None when it should end."""
        with self._changed:
            if self._idle(line) or self._link is None:
                return None
            if time.monotonic() - self._link.born > self.tuning.link_age:
                self._renew = True
                return None
            if not self._ranged:
                return RangeRequest(None, self._link, None) if self._lines[0] is line else None
            if self._ranges is None:
                first = piece_size(self._expected or 0, self.tuning.start, self.tuning.small, self.tuning.piece_most)
                return RangeRequest(ByteRange(0, first), self._link, None)
            span = self._ranges.take(self._piece(self._ranges)) or self._ranges.steal(self._steal_least)
            return RangeRequest(span, self._link, self._etag) if span else None

    def _piece(self, ranges: ByteRanges) -> int:
        least, most = self.tuning.piece_least, self.tuning.piece_most
        lines = max(len(self._lines), min(self._allowed, self.tuning.start))
        if self._prover:
            backlog = ranges.front - self._prover.at
            most = longest_piece(backlog, self._prover.speed, self._rate, lines, least, most)
        return piece_size(ranges.free, lines, least, most)

    def _idle(self, line: Line) -> bool:
        return bool(
            self.stopped
            or self._failure
            or self._restart
            or self._renew
            or line.retire
            or self._complete()
            or len(self._lines) > max(1, self._allowed)
        )

    def admit(self, errand: RangeRequest, body: Body, url: str) -> ByteRange:
        """Take in what an answer says of the file; returns the span that its bytes fill."""
        total = body.total
        if body.ranged and total is None:
            if self._expected is None:
                raise Unranged("the storage does not say how long it is")
            total = self._expected
        with self._changed:
            if self.stopped:
                raise Hiccup("stopped")
            if self._link is errand.link and url != self._link.url:
                self._link = Link(url, self._link.number, self._link.born)  # where its redirects lead
            if self._ranges is not None and errand.span is not None:
                self._confirm(body, total)
                self._opened = True
                return errand.span
        return self._open(body, total)

    def _confirm(self, body: Body, total: int | None) -> None:
        assert self._ranges is not None
        if total != self._ranges.size or (self._etag and body.etag and body.etag != self._etag):
            raise Changed("it is another file than before")
        if body.ranged:
            return
        if self._etag and not body.etag:
            raise Changed("it is another file than before")
        # The same file, and yet all of it: this server forgets Range at times, or for good.
        self._ignored += 1
        if self._ignored >= 3:
            raise Unranged("the storage sends no parts any more")
        raise Hiccup("the storage sent all instead of a part")

    def _open(self, body: Body, total: int | None) -> ByteRange:
        """The first answer of a download: what it is, and room for it."""
        if total is not None:
            self._refuse_size(total)
        size = total if total is not None else (self._expected or self.tuning.max_size)
        if total is not None or self._expected is not None:
            self._settle(size)
        ranges = ByteRanges(size)
        with self._changed:
            self._ranges, self._etag, self._ranged = ranges, body.etag, body.ranged
            self._open_ended = total is None
            self._opened = True
            span = ranges.take(size if body.end is None else body.end)
            self._changed.notify_all()
        assert span is not None
        return span

    def _settle(self, size: int) -> None:
        try:
            self.part.settle(size)
        except ModelError:
            self._path.unlink(missing_ok=True)
            raise

    def _refuse_size(self, size: int) -> None:
        if size > self.tuning.max_size:
            raise ModelRejected(f"{self._label} is too large: {size:,} bytes, at most {self.tuning.max_size:,}")
        if size == 0:
            raise ModelRejected(f"{self._label} is empty")
        if self._expected is not None and size != self._expected:
            raise ModelRejected(f"{self._label} has {size:,} bytes where it should have {self._expected:,}")

    def write(self, span: ByteRange, view: memoryview, *, steady: bool) -> None:
        """The next bytes of a span; `steady` when that they came is worth new patience."""
        count = len(view)
        self.part.write(view, span.at)
        with self._changed:
            assert self._ranges is not None
            self._ranges.advance(span, count)
            self._unsaved += count
            if steady and self._ranged:
                self._patience.progressed()
            if self._unsaved >= self.tuning.remember_bytes or not self._ranges.left:
                self._changed.notify_all()

    def ended(self, span: ByteRange) -> None:
        """An answer without a length ended: so does the file, unless it is known to be longer."""
        with self._changed:
            assert self._ranges is not None
            if self._expected is not None and span.left:
                raise Hiccup("it ended too early")
            self._open_ended = False
            size = span.at
            self._ranges.close(size)
        self._refuse_size(size)
        self.part.truncate(size)

    def trouble(self, line: Line, errand: RangeRequest, fault: Fault) -> None:
        """What follows from an answer that is none: policy, and its limits."""
        now = time.monotonic()
        with self._changed:
            if self.stopped or self._failure or self._restart:
                return
            others = [other for other in self._lines if other is not line and other.flowing]
            log.debug("%s: %s", self._label, fault)
            if isinstance(fault, Changed):
                self._begin_restart(fault)
            elif isinstance(fault, Unranged):
                self._ranged = False
                if self._ranges is not None:
                    self._begin_restart(fault)
            elif isinstance(fault, (LinkRefused, Gone)):
                self._link_trouble(errand, fault)
            elif isinstance(fault, Busy) and others:
                self._ceiling, self._ceiling_until = len(others), now + self.tuning.grow_again
            else:
                wait = min(fault.retry_after, self.tuning.retry_after_most) if isinstance(fault, Busy) else 0.0
                if not self._ranged and self._ranges is not None:
                    self._restart = fault  # without ranges nothing can be gone on with
                elif line.steady and not wait:
                    return
                if not self._patience.failed(now, wait):
                    self.fail(DownloadFailed(f"{self._label} cannot be downloaded: {fault}"))

    def _begin_restart(self, fault: Fault) -> None:
        self._restart = fault
        self._restarts += 1
        for line in self._lines:
            line.abort()

    def _link_trouble(self, errand: RangeRequest, fault: Fault) -> None:
        if self._link is None or errand.link.number != self._link.number:
            return  # refused with the link before the last one: the last one may be good
        if isinstance(fault, Gone):
            self._gone += 1
            if self._gone > 1:
                self.fail(ModelNotFound(f"{self._label} is gone from the storage"))
        else:
            self._refused += 1
            if self._refused > self.tuning.renewals:
                self.fail(DownloadFailed(f"{self._label} cannot be downloaded: {fault}, and every new one too"))
        self._renew = True

    def fail(self, error: BaseException) -> None:
        if isinstance(error, ModelError) and self._label not in error.message:
            error = type(error)(f"{self._label}: {error.message}", hint=error.hint)
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def release(self, span: ByteRange) -> None:
        with self._changed:
            if self._ranges is not None:
                self._ranges.release(span)

    def leave(self, line: Line) -> None:
        with self._changed:
            self._lines.remove(line)
            self._received_before += line.received
            self._changed.notify_all()
            last = self._abandoned and not self._lines
        self._downloader.release()
        if last:
            self.part.close()


def _lines_at_start(size: int | None, tuning: Tuning) -> int:
    if size is None or size > 4 * tuning.small:
        return tuning.start
    return 1 if size <= tuning.small else 2


class _Watch:
    """What the asking thread looks at between waits: slow connections, a file that stands still, and who is told."""

    def __init__(self, transfer: _Transfer) -> None:
        now = time.monotonic()
        self._transfer = transfer
        self._rate_mark, self._rate_lines = (now, 0), 0
        self._progress_mark = now - 1
        self._save_mark = now
        self._patience_mark = (now, transfer._received)
        self._tenth = -1

    def look(self) -> None:
        transfer, tuning, now = self._transfer, self._transfer.tuning, time.monotonic()
        with transfer._changed:
            self._replace_slow(now)
            self._measure(now)
            self._give_up(now)
            unsaved = transfer._unsaved
        if unsaved >= tuning.remember_bytes or (unsaved and now - self._save_mark >= tuning.remember_seconds):
            self._save_mark = now
            transfer._remember()
        if now - self._progress_mark >= 0.25:
            self._progress_mark = now
            self.report()

    def _replace_slow(self, now: float) -> None:
        tuning = self._transfer.tuning
        old = [line for line in self._transfer._lines if now - line.mark[0] >= tuning.stall_seconds]
        speeds = [(line.received - line.mark[1]) / (now - line.mark[0]) for line in old]
        for line, slow, speed in zip(old, too_slow(speeds, tuning.min_speed), speeds, strict=True):
            line.mark = (now, line.received)
            if slow:
                log.warning("%s: a connection at %.0f kB/s is replaced", self._transfer._label, speed / 1e3)
                line.abort()

    def _measure(self, now: float) -> None:
        """The rate, and what half of a remainder is worth a new request: one that lasts twice as long as that takes."""
        transfer = self._transfer
        began, before = self._rate_mark
        flowing = sum(1 for line in transfer._lines if line.received)
        if flowing > self._rate_lines:
            transfer._rate = 0.0  # more are at work than were measured
        elif now - began >= 0.25:
            transfer._rate = (transfer._received - before) / (now - began)
            per_line = transfer._rate / max(1, len(transfer._lines))
            request = max((line.first_byte for line in transfer._lines), default=0.0)
            transfer._steal_least = max(transfer.tuning.steal_least, int(per_line * max(0.1, 2 * request)))
        else:
            return
        self._rate_mark, self._rate_lines = (now, transfer._received), flowing

    def _give_up(self, now: float) -> None:
        transfer, tuning = self._transfer, self._transfer.tuning
        began, before = self._patience_mark
        if not transfer._allowed or transfer._complete():  # it waits for its turn, or for nothing
            self._patience_mark = (now, transfer._received)
        elif now - began >= tuning.patience_seconds:
            if transfer._received - before < tuning.min_speed * (now - began):
                transfer._failure = transfer._failure or DownloadFailed(
                    f"{transfer._label} cannot be downloaded: {(transfer._received - before) / 1e3:,.0f} kB came "
                    f"in {now - began:.3g} s"
                )
            self._patience_mark = (now, transfer._received)

    def report(self, *, last: bool = False) -> None:
        transfer = self._transfer
        with transfer._changed:
            done, ranges = transfer._done, transfer._ranges
            total = None if ranges is None or transfer._open_ended else ranges.size
            lines, link, received = len(transfer._lines), transfer._link, transfer._received
        if ranges is not None and total:
            tenth = done * 10 // total
            if self._tenth < 0 and link:
                origin = self._transfer.policy.check(link.url)
                log.info("%s: %.1f MB from %s, %.1f MB are there", transfer._label, total / 1e6, origin, done / 1e6)
            elif tenth > self._tenth and tenth < 10:
                log.info("%s: %d %%, %.1f MB so far over %d", transfer._label, tenth * 10, received / 1e6, lines)
            self._tenth = max(tenth, self._tenth)
        if transfer._on_bytes and (last or ranges is not None):
            try:
                transfer._on_bytes(done, total)
            except Exception:
                log.exception("%s: its progress could not be told", transfer._label)

"""Which bytes of a file are there, which are on their way, who fetches what next, and how many may: bookkeeping alone.

No clock, no lock, no I/O: `download` holds a lock around these and carries out what they say.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

MiB = 1024 * 1024


@dataclass(frozen=True)
class Tuning:
    """How the engine behaves; the defaults are what was measured to be best (python -m benchmarks.download)."""

    connections: int = 16  # of all files together
    start: int = 8  # connections of a large file to begin with; more while that makes it faster
    piece_least: int = 8 * MiB  # one request asks for at least this much, where there is as much
    piece_most: int = 64 * MiB
    steal_least: int = MiB  # no half of a remainder is smaller
    small: int = 16 * MiB  # a file up to this size: one connection; up to four times this size: two
    buffer: int = MiB  # of each connection
    flush: int = 512 * 1024  # written when this much has come
    remember_bytes: int = 16 * MiB  # what a crash may cost, beside what is in the buffers
    remember_seconds: float = 1.0
    max_size: int = 64 * 1024 * MiB
    connect_seconds: float = 10.0
    stall_seconds: float = 15.0  # a connection that is silent or too slow for so long is replaced
    min_speed: float = 100_000.0  # bytes a second of the whole file
    patience_seconds: float = 60.0  # a file that gets less than that for so long has failed
    tries: int = 8  # failures in a row without progress
    pause: float = 0.2
    pause_most: float = 10.0
    retry_after_most: float = 30.0
    link_age: float = 50 * 60.0  # the shortest-lived links known live 3600 s (Backblaze)
    renewals: int = 3
    restarts: int = 3  # the file changed while it was fetched
    settle: float = 0.1  # how long a number of connections is measured; one that is tried out, four times as long
    grow_again: float = 15.0
    tick: float = 0.03
    max_hops: int = 5


@dataclass(eq=False)
class ByteRange:
    """Bytes that are missing, from `at` to before `end`; `taken` while a connection fetches them."""

    at: int
    end: int
    taken: bool = False

    @property
    def left(self) -> int:
        return self.end - self.at


class ByteRanges:
    """A file of `size` bytes as the list of what is missing, in order."""

    def __init__(self, size: int, done: Iterable[tuple[int, int]] = ()) -> None:
        self.size = size
        self._missing: list[ByteRange] = []
        position = 0
        for start, end in [*sorted(done), (size, size)]:
            if start > position:
                self._missing.append(ByteRange(position, start))
            position = max(position, end)
        self.left = sum(span.left for span in self._missing)

    @property
    def front(self) -> int:
        """The file is there without a gap up to here."""
        return self._missing[0].at if self._missing else self.size

    @property
    def free(self) -> int:
        """Missing bytes that nobody fetches."""
        return sum(span.left for span in self._missing if not span.taken)

    def done(self) -> list[tuple[int, int]]:
        """What is there, as (start, end) in order."""
        edges = [0, *(edge for span in self._missing for edge in (span.at, span.end)), self.size]
        return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]

    def take(self, piece: int) -> ByteRange | None:
        """The first `piece` bytes that nobody fetches, now the caller's. In order, so that the front moves on."""
        for index, span in enumerate(self._missing):
            if span.taken:
                continue
            if span.left <= piece + piece // 4:  # no crumbs
                span.taken = True
                return span
            mine = ByteRange(span.at, span.at + piece, taken=True)
            span.at = mine.end
            self._missing.insert(index, mine)
            return mine
        return None

    def steal(self, least: int) -> ByteRange | None:
        """The second half of the largest remainder that somebody fetches, if both halves have `least` bytes."""
        taken = [index for index, span in enumerate(self._missing) if span.taken]
        index = max(taken, key=lambda index: self._missing[index].left, default=None)
        if index is None or self._missing[index].left < 2 * least:
            return None
        victim = self._missing[index]
        mine = ByteRange(victim.at + (victim.left + 1) // 2, victim.end, taken=True)
        victim.end = mine.at
        self._missing.insert(index + 1, mine)
        return mine

    def advance(self, span: ByteRange, count: int) -> None:
        """The first `count` bytes of a span are on disk (more than it still has, where half of it was taken away)."""
        count = min(count, span.left)
        span.at += count
        self.left -= count
        if not span.left and span in self._missing:
            self._missing.remove(span)

    def release(self, span: ByteRange) -> None:
        """Whoever fetched it does not any more: what is left of it is free."""
        if not span.left or span not in self._missing:
            return
        span.taken = False
        index = self._missing.index(span)
        for neighbour, first, second in ((index + 1, index, index + 1), (index - 1, index - 1, index)):
            if not 0 <= neighbour < len(self._missing):
                continue
            before, after = self._missing[first], self._missing[second]
            if not before.taken and not after.taken and before.end == after.at:
                before.end = after.end
                del self._missing[second]

    def close(self, size: int) -> None:
        """The file turned out to end here (nobody said so before)."""
        self._missing = [span for span in self._missing if span.at < size]
        for span in self._missing:
            span.end = min(span.end, size)
        self.size = size
        self.left = sum(span.left for span in self._missing)

    def useful(self, least: int) -> int:
        """How many connections could be busy at once, counting those that are."""
        busy = [span.left for span in self._missing if span.taken]
        free = self.free
        return len(busy) + (-(-free // least) if free else sum(left // (2 * least) for left in busy))


def piece_size(free: int, lines: int, least: int, most: int) -> int:
    """How much one request asks for: large at first, so that requests are few, ever smaller towards the end of the
    file, so that all connections end together and the front (which is hashed) is never far behind."""
    fair = free // max(lines, 1)
    return max(least, min(most, fair - fair % MiB))


def longest_piece(backlog: int, hash_speed: float, rate: float, lines: int, least: int, most: int) -> int:
    """How large a piece may be so that the hash is not kept waiting for it at the front.

    `backlog` bytes are there and not hashed yet. A hash twice as fast as the line catches up whatever the pieces are;
    a slower one never does, so a piece should last no longer than it has work.
    """
    if not rate or not hash_speed:
        return least
    if hash_speed >= 2 * rate:
        return most
    return max(least, min(most, int(backlog * rate / max(lines, 1) / hash_speed)))


@dataclass(frozen=True)
class Want:
    """How many connections a file could use now; those of a foreground job go first."""

    lines: int
    foreground: bool


def shares(limit: int, wants: Sequence[Want]) -> list[int]:
    """How many connections each file gets of `limit`: equal parts, what one does not want going to the others."""
    given = [0] * len(wants)
    for foreground in (True, False):
        hungry = [i for i, want in enumerate(wants) if want.foreground is foreground and want.lines > 0]
        while hungry and limit > 0:
            part = max(1, limit // len(hungry))
            for i in hungry[:limit]:
                more = min(part, wants[i].lines - given[i])
                given[i] += more
                limit -= more
            hungry = [i for i in hungry if given[i] < wants[i].lines]
    return given


class ConcurrencyTuner:
    """How many connections one file should have: more only while more make it faster.

    It starts with `start`. When they have all flowed for `settle` seconds it tries twice as many, and goes back when
    these, in four times as long, do not bring `gain` times the rate; a connection that brings `plenty` bytes a second
    on its own needs no help. It tries again every `again` seconds, since lines change.
    """

    def __init__(
        self,
        start: int,
        most: int,
        *,
        settle: float = 0.1,
        again: float = 15.0,
        gain: float = 1.15,
        plenty: float = 60e6,
    ) -> None:
        self.lines = min(start, most)
        self._most = most
        self._settle = settle
        self._again = again
        self._gain = gain
        self._plenty = plenty
        self._before: tuple[int, float] | None = None  # lines and rate before the trial that runs
        self._since: tuple[float, int] | None = None  # when this measurement began, and the bytes then
        self._rest_until = 0.0

    def observe(self, now: float, received: int, flowing: int) -> int:
        """Take in how much was received so far by how many connections; returns how many there should be."""
        if now < self._rest_until or flowing < self.lines:
            self._since = None
            return self.lines
        if self._since is None:
            self._since = (now, received)
        began, bytes_then = self._since
        if now - began < self._settle * (4 if self._before else 1) or now == began:
            return self.lines
        rate = (received - bytes_then) / (now - began)
        self._since = None
        if self._before and rate < self._before[1] * self._gain:
            self.lines = self._before[0]
            self._rest(now)
        elif self.lines < self._most and rate / self.lines < self._plenty:
            self._before = (self.lines, rate)
            self.lines = min(self._most, self.lines * 2)
        else:
            self._rest(now)
        return self.lines

    def _rest(self, now: float) -> None:
        self._before = None
        self._rest_until = now + self._again


@dataclass
class Patience:
    """How often to try again, and after how long: decorrelated jitter, forgotten as soon as there is progress.

    Connections that fail together are one failure.
    """

    tries: int = 8
    base: float = 0.2
    most: float = 10.0
    failures: int = 0
    until: float = 0.0
    _last: float = field(default=0.0, repr=False)

    def failed(self, now: float, at_least: float = 0.0) -> bool:
        """Take in a failure; `until` says when to try again. False when it was one too many."""
        if now >= self.until:
            self.failures += 1
            self._last = min(self.most, random.uniform(self.base, max(self.base, self._last) * 3))
            self.until = now + self._last
        self.until = max(self.until, now + at_least)
        return self.failures < self.tries

    def progressed(self) -> None:
        self.failures = 0
        self._last = 0.0


def too_slow(speeds: Sequence[float], least: float, fraction: float = 0.1) -> list[bool]:
    """Which connections to replace: below their part of `least` bytes a second, or a `fraction` of the median."""
    if not speeds:
        return []
    limit = least / len(speeds)
    if len(speeds) >= 3:
        limit = max(limit, fraction * median(speeds))
    return [speed < limit for speed in speeds]

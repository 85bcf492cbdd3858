"""Which bytes of a file are missing, which of them are being requested, and how much the next request asks for.

Bookkeeping alone: no clock, no lock, no I/O. `state` holds a lock around these objects.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

MiB = 1024 * 1024


@dataclass(frozen=True)
class Tuning:
    """How the engine behaves; the defaults are what was measured to be best (python -m benchmarks.download)."""

    connections: int = 16  # of all files together
    start_connections: int = 8  # of a large file at first; it gets more if that makes it faster
    min_range_bytes: int = 8 * MiB  # one request asks for at least this much, if so much is missing
    max_range_bytes: int = 64 * MiB
    min_steal_bytes: int = MiB  # no half of a remainder is smaller
    small_file_bytes: int = 16 * MiB  # a file up to this size: one connection; up to four times this size: two
    buffer_bytes: int = MiB  # of each connection
    flush_bytes: int = 512 * 1024  # bytes are written when so many have come
    remember_bytes: int = 16 * MiB  # how many bytes a crash may cost, beside those in the buffers
    remember_seconds: float = 1.0
    max_file_bytes: int = 64 * 1024 * MiB
    connect_seconds: float = 10.0
    stall_seconds: float = 15.0  # a connection that is silent or too slow for so long is replaced
    min_speed: float = 100_000.0  # bytes a second of the whole file
    patience_seconds: float = 60.0  # a file that gets less than that for so long has failed
    longest_step: float = 1.0  # a process that did not run for longer was stopped: it counts as so many seconds
    tries: int = 8  # failures in a row without progress
    pause: float = 0.2  # seconds before another try, at first
    pause_most: float = 10.0
    retry_after_most: float = 30.0
    link_seconds: float = 50 * 60.0  # how long a link is used; the shortest-lived links known live 3600 s (Backblaze)
    link_renewals: int = 3
    restarts: int = 3  # how often a file may change while it is fetched
    measure_seconds: float = 0.1  # how long a number of connections is measured; a trial, four times as long
    retune_seconds: float = 15.0  # after that more connections are tried again
    poll_seconds: float = 0.03


@dataclass(eq=False)
class ByteRange:
    """Missing bytes, from `start` to before `end`. `is_claimed` while a connection fetches them; then `start` moves."""

    start: int
    end: int
    is_claimed: bool = False

    @property
    def left(self) -> int:
        return self.end - self.start


class ByteRanges:
    """A file of `size` bytes as the list of its missing ranges, in order. `left` counts their bytes."""

    def __init__(self, size: int, done: Iterable[tuple[int, int]] = ()) -> None:
        self.size = size
        self._missing: list[ByteRange] = []
        position = 0
        for start, end in [*sorted(done), (size, size)]:
            if start > position:
                self._missing.append(ByteRange(position, start))
            position = max(position, end)
        self.left = sum(missing.left for missing in self._missing)

    @property
    def contiguous(self) -> int:
        """How many bytes are there from the file's beginning, without a gap."""
        return self._missing[0].start if self._missing else self.size

    @property
    def unclaimed(self) -> int:
        """Missing bytes that no connection fetches."""
        return sum(missing.left for missing in self._missing if not missing.is_claimed)

    def done(self) -> list[tuple[int, int]]:
        """The bytes that are there, as (start, end) in order."""
        edges = [0, *(edge for missing in self._missing for edge in (missing.start, missing.end)), self.size]
        return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]

    def claim(self, size: int) -> ByteRange | None:
        """The first `size` unclaimed bytes, now the caller's. In order, so that the file grows without gaps.

        A range that would leave less than a quarter of `size` behind is claimed as a whole.
        """
        for index, missing in enumerate(self._missing):
            if missing.is_claimed:
                continue
            if missing.left <= size + size // 4:
                missing.is_claimed = True
                return missing
            claimed = ByteRange(missing.start, missing.start + size, is_claimed=True)
            missing.start = claimed.end
            self._missing.insert(index, claimed)
            return claimed
        return None

    def steal(self, least: int) -> ByteRange | None:
        """The second half of the largest claimed remainder, if both halves have at least `least` bytes."""
        claimed = [index for index, missing in enumerate(self._missing) if missing.is_claimed]
        index = max(claimed, key=lambda index: self._missing[index].left, default=None)
        if index is None or self._missing[index].left < 2 * least:
            return None
        victim = self._missing[index]
        stolen = ByteRange(victim.start + (victim.left + 1) // 2, victim.end, is_claimed=True)
        victim.end = stolen.start
        self._missing.insert(index + 1, stolen)
        return stolen

    def advance(self, byte_range: ByteRange, count: int) -> None:
        """The first `count` bytes of a range are on disk (more than it still has, if half of it was stolen)."""
        count = min(count, byte_range.left)
        byte_range.start += count
        self.left -= count
        if not byte_range.left and byte_range in self._missing:
            self._missing.remove(byte_range)

    def release(self, byte_range: ByteRange) -> None:
        """Its connection does not fetch it any more: what is left of it is unclaimed again."""
        if not byte_range.left or byte_range not in self._missing:
            return
        byte_range.is_claimed = False
        index = self._missing.index(byte_range)
        for neighbour, first, second in ((index + 1, index, index + 1), (index - 1, index - 1, index)):
            if not 0 <= neighbour < len(self._missing):
                continue
            before, after = self._missing[first], self._missing[second]
            if not before.is_claimed and not after.is_claimed and before.end == after.start:
                before.end = after.end
                del self._missing[second]

    def end_at(self, size: int) -> None:
        """The file turned out to end here; its size was not known before."""
        self._missing = [missing for missing in self._missing if missing.start < size]
        for missing in self._missing:
            missing.end = min(missing.end, size)
        self.size = size
        self.left = sum(missing.left for missing in self._missing)

    def useful_connections(self, least: int) -> int:
        """How many connections could be busy at once with ranges of `least` bytes, counting those that are busy."""
        claimed = [missing.left for missing in self._missing if missing.is_claimed]
        unclaimed = self.unclaimed
        more = -(-unclaimed // least) if unclaimed else sum(left // (2 * least) for left in claimed)
        return len(claimed) + more


def range_size(unclaimed: int, connections: int, least: int, most: float) -> int:
    """How many bytes one request asks for, of so many `unclaimed` ones: between `least` and `most`.

    Many at first, so that requests are few. Ever fewer towards the end of the file, so that all connections end
    together, and the bytes without a gap (which are hashed) are never far behind.
    """
    fair = unclaimed // max(connections, 1)
    return max(least, int(min(most, fair - fair % MiB)))


def longest_range(backlog: int, hash_speed: float, rate: float, connections: int) -> float:
    """How many bytes a range may have so that the hash never waits for the first missing byte.

    `backlog` bytes are there and not hashed yet; speeds are in bytes a second, 0 if unknown. If one is unknown, no
    range is short enough. A hash twice as fast as the download catches up whatever the ranges are. A slower one never
    does, so a range should last no longer than the hash has work.
    """
    if not rate or not hash_speed:
        return 0
    if hash_speed >= 2 * rate:
        return math.inf
    return backlog * rate / max(connections, 1) / hash_speed

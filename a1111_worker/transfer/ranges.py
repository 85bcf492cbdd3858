"""Which bytes of a file are missing, which of them are being requested, and how much the next request asks for.

Bookkeeping alone: no clock, no lock, no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MiB = 1024 * 1024


@dataclass(frozen=True)
class Tuning:
    """How the engine behaves; the defaults are what was measured to be best (python -m benchmarks.ablation)."""

    connections: int = 16  # of all files together
    min_range_bytes: int = 4 * MiB  # a connection is opened for so many missing bytes, not for fewer
    max_range_bytes: int = 64 * MiB  # of one request
    min_steal_bytes: int = 256 * 1024  # of a range that is requested already, no smaller part is requested again
    far_behind: float = 8.0  # times as slow as an idle connection: it loses all of its range
    buffer_bytes: int = 512 * 1024  # of each connection: bytes are written when so many have come
    remember_bytes: int = 16 * MiB  # how many bytes a crash may cost, beside those in the buffers
    remember_seconds: float = 1.0
    max_file_bytes: int = 64 * 1024 * MiB
    connect_seconds: float = 10.0
    stall_seconds: float = 15.0  # a connection that is silent for so long is replaced
    min_speed: float = 100_000.0  # bytes a second of the whole file
    patience_seconds: float = 60.0  # a file that gets less than that for so long has failed
    longest_step: float = 1.0  # a process that did not run for longer was stopped: it counts as so many seconds
    tries: int = 8  # failures in a row without progress
    pause: float = 0.2  # seconds before another try, at first
    pause_most: float = 10.0
    retry_after_most: float = 30.0
    busy_seconds: float = 15.0  # a storage that was busy is asked over fewer connections for so long
    link_seconds: float = 50 * 60.0  # how long a link is used; the shortest-lived links known live 3600 s (Backblaze)
    link_renewals: int = 3
    restarts: int = 3  # how often a file may change while it is fetched
    poll_seconds: float = 0.03


@dataclass(eq=False)
class ByteRange:
    """Missing bytes, from `start` to before `end`. `is_claimed` while a connection fetches them.

    The thread of that connection alone moves `start`, after the bytes are on disk. Everything else about ranges is for
    one other thread. It may move `end` at any time. Bytes that were on their way by then are written twice, the same.
    """

    start: int
    end: int
    is_claimed: bool = False

    @property
    def left(self) -> int:
        return max(0, self.end - self.start)


class ByteRanges:
    """A file of `size` bytes as the list of its missing ranges, in order."""

    def __init__(self, size: int, done: Iterable[tuple[int, int]] = ()) -> None:
        self.size = size
        self._missing: list[ByteRange] = []
        position = 0
        for start, end in [*sorted(done), (size, size)]:
            if start > position:
                self._missing.append(ByteRange(position, start))
            position = max(position, end)

    @property
    def left(self) -> int:
        """Missing bytes."""
        return sum(missing.left for missing in self._missing)

    @property
    def unclaimed(self) -> int:
        """Missing bytes that no connection fetches."""
        return sum(missing.left for missing in self._missing if not missing.is_claimed)

    @property
    def contiguous(self) -> int:
        """How many bytes are there from the file's beginning, without a gap."""
        return next((missing.start for missing in self._missing if missing.left), self.size)

    def done(self) -> list[tuple[int, int]]:
        """The bytes that are there, as (start, end) in order."""
        gaps = [(missing.start, missing.end) for missing in self._missing if missing.start < missing.end]
        edges = [0, *(edge for gap in gaps for edge in gap), self.size]
        return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]

    def claim(self, size: int) -> ByteRange | None:
        """The first `size` unclaimed bytes, now the caller's. In order, so that the file grows without gaps.

        A range that would leave less than a quarter of `size` behind is claimed as a whole.
        """
        found = next((missing for missing in self._missing if not missing.is_claimed), None)
        if found is not None:
            if found.left > size + size // 4:
                self._insert_after(found, ByteRange(found.start + size, found.end))
                found.end = found.start + size
            found.is_claimed = True
        return found

    def steal(self, victim: ByteRange, count: int) -> ByteRange:
        """The last `count` bytes of a range that another connection fetches, now the caller's."""
        end, victim.end = victim.end, max(victim.start, victim.end - count)
        stolen = ByteRange(victim.end, end, is_claimed=True)
        self._insert_after(victim, stolen)
        return stolen

    def release(self, byte_range: ByteRange) -> None:
        """Its connection does not fetch it any more: what is left of it is unclaimed again."""
        byte_range.is_claimed = False
        tidy: list[ByteRange] = []
        for missing in self._missing:
            if not missing.left and not missing.is_claimed:
                continue
            last = tidy[-1] if tidy else None
            if last and last.end == missing.start and not last.is_claimed and not missing.is_claimed:
                last.end = missing.end
            else:
                tidy.append(missing)
        self._missing = tidy

    def end_at(self, size: int) -> None:
        """The file turned out to end here; its size was not known before."""
        self.size = size
        for missing in self._missing:
            missing.end = min(missing.end, size)

    def _insert_after(self, missing: ByteRange, new: ByteRange) -> None:
        self._missing.insert(self._missing.index(missing) + 1, new)


_FIRST_BYTES = 128 * MiB  # all first requests together: the hash can begin when the first of them ends


def range_size(done: int, unclaimed: int, connections: int, tuning: Tuning) -> int:
    """How many bytes the next request asks for.

    Little at first, since the hash begins with the first bytes; then much, so that requests are few; and ever less
    towards the end of the file, so that all connections end together. Each should have two more requests at least.
    """
    fair = min(_FIRST_BYTES + done // 2, unclaimed // 2) // connections
    return max(tuning.min_range_bytes, min(tuning.max_range_bytes, fair - fair % MiB))


_GAIN_SECONDS = 0.2  # what a theft must bring at least: the bytes on their way to the victim come twice


@dataclass(frozen=True)
class Pace:
    """How fast a range comes: bytes a second, and the seconds in which an answer to a request for it came."""

    byte_range: ByteRange
    speed: float
    answer_seconds: float


def plan_theft(
    paces: Sequence[Pace], idle_speed: float, tuning: Tuning, only_far_behind: bool = False
) -> tuple[ByteRange, int] | None:
    """Which of the requested ranges an idle connection should take bytes from, and how many. None: it is not worth it.

    It is the range that would be the last to end. The bytes are divided so that both connections end together; one that
    is far behind loses all it has. `idle_speed` is what the idle one was able to do.
    """
    if not paces:
        return None
    last = max(paces, key=lambda pace: pace.byte_range.left / max(pace.speed, 1.0))
    is_far_behind = last.speed * tuning.far_behind < idle_speed
    if only_far_behind and not is_far_behind:
        return None
    left = last.byte_range.left
    count = left if is_far_behind else int(left * idle_speed / (idle_speed + last.speed))
    seconds = _GAIN_SECONDS + 2 * last.answer_seconds + count / idle_speed
    is_worth_it = (is_far_behind or count >= tuning.min_steal_bytes) and left / max(last.speed, 1.0) > seconds
    return (last.byte_range, count) if is_worth_it else None

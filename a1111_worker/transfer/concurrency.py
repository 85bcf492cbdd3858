"""How many connections: of the whole worker, of one file, and which of them are too slow."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from a1111_worker.transfer.ranges import Tuning

_GAIN = 1.15
_FAST_ENOUGH = 60e6  # bytes a second


@dataclass(frozen=True)
class ConnectionDemand:
    """How many connections a file could use now. `is_next`: a job that is next at the GPU waits for it."""

    connections: int
    is_next: bool


class ConnectionLimit:
    """At most `limit` connections at once, shared by all downloads of a worker."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._demands: dict[object, ConnectionDemand] = {}
        self._open = 0

    def share(self, download: object, demand: ConnectionDemand) -> int:
        """How many connections a download may have now, of those it demands."""
        with self._lock:
            self._demands[download] = demand
            given = share_connections(self._limit, list(self._demands.values()))
            return given[list(self._demands).index(download)]

    def forget(self, download: object) -> None:
        """A download is over and needs no more connections."""
        with self._lock:
            self._demands.pop(download, None)

    def acquire(self) -> bool:
        """Count one more open connection; False if that would be one too many."""
        with self._lock:
            if self._open >= self._limit:
                return False
            self._open += 1
            return True

    def release(self) -> None:
        with self._lock:
            self._open -= 1


def share_connections(limit: int, demands: Sequence[ConnectionDemand]) -> list[int]:
    """How many connections each file gets of `limit`: equal shares; what one does not demand goes to the others.

    Files of a job that is next at the GPU get theirs first.
    """
    given = [0] * len(demands)
    for is_next in (True, False):
        unsatisfied = [i for i, demand in enumerate(demands) if demand.is_next is is_next and demand.connections > 0]
        while unsatisfied and limit > 0:
            share = max(1, limit // len(unsatisfied))
            for i in unsatisfied[:limit]:
                more = min(share, demands[i].connections - given[i])
                given[i] += more
                limit -= more
            unsatisfied = [i for i in unsatisfied if given[i] < demands[i].connections]
    return given


class ConcurrencyTuner:
    """How many connections one file should have: more only if more make it faster.

    It starts with `start`. When all of them have received bytes for `measure_seconds`, it tries twice as many. It goes
    back if these, in four times as long, do not reach `_GAIN` times the rate. A connection that receives `_FAST_ENOUGH`
    bytes a second on its own needs no help. It tries again every `retune_seconds`, since networks change.
    """

    def __init__(self, start: int, most: int, tuning: Tuning) -> None:
        self.connections = min(start, most)
        self._most = most
        self._tuning = tuning
        self._before_trial: tuple[int, float] | None = None  # connections and rate before the trial that runs
        self._measurement: tuple[float, int] | None = None  # when it began, and the bytes received by then
        self._idle_until = 0.0

    def observe(self, now: float, received: int, flowing: int) -> int:
        """How many connections there should be, after `received` bytes in all, with `flowing` connections at work."""
        if now < self._idle_until or flowing < self.connections:
            self._measurement = None
            return self.connections
        if self._measurement is None:
            self._measurement = (now, received)
        began, received_then = self._measurement
        if now - began < self._tuning.measure_seconds * (4 if self._before_trial else 1) or now == began:
            return self.connections
        self._measurement = None
        self._decide(now, (received - received_then) / (now - began))
        return self.connections

    def _decide(self, now: float, rate: float) -> None:
        """Begin a trial, or end the one that runs: `rate` is what the present number of connections reached."""
        if self._before_trial and rate < self._before_trial[1] * _GAIN:
            self.connections = self._before_trial[0]
        elif self.connections < self._most and rate / self.connections < _FAST_ENOUGH:
            self._before_trial = (self.connections, rate)
            self.connections = min(self._most, self.connections * 2)
            return
        self._before_trial = None
        self._idle_until = now + self._tuning.retune_seconds


def too_slow(speeds: Sequence[float], least: float, fraction: float = 0.1) -> list[bool]:
    """Which connections to replace: those below their share of `least` bytes a second, or below a `fraction` of the
    median speed.
    """
    if not speeds:
        return []
    limit = least / len(speeds)
    if len(speeds) >= 3:
        limit = max(limit, fraction * median(speeds))
    return [speed < limit for speed in speeds]

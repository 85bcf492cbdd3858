"""How many connections each file may have, of those of the whole worker."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Demand:
    """How many connections a file could use now. `is_next`: a job that is next at the GPU waits for it."""

    connections: int
    is_next: bool


class ConnectionBudget:
    """At most `limit` connections at once, shared by all downloads of a worker. Any thread may use it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._demands: dict[object, Demand] = {}
        self._open: Counter[object] = Counter()

    def share(self, download: object, demand: Demand) -> int:
        """How many connections a download may have now, of those it demands."""
        with self._lock:
            self._demands[download] = demand
            given = share_connections(self._limit, list(self._demands.values()))
            return given[list(self._demands).index(download)]

    def acquire(self, download: object) -> bool:
        """Count one more open connection; False if that would be one too many."""
        with self._lock:
            has_room = self._open.total() < self._limit
            self._open[download] += has_room
            return has_room

    def release(self, download: object) -> None:
        with self._lock:
            self._open[download] -= 1

    def forget(self, download: object) -> None:
        """A download is over, and its connections are closed."""
        with self._lock:
            self._demands.pop(download, None)
            del self._open[download]


def share_connections(limit: int, demands: Sequence[Demand]) -> list[int]:
    """How many connections each file gets of `limit`: equal shares; what one does not demand goes to the others.

    Files of a job that is next at the GPU get theirs first.
    """
    given = [0] * len(demands)
    for is_next in (True, False):
        while hungry := [
            i for i, demand in enumerate(demands) if demand.is_next is is_next and given[i] < demand.connections
        ][: limit - sum(given)]:
            for i in hungry:
                given[i] += 1
    return given

"""The connections of one download: those at work, and those that are kept for the next request."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator

from a1111_worker.transfer.budget import ConnectionBudget
from a1111_worker.transfer.connection import Connection
from a1111_worker.transfer.egress import EgressPolicy
from a1111_worker.transfer.incoming_file import IncomingFile
from a1111_worker.transfer.range_fetch import RangeFetch
from a1111_worker.transfer.ranges import ByteRange, Pace, Tuning
from a1111_worker.transfer.retries import Link
from a1111_worker.transfer.speed import judged_speed


class ConnectionPool:
    """One thread uses it. `at_work` has the oldest fetch first."""

    def __init__(self, policy: EgressPolicy, tuning: Tuning, budget: ConnectionBudget) -> None:
        self.at_work: list[RangeFetch] = []
        self.most = 0  # that were at work together
        self._policy = policy
        self._tuning = tuning
        self._budget = budget
        self._idle: list[Connection] = []
        # No SimpleQueue: its get can wait for ever in spite of a timeout if the machine is busy (CPython 3.10 to 3.12).
        self._events: queue.Queue[RangeFetch] = queue.Queue()
        self.speed = 0.0  # bytes a second of the last connection that ended a request well
        self._received = 0  # by fetches that are over

    @property
    def received(self) -> int:
        """Bytes that came over all connections, whether they are on disk yet or not."""
        return self._received + sum(fetch.received for fetch in self.at_work)

    def paces(self, now: float) -> list[Pace]:
        """How fast the requested ranges come, as far as that is known."""
        answer_seconds = max((fetch.connection.answer_seconds for fetch in self.at_work), default=0.0)
        return [
            Pace(fetch.byte_range, speed, fetch.connection.answer_seconds)
            for fetch in self.at_work
            if (speed := judged_speed(fetch.received, now - fetch.began, answer_seconds, self.speed)) is not None
        ]

    def has_room(self) -> bool:
        """Whether one more connection may be used."""
        if not self._idle and self._budget.acquire(self):
            self._idle.append(Connection(self._policy, self._tuning))
        return bool(self._idle)

    def fetch(self, file: IncomingFile, link: Link, byte_range: ByteRange) -> None:
        """Request a range over a connection for which there is room. It is reported twice."""
        self.at_work.append(RangeFetch(self._idle.pop(), file, link, byte_range, self._events.put))
        self.most = max(self.most, len(self.at_work))

    def reports(self, seconds: float) -> Iterator[RangeFetch]:
        """The fetches that were answered, or are over. If there are none, wait for one."""
        try:
            while True:
                yield self._events.get(timeout=seconds)
                seconds = 0.0
        except queue.Empty:
            pass

    def end(self, fetch: RangeFetch) -> None:
        """A fetch is over: its connection can be used for another one."""
        self.at_work.remove(fetch)
        self._received += fetch.received
        if fetch.error is None and not fetch.connection.is_aborted:
            self.speed = fetch.speed(time.monotonic())
            self._idle.append(fetch.connection)
        else:
            fetch.connection.close()
            self._budget.release(self)

    def close_idle(self) -> None:
        for connection in self._idle:
            connection.close()
            self._budget.release(self)
        self._idle.clear()

    def abort(self) -> None:
        for fetch in self.at_work:
            fetch.abort()

    def close(self, seconds: float) -> list[RangeFetch]:
        """Close every connection. Returns the fetches whose threads have not ended after so many `seconds`.

        A thread may hang in a name server, or in a volume that does not answer.
        """
        self.abort()
        self.close_idle()
        until = time.monotonic() + seconds
        blocked = []
        for fetch in self.at_work:
            if fetch.join(max(0.0, until - time.monotonic())):
                fetch.connection.close()
            else:
                blocked.append(fetch)
        self._budget.forget(self)
        return blocked

"""Which link is used, and when a download tries again: what is remembered of the faults of a storage.

Times are seconds on the caller's clock.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from a1111_worker.errors import DownloadFailed, ModelNotFound
from a1111_worker.retry import Backoff
from a1111_worker.transfer.connection import FileGone, RequestFault
from a1111_worker.transfer.ranges import Tuning

PROGRESS = 64 * 1024
"""Bytes. After so many, a failure is the first one again."""


@dataclass(frozen=True)
class Link:
    """A URL of a file's bytes: the download's link `number`, given by the source at `created`."""

    url: str
    number: int
    created: float


class Links:
    """The link that requests use, and how often one was refused. `is_due`: another one is needed."""

    def __init__(self, label: str, tuning: Tuning) -> None:
        self._label = label
        self._max_refusals = tuning.link_renewals
        self._max_age = tuning.link_seconds
        self.current = Link("", -1, 0.0)
        self._is_refused = True
        self._refusals = self._misses = 0

    def is_due(self, now: float) -> bool:
        return self._is_refused or now - self.current.created > self._max_age

    def renew(self, url: str, now: float) -> None:
        """Use another URL from now on."""
        self.current = Link(url, self.current.number + 1, now)
        self._is_refused = False

    def redirect(self, link: Link, url: str) -> None:
        """A request with a link was answered from `url`: the next requests go there at once."""
        if link.number == self.current.number:
            self.current = replace(self.current, url=url)

    def refuse(self, link: Link, fault: RequestFault) -> None:
        """The storage refused a link. Raises ModelError if that happens too often."""
        if link.number != self.current.number or self._is_refused:
            return  # an older link: the present one may be good
        self._is_refused = True
        if isinstance(fault, FileGone):
            self._misses += 1
            if self._misses > 1:
                raise ModelNotFound(f"{self._label} is gone from the storage") from fault
        else:
            self._refusals += 1
            if self._refusals > self._max_refusals:
                raise DownloadFailed(f"{self._label} cannot be downloaded: {fault}, and every new one too") from fault


class Retries:
    """Failures in a row, when to try again (`retry_at`), and a limit for a storage that is busy."""

    def __init__(self, tuning: Tuning) -> None:
        self._tuning = tuning
        self._backoff = Backoff(tuning.pause, tuning.pause_most)
        self._failures = self._restarts = 0
        self._failed_at = 0.0
        self._done = 0  # bytes at the last failure
        self.retry_at = 0.0
        self._cap = tuning.connections
        self._cap_until = 0.0

    def count_failure(self, began: float, now: float, done: int, pause: float = 0.0) -> bool:
        """Try again, after `pause` seconds at least. False if there were too many failures without progress.

        `began` is when the request was sent, `done` how many bytes there are. After progress it is tried again at once.
        Requests that were sent before the last failure failed together with it.
        """
        if done - self._done >= PROGRESS:
            self._failures, self._failed_at = 0, now
            self._backoff.reset()
        elif began >= self._failed_at:
            self._failures += 1
            self._failed_at = now
            self.retry_at = now + self._backoff.next_pause()
        self._done = done
        self.retry_at = max(self.retry_at, now + pause)
        return self._failures < self._tuning.tries

    def count_restart(self, label: str, reason: RequestFault) -> None:
        """The file changed, or the storage has no ranges. Raises DownloadFailed if that happens too often."""
        self._restarts += 1
        if self._restarts > self._tuning.restarts:
            raise DownloadFailed(f"{label} changed while it was downloaded ({reason})") from reason

    def cap_connections(self, count: int, now: float) -> None:
        """The storage is busy: use at most `count` connections for a while."""
        self._cap, self._cap_until = count, now + self._tuning.busy_seconds

    def max_connections(self, now: float) -> int:
        return self._cap if now < self._cap_until else self._tuning.connections

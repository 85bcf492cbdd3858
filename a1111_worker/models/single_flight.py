"""One fetch of a file at a time in this process. Other jobs that need the file wait, and share the result."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

from a1111_worker.context import Deadline
from a1111_worker.errors import ModelError
from a1111_worker.models.cache import CacheHit
from a1111_worker.models.progress import FileProgress, ReportFile

_POLL = 0.05  # seconds between two looks of a job that waits


class SingleFlight:
    """The fetches that are under way in this process, by what they fetch."""

    def __init__(self) -> None:
        self._fetches: dict[str, SharedFetch] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def join(self, key: str, is_next: Callable[[], bool]) -> Iterator[tuple[SharedFetch, bool]]:
        """The fetch of `key`, and whether the caller must do it. If not, the caller waits with `wait`.

        `is_next` is asked whether the GPU waits for the caller, for as long as the block lasts.
        """
        with self._lock:
            fetch = self._fetches.get(key)
            is_first = fetch is None
            if fetch is None:
                fetch = self._fetches[key] = SharedFetch()
        fetch.jobs.append(is_next)
        try:
            yield fetch, is_first
        except ModelError as error:
            if is_first:
                fetch.error = error
            raise
        finally:
            fetch.jobs.remove(is_next)
            if is_first:
                with self._lock:
                    del self._fetches[key]
                fetch.is_over.set()


class SharedFetch:
    """One fetch, and the jobs that need it."""

    def __init__(self) -> None:
        self.is_over = threading.Event()
        self.hit: CacheHit | None = None
        self.error: ModelError | None = None
        self.jobs: list[Callable[[], bool]] = []
        self._progress: FileProgress | None = None

    def is_next(self) -> bool:
        """Whether the GPU waits for one of the jobs that need it."""
        return any(is_next() for is_next in list(self.jobs))

    def reporting(self, report: ReportFile) -> ReportFile:
        """What the fetching job reports to: `report`, and the jobs that wait."""

        def report_to_all(progress: FileProgress) -> None:
            self._progress = progress
            report(progress)

        return report_to_all

    def wait(self, deadline: Deadline, report: ReportFile) -> CacheHit | None:
        """Wait until it is over. Returns what was fetched, or None if the fetching job was cancelled: try again then.

        Raises the error that the fetching job met.
        """
        while not self.is_over.wait(_POLL):
            deadline.check()
            if self._progress is not None:
                report(replace(self._progress, fetched_by=self._progress.fetched_by or "another job"))
        if self.error is not None:
            raise copy.copy(self.error)
        return self.hit

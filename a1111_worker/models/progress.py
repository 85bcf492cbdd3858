"""The progress of several files, reported as one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from a1111_worker.context import ReportProgress
from a1111_worker.domain import Progress, Stage


@dataclass(frozen=True)
class FileProgress:
    """How far one file is, in bytes. `fetched_by` is the other worker that fetches it, if one does."""

    name: str
    done: int = 0
    total: int | None = None
    fetched_by: str | None = None


ReportFile = Callable[[FileProgress], None]


def report_bytes(report: ReportFile, name: str) -> Callable[[int, int | None], None]:
    """A callback for whoever counts bytes: it reports the file `name` as (bytes done, bytes in all)."""
    return lambda done, total: report(FileProgress(name, done, total))


class AggregateProgress:
    """The progress of `files` files. Each report of one makes a `Progress` of all."""

    def __init__(self, files: int, report: ReportProgress) -> None:
        self._files = files
        self._report = report
        self._began = time.monotonic()
        self._done_before: int | None = None
        self._latest: dict[Hashable, FileProgress] = {}
        self._newest: FileProgress | None = None
        self._ready = 0
        self._lock = threading.Lock()

    def of(self, file: Hashable) -> ReportFile:
        """Where the progress of one file is reported to."""

        def report(progress: FileProgress) -> None:
            with self._lock:
                self._latest[file] = self._newest = progress
                aggregate = self._aggregate(progress)
            self._report(aggregate)

        return report

    def count_ready(self) -> None:
        """One file more is on disk."""
        with self._lock:
            self._ready += 1
            is_over = self._ready == self._files
            progress = self._aggregate(self._newest) if is_over and self._newest else None
        if progress is not None:
            self._report(progress)

    def _aggregate(self, newest: FileProgress) -> Progress:
        files = self._latest.values()
        done = sum(file.done for file in files)
        total = sum(file.total or file.done for file in files)
        is_known = len(files) == self._files and all(file.total for file in files)
        if self._done_before is None:
            self._done_before = done  # what an earlier download left has no speed
        most = 100.0 if self._ready == self._files else 99.9  # a complete file is still to be verified
        speed = (done - self._done_before) / max(time.monotonic() - self._began, 1e-3)
        return Progress(
            Stage.MODELS,
            percent=round(min(100 * done / total, most), 1) if is_known else None,
            detail=self._detail(newest, done, total),
            eta_s=round((total - done) / speed, 1) if is_known and speed > 0 else None,
            facts={"bytes": done, "total": total, "mb_per_s": round(speed / 1e6, 1)},
        )

    def _detail(self, newest: FileProgress, done: int, total: int) -> str:
        detail = f"{self._ready} of {self._files} ready, {done / 1e6:.0f} of {total / 1e6:.0f} MB"
        if self._ready == self._files:
            return detail
        files = self._latest.values()
        if len(files) == self._files and all(file.done == file.total for file in files):
            detail += ", verifying"
        if newest.fetched_by is None or not all(file.fetched_by for file in files):
            return detail
        share = f", {100 * newest.done / newest.total:.0f} %" if newest.total else ""
        return f"{newest.fetched_by} is fetching {newest.name}{share}; {detail}"

"""How far several files are, told as one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from a1111_worker.context import ReportProgress
from a1111_worker.domain import Progress, Stage


@dataclass(frozen=True)
class FileProgress:
    """How far one file is, in bytes. `waiting` names who fetches it, where that is somebody else."""

    name: str
    done: int = 0
    total: int | None = None
    waiting: str | None = None


Tell = Callable[[FileProgress], None]


class AggregateProgress:
    """The tallies of some files; every new one makes a `Progress` of all."""

    def __init__(self, files: int, report: ReportProgress) -> None:
        self._files = files
        self._report = report
        self._began = time.monotonic()
        self._first: int | None = None
        self._tallies: dict[Hashable, FileProgress] = {}
        self._newest: FileProgress | None = None
        self._ready = 0
        self._lock = threading.Lock()

    def of(self, file: Hashable) -> Tell:
        def tell(tally: FileProgress) -> None:
            with self._lock:
                self._tallies[file] = self._newest = tally
                progress = self._progress(tally)
            self._report(progress)

        return tell

    def ready(self) -> None:
        with self._lock:
            self._ready += 1
            is_over = self._ready == self._files
            progress = self._progress(self._newest) if is_over and self._newest else None
        if progress is not None:
            self._report(progress)

    def _progress(self, newest: FileProgress) -> Progress:
        tallies = self._tallies.values()
        done = sum(tally.done for tally in tallies)
        total = sum(tally.total or tally.done for tally in tallies)
        all_known = len(tallies) == self._files and all(tally.total for tally in tallies)
        if self._first is None:
            self._first = done  # what an earlier download left has no speed
        most = 100.0 if self._ready == self._files else 99.9  # a file whose bytes are all here is still verified
        speed = (done - self._first) / max(time.monotonic() - self._began, 1e-3)
        return Progress(
            Stage.MODELS,
            percent=round(min(100 * done / total, most), 1) if all_known else None,
            detail=self._detail(newest, done, total),
            eta_s=round((total - done) / speed, 1) if all_known and speed > 0 else None,
            facts={"bytes": done, "total": total, "mb_per_s": round(speed / 1e6, 1)},
        )

    def _detail(self, newest: FileProgress, done: int, total: int) -> str:
        detail = f"{self._ready} of {self._files} ready, {done / 1e6:.0f} of {total / 1e6:.0f} MB"
        if self._ready == self._files:
            return detail
        tallies = self._tallies.values()
        if len(tallies) == self._files and all(tally.done == tally.total for tally in tallies):
            detail += ", verifying"
        if newest.waiting is None or not all(tally.waiting for tally in tallies):
            return detail
        share = f", {100 * newest.done / newest.total:.0f} %" if newest.total else ""
        return f"{newest.waiting} is fetching {newest.name}{share}; {detail}"

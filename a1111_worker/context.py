"""What travels with a job: its deadline and cancellation, its progress, its priority, and the time each stage took."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from a1111_worker.domain import Progress, Stage
from a1111_worker.errors import JobCancelled, JobTimeout

ReportProgress = Callable[[Progress], None]
"""Takes progress from any thread. It returns at once and never raises."""


def ignore_progress(progress: Progress) -> None:
    """A `ReportProgress` that drops everything."""


def _always() -> bool:
    return True


class Deadline:
    """The time that a piece of work has, and its cancellation. Every blocking stage of a job asks it.

    Seconds are counted on the monotonic clock. `cancel` may be called from any thread. It wakes a thread that waits in
    `wait`. A thread that blocks elsewhere registers with `on_cancel` how it can be unblocked.
    """

    def __init__(self, seconds: float = math.inf, *, what: str = "the job") -> None:
        self._end = time.monotonic() + seconds
        self._seconds = seconds
        self._what = what
        self._cancellation = _Cancellation()

    def within(self, seconds: float, *, what: str | None = None) -> Deadline:
        """A deadline with the same cancellation. It ends `seconds` from now, or with this one if that is sooner."""
        remaining = self.remaining()
        if remaining < seconds:
            child = Deadline(remaining, what=self._what)
            child._seconds = self._seconds  # the message must name the time of the deadline that is over
        else:
            child = Deadline(seconds, what=what or self._what)
        child._cancellation = self._cancellation
        return child

    def remaining(self) -> float:
        """Seconds left, never below zero."""
        return max(0.0, self._end - time.monotonic())

    @property
    def is_cancelled(self) -> bool:
        return self._cancellation.event.is_set()

    def check(self) -> None:
        """Raise JobCancelled or JobTimeout if the work must end now."""
        if self.is_cancelled:
            raise JobCancelled("the job was cancelled before it was done")
        if self.remaining() == 0.0:
            raise JobTimeout(f"the time of {self._what} is up ({self._seconds:.3g} s)")

    def wait(self, seconds: float) -> None:
        """Sleep for `seconds`, or until the time is up. Raises as `check` does, at once if it is cancelled."""
        self.check()
        self._cancellation.event.wait(min(seconds, self.remaining()))
        self.check()

    def cancel(self) -> None:
        """End it now, together with every deadline made from it. Idempotent."""
        self._cancellation.cancel()

    @contextlib.contextmanager
    def on_cancel(self, unblock: Callable[[], None]) -> Iterator[None]:
        """Call `unblock` once if it is cancelled inside the block, or at once if it is cancelled already."""
        with self._cancellation.calling(unblock):
            yield

    @contextlib.contextmanager
    def on_end(self, unblock: Callable[[], None]) -> Iterator[None]:
        """Call `unblock` if it is cancelled, or its time is up, inside the block."""
        timer = threading.Timer(min(self.remaining(), threading.TIMEOUT_MAX), unblock)
        timer.daemon = True
        timer.start()
        try:
            with self.on_cancel(unblock):
                yield
        finally:
            timer.cancel()


class StageTimes:
    """The seconds that each stage took, and all of it since this object was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._spent = dict.fromkeys(Stage, 0.0)

    @contextlib.contextmanager
    def measure(self, stage: Stage) -> Iterator[None]:
        """Count the time of the block as this stage's."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._spent[stage] += time.monotonic() - began

    def seconds(self) -> dict[str, float]:
        """The seconds of each stage so far, and `total`."""
        return {**{s.value: spent for s, spent in self._spent.items()}, "total": time.monotonic() - self._began}


def format_times(seconds: Mapping[str, float]) -> str:
    """Times for a log line, without the stages that took no time."""
    return ", ".join(f"{stage} {spent:.2f} s" for stage, spent in seconds.items() if spent >= 0.005 or stage == "total")


@dataclass(frozen=True)
class JobContext:
    """What travels with a job through all its stages, or with the boot and the command line in a job's place.

    `is_next` returns whether the GPU waits for this job, or will wait for it next. It is asked again and again:
    downloads of such a job go first. `dataclasses.replace` derives a context with another deadline or another listener;
    both share the times.
    """

    deadline: Deadline = field(default_factory=Deadline)
    report: ReportProgress = ignore_progress
    job_id: str = ""
    is_next: Callable[[], bool] = _always
    times: StageTimes = field(default_factory=StageTimes)


class _Cancellation:
    def __init__(self) -> None:
        self.event = threading.Event()
        self._lock = threading.Lock()
        self._unblocks: list[Callable[[], None]] = []

    def cancel(self) -> None:
        with self._lock:
            if self.event.is_set():
                return
            self.event.set()
            unblocks = list(self._unblocks)
        for unblock in unblocks:
            unblock()

    @contextlib.contextmanager
    def calling(self, unblock: Callable[[], None]) -> Iterator[None]:
        with self._lock:
            is_late = self.event.is_set()
            self._unblocks.append(unblock)
        if is_late:
            unblock()
        try:
            yield
        finally:
            with self._lock:
                self._unblocks.remove(unblock)

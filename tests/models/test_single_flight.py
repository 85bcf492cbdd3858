"""One fetch at a time of a file, shared by the jobs of a process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from a1111_worker.context import Deadline
from a1111_worker.domain import ModelKind
from a1111_worker.errors import JobCancelled, ModelNotFound
from a1111_worker.models.cache import CacheHit
from a1111_worker.models.progress import FileProgress
from a1111_worker.models.sidecars import ModelRecord
from a1111_worker.models.single_flight import SharedFetch, SingleFlight
from a1111_worker.models.volume import CacheDirectory

HIT = CacheHit(
    CacheDirectory(Path("loras"), ModelKind.LORA),
    ModelRecord(ModelKind.LORA, "A", "a.safetensors", "0" * 64, 1),
)


class Jobs:
    """A first job that fetches until `finish` is set, and a second one that waits for it."""

    def __init__(self, outcome: Callable[[], CacheHit]) -> None:
        self.finish = threading.Event()
        self.seen: list[FileProgress] = []
        self.roles: list[bool] = []
        self._outcome = outcome
        self._flights = SingleFlight()
        self._has_joined = threading.Event()

    def run(self, deadline: Deadline) -> tuple[Future[CacheHit | None], Future[CacheHit | None]]:
        with ThreadPoolExecutor(2) as threads:
            first = threads.submit(self._join, Deadline(30))
            assert self._has_joined.wait(10)
            return first, threads.submit(self._join, deadline)

    def _join(self, deadline: Deadline) -> CacheHit | None:
        with self._flights.join("v1", lambda: True) as (fetch, is_first):
            self.roles.append(is_first)
            self._has_joined.set()
            if not is_first:
                return fetch.wait(deadline, self._see)
            fetch.reporting(lambda progress: None)(FileProgress("A", 1, 2))
            assert self.finish.wait(10)
            fetch.hit = self._outcome()
            return fetch.hit

    def _see(self, progress: FileProgress) -> None:
        self.seen.append(progress)
        self.finish.set()


def test_the_second_job_waits_and_gets_what_the_first_fetched() -> None:
    jobs = Jobs(lambda: HIT)

    first, second = jobs.run(Deadline(30))

    assert (first.result(), second.result()) == (HIT, HIT)
    assert jobs.roles == [True, False]
    assert jobs.seen[0] == FileProgress("A", 1, 2, fetched_by="another job")


def test_the_second_job_gets_the_failure_of_the_first() -> None:
    def fail() -> CacheHit:
        raise ModelNotFound("there is none")

    first, second = Jobs(fail).run(Deadline(30))

    for future in (first, second):
        with pytest.raises(ModelNotFound, match="there is none"):
            future.result()


def test_if_the_first_job_is_cancelled_the_second_one_may_try_again() -> None:
    def cancel() -> CacheHit:
        raise JobCancelled("cancelled")

    first, second = Jobs(cancel).run(Deadline(30))

    with pytest.raises(JobCancelled):
        first.result()
    assert second.result() is None


def test_a_fetch_is_urgent_as_long_as_one_of_its_jobs_is_next() -> None:
    flights = SingleFlight()
    answers: list[bool] = []

    with flights.join("v1", lambda: False) as (fetch, _):
        answers.append(fetch.is_next())
        with flights.join("v1", lambda: True) as (same, _):
            answers.append(fetch.is_next())
        answers.append(fetch.is_next())

    assert answers == [False, True, False]
    assert same is fetch


def test_other_files_are_other_fetches_and_a_fetch_that_is_over_is_forgotten() -> None:
    flights = SingleFlight()
    fetches: list[SharedFetch] = []

    for key in ("v1", "v2", "v1"):
        with flights.join(key, lambda: True) as (fetch, is_first):
            fetches.append(fetch)
            assert is_first

    assert len(set(fetches)) == 3

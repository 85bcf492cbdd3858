"""The queue without HTTP: what it keeps, and for how long. The ways of a job: tests/sandbox/test_runpod.py."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from local_queue.jobs import COMPLETED, FAILED, IN_PROGRESS, IN_QUEUE, JobQueue, QueuedJob, QueueFull, QueueLimits


def take(queue: JobQueue, worker: str = "w", most: int = 1) -> list[dict[str, Any]]:
    return queue.take(worker, most, 0.0, lambda: False)


def finished(queue: JobQueue, size: int = 0) -> QueuedJob:
    """A job that was taken and answered."""
    job = queue.submit({"input": 1}, 0)
    take(queue)
    queue.conclude(job, {"output": "done"}, size)
    return job


def test_a_result_is_kept_for_its_time_and_then_forgotten() -> None:
    kept, gone = JobQueue(QueueLimits(kept_seconds=60)), JobQueue(QueueLimits(kept_seconds=0))

    results = [queue.status(finished(queue).id) for queue in (kept, gone)]

    assert results[0] and results[0]["status"] == COMPLETED
    assert results[1] is None


def test_the_oldest_results_are_forgotten_when_they_need_too_much_memory() -> None:
    queue = JobQueue(QueueLimits(result_bytes=250_000))

    first, second, third = (finished(queue, 100_000) for _ in range(3))

    assert queue.status(first.id) is None
    assert [queue.jobs[job.id].status for job in (second, third)] == [COMPLETED, COMPLETED]


def test_a_queue_whose_jobs_fill_its_memory_takes_no_further_one_and_loses_none() -> None:
    queue = JobQueue(QueueLimits(queued_bytes=100_000))
    job = queue.submit({"input": 1}, 90_000)

    with pytest.raises(QueueFull):
        queue.submit({"input": 2}, 90_000)
    take(queue)
    queue.conclude(job, {"output": 1}, 1)

    assert queue.submit({"input": 3}, 90_000).status == IN_QUEUE  # the input of an ended job is not kept
    assert queue.jobs[job.id].body == {}


def test_a_job_is_forgotten_when_its_ttl_is_over_and_its_worker_is_told_to_stop() -> None:
    queue = JobQueue()
    job = queue.submit({"input": 1, "policy": {"ttl": 20}}, 0)
    take(queue)

    stopped = queue.jobs_to_stop("w", 10, lambda: False)

    assert queue.status(job.id) is None
    assert stopped == [job.id]


@pytest.mark.parametrize(("start_seconds", "is_told"), [(0.0, True), (3600.0, False)])
def test_a_worker_is_told_to_stop_a_job_when_it_has_had_the_time_to_start_it(
    start_seconds: float, is_told: bool
) -> None:
    queue = JobQueue(QueueLimits(start_seconds=start_seconds))
    job = queue.submit({"input": 1}, 0)
    take(queue)
    queue.cancel(job.id)

    told = [queue.jobs_to_stop("w", 0.0, lambda: False) for _ in range(2)]

    assert told == [[job.id] if is_told else [], []]


@pytest.mark.parametrize(
    "policy", ["soon", {"executionTimeout": "60"}, {"executionTimeout": 0}, {"ttl": True}, {"ttl": float("nan")}]
)
def test_a_policy_that_makes_no_sense_is_refused(policy: Any) -> None:
    with pytest.raises(ValueError, match="policy"):
        JobQueue().submit({"input": 1, "policy": policy}, 0)


def test_the_jobs_of_a_worker_that_ended_are_the_next_ones_for_another() -> None:
    queue = JobQueue()
    jobs = [queue.submit({"input": number}, 0) for number in range(3)]
    answered, unanswered, waiting = jobs
    take(queue, "old", 2)
    queue.report(unanswered, {"percent": 50})
    queue.conclude(answered, {"error": "no"}, 1)

    queue.worker_ended("old")

    assert (answered.status, unanswered.status) == (FAILED, IN_QUEUE)
    assert [job["id"] for job in take(queue, "new", 3)] == [unanswered.id, waiting.id]
    assert "output" not in (queue.status(unanswered.id) or {})
    assert queue.health()["jobs"]["retried"] == 1


def test_a_worker_that_is_to_end_gets_no_job_and_no_longer_waits() -> None:
    queue = JobQueue()
    answers: list[Any] = []
    polls = [
        threading.Thread(target=lambda: answers.append(queue.take("w", 1, 60, lambda: False))),
        threading.Thread(target=lambda: answers.append(queue.jobs_to_stop("w", 60, lambda: False))),
    ]
    for poll in polls:
        poll.start()

    queue.dismiss("w")
    for poll in polls:
        poll.join(10)
    job = queue.submit({"input": 1}, 0)

    assert answers == [[], []]
    assert take(queue, "w") == []
    assert take(queue, "another")[0]["id"] == job.id


def test_health_counts_a_worker_as_initializing_until_it_asks_for_a_job() -> None:
    queue = JobQueue()
    seen = [queue.health()["workers"]]
    for event in (
        lambda: queue.worker_starts("w"),
        lambda: take(queue),
        lambda: (queue.submit({"input": 1}, 0), take(queue)),
        lambda: queue.worker_ended("w"),
    ):
        event()
        seen.append(queue.health()["workers"])

    states = [(workers["initializing"], workers["idle"], workers["running"]) for workers in seen]
    assert states == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)]


def test_each_piece_of_a_stream_is_shown_once_and_all_are_the_output() -> None:
    queue = JobQueue()
    job = queue.submit({"input": 1}, 0)
    take(queue)
    queue.extend(job, "a", 1)
    first = queue.next_stream(job.id) or {}
    queue.extend(job, "b", 1)
    queue.conclude(job, {}, 1)
    second, third = queue.next_stream(job.id) or {}, queue.next_stream(job.id) or {}

    assert (first["status"], first["stream"]) == (IN_PROGRESS, [{"output": "a"}])
    assert (second["status"], second["stream"], second["output"]) == (COMPLETED, [{"output": "b"}], ["a", "b"])
    assert third["stream"] == []


def test_a_job_cannot_choose_its_own_id() -> None:
    queue = JobQueue()
    job = queue.submit({"input": 1, "id": "mine"}, 0)

    assert take(queue)[0]["id"] == job.id

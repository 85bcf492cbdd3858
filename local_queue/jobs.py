"""The jobs of one endpoint, in memory.

A job is IN_QUEUE until a worker takes it, then IN_PROGRESS until its answer comes, then COMPLETED or FAILED. Before
that it may become CANCELLED or TIMED_OUT. It is forgotten when its `ttl` is over, or some time after its end.

The rules are those of RunPod's platform (docs.runpod.io, "Send requests", August 2026), as its SDK 1.12 meets them.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

IN_QUEUE = "IN_QUEUE"
IN_PROGRESS = "IN_PROGRESS"
COMPLETED = "COMPLETED"
FAILED = "FAILED"
CANCELLED = "CANCELLED"
TIMED_OUT = "TIMED_OUT"
FINAL = (COMPLETED, FAILED, CANCELLED, TIMED_OUT)

_DAY = 86_400.0
_MIB = 1 << 20
_OVERHEAD = 4096  # bytes that Python needs for a job besides its JSON, roughly

log = logging.getLogger(__name__)


class QueueFull(Exception):
    """No memory is left for another job."""


@dataclass(frozen=True)
class QueueLimits:
    """Seconds, and bytes of JSON."""

    execution_timeout: float = 600.0  # from taken to answered, unless the job's policy has another value
    time_to_live: float = _DAY  # from submitted to forgotten, whatever the job is doing, likewise
    kept_seconds: float = 1800.0  # for which a result can be asked for
    start_seconds: float = 0.5  # in which a worker starts a job that it took: before that, it cannot stop it
    queued_bytes: float = 512 * _MIB  # of all jobs that have not ended; above it no further job is taken
    result_bytes: float = 512 * _MIB  # of all results; above it the oldest ones are forgotten early
    run_bytes: int = 10 * _MIB  # a job's body and its answer
    runsync_bytes: int = 20 * _MIB  # the same of a synchronous job

    def bytes_of(self, *, sync: bool) -> int:
        return self.runsync_bytes if sync else self.run_bytes


@dataclass(eq=False)
class QueuedJob:
    """A job, and the newest that is known of it. Times are of `time.monotonic`."""

    id: str
    body: dict[str, Any]  # what the caller sent: input, and policy, webhook, s3Config; empty once the job has ended
    body_bytes: int
    status: str = IN_QUEUE
    worker: str | None = None
    progress: Any = None  # the newest; None: there was none yet
    output: Any = None
    error: str | None = None
    stream: list[Any] = field(default_factory=list)
    streamed: int = 0  # how many of these a caller has seen
    answer_bytes: int = 0
    stop_pod: bool = False  # the worker asked to be replaced
    submitted: float = field(default_factory=time.monotonic)
    taken: float | None = None
    ended: float | None = None
    execution_timeout: float = math.inf
    time_to_live: float = math.inf

    @property
    def is_sync(self) -> bool:
        """Whether it came by /runsync. The worker and its SDK see that from the id too."""
        return self.id.startswith("sync-")

    @property
    def forgotten_at(self) -> float:
        return self.submitted + self.time_to_live

    @property
    def ends_at(self) -> float:
        """When its time is over, if it has not ended by then."""
        at_work = math.inf if self.taken is None else self.taken + self.execution_timeout
        return min(at_work, self.forgotten_at)

    def stoppable_at(self, start_seconds: float) -> float:
        """When its worker can stop it: the SDK passes over the id of a job that it took and has not started.

        It starts jobs every 0.1 s (runpod 1.12, rp_scale.py).
        """
        return (self.taken or 0.0) + start_seconds


@dataclass(frozen=True)
class JobEvent:
    """Something that the platform would only count, and a person or a test wants to know.

    kind: "queued", "taken", "ended", "progress", "late progress", "late result" (after the job's end), "lost" (an
    answer was refused; `detail` is the reason), "stop pod" (the worker wants to be replaced), "ready" (a worker asks
    for its first job), "ping".
    """

    kind: str
    job: QueuedJob | None = None
    worker: str | None = None
    detail: Any = None


class JobQueue:
    """One endpoint's queue. Every method may be called from any thread.

    `tell` is called with each event, while the queue is locked: it must return at once.
    """

    def __init__(
        self, limits: QueueLimits | None = None, tell: Callable[[JobEvent], None] = lambda event: None
    ) -> None:
        self.limits = limits or QueueLimits()
        self.jobs: dict[str, QueuedJob] = {}  # by id
        self._tell = tell
        self._changed = threading.Condition()
        self._waiting: list[QueuedJob] = []
        self._to_stop: dict[str, list[QueuedJob]] = {}  # by worker: jobs that it must still be told to stop
        self._starting: set[str] = set()
        self._workers: set[str] = set()
        self._dismissed: set[str] = set()
        self._retried = 0
        self._is_closed = False

    # The callers' side

    def submit(self, body: dict[str, Any], size: int, *, sync: bool = False) -> QueuedJob:
        """Queue a job whose body has `size` bytes. Raises QueueFull, and ValueError for a bad policy."""
        job = QueuedJob(f"{'sync-' if sync else ''}{uuid.uuid4()}-u1", body, size)
        policy = body.get("policy") or {}
        job.execution_timeout = _milliseconds(policy, "executionTimeout", self.limits.execution_timeout)
        job.time_to_live = _milliseconds(policy, "ttl", self.limits.time_to_live)
        with self._changed:
            self._expire()
            queued = sum(other.body_bytes + _OVERHEAD for other in self.jobs.values() if other.ended is None)
            if queued + size > self.limits.queued_bytes:
                raise QueueFull(f"the queue is full: its jobs have {queued / _MIB:.0f} MiB")
            self.jobs[job.id] = job
            self._waiting.append(job)
            self._note("queued", job)
        return job

    def status(self, job_id: str) -> dict[str, Any] | None:
        """What /status shows of a job. None: it is unknown or forgotten."""
        with self._changed:
            self._expire()
            job = self.jobs.get(job_id)
            return _status(job, time.monotonic()) if job else None

    def next_stream(self, job_id: str) -> dict[str, Any] | None:
        """What /stream shows: the pieces of the output that no caller has seen yet."""
        with self._changed:
            self._expire()
            job = self.jobs.get(job_id)
            if job is None:
                return None
            pieces, job.streamed = job.stream[job.streamed :], len(job.stream)
            return {**_status(job, time.monotonic()), "stream": [{"output": piece} for piece in pieces]}

    def cancel(self, job_id: str) -> dict[str, Any] | None:
        """End a job that has not ended. A waiting one is removed; a running one's worker is told in its stop poll."""
        with self._changed:
            job = self.jobs.get(job_id)
            if job is None:
                return None
            if job.status not in FINAL:
                self._end(job, CANCELLED)
            return {"id": job.id, "status": job.status}

    def health(self) -> dict[str, Any]:
        """What /health shows: counts of jobs and of workers."""
        with self._changed:
            self._expire()
            states = [job.status for job in self.jobs.values()]
            busy = {job.worker for job in self.jobs.values() if job.status == IN_PROGRESS} & self._workers
            idle = len(self._workers - busy)
            return {
                "jobs": {
                    "completed": states.count(COMPLETED),
                    "failed": states.count(FAILED) + states.count(TIMED_OUT),
                    "inProgress": states.count(IN_PROGRESS),
                    "inQueue": states.count(IN_QUEUE),
                    "retried": self._retried,
                },
                "workers": {
                    "idle": idle,
                    "initializing": len(self._starting),
                    "ready": idle,
                    "running": len(busy),
                    "throttled": 0,
                    "unhealthy": 0,
                },
            }

    # The worker's side

    def take(self, worker: str, most: int, seconds: float, is_gone: Callable[[], bool]) -> list[dict[str, Any]]:
        """Up to `most` jobs for this worker, after `seconds` at the latest. Empty if it `is_gone` by then."""
        with self._changed:
            if worker not in self._workers:
                self._starting.discard(worker)
                self._workers.add(worker)
                self._note("ready", worker=worker)
            self.wait(lambda: bool(self._waiting) or worker in self._dismissed, seconds)
            if is_gone() or self._is_closed or worker in self._dismissed:
                return []
            jobs, self._waiting = self._waiting[:most], self._waiting[most:]
            for job in jobs:
                job.status, job.worker, job.taken = IN_PROGRESS, worker, time.monotonic()
                self._note("taken", job)
            return [{**job.body, "id": job.id} for job in jobs]

    def jobs_to_stop(self, worker: str, seconds: float, is_gone: Callable[[], bool]) -> list[str]:
        """The ids of this worker's jobs that were cancelled or timed out, each once; after `seconds` at the latest."""
        with self._changed:
            self.wait(lambda: bool(self._stoppable(worker)) or worker in self._dismissed, seconds)
            jobs = [] if is_gone() else self._stoppable(worker)
            for job in jobs:
                self._to_stop[worker].remove(job)
            return [job.id for job in jobs]

    def ping(self, worker: str, query: Mapping[str, str]) -> None:
        with self._changed:
            self._note("ping", worker=worker, detail=query)

    def report(self, job: QueuedJob, progress: Any) -> None:
        """The worker's progress. After the job's end it changes nothing."""
        with self._changed:
            self._expire()
            if job.status in FINAL:
                self._note("late progress", job, detail=progress)
                return
            job.progress = progress
            self._note("progress", job, detail=progress)

    def extend(self, job: QueuedJob, piece: Any, size: int) -> None:
        """Another piece of a streamed output, of `size` bytes. After the job's end it changes nothing."""
        with self._changed:
            if job.status in FINAL:
                return
            job.stream.append(piece)
            job.answer_bytes += size
            self._changed.notify_all()

    def conclude(self, job: QueuedJob, answer: dict[str, Any], size: int) -> None:
        """The worker's answer, of `size` bytes. After the job's end it changes nothing."""
        with self._changed:
            self._expire()
            if job.status in FINAL:
                self._note("late result", job, detail=answer)
                return
            error = answer.get("error")
            job.stop_pod = answer.get("stopPod") is True
            job.output = answer.get("output", job.stream or None)
            if isinstance(error, str) and error:
                job.error = error
            elif error:
                job.output = None  # RunPod counts it as a success without output
            job.answer_bytes += size
            self._end(job, FAILED if job.error else COMPLETED, tell_worker=False)
            self._forget_oldest_results()
            if job.stop_pod:
                self._note("stop pod", job, worker=job.worker)

    def refuse(self, job: QueuedJob, reason: str) -> None:
        """An answer that the platform does not take. It is lost, and the job stays IN_PROGRESS."""
        with self._changed:
            self._note("lost", job, detail=reason)

    def worker_starts(self, worker: str) -> None:
        """Count this worker as initializing until it asks for its first job."""
        with self._changed:
            self._starting.add(worker)

    def dismiss(self, worker: str) -> None:
        """Give this worker no further job, and answer its requests for one at once: it is to end."""
        with self._changed:
            self._dismissed.add(worker)
            self._changed.notify_all()

    def worker_ended(self, worker: str) -> None:
        """Forget a worker whose process has ended. Its unanswered jobs are the next ones for another worker."""
        with self._changed:
            self._starting.discard(worker)
            self._workers.discard(worker)
            self._dismissed.discard(worker)
            self._to_stop.pop(worker, None)
            unanswered = [job for job in self.jobs.values() if job.status == IN_PROGRESS and job.worker == worker]
            for job in unanswered:
                job.status, job.worker, job.taken, job.progress, job.stream = IN_QUEUE, None, None, None, []
            self._waiting[:0] = unanswered
            self._retried += len(unanswered)
            self._changed.notify_all()

    # Waiting

    def wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait until the condition is true, the time is up or the queue is closed; whether the condition is true.

        Jobs whose time is up end meanwhile.
        """
        until = time.monotonic() + seconds
        with self._changed:
            while True:
                self._expire()
                now = time.monotonic()
                if condition() or now >= until or self._is_closed:
                    return condition()
                self._changed.wait(max(0.001, min([until, *self._next_moments(now)]) - now))

    def wait_for_worker(self, seconds: float) -> bool:
        """Wait until a worker has asked for a job; whether one has."""
        return self.wait(lambda: bool(self._workers), seconds)

    def close(self) -> None:
        """Hand out no further job, and end all waits."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    # Inside. The lock is held.

    def _next_moments(self, now: float) -> list[float]:
        """When something changes by itself: a job's time is over, or its worker can stop it."""
        ends = [job.ends_at for job in self.jobs.values() if job.status not in FINAL]
        stops = [job.stoppable_at(self.limits.start_seconds) for jobs in self._to_stop.values() for job in jobs]
        return ends + [moment for moment in stops if moment > now]

    def _stoppable(self, worker: str) -> list[QueuedJob]:
        """The jobs that this worker must still be told to stop, and can."""
        now = time.monotonic()
        return [job for job in self._to_stop.get(worker, ()) if job.stoppable_at(self.limits.start_seconds) <= now]

    def _end(self, job: QueuedJob, status: str, *, tell_worker: bool = True) -> None:
        if job in self._waiting:
            self._waiting.remove(job)
        elif tell_worker and job.worker:
            self._to_stop.setdefault(job.worker, []).append(job)
        job.status, job.ended = status, time.monotonic()
        job.body, job.body_bytes = {}, 0
        self._note("ended", job)

    def _expire(self) -> None:
        """End the jobs whose time is over, and forget those that nobody may ask for any more."""
        now = time.monotonic()
        for job in list(self.jobs.values()):
            if job.status not in FINAL and now >= job.ends_at:
                self._end(job, TIMED_OUT)
            is_old = job.ended is not None and now >= job.ended + self.limits.kept_seconds
            if is_old or now >= job.forgotten_at:
                del self.jobs[job.id]

    def _forget_oldest_results(self) -> None:
        ended = sorted((job for job in self.jobs.values() if job.ended is not None), key=lambda job: job.ended or 0.0)
        used = sum(job.answer_bytes + _OVERHEAD for job in ended)
        for job in ended:
            if used <= self.limits.result_bytes:
                return
            used -= job.answer_bytes + _OVERHEAD
            del self.jobs[job.id]
            log.warning("the result of job %s is forgotten early: results need too much memory", job.id)

    def _note(self, kind: str, job: QueuedJob | None = None, **more: Any) -> None:
        self._tell(JobEvent(kind, job, **more))
        self._changed.notify_all()


def _status(job: QueuedJob, now: float) -> dict[str, Any]:
    answer: dict[str, Any] = {"id": job.id, "status": job.status}
    answer["delayTime"] = int(((job.taken or job.ended or now) - job.submitted) * 1000)
    if job.taken:
        answer["executionTime"] = int(((job.ended or now) - job.taken) * 1000)
        answer["workerId"] = job.worker
    output = job.progress if job.status == IN_PROGRESS else job.output
    if output is not None:
        answer["output"] = output
    if job.error is not None:
        answer["error"] = job.error
    return answer


def _milliseconds(policy: Any, name: str, default: float) -> float:
    """A time of a job's policy, in seconds. ValueError with a sentence if it is none."""
    if not isinstance(policy, dict):
        raise ValueError("policy must be an object")
    value = policy.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"policy.{name} must be a number of milliseconds")
    return float(value) / 1000

"""RunPod's platform: the queue of `local_queue`, with faults, and with a memory of everything that it was sent.

RunPod refuses an answer that is too large or not strict JSON. Such an answer is lost here too: the job stays
IN_PROGRESS, and `lost` has the reason.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any

from local_queue.jobs import (
    CANCELLED,
    COMPLETED,
    FAILED,
    FINAL,
    IN_PROGRESS,
    IN_QUEUE,
    TIMED_OUT,
    JobEvent,
    JobQueue,
    QueuedJob,
    QueueLimits,
)
from local_queue.routes import CallerRoutes, Request, WorkerRoutes
from local_queue.worker import worker_environment
from sandbox.server import Exchange
from sandbox.storage import FaultyServer, answer_fault

__all__ = [
    "CANCELLED",
    "COMPLETED",
    "FAILED",
    "FINAL",
    "IN_PROGRESS",
    "IN_QUEUE",
    "TIMED_OUT",
    "QueuedJob",
    "SandboxRunPod",
]

_MIB = 1 << 20
_INHERITED = ("PATH", "LANG", "LC_ALL", "TMPDIR", "TZ")


@dataclass(eq=False, repr=False, kw_only=True)
class SandboxRunPod(FaultyServer):
    """One endpoint and its queue. `fail(ServerFault(…), on="/job-done/")` spoils the next answers."""

    port: InitVar[int] = 0
    long_poll: float = 1.0  # seconds for which a worker's request for jobs or for stopped jobs is held open
    start_seconds: float = 0.5  # in which a worker starts a job that it took; only then it is told to stop it
    execution_timeout: float = 600.0  # seconds, unless the job's policy has another value (in milliseconds)
    run_limit: int = 10 * _MIB  # bytes of a body of an asynchronous job
    sync_limit: int = 20 * _MIB  # the same of a synchronous job
    worker_key: str = "sandbox-worker-key"  # the whole Authorization header of a worker
    client_key: str | None = None  # a client's Bearer token; None: none is required
    endpoint: str = "sandbox"

    # What it remembers
    pings: list[Mapping[str, str]] = field(default_factory=list, init=False)  # their queries
    late_progress: list[tuple[str, Any]] = field(
        default_factory=list, init=False
    )  # id and progress, after the job's end
    late_results: list[tuple[str, Any]] = field(default_factory=list, init=False)  # id and body, likewise
    lost: list[tuple[str, str]] = field(default_factory=list, init=False)  # id and reason of each refused answer
    stopped_pods: list[str] = field(default_factory=list, init=False)  # workers that asked for a new container

    def __post_init__(self, port: int) -> None:
        super().__init__(port)
        limits = QueueLimits(
            execution_timeout=self.execution_timeout,
            kept_seconds=math.inf,
            start_seconds=self.start_seconds,
            queued_bytes=math.inf,
            result_bytes=math.inf,
            run_bytes=self.run_limit,
            runsync_bytes=self.sync_limit,
        )
        self._progress: dict[str, list[Any]] = {}
        self._queue = JobQueue(limits, self._remember)
        self._caller_routes = CallerRoutes(self._queue, self.client_key)
        self._worker_routes = WorkerRoutes(self._queue, self.worker_key, long_poll=self.long_poll)

    # For tests, besides the HTTP routes

    @property
    def jobs(self) -> Mapping[str, QueuedJob]:
        """Every job, by its id."""
        return self._queue.jobs

    def progress_of(self, job_id: str) -> list[Any]:
        """Every progress of a job before its end, in order."""
        return list(self._progress.get(job_id, ()))

    def worker_env(self, pod_id: str = "sandbox-pod", *, ping_interval: float = 1.0, **more: str) -> dict[str, str]:
        """The whole environment of a worker's process: `subprocess.Popen(…, env=runpod.worker_env())`."""
        inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}  # the SDK reads many others
        url = f"{self.url}/v2/{self.endpoint}"
        return {
            **worker_environment(inherited, url, self.worker_key, pod_id, query="gpu=NVIDIA+Sandbox"),
            "HOME": tempfile.gettempdir(),  # ~/.runpod/config.toml would replace the key
            "PYTHONUNBUFFERED": "1",
            "RUNPOD_PING_INTERVAL": str(int(ping_interval * 1000)),
            **more,
        }

    def submit(self, input: Any, sync: bool = False, policy: Mapping[str, Any] | None = None, **more: Any) -> str:
        """Queue a job; its id. `more` are keys besides `input`; the worker gets them too."""
        body = {"input": input, **more}
        if policy is not None:
            body["policy"] = dict(policy)
        return self._queue.submit(body, 0, sync=sync).id

    def status(self, job_id: str) -> dict[str, Any]:
        """The answer of /status."""
        found = self._queue.status(job_id)
        assert found is not None, job_id
        return found

    def wait(
        self, job_id: str, timeout: float = 30.0, until: Callable[[QueuedJob], bool] = lambda job: job.status in FINAL
    ) -> dict[str, Any]:
        """Wait for the end of the job, or for `until`; the job's status. TimeoutError after `timeout` seconds."""
        if not self._queue.wait(lambda: until(self.jobs[job_id]), timeout):
            raise TimeoutError(f"still {self.status(job_id)} after {timeout} s")
        return self.status(job_id)

    def wait_for_worker(self, timeout: float = 30.0) -> None:
        """Wait until a worker has asked for a job."""
        if not self._queue.wait_for_worker(timeout):
            raise TimeoutError(f"no worker asked for a job within {timeout} s")

    def cancel(self, job_id: str) -> None:
        """The same as /cancel. A waiting job is removed. The worker of a running job hears of it in its next stop poll.

        The worker hears of it only once, and misses it if it has received the job but not started it. Therefore a test
        waits for the job's first progress (`wait(id, until=lambda job: bool(job.progress))`) before it cancels.
        """
        self._queue.cancel(job_id)

    # HTTP

    def answer(self, exchange: Exchange) -> None:
        asked = exchange.asked
        fault = self._next_fault(asked.path)
        if fault is not None and answer_fault(exchange, fault):
            return
        if not asked.path.startswith(f"/v2/{self.endpoint}/"):
            exchange.send_json(404, {"error": "endpoint not found"})
            return
        routes = self._worker_routes if self._worker_routes.has(asked.path) else self._caller_routes
        answer = routes.answer(Request(asked.method, asked.path, asked.query, asked.headers, asked.body, exchange.gone))
        if answer.value is None:
            exchange.send(answer.status)
        else:
            exchange.send_json(answer.status, answer.value)

    def stop(self) -> None:
        self._stopping = True
        self._queue.close()
        super().stop()

    def _remember(self, event: JobEvent) -> None:
        job_id = event.job.id if event.job else ""
        if event.kind == "progress":
            self._progress.setdefault(job_id, []).append(event.detail)
        elif event.kind == "late progress":
            self.late_progress.append((job_id, event.detail))
        elif event.kind == "late result":
            self.late_results.append((job_id, event.detail))
        elif event.kind == "lost":
            self.lost.append((job_id, event.detail))
        elif event.kind == "stop pod":
            self.stopped_pods.append(event.worker or "")
        elif event.kind == "ping":
            self.pings.append({"worker": event.worker or "", **event.detail})

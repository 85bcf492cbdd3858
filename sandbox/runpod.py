"""RunPod's queue in miniature: the routes a worker's SDK calls, and those a client calls.

A job is IN_QUEUE until a worker takes it, IN_PROGRESS until its answer comes, then COMPLETED or FAILED; or CANCELLED or
TIMED_OUT before that. An answer that the platform would refuse (too large, not strict JSON) is lost: the job stays
IN_PROGRESS, and `lost` says why.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sandbox.server import Exchange
from sandbox.storage import FaultyServer, answer_fault

IN_QUEUE = "IN_QUEUE"
IN_PROGRESS = "IN_PROGRESS"
COMPLETED = "COMPLETED"
FAILED = "FAILED"
CANCELLED = "CANCELLED"
TIMED_OUT = "TIMED_OUT"
FINAL = (COMPLETED, FAILED, CANCELLED, TIMED_OUT)

_MIB = 1 << 20
_KEPT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "TZ")


@dataclass
class Job:
    """A job with everything that was ever heard of it."""

    id: str
    body: dict[str, Any]  # what the client sent: input, and policy, webhook, s3Config
    status: str = IN_QUEUE
    worker: str | None = None
    output: Any = None
    error: Any = None
    progress: list[Any] = field(default_factory=list)  # in the order of arrival
    stream: list[Any] = field(default_factory=list)
    answer: dict[str, Any] | None = None  # the final body as it was posted
    answer_bytes: int = 0
    stop_pod: bool = False
    submitted: float = field(default_factory=time.monotonic)
    taken: float | None = None
    ended: float | None = None


class RunPod(FaultyServer):
    """One endpoint and its queue.

    `long_poll`: seconds a worker's question for jobs or stop signals is held open. `execution_timeout`: seconds, unless
    the job's policy says otherwise (milliseconds there). `run_limit` and `sync_limit`: bytes of a body, by the kind
    of the job. `worker_key` must be a worker's Authorization as it is; `client_key`, where set, a client's Bearer.
    `fail(Fault(…), on="/job-done/")` bends the next answers.

    What it remembers: `jobs` by id, `pings` (their query), `late_progress` and `late_results` (id and body of what came
    when the job was over), `lost` (id and reason of what was refused), `stopped_pods` (workers that asked for a new
    container).
    """

    def __init__(
        self,
        *,
        port: int = 0,
        long_poll: float = 1.0,
        execution_timeout: float = 600.0,
        run_limit: int = 10 * _MIB,
        sync_limit: int = 20 * _MIB,
        worker_key: str = "sandbox-worker-key",
        client_key: str | None = None,
        endpoint: str = "sandbox",
    ) -> None:
        super().__init__(port)
        self.long_poll = long_poll
        self.execution_timeout = execution_timeout
        self.run_limit = run_limit
        self.sync_limit = sync_limit
        self.worker_key = worker_key
        self.client_key = client_key
        self.endpoint = endpoint

        self.jobs: dict[str, Job] = {}
        self.pings: list[Mapping[str, str]] = []
        self.late_progress: list[tuple[str, Any]] = []
        self.late_results: list[tuple[str, Any]] = []
        self.lost: list[tuple[str, str]] = []
        self.stopped_pods: list[str] = []

        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._stops: dict[str, list[str]] = {}
        self._workers: set[str] = set()

    # For tests, beside the HTTP routes

    def worker_env(self, pod_id: str = "sandbox-pod", *, ping_interval: float = 1.0, **more: str) -> dict[str, str]:
        """The whole environment of a worker's process: `subprocess.Popen(…, env=runpod.worker_env())`."""
        base, query = f"{self.url}/v2/{self.endpoint}", "?gpu=NVIDIA+Sandbox"
        return {
            **{name: os.environ[name] for name in _KEPT if name in os.environ},  # the SDK looks at many others
            "HOME": tempfile.gettempdir(),  # ~/.runpod/config.toml would win over the key below
            "PYTHONUNBUFFERED": "1",
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID{query}",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID{query}",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID{query}",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID{query}",
            "RUNPOD_PING_INTERVAL": str(int(ping_interval * 1000)),
            "RUNPOD_AI_API_KEY": self.worker_key,
            "RUNPOD_POD_ID": pod_id,
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
            "RUNPOD_DEBUG_LEVEL": "INFO",
            **more,
        }

    def submit(self, input: Any, sync: bool = False, policy: Mapping[str, Any] | None = None, **more: Any) -> str:
        """Queue a job; its id. `more` are further keys beside `input`, which reach the worker too."""
        body = {"input": input, **more}
        if policy is not None:
            body["policy"] = dict(policy)
        return self._queue(body, sync=sync).id

    def status(self, job_id: str) -> dict[str, Any]:
        """What /status answers."""
        with self._changed:
            self._expire()
            return self._status(self.jobs[job_id])

    def wait(
        self, job_id: str, timeout: float = 30.0, until: Callable[[Job], bool] = lambda job: job.status in FINAL
    ) -> dict[str, Any]:
        """The job's status once it is over (or `until` holds); TimeoutError after `timeout` seconds."""
        if not self._wait(lambda: until(self.jobs[job_id]), timeout):
            raise TimeoutError(f"still {self.status(job_id)} after {timeout} s")
        return self.status(job_id)

    def wait_for_worker(self, timeout: float = 30.0) -> None:
        """Until some worker has asked for a job."""
        if not self._wait(lambda: bool(self._workers), timeout):
            raise TimeoutError(f"no worker came within {timeout} s")

    def cancel(self, job_id: str) -> dict[str, Any]:
        """As /cancel: a waiting job is gone, a running one's worker is told through its stop poll.

        It is told once. A worker that has the job but has not begun it misses that; a test waits for a sign of life
        (`wait(id, until=lambda job: bool(job.progress))`) before it cancels.
        """
        with self._changed:
            job = self.jobs[job_id]
            if job.status not in FINAL:
                self._end(job, CANCELLED)
            return {"id": job.id, "status": job.status}

    # The routes

    def answer(self, exchange: Exchange) -> None:
        asked = exchange.asked
        fault = self._next_fault(asked.path)
        if fault is not None and answer_fault(exchange, fault):
            return
        prefix = f"/v2/{self.endpoint}/"
        if not asked.path.startswith(prefix):
            exchange.send_json(404, {"error": "endpoint not found"})
            return
        verb, _, rest = asked.path.removeprefix(prefix).partition("/")
        routes: dict[tuple[str, str], Callable[[Exchange, str], None]] = {
            ("GET", "job-take"): self._take_one,
            ("GET", "job-take-batch"): self._take_batch,
            ("GET", "job-stop"): self._stop_poll,
            ("GET", "ping"): self._ping,
            ("POST", "job-done"): self._done,
            ("POST", "job-stream"): self._stream,
            ("POST", "run"): self._run,
            ("POST", "runsync"): self._runsync,
            ("GET", "status"): self._show,
            ("POST", "status"): self._show,
            ("POST", "cancel"): self._cancel,
            ("GET", "health"): self._health,
        }
        route = routes.get((asked.method, verb))
        if route is None:
            exchange.send_json(404, {"error": "not found"})
            return
        of_worker = verb.startswith("job-") or verb == "ping"
        wanted = self.worker_key if of_worker else self.client_key and f"Bearer {self.client_key}"
        if wanted and asked.headers.get("authorization") != wanted:
            exchange.send_json(401, {"error": "unauthorized"})
            return
        route(exchange, rest)

    # The worker's side

    def _take_one(self, exchange: Exchange, worker: str) -> None:
        jobs = self._take(exchange, worker, 1)
        if jobs:
            exchange.send_json(200, jobs[0])
        else:
            exchange.send(204)

    def _take_batch(self, exchange: Exchange, worker: str) -> None:
        jobs = self._take(exchange, worker, int(exchange.asked.query["batch_size"]))
        if jobs:
            exchange.send_json(200, jobs)
        else:
            exchange.send(204)

    def _take(self, exchange: Exchange, worker: str, most: int) -> list[dict[str, Any]]:
        with self._changed:
            self._workers.add(worker)
            self._changed.notify_all()
            self._wait(lambda: bool(self._waiting), self.long_poll)
            if exchange.gone():
                return []
            jobs, self._waiting = self._waiting[:most], self._waiting[most:]
            for job in jobs:
                job.status, job.worker, job.taken = IN_PROGRESS, worker, time.monotonic()
            self._changed.notify_all()
            return [{"id": job.id, **job.body} for job in jobs]

    def _stop_poll(self, exchange: Exchange, worker: str) -> None:
        with self._changed:
            self._wait(lambda: bool(self._stops.get(worker)), self.long_poll)
            ids = [] if exchange.gone() else self._stops.pop(worker, [])
        if ids:
            exchange.send_json(200, {"jobsToStop": ids})
        else:
            exchange.send(204)

    def _ping(self, exchange: Exchange, worker: str) -> None:
        with self._changed:
            self.pings.append({"worker": worker, **exchange.asked.query})
            self._changed.notify_all()
        exchange.send_json(200, {})

    def _done(self, exchange: Exchange, rest: str) -> None:
        job, body = self._posted(exchange, rest, None)
        if job is None:
            return
        with self._changed:
            self._expire()
            progress = body.get("status") == IN_PROGRESS
            if job.status in FINAL:
                (self.late_progress if progress else self.late_results).append((job.id, body))
            elif progress:
                job.progress.append(body.get("output"))
                job.output = body.get("output")
            else:
                self._conclude(job, body, len(exchange.asked.body))
            self._changed.notify_all()
        exchange.send_json(200, {})

    def _conclude(self, job: Job, body: dict[str, Any], size: int) -> None:
        job.answer, job.answer_bytes = body, size
        error = body.get("error")
        job.stop_pod = body.get("stopPod") is True
        if job.stop_pod and job.worker:
            self.stopped_pods.append(job.worker)
        job.output = body.get("output", job.stream or None)
        if error and not isinstance(error, str):
            job.output = None  # the live service takes it for a success without output
        elif error:
            job.error = error
        self._end(job, FAILED if job.error else COMPLETED, tell=False)

    def _stream(self, exchange: Exchange, rest: str) -> None:
        job, body = self._posted(exchange, rest, _MIB)
        if job is None:
            return
        with self._changed:
            job.stream.append(body.get("output"))
            self._changed.notify_all()
        exchange.send_json(200, {})

    def _posted(self, exchange: Exchange, rest: str, limit: int | None) -> tuple[Job | None, dict[str, Any]]:
        """The job and the body that was posted for it; None where it was refused (and that was said)."""
        job_id = rest.rpartition("/")[2]
        job = self.jobs.get(job_id)
        if job is None:
            exchange.send_json(404, {"error": "job not found"})
            return None, {}
        limit = limit or self._limit(job_id.startswith("sync-"))
        reason, body = None, None
        if len(exchange.asked.body) > limit:
            reason = _too_large(limit)
        else:
            try:
                body = _strict(exchange.asked.body)
            except ValueError as error:
                reason = f"not JSON: {error}"
        if not isinstance(body, dict):
            with self._changed:
                self.lost.append((job_id, reason or "not an object"))
                self._changed.notify_all()
            exchange.send_json(400, {"error": reason})
            return None, {}
        return job, body

    # The client's side

    def _run(self, exchange: Exchange, rest: str) -> None:
        job = self._submitted(exchange, sync=False)
        if job:
            exchange.send_json(200, {"id": job.id, "status": job.status})

    def _runsync(self, exchange: Exchange, rest: str) -> None:
        job = self._submitted(exchange, sync=True)
        if job:
            wait = min(300_000, int(exchange.asked.query.get("wait", 90_000))) / 1000
            self._wait(lambda: job.status in FINAL, wait)
            exchange.send_json(200, self.status(job.id))

    def _submitted(self, exchange: Exchange, *, sync: bool) -> Job | None:
        reason, body = None, None
        limit = self._limit(sync)
        if len(exchange.asked.body) > limit:
            reason = _too_large(limit)
        else:
            try:
                body = _strict(exchange.asked.body)
            except ValueError:
                reason = "invalid JSON"
        if isinstance(body, dict) and "input" in body:
            return self._queue(body, sync=sync)
        exchange.send_json(400, {"error": reason or "input is required"})
        return None

    def _show(self, exchange: Exchange, job_id: str) -> None:
        if job_id in self.jobs:
            exchange.send_json(200, self.status(job_id))
        else:
            exchange.send_json(404, {"error": "job not found"})

    def _cancel(self, exchange: Exchange, job_id: str) -> None:
        if job_id in self.jobs:
            exchange.send_json(200, self.cancel(job_id))
        else:
            exchange.send_json(404, {"error": "job not found"})

    def _health(self, exchange: Exchange, rest: str) -> None:
        with self._changed:
            self._expire()
            states = [job.status for job in self.jobs.values()]
            busy = {job.worker for job in self.jobs.values() if job.status == IN_PROGRESS}
            answer = {
                "jobs": {
                    "completed": states.count(COMPLETED),
                    "failed": states.count(FAILED) + states.count(TIMED_OUT),
                    "inProgress": states.count(IN_PROGRESS),
                    "inQueue": states.count(IN_QUEUE),
                    "retried": 0,
                },
                "workers": {
                    "idle": len(self._workers - busy),
                    "initializing": 0,
                    "ready": len(self._workers - busy),
                    "running": len(busy),
                    "throttled": 0,
                    "unhealthy": 0,
                },
            }
        exchange.send_json(200, answer)

    # The queue

    def _queue(self, body: dict[str, Any], *, sync: bool) -> Job:
        job = Job(f"{'sync-' if sync else ''}{uuid.uuid4()}-u1", body)
        with self._changed:
            self.jobs[job.id] = job
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def _end(self, job: Job, status: str, *, tell: bool = True) -> None:
        """The job is over; `tell` its worker, where it has one."""
        if job in self._waiting:
            self._waiting.remove(job)
        elif tell and job.worker:
            self._stops.setdefault(job.worker, []).append(job.id)
        job.status, job.ended = status, time.monotonic()
        self._changed.notify_all()

    def _status(self, job: Job) -> dict[str, Any]:
        now = time.monotonic()
        answer: dict[str, Any] = {"id": job.id, "status": job.status}
        answer["delayTime"] = int(((job.taken or job.ended or now) - job.submitted) * 1000)
        if job.taken:
            answer["executionTime"] = int(((job.ended or now) - job.taken) * 1000)
            answer["workerId"] = job.worker
        if job.status in (IN_PROGRESS, COMPLETED, FAILED) and job.output is not None:
            answer["output"] = job.output
        if job.error is not None:
            answer["error"] = job.error
        return answer

    def _limit(self, sync: bool) -> int:
        return self.sync_limit if sync else self.run_limit

    def _time_left(self, job: Job) -> float:
        policy = job.body.get("policy") or {}
        seconds = float(policy.get("executionTimeout", self.execution_timeout * 1000)) / 1000
        return (job.taken or 0.0) + seconds - time.monotonic()

    def _expire(self) -> None:
        for job in self.jobs.values():
            if job.status == IN_PROGRESS and self._time_left(job) <= 0:
                self._end(job, TIMED_OUT)

    def _wait(self, holds: Callable[[], bool], seconds: float) -> bool:
        """Until it holds, the time is up or the server stops; jobs time out meanwhile."""
        end = time.monotonic() + seconds
        with self._changed:
            while True:
                self._expire()
                left = end - time.monotonic()
                if holds() or left <= 0 or self._stopping:
                    return holds()
                next_end = min(
                    (self._time_left(job) for job in self.jobs.values() if job.status == IN_PROGRESS), default=left
                )
                self._changed.wait(max(0.001, min(left, next_end)))

    def stop(self) -> None:
        self._stopping = True
        with self._changed:
            self._changed.notify_all()
        super().stop()


def _strict(body: bytes) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    return json.loads(body.decode("utf-8"), parse_constant=refuse)


def _too_large(limit: int) -> str:
    return f"exceeded max body size of {limit // _MIB or 1}MiB"

"""A small RunPod queue: the routes that a worker's SDK calls, and those that a client calls.

A job is IN_QUEUE until a worker takes it, then IN_PROGRESS until its answer comes, then COMPLETED or FAILED. Before
that it may become CANCELLED or TIMED_OUT. RunPod refuses an answer that is too large or not strict JSON. Such an answer
is lost here too: the job stays IN_PROGRESS, and `lost` has the reason.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field
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
_INHERITED = ("PATH", "LANG", "LC_ALL", "TMPDIR", "TZ")


@dataclass
class QueuedJob:
    """A job with everything that was ever received for it."""

    id: str
    body: dict[str, Any]  # what the client sent: input, and policy, webhook, s3Config
    status: str = IN_QUEUE
    worker: str | None = None
    output: Any = None
    error: Any = None
    progress: list[Any] = field(default_factory=list)  # every update, in order
    stream: list[Any] = field(default_factory=list)
    answer: dict[str, Any] | None = None  # the final body as it was posted
    answer_bytes: int = 0
    stop_pod: bool = False
    submitted: float = field(default_factory=time.monotonic)
    taken: float | None = None
    ended: float | None = None


@dataclass(eq=False, repr=False, kw_only=True)
class SandboxRunPod(FaultyServer):
    """One endpoint and its queue. `fail(ServerFault(…), on="/job-done/")` spoils the next answers."""

    port: InitVar[int] = 0
    long_poll: float = 1.0  # seconds for which a worker's request for jobs or for stopped jobs is held open
    execution_timeout: float = 600.0  # seconds, unless the job's policy has another value (in milliseconds)
    run_limit: int = 10 * _MIB  # bytes of a body of an asynchronous job
    sync_limit: int = 20 * _MIB  # the same of a synchronous job
    worker_key: str = "sandbox-worker-key"  # the whole Authorization header of a worker
    client_key: str | None = None  # a client's Bearer token; None: none is required
    endpoint: str = "sandbox"

    # What it remembers
    jobs: dict[str, QueuedJob] = field(default_factory=dict, init=False)  # by id
    pings: list[Mapping[str, str]] = field(default_factory=list, init=False)  # their queries
    late_progress: list[tuple[str, Any]] = field(default_factory=list, init=False)  # id and body, after the job's end
    late_results: list[tuple[str, Any]] = field(default_factory=list, init=False)  # the same of results
    lost: list[tuple[str, str]] = field(default_factory=list, init=False)  # id and reason of each refused answer
    stopped_pods: list[str] = field(default_factory=list, init=False)  # workers that asked for a new container

    def __post_init__(self, port: int) -> None:
        super().__init__(port)
        self._changed = threading.Condition()
        self._waiting: list[QueuedJob] = []
        self._stopped: dict[str, list[str]] = {}  # by worker: jobs that it must still be told to stop
        self._workers: set[str] = set()

    # For tests, besides the HTTP routes

    def worker_env(self, pod_id: str = "sandbox-pod", *, ping_interval: float = 1.0, **more: str) -> dict[str, str]:
        """The whole environment of a worker's process: `subprocess.Popen(…, env=runpod.worker_env())`."""
        base, query = f"{self.url}/v2/{self.endpoint}", "?gpu=NVIDIA+Sandbox"
        return {
            **{name: os.environ[name] for name in _INHERITED if name in os.environ},  # the SDK reads many others
            "HOME": tempfile.gettempdir(),  # ~/.runpod/config.toml would replace the key below
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
        """Queue a job; its id. `more` are keys besides `input`; the worker gets them too."""
        body = {"input": input, **more}
        if policy is not None:
            body["policy"] = dict(policy)
        return self._queue(body, sync=sync).id

    def status(self, job_id: str) -> dict[str, Any]:
        """The answer of /status."""
        with self._changed:
            self._expire()
            return self._status(self.jobs[job_id])

    def wait(
        self, job_id: str, timeout: float = 30.0, until: Callable[[QueuedJob], bool] = lambda job: job.status in FINAL
    ) -> dict[str, Any]:
        """Wait for the end of the job, or for `until`; the job's status. TimeoutError after `timeout` seconds."""
        if not self._wait(lambda: until(self.jobs[job_id]), timeout):
            raise TimeoutError(f"still {self.status(job_id)} after {timeout} s")
        return self.status(job_id)

    def wait_for_worker(self, timeout: float = 30.0) -> None:
        """Wait until a worker has asked for a job."""
        if not self._wait(lambda: bool(self._workers), timeout):
            raise TimeoutError(f"no worker asked for a job within {timeout} s")

    def cancel(self, job_id: str) -> dict[str, Any]:
        """The same as /cancel. A waiting job is removed. The worker of a running job hears of it in its next stop poll.

        The worker hears of it only once, and misses it if it has received the job but not started it. Therefore a test
        waits for the job's first progress (`wait(id, until=lambda job: bool(job.progress))`) before it cancels.
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
        is_worker = verb.startswith("job-") or verb == "ping"
        required = self.worker_key if is_worker else self.client_key and f"Bearer {self.client_key}"
        if required and asked.headers.get("authorization") != required:
            exchange.send_json(401, {"error": "unauthorized"})
            return
        route(exchange, rest)

    # The worker's side

    def _take_one(self, exchange: Exchange, worker: str) -> None:
        jobs = self._next_jobs(exchange, worker, 1)
        if jobs:
            exchange.send_json(200, jobs[0])
        else:
            exchange.send(204)

    def _take_batch(self, exchange: Exchange, worker: str) -> None:
        jobs = self._next_jobs(exchange, worker, int(exchange.asked.query["batch_size"]))
        if jobs:
            exchange.send_json(200, jobs)
        else:
            exchange.send(204)

    def _next_jobs(self, exchange: Exchange, worker: str, most: int) -> list[dict[str, Any]]:
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
            self._wait(lambda: bool(self._stopped.get(worker)), self.long_poll)
            ids = [] if exchange.gone() else self._stopped.pop(worker, [])
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
        job, body = self._posted_answer(exchange, rest, None)
        if job is None:
            return
        with self._changed:
            self._expire()
            is_progress = body.get("status") == IN_PROGRESS
            if job.status in FINAL:
                (self.late_progress if is_progress else self.late_results).append((job.id, body))
            elif is_progress:
                job.progress.append(body.get("output"))
                job.output = body.get("output")
            else:
                self._conclude(job, body, len(exchange.asked.body))
            self._changed.notify_all()
        exchange.send_json(200, {})

    def _conclude(self, job: QueuedJob, body: dict[str, Any], size: int) -> None:
        job.answer, job.answer_bytes = body, size
        error = body.get("error")
        job.stop_pod = body.get("stopPod") is True
        if job.stop_pod and job.worker:
            self.stopped_pods.append(job.worker)
        job.output = body.get("output", job.stream or None)
        if error and not isinstance(error, str):
            job.output = None  # the live service treats it as a success without output
        elif error:
            job.error = error
        self._end(job, FAILED if job.error else COMPLETED, notify=False)

    def _stream(self, exchange: Exchange, rest: str) -> None:
        job, body = self._posted_answer(exchange, rest, _MIB)
        if job is None:
            return
        with self._changed:
            job.stream.append(body.get("output"))
            self._changed.notify_all()
        exchange.send_json(200, {})

    def _posted_answer(
        self, exchange: Exchange, rest: str, limit: int | None
    ) -> tuple[QueuedJob | None, dict[str, Any]]:
        """The job and the body that was posted for it. None if the body was refused; the refusal has been sent then."""
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
                body = _strict_json(exchange.asked.body)
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
        job = self._posted_job(exchange, sync=False)
        if job:
            exchange.send_json(200, {"id": job.id, "status": job.status})

    def _runsync(self, exchange: Exchange, rest: str) -> None:
        job = self._posted_job(exchange, sync=True)
        if job:
            wait = min(300_000, int(exchange.asked.query.get("wait", 90_000))) / 1000
            self._wait(lambda: job.status in FINAL, wait)
            exchange.send_json(200, self.status(job.id))

    def _posted_job(self, exchange: Exchange, *, sync: bool) -> QueuedJob | None:
        reason, body = None, None
        limit = self._limit(sync)
        if len(exchange.asked.body) > limit:
            reason = _too_large(limit)
        else:
            try:
                body = _strict_json(exchange.asked.body)
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

    def _queue(self, body: dict[str, Any], *, sync: bool) -> QueuedJob:
        job = QueuedJob(f"{'sync-' if sync else ''}{uuid.uuid4()}-u1", body)
        with self._changed:
            self.jobs[job.id] = job
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def _end(self, job: QueuedJob, status: str, *, notify: bool = True) -> None:
        """Mark the job as ended. `notify`: its worker, if it has one, hears of it in its next stop poll."""
        if job in self._waiting:
            self._waiting.remove(job)
        elif notify and job.worker:
            self._stopped.setdefault(job.worker, []).append(job.id)
        job.status, job.ended = status, time.monotonic()
        self._changed.notify_all()

    def _status(self, job: QueuedJob) -> dict[str, Any]:
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

    def _time_left(self, job: QueuedJob) -> float:
        policy = job.body.get("policy") or {}
        seconds = float(policy.get("executionTimeout", self.execution_timeout * 1000)) / 1000
        return (job.taken or 0.0) + seconds - time.monotonic()

    def _expire(self) -> None:
        for job in self.jobs.values():
            if job.status == IN_PROGRESS and self._time_left(job) <= 0:
                self._end(job, TIMED_OUT)

    def _wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait until the condition is true, the time is up or the server stops; whether it is true.

        Jobs whose time is up end meanwhile.
        """
        end = time.monotonic() + seconds
        with self._changed:
            while True:
                self._expire()
                left = end - time.monotonic()
                if condition() or left <= 0 or self._stopping:
                    return condition()
                next_end = min(
                    (self._time_left(job) for job in self.jobs.values() if job.status == IN_PROGRESS), default=left
                )
                self._changed.wait(max(0.001, min(left, next_end)))

    def stop(self) -> None:
        self._stopping = True
        with self._changed:
            self._changed.notify_all()
        super().stop()


def _strict_json(body: bytes) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"JSON has no number {constant}")

    return json.loads(body.decode("utf-8"), parse_constant=refuse)


def _too_large(limit: int) -> str:
    return f"exceeded max body size of {limit // _MIB or 1}MiB"

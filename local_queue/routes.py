"""RunPod's routes, for the callers of an endpoint and for the SDK of its worker.

A path is `/run` or, as RunPod writes it, `/v2/ENDPOINT/run`; the endpoint's name makes no difference. The worker's
routes are those that the SDK calls (runpod 1.12, rp_job.py, rp_http.py, rp_ping.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from local_queue.access import has_key, why_refused
from local_queue.jobs import FINAL, JobQueue, QueuedJob, QueueFull

_MIB = 1 << 20
_PATH = re.compile(r"(?:/v2/[^/]+)?/([a-z-]+)(?:/(.*))?")
_MOST_RUNSYNC_SECONDS = 300.0


@dataclass(frozen=True)
class Request:
    """One HTTP request. Header names are in lower case. `is_gone` says whether the client has left."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = field(default=b"", repr=False)
    is_gone: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Answer:
    """A status and a JSON value. None: no body."""

    status: int
    value: Any = None


NOT_FOUND = Answer(404, {"error": "not found"})
NO_SUCH_JOB = Answer(404, {"error": "job not found"})
NO_JOB = Answer(204)
TAKEN = Answer(200, {})

Route = Callable[[Request, str], Answer]


class _Routes:
    """The routes of one side of a queue, by a request's method and the first word of its path."""

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue
        self._routes: dict[tuple[str, str], Route] = {}

    @property
    def largest_body(self) -> int:
        """Bytes. A larger one need not be read: `too_large` is its answer."""
        return self._queue.limits.bytes_of(sync=True)

    def refuse(self, headers: Mapping[str, str]) -> Answer | None:
        """The answer to a request that may not be made, whatever it asks; None if it may."""
        raise NotImplementedError

    def answer(self, request: Request) -> Answer:
        if refusal := self.refuse(request.headers):
            return refusal
        verb, rest = _split(request.path)
        route = self._routes.get((request.method, verb))
        return route(request, rest) if route else NOT_FOUND


class CallerRoutes(_Routes):
    """What the callers of an endpoint ask. `key`, if there is one, is their Bearer token."""

    def __init__(self, queue: JobQueue, key: str | None, allowed_hosts: Collection[str] = ()) -> None:
        super().__init__(queue)
        self._authorization = f"Bearer {key}" if key else None
        self._allowed_hosts = allowed_hosts
        self._routes = {
            ("POST", "run"): lambda request, rest: self._run(request, sync=False),
            ("POST", "runsync"): lambda request, rest: self._run(request, sync=True),
            ("GET", "status"): lambda request, job_id: _found(queue.status(job_id)),
            ("POST", "status"): lambda request, job_id: _found(queue.status(job_id)),
            ("GET", "stream"): lambda request, job_id: _found(queue.next_stream(job_id)),
            ("POST", "stream"): lambda request, job_id: _found(queue.next_stream(job_id)),
            ("POST", "cancel"): lambda request, job_id: _found(queue.cancel(job_id)),
            ("GET", "health"): lambda request, rest: Answer(200, queue.health()),
        }

    def refuse(self, headers: Mapping[str, str]) -> Answer | None:
        if reason := why_refused(headers, self._allowed_hosts):
            return Answer(403, {"error": reason})
        if not has_key(headers, self._authorization):
            return Answer(401, {"error": "unauthorized: send `Authorization: Bearer …` with the key of this endpoint"})
        return None

    def too_large(self, path: str) -> Answer:
        verb, _ = _split(path)
        return _too_large(self._queue.limits.bytes_of(sync=verb == "runsync"))

    def _run(self, request: Request, *, sync: bool) -> Answer:
        limit = self._queue.limits.bytes_of(sync=sync)
        if len(request.body) > limit:
            return _too_large(limit)
        try:
            body = _strict_json(request.body)
        except ValueError:
            return Answer(400, {"error": "invalid JSON"})
        if not isinstance(body, dict) or "input" not in body:
            return Answer(400, {"error": "input is required"})
        try:
            job = self._queue.submit(body, len(request.body), sync=sync)
        except ValueError as error:
            return Answer(400, {"error": str(error)})
        except QueueFull as error:
            return Answer(429, {"error": str(error)})
        if not sync:
            return Answer(200, {"id": job.id, "status": job.status})
        self._queue.wait(lambda: job.status in FINAL, _runsync_seconds(request.query.get("wait")))
        return _found(self._queue.status(job.id))


class WorkerRoutes(_Routes):
    """What the SDK of a worker asks. `key` is its whole Authorization header, as the SDK sends it."""

    def __init__(self, queue: JobQueue, key: str, *, long_poll: float) -> None:
        """`long_poll`: seconds for which a request for jobs, or for jobs to stop, is held open."""
        super().__init__(queue)
        self._key = key
        self._long_poll = long_poll
        self._routes = {
            ("GET", "job-take"): self._take_one,
            ("GET", "job-take-batch"): self._take_batch,
            ("GET", "job-stop"): self._stop,
            ("POST", "job-done"): self._done,
            ("POST", "job-stream"): self._stream,
            ("GET", "ping"): self._ping,
        }

    def has(self, path: str) -> bool:
        """Whether the path is one of a worker."""
        verb, _ = _split(path)
        return any(verb == name for _, name in self._routes)

    def refuse(self, headers: Mapping[str, str]) -> Answer | None:
        return None if has_key(headers, self._key) else Answer(401, {"error": "unauthorized"})

    def too_large(self, path: str) -> Answer:
        """The answer to a body above `largest_body`, which nobody has read: the answer of a job is lost."""
        if job := self._job(_split(path)[1]):
            self._queue.refuse(job, f"above {self.largest_body} bytes")
        return _too_large(self.largest_body)

    def _take_one(self, request: Request, worker: str) -> Answer:
        jobs = self._queue.take(worker, 1, self._long_poll, request.is_gone)
        return Answer(200, jobs[0]) if jobs else NO_JOB

    def _take_batch(self, request: Request, worker: str) -> Answer:
        most = _whole_number(request.query.get("batch_size")) or 1
        jobs = self._queue.take(worker, most, self._long_poll, request.is_gone)
        return Answer(200, jobs) if jobs else NO_JOB

    def _stop(self, request: Request, worker: str) -> Answer:
        ids = self._queue.jobs_to_stop(worker, self._long_poll, request.is_gone)
        return Answer(200, {"jobsToStop": ids}) if ids else NO_JOB

    def _ping(self, request: Request, worker: str) -> Answer:
        self._queue.ping(worker, request.query)
        return TAKEN

    def _done(self, request: Request, rest: str) -> Answer:
        job = self._job(rest)
        if job is None:
            return NO_SUCH_JOB
        posted = self._posted(request, job, self._queue.limits.bytes_of(sync=job.is_sync))
        if isinstance(posted, Answer):
            return posted
        if posted.get("status") == "IN_PROGRESS":
            self._queue.report(job, posted.get("output"))
        else:
            self._queue.conclude(job, posted, len(request.body))
        return TAKEN

    def _stream(self, request: Request, rest: str) -> Answer:
        job = self._job(rest)
        if job is None:
            return NO_SUCH_JOB
        posted = self._posted(request, job, _MIB)
        if isinstance(posted, Answer):
            return posted
        self._queue.extend(job, posted.get("output"), len(request.body))
        return TAKEN

    def _job(self, rest: str) -> QueuedJob | None:
        """The job of `WORKER/JOB`."""
        return self._queue.jobs.get(rest.rpartition("/")[2])

    def _posted(self, request: Request, job: QueuedJob, limit: int) -> dict[str, Any] | Answer:
        """The object that was posted for a job, or the answer that refuses it. RunPod never asks for it again."""
        if len(request.body) > limit:
            refusal = _too_large(limit)
        else:
            try:
                posted = _strict_json(request.body)
            except ValueError as error:
                refusal = Answer(400, {"error": f"not JSON: {error}"})
            else:
                if isinstance(posted, dict):
                    return posted
                refusal = Answer(400, {"error": "not an object"})
        self._queue.refuse(job, refusal.value["error"])
        return refusal


def _split(path: str) -> tuple[str, str]:
    """A path's verb and what follows it; empty if it has another form."""
    match = _PATH.fullmatch(path)
    return (match[1], match[2] or "") if match else ("", "")


def _found(value: dict[str, Any] | None) -> Answer:
    return NO_SUCH_JOB if value is None else Answer(200, value)


def _too_large(limit: int) -> Answer:
    return Answer(400, {"error": f"exceeded max body size of {limit // _MIB or 1}MiB"})  # RunPod's own words


def _runsync_seconds(wait: str | None) -> float:
    """How long /runsync waits for the result: `?wait=` milliseconds, else 90 s, as RunPod does."""
    milliseconds = _whole_number(wait)
    return 90.0 if milliseconds is None else min(_MOST_RUNSYNC_SECONDS, milliseconds / 1000)


def _whole_number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) <= 9 else None


def _strict_json(body: bytes) -> Any:
    """The value of strict JSON in UTF-8. ValueError for anything else, NaN and Infinity too."""

    def refuse(constant: str) -> None:
        raise ValueError(f"JSON has no number {constant}")

    try:
        return json.loads(body.decode("utf-8"), parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None

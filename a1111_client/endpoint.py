"""One serverless endpoint: RunPod's, or one on this machine with the same routes.

    async with Endpoint(runpod_url("abc123"), key) as endpoint:
        async with endpoint.job({"prompt": "a lighthouse"}) as job:
            async for state in job.follow():
                print(state.status, state.progress)
            answer = job.answer()

A job that is left before its end is cancelled: by an error, by Ctrl-C, by a client that hung up. It would cost money.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx

from a1111_client.errors import EndpointError

log = logging.getLogger(__name__)

RUNPOD = "https://api.runpod.ai/v2"
MAX_BODY = 10 * 1024 * 1024
"""Bytes of a job that RunPod takes at /run: "exceeded max body size of 10MiB"."""

MAX_PICTURE = 64 * 1024 * 1024
"""Bytes of a picture that is fetched from a bucket."""

_FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")
_TOO_MANY = 429
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def runpod_url(endpoint_id: str) -> str:
    """The address of an endpoint on RunPod."""
    return f"{RUNPOD}/{endpoint_id}"


@dataclass(frozen=True)
class Timings:
    """Periods in seconds. RunPod takes 2000 questions for a status in 10 s, all jobs of an endpoint together."""

    quick: float = 0.025  # between two questions about a job that is younger than `young`
    young: float = 5.0
    slow: float = 1.0  # … about an older one
    questions_per_second: float = 100.0  # about all young jobs together
    queue_look: float = 3.0  # between two looks at why a job waits
    request: float = 60.0  # for one answer
    pause: float = 0.5  # before a request is tried again; doubled each time
    pause_most: float = 8.0
    patience: float = 120.0  # for how long RunPod may be out of reach before its job is given up
    tries: int = 5  # to send a job

    def until_next_question(self, age: float, open_jobs: int) -> float:
        """How long to wait before a job of this age is asked after again."""
        if age >= self.young:
            return self.slow
        return min(self.slow, max(self.quick, open_jobs / self.questions_per_second))


DEFAULT_TIMINGS = Timings()


@dataclass(frozen=True)
class JobState:
    """What /status says of a job. `progress` is the worker's own while it works: stage, percent, detail, eta_s, …

    `gpu_seconds` is RunPod's executionTime, which it bills: None until a worker has the job.
    """

    status: str = "IN_QUEUE"
    output: Any = None
    error: str = ""
    worker: str = ""
    gpu_seconds: float | None = field(default=None, compare=False)

    @property
    def is_final(self) -> bool:
        return self.status in _FINAL

    @property
    def progress(self) -> Mapping[str, Any]:
        if self.status == "IN_PROGRESS" and isinstance(self.output, dict):
            return self.output
        return {}


@dataclass
class Job:
    """A job that was sent. `state` is the newest that is known of it."""

    endpoint: Endpoint
    id: str
    state: JobState = field(default_factory=JobState)
    sent: float = field(default_factory=time.monotonic)

    def follow(self) -> AsyncIterator[JobState]:
        """Every new state of the job, up to its last. Raises EndpointError if RunPod is out of reach for too long."""
        return self.endpoint.follow(self)

    async def result(self) -> dict[str, Any]:
        """Wait for the job's end; its answer. Raises EndpointError if it failed."""
        async for _ in self.follow():
            pass
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The answer of a job that has ended. Raises EndpointError if it failed."""
        return read_answer(self.state)


def read_answer(state: JobState) -> dict[str, Any]:
    """What a job's last state means. Raises EndpointError unless the job made what it was asked for."""
    if state.status == "COMPLETED":
        if isinstance(state.output, dict) and state.output:
            return state.output
        raise EndpointError(
            "JOB_LOST",
            "RunPod says that the job is done, and has no result of it",
            hint="its answer may have been larger than RunPod takes; ask for fewer or smaller pictures",
        )
    if state.status == "CANCELLED":
        raise EndpointError("JOB_CANCELLED", "the job was cancelled")
    if state.status == "TIMED_OUT":
        raise EndpointError(
            "JOB_TIMED_OUT",
            "RunPod ended the job: its time was up, or its worker was gone",
            hint="try again; if it happens often, look at the worker's log and the endpoint's execution timeout",
            retryable=True,
        )
    return _raise_failure(state)


def _raise_failure(state: JobState) -> dict[str, Any]:
    told = state.output if isinstance(state.output, dict) else {}
    code = str(told.get("code") or "JOB_FAILED")
    message = str(told.get("message") or _first_sentence(state.error) or "the job failed, and RunPod gives no reason")
    complaints = told.get("complaints")
    raise EndpointError(
        code,
        message,
        hint=str(told.get("hint") or ""),
        retryable=bool(told.get("retryable")),
        complaints=complaints if isinstance(complaints, list) else (),
    )


def _first_sentence(error: str) -> str:
    """An error without the traceback that the SDK of some workers puts into it."""
    with contextlib.suppress(ValueError):
        parsed = json.loads(error)
        if isinstance(parsed, dict):
            error = str(parsed.get("error_message") or parsed.get("error_type") or "")
    return error.strip().partition("\n")[0][:500]


class Endpoint:
    """An endpoint's address, as `https://api.runpod.ai/v2/ID`, and the key that it takes. Nothing else gets the key."""

    def __init__(self, url: str, key: str = "", *, timings: Timings = DEFAULT_TIMINGS) -> None:
        self.url = url.rstrip("/")
        self.timings = timings
        is_local = (urlsplit(self.url).hostname or "") in _LOOPBACK
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=timings.request,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
            trust_env=not is_local,  # a proxy cannot reach this machine's own addresses
        )
        self._downloads = httpx.AsyncClient(timeout=timings.request)  # without the key: buckets are others' servers
        self._open_jobs = 0
        self._cleaning: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connections, after the jobs that were left have been cancelled; if that takes long, without it."""
        if self._cleaning:
            _, late = await asyncio.wait(self._cleaning, timeout=self.timings.pause_most)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self._http.aclose()
        await self._downloads.aclose()

    @contextlib.asynccontextmanager
    async def job(self, given: Mapping[str, Any], **more: Any) -> AsyncIterator[Job]:
        """A job with this input. `more` are keys beside it, as policy.

        It is cancelled if the block ends before it; `close` waits for that.
        """
        is_wanted = True
        sending = asyncio.ensure_future(self._send(given, more, lambda: is_wanted))
        try:
            job = Job(self, await asyncio.shield(sending))
        except asyncio.CancelledError:
            is_wanted = False
            self._clean(self._cancel_when_sent(sending))
            raise
        self._open_jobs += 1
        try:
            yield job
        finally:
            self._open_jobs -= 1
            if not job.state.is_final:
                self._clean(self._cancel_quietly(job.id))

    async def cancel(self, job_id: str) -> str:
        """Cancel a job; its status afterwards. Raises EndpointError."""
        answer = await self._ask("POST", f"/cancel/{job_id}")
        return str(answer.get("status", "CANCELLED"))

    async def health(self) -> dict[str, Any]:
        """RunPod's count of jobs and workers. Starts no worker."""
        return await self._ask("GET", "/health")

    async def describe_queue(self) -> str:
        """Why a job waits, for people."""
        health = await self.health()
        jobs, workers = health.get("jobs"), health.get("workers")
        if _count(jobs, "inProgress") or _count(workers, "running"):
            return f"in the queue: {_count(jobs, 'inProgress')} jobs run, {_count(jobs, 'inQueue')} wait"
        if _count(workers, "throttled") and not _count(workers, "initializing"):
            return "waiting for a GPU: RunPod has none free (throttled)"
        return "a worker is starting"

    async def status(self, job_id: str) -> JobState:
        """The state of a job by its id."""
        return _parse_state(await self._ask("GET", f"/status/{job_id}"))

    async def follow(self, job: Job) -> AsyncIterator[JobState]:
        """Ask after the job as often as RunPod allows; each state that differs from the one before, up to the last."""
        while not job.state.is_final:
            await asyncio.sleep(self.timings.until_next_question(time.monotonic() - job.sent, self._open_jobs))
            state = await self.status(job.id)
            if state != job.state:
                job.state = state
                yield state

    async def fetch(self, url: str) -> bytes:
        """The bytes behind a link of a job's answer. The link is a secret: no message has it. Raises EndpointError."""
        host = urlsplit(url).hostname or "?"

        async def fetch() -> bytes:
            async with self._downloads.stream("GET", url) as response:
                if response.status_code != httpx.codes.OK:
                    response.raise_for_status()
                    raise EndpointError(
                        "DELIVERY_FAILED", f"{host} answered {response.status_code} to a picture's link"
                    )
                data = bytearray()
                async for chunk in response.aiter_bytes():
                    data += chunk
                    if len(data) > MAX_PICTURE:
                        raise EndpointError("DELIVERY_FAILED", f"a picture on {host} is larger than 64 MB")
                return bytes(data)

        for number in range(self.timings.tries):
            with contextlib.suppress(httpx.HTTPError):
                return await fetch()
            await asyncio.sleep(self._pause(number))
        raise EndpointError("DELIVERY_FAILED", f"a picture could not be fetched from {host}", retryable=True)

    async def _send(self, given: Mapping[str, Any], more: Mapping[str, Any], is_wanted: Callable[[], bool]) -> str:
        """Queue a job; its id."""
        try:
            body = json.dumps({"input": given, **more}, allow_nan=False, ensure_ascii=False).encode()
        except ValueError:
            message = "the job has a number or a letter that JSON has not: NaN, Infinity, or half of a surrogate pair"
            raise EndpointError("INVALID_REQUEST", message) from None
        if len(body) > MAX_BODY:
            raise EndpointError(
                "REQUEST_TOO_LARGE",
                f"the job has {len(body) / 1e6:.1f} MB, and RunPod takes {MAX_BODY / 1e6:.1f} MB",
                hint="send smaller pictures, or links to them",
            )
        headers = {"Content-Type": "application/json"}
        for number in range(self.timings.tries):
            asked_for = 0.0
            try:
                response = await self._http.post(f"{self.url}/run", content=body, headers=headers)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                problem = f"no connection ({type(error).__name__})"
            except httpx.HTTPError as error:
                # The job may have been queued. Sent again, it could be paid for twice.
                raise _unreachable(
                    self.url, f"the connection broke while a job was sent ({type(error).__name__})"
                ) from None
            else:
                if not _is_worth_another_try(response):
                    return str(_read_json(self.url, response).get("id", ""))
                problem, asked_for = f"it answers {response.status_code}", _retry_after(response)
            if number + 1 == self.timings.tries or not is_wanted():
                break
            pause = self._pause(number, asked_for)
            log.warning("the endpoint does not take the job yet: %s; again in %.1f s", problem, pause)
            await asyncio.sleep(pause)
        raise _unreachable(self.url, problem)

    async def _ask(self, method: str, path: str) -> dict[str, Any]:
        """An answer, asked for again until patience ends. Only for requests that may be repeated."""
        begun, number = time.monotonic(), 0
        while True:
            asked_for = 0.0
            try:
                response = await self._http.request(method, self.url + path)
            except httpx.HTTPError as error:
                problem = f"no answer ({type(error).__name__})"
            else:
                if not _is_worth_another_try(response):
                    return _read_json(self.url, response)
                problem, asked_for = f"it answers {response.status_code}", _retry_after(response)
            pause = self._pause(number, asked_for)
            if time.monotonic() + pause - begun > self.timings.patience:
                raise _unreachable(self.url, problem)
            if number == 0:
                log.warning("the endpoint is out of reach: %s; asking again", problem)
            await asyncio.sleep(pause)
            number += 1

    def _pause(self, number: int, asked_for: float = 0.0) -> float:
        """The seconds before the try after the given one (0: the first). `asked_for`: what the server asks to wait."""
        own = min(self.timings.pause_most, self.timings.pause * 2.0 ** min(number, 10))
        return max(own, min(asked_for, self.timings.patience / 2))

    async def _cancel_when_sent(self, sending: Awaitable[str]) -> None:
        with contextlib.suppress(EndpointError):
            await self._cancel_quietly(await sending)

    async def _cancel_quietly(self, job_id: str) -> None:
        try:
            await self.cancel(job_id)
        except EndpointError as error:
            log.warning("job %s could not be cancelled: %s", job_id, error)
        except asyncio.CancelledError:
            log.warning("job %s could not be cancelled: no answer yet", job_id)
            raise
        else:
            log.info("job %s is cancelled", job_id)

    def _clean(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do this even if nobody waits for it; `close` does."""
        task = asyncio.ensure_future(work)
        self._cleaning.add(task)
        task.add_done_callback(self._cleaning.discard)
        return task


def _count(counts: Any, name: str) -> int:
    found = counts.get(name) if isinstance(counts, dict) else 0
    return found if isinstance(found, int) else 0


def _parse_state(answer: Mapping[str, Any]) -> JobState:
    error, executed = answer.get("error"), answer.get("executionTime")
    return JobState(
        status=str(answer.get("status", "IN_QUEUE")),
        output=answer.get("output"),
        error=error if isinstance(error, str) else json.dumps(error) if error else "",
        worker=str(answer.get("workerId") or ""),
        gpu_seconds=executed / 1000 if isinstance(executed, (int, float)) else None,
    )


def _is_worth_another_try(response: httpx.Response) -> bool:
    return response.status_code == _TOO_MANY or response.is_server_error


def _retry_after(response: httpx.Response) -> float:
    """The seconds that the answer asks to wait (RFC 9110, 10.2.3); 0 if it does not, or names a date."""
    asked = response.headers.get("Retry-After", "")
    return float(asked) if asked.isdecimal() else 0.0


def _unreachable(url: str, problem: str) -> EndpointError:
    return EndpointError(
        "ENDPOINT_UNREACHABLE", f"{urlsplit(url).netloc} cannot be used: {problem}", hint="try again", retryable=True
    )


def _read_json(url: str, response: httpx.Response) -> dict[str, Any]:
    """The object that an endpoint answered. Raises EndpointError for a refusal and for anything else."""
    status, host = response.status_code, urlsplit(url).netloc
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        own = "set RUNPOD_API_KEY, or use `a1111 login`" if url.startswith(RUNPOD) else "set LOCAL_API_KEY"
        raise EndpointError("ENDPOINT_REFUSED", f"{host} does not take the key", hint=own)
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if status == httpx.codes.NOT_FOUND:
        if "/status/" in str(response.request.url) or "/cancel/" in str(response.request.url):
            raise EndpointError("JOB_LOST", f"{host} does not know the job", hint="results are kept for 30 minutes")
        raise EndpointError("ENDPOINT_NOT_FOUND", f"{host} has no such endpoint", hint="check its id")
    if response.is_success and isinstance(answer, dict):
        return answer
    told = answer.get("error") or answer.get("title") if isinstance(answer, dict) else None
    reason = f": {str(told)[:200]}" if told else ""
    raise EndpointError("ENDPOINT_REFUSED", f"{host} answered {status}{reason}")

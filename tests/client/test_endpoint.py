"""One endpoint: how often it is asked, what is tried again, and what is cancelled."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from a1111_client.endpoint import MAX_BODY, Endpoint, JobState, Timings, read_answer
from a1111_client.errors import EndpointError
from sandbox.runpod import CANCELLED, COMPLETED, SandboxRunPod
from sandbox.storage import CUT, html_fault, json_fault
from tests.client.scripted import KEY, QUICK, ScriptedWorker, Taken
from tests.support import wait_until


@pytest.fixture
def queue() -> Iterator[SandboxRunPod]:
    with SandboxRunPod(long_poll=0.2, client_key=KEY) as queue:
        yield queue


@pytest.fixture
def worker(queue: SandboxRunPod) -> Iterator[ScriptedWorker]:
    worker = ScriptedWorker(queue)
    worker.start()
    yield worker
    worker.stop()


@asynccontextmanager
async def endpoint_of(queue: SandboxRunPod, key: str = KEY) -> AsyncIterator[Endpoint]:
    async with Endpoint(f"{queue.url}/v2/{queue.endpoint}", key, timings=QUICK) as endpoint:
        yield endpoint


@pytest.mark.parametrize(
    ("age", "open_jobs", "pause"),
    [
        (0.0, 1, 0.025),  # so a short job waits 12 ms for the question, on average
        (4.9, 1, 0.025),
        (5.0, 1, 1.0),
        (0.0, 10, 0.1),  # 100 questions a second, of the 200 that RunPod takes
        (0.0, 500, 1.0),
    ],
)
def test_young_jobs_are_asked_after_often_within_what_runpod_takes(age: float, open_jobs: int, pause: float) -> None:
    assert Timings().until_next_question(age, open_jobs) == pytest.approx(pause)


def test_every_state_of_a_job_is_told_once_and_its_answer_in_the_end(
    queue: SandboxRunPod, worker: ScriptedWorker
) -> None:
    seen, policy = threading.Event(), {"executionTimeout": 9000}

    def work(taken: Taken) -> Any:
        taken.report(stage="generate", percent=10)
        taken.wait_for(seen)
        return {"images": ["x"]}

    async def run() -> tuple[list[JobState], dict[str, Any]]:
        states = []
        async with (
            endpoint_of(queue) as endpoint,
            endpoint.job({"prompt": "x"}, policy=policy) as job,
        ):
            async for state in job.follow():
                states.append(state)
                if state.progress:
                    seen.set()
            return states, job.answer()

    worker.work = work
    states, answer = asyncio.run(run())

    assert [state.progress for state in states[-2:]] == [{"stage": "generate", "percent": 10}, {}]
    assert states[-1].status == COMPLETED
    assert all(one != other for one, other in itertools.pairwise(states))
    assert answer == {"images": ["x"]}
    (taken,) = worker.taken
    assert (taken.given, taken.policy) == ({"prompt": "x"}, policy)


def test_a_job_that_is_left_is_cancelled(queue: SandboxRunPod) -> None:
    async def run() -> None:
        async with endpoint_of(queue) as endpoint:
            with pytest.raises(ZeroDivisionError):
                async with endpoint.job({}):
                    raise ZeroDivisionError

    asyncio.run(run())

    assert [job.status for job in queue.jobs.values()] == [CANCELLED]


def test_an_endpoint_that_does_not_answer_a_cancel_is_left_and_the_log_says_so(
    queue: SandboxRunPod, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        endpoint = Endpoint(f"{queue.url}/v2/{queue.endpoint}", KEY, timings=replace(QUICK, patience=3600))
        async with endpoint, endpoint.job({}):
            pass

    for _ in range(50):
        queue.fail(json_fault(503, {}), on="/cancel")
    asyncio.run(run())

    (job_id,) = queue.jobs
    assert f"job {job_id} could not be cancelled: no answer yet" in caplog.text


def test_a_job_whose_caller_left_while_it_was_sent_is_cancelled_too(queue: SandboxRunPod) -> None:
    async def run() -> None:
        async with endpoint_of(queue) as endpoint:
            sending = asyncio.ensure_future(endpoint.job({}).__aenter__())
            await asyncio.to_thread(wait_until, lambda: queue.asked, "the job to arrive")
            sending.cancel()
            await asyncio.wait([sending])

    asyncio.run(run())

    assert [job.status for job in queue.jobs.values()] == [CANCELLED]


def test_an_endpoint_that_says_when_to_ask_again_is_asked_then(
    queue: SandboxRunPod, worker: ScriptedWorker, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with endpoint_of(queue) as endpoint, endpoint.job({}):
            pass

    for asked_for in ("0.25", "0", "9", "Wed, 21 Oct 2026 07:28:00 GMT"):
        queue.fail(json_fault(429, {}, **{"retry-after": asked_for}), on="/run")
    asyncio.run(run())

    assert re.findall(r"again in (.+) s", caplog.text) == ["0.0", "0.0", "0.2", "0.1"]  # at most half of the patience


@pytest.mark.parametrize("fault", [json_fault(429, {}), json_fault(503, {}), html_fault(502, "Bad Gateway")])
def test_a_job_is_sent_again_if_it_was_not_taken(queue: SandboxRunPod, worker: ScriptedWorker, fault: Any) -> None:
    queue.fail(fault, on="/run")
    queue.fail(fault, on="/status")
    queue.fail(CUT, on="/status")

    async def run() -> dict[str, Any]:
        async with endpoint_of(queue) as endpoint, endpoint.job({}) as job:
            return await job.result()

    assert asyncio.run(run())["images"]
    assert len(queue.jobs) == 1


def test_a_job_is_not_sent_again_if_it_may_have_been_taken(queue: SandboxRunPod) -> None:
    queue.fail(CUT, on="/run")

    with pytest.raises(EndpointError, match="broke while a job was sent"):
        asyncio.run(use(queue))

    assert len([asked for asked in queue.asked if asked.path.endswith("/run")]) == 1


async def use(queue: SandboxRunPod, given: dict[str, Any] | None = None, key: str = KEY) -> dict[str, Any]:
    async with endpoint_of(queue, key) as endpoint, endpoint.job(given or {}) as job:
        return await job.result()


def test_a_wrong_key_is_told_at_once_and_not_shown(queue: SandboxRunPod) -> None:
    with pytest.raises(EndpointError) as caught:
        asyncio.run(use(queue, key="rpa_wrong"))

    assert caught.value.code == "ENDPOINT_REFUSED"
    assert "rpa_wrong" not in json.dumps(caught.value.as_json())
    assert caught.value.hint == "set LOCAL_API_KEY"  # it is not RunPod that refuses


def test_more_than_runpod_takes_is_not_sent(queue: SandboxRunPod) -> None:
    with pytest.raises(EndpointError, match="REQUEST_TOO_LARGE"):
        asyncio.run(use(queue, {"prompt": "x" * MAX_BODY}))

    assert queue.asked == []


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), "half of a pair: \ud83d"])
def test_what_json_does_not_have_is_not_sent(queue: SandboxRunPod, value: object) -> None:
    with pytest.raises(EndpointError, match="INVALID_REQUEST"):
        asyncio.run(use(queue, {"prompt": value}))

    assert queue.asked == []


def test_an_endpoint_that_does_not_exist_is_told(queue: SandboxRunPod) -> None:
    async def run() -> None:
        async with Endpoint(f"{queue.url}/v2/nobody", KEY, timings=QUICK) as endpoint, endpoint.job({}):
            pass

    with pytest.raises(EndpointError, match="ENDPOINT_NOT_FOUND"):
        asyncio.run(run())


TRACEBACK = json.dumps(
    {"error_type": "<class 'KeyError'>", "error_message": "'x'", "error_traceback": "File /app/x.py"}
)


@pytest.mark.parametrize(
    ("state", "code", "message"),
    [
        (
            JobState("FAILED", {"code": "OUT_OF_MEMORY", "message": "no room"}, "OUT_OF_MEMORY: no room"),
            "OUT_OF_MEMORY",
            "no room",
        ),
        (JobState("FAILED", None, TRACEBACK), "JOB_FAILED", "'x'"),  # the SDK's own, for a handler that raises
        (JobState("FAILED", None, "boom\nFile /app/x.py"), "JOB_FAILED", "boom"),
        (JobState("FAILED"), "JOB_FAILED", "the job failed, and RunPod gives no reason"),
        (JobState("CANCELLED"), "JOB_CANCELLED", "the job was cancelled"),
        (JobState("COMPLETED"), "JOB_LOST", "RunPod says that the job is done, and has no result of it"),
        (JobState("TIMED_OUT"), "JOB_TIMED_OUT", "RunPod ended the job: its time was up, or its worker was gone"),
    ],
)
def test_the_end_of_a_job_without_pictures_has_a_code_and_one_sentence(
    state: JobState, code: str, message: str
) -> None:
    with pytest.raises(EndpointError) as caught:
        read_answer(state)

    assert (caught.value.code, caught.value.message) == (code, message)


@pytest.mark.parametrize(
    ("health", "said"),
    [
        ({"jobs": {"inProgress": 2, "inQueue": 3}, "workers": {"running": 1}}, "in the queue: 2 jobs run, 3 wait"),
        ({"jobs": {"inProgress": 0}, "workers": {"initializing": 1}}, "a worker is starting"),
        ({"jobs": {}, "workers": {"throttled": 2}}, "waiting for a GPU: RunPod has none free (throttled)"),
        ({}, "a worker is starting"),
    ],
)
def test_why_a_job_waits_is_said_for_people(queue: SandboxRunPod, health: dict[str, Any], said: str) -> None:
    queue.fail(json_fault(200, health), on="/health")

    async def run() -> str:
        async with endpoint_of(queue) as endpoint:
            return await endpoint.describe_queue()

    assert asyncio.run(run()) == said

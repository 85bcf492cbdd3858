"""The sandbox's queue, used by a client and a worker written here, and by the real SDK."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from sandbox.runpod import CANCELLED, COMPLETED, FAILED, IN_PROGRESS, IN_QUEUE, TIMED_OUT, SandboxRunPod
from sandbox.storage import ServerFault
from tests.support import ECHO_WORKER


class PlainWorker:
    """A worker without the SDK. It sends only what the SDK sends."""

    def __init__(self, runpod: SandboxRunPod, pod: str = "pod-1") -> None:
        env = runpod.worker_env(pod)
        self._session = requests.Session()
        self._session.headers["Authorization"] = env["RUNPOD_AI_API_KEY"]
        self._take = env["RUNPOD_WEBHOOK_GET_JOB"].replace("$ID", pod)
        self._urls = {
            name: env[f"RUNPOD_WEBHOOK_{name}"].replace("$RUNPOD_POD_ID", pod)
            for name in ("POST_OUTPUT", "POST_STREAM", "PING")
        }

    def take(self) -> requests.Response:
        return self._session.get(self._take + "&job_in_progress=0")

    def take_batch(self, size: int) -> requests.Response:
        url = self._take.replace("/job-take/", "/job-take-batch/")
        return self._session.get(f"{url}&batch_size={size}&job_in_progress=0")

    def stops(self) -> requests.Response:
        return self._session.get(self._take.replace("/job-take/", "/job-stop/"))

    def done(self, job_id: str, body: bytes | dict[str, Any]) -> requests.Response:
        return self._post("POST_OUTPUT", job_id, body)

    def stream(self, job_id: str, body: dict[str, Any]) -> requests.Response:
        return self._post("POST_STREAM", job_id, body)

    def ping(self, **query: str) -> requests.Response:
        return self._session.get(self._urls["PING"], params=query)

    def _post(self, name: str, job_id: str, body: bytes | dict[str, Any]) -> requests.Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        url = self._urls[name].replace("$ID", job_id) + "&isStream=false"
        return self._session.post(url, data=data, headers={"Content-Type": "application/x-www-form-urlencoded"})


@pytest.fixture
def runpod() -> Iterator[SandboxRunPod]:
    with SandboxRunPod(start_seconds=0.0, long_poll=0.02, run_limit=1000, sync_limit=2000) as server:
        yield server


# A worker without the SDK


def test_a_job_goes_from_run_to_a_worker_and_its_answer_to_status(runpod: SandboxRunPod) -> None:
    client, worker = f"{runpod.url}/v2/sandbox", PlainWorker(runpod)

    queued = requests.post(f"{client}/run", json={"input": {"a": 1}, "policy": {"executionTimeout": 9000}}).json()
    waiting = requests.get(f"{client}/status/{queued['id']}").json()
    job = worker.take().json()
    running = requests.get(f"{client}/status/{queued['id']}").json()
    worker.done(job["id"], {"output": {"b": 2}})
    over = requests.get(f"{client}/status/{queued['id']}").json()

    assert queued["status"] == waiting["status"] == IN_QUEUE
    assert job == {"id": queued["id"], "input": {"a": 1}, "policy": {"executionTimeout": 9000}}
    assert running["status"] == IN_PROGRESS
    assert running["workerId"] == "pod-1"
    assert (over["status"], over["output"]) == (COMPLETED, {"b": 2})
    assert over["executionTime"] >= 0


def test_runsync_answers_with_a_result_that_comes_in_time(runpod: SandboxRunPod) -> None:
    worker, answers = PlainWorker(runpod), []
    client = threading.Thread(
        target=lambda: answers.append(requests.post(f"{runpod.url}/v2/sandbox/runsync", json={"input": {}}).json())
    )
    client.start()

    while (taken := worker.take()).status_code == 204:
        pass
    worker.done(taken.json()["id"], {"output": "here"})
    client.join(10)

    assert answers[0]["id"].startswith("sync-")
    assert (answers[0]["status"], answers[0]["output"]) == (COMPLETED, "here")


def test_runsync_answers_without_a_result_after_its_wait(runpod: SandboxRunPod) -> None:
    answer = requests.post(f"{runpod.url}/v2/sandbox/runsync?wait=10", json={"input": {}}).json()

    assert answer["status"] == IN_QUEUE
    assert "output" not in answer


def test_a_batch_has_the_waiting_jobs_up_to_the_requested_number(runpod: SandboxRunPod) -> None:
    ids, worker = [runpod.submit({"n": n}) for n in range(3)], PlainWorker(runpod)

    first, second, third = worker.take_batch(2), worker.take_batch(2), worker.take_batch(2)

    assert [job["id"] for job in first.json()] == ids[:2]
    assert [job["id"] for job in second.json()] == ids[2:]
    assert third.status_code == 204


ANSWERS = [
    # what the SDK posts → status, output, error of the job
    ({"output": {"a": 1}}, COMPLETED, {"a": 1}, None),
    ({"output": None}, COMPLETED, None, None),
    ({}, COMPLETED, None, None),  # a handler that returned {}
    ({"error": "no"}, FAILED, None, "no"),
    ({"error": "no", "output": {"code": "X"}}, FAILED, {"code": "X"}, "no"),  # further keys of an error
    ({"error": {"not": "a string"}, "output": {"a": 1}}, COMPLETED, None, None),  # the live service drops both
]


@pytest.mark.parametrize(("body", "status", "output", "error"), ANSWERS)
def test_an_answer_decides_the_status(
    runpod: SandboxRunPod, body: dict[str, Any], status: str, output: Any, error: str | None
) -> None:
    job_id, worker = runpod.submit({}), PlainWorker(runpod)
    worker.take()

    worker.done(job_id, body)

    over = runpod.status(job_id)
    assert (over["status"], over.get("output"), over.get("error")) == (status, output, error)


REFUSED = [
    # body, whether the job is synchronous
    (b'{"output": NaN}', False),
    (b'{"output": -Infinity}', False),
    (b'{"output": "\xff"}', False),  # not UTF-8
    (b'{"output": ', False),
    (b"[1]", False),
    (b'{"output": "%s"}' % (b"x" * 1000), False),  # above run_limit
    (b'{"output": "%s"}' % (b"x" * 2000), True),  # above sync_limit
]


@pytest.mark.parametrize(("body", "sync"), REFUSED)
def test_an_answer_that_the_platform_refuses_is_lost_and_the_job_stays_in_progress(
    runpod: SandboxRunPod, body: bytes, sync: bool
) -> None:
    job_id, worker = runpod.submit({}, sync=sync), PlainWorker(runpod)
    worker.take()

    refused = worker.done(job_id, body)

    assert refused.status_code == 400
    assert [lost for lost, _ in runpod.lost] == [job_id]
    assert runpod.status(job_id)["status"] == IN_PROGRESS


def test_a_synchronous_job_may_have_a_larger_answer(runpod: SandboxRunPod) -> None:
    job_id, worker = runpod.submit({}, sync=True), PlainWorker(runpod)
    worker.take()

    worker.done(job_id, {"output": "x" * 1500})

    assert runpod.status(job_id)["status"] == COMPLETED
    assert runpod.jobs[job_id].answer_bytes > 1500


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("run", b"{}"),  # no input
        ("run", b"not JSON"),
        ("run", b'{"input": "%s"}' % (b"x" * 1000)),
        ("runsync", b'{"input": "%s"}' % (b"x" * 2000)),
    ],
)
def test_a_request_that_is_no_valid_job_is_400(runpod: SandboxRunPod, path: str, body: bytes) -> None:
    answer = requests.post(f"{runpod.url}/v2/sandbox/{path}", data=body)

    assert answer.status_code == 400
    assert not runpod.jobs


def test_progress_is_shown_in_order_and_is_late_after_the_answer(runpod: SandboxRunPod) -> None:
    job_id, worker = runpod.submit({}), PlainWorker(runpod)
    worker.take()

    for percent in (10, 20):
        worker.done(job_id, {"status": "IN_PROGRESS", "output": percent})
    shown = runpod.status(job_id)
    worker.done(job_id, {"output": "done"})
    worker.done(job_id, {"status": "IN_PROGRESS", "output": 30})
    worker.done(job_id, {"output": "again"})

    assert (shown["status"], shown["output"]) == (IN_PROGRESS, 20)
    assert runpod.progress_of(job_id) == [10, 20]
    assert runpod.status(job_id)["output"] == "done"
    assert runpod.late_progress == [(job_id, 30)]
    assert runpod.late_results == [(job_id, {"output": "again"})]


def test_a_stream_is_the_output_of_an_answer_without_one(runpod: SandboxRunPod) -> None:
    job_id, worker = runpod.submit({}), PlainWorker(runpod)
    worker.take()

    worker.stream(job_id, {"output": "a"})
    worker.stream(job_id, {"output": "b"})
    worker.done(job_id, {})

    assert runpod.status(job_id)["output"] == ["a", "b"]


def test_no_worker_gets_a_job_that_was_cancelled_while_it_waited(runpod: SandboxRunPod) -> None:
    job_id, worker = runpod.submit({}), PlainWorker(runpod)

    answer = requests.post(f"{runpod.url}/v2/sandbox/cancel/{job_id}").json()

    assert answer == {"id": job_id, "status": CANCELLED}
    assert worker.take().status_code == 204
    assert worker.stops().status_code == 204


def test_only_the_worker_of_a_cancelled_job_hears_of_it_and_only_once(runpod: SandboxRunPod) -> None:
    job_id, worker, other = runpod.submit({}), PlainWorker(runpod), PlainWorker(runpod, "pod-2")
    worker.take()

    runpod.cancel(job_id)

    assert other.stops().status_code == 204
    assert worker.stops().json() == {"jobsToStop": [job_id]}
    assert worker.stops().status_code == 204
    assert runpod.status(job_id)["status"] == CANCELLED


def test_a_job_times_out_by_its_policy_and_its_worker_hears_of_it(runpod: SandboxRunPod) -> None:
    job_id, worker = runpod.submit({}, policy={"executionTimeout": 10}), PlainWorker(runpod)
    worker.take()

    over = runpod.wait(job_id, timeout=10)

    assert over["status"] == TIMED_OUT
    assert worker.stops().json() == {"jobsToStop": [job_id]}


def test_waiting_too_long_for_a_job_names_its_status(runpod: SandboxRunPod) -> None:
    job_id = runpod.submit({})

    with pytest.raises(TimeoutError, match=IN_QUEUE):
        runpod.wait(job_id, timeout=0.01)


def test_a_long_poll_is_answered_as_soon_as_there_is_a_job() -> None:
    with SandboxRunPod(long_poll=60) as runpod:
        worker, taken = PlainWorker(runpod), []
        polling = threading.Thread(target=lambda: taken.append(worker.take().json()))
        polling.start()
        runpod.wait_for_worker(10)

        job_id = runpod.submit({})
        polling.join(10)

        assert taken[0]["id"] == job_id


def test_a_worker_that_closed_its_connection_gets_no_job() -> None:
    with SandboxRunPod(long_poll=0.3) as runpod:
        worker = PlainWorker(runpod)
        with pytest.raises(requests.Timeout):
            worker._session.get(worker._take, timeout=0.02)

        job_id = runpod.submit({})

        assert PlainWorker(runpod, "pod-2").take().json()["id"] == job_id


@pytest.mark.parametrize(("path", "method"), [("job-take/p?gpu=x", "GET"), ("job-done/p/id?gpu=x", "POST")])
def test_a_worker_without_the_key_is_401(runpod: SandboxRunPod, path: str, method: str) -> None:
    answer = requests.request(method, f"{runpod.url}/v2/sandbox/{path}", headers={"Authorization": "Bearer x"})

    assert answer.status_code == 401


def test_a_client_without_the_key_is_401_if_one_is_set() -> None:
    with SandboxRunPod(client_key="c") as runpod:
        url = f"{runpod.url}/v2/sandbox/health"

        assert requests.get(url).status_code == 401
        assert requests.get(url, headers={"Authorization": "Bearer c"}).status_code == 200


def test_health_counts_jobs_and_workers(runpod: SandboxRunPod) -> None:
    worker = PlainWorker(runpod)
    over = runpod.submit({})
    worker.take()
    worker.done(over, {"error": "no"})
    runpod.submit({})
    worker.take()
    runpod.submit({})

    health = requests.get(f"{runpod.url}/v2/sandbox/health").json()

    assert health["jobs"] == {"completed": 0, "failed": 1, "inProgress": 1, "inQueue": 1, "retried": 0}
    assert (health["workers"]["running"], health["workers"]["idle"]) == (1, 0)


def test_pings_are_remembered(runpod: SandboxRunPod) -> None:
    PlainWorker(runpod).ping(job_id="a,b", runpod_version="1")

    assert runpod.pings[0]["job_id"] == "a,b"


def test_a_fault_happens_only_on_its_path(runpod: SandboxRunPod) -> None:
    job_id, worker = runpod.submit({}), PlainWorker(runpod)
    runpod.fail(ServerFault(500), times=2, on="/job-done/")
    worker.take()

    answers = [worker.done(job_id, {"output": 1}).status_code for _ in range(3)]

    assert answers == [500, 500, 200]


def test_the_environment_of_a_worker_inherits_nothing_else(runpod: SandboxRunPod, tmp_path: Path) -> None:
    show = "import json, os; print(json.dumps(dict(os.environ)))"

    env = json.loads(
        subprocess.run(
            [sys.executable, "-c", show], env=runpod.worker_env(EXTRA="1"), capture_output=True, check=True
        ).stdout
    )

    others = {name for name in env if not name.startswith("RUNPOD_")}
    assert others <= {"PATH", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "TZ", "HOME", "PYTHONUNBUFFERED", "EXTRA"}
    assert "?" in env["RUNPOD_WEBHOOK_GET_JOB"]
    assert "$ID" in env["RUNPOD_WEBHOOK_POST_OUTPUT"]


# The real SDK


@contextmanager
def sdk_worker(runpod: SandboxRunPod, folder: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, ECHO_WORKER],
        cwd=folder,
        env=runpod.worker_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        runpod.wait_for_worker(60)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_real_sdk_works_through_the_queue(tmp_path: Path) -> None:
    with SandboxRunPod(long_poll=0.1) as runpod, sdk_worker(runpod, tmp_path) as process:
        first = runpod.submit({"n": 1})
        second = runpod.submit({"answer": {"error": "no", "code": "X"}}, sync=True)
        over = [runpod.wait(job_id) for job_id in (first, second)]

        third = runpod.submit({"progress": {"percent": 50}, "wait": 60})
        shown = runpod.wait(third, until=lambda job: bool(job.progress))
        runpod.cancel(third)
        fourth = runpod.submit({"answer": {"refresh_worker": True, "x": 1}})
        refreshed = runpod.wait(fourth)
        runpod.wait(fourth, until=lambda job: bool(runpod.pings))

        process.terminate()
        log, _ = process.communicate(timeout=30)

        assert (over[0]["status"], over[0]["output"]) == (COMPLETED, {"echo": {"n": 1}})
        assert (over[1]["status"], over[1]["error"], over[1]["output"]) == (FAILED, "no", {"code": "X"})
        assert shown["output"] == {"percent": 50}
        assert runpod.jobs[third].answer_bytes == 0  # the SDK posts nothing for a stopped job
        assert refreshed["output"] == {"x": 1}
        assert runpod.stopped_pods == ["sandbox-pod"]
        assert "cancelled" in log
        assert process.returncode == 0
        assert (runpod.lost, runpod.late_progress, runpod.late_results) == ([], [], [])


def test_the_real_sdk_finishes_its_job_after_sigterm(tmp_path: Path) -> None:
    with SandboxRunPod(long_poll=0.1) as runpod, sdk_worker(runpod, tmp_path) as process:
        job_id = runpod.submit({"progress": 1, "wait": 0.5})
        runpod.wait(job_id, until=lambda job: bool(job.progress))

        process.terminate()
        process.communicate(timeout=30)

        assert process.returncode == 0
        assert runpod.status(job_id)["status"] == COMPLETED

"""The servers of the queue over real HTTP: who gets in, and what a body may be."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator

import pytest
import requests

from local_queue.jobs import IN_QUEUE, JobQueue, QueueLimits
from local_queue.routes import CallerRoutes, WorkerRoutes
from local_queue.server import QueueServer

KEY = {"Authorization": "Bearer the-key"}
WORKER_KEY = {"Authorization": "worker-key"}


class Servers:
    """A queue with both of its servers."""

    def __init__(self) -> None:
        self.queue = JobQueue(QueueLimits(run_bytes=1_000_000, runsync_bytes=2_000_000))
        self.callers = QueueServer("127.0.0.1", 0, CallerRoutes(self.queue, "the-key", {"gpu-box"}))
        self.worker = QueueServer("127.0.0.1", 0, WorkerRoutes(self.queue, "worker-key", long_poll=0.02))
        self.url = f"http://127.0.0.1:{self.callers.port}"
        self.worker_url = f"http://127.0.0.1:{self.worker.port}"


@pytest.fixture
def servers() -> Iterator[Servers]:
    its = Servers()
    its.callers.start()
    its.worker.start()
    yield its
    its.callers.stop()
    its.worker.stop()


@pytest.mark.parametrize("path", ["/run", "/v2/any-name/run"])
def test_a_job_goes_from_a_caller_to_the_worker_and_back(servers: Servers, path: str) -> None:
    queued = requests.post(servers.url + path, json={"input": {"a": 1}}, headers=KEY).json()
    taken = requests.get(f"{servers.worker_url}/job-take/w?gpu=local", headers=WORKER_KEY).json()
    requests.post(f"{servers.worker_url}/job-done/w/{taken['id']}?x", data='{"output": 2}', headers=WORKER_KEY)
    over = requests.get(f"{servers.url}/status/{queued['id']}", headers=KEY).json()

    assert queued["status"] == IN_QUEUE
    assert taken == {"id": queued["id"], "input": {"a": 1}}
    assert (over["status"], over["output"]) == ("COMPLETED", 2)


REFUSED = [
    # path, headers → status
    ("/health", {}, 401),
    ("/health", {"Authorization": "the-key"}, 401),
    ("/health", WORKER_KEY, 401),
    ("/health", {**KEY, "Host": "evil.example"}, 403),
    ("/health", {**KEY, "Origin": "https://evil.example"}, 403),
    ("/health", {**KEY, "Sec-Fetch-Site": "cross-site"}, 403),
    ("/health", {**KEY, "Host": "gpu-box:8000"}, 200),
    ("/job-take/w?gpu=local", KEY, 404),  # the worker's routes are not there, whatever the key
    ("/job-take/w?gpu=local", WORKER_KEY, 401),
    ("/ping/w?gpu=local", KEY, 404),
    ("/", KEY, 404),
]


@pytest.mark.parametrize(("path", "headers", "status"), REFUSED)
def test_only_callers_with_the_key_from_no_foreign_page_get_in(
    servers: Servers, path: str, headers: dict[str, str], status: int
) -> None:
    answer = requests.get(servers.url + path, headers=headers)

    assert answer.status_code == status
    assert status == 200 or answer.json()["error"]


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/job-take/w?gpu=local", WORKER_KEY, 204),
        ("/job-take/w?gpu=local", {"Authorization": "Bearer worker-key"}, 401),  # the SDK sends it raw
        ("/job-take/w?gpu=local", KEY, 401),
        ("/health", KEY, 401),
        ("/health", WORKER_KEY, 404),
    ],
)
def test_only_the_worker_gets_in_at_its_side(servers: Servers, path: str, headers: dict[str, str], status: int) -> None:
    assert requests.get(servers.worker_url + path, headers=headers).status_code == status


def test_without_a_key_every_program_of_this_machine_gets_in_and_no_page() -> None:
    server = QueueServer("127.0.0.1", 0, CallerRoutes(JobQueue(), None))
    server.start()

    statuses = [
        requests.get(f"http://127.0.0.1:{server.port}/health", headers=headers).status_code
        for headers in ({}, {"Authorization": "Bearer anything"}, {"Origin": "https://evil.example"})
    ]
    server.stop()

    assert statuses == [200, 200, 403]


def test_a_body_above_the_limit_is_answered_as_runpod_does_and_the_connection_lives(servers: Servers) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", servers.callers.port)
    answers = []
    for size in (1_500_000, 5_000_000, 10):
        connection.request("POST", "/run", json.dumps({"input": "x" * size}), KEY)
        answer = connection.getresponse()
        answers.append((answer.status, json.loads(answer.read())))
    connection.close()

    assert [status for status, _ in answers] == [400, 400, 200]
    assert answers[0][1] == {"error": "exceeded max body size of 1MiB"}
    assert len(servers.queue.jobs) == 1


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("Transfer-Encoding: chunked", 411),
        ("Content-Length: -1", 411),
        ("Content-Length: 1e3", 411),
        ("Content-Length: 99999999999999", 400),  # nobody reads that: the connection is closed
        ("Content-Length: 3", 400),  # not JSON
    ],
)
def test_a_body_of_unknown_or_absurd_length_is_refused(servers: Servers, headers: str, status: int) -> None:
    with socket.create_connection(("127.0.0.1", servers.callers.port), timeout=10) as client:
        client.sendall(
            f"POST /run HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer the-key\r\n{headers}\r\n\r\nabc".encode()
        )
        answer = client.recv(65536)

    assert answer.startswith(f"HTTP/1.1 {status} ".encode())


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"input": {}, "policy": {"ttl": -1}}', 400),
        (b'{"input": NaN}', 400),
        (b"[" * 100_000, 400),
        (b'{"input": "\xff"}', 400),
        (b'{"input": "\\ud800"}', 200),  # JSON allows it, and the worker complains about it
    ],
)
def test_a_job_must_be_strict_json_with_a_policy_that_makes_sense(servers: Servers, body: bytes, status: int) -> None:
    answer = requests.post(f"{servers.url}/run", data=body, headers=KEY)

    assert answer.status_code == status
    assert requests.get(f"{servers.worker_url}/job-take/w?gpu=x", headers=WORKER_KEY).status_code in (200, 204)


def test_a_full_queue_is_429(servers: Servers) -> None:
    servers.queue.limits = QueueLimits(queued_bytes=10)

    answer = requests.post(f"{servers.url}/run", json={"input": "a lighthouse"}, headers=KEY)

    assert answer.status_code == 429


def test_an_answer_above_the_limit_is_lost_as_at_runpod(servers: Servers) -> None:
    job = servers.queue.submit({"input": 1}, 0)
    requests.get(f"{servers.worker_url}/job-take/w?gpu=x", headers=WORKER_KEY)

    statuses = [
        requests.post(f"{servers.worker_url}/job-done/w/{job.id}", data=b"x" * size, headers=WORKER_KEY).status_code
        for size in (1_500_000, 3_000_000)
    ]

    assert statuses == [400, 400]
    assert job.status == "IN_PROGRESS"


def test_it_listens_on_ipv6_too() -> None:
    try:
        server = QueueServer("::1", 0, CallerRoutes(JobQueue(), None))
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    server.start()

    answer = requests.get(f"http://[::1]:{server.port}/health")
    server.stop()

    assert answer.status_code == 200

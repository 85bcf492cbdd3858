"""`python -m local_queue`: the real SDK's loop behind the queue, in processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.support import ECHO_WORKER, ROOT, wait_until


class Local:
    """A local endpoint with an echo for a worker, on a free port."""

    def __init__(self, folder: Path, *options: str, **environment: str) -> None:
        self._key = environment.get("LOCAL_API_KEY")
        self._log = folder / "log"
        inherited = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "local_queue", "--port", "0", *options, "--", sys.executable, ECHO_WORKER],
                cwd=ROOT,
                env={**inherited, "HOME": str(folder), "PYTHONUNBUFFERED": "1", "JOBS_IN_FLIGHT": "2", **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        found = wait_until(lambda: re.search(r"listening on http://\S+:(\d+)", self.log), "the port")
        self.url = f"http://127.0.0.1:{found[1]}"

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        answer = requests.request(method, self.url + path, json=body, headers=headers, timeout=60)
        answer.raise_for_status()
        return answer.json()

    def run(self, **given: Any) -> Any:
        """The status of a job in the end."""
        return self.ask("POST", "/runsync", {"input": given})

    def start(self, **given: Any) -> str:
        """Send a job that waits, and return its id when it runs."""
        job_id: str = self.ask("POST", "/run", {"input": {"progress": 1, **given}})["id"]
        wait_until(lambda: self.ask("GET", f"/status/{job_id}").get("output") == 1, "its progress")
        return job_id

    def hand_out(self, **given: Any) -> str:
        """Send a job, and return its id when the worker has it."""
        job_id: str = self.ask("POST", "/run", {"input": given})["id"]
        wait_until(lambda: self.ask("GET", f"/status/{job_id}")["status"] == "IN_PROGRESS", "its worker")
        return job_id

    def end(self, number: signal.Signals | None = None) -> int:
        """Its exit status, after a signal to it alone."""
        if number:
            self.process.send_signal(number)
        return self.process.wait(timeout=30)

    def kill(self) -> None:
        """End it with its worker, whatever it does."""
        while self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=0.2)


@contextlib.contextmanager
def local(folder: Path, *options: str, **environment: str) -> Iterator[Local]:
    endpoint = Local(folder, *options, **environment)
    try:
        yield endpoint
    finally:
        endpoint.kill()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    with local(
        tmp_path_factory.mktemp("live"), LOCAL_API_KEY="callers-key", RUNPOD_API_KEY="runpods-key", CIVITAI_API_KEY="k"
    ) as it:
        yield it


def test_a_job_and_a_failed_job_are_answered_as_at_runpod(live: Local) -> None:
    done, failed = live.run(n=1), live.run(answer={"error": "NO: it is wrong", "code": "NO", "hint": "correct it"})

    assert (done["status"], done["output"]) == ("COMPLETED", {"echo": {"n": 1}})
    assert (failed["status"], failed["error"]) == ("FAILED", "NO: it is wrong")
    assert failed["output"] == {"code": "NO", "hint": "correct it"}  # the SDK's own local API drops these


def test_two_jobs_are_in_flight_and_a_cancelled_one_ends_at_once(live: Local) -> None:
    first, second = live.start(wait=60), live.start(wait=60)

    health = live.ask("GET", "/health")
    cancelled = [live.ask("POST", f"/cancel/{job_id}") for job_id in (first, second)]

    assert health["jobs"]["inProgress"] == 2
    assert [answer["status"] for answer in cancelled] == ["CANCELLED", "CANCELLED"]
    wait_until(lambda: live.log.count("cancelled\n") >= 2, "the handler of both")
    assert live.run(n=2)["status"] == "COMPLETED"


def test_a_job_that_is_cancelled_before_the_sdk_has_started_it_is_stopped(live: Local) -> None:
    stopped = live.log.count("cancelled\n")

    for _ in range(3):
        live.ask("POST", f"/cancel/{live.hand_out(wait=60)}")

    wait_until(lambda: live.log.count("cancelled\n") == stopped + 3, "the handlers of all")


def test_the_worker_gets_a_key_of_its_own_and_no_callers_or_runpods_key(live: Local) -> None:
    environment = live.run(show="environment")["output"]

    assert len(environment["RUNPOD_AI_API_KEY"]) >= 32
    assert "LOCAL_API_KEY" not in environment and "RUNPOD_API_KEY" not in environment
    assert environment["CIVITAI_API_KEY"] == "k"  # its own settings stay
    for secret in ("callers-key", "runpods-key", environment["RUNPOD_AI_API_KEY"]):
        assert secret not in live.log


def test_a_caller_without_the_key_gets_nothing(live: Local) -> None:
    assert requests.get(f"{live.url}/health", timeout=10).status_code == 401


def test_runpods_own_client_works_with_it(live: Local) -> None:
    script = """
import json, runpod
runpod.api_key = "callers-key"
endpoint = runpod.Endpoint("local")
job = endpoint.run({"input": {"n": 3}})
counts = endpoint.health()["jobs"]
print(json.dumps([endpoint.run_sync({"input": {"n": 2}}), job.output(timeout=60), sorted(counts)]))
"""
    environ = {"PATH": os.environ["PATH"], "RUNPOD_ENDPOINT_BASE_URL": f"{live.url}/v2"}

    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, timeout=90)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [
        {"echo": {"n": 2}},
        {"echo": {"n": 3}},
        ["completed", "failed", "inProgress", "inQueue", "retried"],
    ]


def test_a_worker_that_asks_to_be_replaced_is_started_again_and_no_job_is_lost(tmp_path: Path) -> None:
    with local(tmp_path) as it:
        refreshed = it.run(answer={"refresh_worker": True, "x": 1})
        after = it.run(n=1)

        assert (refreshed["output"], refreshed["workerId"]) == ({"x": 1}, "local-1")
        assert (after["status"], after["workerId"]) == ("COMPLETED", "local-2")


def test_it_ends_with_the_worker_and_its_status_and_leaves_no_ping_process(tmp_path: Path) -> None:
    with local(tmp_path) as it:
        group = it.run(show="group")["output"]
        it.ask("POST", "/run", {"input": {"show": "death"}})

        assert it.end() == 7
        wait_until(lambda: not members_of(group), "the end of its processes")


def test_a_queue_that_is_killed_takes_its_worker_along(tmp_path: Path) -> None:
    with local(tmp_path) as it:
        group = it.run(show="group")["output"]

        it.end(signal.SIGKILL)

        wait_until(lambda: not members_of(group), "the end of its processes")


def members_of(group: int) -> list[int]:
    """The processes of a group that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, its_group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(int(folder.name))
    return found


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_running_job_finish(tmp_path: Path, number: signal.Signals, status: int) -> None:
    with local(tmp_path) as it:
        it.start(wait=1.0)

        assert it.end(number) == status
        assert "COMPLETED" in it.log


def test_a_second_signal_ends_everything_at_once(tmp_path: Path) -> None:
    with local(tmp_path) as it:
        it.start(wait=1000)
        it.process.send_signal(signal.SIGINT)
        wait_until(lambda: "waits for the job that runs" in it.log, "the first signal")

        assert it.end(signal.SIGINT) == 130


IMPATIENT = """
import logging, signal, sys
from local_queue.__main__ import main

class SecondSignal(logging.Filter):
    def filter(self, record):
        if "waits for the job that runs" in record.msg:
            logging.getLogger("local_queue").removeFilter(self)
            signal.raise_signal(signal.SIGINT)
        return True

DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(1000)"
logging.getLogger("local_queue").addFilter(SecondSignal())
sys.exit(main(["--port", "0", "--", sys.executable, "-c", DEAF]))
"""


def test_a_second_signal_that_interrupts_the_first_ones_handler_ends_everything_at_once() -> None:
    with subprocess.Popen([sys.executable, "-c", IMPATIENT], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"deaf\n"

        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(timeout=30) == 130
        finally:
            process.send_signal(signal.SIGINT)


def test_a_key_in_runpods_own_settings_file_does_not_replace_the_workers(tmp_path: Path) -> None:
    (tmp_path / ".runpod").mkdir()
    (tmp_path / ".runpod" / "config.toml").write_text('[default]\napi_key = "runpods-own-key"\n', encoding="utf-8")

    with local(tmp_path) as it:
        assert it.run(n=1)["status"] == "COMPLETED"


BAD_STARTS = [
    # options, environment → status, what is said
    (["--host", "0.0.0.0"], {}, 2, "set LOCAL_API_KEY"),
    (["--host", "0.0.0.0"], {"LOCAL_API_KEY": " "}, 2, "set LOCAL_API_KEY"),
    (["--host", "192.0.2.1"], {"LOCAL_API_KEY": "k"}, 1, "cannot listen on 192.0.2.1"),
    (["--host", "no such host"], {"LOCAL_API_KEY": "k"}, 1, "cannot listen on no such host"),
]


@pytest.mark.parametrize(("options", "environment", "status", "said"), BAD_STARTS)
def test_a_start_that_cannot_be_is_one_line_before_any_worker(
    options: list[str], environment: dict[str, str], status: int, said: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "local_queue", "--port", "0", *options, "--", "false"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == status
    assert said in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_taken_port_a_missing_command_and_an_unknown_program_are_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = [
            ["--port", str(taken.getsockname()[1]), "--", "true"],
            ["--port", "0"],
            ["--port", "0", "--", "/no/such"],
        ]
        done = [
            subprocess.run(
                [sys.executable, "-m", "local_queue", *given], cwd=ROOT, capture_output=True, text=True, timeout=60
            )
            for given in words
        ]

    assert [it.returncode for it in done] == [1, 2, 127]
    for it, said in zip(done, ("cannot listen on", "command is missing", "/no/such: No such file"), strict=True):
        assert said in it.stderr

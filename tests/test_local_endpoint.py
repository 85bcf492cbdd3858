"""`make serve`: the sandbox, the local queue and the real worker, in processes of their own."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.support import ROOT, SMALL, wait_until

WORDS = (
    sys.executable,
    "-m",
    "sandbox",
    "--folder",
    "{folder}",
    "--",
    sys.executable,
    "-m",
    "local_queue",
    "--port",
    "0",
)


class Served:
    """What `make serve` starts, on a free port."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "log"
        words = [word.format(folder=folder / "sandbox") for word in WORDS]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*words, "--", sys.executable, "handler.py"], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
            )
        found = wait_until(lambda: re.search(r"listening on (http://\S+)", self.log), "the port")
        self.url = found[1]

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def run(self, **given: Any) -> Any:
        job = {"input": {"prompt": "a lighthouse", **SMALL, **given}}
        return requests.post(f"{self.url}/runsync", json=job, timeout=60).json()

    def status(self, job_id: str) -> Any:
        return requests.get(f"{self.url}/status/{job_id}", timeout=10).json()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    it = Served(tmp_path_factory.mktemp("served"))
    yield it
    it.process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        it.process.wait(timeout=30)
    assert it.process.poll() == 130, it.log
    assert "Traceback" not in it.log
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{it.url}/health", timeout=5)


def test_a_job_is_completed_with_its_picture(served: Served) -> None:
    status = served.run()

    assert status["status"] == "COMPLETED", served.log
    assert len(status["output"]["images"]) == 1


def test_a_failed_job_keeps_its_code_and_its_hint(served: Served) -> None:
    status = served.run(loras=[{"name": "no_such_lora"}])

    assert status["status"] == "FAILED"
    assert status["error"].startswith("MODEL_NOT_FOUND: ")
    assert status["output"]["hint"]


def test_a_running_job_shows_its_progress_and_can_be_cancelled(served: Served) -> None:
    job = {"input": {"prompt": "slow", **SMALL, "steps": 150}}
    job_id = requests.post(f"{served.url}/run", json=job, timeout=10).json()["id"]

    progress = wait_until(lambda: served.status(job_id).get("output"), "its progress")
    answer = requests.post(f"{served.url}/cancel/{job_id}", timeout=10).json()
    after = served.run()

    assert progress["stage"] and "images" not in progress
    assert answer == {"id": job_id, "status": "CANCELLED"}
    assert after["status"] == "COMPLETED"

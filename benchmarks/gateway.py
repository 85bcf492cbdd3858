"""What the gateway adds to a picture of 2 MB: the time of a client's request beyond the time of its job.

    python -m benchmarks.gateway [--quick] [--json FILE]

The gateway is a process of its own, in front of the sandbox's queue on loopback. The worker's answer is ready after a
random time, so that the moment at which the gateway asks is random too. A job's time ends when the queue has its whole
answer.
"""

from __future__ import annotations

import base64
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import requests

from benchmarks.report import Row, run
from sandbox.draw import encode, picture
from sandbox.runpod import SandboxRunPod

BYTES = 2_000_000
BODY = {"prompt": "a lighthouse", "steps": 20, "width": 512, "height": 512}


def measure(quick: bool) -> list[Row]:
    chance = random.Random(1)
    short = [chance.uniform(0.2, 3.0) for _ in range(5 if quick else 40)]
    long = [chance.uniform(5.5, 8.0) for _ in range(2 if quick else 20)]
    with SandboxRunPod(long_poll=5.0) as queue, worker(queue) as seconds, gateway(queue) as url:
        compare(queue, url, seconds, [0.1] * 3)  # warm-up
        return [
            row("jobs under 5 s", compare(queue, url, seconds, short), 0.060),
            row("longer jobs, which are asked after once a second", compare(queue, url, seconds, long), 0.600),
        ]


def row(work: str, spent: list[float], goal: float) -> Row:
    median = statistics.median(spent)
    return Row(
        f"{work}: beyond the job, 2 MB picture, {len(spent)} jobs",
        f"median {median * 1000:.0f} ms, worst {max(spent) * 1000:.0f} ms",
        f"median ≤ {goal * 1000:.0f} ms",
        median <= goal,
    )


def compare(queue: SandboxRunPod, url: str, seconds: list[float], durations: list[float]) -> list[float]:
    """The seconds that each request took beyond its job."""
    spent = []
    with requests.Session() as session:
        session.trust_env = False
        for duration in durations:
            seconds[0] = duration
            began = time.monotonic()
            answer = session.post(f"{url}/sdapi/v1/txt2img", json=BODY, timeout=60)
            took = time.monotonic() - began
            assert len(answer.json()["images"][0]) > BYTES
            job = list(queue.jobs.values())[-1]
            assert job.ended is not None
            spent.append(took - (job.ended - job.submitted))
    return spent


@contextmanager
def worker(queue: SandboxRunPod) -> Iterator[list[float]]:
    """A worker that answers each job with a large picture, after the seconds in the list."""
    seconds, stopped = [0.1], threading.Event()
    image = base64.b64encode(encode(picture("a lighthouse", 512, 512), "a lighthouse", "png", BYTES)).decode()
    answer = json.dumps({"output": {"images": [image], "info": "{}", "parameters": {}, "worker": {}}})
    base, headers = f"{queue.url}/v2/{queue.endpoint}", {"Authorization": queue.worker_key}

    def work() -> None:
        with httpx.Client(headers=headers, timeout=30, trust_env=False) as http:
            while not stopped.is_set():
                taken = http.get(f"{base}/job-take/pod?gpu=x")
                if taken.status_code == httpx.codes.OK:
                    time.sleep(seconds[0])
                    http.post(f"{base}/job-done/pod/{taken.json()['id']}?gpu=x&isStream=false", content=answer)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield seconds
    finally:
        stopped.set()
        thread.join()


@contextmanager
def gateway(queue: SandboxRunPod) -> Iterator[str]:
    """The address of a gateway in front of the queue."""
    with tempfile.TemporaryDirectory() as folder:
        environ: dict[str, Any] = {**os.environ, "XDG_DATA_HOME": folder}
        command = [sys.executable, "-m", "a1111_client", "serve", "--port", "0", "--url"]
        process = subprocess.Popen(
            [*command, f"{queue.url}/v2/{queue.endpoint}"],
            cwd=Path(__file__).parent.parent,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[4].rstrip(",")
        finally:
            process.terminate()
            process.wait(20)


if __name__ == "__main__":
    run("The gateway", measure)

"""What it costs that jobs alternate between two checkpoints: the real SDK's loop, a full queue, two jobs in flight.

    python -m benchmarks.checkpoints [--quick] [--json FILE]

The sandbox's WebUI takes a second for a load, and a second for a generation. So half of the time is the least that
switches can take. What is above that are the worker's own requests: its lists, its options, its proof. The first two
jobs, which load both checkpoints for the first time, do not count.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.place import place, worker
from benchmarks.report import Row, run
from sandbox.civitai import SandboxCivitAI
from sandbox.models import sdxl_checkpoint
from sandbox.runpod import SandboxRunPod

LOAD, GENERATION, STEPS = 1.0, 1.0, 10
OTHER = 77


def measure(quick: bool) -> list[Row]:
    jobs = 6 if quick else 20
    alternating, seconds = timings_of([(None, "Other")[number % 2] for number in range(jobs)])
    switching = sum(job["switch"] for job in alternating)
    one, seconds_of_one = timings_of([None] * jobs)
    share = switching / seconds
    return [
        Row(
            f"{jobs} jobs that alternate between two checkpoints: the share of the time that switches take",
            f"{share:.3f} ({switching / jobs:.2f} s a job, {seconds / jobs:.2f} s in all)",
            "≤ 0.55 (0.5 are the loads)",
            share <= 0.55,
        ),
        Row(
            f"{jobs} jobs of one checkpoint, for comparison",
            f"{sum(job['switch'] for job in one) / seconds_of_one:.3f} ({seconds_of_one / jobs:.2f} s a job)",
        ),
    ]


def timings_of(checkpoints: Sequence[str | None]) -> tuple[list[dict[str, float]], float]:
    """The timings of jobs with these checkpoints (None: the worker's own), and the seconds that all took."""
    pace = ("--switch-seconds", str(LOAD), "--step-seconds", str(GENERATION / STEPS))
    civitai = SandboxCivitAI()
    with place(*pace) as here, civitai, SandboxRunPod(long_poll=5.0) as queue:
        path = sdxl_checkpoint(here.folder / "other.safetensors", OTHER, 3_000_000)
        civitai.add(OTHER, path, name="Other", base_model="SDXL 1.0", model_type="Checkpoint")
        origins = f"{civitai.url},{civitai.storage.url}"
        settings = {"CIVITAI_URL": civitai.url, "STORAGE_HOSTS": origins}
        listed = json.dumps([{"name": "Other", "reference": f"civitai:1@{OTHER}"}])
        with worker(here, queue, CHECKPOINTS=listed, JOBS_IN_FLIGHT="2", **settings):
            for warm_up in ("Other", checkpoints[-1]):
                finish(queue, [queue.submit(_input(warm_up))])
            began = time.monotonic()
            answers = finish(queue, [queue.submit(_input(checkpoint)) for checkpoint in checkpoints])
            seconds = time.monotonic() - began
    return [answer["worker"]["timings"] for answer in answers], seconds


def finish(queue: SandboxRunPod, ids: Sequence[str]) -> list[dict[str, Any]]:
    answers = []
    for job_id in ids:
        status = queue.wait(job_id, timeout=300)
        if status["status"] != "COMPLETED":
            raise RuntimeError(f"a job of the bench failed: {status.get('error')}")
        answers.append(status["output"])
    return answers


def _input(checkpoint: str | None) -> dict[str, object]:
    return {"prompt": "a lighthouse", "steps": STEPS, "width": 64, "height": 64, "checkpoint": checkpoint}


if __name__ == "__main__":
    run("Two checkpoints in turn", measure)

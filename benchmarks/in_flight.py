"""How long the GPU waits between two jobs: the real SDK's loop, a full queue, 2 s generations, 2 MB images.

    python -m benchmarks.in_flight [--quick] [--json FILE]

Queue, WebUI and worker are processes of their own. The WebUI notes when each generation began and ended; efficiency is
generation time over the time from the first beginning to the last end. The first job is warm-up and does not count.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.place import place, worker
from benchmarks.report import Row, run
from sandbox.civitai import SandboxCivitAI
from sandbox.models import sdxl_lora
from sandbox.runpod import SandboxRunPod

GENERATION, STEPS = 2.0, 10
LORA_BYTES = 300_000
FIRST_LORA = 7_000_000


@dataclass(frozen=True)
class Gaps:
    """Seconds between generations, and the part of the time in which the GPU generated."""

    seconds: list[float]
    efficiency: float

    def __str__(self) -> str:
        median, worst = statistics.median(self.seconds), max(self.seconds)
        return f"median {median * 1000:.0f} ms, worst {worst * 1000:.0f} ms, efficiency {self.efficiency:.3f}"


def measure(quick: bool) -> list[Row]:
    jobs = 6 if quick else 20
    two, one = gaps(2, jobs), gaps(1, jobs)
    rows = [
        Row(
            f"{jobs} jobs queued, 2 in flight: idle between generations",
            str(two),
            "median ≤ 20 ms, worst ≤ 100 ms",
            statistics.median(two.seconds) <= 0.020 and max(two.seconds) <= 0.100,
        ),
        Row(f"{jobs} jobs queued, 2 in flight: efficiency", f"{two.efficiency:.3f}", "≥ 0.98", two.efficiency >= 0.98),
        Row(f"{jobs} jobs queued, 1 in flight, for comparison", str(one)),
    ]
    for in_flight in (2, 3):
        found = gaps(in_flight, jobs, with_loras=True)
        rows.append(
            Row(
                f"{jobs} jobs, each with a new LoRA that takes 1 s to arrive, {in_flight} in flight",
                str(found),
                "≥ 0.95 with 2 or 3",
                found.efficiency >= 0.95,
            )
        )
    return rows


def gaps(in_flight: int, jobs: int, *, with_loras: bool = False) -> Gaps:
    pace = ("--image-bytes", "2000000", "--step-seconds", str(GENERATION / STEPS))
    with tempfile.NamedTemporaryFile(prefix="journal-") as journal, place(*pace, "--journal", journal.name) as here:
        civitai = SandboxCivitAI()
        for number in range(jobs + 1):
            path = sdxl_lora(here.folder / f"{number}.safetensors", number, LORA_BYTES)
            civitai.add(FIRST_LORA + number, path, name=f"LoRA {number}")
        civitai.storage.rate = LORA_BYTES  # bytes a second: each LoRA takes one
        with civitai, SandboxRunPod(long_poll=5.0) as queue:
            origins = f"{civitai.url},{civitai.storage.url}"
            sources = {"CIVITAI_URL": civitai.url, "STORAGE_HOSTS": origins, "MODEL_HOSTS": origins}
            with worker(here, queue, JOBS_IN_FLIGHT=str(in_flight), **sources):
                ids = [queue.submit(_input(number, with_loras)) for number in range(jobs + 1)]
                for job_id in ids:
                    status = queue.wait(job_id, timeout=120)
                    if status["status"] != "COMPLETED":
                        raise RuntimeError(f"a job of the bench failed: {status.get('error')}")
        return _from(Path(journal.name))


def _input(number: int, with_loras: bool) -> dict[str, object]:
    job: dict[str, object] = {"prompt": "a lighthouse", "seed": number, "steps": STEPS, "width": 512, "height": 512}
    return {**job, "loras": [{"version_id": FIRST_LORA + number}]} if with_loras else job


def _from(journal: Path) -> Gaps:
    lines = [line.split() for line in journal.read_text().splitlines()][1:]
    spans: Sequence[tuple[float, float]] = [(float(began), float(ended)) for began, ended in lines]
    seconds = [later[0] - earlier[1] for earlier, later in itertools.pairwise(spans)]
    generated = sum(ended - began for began, ended in spans)
    return Gaps(seconds, generated / (spans[-1][1] - spans[0][0]))


if __name__ == "__main__":
    run("Jobs in flight", measure)

"""What large results and large pictures take of the worker's memory: jobs through the real SDK.

    python -m benchmarks.memory [--quick] [--json FILE]

The worker is a process of its own, so are the WebUI and, in this one, the queue. What is compared is the resident
size (VmRSS) of the idle worker: after the last job, and after the second or before the first. The jobs of the first
part have results of 20 MB. Those of the second part bring as many pixels as a job may have when they are decoded
(128 MB). All of them are noise, so that their PNGs are as large as PNGs get.
"""

from __future__ import annotations

import io
import time
from pathlib import Path

from PIL import Image

from benchmarks.place import place, worker
from benchmarks.report import Row, run
from sandbox.runpod import COMPLETED, SandboxRunPod
from sandbox.server import Exchange, Server

MB = 1_000_000

JOBS, QUICK_JOBS = 50, 8
IMAGE_BYTES = 14_800_000  # 19.7 MB as base64: just below what RunPod takes of /runsync
ALLOWED = 1.5


PICTURE = 2_900, 2_900  # pixels; five of them are 126 MB when they are decoded
PICTURES = 5
PICTURE_JOBS, QUICK_PICTURE_JOBS = 8, 4
ALLOWED_PEAK = 1_500 * MB


def measure(quick: bool) -> list[Row]:
    return [*measure_results(quick), *measure_pictures(quick)]


def measure_pictures(quick: bool) -> list[Row]:
    """Two jobs in flight: one generates, and the other one's pictures are fetched and decoded."""
    jobs = QUICK_PICTURE_JOBS if quick else PICTURE_JOBS
    with (
        PictureHost() as host,
        place("--step-seconds", "0.5") as here,
        SandboxRunPod(long_poll=1.0) as queue,
        worker(here, queue, IMAGE_HOSTS=host.url, JOBS_IN_FLIGHT="2") as pid,
    ):
        queue.wait_for_worker(timeout=60)
        before = idle_size(pid)
        run_picture_jobs(queue, host, jobs)
        last, peak = idle_size(pid), resident(pid, "VmHWM")
    return [
        _growth(
            f"… after {jobs} img2img, each with {PICTURES} pictures of noise, against before the first", before, last
        ),
        Row(
            "… at most on the way, with two of them in flight",
            f"{peak / MB:.0f} MB",
            f"≤ {ALLOWED_PEAK / MB:.0f} MB",
            peak <= ALLOWED_PEAK,
        ),
    ]


class PictureHost(Server):
    """Serves one picture of noise, in a format that is small enough to be taken."""

    def __init__(self) -> None:
        super().__init__()
        file = io.BytesIO()
        channels = [Image.effect_noise(PICTURE, 120) for _ in range(3)]
        Image.merge("RGB", channels).save(file, "JPEG", quality=90)
        self._picture = file.getvalue()

    def answer(self, exchange: Exchange) -> None:
        exchange.send(200, self._picture)


def run_picture_jobs(queue: SandboxRunPod, host: PictureHost, count: int) -> None:
    job = {
        "task": "img2img",
        "init_images": [f"{host.url}/{number}" for number in range(PICTURES)],
        "batch_size": PICTURES,
        "width": 64,
        "height": 64,
        "steps": 4,
    }
    for job_id in [queue.submit({**job, "seed": number}) for number in range(count)]:
        status = queue.wait(job_id, timeout=300)
        if status["status"] != COMPLETED:
            raise RuntimeError(f"a job of the bench failed: {status}"[:500])


def measure_results(quick: bool) -> list[Row]:
    jobs = QUICK_JOBS if quick else JOBS
    with (
        place("--image-bytes", str(IMAGE_BYTES)) as here,
        SandboxRunPod(long_poll=1.0) as queue,
        worker(here, queue) as pid,
    ):
        queue.wait_for_worker(timeout=60)
        before = resident(pid)
        run_jobs(queue, 2)
        second = idle_size(pid)
        run_jobs(queue, jobs - 2)
        last, peak = idle_size(pid), resident(pid, "VmHWM")
    return [
        _growth(f"resident size of the idle worker after {jobs} jobs of 20 MB, against after the second", second, last),
        Row("… before the first job, and at most on the way", f"{before / MB:.0f} MB, {peak / MB:.0f} MB"),
    ]


def _growth(what: str, first: int, last: int) -> Row:
    ratio = last / first
    measured = f"{ratio:.2f} × ({last / MB:.0f} MB, {first / MB:.0f} MB)"
    return Row(what, measured, f"≤ {ALLOWED} ×", ratio <= ALLOWED)


def run_jobs(queue: SandboxRunPod, count: int) -> None:
    """All queued at once, and their results forgotten here as soon as they are there."""
    job = {"prompt": "a lighthouse", "steps": 1, "width": 64, "height": 64}
    for job_id in [queue.submit({**job, "seed": number}, sync=True) for number in range(count)]:
        status = queue.wait(job_id, timeout=120)
        if status["status"] != COMPLETED:
            raise RuntimeError(f"a job of the bench failed: {status}"[:500])
        done = queue.jobs[job_id]
        if done.answer_bytes < 0.95 * 20 * MB:
            raise RuntimeError(f"the result is {done.answer_bytes} bytes, and was to be 20 MB")
        done.output = None


def idle_size(pid: int) -> int:
    """Resident size after the last answer was sent: the smallest of ten measurements in a second."""
    sizes = []
    for _ in range(10):
        time.sleep(0.1)
        sizes.append(resident(pid))
    return min(sizes)


def resident(pid: int, field: str = "VmRSS") -> int:
    """Bytes, from /proc."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{field}:")) * 1024


if __name__ == "__main__":
    run("Memory", measure)

"""What large results leave behind in the worker's memory: 50 jobs of 20 MB through the real SDK.

    python -m benchmarks.memory [--quick] [--json FILE]

The worker is a process of its own, so are the WebUI and, in this one, the queue. What is compared is the resident size
(VmRSS) of the idle worker: after the second job and after the last.
"""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.place import place, worker
from benchmarks.report import Row, run
from sandbox.runpod import COMPLETED, SandboxRunPod

JOBS, QUICK_JOBS = 50, 8
IMAGE_BYTES = 14_800_000  # 19.7 MB as base64: just below what RunPod takes of /runsync
ALLOWED = 1.5
MB = 1_000_000


def measure(quick: bool) -> list[Row]:
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
    ratio = last / second
    return [
        Row(
            f"resident size of the idle worker after {jobs} jobs of 20 MB, against after the second",
            f"{ratio:.2f} × ({last / MB:.0f} MB, {second / MB:.0f} MB)",
            f"≤ {ALLOWED} ×",
            ratio <= ALLOWED,
        ),
        Row("… before the first job, and at most on the way", f"{before / MB:.0f} MB, {peak / MB:.0f} MB"),
    ]


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

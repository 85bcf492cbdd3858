"""A worker under constant faults: `make soak`, or python -m tests.soak [--minutes 10] [--seed N] [--keep]

The real start.sh runs the real handler.py and a WebUI (tests/soak_webui.py). RunPod's queue and CivitAI are the
sandbox's. The models lie on a file system that fails on request (tests/fuse.py), if this machine can mount one. Eight
jobs are always in the queue, and two in flight. A seeded random generator gives each job a fault: one of the ways in
which a WebUI fails, one of those in which a download or the volume fails, or a caller who cancels. A worker that asks
for a new container gets one as from RunPod, but only after it has asked a few times, so that a worker also runs on
after its faults.

In the end every job must have an outcome that its own fault allows. There are two exceptions: a WebUI that dies may
cost one more job that ran beside, and a container that is stopped may cost the jobs that ran in it. Nothing may be left
over: no thread, file, partial file, lease, hold or process. Memory must not grow. Only then the exit status is 0.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from sandbox.civitai import HTML_PAGE, NOT_FOUND, SERVER_ERROR, SandboxCivitAI, ServerFault
from sandbox.models import sdxl_checkpoint, sdxl_lora
from sandbox.runpod import CANCELLED, COMPLETED, FINAL, IN_QUEUE, QueuedJob, SandboxRunPod
from tests.fuse import FaultyVolume, faulty_volume, why_not
from tests.soak_webui import launch_py
from tests.support import ROOT, free_port

CHECKPOINT = 1590699
POOL = tuple(range(7_000_000, 7_000_006))  # LoRAs that many jobs use
FIRST_OWN_LORA = 8_000_000  # each job with a failing download has a LoRA of its own
LORA_BYTES = 300_000
KEY = "the-soak-key"

JOBS_IN_QUEUE = 8
GENERATION_TIMEOUT = 6.0
SHUTDOWN_GRACE = 8.0
STEPS, MANY_STEPS = 10, 150  # 0.2 s, and 3 s: long enough to cancel the job
SLOW_BATCHES = 4  # of MANY_STEPS: longer than GENERATION_TIMEOUT

# Faults of the WebUI: how likely each is, and the outcomes that it allows for its job.
WEBUI_FAULTS: Mapping[str, tuple[float, frozenset[str]]] = {
    "die-during": (0.05, frozenset({"WEBUI_LOST"})),
    "die-after": (0.05, frozenset({COMPLETED})),  # just after its answer
    "die-in-switch": (0.05, frozenset({"WEBUI_LOST"})),  # the next process dies too, while it loads
    "hang": (0.05, frozenset({"WEBUI_LOST"})),  # ignores /interrupt
    "oom": (0.05, frozenset({"OUT_OF_MEMORY"})),
    "nan": (0.05, frozenset({"GENERATION_FAILED"})),
    "black": (0.05, frozenset({"GENERATION_FAILED"})),
    "502": (0.05, frozenset({"WEBUI_LOST"})),
    "html": (0.05, frozenset({"WEBUI_LOST"})),
    "half": (0.05, frozenset({"WEBUI_LOST"})),
    "404": (0.05, frozenset({COMPLETED})),  # the router's, once: it shows nothing about the job
    "other-checkpoint": (0.05, frozenset({"CHECKPOINT_NOT_LOADED"})),
    "silent": (0.02, frozenset({"WEBUI_LOST"})),  # its process is stopped: no answer to any request
    "slow": (0.02, frozenset({"JOB_TIMEOUT"})),  # longer than GENERATION_TIMEOUT; /interrupt works
    "die-in-boot": (0.02, frozenset({"WEBUI_LOST"})),  # the next process ends before it listens
    "switch-fails": (0.02, frozenset({"WEBUI_LOST"})),  # the next process cannot load the checkpoint
    "poisoned": (0.02, frozenset({COMPLETED})),  # it is restarted, and the job only takes longer
    "no-images": (0.02, frozenset({"GENERATION_FAILED"})),
    "reset": (0.02, frozenset({"WEBUI_LOST"})),
}
# Faults of CivitAI, in the same way. None: the download succeeds anyway.
CIVITAI_FAULTS: Mapping[str, tuple[float, str | None]] = {
    "404": (0.05, "MODEL_NOT_FOUND"),
    "500": (0.05, "DOWNLOAD_FAILED"),
    "cut": (0.05, None),
    "stall": (0.05, None),
    "html": (0.05, "MODEL_REJECTED"),
    "wrong-bytes": (0.05, "MODEL_REJECTED"),
}
# Faults of the volume: how likely each is, the calls that fail for the files of the job's own LoRA, the outcomes.
# `%d` stands for the LoRA's version.
PART, MODEL = "models/loras/.parts/*v%d*.part", "models/loras/*_%d.safetensors"
VOLUME_FAILED = frozenset({"VOLUME_FAILED"})
FULL = frozenset({COMPLETED, "VOLUME_FULL"})  # full, if there is nothing that may be evicted
VOLUME_FAULTS: Mapping[str, tuple[float, Mapping[str, Any], frozenset[str]]] = {
    "write": (0.02, {"call": "write", "number": errno.EIO, "on": PART}, VOLUME_FAILED),
    "write, full": (0.02, {"call": "write", "number": errno.EDQUOT, "on": PART, "times": 1}, FULL),
    "fsync": (0.02, {"call": "fsync", "number": errno.EIO, "on": PART, "times": 1, "is_lost": True}, VOLUME_FAILED),
    "fsync, full": (0.02, {"call": "fsync", "number": errno.EDQUOT, "on": PART, "times": 1, "is_lost": True}, FULL),
    "close, full": (0.02, {"call": "close", "number": errno.EDQUOT, "on": PART, "times": 1, "is_lost": True}, FULL),
    "rename": (0.02, {"call": "rename", "number": errno.ESTALE, "on": PART}, VOLUME_FAILED),
    "stat": (0.02, {"call": "stat", "number": errno.EIO, "on": MODEL}, VOLUME_FAILED),
    "gone": (0.02, {"call": "stat", "number": errno.ENOENT, "on": MODEL, "times": 2}, frozenset({COMPLETED})),
    "lease": (
        0.02,
        {"call": "create", "number": errno.EACCES, "on": "models/loras/.leases/v%d"},
        frozenset({COMPLETED}),
    ),
    "hold": (
        0.02,
        {"call": "create", "number": errno.EROFS, "on": "models/loras/.holds/*_%d.*"},
        frozenset({COMPLETED}),
    ),
    "sidecar": (0.02, {"call": "rename", "number": errno.EIO, "on": f"{MODEL}.json"}, frozenset({COMPLETED})),
}
CANCELLED_JOBS = 0.05
INVALID_JOBS = 0.02
WEBUI_LOST, JOB_CANCELLED = "WEBUI_LOST", "JOB_CANCELLED"
CANCEL_SECONDS = 1.5  # the SDK polls for cancellations every second: before that it may not know of one


@dataclass
class SoakJob:
    """One job of the soak, with its fault."""

    number: int
    webui: str = ""
    civitai: str = ""
    volume: str = ""
    cancel: str = ""  # "in the queue" or "at work"
    is_invalid: bool = False
    id: str = ""
    cancel_at: float | None = None
    was_in_time: bool = False  # the queue accepted the cancellation: the job had not ended yet

    @property
    def fault(self) -> str:
        if self.cancel:
            return f"cancelled {self.cancel}"
        if self.is_invalid:
            return "an invalid request"
        if self.civitai and CIVITAI_FAULTS[self.civitai][1]:
            return f"CivitAI: {self.civitai}"  # the WebUI never gets this job
        if self.volume:
            return f"volume: {self.volume}"
        return f"WebUI: {self.webui}" if self.webui else f"CivitAI: {self.civitai}" if self.civitai else "none"

    @property
    def allowed(self) -> frozenset[str]:
        if self.cancel:
            return frozenset({CANCELLED} if self.was_in_time else {CANCELLED, COMPLETED})
        if self.is_invalid:
            return frozenset({"INVALID_REQUEST"})
        code = CIVITAI_FAULTS[self.civitai][1] if self.civitai else None
        if code:
            return frozenset({code})
        if self.volume:
            return VOLUME_FAULTS[self.volume][2]
        return WEBUI_FAULTS[self.webui][1] if self.webui else frozenset({COMPLETED})

    @property
    def own_lora(self) -> int:
        return FIRST_OWN_LORA + self.number

    def input(self) -> dict[str, Any]:
        chance = random.Random(self.number)
        steps = MANY_STEPS if self.webui == "slow" or self.cancel == "at work" else STEPS
        loras = [self.own_lora] if self.civitai or self.volume else chance.sample(POOL, chance.choice((0, 1, 1, 2)))
        return {
            "prompt": f"a lighthouse, soak {self.number} {self.webui}".strip(),
            "steps": 0 if self.is_invalid else steps,
            "n_iter": SLOW_BATCHES if self.webui == "slow" else 1,
            "width": 64,
            "height": 64,
            "seed": self.number,
            "loras": [{"version_id": version} for version in loras],
        }


def draw_job(number: int, seed: int) -> SoakJob:
    """A job with its fault. It depends only on the number and the seed."""
    chance = random.Random(f"{seed}:{number}")

    def one_of(faults: Mapping[str, tuple[Any, ...]]) -> str:
        weights = [weight for weight, *_ in faults.values()]
        return chance.choices(["", *faults], [1.0 - sum(weights), *weights])[0]

    if (roll := chance.random()) < CANCELLED_JOBS:
        return SoakJob(number, cancel=chance.choice(("in the queue", "at work", "at work")))
    if roll < CANCELLED_JOBS + INVALID_JOBS:
        return SoakJob(number, is_invalid=True)
    if volume := one_of(VOLUME_FAULTS):
        return SoakJob(number, volume=volume)
    return SoakJob(number, webui=one_of(WEBUI_FAULTS), civitai=one_of(CIVITAI_FAULTS))


@dataclass
class ResourceUsage:
    """What a worker's process uses."""

    resident: int  # bytes
    threads: int
    files: int

    @classmethod
    def of(cls, pid: int) -> ResourceUsage:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return cls(int(status["VmRSS"].split()[0]) * 1024, int(status["Threads"]), files)


@dataclass
class SoakContainer:
    """One container from its start to its end. `early` and `late` is what its worker used then."""

    process: subprocess.Popen[bytes]
    began: float
    jobs: int = 0
    early: ResourceUsage | None = None  # after 10 jobs
    late: ResourceUsage | None = None
    stopping: float | None = None
    ended: float | None = None
    status: int | None = None


@dataclass
class Soak:
    """The servers, the container, the jobs."""

    folder: Path
    seed: int
    replace_every: int
    queue: SandboxRunPod
    civitai: SandboxCivitAI
    volume: FaultyVolume | None  # None: no file system can be mounted here, and the volume does not fail
    jobs: dict[str, SoakJob] = field(default_factory=dict)
    containers: list[SoakContainer] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    counted: collections.Counter[str] = field(default_factory=collections.Counter)
    _refresh_requests: int = 0
    _ended: set[str] = field(default_factory=set)
    _volume_faults: dict[str, int] = field(default_factory=dict)  # by job
    _late: list[tuple[str, str, float, str]] = field(default_factory=list)  # kind, job, time, body

    # The container

    @property
    def container(self) -> SoakContainer:
        return self.containers[-1]

    @property
    def notes(self) -> Path:
        return self.folder / "notes"

    @property
    def models(self) -> Path:
        return self.folder / "volume" / "models"

    def start(self) -> None:
        """Start a new container on the same volume."""
        origins = f"{self.civitai.url},{self.civitai.storage.url}"
        number = len(self.containers)
        shutil.rmtree(self.folder / "tmp", ignore_errors=True)  # a container's own disk is new
        (self.folder / "tmp").mkdir()
        (self.notes / "next-fault").unlink(missing_ok=True)
        environment = self.queue.worker_env(
            pod_id=f"soak-{number}",
            TMPDIR=str(self.folder / "tmp"),
            SOAK_FOLDER=str(self.notes),
            PYTHONPATH=str(ROOT),
            ALLOW_CPU="1",
            WEBUI_DIR=str(self.folder / "webui"),
            WEBUI_PYTHON=sys.executable,
            WORKER_DIR=str(ROOT),
            WORKER_PYTHON=sys.executable,
            WEBUI_URL=f"http://127.0.0.1:{free_port()}",
            WEBUI_STATE_FILE=str(self.folder / "tmp" / "webui.state"),
            WORKER_STATE_FILE=str(self.folder / "tmp" / "worker.state"),
            WEBUI_MODELS_DIR=str(self.folder / "tmp" / "webui-models"),
            WEBUI_RESTARTS="1000",  # this is not a test of giving up
            WEBUI_RESTART_WINDOW="5",
            WEBUI_RESTART_BACKOFF="0.05",
            MODELS_DIR=str(self.models),
            MODEL_SOURCES="",
            CIVITAI_URL=self.civitai.url,
            CIVITAI_API_KEY=KEY,
            STORAGE_HOSTS=origins,
            MODEL_HOSTS=origins,
            GENERATION_TIMEOUT=str(GENERATION_TIMEOUT),
            JOB_TIMEOUT="300",
            SHUTDOWN_GRACE=str(SHUTDOWN_GRACE),
            JOBS_IN_FLIGHT="2",
        )
        with (self.folder / "container.log").open("ab") as log:
            process = subprocess.Popen(
                [str(ROOT / "start.sh")],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.containers.append(SoakContainer(process, time.monotonic()))

    def stop(self) -> None:
        """Stop the container as RunPod does: no more jobs for it, then SIGTERM."""
        container = self.container
        self.queue.fail(ServerFault(204), times=None, on="/job-take")
        self._tick_for(0.3)  # the worker starts the jobs of its last poll
        container.stopping = time.monotonic()
        container.process.send_signal(signal.SIGTERM)
        try:
            container.status = container.process.wait(SHUTDOWN_GRACE + 5.0)
        except subprocess.TimeoutExpired:
            self.problems.append("the container did not end within its grace")
            os.killpg(container.process.pid, signal.SIGKILL)
            container.process.wait()
        container.ended = time.monotonic()
        self.queue.heal()
        if container.status not in (143, None):
            self.problems.append(f"the container ended with {container.status}")
        for pid in descendants(self.notes):
            self.problems.append(f"a process outlived its container: {command_of(pid)}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def worker_pid(self) -> int | None:
        """The process of handler.py: the child of start.sh that runs it."""
        for pid in descendants(self.notes):
            with contextlib.suppress(OSError, IndexError):
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.container.process.pid and "handler.py" in command_of(pid):
                    return pid
        return None

    def webui_pid(self) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            return int((self.folder / "tmp" / "webui.state").read_text())
        return None

    # The jobs

    def submit(self, job: SoakJob | None = None) -> SoakJob:
        job = job or draw_job(len(self.jobs), self.seed)
        if self.volume is None:
            job.volume = ""
        if job.civitai or job.volume:
            path = sdxl_lora(self.folder / "site" / f"{job.own_lora}.safetensors", job.own_lora, LORA_BYTES)
            self.civitai.add(job.own_lora, path, name=f"Soak {job.number}")
            self._set_civitai_fault(job)
        fault = self._set_volume_fault(job)
        job.id = self.queue.submit(job.input())
        self.jobs[job.id] = job
        if fault is not None:
            self._volume_faults[job.id] = fault
        if job.cancel == "in the queue":
            self._cancel(job)
        return job

    def _set_civitai_fault(self, job: SoakJob) -> None:
        """Make CivitAI fail for this job's own LoRA."""
        path, key = f"/{job.own_lora}", self.civitai.versions[job.own_lora].files[0].key
        storage = self.civitai.storage
        if job.civitai == "404":
            self.civitai.fail(NOT_FOUND, times=None, on=path)
        elif job.civitai == "500":
            self.civitai.fail(SERVER_ERROR, times=None, on=path)
        elif job.civitai == "cut":
            storage.fail(ServerFault(cut_after=LORA_BYTES // 3), on=key)
        elif job.civitai == "stall":
            storage.fail(ServerFault(stall_after=LORA_BYTES // 3), on=key)
        elif job.civitai == "html":
            storage.fail(HTML_PAGE, times=None, on=key)
        elif job.civitai == "wrong-bytes":
            other = sdxl_lora(self.folder / "site" / f"other-{job.own_lora}.safetensors", 1, LORA_BYTES)
            self.civitai.replace(job.own_lora, other)

    def _set_volume_fault(self, job: SoakJob) -> int | None:
        """Make the volume fail for this job's own LoRA."""
        if self.volume is None or not job.volume:
            return None
        fault = dict(VOLUME_FAULTS[job.volume][1])
        return self.volume.fail(**{**fault, "on": fault["on"] % job.own_lora})

    def _cancel(self, job: SoakJob) -> None:
        url = f"{self.queue.url}/v2/{self.queue.endpoint}/cancel/{job.id}"
        answer = requests.post(url, timeout=10)
        answer.raise_for_status()
        job.was_in_time = answer.json()["status"] == CANCELLED

    # Time

    def tick(self) -> None:
        """Cancel the jobs that are due, and see which jobs have ended and what came too late."""
        now = time.monotonic()
        for kind, found in (("progress", self.queue.late_progress), ("a result", self.queue.late_results)):
            seen = sum(late[0] == kind for late in self._late)
            self._late += [(kind, job_id, now, str(body)[:120]) for job_id, body in found[seen:]]
        for job in list(self.jobs.values()):
            queued = self.queue.jobs[job.id]
            if queued.status in FINAL:
                self._count_ended(job, queued)
            elif job.cancel == "at work" and queued.progress:
                job.cancel_at = job.cancel_at or now + random.Random(job.number).random()
                if now >= job.cancel_at:
                    self._cancel(job)
        if self.container.process.poll() is not None:
            raise RuntimeError(f"start.sh ended with {self.container.process.returncode}")

    def _count_ended(self, job: SoakJob, queued: QueuedJob) -> None:
        if job.id in self._ended:
            return
        self._ended.add(job.id)
        self.container.jobs += 1
        if self.volume is not None and job.id in self._volume_faults:
            self.volume.heal(self._volume_faults.pop(job.id))
        self.counted["requests for a new container"] += queued.stop_pod
        self._refresh_requests += queued.stop_pod
        if self.container.jobs == 10 or self.container.jobs % 5 == 0:
            pid = self.worker_pid()
            with contextlib.suppress(OSError):
                usage = ResourceUsage.of(pid) if pid else None
                self.container.early = self.container.early or (usage if self.container.jobs >= 10 else None)
                self.container.late = usage or self.container.late

    def _tick_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.wait(lambda: time.monotonic() >= end, seconds + 60)

    def wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait for the condition, at most so many seconds, while the soak goes on; whether it became true."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                return False
            self.tick()
            time.sleep(0.02)
        return True

    def soak(self, seconds: float) -> None:
        """Keep the queue full until the time is up, then wait for the jobs that are left."""
        end = reported = time.monotonic()
        end += seconds
        while time.monotonic() < end:
            self.tick()
            waiting = sum(job.status == IN_QUEUE for job in self.queue.jobs.values())
            for _ in range(JOBS_IN_QUEUE - waiting):
                self.submit()
            if self._refresh_requests >= self.replace_every:
                self._refresh_requests = 0
                self.counted["containers replaced"] += 1
                self.stop()
                self.start()
            if time.monotonic() - reported >= 30:
                reported = time.monotonic()
                say(f"{end - reported:5.0f} s to go, {len(self._ended)} jobs done, {len(self.containers)} containers")
            time.sleep(0.02)
        if not self.wait(self._all_done, 240):
            stuck = [job.id for job in self.jobs.values() if self.queue.jobs[job.id].status not in FINAL]
            self.problems.append(f"{len(stuck)} jobs never ended: {[self.jobs[id].fault for id in stuck]}")

    def _all_done(self) -> bool:
        return all(self.queue.jobs[id].status in FINAL for id in self.jobs)

    def plain_jobs(self, count: int, what: str, *, seconds: float = 60) -> None:
        """Submit jobs without a fault. They must succeed."""
        jobs = [self.submit(SoakJob(len(self.jobs))) for _ in range(count)]
        if not self.wait(lambda: all(self.queue.jobs[job.id].status in FINAL for job in jobs), seconds):
            self.problems.append(f"{what}: no end within {seconds:.0f} s")
        for job in jobs:
            if self.queue.jobs[job.id].status != COMPLETED:
                self.problems.append(f"{what}: {self.queue.jobs[job.id].error}")

    def idle_usage(self) -> ResourceUsage:
        """What an idle worker uses: the smallest of ten measurements."""
        measured = []
        for _ in range(10):
            self._tick_for(0.2)
            if pid := self.worker_pid():
                measured.append(ResourceUsage.of(pid))
        return ResourceUsage(
            *(min(getattr(usage, name) for usage in measured) for name in ("resident", "threads", "files"))
        )

    def fail_while_idle(self) -> None:
        """If the WebUI dies or stops answering while there is no job, the next job must succeed."""
        before = self.webui_pid()
        assert before
        os.kill(before, signal.SIGKILL)
        self.plain_jobs(1, "after a WebUI that died while idle")
        before = self.webui_pid()
        assert before
        os.kill(before, signal.SIGSTOP)
        if not self.wait(lambda: self.webui_pid() not in (before, None), 75):
            self.problems.append("a WebUI that stopped answering while idle was not restarted")
            os.kill(before, signal.SIGCONT)
        self.plain_jobs(1, "after a WebUI that stopped answering while idle")

    def stop_at_work(self) -> None:
        """Stop the last container while a job runs that takes longer than its grace, and a second job waits for it."""
        ids = [self.submit(SoakJob(len(self.jobs), webui="slow")).id for _ in range(2)]
        self.wait(lambda: all(self.queue.jobs[id].progress for id in ids), 30)
        self.stop()
        if not self._all_done():
            self.problems.append("a job that ran when the container was stopped got no answer")

    # The checks at the end

    def check_jobs(self) -> dict[str, collections.Counter[str]]:
        """The outcomes of the jobs, by fault. Outcomes that are not allowed go to `problems`."""
        table: dict[str, collections.Counter[str]] = {}
        deaths = self._free_deaths()
        for job in sorted(self.jobs.values(), key=lambda job: self.queue.jobs[job.id].ended or 0.0):
            queued = self.queue.jobs[job.id]
            outcome, problem = outcome_of(job, queued, self.folder)
            shown = outcome
            if outcome not in job.allowed:
                shown = self._excuse(queued, outcome, deaths)
                if not shown:
                    shown = f"**{outcome}**"
                    self.problems.append(f"job {job.number} ({job.fault}) ended {outcome}: {queued.error}")
            if problem:
                self.problems.append(f"job {job.number} ({job.fault}): {problem}")
            table.setdefault(job.fault, collections.Counter())[shown] += 1
        self._check_late()
        for job_id, reason in self.queue.lost:
            self.problems.append(f"a result was lost: job {self.jobs[job_id].number}: {reason}")
        return table

    def _check_late(self) -> None:
        """Check what came after the end of its job. The worker hears of a cancellation a moment after it."""
        for kind, job_id, at, body in self._late:
            job, queued = self.jobs[job_id], self.queue.jobs[job_id]
            after = at - (queued.ended or at)
            if queued.status == CANCELLED and after <= CANCEL_SECONDS:
                self.counted["sent before the cancellation was known"] += 1
            else:
                self.problems.append(f"job {job.number} ({job.fault}): {after:.2f} s after its end came {kind}: {body}")

    def _free_deaths(self) -> list[float]:
        """When a WebUI died without a job of its own fault being lost."""
        lines = [line.split() for line in (self.notes / "journal").read_text().splitlines()]
        self.counted["processes of the WebUI"] = sum(event == "up" for _, event, _ in lines)
        return [float(at) for at, event, _ in lines if event == "free-death"]

    def _excuse(self, queued: QueuedJob, outcome: str, deaths: list[float]) -> str:
        """The outcome with the other cause that explains it; empty if there is none."""
        taken, ended = queued.taken or 0.0, queued.ended or 0.0
        if outcome == WEBUI_LOST:
            for at in deaths:
                if taken <= at <= ended:
                    deaths.remove(at)  # each death may cost one job
                    return f"{WEBUI_LOST} (died during another job)"
        if outcome in (JOB_CANCELLED, WEBUI_LOST):
            for container in self.containers:
                if container.stopping and taken <= container.stopping <= ended:
                    return f"{outcome} (container stopped)"
        return ""

    def check_usage(self, first: ResourceUsage, last: ResourceUsage) -> list[tuple[str, str, str]]:
        """What the worker used at first and at the end, as a table. Growth goes to `problems`."""
        rows = []
        for what, before, after, most in (
            # The worker's thread pool may have grown.
            ("threads of the idle worker", first.threads, last.threads, first.threads + 6),
            ("files open in the idle worker", first.files, last.files, first.files + 12),
        ):
            rows.append((what, f"{before} at first, {after} at the end", f"at most {most}"))
            if after > most:
                self.problems.append(f"{what}: {before} at first, {after} at the end")
        for container in self.containers:
            if container.early and container.late and container.jobs >= 20:
                ratio = container.late.resident / container.early.resident
                early, late = (f"{usage.resident / 1e6:.0f} MB" for usage in (container.early, container.late))
                figures = f"{early} after 10 jobs, {late} after {container.jobs}"
                rows.append(("memory of a worker", figures, "at most 1.3 ×"))
                if ratio > 1.3:
                    self.problems.append(f"memory grew {ratio:.2f} times: {figures}")
        return rows

    def check_leftovers(self) -> None:
        """After the last container the volume has only models, their sidecars and partial files that may be resumed."""
        resumable = {
            job.own_lora
            for job in self.jobs.values()
            if self.queue.jobs[job.id].status == CANCELLED
            or str(self.queue.jobs[job.id].error).startswith((JOB_CANCELLED, "VOLUME_F"))
        }
        for path in self.models.rglob("*"):
            if not path.is_file():
                continue
            name = path.relative_to(self.models)
            hidden = next((part for part in name.parts if part.startswith(".")), "")
            if hidden == ".parts":
                version = int("".join(c for c in name.name.partition(".")[0] if c.isdigit()) or 0)
                if version not in resumable:
                    self.problems.append(f"a partial file is left: {name}")
            elif hidden not in ("", ".urls") or ".safetensors" not in path.name:
                self.problems.append(f"left on the volume: {name}")
        for link in (self.folder / "tmp" / "webui-models").rglob("*"):
            if link.is_symlink() and not link.exists():
                self.problems.append(f"a link to nothing: {link.name}")


def outcome_of(job: SoakJob, queued: QueuedJob, folder: Path) -> tuple[str, str]:
    """COMPLETED, CANCELLED or the error code, and what is wrong with the answer itself."""
    if queued.status not in FINAL:
        return queued.status, ""
    if queued.status == CANCELLED:
        return CANCELLED, ""
    text = json.dumps([queued.output, queued.error])
    leaks = [secret for secret in (KEY, "Traceback", str(folder), "X-Amz") if secret in text]
    problem = f"its answer shows {', '.join(leaks)}" if leaks else ""
    output = queued.output if isinstance(queued.output, dict) else {}
    if queued.status == COMPLETED:
        return COMPLETED, problem or problem_of_success(job, output)
    code = str(output.get("code"))
    if not str(queued.error).startswith(f"{code}: ") or not isinstance(output.get("retryable"), bool):
        problem = problem or f"its error has the wrong form: {queued.error}"
    return code, problem


def problem_of_success(job: SoakJob, output: Mapping[str, Any]) -> str:
    """What is wrong with a success, if anything. The answer must be that of this job."""
    try:
        info, worker = json.loads(output["info"]), output["worker"]
        if f"soak {job.number}" not in info["prompt"] or info["all_seeds"] != [job.number]:
            return f"the picture of another job: {info['prompt']}"
        if len(output["images"]) != 1 or not all(lora["loaded"] for lora in worker["loras"]):
            return "not the requested pictures or LoRAs"
        if worker["checkpoint"]["file"] != "jib_mix_illustrious_realistic_v2.safetensors":
            return "another checkpoint"
    except (KeyError, TypeError, ValueError) as error:
        return f"not an answer of txt2img: {error!r}"
    return ""


def descendants(notes: Path) -> list[int]:
    """Every running process of this soak's containers. Each has SOAK_FOLDER in its environment."""
    mark, found = f"SOAK_FOLDER={notes}".encode(), []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError):
                if mark in (path / "environ").read_bytes().split(b"\0"):
                    found.append(int(path.name))
    return found


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return "?"


def say(line: str = "") -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def stock(folder: Path, civitai: SandboxCivitAI) -> None:
    """The checkpoint, the LoRAs that never fail, and a launch.py."""
    site = folder / "site"
    civitai.add(
        CHECKPOINT,
        sdxl_checkpoint(site / "checkpoint.safetensors", 1, 3_000_000),
        name="Jib Mix Illustrious Realistic",
        base_model="Illustrious",
        model_type="Checkpoint",
        size="pruned",
        fp="fp16",
    )
    for version in POOL:
        civitai.add(version, sdxl_lora(site / f"{version}.safetensors", version, LORA_BYTES), name=f"Good {version}")
    (folder / "notes").mkdir()
    (folder / "webui").mkdir()
    (folder / "webui" / "launch.py").write_text(launch_py(folder / "notes"))


def run(folder: Path, minutes: float, seed: int, replace_every: int) -> list[str]:
    """Soak a worker in `folder` and print the result. Returns the problems."""
    with contextlib.ExitStack() as stack:
        civitai = stack.enter_context(SandboxCivitAI(key=KEY))
        queue = stack.enter_context(SandboxRunPod(long_poll=1.0))
        volume = None if why_not() else stack.enter_context(faulty_volume(folder / "volume"))
        if volume is None:
            say(f"the volume does not fail: {why_not()}")
        stock(folder, civitai)
        soak = Soak(folder, seed, replace_every, queue, civitai, volume)
        soak.start()
        try:
            soak.plain_jobs(8, "the first jobs")
            first = soak.idle_usage()
            soak.soak(minutes * 60)
            soak.plain_jobs(4, "the last jobs")
            last = soak.idle_usage()
            soak.fail_while_idle()
            soak.stop_at_work()
        finally:
            for pid in descendants(soak.notes):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        table = soak.check_jobs()
        usage = soak.check_usage(first, last)
        soak.check_leftovers()
    show(soak, table, usage, minutes)
    return soak.problems


def show(
    soak: Soak,
    table: Mapping[str, collections.Counter[str]],
    usage: list[tuple[str, str, str]],
    minutes: float,
) -> None:
    say(f"\n{len(soak.jobs)} jobs in {minutes:g} minutes, seed {soak.seed}")
    say("\n| fault | jobs | ended |\n| --- | --- | --- |")
    for fault, outcomes in sorted(table.items()):
        ended = ", ".join(f"{count} × {outcome}" for outcome, count in outcomes.most_common())
        say(f"| {fault} | {sum(outcomes.values())} | {ended} |")
    say("\n| what | found | allowed |\n| --- | --- | --- |")
    for row in usage:
        say(f"| {' | '.join(row)} |")
    for what, count in sorted(soak.counted.items()):
        say(f"| {what} | {count} | |")
    say(f"\n{len(soak.problems)} problems" + (":" if soak.problems else ""))
    for line in soak.problems:
        say(f"- {line}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="the same seed gives the same faults")
    parser.add_argument(
        "--replace-every", type=int, default=3, help="how often a worker must ask for a new container until it gets one"
    )
    parser.add_argument("--keep", action="store_true", help="keep the folder with the container's log")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.randrange(1_000_000)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    say(f"soaking for {options.minutes:g} minutes, seed {seed}, in {folder}")
    problems = ["the soak did not finish"]
    try:
        problems = run(folder, options.minutes, seed, options.replace_every)
    finally:
        if problems or options.keep:
            say(f"the log: {folder / 'container.log'}")
        else:
            shutil.rmtree(folder)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""A worker that never has a good day: `make soak`, or python -m tests.soak [--minutes 10] [--seed N] [--keep]

The real start.sh keeps the real handler.py and a WebUI (tests/soak_webui.py); RunPod's queue and CivitAI are the
sandbox's. There are always eight jobs in the queue, two in flight. Each job draws its own misfortune from a seeded
random: one of the ways in which a WebUI fails, one in which a download fails, or a caller who cancels. A worker that
asks to be replaced is replaced as RunPod does it, every few times, so that one also lives on with what it has been
through.

In the end every job must have had the end that its own misfortune allows. The one thing that may cost another job is
a WebUI that died beside it, and each death costs one job at most; a container that was stopped may cost those that ran.
Nothing may be left over: no thread, file, part, lease, hold, process; memory must be flat. Exit status 0 only then.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from sandbox.civitai import HTML_PAGE, NOT_FOUND, SERVER_ERROR, CivitAI, Fault
from sandbox.models import sdxl_checkpoint, sdxl_lora
from sandbox.runpod import CANCELLED, COMPLETED, FINAL, IN_QUEUE, RunPod
from sandbox.runpod import Job as Queued
from tests.soak_webui import launch_py

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = 1590699
POOL = tuple(range(7_000_000, 7_000_006))  # LoRAs that are asked for again and again
FIRST = 8_000_000  # and one of its own for each job whose download is to fail
LORA_BYTES = 300_000
KEY = "the-soak-key"

IN_THE_QUEUE = 8
GENERATION_TIMEOUT = 6.0
SHUTDOWN_GRACE = 8.0
STEPS, MANY_STEPS = 10, 150  # 0.2 s, and 3 s: time to be cancelled in
SLOW_BATCHES = 4  # of many steps: beyond GENERATION_TIMEOUT

# What a job may end as that meets this in the WebUI, and how likely that is.
WEBUI: Mapping[str, tuple[float, frozenset[str]]] = {
    "die-during": (0.05, frozenset({"WEBUI_LOST"})),
    "die-after": (0.05, frozenset({COMPLETED})),  # as soon as it has answered
    "die-in-switch": (0.05, frozenset({"WEBUI_LOST"})),  # the next life dies once more, while it loads
    "hang": (0.05, frozenset({"WEBUI_LOST"})),  # deaf to /interrupt
    "oom": (0.05, frozenset({"OUT_OF_MEMORY"})),
    "nan": (0.05, frozenset({"GENERATION_FAILED"})),
    "black": (0.05, frozenset({"GENERATION_FAILED"})),
    "502": (0.05, frozenset({"WEBUI_LOST"})),
    "html": (0.05, frozenset({"WEBUI_LOST"})),
    "half": (0.05, frozenset({"WEBUI_LOST"})),
    "404": (0.05, frozenset({COMPLETED})),  # bare, once: says nothing about the job
    "other-checkpoint": (0.05, frozenset({"CHECKPOINT_NOT_LOADED"})),
    "silent": (0.02, frozenset({"WEBUI_LOST"})),  # stopped: answers nothing at all
    "slow": (0.02, frozenset({"JOB_TIMEOUT"})),  # beyond GENERATION_TIMEOUT, and heeds /interrupt
    "die-in-boot": (0.02, frozenset({"WEBUI_LOST"})),  # the next life ends before it listens
    "switch-fails": (0.02, frozenset({"WEBUI_LOST"})),  # the next life cannot load the checkpoint
    "poisoned": (0.02, frozenset({COMPLETED})),  # restarted, and the caller notices nothing but time
    "no-images": (0.02, frozenset({"GENERATION_FAILED"})),
    "reset": (0.02, frozenset({"WEBUI_LOST"})),
}
# And at CivitAI; None: the download comes through all the same.
CIVITAI: Mapping[str, tuple[float, str | None]] = {
    "404": (0.05, "MODEL_NOT_FOUND"),
    "500": (0.05, "DOWNLOAD_FAILED"),
    "cut": (0.05, None),
    "stall": (0.05, None),
    "html": (0.05, "MODEL_REJECTED"),
    "wrong-bytes": (0.05, "MODEL_REJECTED"),
}
CANCELS = 0.05
BAD_REQUESTS = 0.02
LOST, SHUT_DOWN = "WEBUI_LOST", "JOB_CANCELLED"
CROSSED = 1.5  # seconds: the SDK pauses for one between its questions for cancellations, and may not know of one yet


@dataclass
class Job:
    """One job of the soak and its misfortune."""

    number: int
    webui: str = ""
    civitai: str = ""
    cancel: str = ""  # in the queue, or at work
    bad: bool = False
    id: str = ""
    cancel_at: float | None = None
    was_in_time: bool = False  # the queue took the cancellation: the job had not ended yet

    @property
    def misfortune(self) -> str:
        if self.cancel:
            return f"cancelled {self.cancel}"
        if self.bad:
            return "a bad request"
        if self.civitai and CIVITAI[self.civitai][1]:
            return f"CivitAI: {self.civitai}"  # it never comes to the WebUI
        return f"WebUI: {self.webui}" if self.webui else f"CivitAI: {self.civitai}" if self.civitai else "none"

    @property
    def allowed(self) -> frozenset[str]:
        if self.cancel:
            return frozenset({CANCELLED} if self.was_in_time else {CANCELLED, COMPLETED})
        if self.bad:
            return frozenset({"INVALID_REQUEST"})
        code = CIVITAI[self.civitai][1] if self.civitai else None
        if code:
            return frozenset({code})
        return WEBUI[self.webui][1] if self.webui else frozenset({COMPLETED})

    @property
    def own_lora(self) -> int:
        return FIRST + self.number

    def input(self) -> dict[str, Any]:
        chance = random.Random(self.number)
        steps = MANY_STEPS if self.webui == "slow" or self.cancel == "at work" else STEPS
        loras = [self.own_lora] if self.civitai else chance.sample(POOL, chance.choice((0, 1, 1, 2)))
        return {
            "prompt": f"a lighthouse, soak {self.number} {self.webui}".strip(),
            "steps": 0 if self.bad else steps,
            "n_iter": SLOW_BATCHES if self.webui == "slow" else 1,
            "width": 64,
            "height": 64,
            "seed": self.number,
            "loras": [{"version_id": version} for version in loras],
        }


def draw(number: int, seed: int) -> Job:
    """A job with its misfortune: the same one for the same seed, whatever happens meanwhile."""
    chance = random.Random(f"{seed}:{number}")

    def one_of(faults: Mapping[str, tuple[float, object]]) -> str:
        weights = [weight for weight, _ in faults.values()]
        return chance.choices(["", *faults], [1.0 - sum(weights), *weights])[0]

    if (roll := chance.random()) < CANCELS:
        return Job(number, cancel=chance.choice(("in the queue", "at work", "at work")))
    if roll < CANCELS + BAD_REQUESTS:
        return Job(number, bad=True)
    return Job(number, webui=one_of(WEBUI), civitai=one_of(CIVITAI))


@dataclass
class Vitals:
    """What is looked at in a worker's process."""

    resident: int
    threads: int
    files: int

    @classmethod
    def of(cls, pid: int) -> Vitals:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return cls(int(status["VmRSS"].split()[0]) * 1024, int(status["Threads"]), files)


@dataclass
class Life:
    """One container: when it was started, and what its worker took at first and took last."""

    process: subprocess.Popen[bytes]
    began: float
    jobs: int = 0
    early: Vitals | None = None
    late: Vitals | None = None
    stopping: float | None = None
    ended: float | None = None
    status: int | None = None


@dataclass
class Soak:
    """The servers, the container, the jobs."""

    folder: Path
    seed: int
    replace_every: int
    queue: RunPod
    civitai: CivitAI
    jobs: dict[str, Job] = field(default_factory=dict)
    lives: list[Life] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    counted: collections.Counter[str] = field(default_factory=collections.Counter)
    _refreshes: int = 0
    _ended: set[str] = field(default_factory=set)
    _late: list[tuple[str, str, float, str]] = field(default_factory=list)  # what, of which job, when, its body

    # The container

    @property
    def life(self) -> Life:
        return self.lives[-1]

    @property
    def notes(self) -> Path:
        return self.folder / "notes"

    @property
    def models(self) -> Path:
        return self.folder / "volume" / "models"

    def start(self) -> None:
        """A new container on the same volume."""
        origins = f"{self.civitai.url},{self.civitai.storage.url}"
        number = len(self.lives)
        shutil.rmtree(self.folder / "tmp", ignore_errors=True)  # a container's own disk is new
        (self.folder / "tmp").mkdir()
        (self.notes / "next-life").unlink(missing_ok=True)
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
            WEBUI_RESTARTS="1000",  # it is no test of giving up
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
        self.lives.append(Life(process, time.monotonic()))

    def stop(self) -> None:
        """As RunPod stops one: no more jobs for it, then TERM."""
        life = self.life
        self.queue.fail(Fault(204), times=None, on="/job-take")
        self._tick_for(0.3)  # what a poll has just brought is taken on
        life.stopping = time.monotonic()
        life.process.send_signal(signal.SIGTERM)
        try:
            life.status = life.process.wait(SHUTDOWN_GRACE + 5.0)
        except subprocess.TimeoutExpired:
            self.wrong.append("the container did not end within its grace")
            os.killpg(life.process.pid, signal.SIGKILL)
            life.process.wait()
        life.ended = time.monotonic()
        self.queue.heal()
        if life.status not in (143, None):
            self.wrong.append(f"the container ended with {life.status}")
        for pid in descendants(self.notes):
            self.wrong.append(f"a process outlived its container: {command_of(pid)}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def worker_pid(self) -> int | None:
        """handler.py's: the child of start.sh that runs it."""
        for pid in descendants(self.notes):
            with contextlib.suppress(OSError, IndexError):
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.life.process.pid and "handler.py" in command_of(pid):
                    return pid
        return None

    def webui_pid(self) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            return int((self.folder / "tmp" / "webui.state").read_text())
        return None

    # The jobs

    def submit(self, job: Job | None = None) -> Job:
        job = job or draw(len(self.jobs), self.seed)
        if job.civitai:
            path = sdxl_lora(self.folder / "site" / f"{job.own_lora}.safetensors", job.own_lora, LORA_BYTES)
            self.civitai.add(job.own_lora, path, name=f"Soak {job.number}")
            self._bend(job)
        job.id = self.queue.submit(job.input())
        self.jobs[job.id] = job
        if job.cancel == "in the queue":
            self._cancel(job)
        return job

    def _bend(self, job: Job) -> None:
        """Make CivitAI fail for this job's own LoRA."""
        site, key = f"/{job.own_lora}", self.civitai.versions[job.own_lora].files[0].key
        storage = self.civitai.storage
        if job.civitai == "404":
            self.civitai.fail(NOT_FOUND, times=None, on=site)
        elif job.civitai == "500":
            self.civitai.fail(SERVER_ERROR, times=None, on=site)
        elif job.civitai == "cut":
            storage.fail(Fault(cut_after=LORA_BYTES // 3), on=key)
        elif job.civitai == "stall":
            storage.fail(Fault(stall_after=LORA_BYTES // 3), on=key)
        elif job.civitai == "html":
            storage.fail(HTML_PAGE, times=None, on=key)
        elif job.civitai == "wrong-bytes":
            other = sdxl_lora(self.folder / "site" / f"other-{job.own_lora}.safetensors", 1, LORA_BYTES)
            self.civitai.replace(job.own_lora, other)

    def _cancel(self, job: Job) -> None:
        url = f"{self.queue.url}/v2/{self.queue.endpoint}/cancel/{job.id}"
        answer = requests.post(url, timeout=10)
        answer.raise_for_status()
        job.was_in_time = answer.json()["status"] == CANCELLED

    # Time

    def tick(self) -> None:
        """What a moment brings: cancellations that are due, replacements, looks at the worker."""
        now = time.monotonic()
        for what, found in (("progress", self.queue.late_progress), ("a result", self.queue.late_results)):
            seen = sum(kind == what for kind, _, _, _ in self._late)
            self._late += [(what, job_id, now, str(body)[:120]) for job_id, body in found[seen:]]
        for job in list(self.jobs.values()):
            queued = self.queue.jobs[job.id]
            if queued.status in FINAL:
                self._conclude(job, queued)
            elif job.cancel == "at work" and queued.progress:
                job.cancel_at = job.cancel_at or now + random.Random(job.number).random()
                if now >= job.cancel_at:
                    self._cancel(job)
        if self.life.process.poll() is not None:
            raise RuntimeError(f"start.sh ended with {self.life.process.returncode}")

    def _conclude(self, job: Job, queued: Queued) -> None:
        if job.id in self._ended:
            return
        self._ended.add(job.id)
        self.life.jobs += 1
        self.counted["refreshes asked for"] += queued.stop_pod
        self._refreshes += queued.stop_pod
        if self.life.jobs == 10 or self.life.jobs % 5 == 0:
            pid = self.worker_pid()
            with contextlib.suppress(OSError):
                vitals = Vitals.of(pid) if pid else None
                self.life.early = self.life.early or (vitals if self.life.jobs >= 10 else None)
                self.life.late = vitals or self.life.late

    def _tick_for(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        self.wait(lambda: time.monotonic() >= until, seconds + 60)

    def wait(self, holds: Callable[[], bool], seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > until:
                return False
            self.tick()
            time.sleep(0.02)
        return True

    def soak(self, seconds: float) -> None:
        """The queue is kept full until the time is up; then the jobs that are left are waited for."""
        until = said = time.monotonic()
        until += seconds
        while time.monotonic() < until:
            self.tick()
            waiting = sum(job.status == IN_QUEUE for job in self.queue.jobs.values())
            for _ in range(IN_THE_QUEUE - waiting):
                self.submit()
            if self._refreshes >= self.replace_every:
                self._refreshes = 0
                self.counted["containers replaced"] += 1
                self.stop()
                self.start()
            if time.monotonic() - said >= 30:
                said = time.monotonic()
                say(f"{until - said:5.0f} s to go, {len(self._ended)} jobs done, {len(self.lives)} containers")
            time.sleep(0.02)
        if not self.wait(self._all_done, 240):
            stuck = [job.id for job in self.jobs.values() if self.queue.jobs[job.id].status not in FINAL]
            self.wrong.append(f"{len(stuck)} jobs never ended: {[self.jobs[id].misfortune for id in stuck]}")

    def _all_done(self) -> bool:
        return all(self.queue.jobs[id].status in FINAL for id in self.jobs)

    def plain_jobs(self, count: int, what: str, *, seconds: float = 60) -> None:
        """Jobs that nothing may happen to."""
        jobs = [self.submit(Job(len(self.jobs))) for _ in range(count)]
        if not self.wait(lambda: all(self.queue.jobs[job.id].status in FINAL for job in jobs), seconds):
            self.wrong.append(f"{what}: no end within {seconds:.0f} s")
        for job in jobs:
            if self.queue.jobs[job.id].status != COMPLETED:
                self.wrong.append(f"{what}: {self.queue.jobs[job.id].error}")

    def idle_vitals(self) -> Vitals:
        """Of a worker that has nothing to do: the least of some looks."""
        looks = []
        for _ in range(10):
            self._tick_for(0.2)
            if pid := self.worker_pid():
                looks.append(Vitals.of(pid))
        return Vitals(*(min(getattr(look, name) for look in looks) for name in ("resident", "threads", "files")))

    def trouble_while_idle(self) -> None:
        """Nobody's job is lost where the WebUI dies or falls silent while there is none."""
        before = self.webui_pid()
        assert before
        os.kill(before, signal.SIGKILL)
        self.plain_jobs(1, "after a WebUI that died while idle")
        before = self.webui_pid()
        assert before
        os.kill(before, signal.SIGSTOP)
        if not self.wait(lambda: self.webui_pid() not in (before, None), 75):
            self.wrong.append("a WebUI that fell silent while idle was not restarted")
            os.kill(before, signal.SIGCONT)
        self.plain_jobs(1, "after a WebUI that fell silent while idle")

    def stop_at_work(self) -> None:
        """The last container is stopped while a job longer than its grace runs, and another one waits for that."""
        ids = [self.submit(Job(len(self.jobs), webui="slow")).id for _ in range(2)]
        self.wait(lambda: all(self.queue.jobs[id].progress for id in ids), 30)
        self.stop()
        if not self._all_done():
            self.wrong.append("a job that ran when the container was stopped got no answer")

    # Judgement

    def judge(self) -> dict[str, collections.Counter[str]]:
        """How the jobs of each misfortune ended; what must not be goes to `wrong`."""
        table: dict[str, collections.Counter[str]] = {}
        deaths = self._free_deaths()
        for job in sorted(self.jobs.values(), key=lambda job: self.queue.jobs[job.id].ended or 0.0):
            queued = self.queue.jobs[job.id]
            outcome, complaint = outcome_of(job, queued, self.folder)
            kind = outcome
            if outcome not in job.allowed:
                kind = self._collateral(queued, outcome, deaths)
                if not kind:
                    kind = f"**{outcome}**"
                    self.wrong.append(f"job {job.number} ({job.misfortune}) ended {outcome}: {queued.error}")
            if complaint:
                self.wrong.append(f"job {job.number} ({job.misfortune}): {complaint}")
            table.setdefault(job.misfortune, collections.Counter())[kind] += 1
        self._judge_late()
        for job_id, why in self.queue.lost:
            self.wrong.append(f"a result was lost: job {self.jobs[job_id].number}: {why}")
        return table

    def _judge_late(self) -> None:
        """What came for a job that was over: a cancelled one is so a moment before the worker can have heard of it."""
        for what, job_id, at, body in self._late:
            job, queued = self.jobs[job_id], self.queue.jobs[job_id]
            after = at - (queued.ended or at)
            if queued.status == CANCELLED and after <= CROSSED:
                self.counted["crossed with a cancellation"] += 1
            else:
                self.wrong.append(
                    f"job {job.number} ({job.misfortune}): {after:.2f} s after its end came {what}: {body}"
                )

    def _free_deaths(self) -> list[float]:
        """When a WebUI died that no job of its own was lost with."""
        lines = [line.split() for line in (self.notes / "journal").read_text().splitlines()]
        self.counted["lives of the WebUI"] = sum(what == "up" for _, what, _ in lines)
        return [float(at) for at, what, _ in lines if what == "free-death"]

    def _collateral(self, queued: Queued, outcome: str, deaths: list[float]) -> str:
        """What else may have ended the job; nothing where nothing may."""
        taken, ended = queued.taken or 0.0, queued.ended or 0.0
        if outcome == LOST:
            for at in deaths:
                if taken <= at <= ended:
                    deaths.remove(at)  # it may cost one job
                    return f"{LOST} (died beside it)"
        if outcome in (SHUT_DOWN, LOST):
            for life in self.lives:
                if life.stopping and taken <= life.stopping <= ended:
                    return f"{outcome} (container stopped)"
        return ""

    def judge_vitals(self, first: Vitals, last: Vitals) -> list[tuple[str, str, str]]:
        rows = []
        for what, before, after, most in (
            ("threads of the idle worker", first.threads, last.threads, first.threads + 6),  # its pool may have grown
            ("files open in the idle worker", first.files, last.files, first.files + 12),
        ):
            rows.append((what, f"{before} at first, {after} in the end", f"at most {most}"))
            if after > most:
                self.wrong.append(f"{what}: {before} at first, {after} in the end")
        for life in self.lives:
            if life.early and life.late and life.jobs >= 20:
                ratio = life.late.resident / life.early.resident
                figures = f"{life.early.resident / 1e6:.0f} MB after 10 jobs, {life.late.resident / 1e6:.0f} MB after "
                rows.append(("memory of a worker", f"{figures}{life.jobs}", "at most 1.3 ×"))
                if ratio > 1.3:
                    self.wrong.append(f"memory grew {ratio:.2f} times: {figures}{life.jobs}")
        return rows

    def judge_leftovers(self) -> None:
        """After the last container: the volume holds models and what is known of them, and parts that may be wanted."""
        may_have_parts = {
            job.own_lora
            for job in self.jobs.values()
            if self.queue.jobs[job.id].status == CANCELLED or str(self.queue.jobs[job.id].error).startswith(SHUT_DOWN)
        }
        for path in self.models.rglob("*"):
            if not path.is_file():
                continue
            name = path.relative_to(self.models)
            hidden = next((part for part in name.parts if part.startswith(".")), "")
            if hidden == ".parts":
                version = int("".join(c for c in name.name.partition(".")[0] if c.isdigit()) or 0)
                if version not in may_have_parts:
                    self.wrong.append(f"a part is left: {name}")
            elif hidden not in ("", ".urls") or ".safetensors" not in path.name:
                self.wrong.append(f"left on the volume: {name}")
        for link in (self.folder / "tmp" / "webui-models").rglob("*"):
            if link.is_symlink() and not link.exists():
                self.wrong.append(f"a link to nothing: {link.name}")


def outcome_of(job: Job, queued: Queued, folder: Path) -> tuple[str, str]:
    """COMPLETED, CANCELLED or the code, and what is wrong with the answer itself."""
    if queued.status not in FINAL:
        return queued.status, ""
    if queued.status == CANCELLED:
        return CANCELLED, ""
    text = json.dumps(queued.answer)
    leaks = [secret for secret in (KEY, "Traceback", str(folder), "X-Amz") if secret in text]
    complaint = f"its answer shows {', '.join(leaks)}" if leaks else ""
    output = queued.output if isinstance(queued.output, dict) else {}
    if queued.status == COMPLETED:
        return COMPLETED, complaint or wrong_picture(job, output)
    code = str(output.get("code"))
    if not str(queued.error).startswith(f"{code}: ") or not isinstance(output.get("retryable"), bool):
        complaint = complaint or f"its error has not the form of one: {queued.error}"
    return code, complaint


def wrong_picture(job: Job, output: Mapping[str, Any]) -> str:
    """What is wrong with a success, if anything: every answer must be this very job's."""
    try:
        info, worker = json.loads(output["info"]), output["worker"]
        if f"soak {job.number}" not in info["prompt"] or info["all_seeds"] != [job.number]:
            return f"the picture of another job: {info['prompt']}"
        if len(output["images"]) != 1 or not all(lora["loaded"] for lora in worker["loras"]):
            return "not the pictures or LoRAs that were asked for"
        if worker["checkpoint"]["file"] != "jib_mix_illustrious_realistic_v2.safetensors":
            return "another checkpoint"
    except (KeyError, TypeError, ValueError) as error:
        return f"no answer of txt2img: {error!r}"
    return ""


def descendants(notes: Path) -> list[int]:
    """Every living process of the containers of this soak: each has SOAK_FOLDER in its environment."""
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


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def say(line: str = "") -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def stock(folder: Path, civitai: CivitAI) -> None:
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
    """Soak a worker in `folder` and print what came of it; what was wrong."""
    with CivitAI(key=KEY) as civitai, RunPod(long_poll=1.0) as queue:
        stock(folder, civitai)
        soak = Soak(folder, seed, replace_every, queue, civitai)
        soak.start()
        try:
            soak.plain_jobs(8, "the first jobs")
            first = soak.idle_vitals()
            soak.soak(minutes * 60)
            soak.plain_jobs(4, "the last jobs")
            last = soak.idle_vitals()
            soak.trouble_while_idle()
            soak.stop_at_work()
        finally:
            for pid in descendants(soak.notes):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        table = soak.judge()
        vitals = soak.judge_vitals(first, last)
        soak.judge_leftovers()
    show(soak, table, vitals, minutes, seed)
    return soak.wrong


def show(
    soak: Soak,
    table: Mapping[str, collections.Counter[str]],
    vitals: list[tuple[str, str, str]],
    minutes: float,
    seed: int,
) -> None:
    say(f"\n{len(soak.jobs)} jobs in {minutes:g} minutes, seed {seed}")
    say("\n| misfortune | jobs | ended |\n| --- | --- | --- |")
    for misfortune, ends in sorted(table.items()):
        ended = ", ".join(f"{count} × {end}" for end, count in ends.most_common())
        say(f"| {misfortune} | {sum(ends.values())} | {ended} |")
    say("\n| what | found | allowed |\n| --- | --- | --- |")
    for row in vitals:
        say(f"| {' | '.join(row)} |")
    for what, count in sorted(soak.counted.items()):
        say(f"| {what} | {count} | |")
    say(f"\n{len(soak.wrong)} things are wrong" + (":" if soak.wrong else ""))
    for line in soak.wrong:
        say(f"- {line}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="the same seed draws the same misfortunes")
    parser.add_argument("--replace-every", type=int, default=3, help="how often a worker asks until it is replaced")
    parser.add_argument("--keep", action="store_true", help="keep the folder with the container's log")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.randrange(1_000_000)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    say(f"soaking for {options.minutes:g} minutes, seed {seed}, in {folder}")
    wrong = ["it was not finished"]
    try:
        wrong = run(folder, options.minutes, seed, options.replace_every)
    finally:
        if wrong or options.keep:
            say(f"the log: {folder / 'container.log'}")
        else:
            shutil.rmtree(folder)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

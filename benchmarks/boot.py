"""How soon a new container is ready: the download and the WebUI's start run at the same time.

    python -m benchmarks.boot [--quick] [--json FILE]

The real start.sh, handler.py and SDK, a WebUI that takes 20 s to come up, and a connection with which the checkpoint
takes 20 s. The worker is ready when it first asks the queue for a job: the WebUI answers, the checkpoint is loaded and
verified, a first generation is done. Beside it, in the same run, the same one after the other: the WebUI, then
`model_manager.py prefetch checkpoint`, then handler.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import Row, run
from sandbox.civitai import SandboxCivitAI
from sandbox.models import sdxl_checkpoint
from sandbox.runpod import SandboxRunPod

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = 1590699
CHECKPOINT_BYTES = 200_000_000
SECONDS, QUICK_SECONDS = 20.0, 4.0
SWITCH_SECONDS = 2.0
ALLOWED = 1.05

LAUNCH = """\
import argparse, pathlib, signal, sys, time

time.sleep({seconds})  # as long as A1111's imports take here
sys.path.insert(0, {root!r})
from sandbox.webui import SandboxWebUI

parser = argparse.ArgumentParser()
for flag in ("--port", "--ckpt-dir", "--ckpt"):
    parser.add_argument(flag)
asked, _ = parser.parse_known_args()
models = pathlib.Path(asked.ckpt_dir).parent
initial = pathlib.Path(asked.ckpt).name if asked.ckpt else None
with SandboxWebUI(models, port=int(asked.port), initial_checkpoint=initial, switch_seconds={switch}):
    signal.pause()
"""


@dataclass(frozen=True)
class Booted:
    """Seconds to ready, and how many of them the switch took."""

    seconds: float
    switch: float

    @classmethod
    def after(cls, seconds: float, log: Path) -> Booted:
        switched = re.search(r"is loaded after ([0-9.]+) s", log.read_text(errors="replace"))
        if switched is None:
            raise RuntimeError(f"the worker did not switch: {log.read_text(errors='replace')[-2000:]}")
        return cls(seconds, float(switched[1]))


def measure(quick: bool) -> list[Row]:
    seconds = QUICK_SECONDS if quick else SECONDS
    folder = Path(tempfile.mkdtemp(prefix="boot-"))
    try:
        checkpoint = sdxl_checkpoint(folder / "site.safetensors", 1, CHECKPOINT_BYTES)
        together = in_the_image(folder, checkpoint, seconds)
        in_turn = one_after_the_other(folder, checkpoint, seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    goal = ALLOWED * seconds + together.switch
    work = f"time to ready, a WebUI that takes {seconds:.0f} s to come up, a checkpoint that takes {seconds:.0f} s"
    return [
        Row(
            work,
            f"{together.seconds:.1f} s, {together.switch:.1f} s of them the switch",
            f"≤ {ALLOWED} × {seconds:.0f} s + the switch = {goal:.1f} s",
            None if quick else together.seconds <= goal,  # in 4 s the constant costs of a start weigh too much
        ),
        Row("… without the switch, against the longer of the two", f"{_without(together) / seconds:.3f} ×"),
        Row("the same one after the other, for comparison", f"{in_turn.seconds:.1f} s"),
    ]


def _without(booted: Booted) -> float:
    return booted.seconds - booted.switch


def in_the_image(folder: Path, checkpoint: Path, seconds: float) -> Booted:
    """start.sh to ready, nothing on disk."""
    log = folder / "together.log"
    with serving(checkpoint, seconds) as (civitai, queue):
        environment = surroundings(folder / "together", civitai, queue, seconds)
        clock = Clock()
        with running([str(ROOT / "start.sh")], environment, log):
            queue.wait_for_worker(timeout=10 * seconds + 60)
            return Booted.after(clock.seconds, log)


def one_after_the_other(folder: Path, checkpoint: Path, seconds: float) -> Booted:
    """The same three steps, each begun when the last is done."""
    log = folder / "in-turn.log"
    with serving(checkpoint, seconds) as (civitai, queue):
        environment = surroundings(folder / "in-turn", civitai, queue, seconds)
        models, port = environment["WEBUI_MODELS_DIR"], environment["WEBUI_URL"].rpartition(":")[2]
        launch = [sys.executable, "launch.py", "--port", port, "--ckpt-dir", f"{models}/Stable-diffusion"]
        clock = Clock()
        with running(launch, environment, folder / "webui.log", folder=Path(environment["WEBUI_DIR"])):
            wait_for(environment["WEBUI_URL"])
            prefetch = [sys.executable, "model_manager.py", "prefetch", "checkpoint"]
            subprocess.run(prefetch, cwd=ROOT, env=environment, check=True, capture_output=True)
            with running([sys.executable, "handler.py"], environment, log):
                queue.wait_for_worker(timeout=60)
                return Booted.after(clock.seconds, log)


@contextlib.contextmanager
def serving(checkpoint: Path, seconds: float) -> Iterator[tuple[SandboxCivitAI, SandboxRunPod]]:
    """A CivitAI from which the checkpoint takes so many seconds, and a queue without jobs."""
    with SandboxCivitAI() as civitai, SandboxRunPod(long_poll=1.0) as queue:
        version = civitai.add(CHECKPOINT, checkpoint, name="Bench", base_model="Illustrious", model_type="Checkpoint")
        version.files[0].size, version.files[0].fp = "pruned", "fp16"
        version.files[0].hashes()  # computed once, and not while the clock runs
        civitai.storage.total_rate = CHECKPOINT_BYTES / seconds
        yield civitai, queue


def surroundings(folder: Path, civitai: SandboxCivitAI, queue: SandboxRunPod, seconds: float) -> dict[str, str]:
    """The environment of a container in `folder`: an empty volume, and a launch.py in the place of A1111's."""
    (folder / "webui").mkdir(parents=True)
    launch = LAUNCH.format(seconds=seconds, root=str(ROOT), switch=SWITCH_SECONDS)
    (folder / "webui" / "launch.py").write_text(launch)
    for name in ("Stable-diffusion", "Lora", "VAE"):
        (folder / "webui-models" / name).mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    origins = f"{civitai.url},{civitai.storage.url}"
    return queue.worker_env(
        ALLOW_CPU="1",
        WEBUI_DIR=str(folder / "webui"),
        WEBUI_PYTHON=sys.executable,
        WORKER_DIR=str(ROOT),
        WORKER_PYTHON=sys.executable,
        WEBUI_URL=f"http://127.0.0.1:{port}",
        WEBUI_STATE_FILE=str(folder / "webui.state"),
        WEBUI_MODELS_DIR=str(folder / "webui-models"),
        MODELS_DIR=str(folder / "volume"),
        MODEL_SOURCES="",
        CIVITAI_URL=civitai.url,
        STORAGE_HOSTS=origins,
        MODEL_HOSTS=origins,
    )


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began


@contextlib.contextmanager
def running(
    command: list[str], environment: Mapping[str, str], log: Path, folder: Path = ROOT
) -> Iterator[subprocess.Popen[bytes]]:
    """A process with all that it starts, gone when the block ends."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(url: str) -> None:
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/sdapi/v1/sd-models", timeout=5):
            return
        time.sleep(0.02)


if __name__ == "__main__":
    run("Boot", measure)

"""The setup in which whole jobs are measured: the sandbox's WebUI as a process, a small cache, a worker."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sandbox.models import sdxl_checkpoint
from sandbox.runpod import SandboxRunPod

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class BenchSetup:
    """A folder and a WebUI. `settings` are the variables with which a worker uses them."""

    folder: Path
    webui_url: str
    settings: dict[str, str]


@contextlib.contextmanager
def place(*webui_options: str) -> Iterator[BenchSetup]:
    """A folder with a cache that has its checkpoint already, and a WebUI. Both are removed when the block ends."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        sdxl_checkpoint(folder / "models" / "checkpoints" / "bench.safetensors", seed=1, size_bytes=3_000_000)
        webui_models = folder / "webui"
        for kind in ("Stable-diffusion", "Lora", "VAE"):
            (webui_models / kind).mkdir(parents=True)
        webui = subprocess.Popen(
            [sys.executable, "-m", "sandbox.webui", "--models-dir", str(webui_models), *webui_options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert webui.stdout is not None
        try:
            url = webui.stdout.readline().strip()
            settings = {
                "WEBUI_URL": url,
                "MODELS_DIR": str(folder / "models"),
                "WEBUI_MODELS_DIR": str(webui_models),
                "MODEL_SOURCES": "",
                "CHECKPOINT_FILE": "bench.safetensors",
                "CHECKPOINT_NAME": "Bench",
                "CHECKPOINT_URL": "https://civitai.com/api/download/models/1",
                "WARMUP": "0",
            }
            yield BenchSetup(folder, url, settings)
        finally:
            webui.terminate()
            webui.wait()
            webui.stdout.close()


@contextlib.contextmanager
def worker(setup: BenchSetup, queue: SandboxRunPod, **settings: str) -> Iterator[int]:
    """A worker's process with the real SDK, which takes jobs from the queue. Its pid. It is killed after the block."""
    with (setup.folder / "worker.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "handler.py"],
            cwd=ROOT,
            env={**queue.worker_env(), **setup.settings, **settings},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process.pid
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

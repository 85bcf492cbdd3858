"""What the tests share: paths, waiting for a condition, and a whole worker on loopback.

The worker is the real handler and model manager. The WebUI, CivitAI and Hugging Face are the sandbox's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from a1111_worker.config import Config
from a1111_worker.domain import GenerationRequest
from a1111_worker.models.sites import SiteTimings
from a1111_worker.request.fields import Limits
from a1111_worker.request.parse import parse_request
from a1111_worker.transfer.ranges import Tuning
from a1111_worker.webui.timings import WebUITimings
from handler import Worker
from model_manager import ModelManager, open_manager
from sandbox.civitai import SandboxCivitAI
from sandbox.huggingface import SandboxHuggingFace
from sandbox.models import sdxl_checkpoint, sdxl_lora
from sandbox.webui import SandboxWebUI

ROOT = Path(__file__).resolve().parent.parent
"""The repository's root."""

DATA = ROOT / "tests" / "data"
"""The recorded answers of real servers."""

ECHO_WORKER = ROOT / "tests" / "echo_worker.py"
"""A program: the real SDK with a handler that answers a job with its input."""

CHECKPOINT, DETAIL, HAND = 1590699, 135867, 294259
"""CivitAI's version ids of the models that a World serves."""

SMALL = {"steps": 2, "width": 64, "height": 64, "seed": 42}
"""The input of a job with a small picture."""

QUICK = WebUITimings(
    unowned_grace=0.05,
    progress_interval=0.02,
    preview_interval=0.1,
    interrupt_interval=0.02,
    interrupt_grace=0.5,
    interrupt_patience=0.5,
    recovery_pause=0.01,
    silence=5.0,
)
SITE_QUICK = SiteTimings(connect=5.0, answer=2.0, shortest=0.01, longest=0.02, too_many=0.2)
TUNING_QUICK = Tuning(stall_seconds=1.0, patience_seconds=5.0, pause=0.01, pause_most=0.02, retry_after_most=0.05)

T = TypeVar("T")


def wait_until(condition: Callable[[], T | None], what: str, *, seconds: float = 60.0) -> T:
    """Ask again every few milliseconds until the condition is true; what it returned then.

    Fails after `seconds`. `what` names the condition in the message: "waited 60 s for `what`".
    """
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.003)
    return result


def free_port() -> int:
    """A port that nobody listens on. Below those that connections get, so that none of them takes it meanwhile."""
    while True:
        port = random.randrange(12_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class World:
    """The servers, the files that they serve, and a worker that uses them."""

    def __init__(self, folder: Path, *, version: str = "1.10.1", **settings: str) -> None:
        self.folder = folder
        self.webui_models = folder / "webui-models"
        for name in ("Stable-diffusion", "Lora", "VAE"):
            (self.webui_models / name).mkdir(parents=True, exist_ok=True)
        self.webui = SandboxWebUI(self.webui_models, version=version)
        self.civitai = SandboxCivitAI(key="the-key")
        self.civitai.add(
            CHECKPOINT,
            sdxl_checkpoint(folder / "checkpoint.safetensors", 1, 3_000_000),
            name="Jib Mix Illustrious Realistic",
            base_model="Illustrious",
            model_type="Checkpoint",
            size="pruned",
            fp="fp16",
        )
        for version_id, name in ((DETAIL, "Detail Tweaker XL"), (HAND, "Hand Detail FLUX & XL")):
            path = sdxl_lora(folder / f"{version_id}.safetensors", version_id, 300_000)
            self.civitai.add(version_id, path, name=name, base_model="SDXL 1.0")
        self.hub = SandboxHuggingFace(token="the-hub-token")
        self.settings = settings
        self.loop = asyncio.new_event_loop()
        self.worker: Worker

    @property
    def models_dir(self) -> Path:
        return self.folder / "models"

    def config(self, **changes: str) -> Config:
        return Config.from_env(self.environ(**changes))

    def environ(self, **changes: str) -> dict[str, str]:
        """The settings of the worker, as variables."""
        origins = f"{self.civitai.url},{self.civitai.storage.url}"
        return {
            "WEBUI_URL": self.webui.url,
            "HF_ENDPOINT": self.hub.url,
            "CIVITAI_URL": self.civitai.url,
            "CIVITAI_API_KEY": "the-key",
            "STORAGE_HOSTS": f"{origins},{self.hub.storage.url}",
            "MODEL_HOSTS": origins,
            "MODELS_DIR": str(self.models_dir),
            "WEBUI_MODELS_DIR": str(self.webui_models),
            "MODEL_SOURCES": "",
            "WEBUI_READY_TIMEOUT": "5",
            "BOOT_TIMEOUT": "30",
            "WARMUP": "0",
            "WORKER_STATE_FILE": str(self.folder / "worker.state"),
            **self.settings,
            **changes,
        }

    def boot(self, **changes: str) -> Worker:
        """A worker that is ready for jobs. All its waits are short."""
        config = self.config(**changes)
        self.worker = Worker(config, models=quick_manager(config), timings=QUICK)
        self.worker.boot()
        return self.worker

    def stop(self) -> None:
        """Stop the worker. Another one may be booted."""
        self.worker.close()
        del self.worker

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """The answer to a whole job, after `check_answer` has checked it."""
        answer = self.loop.run_until_complete(asyncio.wait_for(self.worker.handle(job), timeout=60))
        check_answer(answer, self)
        return answer

    def ask(self, job_id: str = "job-1", **given: Any) -> dict[str, Any]:
        """The answer to a job with a small picture and the given input."""
        return self.run({"id": job_id, "input": {"prompt": "a lighthouse", **SMALL, **given}})

    def generations(self) -> list[dict[str, Any]]:
        """The bodies of all requests to txt2img so far."""
        return [asked.json() for asked in self.webui.asked if asked.path.endswith("/txt2img")]

    def requests_since(self, before: int) -> list[str]:
        """The paths of the WebUI's requests after the first `before`. Requests for progress are left out."""
        return [asked.path for asked in self.webui.asked[before:] if not asked.path.endswith("/progress")]

    def leftovers(self) -> list[str]:
        """Files in the cache that are neither a model nor belong to one."""
        models = [path.name for path in self.models_dir.rglob("*.safetensors") if not path.name.startswith(".")]
        return [
            str(path.relative_to(self.models_dir))
            for path in self.models_dir.rglob("*")
            if path.is_file() and not any(model in path.name for model in models)
        ]


def parse_generation(raw: object, limits: Limits) -> GenerationRequest:
    """The request of a job that generates pictures."""
    request = parse_request(raw, limits)
    assert isinstance(request, GenerationRequest)
    return request


def quick_manager(config: Config) -> ModelManager:
    return open_manager(config, timings=SITE_QUICK, tuning=TUNING_QUICK)


@contextlib.contextmanager
def world(folder: Path, *, version: str = "1.10.1", boot: bool = True, **settings: str) -> Iterator[World]:
    """A World with its servers running until the block ends, and with a booted worker unless `boot` is False."""
    made = World(folder, version=version, **settings)
    with made.webui, made.civitai, made.hub:
        try:
            if boot:
                made.boot()
            yield made
        finally:
            if hasattr(made, "worker"):
                made.worker.close()
            made.loop.close()


def check_answer(answer: Mapping[str, Any], source: World) -> None:
    """What holds for every answer: strict JSON, a well-formed error, and no secrets or paths of the worker in it."""
    json.dumps(answer, allow_nan=False, ensure_ascii=False).encode()
    if "error" in answer:
        assert isinstance(answer["error"], str) and answer["error"].startswith(answer["code"])
        assert isinstance(answer["retryable"], bool)
    urls = answer.get("worker", {}).get("delivery", {}).get("urls", ())  # signatures may stand only in these
    text = json.dumps(answer, ensure_ascii=False)
    for url in urls:
        text = text.replace(json.dumps(url, ensure_ascii=False), "")
    for secret in ("the-key", "the-hub-token", "Traceback", str(source.folder), "Authorization", "X-Amz"):
        assert secret not in text

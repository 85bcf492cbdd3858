"""The model managers of several workers on one folder, with the sandbox's CivitAI and Hugging Face."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from a1111_worker import catalog
from a1111_worker.context import Deadline, JobContext
from a1111_worker.domain import Model, ModelKind, ModelRef
from a1111_worker.models.cache import CacheSettings, CheckpointSpec
from a1111_worker.models.civitai import CivitAI as Client
from a1111_worker.models.huggingface import HuggingFace
from a1111_worker.models.manager import CacheTimings, ModelManager
from a1111_worker.models.sites import ModelSites, SiteTimings
from a1111_worker.transfer.download import Downloader
from a1111_worker.transfer.egress import EgressPolicy
from a1111_worker.transfer.ranges import Tuning
from sandbox.civitai import SandboxCivitAI
from sandbox.huggingface import SandboxHuggingFace
from sandbox.models import sdxl_checkpoint, sdxl_lora
from sandbox.server import Exchange
from tests.fuse import backing_of

KEY = "the-key"
TOKEN = "hf_the_token"
CHECKPOINT, DETAIL = 1590699, 135867
SITE_TIMINGS = SiteTimings(connect=10.0, answer=20.0, shortest=0.01, longest=0.02, too_many=0.1)
TUNING = Tuning(
    stall_seconds=5.0, patience_seconds=10.0, pause=0.01, pause_most=0.02, remember_seconds=0.02, remember_bytes=100_000
)
TIMINGS = CacheTimings(heartbeat=0.05, stale_after=30.0, poll=0.02, room_wait=0.5, room_poll=0.02)


def timings(**changes: float) -> CacheTimings:
    """The fleet's timings, with changes."""
    return replace(TIMINGS, **changes)


def lora(version_id: int, **more: Any) -> ModelRef:
    return ModelRef(ModelKind.LORA, version_id=version_id, **more)


def named(name: str, **more: Any) -> ModelRef:
    return catalog.resolve(ModelRef(ModelKind.LORA, name=name, **more))


class Site(SandboxCivitAI):
    """A CivitAI at which something may happen just before it gives a link."""

    before_a_link: Callable[[], None] | None = None

    def answer(self, exchange: Exchange) -> None:
        if self.before_a_link is not None and exchange.asked.path.startswith("/api/download/"):
            self.before_a_link()
        super().answer(exchange)


class Fleet:
    """The servers, the files they serve, the shared folder. `start` makes a worker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = folder / "models"
        self.civitai = Site(key=KEY)
        self.hub = SandboxHuggingFace(token=TOKEN)
        self._workers = contextlib.ExitStack()
        self._started = 0

    def serve(self, version_id: int, path: Path | None = None, *, size: int | None = None, **about: Any) -> Path:
        """Have CivitAI offer a LoRA; its seed is its id."""
        path = path or sdxl_lora(self.folder / "served" / f"{version_id}.safetensors", version_id, size)
        self.civitai.add(version_id, path, **{"name": f"Model {version_id}", **about})
        return path

    def serve_checkpoint(self, *, size: int = 3_000_000, **about: Any) -> Path:
        path = sdxl_checkpoint(self.folder / "served" / "checkpoint.safetensors", 1, size)
        about = {"name": "Jib Mix", "base_model": "Illustrious", "model_type": "Checkpoint", **about}
        self.civitai.add(CHECKPOINT, path, **about)
        return path

    def start(self, **how: Any) -> ModelManager:
        """A worker of its own: another owner, another container."""
        self._started += 1
        how = {"name": str(self._started), "hub": self.hub, **how}
        return self._workers.enter_context(manager(self.folder, self.civitai.url, self.civitai.storage.url, **how))

    @property
    def loras(self) -> Path:
        return self.models / "loras"

    def put(self, name: str, seed: int, kind: Callable[..., Path] = sdxl_lora, **about: Any) -> Path:
        """Put a file into the cache by hand."""
        return kind(self.loras / name, seed, **about)

    def backing_models(self) -> list[str]:
        """The models on a volume that may fail (tests/fuse.py), looked at from behind it."""
        return sorted(path.name for path in (backing_of(self.models) / "loras").glob("*.safetensors"))

    def on_exit(self, function: Callable[[], object]) -> None:
        self._workers.callback(function)

    def asked(self) -> list[str]:
        """Everything that the network was asked for."""
        servers = (self.civitai, self.civitai.storage, self.hub, self.hub.storage)
        return [asked.path for server in servers for asked in server.asked]

    def models_there(self) -> list[str]:
        return sorted(path.name for path in self.loras.glob("*.safetensors"))

    def debris(self) -> list[str]:
        """What is left of work that is over: partial files, leases, holds, drafts, trash, sidecars without a model."""
        left = []
        for path in self.models.rglob("*"):
            model = path.name.removesuffix(".json").removesuffix(".uses")
            is_passing = path.parent.name == ".urls" or path.name.startswith(".clock")
            if path.is_file() and not is_passing and model not in self.names_in(path.parent):
                left.append(str(path.relative_to(self.models)))
        return sorted(left)

    @staticmethod
    def names_in(folder: Path) -> list[str]:
        return [] if folder.name.startswith(".") else [path.name for path in folder.glob("*.safetensors")]

    def __enter__(self) -> Fleet:
        self.civitai.start()
        self.hub.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.close()
        self.hub.stop()
        self.civitai.stop()


SPEC = CheckpointSpec(ModelRef(ModelKind.CHECKPOINT, version_id=CHECKPOINT), "jib_mix.safetensors", "Jib Mix v2")


@contextlib.contextmanager
def manager(
    folder: Path,
    api: str,
    storage: str,
    *,
    name: str,
    hub: SandboxHuggingFace | None = None,
    timings: CacheTimings = TIMINGS,
    tuning: Tuning = TUNING,
    **settings: Any,
) -> Iterator[ModelManager]:
    """A worker's manager, in a container of its own. `settings` are changes of its CacheSettings."""
    container = folder / f"container{name}"
    usual = CacheSettings(folder / "models", container / "webui", container / "local", checkpoint=SPEC)
    settings_of_all = replace(usual, **settings)
    policy = EgressPolicy((api, storage, *((hub.url, hub.storage.url) if hub else ())))
    civitai = Client(policy=policy, urls=[api], key=KEY, timings=SITE_TIMINGS)
    hugging_face = HuggingFace(
        policy=policy,
        url=hub.url if hub else "http://127.0.0.1:9",  # nothing listens there
        token=TOKEN,
        access=settings_of_all.hub_access,
        timings=SITE_TIMINGS,
    )
    sites = ModelSites(civitai, hugging_face)
    with ModelManager(settings_of_all, sites, Downloader(policy, tuning), timings) as made:
        yield made
    civitai.close()
    hugging_face.close()


def fetch(manager: ModelManager, *refs: ModelRef) -> Model:
    """Hold models for a moment. Returns the first of them."""
    with manager.hold(refs, JobContext(soon())) as held:
        return held.models[refs[0]]


def soon(seconds: float = 30.0) -> Deadline:
    return Deadline(seconds)

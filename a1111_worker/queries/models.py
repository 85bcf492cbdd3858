"""What a client's menus show: what is cached, the WebUI's own lists, what a job may set, and the fingerprint of it all.

    {"fingerprint": "<16 hex digits>", "versions": …, "tasks": [...], "checkpoints": [...], "cached": {"loras": [...]},
     "catalog": [...], "webui": {"samplers": [...]}, "options": {"sd_vae": "Automatic"}, "limits": {"max_steps": 150}}

The lists of the WebUI that never change while it runs are asked for once. The others are asked for every time, and if
the WebUI does not answer, its last answer counts: a job that asks for the menus never waits for a generation.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import PurePath
from typing import Any, TypeVar

from a1111_worker import __version__
from a1111_worker.catalog import LORAS, lora_of_version
from a1111_worker.context import JobContext
from a1111_worker.domain import (
    AppliedLora,
    Generation,
    GenerationRequest,
    Menus,
    Model,
    ModelKind,
    Task,
    UpscaleRequest,
    Upscaling,
)
from a1111_worker.errors import VolumeFailed, WorkerError
from a1111_worker.models.manager import ModelManager
from a1111_worker.queries.answer import check_size, versions, worker_block
from a1111_worker.request.fields import OVERRIDABLE_OPTIONS, Limits
from a1111_worker.webui.checkpoint import title_of
from a1111_worker.webui.client import WebUI
from a1111_worker.webui.generation import Generator
from a1111_worker.webui.readiness import Readiness
from a1111_worker.webui.responses import MENUS, Sampler

R = TypeVar("R", Generation, Upscaling)

log = logging.getLogger(__name__)

CHANGING_MENUS = ("sd-models", "loras", "embeddings", "sd-vae")
"""Lists that may change while the WebUI runs."""

ANSWER_SECONDS = 5.0
"""For one list of the WebUI, which answers in milliseconds unless it hangs."""

PATHS = ("filename", "path", "config", "model_path", "cmd_dir")
"""The keys of A1111's entries that hold a path of the container."""


class ModelsQuery:
    """Answers `models` jobs, and adds to a generation what its caller must know of the menus."""

    def __init__(
        self, webui: WebUI, readiness: Readiness, generator: Generator, models: ModelManager, limits: Limits
    ) -> None:
        self._webui = webui
        self._readiness = readiness
        self._generator = generator
        self._models = models
        self._limits = limits

    def list_cache(self) -> None:
        """See what is in the cache now. The fingerprint is of what was seen last."""
        try:
            for kind in ModelKind:
                self._models.cache.refresh(kind)
        except VolumeFailed as error:
            log.warning("the cache cannot be listed: %s", error.message)

    def answer(self, context: JobContext) -> dict[str, Any]:
        """The answer of a `models` job. Raises ResultTooLarge."""
        menus = self._menus()
        answer = {
            "models": menus,
            "worker": self.add_fingerprint(worker_block(self.webui_version, context)),
        }
        check_size(answer, context)
        return answer

    def add_menus(self, result: R, request: GenerationRequest | UpscaleRequest, _context: JobContext) -> R:
        """The result with the fingerprint of the menus, and with the menus if its job asks for them."""
        listed = self._files()
        loras: Sequence[AppliedLora] = result.loras if isinstance(result, Generation) else ()
        if any(lora.model and lora.model.file not in listed[ModelKind.LORA.value] for lora in loras):
            self.list_cache()  # the job has fetched one
        menus = self._menus() if request.include_models else None
        fingerprint = menus["fingerprint"] if menus else self._fingerprint()
        return replace(result, menus=Menus(fingerprint, menus))

    def add_fingerprint(self, worker: dict[str, Any]) -> dict[str, Any]:
        """A `worker` block with the fingerprint of the menus."""
        return {**worker, "lists": self._fingerprint()}

    @property
    def samplers(self) -> Sequence[Sampler]:
        """The WebUI's samplers, as of its last preparation."""
        return self._readiness.lists.samplers

    @property
    def webui_version(self) -> str | None:
        return self._generator.proof.webui_version if self._generator.proof else None

    def _menus(self) -> dict[str, Any]:
        self.list_cache()
        return {
            "fingerprint": self._fingerprint(),
            "versions": versions(self.webui_version),
            "tasks": [task.value for task in Task],
            "checkpoints": self._checkpoints(),
            "cached": self._cached(),
            "catalog": [
                {"name": lora.title, "version_id": lora.version_id, "scale": lora.scale, "file": lora.file}
                for lora in LORAS
            ],
            "webui": self._webui_lists(),
            "options": self._options(),
            "limits": _figures(self._limits),
        }

    def _options(self) -> dict[str, Any]:
        """The settings that a job may override, and what they are in a job that does not."""
        options: dict[str, Any] = {name: option.default for name, option in OVERRIDABLE_OPTIONS.items()}
        if restorer := self._readiness.lists.restorer:
            options["face_restoration_model"] = restorer
        return options

    def _fingerprint(self) -> str:
        """A text that changes whenever the menus change. It takes no request and no look at a disk."""
        shown = {
            "worker": __version__,
            "webui": asdict(self._readiness.lists),
            "checkpoint": self._readiness.own_checkpoint.sha256,
            "files": self._files(),
            "limits": _figures(self._limits),
        }
        return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:16]

    def _files(self) -> dict[str, list[str]]:
        """The files in the cache and its sources, as they were listed last."""
        directories = self._models.cache.directories
        return {
            kind.value: sorted({file for directory in directories.of(kind) for file in directory.known_files})
            for kind in ModelKind
        }

    def _checkpoints(self) -> list[dict[str, Any]]:
        """The worker's own checkpoint, and those that a job may name. What is not known of one is None."""
        own = self._readiness.own_checkpoint
        listed: list[tuple[str, Model | None]] = [(own.name, own)]
        listed += [(name, self._models.find(ref)) for name, ref in self._limits.checkpoints[1:]]
        loaded = self._readiness.checkpoint.sha256 if self._readiness.is_ready else None
        return [
            {
                "name": name,
                "file": model.file if model else None,
                "title": title_of(model) if model else None,
                "sha256": model.sha256 if model else None,
                "family": model.family if model else None,
                "default": model is own,
                "loaded": model is not None and model.sha256 == loaded,
                "cached": model is not None,
            }
            for name, model in listed
        ]

    def _cached(self) -> dict[str, list[dict[str, Any]]]:
        """The models on disk, those of sources too. What is not known of one is None."""
        cache = self._models.cache
        found: dict[str, list[dict[str, Any]]] = {kind.plural: [] for kind in ModelKind}
        try:
            for directory, entry in cache.list_models():
                record = cache.sidecars.find(directory, entry.file)
                model = record.model(entry.path) if record else None
                found[entry.kind.plural].append(_cached_entry(entry.kind, entry.file, entry.size, model))
        except VolumeFailed as error:
            log.warning("the models in the cache cannot be listed: %s", error.message)
        return {kind: sorted(entries, key=lambda entry: entry["file"]) for kind, entries in found.items()}

    def _webui_lists(self) -> dict[str, Any]:
        return {name: self._reduced(name, self._webui_list(name)) for name in MENUS}

    def _webui_list(self, name: str) -> Any:
        last = self._webui.last_menu(name)
        if last is not None and name not in CHANGING_MENUS:
            return last
        try:
            return self._webui.menu(name, timeout=ANSWER_SECONDS)
        except WorkerError as error:
            if last is None:
                raise
            log.warning("the WebUI's last list of %s counts: %s", name, error.message)
            return last

    def _reduced(self, name: str, answer: Any) -> Any:
        """A list without paths of the container, upscalers whose file is not there, and the metadata of LoRAs."""
        answer = with_bare_names(answer)
        if name == "upscalers":
            return [entry for entry in answer if entry["name"] in self._readiness.lists.upscalers]
        if name == "loras":  # a LoRA's training metadata may take hundreds of kilobytes
            return [{**entry, "metadata": {}} for entry in answer]
        return answer


def _figures(limits: Limits) -> dict[str, int]:
    return {name: value for name, value in asdict(limits).items() if type(value) is int}


def _cached_entry(kind: ModelKind, file: str, size: int, model: Model | None) -> dict[str, Any]:
    stem = file.removesuffix(".safetensors")
    entry: dict[str, Any] = {
        "name": model.name if model else stem,
        "file": file,
        "size": size,
        "sha256": model.sha256 if model else None,
        "family": model.family if model else None,
        "base_model": model.base_model if model else None,
        "version_id": model.version_id if model else None,
    }
    if kind is ModelKind.LORA:
        known = lora_of_version(model.version_id) if model and model.version_id is not None else None
        entry["tag"] = model.shown if model else None
        entry["trained_words"] = list(model.trained_words) if model else []
        entry["scale"] = known.scale if known else 1.0
    return entry


def with_bare_names(value: Any) -> Any:
    """An answer of A1111 with the bare name of each file in the place of its path."""
    if isinstance(value, list):
        return [with_bare_names(item) for item in value]
    if isinstance(value, Mapping):
        return {
            key: PurePath(item).name if key in PATHS and isinstance(item, str) else with_bare_names(item)
            for key, item in value.items()
        }
    return value

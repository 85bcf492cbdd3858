"""The nouns: what a job asks for, what is on disk, what was made, and where a job is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from a1111_worker.errors import ModelError


class ModelKind(str, Enum):
    """What a model is to the WebUI; `folder` is where the cache keeps its kind."""

    CHECKPOINT = "checkpoint"
    LORA = "lora"

    @property
    def folder(self) -> str:
        return f"{self.value}s"


@dataclass(frozen=True)
class ModelRef:
    """A model as somebody named it, reduced to ids wherever ids were given.

    Exactly one of these says which model is meant, in this order: `version_id` (with `file_id`), `model_id` (a CivitAI
    page without a version: its newest one), `url` (a host of MODEL_HOSTS, never CivitAI), `name` alone.
    `name` beside an id is only what the caller calls it. `size`, `fp` and `format` are a CivitAI URL's wishes for the
    right file of a version. `sha256` is 64 lower-case hex digits that the file must have.
    """

    kind: ModelKind
    version_id: int | None = None
    file_id: int | None = None
    model_id: int | None = None
    url: str | None = None
    name: str | None = None
    sha256: str | None = None
    size: str | None = None
    fp: str | None = None
    format: str | None = None

    @property
    def is_bare_name(self) -> bool:
        """Whether nothing but a name says which model is meant."""
        return (self.version_id, self.model_id, self.url) == (None, None, None)

    @property
    def label(self) -> str:
        """How a sentence names it: never a URL, since one may be signed."""
        if self.name:
            return f"{self.name!r}"
        if self.version_id is not None:
            return f"CivitAI version {self.version_id}"
        if self.model_id is not None:
            return f"CivitAI model {self.model_id}"
        return "the file of its URL"


@dataclass(frozen=True)
class RemoteFile:
    """One file that can be fetched, as CivitAI (or a URL alone) describes it.

    `url` is where a download starts, built by us. `size` is in bytes, and only known where it is exact (CivitAI gives
    KiB as a float); `size_at_most` is known then too, and where only a rounded one is. `sha256` is lower case.
    `name` is a title for people, never a path.
    """

    url: str
    name: str
    version_id: int | None = None
    file_id: int | None = None
    primary: bool = True
    size: int | None = None
    sha256: str | None = None
    base_model: str | None = None
    trained_words: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    size_at_most: int | None = None


@dataclass(frozen=True)
class Model:
    """A proven file on disk.

    `file` is its name in the cache and, without `.safetensors`, what the WebUI calls it. `lora_hash` is what A1111
    prints for a LoRA in "Lora hashes" (12 hex digits: facts of A1111's network.py), None for a checkpoint.
    `family` is the architecture it belongs to ("sdxl", "sd1", …), None where nobody knows. `downloaded` is whether
    this hold fetched it.
    """

    kind: ModelKind
    name: str
    file: str
    path: Path
    sha256: str
    size: int
    version_id: int | None = None
    file_id: int | None = None
    base_model: str | None = None
    family: str | None = None
    trained_words: tuple[str, ...] = ()
    lora_hash: str | None = None
    downloaded: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        return self.file.removesuffix(".safetensors")


@dataclass(frozen=True)
class HeldModels:
    """Models that stay on disk for as long as they are held. `failures`: why others are missing, if that is tolerated."""

    models: Mapping[ModelRef, Model] = field(default_factory=dict)
    failures: Mapping[ModelRef, ModelError] = field(default_factory=dict)


class OnLoraError(str, Enum):
    """What a LoRA that cannot be had, does not fit or was not loaded does to the job."""

    FAIL = "fail"
    WARN = "warn"


@dataclass(frozen=True)
class LoraRequest:
    """A LoRA a job asks for. `scale` is None where the job gives none: the catalog's then, else 1.0.

    `path` is where the job says so (`loras[0]`, `prompt`): what a complaint names.
    `in_prompt` says that the wish is a tag the caller wrote into a prompt, under the name `ref.name`;
    `weighted_in_prompt` that it is not, and yet a tag of it is there, whose weights count.
    """

    ref: ModelRef
    scale: float | None
    path: str
    in_prompt: bool = False
    weighted_in_prompt: bool = False


class ImageFormat(str, Enum):
    """What a picture leaves as."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"


class DeliveryMode(str, Enum):
    """How pictures leave: in the answer, as links into a bucket, or as their size and the settings decide."""

    AUTO = "auto"
    INLINE = "inline"
    BUCKET = "bucket"


@dataclass(frozen=True)
class OutputOptions:
    """How a job wants its pictures. `quality` is None where the job gives none; a PNG has none.

    Without `metadata` no infotext is in the pictures; `raw` is A1111's answer without a `worker` block.
    """

    format: ImageFormat = ImageFormat.PNG
    quality: int | None = None
    delivery: DeliveryMode = DeliveryMode.AUTO
    metadata: bool = True
    raw: bool = False


@dataclass(frozen=True)
class GenerationRequest:
    """A job's input, checked as far as that is possible without a WebUI.

    `body` is A1111's txt2img body as far as the caller (and our defaults) decide it; prompts are the caller's,
    sampler names are still in the caller's spelling. `loras` holds the list's wishes first, in the caller's order,
    then those of tags in prompts that no list entry names. `allow_blank` says that a picture of one colour is wanted.
    """

    body: Mapping[str, Any]
    loras: tuple[LoraRequest, ...] = ()
    on_lora_error: OnLoraError = OnLoraError.FAIL
    warnings: tuple[str, ...] = ()
    output: OutputOptions = OutputOptions()
    allow_blank: bool = False


@dataclass(frozen=True)
class BucketSettings:
    """S3-compatible storage for results. A link is signed and lives `link_seconds`, or is `public_url` and the key."""

    endpoint_url: str
    name: str
    access_key_id: str = field(repr=False)
    secret_access_key: str = field(repr=False)
    region: str = "us-east-1"
    prefix: str = ""
    link_seconds: int = 86_400
    public_url: str | None = None


@dataclass(frozen=True)
class AppliedLora:
    """A LoRA of a job, with what became of it. `model` is None where it could not be had and the job allowed that."""

    name: str
    scale: float
    model: Model | None
    loaded: bool


@dataclass(frozen=True)
class Generation:
    """What the WebUI made, proven: its answer untouched, and the facts that were checked."""

    answer: dict[str, Any]
    checkpoint: Model
    loras: tuple[AppliedLora, ...]
    seeds: tuple[int, ...]
    webui_version: str
    warnings: tuple[str, ...] = ()


class Stage(str, Enum):
    """Where a job is; `/status` shows it."""

    MODELS = "models"
    QUEUE = "queue"
    SWITCH = "switch"
    GENERATE = "generate"
    DELIVER = "deliver"


@dataclass(frozen=True)
class Progress:
    """One look at a job: percent 0 to 100 of its stage, seconds left where they can be told."""

    stage: Stage
    percent: float | None = None
    detail: str = ""
    eta_s: float | None = None
    facts: Mapping[str, int | float | str] = field(default_factory=dict)

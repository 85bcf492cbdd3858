"""The nouns: what a job asks for, what is on disk, what was generated, and how far a job is."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any
from urllib.parse import quote

from a1111_worker.errors import ModelError
from a1111_worker.text import quoted
from a1111_worker.webui_names import embedding_word, stem_with_hash, vae_name


class ModelKind(str, Enum):
    """What a model is to the WebUI."""

    CHECKPOINT = "checkpoint"
    LORA = "lora"
    EMBEDDING = "embedding"
    VAE = "vae"
    CONTROLNET = "controlnet"

    @property
    def label(self) -> str:
        """What people call it."""
        return {"lora": "LoRA", "vae": "VAE", "controlnet": "ControlNet model"}.get(self.value, self.value)

    @property
    def folder(self) -> str:
        """The cache's folder for models of this kind."""
        return self.value if self is ModelKind.CONTROLNET else f"{self.value}s"

    @property
    def plural(self) -> str:
        """Under which name jobs and answers list models of this kind."""
        return "controlnet_models" if self is ModelKind.CONTROLNET else f"{self.value}s"


@dataclass(frozen=True)
class HubFile:
    """A file of a repository on Hugging Face. `repo` is OWNER/NAME; `revision` is a branch, a tag or a commit."""

    repo: str
    path: str
    revision: str = "main"

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit: then the file never changes."""
        return re.fullmatch(r"[0-9a-f]{40}", self.revision) is not None

    @property
    def name(self) -> str:
        """The file's name without its folder and without `.safetensors`."""
        return self.path.rpartition("/")[2][: -len(".safetensors")]

    @property
    def url_path(self) -> str:
        return f"/{self.repo}/resolve/{quote(self.revision, safe='')}/{quote(self.path)}"

    @property
    def url(self) -> str:
        """The file's address on Hugging Face itself, whichever mirror is asked."""
        return f"https://huggingface.co{self.url_path}"

    def __str__(self) -> str:
        return f"hf:{self.repo}/{self.path}" + ("" if self.revision == "main" else f"@{self.revision}")


@dataclass(frozen=True)
class ModelRef:
    """A model as somebody named it, reduced to ids if the name holds ids.

    Exactly one of these says which model is meant, in this order: `version_id` (with `file_id`), `model_id` (a CivitAI
    page without a version: its newest version), `hub` (a file on Hugging Face), `url` (a host of MODEL_HOSTS), `name`
    alone. `name` beside an id is only what the caller calls the model. `size`, `fp` and `format` are the variant filter
    of a CivitAI URL: they select one of a version's files. `sha256` is 64 lower-case hex digits that the file must
    have. A file of more than `max_size` bytes is not fetched.
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
    hub: HubFile | None = None
    max_size: int | None = None

    def may_mean(self, other: ModelRef) -> bool:
        """Whether this reference, by its ids alone, means the file that `other` means, for all that is known."""
        if self.sha256 is not None and self.sha256 != other.sha256:
            return False
        if self.version_id is not None and (self.file_id, self.size, self.fp, self.format) == (None,) * 4:
            return self.version_id == other.version_id
        return replace(self, name=None, sha256=None) == replace(other, name=None, sha256=None)

    @property
    def is_bare_name(self) -> bool:
        """Whether only a name says which model is meant."""
        return (self.version_id, self.model_id, self.url, self.hub) == (None, None, None, None)

    @property
    def label(self) -> str:
        """How a message names the model. Never by its URL, because that may be signed."""
        if self.name:
            return quoted(self.name, 200)
        if self.version_id is not None:
            return f"CivitAI version {self.version_id}"
        if self.model_id is not None:
            return f"CivitAI model {self.model_id}"
        if self.hub is not None:
            return quoted(str(self.hub), 200)
        return "the file of its URL"


OWN_CHECKPOINT = ModelRef(ModelKind.CHECKPOINT)
"""The worker's own checkpoint, whichever that is."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints that a job names. `refiner` and `hires` are None if the job has none beside `main`."""

    main: ModelRef = OWN_CHECKPOINT
    refiner: ModelRef | None = None
    hires: ModelRef | None = None

    @property
    def others(self) -> tuple[ModelRef, ...]:
        """Those beside `main`."""
        return tuple(ref for ref in (self.refiner, self.hires) if ref is not None)


OWN_ALONE = Checkpoints()


@dataclass(frozen=True)
class CheckpointEntry:
    """A checkpoint that the operator lists for jobs: its name for them, its reference, and perhaps its SHA-256."""

    name: str
    reference: str
    sha256: str | None = None


@dataclass(frozen=True)
class RemoteFile:
    """One file that can be fetched, as its site (or a URL alone) describes it.

    A download starts at `url`, which we build ourselves. `size` is in bytes, and only known if it is exact: CivitAI
    gives KiB as a float. `size_at_most` is known if `size` is, and if only a rounded size is known. `sha256` is lower
    case. `name` is a title for people, and `file_name` what
    its author calls the file: neither is ever a path. `hub` is the file on Hugging Face, with its commit. `restricted`:
    the hub showed it to the worker's token, so not everybody may have it.
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
    file_name: str | None = None
    hub: HubFile | None = None
    restricted: bool = False


@dataclass(frozen=True)
class Model:
    """A verified file on disk.

    `file` is its name in the cache; what the WebUI calls it is `shown`. `lora_hash` is what A1111 prints for a LoRA in
    "Lora hashes" (12 hex digits, by A1111's network.py), None for a checkpoint. `family` is the architecture that it
    belongs to ("sdxl", "sd1", …), None if that is unknown. `source_stem` is what its author calls the file.
    `downloaded`: this hold fetched it. `matched`: how many of a LoRA's layers the checkpoint has, and how many the LoRA
    has; None if that is unknown.
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
    source_stem: str | None = None
    downloaded: bool = False
    warnings: tuple[str, ...] = ()
    matched: tuple[int, int] | None = None

    @property
    def shown(self) -> str:
        """The name under which the WebUI knows the model: in tags, in "Lora hashes", in `info`.

        The same name never means other content (webui_names.py). A version of CivitAI never changes, so the name of a
        checkpoint that is verified to be one stays as it is.
        """
        stem = self.file.removesuffix(".safetensors")
        if self.kind is ModelKind.CHECKPOINT and self.version_id is not None:
            return stem
        if self.kind is ModelKind.EMBEDDING:
            return embedding_word(stem, self.sha256)
        if self.kind is ModelKind.VAE:
            return vae_name(stem, self.sha256)
        return stem_with_hash(stem, self.sha256)

    @property
    def shown_file(self) -> str:
        """The file name under which the WebUI sees the model."""
        return f"{self.shown}.safetensors"


@dataclass(frozen=True)
class HeldModels:
    """Models that stay on disk as long as they are held. `failures`: why others are missing, if that is tolerated.

    `holds` releases them when it is closed. `own` is the worker's own checkpoint, if it is known here.
    """

    models: Mapping[ModelRef, Model] = field(default_factory=dict)
    failures: Mapping[ModelRef, ModelError] = field(default_factory=dict)
    is_tolerant: bool = False
    checkpoints: Checkpoints = Checkpoints()
    own: Model | None = None
    holds: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False, compare=False)

    @property
    def checkpoint(self) -> Model | None:
        """The job's checkpoint; None if it is the worker's own and that is not known here."""
        return self._checkpoint(self.checkpoints.main)

    @property
    def refiner(self) -> Model | None:
        return self._checkpoint(self.checkpoints.refiner)

    @property
    def hires_checkpoint(self) -> Model | None:
        return self._checkpoint(self.checkpoints.hires)

    @property
    def loaded(self) -> list[Model]:
        """Every checkpoint that the WebUI loads for the job, as far as they are known here."""
        checkpoints = (self.checkpoint, self.refiner, self.hires_checkpoint)
        return [model for model in checkpoints if model is not None]

    def _checkpoint(self, ref: ModelRef | None) -> Model | None:
        if ref is None:
            return None
        return self.own if ref == OWN_CHECKPOINT else self.models[ref]

    def get(self, ref: ModelRef) -> Model:
        """A model that the job cannot do without. Raises why it is missing."""
        if ref in self.failures:
            raise self.failures[ref]
        return self.models[ref]


class OnLoraError(str, Enum):
    """What happens to a job if a LoRA is not available, does not fit or was not loaded."""

    FAIL = "fail"
    WARN = "warn"


@dataclass(frozen=True)
class LoraRequest:
    """A LoRA that a job asks for. `scale` is None if the job gives none: then the catalog's is used, else 1.0.

    `path` is the place in the job that asks for it (`loras[0]`, `prompt`); complaints name it. `in_prompt`: the request
    is a tag that the caller wrote into a prompt, under the name `ref.name`. `weighted_in_prompt`: the request is an
    entry of the list without a scale, and a tag in a prompt gives its weights.
    """

    ref: ModelRef
    scale: float | None
    path: str
    in_prompt: bool = False
    weighted_in_prompt: bool = False


@dataclass(frozen=True)
class EmbeddingRequest:
    """An embedding that a job asks for: an entry of its list, or a word of its texts. `path` is the place."""

    ref: ModelRef
    path: str


class ImageFormat(str, Enum):
    """The file format of the answer's images."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"


class DeliveryMode(str, Enum):
    """How images are delivered: in the answer, as links into a bucket, or as their size and the settings decide."""

    AUTO = "auto"
    INLINE = "inline"
    BUCKET = "bucket"


@dataclass(frozen=True)
class OutputOptions:
    """How a job wants its images. `quality` is None if the job gives none; a PNG has none.

    Without `metadata` the images hold no infotext. `raw`: the answer is A1111's, without a `worker` block.
    """

    format: ImageFormat = ImageFormat.PNG
    quality: int | None = None
    delivery: DeliveryMode = DeliveryMode.AUTO
    metadata: bool = True
    raw: bool = False


class Task(str, Enum):
    """What a job wants done. Each task has its table of fields, and its request."""

    TXT2IMG = "txt2img"
    IMG2IMG = "img2img"
    UPSCALE = "upscale"
    PNG_INFO = "png_info"
    MODELS = "models"
    PREFETCH = "prefetch"
    HEALTH = "health"


@dataclass(frozen=True)
class PictureSource:
    """A picture as a job gives it: in base64, or behind an https URL that may be fetched. Its repr shows neither.

    `mask_of` is the path of the picture that this one is a mask of; None: it is no mask. `is_rounded`: see
    pictures.decode.
    """

    base64: str | None = field(default=None, repr=False)
    url: str | None = field(default=None, repr=False)
    mask_of: str | None = None
    is_rounded: bool = True


@dataclass(frozen=True)
class PictureSize:
    """Width and height in pixels, as the picture is looked at (turned by its EXIF)."""

    width: int
    height: int

    @property
    def pixels(self) -> int:
        return self.width * self.height

    def __str__(self) -> str:
        return f"{self.width}×{self.height}"


@dataclass(frozen=True)
class GenerationRequest:
    """The input of a job that generates pictures, checked as far as that is possible without a WebUI.

    `body` is A1111's body of the task as far as the caller (and our defaults) decide it: prompts are the caller's,
    and sampler names are still in the caller's spelling. `pictures` are those of the job, each under its path,
    until they are prepared and in `body`. `controlnet_models` are those of ControlNet's units, each by its unit's
    place. `loras` holds the requests of the list first, in the caller's order, then those of tags in prompts that
    no entry of the list names. `dropped` are the paths of what was taken and cannot change the pictures.
    `include_models`: the answer has the menus too. `allow_blank`: an image of one colour is not an error.
    `preview`: its progress carries pictures. `trigger_words`: the trained words of its LoRAs that a prompt lacks
    are appended to it.
    """

    body: Mapping[str, Any] = field(repr=False)  # it may hold pictures
    task: Task = Task.TXT2IMG
    pictures: Mapping[str, PictureSource] = field(default_factory=dict)
    controlnet_models: Mapping[int, ModelRef] = field(default_factory=dict)
    loras: tuple[LoraRequest, ...] = ()
    on_lora_error: OnLoraError = OnLoraError.FAIL
    warnings: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    output: OutputOptions = OutputOptions()
    include_models: bool = False
    allow_blank: bool = False
    preview: bool = False
    trigger_words: bool = False
    checkpoints: Checkpoints = Checkpoints()
    embeddings: tuple[EmbeddingRequest, ...] = ()
    vae: ModelRef | None = None

    @property
    def models(self) -> tuple[ModelRef, ...]:
        """Every model that the job needs beside the worker's own checkpoint."""
        refs = (
            *(lora.ref for lora in self.loras),
            *(embedding.ref for embedding in self.embeddings),
            *self.controlnet_models.values(),
        )
        checkpoints = (ref for ref in (self.checkpoints.main, *self.checkpoints.others) if ref != OWN_CHECKPOINT)
        return (*refs, *((self.vae,) if self.vae is not None else ()), *checkpoints)


@dataclass(frozen=True)
class ModelsRequest:
    """What a client's menus show. It has no fields."""


@dataclass(frozen=True)
class PrefetchRequest:
    """Models that are to be in the cache, by the name of the field that lists them (`loras`)."""

    refs: Mapping[str, tuple[ModelRef, ...]]


@dataclass(frozen=True)
class UpscaleRequest:
    """The input of a job that enlarges pictures, or restores faces in them.

    `body` is A1111's body of extras without a picture. `pictures` are those of the job, each under its path, until they
    are prepared: then `images` are PNGs in base64, and `sizes` what each becomes. `include_models`: the answer has the
    menus too.
    """

    body: Mapping[str, Any]
    pictures: Mapping[str, PictureSource] = field(default_factory=dict)
    images: tuple[str, ...] = field(default=(), repr=False)
    sizes: tuple[PictureSize, ...] = ()
    warnings: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    output: OutputOptions = OutputOptions()
    include_models: bool = False


@dataclass(frozen=True)
class PngInfoRequest:
    """A picture whose texts are asked for."""

    image: PictureSource


@dataclass(frozen=True)
class HealthRequest:
    """How the worker is. It has no fields."""


Request = GenerationRequest | UpscaleRequest | PngInfoRequest | ModelsRequest | PrefetchRequest | HealthRequest
"""What a job's input becomes: the request of its task."""


@dataclass(frozen=True)
class BucketSettings:
    """S3-compatible storage for results. A link is signed, for `link_seconds`, or it is `public_url` and the key."""

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
    """A LoRA of a job, and whether it was loaded for every image whose prompt names it: for `pictures` images.

    `model` is None if it was not available and the job allows that. `trigger_words` were appended to the prompt for it.
    """

    name: str
    scale: float
    model: Model | None
    loaded: bool
    pictures: int = 0
    trigger_words: tuple[str, ...] = ()


@dataclass(frozen=True)
class AppliedEmbedding:
    """An embedding of a job, and the prompts that its word is in. `loaded`: it is proven that the WebUI used it."""

    model: Model
    prompts: tuple[str, ...]
    loaded: bool = False


@dataclass(frozen=True)
class PictureFacts:
    """What an image says about itself: its size in pixels, its seed and its steps.

    `seed` and `steps` are None for an image without a text of its own, such as a script's grid.
    """

    width: int
    height: int
    seed: int | None
    steps: int | None


@dataclass(frozen=True)
class Menus:
    """What a client's menus show: the fingerprint of it, and all of it if the job asks for that."""

    fingerprint: str = ""
    models: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Generation:
    """A verified generation: the WebUI's answer as it came, and the facts that were checked.

    `seeds` and `pictures` have an entry for each image. A seed is None for an image that has none (a script's grid).
    """

    answer: dict[str, Any]
    checkpoint: Model
    loras: tuple[AppliedLora, ...]
    seeds: tuple[int | None, ...]
    webui_version: str
    warnings: tuple[str, ...] = ()
    menus: Menus = Menus()
    pictures: tuple[PictureFacts, ...] = ()
    embeddings: tuple[AppliedEmbedding, ...] = ()
    vae: Model | None = None
    refiner: Model | None = None
    hires_checkpoint: Model | None = None


@dataclass(frozen=True)
class Upscaling:
    """Enlarged pictures: the WebUI's answer to the last one with all of them, and the facts that were checked."""

    answer: dict[str, Any] = field(repr=False)
    pictures: tuple[PictureFacts, ...]
    webui_version: str | None
    warnings: tuple[str, ...] = ()
    menus: Menus = Menus()

    @property
    def seeds(self) -> tuple[None, ...]:
        """No picture has one."""
        return (None,) * len(self.pictures)


class Stage(str, Enum):
    """The stage that a job is in. `/status` shows it."""

    MODELS = "models"
    QUEUE = "queue"
    SWITCH = "switch"
    GENERATE = "generate"
    DELIVER = "deliver"


@dataclass(frozen=True)
class Progress:
    """A job's progress at one moment: percent 0 to 100 of its stage, and the seconds left. None is unknown."""

    stage: Stage
    percent: float | None = None
    detail: str = ""
    eta_s: float | None = None
    facts: Mapping[str, int | float | str] = field(default_factory=dict)

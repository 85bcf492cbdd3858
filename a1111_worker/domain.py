"""The nouns: what a job asks for, what is on disk, what was made, and how much time there is."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from a1111_worker.errors import JobCancelled, JobTimeout


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


class OnLoraError(str, Enum):
    """What a LoRA that cannot be had, does not fit or was not loaded does to the job."""

    FAIL = "fail"
    WARN = "warn"


@dataclass(frozen=True)
class LoraWish:
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


class PictureFormat(str, Enum):
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

    format: PictureFormat = PictureFormat.PNG
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
    loras: tuple[LoraWish, ...] = ()
    on_lora_error: OnLoraError = OnLoraError.FAIL
    warnings: tuple[str, ...] = ()
    output: OutputOptions = OutputOptions()
    allow_blank: bool = False

    @property
    def images_expected(self) -> int:
        return int(self.body.get("batch_size", 1)) * int(self.body.get("n_iter", 1))


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


Report = Callable[[Progress], None]
"""Told of progress, from any thread; returns at once and never raises."""


def unreported(progress: Progress) -> None:
    """A `Report` for nobody."""


class Deadline:
    """The time something has, and its cancellation: what every blocking stage of a job asks.

    Seconds are counted on the monotonic clock. `cancel` may be called from any thread; whoever waits in `wait` is
    woken, and whoever blocks elsewhere registers how to be unblocked with `on_cancel`.
    """

    def __init__(self, seconds: float = math.inf, *, what: str = "the job") -> None:
        self._end = time.monotonic() + seconds
        self._seconds = seconds
        self._what = what
        self._state = _Cancellation()

    def within(self, seconds: float, *, what: str | None = None) -> Deadline:
        """A deadline that shares this one's cancellation and ends no later than it, nor `seconds` from now."""
        left = self.left()
        if left < seconds:
            child = Deadline(left, what=self._what)
            child._seconds = self._seconds  # it is the longer one's time that will be up
        else:
            child = Deadline(seconds, what=what or self._what)
        child._state = self._state
        return child

    def left(self) -> float:
        """Seconds left, never below zero."""
        return max(0.0, self._end - time.monotonic())

    @property
    def cancelled(self) -> bool:
        return self._state.event.is_set()

    def check(self) -> None:
        """Raise JobCancelled or JobTimeout if there is no time any more."""
        if self.cancelled:
            raise JobCancelled("the job was cancelled before it was done")
        if self.left() == 0.0:
            raise JobTimeout(f"the time of {self._what} is up ({self._seconds:.3g} s)")

    def wait(self, seconds: float) -> None:
        """Sleep, as long as there is time; raises as `check` does, at once when cancelled."""
        self.check()
        self._state.event.wait(min(seconds, self.left()))
        self.check()

    def cancel(self) -> None:
        """End it now, for itself and every deadline made from it. Idempotent."""
        self._state.cancel()

    @contextlib.contextmanager
    def on_cancel(self, unblock: Callable[[], None]) -> Iterator[None]:
        """Call `unblock` once when cancelled inside the block (at once where that already happened)."""
        with self._state.calling(unblock):
            yield


class Run:
    """One piece of work under way: its time, who is told of its progress, and the seconds each stage took."""

    def __init__(self, deadline: Deadline, report: Report = unreported) -> None:
        self.deadline = deadline
        self.report = report
        self._began = time.monotonic()
        self._spent = dict.fromkeys(Stage, 0.0)

    @contextlib.contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Count the time of the block as this stage's."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._spent[stage] += time.monotonic() - began

    def timings(self) -> dict[str, float]:
        """Seconds spent in each stage so far, and in all."""
        return {**{s.value: spent for s, spent in self._spent.items()}, "total": time.monotonic() - self._began}


def in_words(timings: Mapping[str, float]) -> str:
    """Timings for a log line, without the stages that took no time."""
    return ", ".join(f"{stage} {spent:.2f} s" for stage, spent in timings.items() if spent >= 0.005 or stage == "total")


class _Cancellation:
    def __init__(self) -> None:
        self.event = threading.Event()
        self._lock = threading.Lock()
        self._unblocks: list[Callable[[], None]] = []

    def cancel(self) -> None:
        with self._lock:
            if self.event.is_set():
                return
            self.event.set()
            unblocks = list(self._unblocks)
        for unblock in unblocks:
            unblock()

    @contextlib.contextmanager
    def calling(self, unblock: Callable[[], None]) -> Iterator[None]:
        with self._lock:
            already = self.event.is_set()
            self._unblocks.append(unblock)
        if already:
            unblock()
        try:
            yield
        finally:
            with self._lock:
                self._unblocks.remove(unblock)

"""Everything that can go wrong with a job, as its caller sees it.

    WorkerError
    ├── InvalidRequest          the job itself, all complaints at once
    ├── ModelError              a checkpoint or LoRA cannot be had; `on_lora_error: warn` lets a LoRA's pass
    │   ├── ModelNotFound
    │   ├── ModelAccessDenied
    │   ├── ModelRejected
    │   ├── DownloadFailed
    │   └── VolumeFull
    ├── WebUINotReady           not up in time, or given up on
    ├── WebUILost               died or hung while it worked for this job
    ├── CheckpointNotLoaded     the proof failed
    ├── LoraNotApplied          asked for and not loaded
    ├── GenerationFailed        the WebUI's own failure
    ├── OutOfMemory
    ├── JobTimeout
    ├── JobCancelled            by the worker's own shutdown
    ├── ResultTooLarge
    ├── DeliveryFailed
    └── Internal                our own bug

Every class has a code that never changes, a sentence, and a hint where someone can act on it. What comes from below
is translated where it enters our code; no path, key, signed URL or traceback is ever put into a sentence or a hint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


class WorkerError(Exception):
    """A failure with a code; `answer()` is what the caller gets."""

    code: ClassVar[str] = "INTERNAL"
    retryable: bool = False
    refresh_worker: bool = False

    def __init__(self, sentence: str, *, hint: str | None = None, refresh_worker: bool | None = None) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.hint = hint
        if refresh_worker is not None:
            self.refresh_worker = refresh_worker

    def answer(self) -> dict[str, Any]:
        """The failed job's answer: `error` is always a non-empty string (the SDK drops anything else)."""
        answer: dict[str, Any] = {"error": sayable(f"{self.code}: {self.sentence}"), "code": self.code}
        if self.hint:
            answer["hint"] = sayable(self.hint)
        answer["retryable"] = self.retryable
        if self.refresh_worker:
            answer["refresh_worker"] = True
        return answer


def sayable(text: str, limit: int = 4000) -> str:
    """Text that may leave in JSON and is read by a person: no lone surrogate, not endless."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= limit else text[: limit - 1] + "…"


@dataclass(frozen=True)
class Complaint:
    """One thing wrong with a job: where (`loras[2].scale`) and what."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class InvalidRequest(WorkerError):
    """The job cannot be done as it is written; `complaints` holds everything that is wrong with it."""

    code = "INVALID_REQUEST"

    def __init__(self, complaints: str | Sequence[Complaint], *, hint: str | None = None) -> None:
        self.complaints = (Complaint("", complaints),) if isinstance(complaints, str) else tuple(complaints)
        super().__init__("; ".join(str(complaint) for complaint in self.complaints), hint=hint)


class ModelError(WorkerError):
    """A model cannot be had."""


class ModelNotFound(ModelError):
    code = "MODEL_NOT_FOUND"


class ModelAccessDenied(ModelError):
    code = "MODEL_ACCESS_DENIED"


class ModelRejected(ModelError):
    """What was found is not what may be loaded: not safetensors, another hash, too large, another base model."""

    code = "MODEL_REJECTED"


class DownloadFailed(ModelError):
    code = "DOWNLOAD_FAILED"
    retryable = True


class VolumeFull(ModelError):
    """No room that may be freed, or nowhere to write."""

    code = "VOLUME_FULL"
    retryable = True


class WebUINotReady(WorkerError):
    code = "WEBUI_NOT_READY"
    retryable = True
    refresh_worker = True


class WebUILost(WorkerError):
    """The WebUI died or hung while it worked for this job; raised with `refresh_worker` when it does not come back."""

    code = "WEBUI_LOST"
    retryable = True


class CheckpointNotLoaded(WorkerError):
    code = "CHECKPOINT_NOT_LOADED"
    retryable = True
    refresh_worker = True


class LoraNotApplied(WorkerError):
    code = "LORA_NOT_APPLIED"


class GenerationFailed(WorkerError):
    code = "GENERATION_FAILED"


class OutOfMemory(WorkerError):
    """CUDA out of memory; raised with `refresh_worker` when it is the second within three jobs."""

    code = "OUT_OF_MEMORY"


class JobTimeout(WorkerError):
    code = "JOB_TIMEOUT"
    retryable = True


class JobCancelled(WorkerError):
    """The worker's shutdown took the job. (A job cancelled on RunPod gets no answer at all.)"""

    code = "JOB_CANCELLED"
    retryable = True


class ResultTooLarge(WorkerError):
    code = "RESULT_TOO_LARGE"


class DeliveryFailed(WorkerError):
    code = "DELIVERY_FAILED"
    retryable = True


class Internal(WorkerError):
    code = "INTERNAL"
    retryable = True
    refresh_worker = True


class ConfigError(Exception):
    """A setting that cannot be used: its name, its value and what it takes, in one line. Stops the start."""

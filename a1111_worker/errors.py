"""Everything that can go wrong with a job, as its caller sees it.

    WorkerError
    ├── InvalidRequest           the job itself; holds every complaint
    ├── ModelError               a checkpoint or LoRA is not available; `on_lora_error: warn` makes a LoRA's a warning
    │   ├── ModelNotFound
    │   ├── ModelAccessDenied
    │   ├── ModelRejected
    │   ├── DownloadFailed
    │   │   └── PartialFileLost      another worker took the partial file over, or it is gone
    │   ├── VolumeFull
    │   │   ├── FileTooLong          the file system takes no file of this size
    │   │   └── RoomInUse            there would be room if other jobs released their models
    │   └── VolumeFailed             the volume cannot be read or written
    ├── WebUINotReady            did not start in time, or was given up on
    │   └── RouteMissing             a bare 404: the API is not mounted (yet)
    ├── WebUILost                died or hung while it worked for this job
    │   ├── WebUIRefused             nothing listens at its address
    │   └── WebUISilent              it took a request and did not answer in time
    ├── CheckpointNotLoaded      the verification of a generation failed
    │   └── WebUIBroken              a failed switch has broken the WebUI for good; only a restart helps
    ├── LoraNotApplied           a LoRA was asked for and not loaded
    ├── GenerationFailed         the WebUI's own failure
    ├── OutOfMemory
    ├── JobTimeout
    ├── JobCancelled             by the worker's own shutdown
    ├── ResultTooLarge
    ├── DeliveryFailed
    └── Internal                 our own bug

    ConfigError                  a setting that cannot be used; the worker does not start

Every error has a code that never changes, a message of one sentence, and a hint if someone can act on it. A class that
docs/subsystems/api-gateway.md does not list has the code of its parent: only our own code needs to tell the two apart.
An error from below is translated at the place where it enters our code. No path, key, signed URL or traceback is ever
put into a message or a hint. Both are printable and of bounded length, whatever names they repeat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from a1111_worker.text import printable

MAX_MESSAGE = 3_900  # characters; with its code before it, an error stays below 4,000
MAX_PATH = 200
MAX_COMPLAINT = 600


class WorkerError(Exception):
    """A failure with a code. `answer()` is what the caller gets."""

    code: ClassVar[str] = "INTERNAL"
    retryable: bool = False
    refresh_worker: bool = False

    def __init__(self, message: str, *, hint: str | None = None, refresh_worker: bool | None = None) -> None:
        self.message = printable(message, MAX_MESSAGE)
        self.hint = hint and printable(hint, MAX_MESSAGE)
        super().__init__(self.message)
        if refresh_worker is not None:
            self.refresh_worker = refresh_worker

    def answer(self) -> dict[str, Any]:
        """The failed job's answer: `error` is always a non-empty string (the SDK drops anything else).

        `message` repeats what `error` says: RunPod's own Python client shows a caller only the keys beside `error`
        (runpod 1.12, endpoint/runner.py).
        """
        answer: dict[str, Any] = {
            "error": f"{self.code}: {self.message}",
            "code": self.code,
            "message": self.message,
        }
        if self.hint:
            answer["hint"] = self.hint
        answer["retryable"] = self.retryable
        if self.refresh_worker:
            answer["refresh_worker"] = True
        return answer


@dataclass(frozen=True)
class Complaint:
    """One thing that is wrong with a job: where (`loras[2].scale`), and what."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class InvalidRequest(WorkerError):
    """The job cannot be done as it is written; `complaints` holds everything that is wrong with it."""

    code = "INVALID_REQUEST"

    def __init__(self, complaints: str | Sequence[Complaint], *, hint: str | None = None) -> None:
        given = (Complaint("", complaints),) if isinstance(complaints, str) else complaints
        self.complaints = tuple(
            Complaint(printable(one.path, MAX_PATH), printable(one.message, MAX_COMPLAINT)) for one in given
        )
        super().__init__("; ".join(str(complaint) for complaint in self.complaints), hint=hint)

    def answer(self) -> dict[str, Any]:
        """The failed job's answer, with the complaints one by one for programs."""
        complaints = [{"path": c.path, "message": c.message} for c in self.complaints]
        return {**super().answer(), "complaints": complaints}


class ModelError(WorkerError):
    """A model is not available."""


class ModelNotFound(ModelError):
    code = "MODEL_NOT_FOUND"


class ModelAccessDenied(ModelError):
    code = "MODEL_ACCESS_DENIED"


class ModelRejected(ModelError):
    """The file may not be loaded: not safetensors, another hash, too large, or for another base model."""

    code = "MODEL_REJECTED"


class DownloadFailed(ModelError):
    code = "DOWNLOAD_FAILED"
    retryable = True


class PartialFileLost(DownloadFailed):
    """Another worker took the partial file over, or it is gone."""


class VolumeFull(ModelError):
    """There is no room, and none may be freed (ENOSPC, EDQUOT)."""

    code = "VOLUME_FULL"
    retryable = True


class FileTooLong(VolumeFull):
    """The volume takes no file of that size: evicting others would not help."""


class RoomInUse(VolumeFull):
    """There is no room now. There would be enough if other jobs and workers released the models that they use."""


class VolumeFailed(ModelError):
    """The volume cannot be read or written, or there is nowhere to write (EIO, ESTALE, EROFS, EACCES, ENOTCONN)."""

    code = "VOLUME_FAILED"
    retryable = True


class WebUINotReady(WorkerError):
    code = "WEBUI_NOT_READY"
    retryable = True
    refresh_worker = True


class RouteMissing(WebUINotReady):
    """A bare 404: the API is not mounted (yet), or something else listens there. The request is never the cause."""


class WebUILost(WorkerError):
    """The WebUI died or hung while it worked for this job; raised with `refresh_worker` if it does not come back."""

    code = "WEBUI_LOST"
    retryable = True


class WebUIRefused(WebUILost):
    """Nothing listens at the WebUI's address."""


class WebUISilent(WebUILost):
    """It took a request and did not answer in time."""


class CheckpointNotLoaded(WorkerError):
    code = "CHECKPOINT_NOT_LOADED"
    retryable = True
    refresh_worker = True


class WebUIBroken(CheckpointNotLoaded):
    """A failed switch has broken the WebUI for good, although it answers every GET. Only a restart helps."""


class LoraNotApplied(WorkerError):
    code = "LORA_NOT_APPLIED"


class GenerationFailed(WorkerError):
    code = "GENERATION_FAILED"


class OutOfMemory(WorkerError):
    """CUDA out of memory; raised with `refresh_worker` if it is the second one within three jobs."""

    code = "OUT_OF_MEMORY"


class JobTimeout(WorkerError):
    code = "JOB_TIMEOUT"
    retryable = True


class JobCancelled(WorkerError):
    """The worker shut down during the job. (A job that is cancelled on RunPod gets no answer at all.)"""

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
    """A setting that cannot be used. One line with its name, its value and what it takes. The worker does not start."""

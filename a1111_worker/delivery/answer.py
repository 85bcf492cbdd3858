"""A job's answer: A1111's own, the `worker` block beside it, and its measured size against the platform's limit.

RunPod drops a result that is too large and tells nobody: the job stays IN_PROGRESS, or ends COMPLETED without output.
So the size is measured here first. The limit is 10 MB for /run and 20 MB for /runsync, whose ids start with `sync-`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from a1111_worker import __version__
from a1111_worker.context import format_times
from a1111_worker.domain import AppliedLora, DeliveryMode, Generation, ImageFormat, Model, OutputOptions, Upscaling
from a1111_worker.errors import GenerationFailed, ResultTooLarge

MB = 1_000_000
RUN_LIMIT = 10 * MB
RUNSYNC_LIMIT = 20 * MB
ENVELOPE_BYTES = 200  # the SDK's own `{"output": …}` around the answer, and timings that grow by a digit, rounded up
LINK_BYTES = 2_000  # one link, signed or not, rounded up: a key has at most 1024


@dataclass(frozen=True)
class Delivered:
    """How the images are delivered: as base64 in `images`, or as links."""

    images: Sequence[str] = ()
    format: ImageFormat = ImageFormat.PNG
    urls: Sequence[str] = ()
    expires_at: str | None = None

    @property
    def mode(self) -> DeliveryMode:
        return DeliveryMode.BUCKET if self.urls else DeliveryMode.INLINE


def build_answer(result: Generation | Upscaling, delivered: Delivered, timings: Mapping[str, float]) -> dict[str, Any]:
    """The successful job's answer: the WebUI's own, and the `worker` block."""
    worker = _worker_block(result, delivered, timings)
    answer = {**result.answer, "images": list(delivered.images), "worker": worker}
    models = result.menus.models
    return answer if models is None else {**answer, "models": models}


def format_summary(worker: Mapping[str, Any]) -> str:
    """The `worker` block as the job's last log line. It contains no link."""
    if "checkpoint" not in worker:
        facts = [f"done with {len(worker['pictures'])} pictures enlarged"]
        return f"{', '.join(facts)}; {format_times(worker['timings'])}"
    loras = [
        f"{lora['file'] or lora['name']} × {lora['scale']:g}"
        + ("" if lora["loaded"] else " (not applied)")
        + (" (downloaded)" if lora["downloaded"] else "")
        for lora in worker["loras"]
    ]
    facts = [f"done with {worker['checkpoint']['file']}", f"LoRAs: {', '.join(loras) or 'none'}"]
    if not any(lora["downloaded"] for lora in worker["loras"]):
        facts.append("nothing to download")
    if worker["delivery"]["urls"]:
        facts.append(f"{len(worker['delivery']['urls'])} in the bucket")
    return f"{', '.join(facts)}; {format_times(worker['timings'])}"


def _worker_block(result: Generation | Upscaling, delivered: Delivered, timings: Mapping[str, float]) -> dict[str, Any]:
    """What this worker verified, and how long it took. The fields are documented in docs/subsystems/api-gateway.md."""
    return {
        **(_proofs(result) if isinstance(result, Generation) else {}),
        "seeds": list(result.seeds),
        "pictures": [asdict(picture) for picture in result.pictures],
        "warnings": list(result.warnings),
        "delivery": {
            "mode": delivered.mode.value,
            "format": delivered.format.value,
            "urls": list(delivered.urls),
            "expires_at": delivered.expires_at,
        },
        "timings": {stage: round(seconds, 3) for stage, seconds in timings.items()},
        "versions": {"worker": __version__, "webui": result.webui_version},
        "lists": result.menus.fingerprint,
    }


def _proofs(generation: Generation) -> dict[str, Any]:
    return {
        "checkpoint": _checkpoint_entry(generation.checkpoint),
        "refiner": generation.refiner and _checkpoint_entry(generation.refiner),
        "hires_checkpoint": generation.hires_checkpoint and _checkpoint_entry(generation.hires_checkpoint),
        "loras": [_lora_entry(lora) for lora in generation.loras],
        "embeddings": [
            {**_model_entry(embedding.model), "word": embedding.model.shown, "loaded": embedding.loaded}
            for embedding in generation.embeddings
        ],
        "vae": None if generation.vae is None else _model_entry(generation.vae),
    }


def _checkpoint_entry(model: Model) -> dict[str, Any]:
    return {"name": model.name, "file": model.file, "sha256": model.sha256}


def _model_entry(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "file": model.file,
        "version_id": model.version_id,
        "sha256": model.sha256,
        "downloaded": model.downloaded,
    }


def _lora_entry(lora: AppliedLora) -> dict[str, Any]:
    model = lora.model
    return {
        "name": lora.name,
        "file": model.file if model else None,
        "tag": model.shown if model else None,
        "version_id": model.version_id if model else None,
        "scale": lora.scale,
        "sha256": model.sha256 if model else None,
        "loaded": lora.loaded,
        "pictures": lora.pictures,
        "matched": list(model.matched) if model and model.matched else None,
        "trigger_words": list(lora.trigger_words),
        "downloaded": model.downloaded if model else False,
    }


# -- sizes ------------------------------------------------------------------------------------------------------------


def size_limit(job_id: str) -> int:
    """Bytes of the serialised answer that RunPod takes for a job."""
    return RUNSYNC_LIMIT if job_id.startswith("sync-") else RUN_LIMIT


def serialised_size(answer: Mapping[str, Any]) -> int:
    """Bytes of `answer` as the SDK will serialise it. The images are not serialised for that: base64 is its own JSON.

    Raises GenerationFailed if the answer is not strict JSON (a NaN would be posted and lost).
    """
    images = answer.get("images", [])
    rest = {**answer, "images": []}
    try:
        size = len(json.dumps(rest, ensure_ascii=False, allow_nan=False).encode())
    except (ValueError, TypeError, RecursionError) as error:
        raise GenerationFailed("the WebUI's answer cannot be passed on as JSON") from error
    # `", "` between two images, quotes around each.
    return size + sum(len(image) + 4 for image in images)


def choose_mode(answer: Mapping[str, Any], options: OutputOptions, limit: int, *, has_bucket: bool) -> DeliveryMode:
    """INLINE if an answer leaves as it is, BUCKET if its images go there. Raises ResultTooLarge if neither is possible.

    `answer` holds the images as they would leave inline. `limit` is in bytes.
    """
    size = serialised_size(answer) + ENVELOPE_BYTES
    if options.delivery is not DeliveryMode.BUCKET and size <= limit:
        return DeliveryMode.INLINE
    may_use_bucket = has_bucket and not options.raw and options.delivery is not DeliveryMode.INLINE
    if may_use_bucket and _size_with_links(answer) <= limit:
        return DeliveryMode.BUCKET
    raise ResultTooLarge(
        f"the result is {size / MB:.1f} MB and RunPod takes {limit / MB:.0f} MB of this kind of job",
        hint="; or ".join(_alternatives(answer, options, size, limit, has_bucket)),
    )


def _size_with_links(answer: Mapping[str, Any]) -> int:
    """Bytes of an answer with a link in the place of each image, rounded up."""
    return serialised_size({**answer, "images": []}) + ENVELOPE_BYTES + LINK_BYTES * len(answer["images"])


def _alternatives(
    answer: Mapping[str, Any], options: OutputOptions, size: int, limit: int, has_bucket: bool
) -> list[str]:
    """Everything that the caller or the operator can do about a result that is too large, the easiest first."""
    found = []
    if options.format is ImageFormat.PNG:
        found.append('ask for "output": {"format": "webp"} or "jpeg", about a tenth of a PNG')
    found.append("fewer images in one job" if len(answer["images"]) > 1 else "a smaller image")
    if limit < RUNSYNC_LIMIT and size <= RUNSYNC_LIMIT:
        found.append("/runsync, which takes 20 MB")
    if not has_bucket:
        found.append("a bucket for results, which the worker's operator sets up (BUCKET_ENDPOINT_URL and the others)")
    elif options.raw or options.delivery is DeliveryMode.INLINE:
        found.append('links into the bucket: leave out "raw", and "delivery" or set it to "auto"')
    return found

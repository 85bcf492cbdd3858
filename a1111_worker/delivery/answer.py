"""A job's answer: A1111's own, the `worker` block beside it, and its measured size against the platform's limit.

RunPod drops a result that is too large and tells nobody (the job stays IN_PROGRESS or ends COMPLETED without output),
so the size is measured here first: 10 MB for /run, 20 MB for /runsync, whose ids start with `sync-`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from a1111_worker import __version__
from a1111_worker.context import format_timings
from a1111_worker.domain import AppliedLora, DeliveryMode, Generation, ImageFormat, OutputOptions
from a1111_worker.errors import GenerationFailed, ResultTooLarge

MB = 1_000_000
RUN_LIMIT = 10 * MB
RUNSYNC_LIMIT = 20 * MB
ENVELOPE = 200  # the SDK's own `{"output": …}` around the answer, and timings that grow by a digit, rounded up
LINK = 2_000  # bytes of one link, signed or not, rounded up: a key has at most 1024


@dataclass(frozen=True)
class Delivered:
    """How the pictures left: as base64 in `images`, or as links."""

    images: Sequence[str] = ()
    format: ImageFormat = ImageFormat.PNG
    urls: Sequence[str] = ()
    expires_at: str | None = None

    @property
    def mode(self) -> DeliveryMode:
        return DeliveryMode.BUCKET if self.urls else DeliveryMode.INLINE


def answer_of(generation: Generation, delivered: Delivered, timings: Mapping[str, float]) -> dict[str, Any]:
    """The successful job's answer: what the WebUI said, and what this worker has to say."""
    worker = worker_block(generation, delivered, timings)
    return {**generation.answer, "images": list(delivered.images), "worker": worker}


def worker_block(generation: Generation, delivered: Delivered, timings: Mapping[str, float]) -> dict[str, Any]:
    """What this worker proved, and how long it took; the form is documented in docs/subsystems/api-gateway.md."""
    checkpoint = generation.checkpoint
    return {
        "checkpoint": {"name": checkpoint.name, "file": checkpoint.file, "sha256": checkpoint.sha256},
        "loras": [_lora(lora) for lora in generation.loras],
        "seeds": list(generation.seeds),
        "warnings": list(generation.warnings),
        "delivery": {
            "mode": delivered.mode.value,
            "format": delivered.format.value,
            "urls": list(delivered.urls),
            "expires_at": delivered.expires_at,
        },
        "timings": {stage: round(seconds, 3) for stage, seconds in timings.items()},
        "versions": {"worker": __version__, "webui": generation.webui_version},
    }


def in_one_line(worker: Mapping[str, Any]) -> str:
    """The `worker` block as the job's last log line: no link in it."""
    loras = [
        f"{lora['file'] or lora['name']} × {lora['scale']:g}"
        + ("" if lora["loaded"] else " (not applied)")
        + (" (downloaded)" if lora["downloaded"] else "")
        for lora in worker["loras"]
    ]
    nothing = "" if any(lora["downloaded"] for lora in worker["loras"]) else ", nothing to download"
    links = len(worker["delivery"]["urls"])
    where = f", {links} in the bucket" if links else ""
    seconds = format_timings(worker["timings"])
    return f"done with {worker['checkpoint']['file']}, LoRAs: {', '.join(loras) or 'none'}{nothing}{where}; {seconds}"


# -- sizes ------------------------------------------------------------------------------------------------------------


def limit_of(job_id: str) -> int:
    """Bytes of the serialised answer that RunPod takes for a job."""
    return RUNSYNC_LIMIT if job_id.startswith("sync-") else RUN_LIMIT


def size_of(answer: Mapping[str, Any]) -> int:
    """Bytes of `answer` as the SDK will serialise it, without serialising the pictures: base64 is its own JSON.

    Raises GenerationFailed where it is no strict JSON (a NaN would be posted and lost).
    """
    images = answer.get("images", [])
    rest = {**answer, "images": []}
    try:
        size = len(json.dumps(rest, ensure_ascii=False, allow_nan=False).encode())
    except (ValueError, TypeError, RecursionError) as error:
        raise GenerationFailed("the WebUI's answer cannot be passed on as JSON") from error
    # `", "` between two pictures, quotes around each.
    return size + sum(len(image) + 4 for image in images)


def way_out(answer: Mapping[str, Any], options: OutputOptions, limit: int, *, has_bucket: bool) -> DeliveryMode:
    """Whether an answer leaves as it is or its pictures go to the bucket. Raises ResultTooLarge where neither can be.

    `answer` holds the pictures as they would leave inline.
    """
    size = size_of(answer) + ENVELOPE
    if options.delivery is not DeliveryMode.BUCKET and size <= limit:
        return DeliveryMode.INLINE
    has_place = has_bucket and not options.raw and options.delivery is not DeliveryMode.INLINE
    if has_place and size_of({**answer, "images": []}) + ENVELOPE + LINK * len(answer["images"]) <= limit:
        return DeliveryMode.BUCKET
    raise ResultTooLarge(
        f"the result is {size / MB:.1f} MB and RunPod takes {limit / MB:.0f} MB of this kind of job",
        hint=_what_would_fit(answer, options, size, limit, has_bucket=has_bucket),
    )


def _what_would_fit(
    answer: Mapping[str, Any], options: OutputOptions, size: int, limit: int, *, has_bucket: bool
) -> str:
    """Every way that leads out, the easiest first."""
    ways = []
    if options.format is ImageFormat.PNG:
        ways.append('ask for "output": {"format": "webp"} or "jpeg", about a tenth of a PNG')
    ways.append("fewer images in one job" if len(answer["images"]) > 1 else "a smaller image")
    if limit < RUNSYNC_LIMIT and size <= RUNSYNC_LIMIT:
        ways.append("/runsync, which takes 20 MB")
    if not has_bucket:
        ways.append("a bucket for results, which the worker's operator sets up (BUCKET_ENDPOINT_URL and the others)")
    elif options.raw or options.delivery is DeliveryMode.INLINE:
        ways.append('links into the bucket: leave out "raw", and "delivery" or set it to "auto"')
    return "; or ".join(ways)


def _lora(lora: AppliedLora) -> dict[str, Any]:
    model = lora.model
    return {
        "name": lora.name,
        "file": model.file if model else None,
        "version_id": model.version_id if model else None,
        "scale": lora.scale,
        "sha256": model.sha256 if model else None,
        "loaded": lora.loaded,
        "downloaded": model.downloaded if model else False,
    }

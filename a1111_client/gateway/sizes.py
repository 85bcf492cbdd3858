"""The rule of 10 MB: what RunPod would refuse is made smaller here, or refused with a sentence that has the sizes."""

from __future__ import annotations

import base64
import binascii
import io
import json
import logging
from typing import Any

from PIL import Image, ImageOps

from a1111_client.endpoint import MAX_BODY
from a1111_client.gateway.errors import Refused
from a1111_client.infotext import NotAPicture, open_picture

log = logging.getLogger(__name__)

ROOM = 4096
"""Bytes that the keys around an input may take."""

_LARGE = 64 * 1024  # characters: a shorter text is not worth the work
_STEPS = [(95, 1.0), (90, 1.0), (80, 1.0), (80, 0.75), (80, 0.5), (80, 0.35), (75, 0.25)]  # quality, share of the sides
_KEYS = ("init_images", "mask", "image", "images", "imageList", "data", "alwayson_scripts")


def body_size(given: Any) -> int:
    """The bytes of a job's input as JSON."""
    return len(json.dumps(given, ensure_ascii=False).encode(errors="surrogatepass"))


def fit(given: dict[str, Any], limit: int = MAX_BODY - ROOM) -> dict[str, Any]:
    """The input, with its pictures re-encoded as WebP, and made smaller, until RunPod takes it. Raises Refused.

    It may take seconds of the processor: call it in a thread.
    """
    before = body_size(given)
    if before <= limit:
        return given
    smaller, size = given, before
    for quality, share in _STEPS:
        smaller = _replace_pictures(given, quality, share)
        size = body_size(smaller)
        if size <= limit:
            pixels = "" if share == 1 else f", their sides at {share:.0%}"
            log.warning(
                "the job had %.1f MB, and RunPod takes %.1f MB: its pictures were encoded as WebP of quality %d%s",
                *(before / 1e6, limit / 1e6, quality, pixels),
            )
            return smaller
    raise Refused(
        413,
        f"the request has {before / 1e6:.1f} MB and RunPod takes {limit / 1e6:.1f} MB; "
        f"with its pictures made as small as is sensible it still has {size / 1e6:.1f} MB",
    )


def _replace_pictures(given: dict[str, Any], quality: int, share: float) -> dict[str, Any]:
    """A copy in which each large text of the fields that hold pictures is encoded anew."""

    def walk(value: Any, *, is_mask: bool) -> Any:
        if isinstance(value, str):
            return _encode(value, quality, share, lossless=is_mask) if len(value) > _LARGE else value
        if isinstance(value, list):
            return [walk(member, is_mask=is_mask) for member in value]
        if isinstance(value, dict):
            return {key: walk(member, is_mask="mask" in key) for key, member in value.items()}
        return value

    return {key: walk(value, is_mask=key == "mask") if key in _KEYS else value for key, value in given.items()}


def _encode(text: str, quality: int, share: float, *, lossless: bool) -> str:
    """A base64 picture, smaller. Unchanged if it is no picture, or would grow. `lossless`: a mask keeps its edge."""
    try:
        picture = open_picture(decode(text))
        mode = "RGBA" if "A" in picture.getbands() or "transparency" in picture.info else "RGB"
        drawn: Image.Image = ImageOps.exif_transpose(picture).convert(mode)
    except (NotAPicture, OSError, ValueError):
        return text
    if share < 1:
        drawn = drawn.resize((max(1, round(drawn.width * share)), max(1, round(drawn.height * share))))
    file = io.BytesIO()
    try:
        drawn.save(file, "webp", quality=quality, method=2, lossless=lossless)
    except (OSError, ValueError):  # more than 16383 pixels at a side
        return text
    encoded = base64.b64encode(file.getvalue()).decode()
    return encoded if len(encoded) < len(text) else text


def decode(text: str) -> bytes:
    """The bytes of a picture as clients send it: base64, blanks around it, `data:image/…;base64,` before it.

    Raises ValueError.
    """
    text = text.strip()
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=False)
    except binascii.Error as error:
        raise ValueError("no base64") from error

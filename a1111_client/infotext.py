"""The text that A1111 writes into its pictures: prompt, negative prompt and settings, as A1111 1.10.1 reads them.

a lighthouse at dawn
Negative prompt: blurry
Steps: 20, Sampler: Euler a, Seed: 42, Size: 512x768, Lora hashes: "detail: 9c7a1b, hand: 1f"
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from typing import Any

from PIL import ExifTags, Image

_SETTING = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_SIZE = re.compile(r"(\d+)x(\d+)")
_USER_COMMENT = 0x9286  # EXIF, in which jpeg, webp and avif carry the text
# What Pillow knows of a picture beside its texts, as A1111 leaves it out.
_NOT_A_TEXT = re.compile(
    "jfif(_version|_unit|_density)?|dpi|exif|loop|background|timestamp|duration|progressi(ve|on)|icc_profile"
    "|chromaticity|photoshop|extension|transparency|gamma|srgb|interlace"
)
_MINIMUM_SETTINGS = 3  # fewer on the last line: it belongs to the prompt

MAX_PIXELS = 256_000_000
"""Larger pictures are not opened. None of their pixels is needed, but a decoder may reserve room for all of them."""


class NotAPicture(ValueError):
    """Bytes that are no picture that Pillow can read."""


def open_picture(data: bytes) -> Image.Image:
    """The picture, of which only the header has been read. Raises NotAPicture."""
    try:
        picture = Image.open(io.BytesIO(data))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise NotAPicture("the bytes are no picture") from error
    if picture.width * picture.height > MAX_PIXELS:
        raise NotAPicture(f"the picture has {picture.width}x{picture.height} pixels")
    return picture


def read_infotext(data: bytes) -> tuple[str, dict[str, str]]:
    """A picture's infotext ("" if it has none), and its other texts by their keys. Raises NotAPicture."""
    picture = open_picture(data)
    texts = {
        str(key): value.decode("utf-8", errors="ignore") if isinstance(value, bytes) else str(value)
        for key, value in picture.info.items()
        if not _NOT_A_TEXT.fullmatch(str(key))
    }
    infotext = texts.pop("parameters", "")
    comment = picture.getexif().get_ifd(ExifTags.IFD.Exif).get(_USER_COMMENT) or texts.get("comment", "")
    if comment:
        infotext = _decode_comment(comment) if isinstance(comment, bytes) else str(comment)
    return infotext, texts


def _decode_comment(comment: bytes) -> str:
    """The text of EXIF's UserComment: eight bytes name its encoding."""
    encoding, text = comment[:8], comment[8:]
    if encoding.startswith(b"UNICODE"):
        # The standard does not say which end comes first. A1111 (piexif) writes the big one.
        return text.decode("utf-16-be", errors="ignore").rstrip("\0")
    return text.decode("utf-8", errors="ignore").rstrip("\0")


def parse_infotext(text: str) -> dict[str, Any]:
    """An infotext's parts by A1111's names: Steps, Seed, Size-1, Size-2, …, Prompt, Negative prompt, and defaults.

    As A1111's parse_generation_parameters: the last line holds the settings if there are at least three in it, every
    value that the text has is a string, and what the text does not say has the value that A1111's page would show.
    """
    *lines, last = text.strip().split("\n")
    settings = _SETTING.findall(last)
    if len(settings) < _MINIMUM_SETTINGS:
        lines.append(last)
        settings = []
    prompt: list[str] = []
    negative: list[str] = []
    target = prompt
    for line in lines:
        line = line.strip()
        if line.startswith("Negative prompt:"):
            target, line = negative, line.removeprefix("Negative prompt:").strip()
        target.append(line)
    parts: dict[str, Any] = {}
    for name, quoted in settings:
        value = _unquoted(quoted)
        size = _SIZE.fullmatch(value)
        parts |= {f"{name}-1": size[1], f"{name}-2": size[2]} if size else {name: value}
    parts |= {"Prompt": "\n".join(prompt), "Negative prompt": "\n".join(negative)}
    uses_emphasis = _EMPHASIS.search(parts["Prompt"] + parts["Negative prompt"]) is not None
    emphasis = {"Emphasis": "Original"} if uses_emphasis else {}
    return {**_DEFAULTS, **emphasis, **parts}


def _unquoted(value: str) -> str:
    if not (value.startswith('"') and value.endswith('"')):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value


_EMPHASIS = re.compile(r"(?<!\\)[(\[]")

_DEFAULTS: Mapping[str, Any] = {
    "Clip skip": "1",
    "Hires resize-1": 0,
    "Hires resize-2": 0,
    "Hires sampler": "Use same sampler",
    "Hires schedule type": "Use same scheduler",
    "Hires checkpoint": "Use same checkpoint",
    "Hires prompt": "",
    "Hires negative prompt": "",
    "Mask mode": "Inpaint masked",
    "Masked content": "original",
    "Inpaint area": "Whole picture",
    "Masked area padding": 32,
    "RNG": "GPU",
    "Schedule type": "Automatic",
    "Schedule max sigma": 0,
    "Schedule min sigma": 0,
    "Schedule rho": 0,
    "VAE Encoder": "Full",
    "VAE Decoder": "Full",
    "FP8 weight": "Disable",
    "Refiner switch by sampling steps": False,
}

"""The texts in a picture's file: A1111's infotext, and those of other programs (1.10.1, `read_info_from_image`).

A1111 writes its own into the PNG chunk `parameters`, and into the EXIF UserComment of a JPEG or WEBP.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from a1111_worker.domain import PictureSize
from a1111_worker.pictures.decode import opened

_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286

# What Pillow keeps beside the texts of a file.
_NO_TEXTS = re.compile(
    "jfif(_version|_unit|_density)?|dpi|exif|loop|background|timestamp|duration|progressi(ve|on)|icc_profile"
    "|chromaticity|photoshop|extension|transparency|gamma|srgb|interlace|xmp|mp|mpoffset|adobe"
)


@dataclass(frozen=True)
class PictureTexts:
    """`infotext` is A1111's, or what stands in its place; "" if nothing does. `items` are the other texts."""

    infotext: str
    items: Mapping[str, str]
    size: PictureSize


def read_texts(data: bytes) -> PictureTexts:
    """The texts of a picture's file. None of its pixels is decoded. Raises BadPicture."""
    with opened(data) as image:
        items = {
            str(key): _decoded(value)
            for key, value in image.info.items()
            if isinstance(value, (str, bytes)) and not _NO_TEXTS.fullmatch(str(key))
        }
        infotext = items.pop("parameters", "")
        comment = _user_comment(image)
        if comment:
            infotext = comment
        elif "comment" in items:  # of a GIF
            infotext = items["comment"]
        return PictureTexts(infotext, items, PictureSize(*image.size))


def novelai_infotext(texts: PictureTexts, samplers: Mapping[str, str]) -> str | None:
    """The infotext for a picture of NovelAI, which writes JSON; None for any other, and for JSON of another form.

    `samplers` are A1111's names of samplers by their aliases.
    """
    if texts.items.get("Software") != "NovelAI":
        return None
    try:
        found: dict[str, Any] = json.loads(texts.items["Comment"])
        sampler = samplers.get(found["sampler"], "Euler a")
        size = f"{texts.size.width}x{texts.size.height}"
        return (
            f"{texts.items['Description']}\nNegative prompt: {found['uc']}\n"
            f"Steps: {found['steps']}, Sampler: {sampler}, CFG scale: {found['scale']}, Seed: {found['seed']}, "
            f"Size: {size}, Clip skip: 2, ENSD: 31337"
        )
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def _user_comment(image: Any) -> str:
    try:
        comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT, b"")
    except Exception:  # a broken EXIF says nothing
        return ""
    if isinstance(comment, str):
        return comment
    return _decode_comment(bytes(comment)).rstrip("\0")


def _decode_comment(comment: bytes) -> str:
    """The text of a UserComment, of which eight bytes name the encoding. A1111 reads one without them as UTF-8."""
    name, text = comment[:8], comment[8:]
    if name == b"UNICODE\0":
        return text.decode("utf-16-be", errors="ignore")  # EXIF does not say which end comes first; A1111 does
    if name in (b"ASCII\0\0\0", b"\0" * 8):
        return text.decode("utf-8", errors="ignore")
    return comment.decode("utf-8", errors="ignore")


def _decoded(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", errors="ignore")

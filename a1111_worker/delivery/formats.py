"""A1111's base64 PNGs in the format that a job wants.

The infotext (prompt, seed, all settings) lies where A1111 itself keeps it and looks for it (1.9.3 and 1.10.1,
modules/images.py, read_info_from_image): in a PNG's text chunk `parameters`, else in EXIF's UserComment, as UTF-16.

Pillow is imported when an image is decoded: what leaves as it came costs nothing.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from a1111_worker.domain import ImageFormat, OutputOptions
from a1111_worker.errors import Complaint, GenerationFailed, InvalidRequest
from a1111_worker.images import SIGNATURE, open_image, png_chunks

DEFAULT_QUALITY = 90


WEBP_METHOD = 2  # of 0 to 6: three times as fast as Pillow's own 4, as small, and 0.1 dB away from it


WEBP_SIDE = 16_383  # pixels: WebP has 14 bits for a side


JPEG_EXIF = 65_533  # bytes: a JPEG's segment has 16 bits for its length, which it counts itself


TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"eXIf")


class Converted(NamedTuple):
    """A picture in base64, and what its caller should be told of it."""

    picture: str
    warning: str = ""


def convert(png: str, options: OutputOptions) -> Converted:
    """The picture as `options` want it; the very same text where nothing is to be done.

    Raises GenerationFailed where it is no picture, InvalidRequest where the format cannot hold it.
    """
    if is_untouched(options):
        return Converted(png)
    try:
        data = base64.b64decode(png)
        if options.format is ImageFormat.PNG:
            return Converted(_in_base64(_without_texts(data)))
        return _encoded(data, options)
    except (OSError, ValueError, SyntaxError, struct.error, zlib.error) as error:  # all that Pillow says of a bad file
        raise GenerationFailed(f"the WebUI sent a picture that cannot be made a {options.format.value}") from error


def is_untouched(options: OutputOptions) -> bool:
    """Whether the options leave A1111's picture byte for byte as it came."""
    return options.format is ImageFormat.PNG and options.metadata


def _encoded(png: bytes, options: OutputOptions) -> Converted:
    with open_image(png) as image:
        infotext = str(image.info.get("parameters", "")) if options.metadata else ""
        is_jpeg = options.format is ImageFormat.JPEG
        if not is_jpeg and max(image.size) > WEBP_SIDE:
            said = f"webp holds {WEBP_SIDE} pixels a side, and the picture has {image.width}×{image.height}"
            raise InvalidRequest([Complaint("output.format", said)], hint="take png or jpeg")
        keeps = ("RGB", "L") if is_jpeg else ("RGB", "RGBA")
        fitting = image if image.mode in keeps else image.convert("RGB")
        exif = _exif(infotext) if infotext else b""
        warning = ""
        if is_jpeg and len(exif) > JPEG_EXIF:
            exif, warning = b"", "the infotext was left out of a picture: it is longer than a JPEG can hold"
        file = io.BytesIO()
        quality = options.quality or DEFAULT_QUALITY
        if is_jpeg:
            fitting.save(file, "JPEG", quality=quality, exif=exif)
        else:
            fitting.save(file, "WEBP", quality=quality, exif=exif, method=WEBP_METHOD)
        return Converted(_in_base64(file.getvalue()), warning)


def _exif(infotext: str) -> bytes:
    """EXIF with a UserComment alone.

    Written by hand: Pillow's own Exif makes it a list of bytes (type 1), which piexif, A1111's reader, hands out as a
    tuple and not as the text (type 7, undefined) that the standard wants.
    """
    comment = b"UNICODE\0" + infotext.encode("utf-16-be", "replace")
    begin = 8  # of the first directory; each is a count, its entries of 12 bytes, and where the next one is
    exif_ifd = begin + 2 + 12 + 4
    text = exif_ifd + 2 + 12 + 4
    pointer = struct.pack(">HHHIII", 1, 0x8769, 4, 1, exif_ifd, 0)
    user_comment = struct.pack(">HHHIII", 1, 0x9286, 7, len(comment), text, 0)
    return b"Exif\0\0" + b"MM\0*" + struct.pack(">I", begin) + pointer + user_comment + comment


def _in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _without_texts(png: bytes) -> bytes:
    """The same pixels without a word: chunks are left out, nothing is encoded anew."""
    view = memoryview(png)
    kept = [view[:SIGNATURE]]
    last = b""
    for last, start, stop in png_chunks(png):
        if stop > len(png):
            break
        if last not in TEXTS:
            kept.append(view[start:stop])
    if last != b"IEND":
        raise ValueError("the file is cut")
    return b"".join(kept)


EXTENSIONS = {ImageFormat.PNG: "png", ImageFormat.JPEG: "jpg", ImageFormat.WEBP: "webp"}


def decode_image(image: str) -> bytes:
    try:
        return base64.b64decode(image)
    except binascii.Error as error:
        raise GenerationFailed("the WebUI sent a picture that is no base64") from error


def job_slug(job_id: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", job_id)[:60] or "job"


def image_file_name(number: int, seeds: Sequence[int], form: ImageFormat) -> str:
    """A picture beyond the seeds (a script's grid) has its number alone."""
    seed = f"-{seeds[number - 1]}" if number <= len(seeds) else ""
    return f"{number}{seed}.{EXTENSIONS[form]}"

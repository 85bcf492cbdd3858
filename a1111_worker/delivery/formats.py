"""A1111's base64 PNGs in the format that a job asks for.

The infotext (prompt, seed, all settings) is stored where A1111 itself stores it and looks for it (1.9.3 and 1.10.1,
modules/images.py, read_info_from_image): in a PNG's text chunk `parameters`, else in EXIF's UserComment, as UTF-16.

Pillow is imported when an image is decoded. An image that does not change is not decoded.
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
from a1111_worker.images import SIGNATURE_BYTES, open_image, png_chunks

DEFAULT_QUALITY = 90
WEBP_METHOD = 2  # of 0 to 6: three times as fast as Pillow's own 4, as small, and 0.1 dB away from it
WEBP_MAX_SIDE = 16_383  # pixels: WebP has 14 bits for a side
JPEG_MAX_EXIF = 65_533  # bytes: a JPEG's segment has 16 bits for its length, which counts those 16 bits too
TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"eXIf")
EXTENSIONS = {ImageFormat.PNG: "png", ImageFormat.JPEG: "jpg", ImageFormat.WEBP: "webp"}


class Converted(NamedTuple):
    """An image in base64, and a warning for the job's caller."""

    image: str
    warning: str = ""


def convert(png: str, options: OutputOptions) -> Converted:
    """The image in the format of `options`; the very same string if nothing changes.

    Raises GenerationFailed if it is not an image, InvalidRequest if the format cannot hold it.
    """
    if is_unchanged(options):
        return Converted(png)
    try:
        data = base64.b64decode(png)
        if options.format is ImageFormat.PNG:
            return Converted(encode_image(_without_text(data)))
        return _encode_as(data, options)
    except (
        OSError,
        ValueError,
        SyntaxError,
        struct.error,
        zlib.error,
    ) as error:  # Pillow's, of bad files
        raise GenerationFailed(
            f"the WebUI sent a picture that cannot be converted to {options.format.value}"
        ) from error


def is_unchanged(options: OutputOptions) -> bool:
    """Whether the options leave A1111's image byte for byte as it came."""
    return options.format is ImageFormat.PNG and options.metadata


def encode_image(data: bytes) -> str:
    """A file's bytes in base64."""
    return base64.b64encode(data).decode("ascii")


def decode_image(image: str) -> bytes:
    """The file that base64 stands for. Raises GenerationFailed if it is not base64."""
    try:
        return base64.b64decode(image)
    except binascii.Error as error:
        raise GenerationFailed("the WebUI sent a picture that is no base64") from error


def job_slug(job_id: str) -> str:
    """A job's id as a part of a file name: letters, digits, `_` and `-`, at most 60 of them, never empty."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", job_id)[:60] or "job"


def image_file_name(number: int, seeds: Sequence[int | None], image_format: ImageFormat) -> str:
    """`<number>-<seed>.<extension>`. An image without a seed (a script's grid) has its number alone."""
    seed = f"-{seeds[number - 1]}" if number <= len(seeds) and seeds[number - 1] is not None else ""
    return f"{number}{seed}.{EXTENSIONS[image_format]}"


def _encode_as(png: bytes, options: OutputOptions) -> Converted:
    """A PNG as a JPEG or WebP."""
    with open_image(png) as image:
        infotext = str(image.info.get("parameters", "")) if options.metadata else ""
        is_jpeg = options.format is ImageFormat.JPEG
        if not is_jpeg and max(image.size) > WEBP_MAX_SIDE:
            message = f"webp holds {WEBP_MAX_SIDE} pixels a side, and the picture has {image.width}×{image.height}"
            raise InvalidRequest([Complaint("output.format", message)], hint="take png or jpeg")
        modes = ("RGB", "L") if is_jpeg else ("RGB", "RGBA")
        pixels = image if image.mode in modes else image.convert("RGB")
        exif = _build_exif(infotext) if infotext else b""
        warning = ""
        if is_jpeg and len(exif) > JPEG_MAX_EXIF:
            exif, warning = b"", "the infotext was left out of a picture: it is longer than a JPEG can hold"
        file = io.BytesIO()
        quality = options.quality or DEFAULT_QUALITY
        if is_jpeg:
            pixels.save(file, "JPEG", quality=quality, exif=exif)
        else:
            pixels.save(file, "WEBP", quality=quality, exif=exif, method=WEBP_METHOD)
        return Converted(encode_image(file.getvalue()), warning)


def _build_exif(infotext: str) -> bytes:
    """EXIF with a UserComment alone.

    Built by hand: Pillow's own Exif makes the comment a list of bytes (type 1). piexif, which A1111 reads with, returns
    that as a tuple. The standard's type for it is 7 (undefined), which piexif returns as the text.
    """
    comment = b"UNICODE\0" + infotext.encode("utf-16-be", "replace")
    directory_at = 8  # each directory is a count, its entries of 12 bytes, and where the next directory is
    exif_directory_at = directory_at + 2 + 12 + 4
    comment_at = exif_directory_at + 2 + 12 + 4
    directory = struct.pack(">HHHIII", 1, 0x8769, 4, 1, exif_directory_at, 0)
    exif_directory = struct.pack(">HHHIII", 1, 0x9286, 7, len(comment), comment_at, 0)
    return b"Exif\0\0" + b"MM\0*" + struct.pack(">I", directory_at) + directory + exif_directory + comment


def _without_text(png: bytes) -> bytes:
    """The same pixels without any text. Chunks are left out, and nothing is encoded again."""
    view = memoryview(png)
    kept = [view[:SIGNATURE_BYTES]]
    kind = b""
    for kind, start, stop in png_chunks(png):
        if stop > len(png):
            break
        if kind not in TEXT_CHUNKS:
            kept.append(view[start:stop])
    if kind != b"IEND":
        raise ValueError("the file is cut")
    return b"".join(kept)

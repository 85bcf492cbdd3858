"""Images for tests, as A1111's API sends them, and their infotext as A1111 reads it."""

from __future__ import annotations

import base64
import io
import struct
from typing import Any

from PIL import Image, PngImagePlugin

INFOTEXT = "a lighthouse, café, 猫 😀\nNegative prompt: blurry\nSteps: 25, Sampler: Euler a, Seed: 42"


def to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def a1111_png(image: Image.Image, infotext: str | None = INFOTEXT) -> str:
    """An image as A1111's API sends it. A script's grid has no infotext."""
    about = PngImagePlugin.PngInfo()
    if infotext is not None:
        about.add_text("parameters", infotext)
    return to_base64(png_bytes(image, pnginfo=about))


def png_bytes(image: Image.Image, **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **how)
    return file.getvalue()


def open_base64(image: str) -> Image.Image:
    opened = Image.open(io.BytesIO(base64.b64decode(image)))
    opened.load()
    return opened


def gradient(mode: str = "RGB") -> Image.Image:
    return Image.linear_gradient("L").resize((96, 64)).convert(mode)


def infotext_of(image: str) -> str | None:
    """What A1111 reads from an image (1.10.1, modules/images.py, read_info_from_image): `parameters`, else EXIF's
    UserComment as piexif reads it. piexif returns it as text only if its type is 7 (undefined)."""
    info = open_base64(image).info
    if "parameters" in info:
        return str(info["parameters"])
    if "exif" not in info:
        return None
    exif = bytes(info["exif"]).removeprefix(b"Exif\0\0")
    assert exif[:4] == b"MM\0*"
    (first,) = struct.unpack_from(">I", exif, 4)
    (pointer,) = struct.unpack_from(">I", exif, _exif_entry(exif, first, 0x8769)[1])
    kind, at, count = _exif_entry(exif, pointer, 0x9286)
    assert kind == 7, "piexif takes no other type for text"
    (offset,) = struct.unpack_from(">I", exif, at)
    comment = exif[offset : offset + count]
    assert comment.startswith(b"UNICODE\0") and len(comment) == count
    return comment[8:].decode("utf-16-be")


def _exif_entry(exif: bytes, ifd: int, tag: int) -> tuple[int, int, int]:
    """Type, position of the value, and count of an entry."""
    (entries,) = struct.unpack_from(">H", exif, ifd)
    for number in range(entries):
        at = ifd + 2 + 12 * number
        found, kind, count = struct.unpack_from(">HHI", exif, at)
        if found == tag:
            return kind, at + 8, count
    raise AssertionError(f"no {tag:#x}")


BROKEN = [
    to_base64(b"\x89PNG\r\n\x1a\n and so on"),  # no chunk
    to_base64(png_bytes(gradient()))[:-200],  # cut
    to_base64(png_bytes(gradient()))[:120],  # cut early
    "iVBORw0KGgo",  # its padding is wrong
]

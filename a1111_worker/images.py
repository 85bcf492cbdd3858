"""Pictures: A1111's base64 PNGs as a job wants them, and whether one shows anything at all.

The infotext (prompt, seed, all settings) lies where A1111 itself keeps it and looks for it (1.9.3 and 1.10.1,
modules/images.py, read_info_from_image): in a PNG's text chunk `parameters`, else in EXIF's UserComment, as UTF-16.

Pillow is imported where a picture is really decoded: what leaves as it came costs nothing.
"""

from __future__ import annotations

import base64
import binascii
import io
import struct
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from a1111_worker.domain import ImageFormat

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

SIGNATURE = 8  # bytes before a PNG's first chunk
A_LOOK = 1 << 16  # characters of base64: enough to see that nearly every picture shows something

_BEGINNINGS = {"iVBORw0KGgo": ImageFormat.PNG, "/9j/": ImageFormat.JPEG, "UklGR": ImageFormat.WEBP}


def format_of(picture: str) -> ImageFormat:
    """What a picture in base64 is, by its first bytes."""
    return next((one for start, one in _BEGINNINGS.items() if picture.startswith(start)), ImageFormat.PNG)


def is_blank(png: str) -> bool:
    """Whether a PNG in base64 is entirely one colour. What cannot be read is not known to be.

    It is decoded no further than to the first row that differs: most pictures cost no more than their first one.
    """
    try:
        shape = _shape(base64.b64decode(png[:64]))
        if not shape.channels:
            return _has_one_value(base64.b64decode(png))
        for characters in (A_LOOK, len(png)):
            verdict = _is_one_colour(base64.b64decode(png[:characters]), shape)
            if verdict is not None:
                return verdict
    except (binascii.Error, struct.error, zlib.error, OSError, ValueError, SyntaxError):
        pass
    return False


# -- other formats ----------------------------------------------------------------------------------------------------


def open_image(png: bytes) -> ImageFile:
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # a script's grid may be large, and it is our own WebUI's
    return Image.open(io.BytesIO(png))


# -- PNG's chunks and rows ------------------------------------------------------------------------------------------


def png_chunks(png: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, beginning and end of each chunk; the last one's end may lie beyond a file that is cut."""
    start = SIGNATURE
    while start + 8 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, start)
        stop = start + 12 + length  # the length itself, the kind, the checksum
        yield kind, start, stop
        start = stop


class _Shape(NamedTuple):
    """The head of a PNG."""

    width: int
    height: int
    depth: int
    colour: int
    interlace: int

    @property
    def channels(self) -> int:
        """Bytes of a pixel: grey, RGB, and both with alpha; 0 for what A1111 does not write."""
        return {0: 1, 2: 3, 4: 2, 6: 4}.get(self.colour, 0) if self.depth == 8 and not self.interlace else 0


def _shape(png: bytes) -> _Shape:
    width, height, depth, colour, _, _, interlace = struct.unpack_from(">IIBBBBB", png, SIGNATURE + 8)
    return _Shape(width, height, depth, colour, interlace)


def _is_one_colour(png: bytes, shape: _Shape) -> bool | None:
    """Whether all rows are the first pixel's colour; None where the bytes end before that can be told.

    Rows are compared as they are stored, filters and all (PNG 1.2, section 6): a row of one colour below another one
    has a single form in each of the five filters.
    """
    expected: tuple[bytes, ...] = ()
    length, left, rows = 1 + shape.width * shape.channels, shape.height, b""
    inflate = zlib.decompressobj()
    for piece in _compressed(png):
        rows += inflate.decompress(piece)
        start = 0
        while left and start + length <= len(rows):
            if not expected:
                pixel = rows[1 : 1 + shape.channels]
                if rows[:length] not in _forms(pixel, shape.width, is_first=True):
                    return False
                expected = _forms(pixel, shape.width, is_first=False)
            elif rows[start] >= len(expected) or rows[start : start + length] != expected[rows[start]]:
                return False
            start, left = start + length, left - 1
        if not left:
            return True
        rows = rows[start:]
    return None


def _forms(pixel: bytes, width: int, *, is_first: bool) -> tuple[bytes, ...]:
    """A row of one colour in each filter: none, sub, up, average, Paeth. Above the first row there is nothing."""
    plain, nothing = pixel * width, bytes(len(pixel) * width)
    after_first = bytes(len(pixel) * (width - 1))
    half = bytes(value - value // 2 for value in pixel)
    if is_first:
        average, up, paeth = pixel + half * (width - 1), plain, pixel + after_first
    else:
        average, up, paeth = half + after_first, nothing, nothing
    forms = (plain, pixel + after_first, up, average, paeth)
    return tuple(bytes([number]) + form for number, form in enumerate(forms))


def _compressed(png: bytes, step: int = 4096) -> Iterator[bytes]:
    """The pixels' data, a little at a time: one colour inflates a thousandfold."""
    for kind, start, stop in png_chunks(png):
        if kind == b"IDAT":
            body = png[start + 8 : stop - 4]
            yield from (body[at : at + step] for at in range(0, len(body), step))


def _has_one_value(png: bytes) -> bool:
    """The same by Pillow, for a PNG of another kind."""
    with open_image(png) as image:
        colours = image if image.mode.startswith("I") else image.convert("RGBA")
        extrema = colours.getextrema()
    pairs = extrema if isinstance(extrema[0], tuple) else (extrema,)
    return all(low == high for low, high in pairs)

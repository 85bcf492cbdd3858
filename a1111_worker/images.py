"""Images in base64, as A1111's API sends them: an image's format, its size, its text, and whether it is all one colour.

Pillow is imported when it is needed to decode an image.
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

SIGNATURE_BYTES = 8  # before a PNG's first chunk
FIRST_CHARACTERS = 1 << 16  # of the base64: nearly every image has a second colour in this much of it
PREVIEW_QUALITY = 75  # of 100: it is looked at for five seconds
INFLATE_STEP = 4096  # bytes: deflated data of one colour inflates a thousandfold

_BASE64_PREFIXES = {"iVBORw0KGgo": ImageFormat.PNG, "/9j/": ImageFormat.JPEG, "UklGR": ImageFormat.WEBP}


def detect_format(image: str) -> ImageFormat:
    """The format of an image in base64, by its first bytes; PNG if it is unknown."""
    return next((known for prefix, known in _BASE64_PREFIXES.items() if image.startswith(prefix)), ImageFormat.PNG)


def is_blank(png: str) -> bool:
    """Whether a PNG in base64 is entirely one colour. False if it cannot be read.

    It is decoded no further than to the first row that differs. For most images that is the first row.
    """
    try:
        header = _read_header(base64.b64decode(png[:64]))
        if not header.pixel_bytes:
            return _has_one_value(base64.b64decode(png))
        for characters in (FIRST_CHARACTERS, len(png)):
            is_uniform = _compare_rows(base64.b64decode(png[:characters]), header)
            if is_uniform is not None:
                return is_uniform
    except (binascii.Error, struct.error, zlib.error, OSError, ValueError, SyntaxError):
        pass
    return False


def read_size(png: str) -> tuple[int, int]:
    """Width and height of a PNG in base64, in pixels. Raises ValueError if it has none."""
    try:
        header = _read_header(base64.b64decode(png[:64]))
    except struct.error as error:
        raise ValueError("a PNG begins with its size") from error
    return header.width, header.height


def read_infotext(png: str) -> str | None:
    """The text that A1111 writes into a PNG, under the keyword `parameters`; None if there is none (a script's grid).

    Pillow writes it as tEXt if it is Latin-1, else as iTXt (PNG 1.2, section 4.2.3), and before the pixels. Raises
    ValueError if the image is no base64.
    """
    for characters in (FIRST_CHARACTERS, len(png)):
        data = base64.b64decode(png[:characters])
        for kind, start, stop in png_chunks(data):
            if kind == b"IDAT":
                return None
            if stop > len(data):
                break  # it goes on where this piece ends
            keyword, _, body = data[start + 8 : stop - 4].partition(b"\0")
            if keyword == b"parameters" and kind == b"tEXt":
                return body.decode("latin-1")
            if keyword == b"parameters" and kind == b"iTXt":
                # Whether it is compressed (A1111's never is), two bytes; a language; the keyword's translation.
                return body[2:].split(b"\0", 2)[2].decode("utf-8", "replace")
    return None


def make_preview(image: str, limit: int) -> str | None:
    """An image in base64 as a JPEG of at most `limit` bytes, made smaller until it fits; None if it cannot be read."""
    try:
        with open_image(base64.b64decode(image)) as opened:
            picture = opened.convert("RGB")
        while True:
            jpeg = io.BytesIO()
            picture.save(jpeg, "JPEG", quality=PREVIEW_QUALITY)
            if jpeg.tell() <= limit:
                return base64.b64encode(jpeg.getvalue()).decode("ascii")
            picture.thumbnail((picture.width // 2, picture.height // 2))
    except (OSError, ValueError, SyntaxError):  # Pillow's, of bad files
        return None


def open_image(png: bytes) -> ImageFile:
    """A file as Pillow opens it. Raises what Pillow raises."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # a script's grid may be large, and it comes from our own WebUI
    return Image.open(io.BytesIO(png))


# -- PNG's chunks and rows ------------------------------------------------------------------------------------------


def png_chunks(png: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Type, start and end of each chunk. In a file that is cut, the last one's end lies beyond the file."""
    start = SIGNATURE_BYTES
    while start + 8 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, start)
        stop = start + 12 + length  # the length itself, the type, the checksum
        yield kind, start, stop
        start = stop


class _Header(NamedTuple):
    """A PNG's IHDR chunk."""

    width: int
    height: int
    depth: int
    colour_type: int
    interlace: int

    @property
    def pixel_bytes(self) -> int:
        """Bytes of a pixel: grey, RGB, and both with alpha; 0 for what A1111 does not write."""
        return {0: 1, 2: 3, 4: 2, 6: 4}.get(self.colour_type, 0) if self.depth == 8 and not self.interlace else 0


def _read_header(png: bytes) -> _Header:
    fields = struct.unpack_from(">IIBBBBB", png, SIGNATURE_BYTES + 8)
    width, height, depth, colour_type, _, _, interlace = fields
    return _Header(width, height, depth, colour_type, interlace)


def _compare_rows(png: bytes, header: _Header) -> bool | None:
    """Whether all rows have the first pixel's colour; None if the bytes end before that is known.

    Rows are compared as they are stored, with their filters (PNG 1.2, section 6): a row of one colour below another row
    of that colour has exactly one form in each of the five filters.
    """
    expected: tuple[bytes, ...] = ()
    length, left, rows = 1 + header.width * header.pixel_bytes, header.height, b""
    inflate = zlib.decompressobj()
    for piece in _deflated_pieces(png):
        rows += inflate.decompress(piece)
        start = 0
        while left and start + length <= len(rows):
            if not expected:
                pixel = rows[1 : 1 + header.pixel_bytes]
                if rows[:length] not in _filtered_rows(pixel, header.width, is_first=True):
                    return False
                expected = _filtered_rows(pixel, header.width, is_first=False)
            elif rows[start] >= len(expected) or rows[start : start + length] != expected[rows[start]]:
                return False
            start, left = start + length, left - 1
        if not left:
            return True
        rows = rows[start:]
    return None


def _filtered_rows(pixel: bytes, width: int, *, is_first: bool) -> tuple[bytes, ...]:
    """A row of one colour in each filter: none, sub, up, average, Paeth. Zeros count as the row above the first one."""
    plain, zeros = pixel * width, bytes(len(pixel) * width)
    zeros_after_first = bytes(len(pixel) * (width - 1))
    half = bytes(value - value // 2 for value in pixel)
    if is_first:
        average, up, paeth = pixel + half * (width - 1), plain, pixel + zeros_after_first
    else:
        average, up, paeth = half + zeros_after_first, zeros, zeros
    rows = (plain, pixel + zeros_after_first, up, average, paeth)
    return tuple(bytes([number]) + row for number, row in enumerate(rows))


def _deflated_pieces(png: bytes) -> Iterator[bytes]:
    """The compressed pixels, a few bytes at a time."""
    for kind, start, stop in png_chunks(png):
        if kind == b"IDAT":
            body = png[start + 8 : stop - 4]
            yield from (body[at : at + INFLATE_STEP] for at in range(0, len(body), INFLATE_STEP))


def _has_one_value(png: bytes) -> bool:
    """Whether a PNG of another kind is one colour, by Pillow."""
    with open_image(png) as image:
        colours = image if image.mode.startswith("I") else image.convert("RGBA")
        extrema = colours.getextrema()
    pairs = extrema if isinstance(extrema[0], tuple) else (extrema,)
    return all(low == high for low, high in pairs)

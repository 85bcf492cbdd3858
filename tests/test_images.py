"""Which format an image has, and whether it is all one colour."""

from __future__ import annotations

import base64
import contextlib
import io
import struct
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from a1111_worker.delivery.formats import convert
from a1111_worker.domain import ImageFormat, OutputOptions
from a1111_worker.images import detect_format, is_blank, make_preview, read_infotext, read_size
from tests.images import BROKEN, INFOTEXT, a1111_png, gradient, png_bytes, to_base64


@pytest.mark.parametrize("image_format", ImageFormat)
def test_the_format_of_an_image_is_known_from_its_first_bytes(image_format: ImageFormat) -> None:
    image = convert(a1111_png(gradient()), OutputOptions(image_format)).image

    assert detect_format(image) is image_format


# -- its size and its text ------------------------------------------------------------------------------------------

TEXTS = ["a cat\nSteps: 2, Seed: 5", INFOTEXT, "", "x" * 100_000, "猫" * 100_000]  # Latin-1 or not, long or not


@pytest.mark.parametrize("text", TEXTS)
def test_the_text_in_an_image_is_read_back(text: str) -> None:
    assert read_infotext(a1111_png(gradient(), text)) == text


def test_an_image_without_a_text_or_with_another_has_none() -> None:
    other = PngImagePlugin.PngInfo()
    other.add_text("workflow", "{}")

    assert read_infotext(a1111_png(gradient(), None)) is None
    assert read_infotext(to_base64(png_bytes(gradient(), pnginfo=other))) is None


def test_the_size_of_an_image_is_read() -> None:
    assert read_size(a1111_png(gradient())) == (96, 64)


@pytest.mark.parametrize("image", BROKEN)
def test_a_broken_image_has_no_text_or_is_an_error(image: str) -> None:
    with contextlib.suppress(ValueError):
        assert read_infotext(image) in (None, INFOTEXT)


@pytest.mark.parametrize("image", ["", "iVBORw0KGgo", "iVBORw0KGgoAAAA="])
def test_an_image_without_a_header_is_an_error(image: str) -> None:
    with pytest.raises(ValueError, match=r"begins with its size|padding"):
        read_size(image)


# -- one colour -------------------------------------------------------------------------------------------------------


def painted(image: Image.Image, at: tuple[int, int]) -> Image.Image:
    """The same image with one pixel that is a little different."""
    image = image.copy()
    pixel = image.getpixel(at)
    assert pixel is not None
    image.putpixel(at, (*pixel[:-1], pixel[-1] ^ 1) if isinstance(pixel, tuple) else int(pixel) ^ 1)
    return image


COLOURS: list[tuple[str, Any]] = [
    ("RGB", "black"),  # what a model that computes NaN paints
    ("RGB", "white"),
    ("RGB", (3, 200, 117)),
    ("RGBA", (255, 255, 255, 7)),
    ("L", 129),
    ("LA", (129, 3)),
    ("P", 5),  # by Pillow, from here on
    ("1", 1),
    ("I;16", 40_000),
]


@pytest.mark.parametrize(("mode", "colour"), COLOURS)
@pytest.mark.parametrize("size", [(1, 1), (200, 1), (1, 200), (64, 64), (640, 640)])
def test_one_colour_is_blank_and_one_other_pixel_is_not(mode: str, colour: Any, size: tuple[int, int]) -> None:
    blank = Image.new(mode, size, colour)
    if mode == "P":
        blank.putpalette(bytes(range(256)) * 3)
    width, height = size

    assert is_blank(to_base64(png_bytes(blank))) is True
    if width * height > 1:
        for at in ((0, 0), (width - 1, height - 1), (width // 2, height // 2), (width - 1, 0), (0, height - 1)):
            assert is_blank(to_base64(png_bytes(painted(blank, at)))) is False, at


def test_a_blank_image_with_a_long_infotext_is_blank() -> None:
    assert is_blank(a1111_png(Image.new("RGB", (512, 512)), INFOTEXT + "x" * 100_000)) is True


def test_an_image_that_begins_blank_is_read_to_its_end() -> None:
    image = Image.effect_noise((256, 512), 90).convert("RGB")
    image.paste((7, 7, 7), (0, 0, 256, 511))

    assert is_blank(to_base64(png_bytes(image, compress_level=0))) is False
    assert is_blank(to_base64(png_bytes(Image.new("RGB", (256, 512), "red"), compress_level=0))) is True


@pytest.mark.parametrize("png", [*BROKEN, "", "====", "A" * 100_000])
def test_an_image_that_cannot_be_read_is_not_called_blank(png: str) -> None:
    assert is_blank(png) is False


def test_an_image_that_is_cut_is_not_called_blank() -> None:
    png = png_bytes(Image.new("RGB", (300, 300), "red"), compress_level=0)

    assert is_blank(to_base64(png[: len(png) // 2])) is False


def filtered(rows: list[bytes], filters: list[int], pixel: int) -> bytes:
    """A PNG written by the book (PNG 1.2, section 6), each row in the filter it is given."""
    out = bytearray()
    above = bytes(len(rows[0]))
    for row, kind in zip(rows, filters, strict=True):
        out.append(kind)
        for at, value in enumerate(row):
            left = row[at - pixel] if at >= pixel else 0
            corner = above[at - pixel] if at >= pixel else 0
            estimate = left + above[at] - corner
            paeth = min((left, above[at], corner), key=lambda one: abs(estimate - one))
            out.append((value - (0, left, above[at], (left + above[at]) // 2, paeth)[kind]) % 256)
        above = row
    head = struct.pack(">IIBBBBB", len(rows[0]) // pixel, len(rows), 8, 2 if pixel == 3 else 6, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(out))), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), pixel=st.sampled_from([3, 4]), width=st.integers(1, 5), height=st.integers(1, 5))
def test_blank_is_what_pillow_sees_whatever_the_filters(
    data: st.DataObject, pixel: int, width: int, height: int
) -> None:
    colour = data.draw(st.binary(min_size=pixel, max_size=pixel))
    rows = [bytearray(colour * width) for _ in range(height)]
    if data.draw(st.booleans()):
        row, at = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width * pixel - 1))
        rows[row][at] ^= data.draw(st.integers(0, 255))
    filters = data.draw(st.lists(st.integers(0, 4), min_size=height, max_size=height))
    png = filtered([bytes(row) for row in rows], filters, pixel)

    seen = Image.open(io.BytesIO(png)).tobytes()
    assert seen == b"".join(rows)
    assert is_blank(to_base64(png)) is (seen == colour * (width * height) or seen == seen[:pixel] * (width * height))


# -- previews -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "limit"), [((128, 128), 64_000), ((1024, 1024), 64_000), ((64, 64), 900)])
def test_a_preview_is_a_jpeg_that_fits(size: tuple[int, int], limit: int) -> None:
    noise = Image.effect_noise(size, 100).convert("RGBA")  # the worst case for a JPEG

    preview = make_preview(to_base64(png_bytes(noise)), limit)

    assert preview is not None
    jpeg = base64.b64decode(preview)
    assert len(jpeg) <= limit
    with Image.open(io.BytesIO(jpeg)) as picture:
        assert picture.format == "JPEG"
        assert (picture.size == size) is (size == (128, 128))
        assert picture.width == picture.height


@pytest.mark.parametrize("image", ["", "not base64!", to_base64(b"\x89PNG\r\n\x1a\n"), to_base64(b"text")])
def test_what_cannot_be_read_is_no_preview(image: str) -> None:
    assert make_preview(image, 64_000) is None

"""Pictures in other formats, with and without their infotext, and pictures that show nothing."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from a1111_worker.delivery.formats import convert, is_untouched
from a1111_worker.domain import ImageFormat, OutputOptions
from a1111_worker.errors import GenerationFailed, InvalidRequest
from a1111_worker.images import format_of, is_blank

JPEG, WEBP, PNG = ImageFormat.JPEG, ImageFormat.WEBP, ImageFormat.PNG
INFOTEXT = "a lighthouse, café, 猫 😀\nNegative prompt: blurry\nSteps: 25, Sampler: Euler a, Seed: 42"


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def a1111s(image: Image.Image, infotext: str = INFOTEXT) -> str:
    """A picture as A1111's API sends it."""
    about = PngImagePlugin.PngInfo()
    about.add_text("parameters", infotext)
    return in_base64(saved(image, pnginfo=about))


def saved(image: Image.Image, **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **how)
    return file.getvalue()


def opened(picture: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(picture)))
    image.load()
    return image


def gradient(mode: str = "RGB") -> Image.Image:
    return Image.linear_gradient("L").resize((96, 64)).convert(mode)


def infotext_of(picture: str) -> str | None:
    """What A1111 reads from a picture (1.10.1, modules/images.py, read_info_from_image): `parameters`, else EXIF's
    UserComment as piexif reads it, which takes text for text only where its type says so."""
    image = opened(picture)
    if "parameters" in image.info:
        return str(image.info["parameters"])
    if "exif" not in image.info:
        return None
    exif = bytes(image.info["exif"]).removeprefix(b"Exif\0\0")
    assert exif[:4] == b"MM\0*"
    (first,) = struct.unpack_from(">I", exif, 4)
    (pointer,) = struct.unpack_from(">I", exif, entry_of(exif, first, 0x8769)[1])
    kind, at, count = entry_of(exif, pointer, 0x9286)
    assert kind == 7, "undefined: anything else is no text to piexif"
    (offset,) = struct.unpack_from(">I", exif, at)
    comment = exif[offset : offset + count]
    assert comment.startswith(b"UNICODE\0") and len(comment) == count
    return comment[8:].decode("utf-16-be")


def entry_of(exif: bytes, ifd: int, tag: int) -> tuple[int, int, int]:
    """Type, where the value is, and count."""
    (entries,) = struct.unpack_from(">H", exif, ifd)
    for number in range(entries):
        at = ifd + 2 + 12 * number
        found, kind, count = struct.unpack_from(">HHI", exif, at)
        if found == tag:
            return kind, at + 8, count
    raise AssertionError(f"no {tag:#x}")


# -- conversion -------------------------------------------------------------------------------------------------------


def test_a_png_that_nobody_wants_otherwise_is_the_very_same_text() -> None:
    png = a1111s(gradient())

    converted = convert(png, OutputOptions())

    assert converted.picture is png and converted.warning == ""
    assert is_untouched(OutputOptions(quality=50, raw=True))


@pytest.mark.parametrize("form", [JPEG, WEBP])
@pytest.mark.parametrize("infotext", [INFOTEXT, "plain words"])
def test_a_converted_picture_keeps_its_infotext_where_a1111_reads_it(form: ImageFormat, infotext: str) -> None:
    converted = convert(a1111s(gradient(), infotext), OutputOptions(form))

    image = opened(converted.picture)
    assert (image.format, image.size, image.mode) == (form.name, (96, 64), "RGB")
    assert infotext_of(converted.picture) == infotext


@pytest.mark.slow  # 180 million pixels
def test_a_picture_larger_than_pillow_likes_is_converted() -> None:
    side = 13_500

    converted = convert(a1111s(Image.new("L", (side, side), 7)), OutputOptions(JPEG))

    assert (side).to_bytes(2, "big") * 2 in base64.b64decode(converted.picture)[:1000]  # its frame's height and width


@pytest.mark.parametrize("form", [JPEG, WEBP])
def test_without_metadata_a_converted_picture_says_nothing(form: ImageFormat) -> None:
    picture = convert(a1111s(gradient()), OutputOptions(form, metadata=False)).picture

    assert infotext_of(picture) is None
    assert b"lighthouse" not in base64.b64decode(picture)
    assert "lighthouse".encode("utf-16-be") not in base64.b64decode(picture)


def test_without_metadata_a_png_has_the_same_pixels_and_no_words() -> None:
    image = gradient()
    about = PngImagePlugin.PngInfo()
    about.add_text("parameters", "a lighthouse")  # tEXt
    about.add_itxt("postprocessing", "a lighthouse 猫")  # iTXt
    about.add_text("more", "a lighthouse " * 20, zip=True)  # zTXt
    exif = Image.Exif()
    exif[0x010E] = "a lighthouse"
    png = saved(image, pnginfo=about, exif=exif)

    stripped = base64.b64decode(convert(in_base64(png), OutputOptions(metadata=False)).picture)

    assert stripped == saved(image)  # chunk for chunk what was never there
    assert Image.open(io.BytesIO(stripped)).tobytes() == image.tobytes()


def test_a_png_without_words_stays_as_it_is() -> None:
    png = in_base64(saved(gradient()))

    assert convert(png, OutputOptions(metadata=False)).picture == png


@pytest.mark.parametrize("form", [JPEG, WEBP])
def test_a_picture_without_an_infotext_gets_none(form: ImageFormat) -> None:
    assert infotext_of(convert(in_base64(saved(gradient())), OutputOptions(form)).picture) is None


@pytest.mark.parametrize("form", [JPEG, WEBP])
def test_the_quality_is_the_jobs_else_90(form: ImageFormat) -> None:
    png = a1111s(Image.effect_noise((128, 128), 80).convert("RGB"))

    sizes = {quality: len(convert(png, OutputOptions(form, quality)).picture) for quality in (1, 50, 89, 90, 91, 100)}

    assert list(sizes.values()) == sorted(sizes.values()) and len(set(sizes.values())) == len(sizes)
    assert len(convert(png, OutputOptions(form)).picture) == sizes[90]


@pytest.mark.parametrize(("form", "quality"), [(JPEG, 90), (WEBP, 90)])
def test_a_converted_picture_looks_the_same(form: ImageFormat, quality: int) -> None:
    image = gradient()

    seen = opened(convert(a1111s(image), OutputOptions(form, quality)).picture)

    differences = [abs(a - b) for a, b in zip(seen.tobytes(), image.tobytes(), strict=True)]
    assert max(differences) <= 12


# mode of the PNG, mode of the JPEG, mode of the WebP
MODES = [
    ("RGBA", "RGB", "RGBA"),  # JPEG has no transparency
    ("L", "L", "RGB"),
    ("LA", "RGB", "RGB"),
    ("P", "RGB", "RGB"),
    ("1", "RGB", "RGB"),
]


@pytest.mark.parametrize(("mode", "jpeg", "webp"), MODES)
def test_pictures_of_every_kind_can_be_converted(mode: str, jpeg: str, webp: str) -> None:
    image = gradient(mode)
    if mode == "RGBA":
        image.putalpha(128)
    png = a1111s(image)

    assert opened(convert(png, OutputOptions(JPEG)).picture).mode == jpeg
    assert opened(convert(png, OutputOptions(WEBP)).picture).mode == webp


def test_an_infotext_too_long_for_a_jpeg_is_left_out_with_a_word() -> None:
    png = a1111s(gradient(), "x" * 40_000)

    in_jpeg, in_webp = convert(png, OutputOptions(JPEG)), convert(png, OutputOptions(WEBP))

    assert infotext_of(in_jpeg.picture) is None and "longer than a JPEG can hold" in in_jpeg.warning
    assert infotext_of(in_webp.picture) == "x" * 40_000 and in_webp.warning == ""


def test_the_longest_infotext_that_a_jpeg_holds_is_kept() -> None:
    longest = (65_533 - 50 - 8) // 2

    assert infotext_of(convert(a1111s(gradient(), "x" * longest), OutputOptions(JPEG)).picture) == "x" * longest
    assert convert(a1111s(gradient(), "x" * (longest + 1)), OutputOptions(JPEG)).warning


def test_a_picture_too_long_for_webp_is_the_callers_error_that_names_the_way_out() -> None:
    png = in_base64(saved(Image.new("RGB", (16_384, 8))))

    with pytest.raises(InvalidRequest, match=r"output\.format: webp holds 16383 pixels a side") as caught:
        convert(png, OutputOptions(WEBP))

    assert caught.value.hint == "take png or jpeg"
    assert opened(convert(png, OutputOptions(JPEG)).picture).width == 16_384


BROKEN = [
    in_base64(b"\x89PNG\r\n\x1a\n and so on"),  # no chunk
    in_base64(saved(gradient()))[:-200],  # cut
    in_base64(saved(gradient()))[:120],  # cut early
    "iVBORw0KGgo",  # its padding is wrong
]


@pytest.mark.parametrize("png", BROKEN)
@pytest.mark.parametrize("options", [OutputOptions(JPEG), OutputOptions(WEBP), OutputOptions(metadata=False)])
def test_what_is_no_picture_is_the_generations_failure(png: str, options: OutputOptions) -> None:
    with pytest.raises(GenerationFailed, match="cannot be made a"):
        convert(png, options)


def test_a_picture_is_known_by_its_first_bytes() -> None:
    png = a1111s(gradient())

    assert [format_of(convert(png, OutputOptions(form)).picture) for form in (PNG, JPEG, WEBP)] == [PNG, JPEG, WEBP]


# -- blank ones -------------------------------------------------------------------------------------------------------


def painted(image: Image.Image, at: tuple[int, int]) -> Image.Image:
    """The same picture with one pixel that is a little different."""
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

    assert is_blank(in_base64(saved(blank))) is True
    if width * height > 1:
        for at in ((0, 0), (width - 1, height - 1), (width // 2, height // 2), (width - 1, 0), (0, height - 1)):
            assert is_blank(in_base64(saved(painted(blank, at)))) is False, at


def test_a_blank_picture_with_a_long_infotext_is_blank_all_the_same() -> None:
    assert is_blank(a1111s(Image.new("RGB", (512, 512)), INFOTEXT + "x" * 100_000)) is True


def test_a_picture_that_begins_blank_is_read_to_its_end() -> None:
    image = Image.effect_noise((256, 512), 90).convert("RGB")
    image.paste((7, 7, 7), (0, 0, 256, 511))

    assert is_blank(in_base64(saved(image, compress_level=0))) is False
    assert is_blank(in_base64(saved(Image.new("RGB", (256, 512), "red"), compress_level=0))) is True


@pytest.mark.parametrize("png", [*BROKEN, "", "====", "A" * 100_000])
def test_what_cannot_be_read_is_not_known_to_be_blank(png: str) -> None:
    assert is_blank(png) is False


def test_a_cut_picture_is_not_known_to_be_blank() -> None:
    png = saved(Image.new("RGB", (300, 300), "red"), compress_level=0)

    assert is_blank(in_base64(png[: len(png) // 2])) is False


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
    assert is_blank(in_base64(png)) is (seen == colour * (width * height) or seen == seen[:pixel] * (width * height))

"""Images in other formats, with and without their infotext."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image, PngImagePlugin

from a1111_worker.delivery.formats import convert, image_file_name, is_unchanged
from a1111_worker.domain import ImageFormat, OutputOptions
from a1111_worker.errors import GenerationFailed, InvalidRequest
from tests.images import BROKEN, INFOTEXT, a1111_png, gradient, infotext_of, open_base64, png_bytes, to_base64

JPEG, WEBP = ImageFormat.JPEG, ImageFormat.WEBP


def test_a_png_that_is_not_converted_is_the_very_same_string() -> None:
    png = a1111_png(gradient())

    converted = convert(png, OutputOptions())

    assert converted.image is png and converted.warning == ""
    assert is_unchanged(OutputOptions(quality=50, raw=True))


@pytest.mark.parametrize("image_format", [JPEG, WEBP])
@pytest.mark.parametrize("infotext", [INFOTEXT, "plain words"])
def test_a_converted_image_keeps_its_infotext_where_a1111_reads_it(image_format: ImageFormat, infotext: str) -> None:
    converted = convert(a1111_png(gradient(), infotext), OutputOptions(image_format))

    image = open_base64(converted.image)
    assert (image.format, image.size, image.mode) == (image_format.name, (96, 64), "RGB")
    assert infotext_of(converted.image) == infotext


@pytest.mark.slow  # 180 million pixels
def test_an_image_above_pillows_own_limit_is_converted() -> None:
    side = 13_500

    converted = convert(a1111_png(Image.new("L", (side, side), 7)), OutputOptions(JPEG))

    assert (side).to_bytes(2, "big") * 2 in base64.b64decode(converted.image)[:1000]  # its frame's height and width


@pytest.mark.parametrize("image_format", [JPEG, WEBP])
def test_without_metadata_a_converted_image_has_no_infotext(image_format: ImageFormat) -> None:
    picture = convert(a1111_png(gradient()), OutputOptions(image_format, metadata=False)).image

    assert infotext_of(picture) is None
    assert b"lighthouse" not in base64.b64decode(picture)
    assert "lighthouse".encode("utf-16-be") not in base64.b64decode(picture)


def test_without_metadata_a_png_has_the_same_pixels_and_no_text() -> None:
    image = gradient()
    about = PngImagePlugin.PngInfo()
    about.add_text("parameters", "a lighthouse")  # tEXt
    about.add_itxt("postprocessing", "a lighthouse 猫")  # iTXt
    about.add_text("more", "a lighthouse " * 20, zip=True)  # zTXt
    exif = Image.Exif()
    exif[0x010E] = "a lighthouse"
    png = png_bytes(image, pnginfo=about, exif=exif)

    stripped = base64.b64decode(convert(to_base64(png), OutputOptions(metadata=False)).image)

    assert stripped == png_bytes(image)  # chunk for chunk as if the text had never been there
    assert Image.open(io.BytesIO(stripped)).tobytes() == image.tobytes()


def test_a_png_without_text_is_not_changed() -> None:
    png = to_base64(png_bytes(gradient()))

    assert convert(png, OutputOptions(metadata=False)).image == png


@pytest.mark.parametrize("image_format", [JPEG, WEBP])
def test_an_image_without_an_infotext_gets_none(image_format: ImageFormat) -> None:
    assert infotext_of(convert(to_base64(png_bytes(gradient())), OutputOptions(image_format)).image) is None


@pytest.mark.parametrize("image_format", [JPEG, WEBP])
def test_the_quality_is_the_jobs_or_else_90(image_format: ImageFormat) -> None:
    png = a1111_png(Image.effect_noise((128, 128), 80).convert("RGB"))

    sizes = {
        quality: len(convert(png, OutputOptions(image_format, quality)).image) for quality in (1, 50, 89, 90, 91, 100)
    }

    assert list(sizes.values()) == sorted(sizes.values()) and len(set(sizes.values())) == len(sizes)
    assert len(convert(png, OutputOptions(image_format)).image) == sizes[90]


@pytest.mark.parametrize(("image_format", "quality"), [(JPEG, 90), (WEBP, 90)])
def test_a_converted_image_looks_the_same(image_format: ImageFormat, quality: int) -> None:
    image = gradient()

    seen = open_base64(convert(a1111_png(image), OutputOptions(image_format, quality)).image)

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
def test_images_of_every_mode_can_be_converted(mode: str, jpeg: str, webp: str) -> None:
    image = gradient(mode)
    if mode == "RGBA":
        image.putalpha(128)
    png = a1111_png(image)

    assert open_base64(convert(png, OutputOptions(JPEG)).image).mode == jpeg
    assert open_base64(convert(png, OutputOptions(WEBP)).image).mode == webp


def test_an_infotext_too_long_for_a_jpeg_is_left_out_with_a_warning() -> None:
    png = a1111_png(gradient(), "x" * 40_000)

    in_jpeg, in_webp = convert(png, OutputOptions(JPEG)), convert(png, OutputOptions(WEBP))

    assert infotext_of(in_jpeg.image) is None and "longer than a JPEG can hold" in in_jpeg.warning
    assert infotext_of(in_webp.image) == "x" * 40_000 and in_webp.warning == ""


def test_the_longest_infotext_that_a_jpeg_holds_is_kept() -> None:
    longest = (65_533 - 50 - 8) // 2

    assert infotext_of(convert(a1111_png(gradient(), "x" * longest), OutputOptions(JPEG)).image) == "x" * longest
    assert convert(a1111_png(gradient(), "x" * (longest + 1)), OutputOptions(JPEG)).warning


def test_an_image_too_long_for_webp_is_the_callers_error_and_names_the_other_formats() -> None:
    png = to_base64(png_bytes(Image.new("RGB", (16_384, 8))))

    with pytest.raises(InvalidRequest, match=r"output\.format: webp holds 16383 pixels a side") as caught:
        convert(png, OutputOptions(WEBP))

    assert caught.value.hint == "take png or jpeg"
    assert open_base64(convert(png, OutputOptions(JPEG)).image).width == 16_384


@pytest.mark.parametrize("png", BROKEN)
@pytest.mark.parametrize("options", [OutputOptions(JPEG), OutputOptions(WEBP), OutputOptions(metadata=False)])
def test_data_that_is_not_an_image_is_a_failed_generation(png: str, options: OutputOptions) -> None:
    with pytest.raises(GenerationFailed, match="cannot be converted to"):
        convert(png, options)


def test_a_file_is_named_by_its_number_and_its_seed_if_it_has_one() -> None:
    seeds = (None, 42)

    names = [image_file_name(number, seeds, ImageFormat.WEBP) for number in (1, 2, 3)]

    assert names == ["1.webp", "2-42.webp", "3.webp"]

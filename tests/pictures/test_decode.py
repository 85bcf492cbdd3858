"""Any bytes become 8-bit RGB as Pillow sees them, or one of our own errors."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from a1111_worker.domain import PictureSize
from a1111_worker.pictures.decode import MAX_PICTURE_PIXELS, PreparedPicture, count_pixels, decode_mask, decode_picture
from a1111_worker.pictures.source import BadPicture

WHITE = (255, 255, 255)
RED = (255, 0, 0)


def saved(image: Image.Image, file_format: str = "PNG", **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **how)
    return file.getvalue()


def opened(prepared: PreparedPicture) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(prepared.png)))
    image.load()
    return image


def of_values(mode: str, size: tuple[int, int], values: list[Any]) -> Image.Image:
    image = Image.new(mode, size)
    image.putdata(values)
    return image


def colours(image: Image.Image) -> list[Any]:
    return [image.getpixel((x, y)) for y in range(image.height) for x in range(image.width)]


def palette(*, transparency: Any) -> bytes:
    image = of_values("P", (2, 1), [0, 1])
    image.putpalette([*RED, 0, 0, 255])
    return saved(image, transparency=transparency)


def test_a_picture_becomes_a_plain_png() -> None:
    original = Image.linear_gradient("L").resize((40, 24)).convert("RGB")
    data = saved(original, icc_profile=b"a profile", pnginfo=None)

    prepared = decode_picture(data)

    plain = opened(prepared)
    assert (plain.format, plain.mode, plain.info) == ("PNG", "RGB", {})
    assert prepared.size == PictureSize(40, 24)
    assert plain.tobytes() == original.tobytes()
    assert not prepared.is_first_of_several and prepared.brightness is None


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (saved(of_values("RGBA", (2, 1), [(*RED, 255), (*RED, 0)])), [RED, WHITE]),
        (saved(of_values("RGBA", (1, 1), [(0, 0, 0, 128)])), [(127, 127, 127)]),
        (saved(of_values("LA", (2, 1), [(9, 255), (9, 0)])), [(9, 9, 9), WHITE]),  # A1111 shows the hidden 9
        (palette(transparency=0), [WHITE, (0, 0, 255)]),  # and the hidden red
        (palette(transparency=b"\xff\x00"), [RED, WHITE]),
        (saved(of_values("RGB", (2, 1), [RED, (1, 2, 3)]), transparency=RED), [WHITE, (1, 2, 3)]),
        (saved(of_values("L", (2, 1), [7, 8]), transparency=7), [WHITE, (8, 8, 8)]),
        (saved(of_values("1", (2, 1), [0, 255])), [(0, 0, 0), WHITE]),
        (saved(of_values("I;16", (3, 1), [0, 25_700, 65_535])), [(0, 0, 0), (100, 100, 100), WHITE]),  # not clipped
        (saved(of_values("I;16", (2, 1), [0, 25_700]), "TIFF"), [(0, 0, 0), (100, 100, 100)]),
        (saved(of_values("CMYK", (1, 1), [(0, 255, 255, 0)]), "TIFF"), [RED]),
        (saved(Image.new("RGB", (1, 1), RED), "BMP"), [RED]),
        (saved(Image.new("RGB", (1, 1), RED), "GIF"), [RED]),
        (saved(Image.new("RGB", (1, 1), RED), "WEBP", lossless=True), [RED]),
        (saved(Image.new("L", (1, 1), 200), "JPEG", quality=100), [(200, 200, 200)]),
    ],
    ids=lambda value: None if isinstance(value, bytes) else str(value)[:20],
)
def test_every_kind_of_picture_becomes_8_bit_rgb_without_transparency(data: bytes, expected: Any) -> None:
    assert colours(opened(decode_picture(data))) == expected


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
def test_a_picture_is_turned_as_its_exif_says(file_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new("RGB", (3, 2), RED)
    image.putpixel((0, 0), WHITE)
    data = saved(image, file_format, exif=exif, **({"lossless": True} if file_format == "WEBP" else {}))

    prepared = decode_picture(data)

    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert opened(prepared).tobytes() == expected.tobytes()
    assert prepared.size == PictureSize(*expected.size)


def test_a_broken_exif_turns_nothing() -> None:
    data = saved(Image.new("RGB", (3, 2), RED), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")

    assert decode_picture(data).size == PictureSize(3, 2)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_several_is_taken_and_that_is_said(file_format: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, WHITE)]
    how = {"lossless": True} if file_format == "WEBP" else {}

    prepared = decode_picture(saved(frames[0], file_format, save_all=True, append_images=frames[1:], **how))

    assert prepared.is_first_of_several
    assert set(colours(opened(prepared))) == {RED}


def test_the_second_picture_of_a_phones_jpeg_is_not_mentioned() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, WHITE)]

    prepared = decode_picture(saved(frames[0], "MPO", save_all=True, append_images=frames[1:]))

    assert not prepared.is_first_of_several


def bomb(width: int, height: int) -> bytes:
    return saved(Image.new("1", (width, height)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is no picture"),
        (b"some text", "is no picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no picture"),  # Pillow would start Ghostscript
        (saved(Image.new("RGB", (8, 8)), "ICO"), "is no picture"),
        (bomb(5_001, 5_000), "has 5001×5000 = 25,005,000 pixels, and the limit is 25,000,000"),
        (saved(of_values("F", (1, 1), [0.5]), "TIFF"), "has 32 bits a channel"),
        (saved(of_values("I", (1, 1), [1 << 20]), "TIFF"), "has 32 bits a channel"),
        (saved(Image.effect_noise((64, 64), 90), "PNG")[:1000], "is cut off"),
        (saved(Image.effect_noise((64, 64), 90), "JPEG")[:1000], "is cut off"),
        (saved(Image.new("RGB", (8, 8)))[:30], "is no picture"),
        (saved(Image.new("RGB", (8, 8))).replace(b"IDATx", b"IDATy"), "is broken"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else str(value),
)
def test_what_cannot_be_used_is_refused_with_the_reason(data: bytes, message: str) -> None:
    with pytest.raises(BadPicture, match=message):
        decoded(data)


def decoded(data: bytes) -> PreparedPicture:
    """As a job does it: the pixels are counted first."""
    count_pixels(data)
    return decode_picture(data)


def test_the_limit_itself_is_allowed() -> None:
    assert count_pixels(bomb(5_000, 5_000)) == MAX_PICTURE_PIXELS


# -- masks


@pytest.mark.parametrize(
    ("image", "is_rounded", "expected"),
    [
        (of_values("L", (3, 1), [0, 100, 255]), True, [0, 100, 255]),
        (of_values("RGB", (2, 1), [RED, WHITE]), True, [76, 255]),
        (of_values("RGBA", (2, 1), [(*RED, 255), (*WHITE, 255)]), True, [76, 255]),  # opaque: the brightness
        (of_values("RGBA", (3, 1), [(*RED, 0), (*RED, 129), (*RED, 255)]), True, [0, 255, 255]),  # the alpha
        (of_values("RGBA", (3, 1), [(*RED, 0), (*RED, 129), (*RED, 255)]), False, [0, 129, 255]),
        (of_values("LA", (2, 1), [(255, 0), (0, 255)]), True, [0, 255]),
        (of_values("I;16", (2, 1), [25_700, 65_535]), True, [100, 255]),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_a_mask_becomes_grey(image: Image.Image, is_rounded: bool, expected: list[int]) -> None:
    mask = decode_mask(saved(image), PictureSize(*image.size), is_rounded=is_rounded)

    assert opened(mask).mode == "L"
    assert colours(opened(mask)) == expected
    assert mask.brightness == sum(expected)


def test_a_mask_gets_the_size_of_its_picture() -> None:
    mask = decode_mask(saved(Image.new("L", (8, 4), 255)), PictureSize(16, 12), is_rounded=True)

    assert opened(mask).size == (16, 12)
    assert mask.size == PictureSize(16, 12)


# -- any bytes

SEEDS = [
    saved(Image.linear_gradient("L").resize((24, 16)).convert(mode), file_format)
    for file_format, modes in {
        "PNG": ("RGB", "RGBA", "LA", "P", "1", "L"),
        "JPEG": ("RGB", "L", "CMYK"),
        "WEBP": ("RGB", "RGBA"),
        "GIF": ("P",),
        "BMP": ("RGB", "P"),
        "TIFF": ("RGB", "L", "CMYK"),
    }.items()
    for mode in modes
] + [palette(transparency=0), saved(of_values("I;16", (3, 1), [0, 25_700, 65_535]))]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A picture with some bytes changed, and maybe its end cut off."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for place, value in draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), max_size=6)):
        data[place] = value
    return bytes(data[: draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))])


@settings(max_examples=200, deadline=None)
@given(st.one_of(damaged(), st.sampled_from(SEEDS), st.binary(max_size=200)))
def test_any_bytes_are_an_error_of_ours_or_the_picture_that_pillow_sees(data: bytes) -> None:
    try:
        prepared = decoded(data)
    except BadPicture:
        return
    plain = opened(prepared)
    assert plain.mode == "RGB" and plain.size == (prepared.size.width, prepared.size.height)
    with Image.open(io.BytesIO(data)) as image:
        expected = as_pillow_sees(image)
    assert plain.size == expected.size
    assert all(not any(channel.histogram()[2:]) for channel in differences(plain, expected))  # 1 is rounding


def as_pillow_sees(image: Image.Image) -> Image.Image:
    """By another way than the worker's: composited, and 16 bits cut down to 8."""
    if image.mode.startswith("I;16"):
        values = [int(value) for value in colours(image)]
        return of_values("L", image.size, [value >> 8 for value in values]).convert("RGB")
    layer = image.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", image.size, (*WHITE, 255)), layer).convert("RGB")
    flat.info.update(image.info)
    flat.getexif().update(dict(image.getexif()))
    turned = ImageOps.exif_transpose(flat)
    assert turned is not None
    return turned


def differences(one: Image.Image, other: Image.Image) -> list[Image.Image]:
    from PIL import ImageChops

    return [ImageChops.difference(a, b) for a, b in zip(one.split(), other.split(), strict=True)]

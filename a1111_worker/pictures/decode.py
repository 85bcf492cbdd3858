"""The bytes of a picture become 8-bit RGB, those of a mask 8-bit grey.

A1111 decodes less carefully (1.9.3 and 1.10.1, measured): it shows what lies under the transparent pixels of a
grey picture or a palette, turns 16-bit grey nearly white, and answers 500 for a file that is cut off.

Pillow is imported when it is needed. It is given only the formats of `source.FORMATS`: others start programs
(EPS), or are decoded by code that nobody needs here.
"""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from a1111_worker.domain import PictureSize
from a1111_worker.pictures.source import FORMATS, NO_PICTURE, BadPicture

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PICTURE_PIXELS = 25_000_000

_EXIF_ORIENTATION = 0x0112
_PILLOW_SAYS_CUT_OFF = "truncated"


@dataclass(frozen=True)
class PreparedPicture:
    """A picture as a plain PNG in base64, and its size.

    `is_first_of_several`: it is the first picture of an animation, or of several pages. `brightness` is the sum of all
    values (0 to 255) of a mask; None for any other picture.
    """

    png: str = field(repr=False)
    size: PictureSize
    is_first_of_several: bool = False
    brightness: int | None = None


def count_pixels(data: bytes) -> int:
    """The pixels of a picture, by its header. Raises BadPicture if it is no picture, or has more than are allowed."""
    with opened(data) as image:
        width, height = image.size
    pixels: int = width * height
    if pixels > MAX_PICTURE_PIXELS:
        raise BadPicture(f"has {width}×{height} = {pixels:,} pixels, and the limit is {MAX_PICTURE_PIXELS:,}")
    return pixels


def decode_picture(data: bytes) -> PreparedPicture:
    """A picture as 8-bit RGB: turned, without transparency. Raises BadPicture. Its pixels were counted before."""
    with opened(data) as image:
        is_first = _has_several(image)
        plain = _turned(image, _on_white(_as_8_bit(image)))
        return PreparedPicture(_to_png(plain), PictureSize(*plain.size), is_first)


def decode_mask(data: bytes, size: PictureSize | None, *, is_rounded: bool) -> PreparedPicture:
    """A mask as 8-bit grey, of this size unless it is None; white is painted anew.

    Raises BadPicture. Its pixels were counted before.

    If a pixel is not opaque, the mask is the alpha channel, made black and white if `is_rounded`. Else it is the
    brightness. A1111 does so for RGBA (create_binary_mask); here it holds for every kind of transparency.
    """
    from PIL.Image import Resampling

    with opened(data) as image:
        is_first = _has_several(image)
        picture = _as_8_bit(image)
        mask = picture.convert("RGB").convert("L")
        if _has_transparency(picture):
            alpha = picture.convert("RGBA").getchannel("A")
            if alpha.histogram()[255] < alpha.width * alpha.height:
                mask = alpha.point([255 * (value > 128) for value in range(256)]) if is_rounded else alpha
        mask = _turned(image, mask)
        if size is not None and mask.size != (size.width, size.height):
            mask = mask.resize((size.width, size.height), Resampling.LANCZOS)
        brightness = sum(value * count for value, count in enumerate(mask.histogram()))
        return PreparedPicture(_to_png(mask), PictureSize(*mask.size), is_first, brightness)


def first_of_several(pictures: Mapping[str, PreparedPicture]) -> list[str]:
    """A warning for each file with several pictures: only the first one is used."""
    return [
        f"{path} has several pictures, and only the first one is used"
        for path, one in pictures.items()
        if one.is_first_of_several
    ]


@contextlib.contextmanager
def opened(data: bytes) -> Iterator[Image]:
    """A picture whose header is read. Whatever Pillow raises inside the block becomes a BadPicture."""
    from PIL import Image, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = None  # the limit is ours, and every reader checks it before it decodes
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            yield image
    except BadPicture:
        raise
    except UnidentifiedImageError as error:
        raise BadPicture(NO_PICTURE) from error
    except Exception as error:  # Pillow's readers raise anything for a broken file
        if _PILLOW_SAYS_CUT_OFF in str(error).lower():
            raise BadPicture("is cut off") from error
        raise BadPicture("is broken, and cannot be decoded") from error


def _has_several(image: Image) -> bool:
    """Whether it is an animation, or has pages. The second picture that a phone puts into its JPEG (MPO) is neither."""
    if image.format == "MPO":
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # what comes after the first frame may be broken
        return True


def _as_8_bit(image: Image) -> Image:
    """A picture of 8 bits a channel, or fewer. Raises BadPicture for 32 bits: nothing says what their range is."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        grey = image.convert("I")  # 16 bits; converted to "L" at once, Pillow would make 255 of nearly all values
        grey.info.clear()
        return grey.point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if image.mode in ("I", "F"):
        raise BadPicture("has 32 bits a channel: send it with 8 or 16")
    image.load()
    return image


def _on_white(image: Image) -> Image:
    """8-bit RGB: transparent pixels become white."""
    from PIL import Image as images

    if _has_transparency(image):
        layer = image.convert("RGBA")
        white = images.new("RGB", image.size, (255, 255, 255))
        white.paste(layer, mask=layer.getchannel("A"))
        return white
    return image.convert("RGB")


def _has_transparency(image: Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def _turned(image: Image, decoded: Image) -> Image:
    """A decoded picture as the EXIF of its file says how to look at it."""
    from PIL.Image import Transpose

    ways = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    way = ways.get(_orientation(image))
    return decoded if way is None else decoded.transpose(way)


def _orientation(image: Image) -> int:
    """1 to 8, as EXIF counts; 1 if there is none, or if it cannot be read."""
    try:
        found = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # a broken EXIF says nothing
        return 1
    return found if found in range(1, 9) else 1


def _to_png(image: Image) -> str:
    file = io.BytesIO()
    image.info.clear()  # else Pillow writes the original's colour profile, transparency and texts into it
    image.save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getbuffer()).decode("ascii")

"""Draws pictures that nobody can mistake for a model's: a landscape made from a text, with the word SANDBOX on it.

The same text and size give the same bytes; another text gives another picture. Only Pillow is needed. The letters are
defined here, so that they are the same on every machine and legible from 64 pixels up.
"""

from __future__ import annotations

import colorsys
import hashlib
import io
import math
import random
import struct
import zlib

from PIL import ExifTags, Image, ImageDraw, ImageOps, PngImagePlugin

Colour = tuple[int, int, int]

WORD = "SANDBOX"

_GLYPHS = {
    "S": (" ####", "#    ", "#    ", " ### ", "    #", "    #", "#### "),
    "A": (" ### ", "#   #", "#   #", "#####", "#   #", "#   #", "#   #"),
    "N": ("#   #", "##  #", "# # #", "#  ##", "#   #", "#   #", "#   #"),
    "D": ("#### ", "#   #", "#   #", "#   #", "#   #", "#   #", "#### "),
    "B": ("#### ", "#   #", "#   #", "#### ", "#   #", "#   #", "#### "),
    "O": (" ### ", "#   #", "#   #", "#   #", "#   #", "#   #", " ### "),
    "X": ("#   #", " # # ", "  #  ", "  #  ", "  #  ", " # # ", "#   #"),
}


def picture(text: str, width: int, height: int) -> Image.Image:
    """A landscape. `text` decides its colours, its hills and its sun."""
    chance = random.Random(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    hue = chance.random()
    zenith = _colour(hue, 0.62, 0.55 + 0.3 * chance.random())
    horizon = _colour(hue + 0.25 + 0.35 * chance.random(), 0.35, 1.0)
    land = _colour(hue + 0.05, 0.7, 0.16)

    image = ImageOps.colorize(Image.linear_gradient("L").resize((width, height)), zenith, horizon)
    draw = ImageDraw.Draw(image)
    _sun(draw, chance, image.size, horizon)
    layers = 5
    for layer in range(1, layers + 1):
        _hills(draw, chance, image.size, layer / layers, _mix(horizon, land, layer / layers))
    _sign(image)
    return image


def signed(image: Image.Image) -> Image.Image:
    """The image with the word on it."""
    _sign(image)
    return image


def black(width: int, height: int) -> Image.Image:
    """The picture of a model that computes NaN."""
    return Image.new("RGB", (width, height))


def encode(image: Image.Image, infotext: str | None, file_format: str, min_bytes: int = 0) -> bytes:
    """A file as A1111 encodes it. The infotext, if it has one, is in PNG's `parameters`, or in EXIF's UserComment.

    A PNG is brought to `min_bytes` by a private chunk of incompressible bytes, which readers skip.
    """
    file = io.BytesIO()
    if file_format == "png":
        about = PngImagePlugin.PngInfo()
        if infotext is not None:
            about.add_text("parameters", infotext)
        image.save(file, "PNG", pnginfo=about, compress_level=4)
        return _padded(file.getvalue(), min_bytes)
    exif = Image.Exif()
    comment = (infotext or "").encode("utf-16-be", "replace")
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + comment
    image.save(file, "WEBP" if file_format == "webp" else "JPEG", exif=exif, quality=80)
    return file.getvalue()


def _sun(draw: ImageDraw.ImageDraw, chance: random.Random, size: tuple[int, int], horizon: Colour) -> None:
    width, height = size
    x, y = width * (0.2 + 0.6 * chance.random()), height * (0.15 + 0.3 * chance.random())
    radius = min(width, height) * (0.06 + 0.06 * chance.random())
    for factor, light in ((1.35, 0.35), (1.0, 0.9)):
        r = radius * factor
        draw.ellipse((x - r, y - r, x + r, y + r), fill=_mix(horizon, (255, 250, 235), light))


def _hills(
    draw: ImageDraw.ImageDraw, chance: random.Random, size: tuple[int, int], nearness: float, colour: Colour
) -> None:
    """One ridge, the sum of three waves. A nearer ridge is lower in the picture."""
    width, height = size
    base = height * (0.45 + 0.4 * nearness)
    waves = [
        (height * 0.09 / number, 2 * math.pi * number * (0.6 + chance.random()) / width, chance.random() * 7)
        for number in (1, 2, 4)
    ]
    ridge = [
        (x, base + sum(crest * math.sin(x * pace + start) for crest, pace, start in waves))
        for x in range(0, width + 4, max(1, width // 256))
    ]
    draw.polygon([(0, height), *ridge, (width, ridge[-1][1]), (width, height)], fill=colour)


def _sign(image: Image.Image) -> None:
    """Write the word on a dark band along the lower edge."""
    rows = [" ".join(_GLYPHS[letter][row] for letter in WORD) for row in range(7)]
    columns = len(rows[0])
    scale = max(1, min(image.width * 55 // 100 // columns, image.height // 24))
    letters = Image.new("1", (columns, len(rows)))
    letters.putdata([255 * (dot == "#") for row in rows for dot in row])
    letters = letters.resize((columns * scale, len(rows) * scale), Image.Resampling.NEAREST)
    margin = 2 * scale
    top = image.height - letters.height - 2 * margin
    band = Image.new("RGB", (image.width, letters.height + 2 * margin), (14, 14, 18))
    band.paste((250, 250, 245), ((image.width - letters.width) // 2, margin), letters)
    image.paste(band, (0, top))


def _padded(png: bytes, min_bytes: int) -> bytes:
    missing = min_bytes - len(png)
    if missing <= 0:
        return png
    name, body = b"saNd", random.Random(zlib.crc32(png)).randbytes(max(0, missing - 12))
    chunk = struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    end = len(png) - 12  # the last chunk is IEND, which always has twelve bytes
    return png[:end] + chunk + png[end:]


def _colour(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return int(red * 255), int(green * 255), int(blue * 255)


def _mix(one: Colour, other: Colour, part: float) -> Colour:
    red, green, blue = (int(a + (b - a) * part) for a, b in zip(one, other, strict=True))
    return red, green, blue

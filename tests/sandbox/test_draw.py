"""The pictures of the sandbox."""

from __future__ import annotations

import pytest
from PIL import Image

from sandbox import draw

SANDBOX = """\
 ####  ###  #   # ####  ####   ###  #   #
#     #   # ##  # #   # #   # #   #  # #
#     #   # # # # #   # #   # #   #   #
 ###  ##### #  ## #   # ####  #   #   #
    # #   # #   # #   # #   # #   #   #
    # #   # #   # #   # #   # #   #  # #
####  #   # #   # ####  ####   ###  #   #"""


@pytest.mark.parametrize("size", [(64, 64), (64, 512), (512, 64), (512, 512), (1024, 768), (2048, 2048)])
def test_every_picture_says_sandbox(size: tuple[int, int]) -> None:
    picture = draw.picture("a lighthouse", *size).convert("L")

    band = picture.crop((0, picture.height - picture.height * 2 // 5, *size)).point(lambda value: 255 * (value > 240))
    word = picture.crop((0, 0, 1, 1)) if band.getbbox() is None else band.crop(band.getbbox())
    letters = word.resize((41, 7), Image.Resampling.NEAREST)
    rows = ["".join("#" if letters.getpixel((x, y)) else " " for x in range(41)).rstrip() for y in range(7)]
    assert "\n".join(rows) == SANDBOX

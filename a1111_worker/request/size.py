"""The size of a job's final image, by A1111's own arithmetic (1.10.1, processing.py, calculate_target_resolution)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from a1111_worker.request.fields import MIN_SIDE

MAX_UPSCALING = 4  # times MAX_PIXELS: so much may hires upscale before it cuts the image to another shape


@dataclass(frozen=True)
class FinalSize:
    """Width and height of the final image, those of the first pass, and the pixels that hires upscales and then cuts.

    `upscaled_pixels` is 0 if nothing is cut.
    """

    first_pass: tuple[int, int]
    width: int
    height: int
    upscaled_pixels: int = 0

    @property
    def pixels(self) -> int:
        """The pixels of the larger pass."""
        return max(self.width * self.height, self.first_pass[0] * self.first_pass[1])


def final_size(body: Mapping[str, Any]) -> FinalSize:
    """The size that a txt2img body leads to."""
    width, height = body["width"], body["height"]
    if body.get("firstphase_width"):
        width, height = body["firstphase_width"], body["firstphase_height"]
    first_pass = (width, height)
    if not body.get("enable_hr"):
        return FinalSize(first_pass, width, height)
    x, y = body.get("hr_resize_x", 0), body.get("hr_resize_y", 0)
    if x and y:  # upscaled until it covers both, then cut
        covering = x * (x * height // width) if width * y < height * x else (y * width // height) * y
        return FinalSize(first_pass, x, y, covering)
    if x:
        return FinalSize(first_pass, x, x * height // width)
    if y:
        return FinalSize(first_pass, y * width // height, y)
    scale = body.get("hr_scale", 2.0)
    return FinalSize(first_pass, int(width * scale), int(height * scale))


def size_problem(size: FinalSize, max_pixels: int) -> str | None:
    """What is wrong with a size, None if nothing is."""
    asks = f"asks for a picture of {size.width}×{size.height}"
    if size.pixels > max_pixels:
        return f"{asks}: {size.pixels:,} pixels, and the limit is {max_pixels:,}"
    if size.upscaled_pixels > MAX_UPSCALING * max_pixels:
        return (
            f"{asks}, cut from {size.upscaled_pixels:,} upscaled pixels, and the limit of these is "
            f"{MAX_UPSCALING * max_pixels:,}: the first pass has a very different shape"
        )
    if min(size.width, size.height) < MIN_SIDE:
        return f"{asks}: no side may be below {MIN_SIDE}"
    return None

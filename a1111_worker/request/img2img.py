"""The table of img2img: what generating tasks share, and the pictures; and what follows from the pictures' sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from a1111_worker.domain import GenerationRequest, PictureSize
from a1111_worker.errors import Complaint, InvalidRequest
from a1111_worker.pictures.decode import PreparedPicture, first_of_several
from a1111_worker.request.fields import (
    MAX_CFG,
    MAX_PROMPT,
    MAX_SIDE,
    MIN_SIDE,
    Field,
    FieldClass,
    Limits,
    generation_fields,
    refused_boolean,
    refused_text,
)
from a1111_worker.request.picture_fields import picture, pictures
from a1111_worker.request.picture_scripts import is_sd_upscale
from a1111_worker.request.values import boolean, integer, number, text

MAX_BLUR = 64  # pixels: A1111's own slider ends there
MAX_PADDING = 1024
LATENT_UPSCALE = 3  # the resize_mode that keeps each picture's own size
FIRST = "init_images[0]"


@lru_cache(maxsize=8)
def img2img_fields(limits: Limits) -> Mapping[str, Field]:
    """Every field that an img2img job may contain, and every refused field with its reason."""
    ours, passed = FieldClass.OURS, FieldClass.PASSED
    blur = integer(0, MAX_BLUR)
    return {
        **generation_fields(limits),
        "prompt": Field(ours, text(MAX_PROMPT, blank=True)),
        "init_images": Field(ours, pictures(limits), is_required=True),
        "mask": Field(ours, picture(limits)),
        "denoising_strength": Field(passed, number(0, 1)),
        "resize_mode": Field(passed, integer(0, 3)),
        "image_cfg_scale": Field(passed, number(0, MAX_CFG)),
        "initial_noise_multiplier": Field(passed, number(0, 1.5)),
        "mask_blur": Field(passed, blur),
        "mask_blur_x": Field(passed, blur),
        "mask_blur_y": Field(passed, blur),
        "mask_round": Field(passed, boolean()),
        "inpainting_fill": Field(passed, integer(0, 3)),
        "inpaint_full_res": Field(passed, boolean()),
        "inpaint_full_res_padding": Field(passed, integer(0, MAX_PADDING)),
        "inpainting_mask_invert": Field(passed, integer(0, 1)),
        "enable_hr": refused_boolean(False, "there is no second pass in img2img"),
        "latent_mask": refused_text("the WebUI's API does not decode it, and fails", ""),
        "include_init_images": refused_boolean(False, "the answer shows no pictures of the job"),
    }


def fit_pictures(
    request: GenerationRequest, prepared: Mapping[str, PreparedPicture], limits: Limits
) -> GenerationRequest:
    """The request with its pictures in the body, and width and height settled. InvalidRequest if they do not fit."""
    fitting = _Fitting(request.body, prepared, limits)
    sides, warnings = fitting.sides()
    if complaints := fitting.complaints({**request.body, **sides}):
        raise InvalidRequest(complaints)
    body = {**request.body, **sides, "init_images": [one.png for one in fitting.init_images]}
    if fitting.mask is not None:
        body["mask"] = fitting.mask.png
    several = first_of_several(prepared)
    return replace(request, body=body, pictures={}, warnings=(*request.warnings, *warnings, *several))


@dataclass(frozen=True)
class _Fitting:
    """A job's fields and its prepared pictures, and what they mean for each other."""

    body: Mapping[str, Any]
    prepared: Mapping[str, PreparedPicture]
    limits: Limits

    @property
    def init_images(self) -> list[PreparedPicture]:
        return [one for path, one in self.prepared.items() if path.startswith("init_images")]

    @property
    def mask(self) -> PreparedPicture | None:
        return self.prepared.get("mask")

    @property
    def paints_into_picture(self) -> bool:
        """Whether A1111 paints the masked area alone, and answers with pictures of the first picture's size."""
        return self.mask is not None and bool(self.body.get("inpaint_full_res", True))

    def sides(self) -> tuple[dict[str, int], list[str]]:
        """Width and height, those that the job does not give by the first picture's, and a warning if they differ."""
        size = self.prepared[FIRST].size
        width, height = self.body.get("width"), self.body.get("height")
        if width and height:
            return {"width": width, "height": height}, []
        fitted = fit_sides(size, self.limits.max_pixels, width=width, height=height)
        warning = (
            f"width and height are {fitted} by {FIRST}, which has {size}: "
            f"multiples of 8 from {MIN_SIDE} to {MAX_SIDE}, at most {self.limits.max_pixels:,} pixels"
        )
        return {"width": fitted.width, "height": fitted.height}, [] if fitted == size else [warning]

    def complaints(self, body: Mapping[str, Any]) -> list[Complaint]:
        """Everything that does not fit. `body` has width and height."""
        return [Complaint(path, message) for path, message in (*self._sizes(body), *self._mask_problems(body))]

    def _sizes(self, body: Mapping[str, Any]) -> list[tuple[str, str]]:
        first, most = self.prepared[FIRST].size, self.limits.max_pixels
        problems = []
        if self.paints_into_picture and first.pixels > most:
            answer = f"the answer has the size of this picture, {first}, with inpaint_full_res (true by default)"
            problems.append((FIRST, f"is too large: {answer}, and the limit is {most:,} pixels"))
        upscaled = upscaled_size(body, first)
        if upscaled is not None and upscaled.pixels > most:
            problems.append(("script_args[3]", f"asks for a picture of {upscaled}, and the limit is {most:,} pixels"))
        if any(one.size != first for one in self.init_images):
            if self.mask is not None:
                problems.append(("init_images", "must have one size if there is a mask"))
            elif body.get("resize_mode") == LATENT_UPSCALE:
                problems.append(("init_images", f"must have one size with resize_mode {LATENT_UPSCALE}"))
        return problems

    def _mask_problems(self, body: Mapping[str, Any]) -> list[tuple[str, str]]:
        """A mask that is all black, maybe only after its blur: A1111 would silently repaint the whole picture."""
        if self.mask is None or not self.paints_into_picture:
            return []
        brightness = self.mask.brightness or 0
        if body.get("inpainting_mask_invert"):
            brightness = 255 * self.mask.size.pixels - brightness
        if brightness == 0:
            return [("mask", f"masks nothing: {_REPAINTS_ALL}")]
        # No pixel is brighter after the blur than all light together on the peak of the blur's Gaussian.
        blurs = [body.get("mask_blur", body.get(f"mask_blur_{side}", 4)) for side in "xy"]
        peak = brightness * math.prod(1 / (math.sqrt(2 * math.pi) * max(blur, 0.4)) for blur in blurs)
        return [("mask", f"masks nothing after its blur: {_REPAINTS_ALL}")] if peak < 0.5 else []


_REPAINTS_ALL = "with inpaint_full_res (true by default) the WebUI would repaint the whole picture"


def upscaled_size(body: Mapping[str, Any], size: PictureSize) -> PictureSize | None:
    """The size that the script "SD upscale" brings a picture to; None if the job has another script, or none."""
    if not is_sd_upscale(body):
        return None
    _, _, upscaler, factor = body["script_args"]
    if str(upscaler).lower() == "none":
        return size
    return PictureSize(int(size.width * factor // 8 * 8), int(size.height * factor // 8 * 8))


def fit_sides(
    size: PictureSize, max_pixels: int, *, width: int | None = None, height: int | None = None
) -> PictureSize:
    """Sides in the shape of a picture: multiples of 8 from MIN_SIDE to MAX_SIDE, at most `max_pixels` in all.

    `width` or `height` is kept if it is given: the other one follows the shape.
    """
    if width:
        scale = width / size.width
    elif height:
        scale = height / size.height
    else:
        scale = min(1.0, MAX_SIDE / max(size.width, size.height), math.sqrt(max_pixels / size.pixels))
    sides = [width or _to_multiple_of_8(size.width * scale), height or _to_multiple_of_8(size.height * scale)]
    while sides[0] * sides[1] > max_pixels:
        longer = (1 if width else 0) if width or height else sides.index(max(sides))
        if sides[longer] <= MIN_SIDE:
            break
        sides[longer] -= 8
    return PictureSize(*sides)


def _to_multiple_of_8(side: float) -> int:
    return min(max(round(side / 8) * 8, MIN_SIDE), MAX_SIDE)

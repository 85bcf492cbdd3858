"""The task upscale: its table by the names of A1111's extras, its request, and the size that each picture gets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from a1111_worker.domain import ImageFormat, OutputOptions, PictureSize, PictureSource, UpscaleRequest
from a1111_worker.errors import Complaint, InvalidRequest
from a1111_worker.pictures.decode import PreparedPicture, first_of_several
from a1111_worker.request.fields import MAX_NAME, TASK, Field, FieldClass, Limits, generation_fields
from a1111_worker.request.picture_fields import picture, pictures
from a1111_worker.request.reader import InputReader
from a1111_worker.request.size import MAX_UPSCALING
from a1111_worker.request.values import (
    InvalidValue,
    ValueType,
    boolean,
    integer,
    mismatch,
    number,
    text,
)

UPSCALERS = ("upscaler_1", "upscaler_2")
NO_UPSCALER = "None"
MAX_FACTOR = 8
MIN_SIDE, MAX_SIDE = 8, 65_536  # pixels of the enlarged picture; below 8 A1111 fails
MODEL_FACTOR = 4  # of nearly every model: one that enlarges by less is run again


@lru_cache(maxsize=8)
def upscale_fields(limits: Limits) -> Mapping[str, Field]:
    """Every field that an upscale job may contain."""
    ours, passed, checked, dropped = FieldClass.OURS, FieldClass.PASSED, FieldClass.CHECKED, FieldClass.DROPPED
    shared = generation_fields(limits)
    share, side, name = number(0, 1), integer(MIN_SIDE, MAX_SIDE), text(MAX_NAME, blank=True)
    return {
        "task": TASK,
        "image": Field(ours, picture(limits)),
        "imageList": Field(ours, picture_list(limits)),
        "upscaler_1": Field(checked, name),
        "upscaler_2": Field(checked, name),
        "extras_upscaler_2_visibility": Field(passed, share),
        "resize_mode": Field(passed, integer(0, 1)),
        "upscaling_resize": Field(passed, number(0.1, MAX_FACTOR)),
        "upscaling_resize_w": Field(passed, side),
        "upscaling_resize_h": Field(passed, side),
        "upscaling_crop": Field(passed, boolean()),
        "gfpgan_visibility": Field(passed, share),
        "codeformer_visibility": Field(passed, share),
        "codeformer_weight": Field(passed, share),
        "upscale_first": Field(passed, boolean()),
        "show_extras_results": Field(dropped, boolean(), "the pictures are the answer"),
        "include": shared["include"],
        "output": shared["output"],
    }


def picture_list(limits: Limits) -> ValueType:
    """Several pictures, each as text or as A1111's `{"data": …, "name": …}`. The name is not used."""
    several = pictures(limits)

    def check(value: object) -> list[PictureSource]:
        if not isinstance(value, (list, tuple)):
            raise mismatch(several.expected, value)
        named = [isinstance(entry, dict) for entry in value]
        texts = [entry.get("data") if isinstance(entry, dict) else entry for entry in value]
        try:
            found: list[PictureSource] = several.check(texts)
        except InvalidValue as error:
            raise InvalidValue(*(_with_key(path, message, named) for path, message in error.problems)) from error
        return found

    entry = {"anyOf": [{"type": "string"}, {"type": "object", "required": ["data"]}]}
    return ValueType("array", several.expected, check, {"type": "array", "items": entry})


def _with_key(path: str, message: str, named: list[bool]) -> tuple[str, str]:
    """The path of a problem: `[1].data` if the entry is an object."""
    is_named = path.startswith("[") and named[int(path.strip("[]"))]
    return f"{path}.data" if is_named else path, message


def read_upscale(reader: InputReader) -> UpscaleRequest:
    """The request that the fields of an upscale job mean. What does not fit together is added to its complaints."""
    given = reader.given
    if ("image" in given) == ("imageList" in given) and not reader.has_complaint("image", "imageList"):
        reader.complain("image", "must be given, or imageList, and not both")
    if not _is_used(given) and not reader.has_complaint("upscaler_1", "gfpgan_visibility", "codeformer_visibility"):
        reader.complain("upscaler_1", "is required: without an upscaler the picture stays as it is")
    found = {f"imageList[{index}]": source for index, source in enumerate(given.get("imageList", ()))}
    if "image" in given:
        found = {"image": given["image"]}
    output: OutputOptions = given.get("output", OutputOptions())
    if output.quality is not None and output.format is ImageFormat.PNG:
        reader.warnings.append("output.quality does nothing for png, which is lossless")
    return UpscaleRequest(
        body={
            name: value
            for name, value in given.items()
            if reader.table[name].is_webui_field and name not in ("image", "imageList")
        },
        pictures=found,
        warnings=tuple(reader.warnings),
        dropped=tuple(reader.dropped),
        output=output,
        include_models="models" in given.get("include", ()),
    )


def _is_used(given: Mapping[str, Any]) -> bool:
    """Whether the job asks for anything to be done with its pictures."""
    restores = any(given.get(f"{restorer}_visibility") for restorer in ("gfpgan", "codeformer"))
    return restores or given.get("upscaler_1", NO_UPSCALER).strip().lower() not in ("", NO_UPSCALER.lower())


def fit_upscale(request: UpscaleRequest, prepared: Mapping[str, PreparedPicture], limits: Limits) -> UpscaleRequest:
    """The request with its pictures, and the size that each gets. InvalidRequest if one would be too large."""
    complaints = [
        Complaint(path, problem)
        for path, one in prepared.items()
        if (problem := _size_problem(request.body, one.size, limits.max_upscale_pixels)) is not None
    ]
    if complaints:
        raise InvalidRequest(complaints)
    several = first_of_several(prepared)
    return replace(
        request,
        pictures={},
        images=tuple(one.png for one in prepared.values()),
        sizes=tuple(upscaled_size(request.body, one.size) for one in prepared.values()),
        warnings=(*request.warnings, *several),
    )


def upscaled_size(body: Mapping[str, Any], size: PictureSize) -> PictureSize:
    """The size that A1111 (1.9.3 and 1.10.1, modules/upscaler.py and scripts/postprocessing_upscale.py) gives."""
    if body.get("upscaler_1", NO_UPSCALER) == NO_UPSCALER:
        return size
    if _crops(body):
        return PictureSize(*_target(body))
    return _enlarged(size, _factor(body, size))


def _size_problem(body: Mapping[str, Any], size: PictureSize, most: int) -> str | None:
    if body.get("upscaler_1", NO_UPSCALER) == NO_UPSCALER:
        return None
    factor = _factor(body, size)
    before_cut, result = _enlarged(size, factor), upscaled_size(body, size)
    if min(before_cut.width, before_cut.height, result.width, result.height) < MIN_SIDE:
        return f"would become {before_cut}: no side may be below {MIN_SIDE}"
    if max(before_cut.pixels, result.pixels) > most:
        return f"would become {before_cut} = {before_cut.pixels:,} pixels, and the limit is {most:,}"
    # A model enlarges by its own factor until the picture is large enough. Then it is made smaller.
    passes = max(1, math.ceil(math.log(factor, MODEL_FACTOR) - 1e-9))
    if size.pixels * MODEL_FACTOR ** (2 * passes) > MAX_UPSCALING * most and factor > 1:
        return (
            f"would take {size.pixels * MODEL_FACTOR ** (2 * passes):,} pixels on the way to {before_cut}, "
            f"and the limit of these is {MAX_UPSCALING * most:,}"
        )
    return None


def _factor(body: Mapping[str, Any], size: PictureSize) -> float:
    if body.get("resize_mode") == 1:
        width, height = _target(body)
        return float(max(width / size.width, height / size.height))
    return float(body.get("upscaling_resize", 2))


def _target(body: Mapping[str, Any]) -> tuple[int, int]:
    return body.get("upscaling_resize_w", 512), body.get("upscaling_resize_h", 512)


def _crops(body: Mapping[str, Any]) -> bool:
    return body.get("resize_mode") == 1 and bool(body.get("upscaling_crop", True))


def _enlarged(size: PictureSize, factor: float) -> PictureSize:
    return PictureSize(int(size.width * factor // 8 * 8), int(size.height * factor // 8 * 8))

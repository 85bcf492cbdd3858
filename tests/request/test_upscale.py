"""The table of upscale, and the sizes of enlarged pictures."""

from __future__ import annotations

from typing import Any

import pytest

from a1111_worker.context import JobContext
from a1111_worker.domain import ImageFormat, PictureSize, UpscaleRequest
from a1111_worker.errors import InvalidRequest
from a1111_worker.pictures.prepare import PicturePreparer
from a1111_worker.request.fields import Limits
from a1111_worker.request.parse import parse_request
from a1111_worker.request.upscale import fit_upscale, upscaled_size
from tests.request.test_img2img import picture


def parse(limits: Limits | None = None, **fields: Any) -> UpscaleRequest:
    given = {"image": picture(40, 24), "upscaler_1": "Lanczos", **fields}
    job = {"task": "upscale", **{name: value for name, value in given.items() if value != "absent"}}
    request = parse_request(job, limits or Limits())
    assert isinstance(request, UpscaleRequest)
    return request


def fit(limits: Limits | None = None, **fields: Any) -> UpscaleRequest:
    limits = limits or Limits()
    request = parse(limits, **fields)
    return fit_upscale(request, PicturePreparer().prepare(request.pictures, JobContext()), limits)


def complaints(call: Any, **fields: Any) -> list[str]:
    with pytest.raises(InvalidRequest) as raised:
        call(**fields)
    return [str(complaint) for complaint in raised.value.complaints]


def test_one_picture_or_several_in_the_forms_of_a1111() -> None:
    several = [{"data": picture(), "name": "../../x"}, picture(64, 64)]

    assert list(parse().pictures) == ["image"]
    assert list(parse(image="absent", imageList=several).pictures) == ["imageList[0]", "imageList[1]"]
    request = parse(output={"format": "webp"}, show_extras_results=False)
    assert request.output.format is ImageFormat.WEBP
    assert request.dropped == ("show_extras_results",)
    assert request.body == {"upscaler_1": "Lanczos"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"image": "absent"}, "image: must be given, or imageList, and not both"),
        ({"imageList": [picture()]}, "image: must be given, or imageList, and not both"),
        ({"image": "?"}, "image: is no picture"),
        ({"image": "absent", "imageList": [picture(), {"data": "?"}]}, "imageList[1].data: is no picture"),
        ({"image": "absent", "imageList": [picture(), {"name": "x"}]}, "imageList[1].data: must be a picture as text"),
        ({"image": "absent", "imageList": []}, "imageList: must have a picture"),
        ({"image": "absent", "imageList": "x"}, "imageList: must be a list of at most 8 pictures, not text"),
        ({"upscaler_1": "absent"}, "upscaler_1: is required: without an upscaler the picture stays as it is"),
        ({"upscaler_1": "None"}, "upscaler_1: is required"),
        ({"resize_mode": 2}, "resize_mode: must be a whole number from 0 to 1, not 2"),
        ({"upscaling_resize": 0}, "upscaling_resize: must be a number from 0.1 to 8, not 0"),
        ({"upscaling_resize_w": 0}, "upscaling_resize_w: must be a whole number from 8 to 65536, not 0"),
        ({"gfpgan_visibility": 2}, "gfpgan_visibility: must be a number from 0 to 1, not 2"),
        ({"prompt": "x"}, "prompt: is unknown"),
    ],
)
def test_everything_wrong_has_its_path(fields: dict[str, Any], expected: str) -> None:
    assert complaints(parse, **fields)[0].startswith(expected)


def test_faces_are_restored_without_an_upscaler() -> None:
    assert parse(upscaler_1="absent", gfpgan_visibility=1).body == {"gfpgan_visibility": 1}


# As measured on A1111 (tests/data/webui-*/extras): a picture of 40×24.
SIZES = [
    ({}, (80, 48)),
    ({"upscaling_resize": 1.5}, (56, 32)),
    ({"upscaling_resize": 3}, (120, 72)),
    ({"resize_mode": 1, "upscaling_resize_w": 100, "upscaling_resize_h": 100}, (100, 100)),
    ({"resize_mode": 1, "upscaling_resize_w": 101, "upscaling_resize_h": 33}, (101, 33)),
    ({"resize_mode": 1, "upscaling_resize_w": 100, "upscaling_resize_h": 100, "upscaling_crop": False}, (160, 96)),
    ({"upscaler_1": "None"}, (40, 24)),
]


@pytest.mark.parametrize(("fields", "expected"), SIZES)
def test_the_size_is_a1111s(fields: dict[str, Any], expected: tuple[int, int]) -> None:
    assert upscaled_size({"upscaler_1": "Lanczos", **fields}, PictureSize(40, 24)) == PictureSize(*expected)


TO_8_BY_96 = {"resize_mode": 1, "upscaling_resize_w": 8, "upscaling_resize_h": 96}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"upscaling_resize": 0.3}, "image: would become 8×0: no side may be below 8"),
        (
            {"limits": Limits(max_upscale_pixels=3_000)},
            "image: would become 80×48 = 3,840 pixels, and the limit is 3,000",
        ),
        (
            {
                "resize_mode": 1,
                "upscaling_resize_w": 8,
                "upscaling_resize_h": 96,
                "limits": Limits(max_upscale_pixels=9_000),
            },
            "image: would become 160×96 = 15,360 pixels",  # and then be cut to 8×96
        ),
        (
            {"upscaling_resize": 5, "limits": Limits(max_upscale_pixels=30_000)},
            "image: would take 245,760 pixels on the way to 200×120",  # a model of 4 times runs twice
        ),
    ],
)
def test_a_picture_that_would_be_too_large_or_too_small_is_refused(fields: dict[str, Any], expected: str) -> None:
    assert complaints(fit, **fields)[0].startswith(expected)


def test_each_picture_has_its_own_size() -> None:
    request = fit(image="absent", imageList=[picture(40, 24), picture(16, 16)])

    assert request.sizes == (PictureSize(80, 48), PictureSize(32, 32))
    assert len(request.images) == 2 and request.pictures == {}

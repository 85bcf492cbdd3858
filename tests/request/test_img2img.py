"""The table of img2img, and what follows from the sizes of its pictures."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from PIL import Image

from a1111_worker.context import JobContext
from a1111_worker.domain import GenerationRequest, PictureSize, Task
from a1111_worker.errors import InvalidRequest
from a1111_worker.pictures.prepare import PicturePreparer
from a1111_worker.request.fields import Limits
from a1111_worker.request.img2img import FIRST, fit_pictures, fit_sides
from tests.support import parse_generation


def picture(width: int = 128, height: int = 128, mode: str = "RGB", colour: Any = "white") -> str:
    file = io.BytesIO()
    Image.new(mode, (width, height), colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def parse(limits: Limits | None = None, **fields: Any) -> GenerationRequest:
    job = {"task": "img2img", "prompt": "a lighthouse", "init_images": [picture()], **fields}
    return parse_generation(job, limits or Limits())


def fit(limits: Limits | None = None, **fields: Any) -> GenerationRequest:
    limits = limits or Limits()
    request = parse(limits, **fields)
    return fit_pictures(request, PicturePreparer().prepare(request.pictures, JobContext()), limits)


def complaints(call: Any, **fields: Any) -> list[str]:
    with pytest.raises(InvalidRequest) as raised:
        call(**fields)
    return [str(complaint) for complaint in raised.value.complaints]


def test_the_pictures_leave_the_body_until_they_are_prepared() -> None:
    request = parse(mask=picture(mode="L"), mask_round=False, denoising_strength=0.4)

    assert request.task is Task.IMG2IMG
    assert {"init_images", "mask", "width", "height"}.isdisjoint(request.body)
    assert request.body["denoising_strength"] == 0.4
    assert list(request.pictures) == [FIRST, "mask"]
    assert (request.pictures["mask"].mask_of, request.pictures["mask"].is_rounded) == (FIRST, False)
    assert picture() not in repr(request)


def test_a_prompt_may_be_missing() -> None:
    job = {"task": "img2img", "init_images": [picture()]}

    assert parse_generation(job, Limits()).body["prompt"] == ""


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"init_images": None}, "init_images: must be a list of at most 8 pictures, not null"),
        ({"init_images": []}, "init_images: must have a picture"),
        ({"init_images": picture()}, "init_images: must be a list of at most 8 pictures, not text"),
        ({"init_images": [picture()] * 9}, "init_images: must be a list of at most 8 pictures, not a list of 9"),
        ({"init_images": [picture(), 5]}, "init_images[1]: must be a picture as text, not 5"),
        ({"init_images": [picture(), "?"]}, "init_images[1]: is no picture"),
        ({"init_images": [picture(), "aGVsbG8="]}, "init_images[1]: is no picture: PNG, JPEG, WEBP, GIF"),
        ({"init_images": ["https://example.com/a.png"]}, "init_images[0]: is a URL, and this worker fetches no"),
        ({"init_images": ["file:///etc/passwd"]}, "init_images[0]: must be base64, a data: URL with base64, or"),
        ({"init_images": [picture(), picture()]}, "init_images: has 2 pictures, and batch_size is 1: it takes one"),
        ({"mask": ""}, "mask: must not be blank"),
        ({"mask": [picture()]}, "mask: must be a picture as text, not a list of 1"),
        ({"denoising_strength": 2}, "denoising_strength: must be a number from 0 to 1, not 2"),
        ({"resize_mode": 9}, "resize_mode: must be a whole number from 0 to 3, not 9"),
        ({"inpainting_fill": 9}, "inpainting_fill: must be a whole number from 0 to 3, not 9"),
        ({"mask_blur": -3}, "mask_blur: must be a whole number from 0 to 64, not -3"),
        ({"width": 70}, "width: must be a multiple of 8 from 64 to 2048, not 70"),
        ({"width": 2048, "height": 2048, "limits": Limits(max_pixels=1 << 20)}, "width: asks for a picture of 2048"),
        ({"latent_mask": picture()}, "latent_mask: is refused: the WebUI's API does not decode it"),
        ({"firstpass_image": picture()}, "firstpass_image: is refused: the WebUI's API does not decode it"),
        ({"infotext": "Steps: 3"}, "infotext: is refused: it sets other fields unseen"),
        ({"include_init_images": True}, "include_init_images: is refused: the answer shows no pictures"),
        ({"enable_hr": True}, "enable_hr: is refused: there is no second pass in img2img"),
        ({"image": picture()}, "image: is unknown; did you mean 'init_images'?"),
        ({"n_iter": 17}, "n_iter: must be a whole number from 1 to 16, not 17"),
        (
            {"mask": picture(), "limits": Limits(max_input_images=1)},
            "mask: is one picture more than the 1 that a job may bring",
        ),
        # scripts
        ({"script_name": "Outpainting mk2"}, "script_name: is refused: this worker cannot check"),
        ({"script_name": "Loopback"}, "script_args: must be the 4 arguments of loopback, not 0"),
        ({"script_name": "Loopback", "script_args": [17, 0.5, "Linear", "None"]}, "script_args: asks for 17 pictures"),
        ({"script_name": "Loopback", "script_args": [2, 0.5, "Linear", "CLIP"]}, "script_args[3]: must be one of None"),
        ({"script_name": "Loopback", "script_args": [0, 3, "", "None"]}, "script_args[0]: must be a whole number"),
        ({"script_name": "SD upscale", "script_args": [None, 16, 1, 2]}, "script_args[2]: must be text, not 1"),
        (
            {"script_name": "SD upscale", "script_args": [None, 64, "Lanczos", 2], "mask": picture()},
            "mask: cannot be used with sd upscale",
        ),
        (
            {"script_name": "SD upscale", "script_args": [None, 64, "Lanczos", 2], "width": 64, "height": 512},
            "script_args[1]: must be a whole number from 0 to 56, not 64",
        ),
        (
            {
                "script_name": "Loopback",
                "script_args": [2, 0.5, "Linear", "None"],
                "init_images": [picture()] * 2,
                "batch_size": 2,
            },
            "init_images: must be one picture: loopback takes no more",
        ),
        (
            {
                "script_name": "prompts from file or textbox",
                "script_args": [False, False, "start", "--width 5000 --prompt x"],
            },
            "script_args[3]: line 1: --width must be a multiple of 8",
        ),
    ],
)
def test_everything_wrong_has_its_path(fields: dict[str, Any], expected: str) -> None:
    assert complaints(parse, **fields)[0].startswith(expected)


def test_all_complaints_come_at_once() -> None:
    found = complaints(parse, init_images=["?", picture(), "hello"], mask="", steps=0, resize_mode=9)

    assert [complaint.partition(":")[0] for complaint in found] == [
        "init_images[0]",
        "init_images[2]",
        "mask",
        "steps",
        "resize_mode",
    ]


def test_a_picture_in_a_job_of_another_task_is_sent_to_img2img() -> None:
    with pytest.raises(InvalidRequest, match='init_images: is not a field of this task; "task": "img2img" takes'):
        parse_generation({"prompt": "x", "init_images": [picture()]}, Limits())


# -- sizes


@pytest.mark.parametrize(
    ("size", "fields", "expected", "is_said"),
    [
        ((128, 64), {}, (128, 64), False),
        ((70, 100), {}, (72, 96), True),
        ((4000, 3000), {}, (2048, 1536), True),
        ((1, 1), {}, (64, 64), True),
        ((4000, 10), {}, (2048, 64), True),
        ((2000, 2000), {"limits": Limits(max_pixels=1_000_000)}, (1000, 1000), True),
        ((1999, 1997), {"limits": Limits(max_pixels=1_000_000)}, (1000, 1000), True),
        ((400, 200), {"width": 512}, (512, 256), True),
        ((400, 200), {"height": 512}, (1024, 512), True),
        ((400, 200), {"width": 512, "height": 512}, (512, 512), False),
    ],
)
def test_width_and_height_are_the_first_pictures_unless_they_are_given(
    size: tuple[int, int], fields: dict[str, Any], expected: tuple[int, int], is_said: bool
) -> None:
    request = fit(init_images=[picture(*size)], **fields)

    assert (request.body["width"], request.body["height"]) == expected
    assert [f"by {FIRST}" in warning for warning in request.warnings] == [True] * is_said


@pytest.mark.parametrize("width", [1, 63, 64, 1000, 2048, 25_000])
@pytest.mark.parametrize("height", [1, 100, 999, 2049, 24_999])
def test_fitted_sides_are_always_allowed(width: int, height: int) -> None:
    for most in (64 * 64, 100_000, 4_194_304):
        fitted = fit_sides(PictureSize(width, height), most)

        assert fitted.pixels <= most
        assert all(side % 8 == 0 and 64 <= side <= 2048 for side in (fitted.width, fitted.height))


def test_the_body_gets_plain_pictures_and_a_mask_of_the_same_size() -> None:
    request = fit(init_images=[picture(96, 64, "RGBA", (0, 0, 0, 0))], mask=picture(8, 8, "L"))

    assert request.pictures == {}
    sent = [
        Image.open(io.BytesIO(base64.b64decode(one))) for one in (*request.body["init_images"], request.body["mask"])
    ]
    assert [(image.format, image.mode, image.size) for image in sent] == [
        ("PNG", "RGB", (96, 64)),
        ("PNG", "L", (96, 64)),
    ]
    assert sent[0].getpixel((0, 0)) == (255, 255, 255)


def dot(size: int, radius: int) -> str:
    image = Image.new("L", (size, size))
    image.paste(255, (0, 0, radius, radius))
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


BIG, SMALL_LIMIT = [picture(200, 200)], Limits(max_pixels=30_000)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"mask": picture(8, 8, "L", 0)}, "mask: masks nothing: with inpaint_full_res"),
        ({"mask": picture(8, 8, "L", 255), "inpainting_mask_invert": 1}, "mask: masks nothing: with inpaint_full_res"),
        ({"mask": dot(128, 1), "mask_blur": 64}, "mask: masks nothing after its blur"),
        (
            {"init_images": BIG, "mask": picture(), "width": 64, "height": 64, "limits": SMALL_LIMIT},
            "init_images[0]: is too large: the answer has the size of this picture, 200×200",
        ),
        (
            {"init_images": [picture(), picture(64, 64)], "batch_size": 2, "mask": picture()},
            "init_images: must have one size if there is a mask",
        ),
        (
            {"init_images": [picture(), picture(64, 64)], "batch_size": 2, "resize_mode": 3},
            "init_images: must have one size with resize_mode 3",
        ),
        (
            {"script_name": "SD upscale", "script_args": [None, 16, "Lanczos", 2], "limits": SMALL_LIMIT},
            "script_args[3]: asks for a picture of 256×256, and the limit is 30,000 pixels",
        ),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], expected: str) -> None:
    assert complaints(fit, **fields)[0].startswith(expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"mask": picture(8, 8, "L", 0), "inpaint_full_res": False},  # the picture comes back as it is
        {"mask": dot(128, 1)},  # a dot is visible after the default blur of 4
        {"mask": dot(128, 1), "mask_blur_x": 64, "mask_blur_y": 0},
        {
            "init_images": BIG,
            "mask": picture(),
            "inpaint_full_res": False,
            "width": 64,
            "height": 64,
            "limits": SMALL_LIMIT,
        },
        {"init_images": BIG, "width": 64, "height": 64, "limits": SMALL_LIMIT},
        {"init_images": [picture(), picture(64, 64)], "batch_size": 2},
        {"script_name": "SD upscale", "script_args": [None, 16, "None", 8], "limits": SMALL_LIMIT},
    ],
)
def test_what_fits_is_taken(fields: dict[str, Any]) -> None:
    fit(**fields)


def test_fewer_pictures_than_a_batch_make_fewer_and_that_is_said() -> None:
    request = fit(init_images=[picture(), picture()], batch_size=4)

    assert "batch_size 4 with 2 init_images makes 2 pictures at a time" in request.warnings


def test_the_first_frame_of_an_animation_is_said() -> None:
    file = io.BytesIO()
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "white")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])

    request = fit(init_images=[base64.b64encode(file.getvalue()).decode()])

    assert request.warnings == (f"{FIRST} has several pictures, and only the first one is used",)

"""The units of ControlNet and ADetailer: what is passed on, and every complaint about the others."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from a1111_worker.domain import GenerationRequest
from a1111_worker.errors import InvalidRequest
from a1111_worker.pictures.prepare import PicturePreparer
from a1111_worker.request.extensions import (
    adetailer_keys,
    controlnet_keys,
    detected_maps,
    fill_units,
    without_pictures,
)
from tests.request.helpers import LIMITS, complaints, parse
from tests.support import DATA


def picture(width: int = 16, height: int = 8, mode: str = "RGB") -> str:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert(mode).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


PICTURE = picture()


def controlnet(*units: Any) -> dict[str, Any]:
    return {"alwayson_scripts": {"ControlNet": {"args": list(units)}}}


def adetailer(*args: Any) -> dict[str, Any]:
    return {"alwayson_scripts": {"ADetailer": {"args": list(args)}}}


def args_of(request: GenerationRequest) -> list[Any]:
    (script,) = request.body["alwayson_scripts"].values()
    args: list[Any] = script["args"]
    return args


# -- ControlNet

# a unit as clients write it, and what is passed on beside the picture
WRITTEN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"module": "canny", "weight": "0.5"}, {"module": "canny", "weight": 0.5}),
    (
        {"resize_mode": 2, "control_mode": 1},
        {"resize_mode": "Resize and Fill", "control_mode": "My prompt is more important"},
    ),
    ({"resize_mode": "Just Resize"}, {"resize_mode": "Just Resize"}),
    ({"lowvram": True, "guidance": 0.5}, {"low_vram": True, "guidance_end": 0.5}),
    ({"model": None, "mask": None, "hr_option": "Both"}, {"hr_option": "Both"}),
    ({"model": "canny_xl [e3b0c442]"}, {"model": "canny_xl"}),
    ({"model": "None"}, {}),
    ({"model": 135867}, {"model": ""}),
    ({"save_detected_map": True}, {"save_detected_map": True}),
]


@pytest.mark.parametrize(("written", "passed"), WRITTEN)
def test_a_unit_of_controlnet_is_passed_on_key_by_key(written: dict[str, Any], passed: dict[str, Any]) -> None:
    request = parse(**controlnet({"enabled": True, "image": PICTURE, **written}))

    defaults = {"enabled": True, "module": "none", "model": "None", "save_detected_map": False}
    assert args_of(request) == [{**defaults, **passed}]
    assert list(request.pictures) == ["alwayson_scripts.ControlNet.args[0].image"]


# how a unit names its pictures
FORMS: list[tuple[dict[str, Any], set[str]]] = [
    ({"image": PICTURE, "mask": PICTURE}, {"image", "mask"}),
    ({"input_image": PICTURE}, {"image"}),
    ({"image": PICTURE, "mask_image": PICTURE}, {"image", "mask"}),
    ({"image": {"image": PICTURE, "mask": PICTURE}}, {"image", "mask"}),
    ({"image": {"image": PICTURE, "mask": None}}, {"image"}),
    ({"image": f"data:image/png;base64,{PICTURE}"}, {"image"}),
]


@pytest.mark.parametrize(("unit", "expected"), FORMS)
def test_its_pictures_are_prepared_like_the_jobs_others(unit: dict[str, Any], expected: set[str]) -> None:
    request = parse(**controlnet({"enabled": False}, {"enabled": True, **unit}))

    filled = fill_units(request, PicturePreparer().prepare(request.pictures, _context()))

    path = "alwayson_scripts.ControlNet.args[1]"
    assert set(request.pictures) == {f"{path}.{key}" for key in expected}
    off, on = args_of(filled)
    assert off == {"enabled": False}
    assert {key for key in ("image", "mask") if key in on} == expected
    for key in expected:
        with Image.open(io.BytesIO(base64.b64decode(on[key]))) as image:
            assert (image.format, image.size) == ("PNG", (16, 8))
            assert image.mode == ("RGB" if key == "image" else "L")


def test_a_mask_is_made_as_large_as_its_picture() -> None:
    request = parse(**controlnet({"enabled": True, "image": PICTURE, "mask": picture(64, 64)}))

    (unit,) = args_of(fill_units(request, PicturePreparer().prepare(request.pictures, _context())))

    with Image.open(io.BytesIO(base64.b64decode(unit["mask"]))) as mask:
        assert mask.size == (16, 8)


IMAGE = {"enabled": True, "image": PICTURE}
PATH = "alwayson_scripts.ControlNet.args"

# arguments of ControlNet, and the complaint
WRONG: list[tuple[list[Any], str, str]] = [
    # it would be opened, and come back in the answer
    ([{**IMAGE, "image": "/etc/passwd"}], f"{PATH}[0].image", "is no"),
    ([{**IMAGE, "image": "outputs/secret.png"}], f"{PATH}[0].image", "is no"),
    ([{**IMAGE, "image": "file:///etc/passwd"}], f"{PATH}[0].image", "must be base64"),
    ([{**IMAGE, "image": {"image": "/etc/passwd"}}], f"{PATH}[0].image", "is no"),
    ([{**IMAGE, "mask": "/etc/passwd"}], f"{PATH}[0].mask", "is no"),
    ([{**IMAGE, "image": [PICTURE, PICTURE]}], f"{PATH}[0].image", "must be a picture as text"),
    ([{**IMAGE, "image": {"image": PICTURE, "path": "x"}}], f"{PATH}[0].image.path", "is unknown"),
    ([{**IMAGE, "input_image": PICTURE}], f"{PATH}[0].input_image", "is another name of image"),
    # torch.load would unpickle it
    ([{**IMAGE, "ipadapter_input": "gASV"}], f"{PATH}[0].ipadapter_input", "is unknown"),
    ([{**IMAGE, "batch_images": "/etc"}], f"{PATH}[0].batch_images", "is unknown"),
    ([{**IMAGE, "output_dir": "/etc"}], f"{PATH}[0].output_dir", "is unknown"),
    ([{**IMAGE, "wieght": 1}], f"{PATH}[0].wieght", "did you mean 'weight'?"),
    ([{**IMAGE, "weight": 3}], f"{PATH}[0].weight", "a number from 0 to 2"),
    ([{**IMAGE, "resize_mode": 3}], f"{PATH}[0].resize_mode", "must be one of Just Resize"),
    ([{**IMAGE, "resize_mode": True}], f"{PATH}[0].resize_mode", "must be one of Just Resize"),
    ([{**IMAGE, "control_mode": "Mine"}], f"{PATH}[0].control_mode", "must be one of Balanced"),
    ([{**IMAGE, "guidance_start": 0.9, "guidance_end": 0.1}], f"{PATH}[0].guidance_start", "must not be above"),
    ([{"enabled": True, "mask": PICTURE}], f"{PATH}[0].mask", "must come with image"),
    ([IMAGE, "canny"], f"{PATH}[1]", "must be a unit, an object"),
    ([IMAGE] * 11, PATH, "has more than 10 arguments"),
    ([IMAGE] * 9, f"{PATH}[8].image", "one picture more than the 8"),
]


@pytest.mark.parametrize(("units", "path", "message"), WRONG)
def test_what_a_unit_of_controlnet_may_not_hold(units: list[Any], path: str, message: str) -> None:
    (complaint, *others) = complaints({"prompt": "x", **controlnet(*units)})

    assert complaint.path == path and message in complaint.message
    assert others == []
    assert "/etc" not in complaint.message


def test_all_complaints_about_units_come_at_once() -> None:
    found = complaints(
        {"prompt": "x", **controlnet({**IMAGE, "weight": 9, "nope": 1}, {**IMAGE, "image": "!!!"}), "steps": 0}
    )

    assert [complaint.path for complaint in found] == [
        *(f"{PATH}[0].weight", f"{PATH}[0].nope", f"{PATH}[1].image", "steps")
    ]


# -- ADetailer

UNIT = {"ad_model": "face_yolov8n.pt"}
EYES = {**UNIT, "ad_prompt": "eyes"}

# arguments as clients write them, and what is passed on
ARGUMENTS: list[tuple[list[Any], list[Any]]] = [
    ([True, False, UNIT], [True, False, UNIT]),
    ([UNIT], [True, False, UNIT]),
    ([True, UNIT], [True, False, UNIT]),
    ([True, True, UNIT, {"ad_model": "None"}], [True, True, UNIT]),
    ([UNIT, {**UNIT, "ad_tab_enable": False}, EYES], [True, False, UNIT, EYES]),
    ([True], [True, False]),  # A1111's own unit would run: refused when the WebUI's lists are known
]


@pytest.mark.parametrize(("written", "passed"), ARGUMENTS)
def test_the_arguments_of_adetailer_are_written_in_full(written: list[Any], passed: list[Any]) -> None:
    assert args_of(parse(**adetailer(*written))) == passed


WRONG_ADETAILER: list[tuple[dict[str, Any], str, str]] = [
    ({"nope": 1}, "nope", "is unknown"),  # ADetailer drops such a unit, in its log alone
    ({"ad_model": 5}, "ad_model", "must be text"),
    ({"ad_confidence": 2}, "ad_confidence", "a number from 0 to 1"),
    ({"ad_steps": 500}, "ad_steps", "a whole number from 1 to 150"),
    ({"ad_use_checkpoint": True}, "ad_use_checkpoint", "is refused: the checkpoint is this worker's"),
    ({"ad_use_vae": True}, "ad_use_vae", "is refused"),
    ({"ad_use_sampler": True}, "ad_use_sampler", "is refused: a unit samples as its job does"),
    ({"ad_restore_face": True}, "ad_restore_face", "is refused: use restore_faces"),
    ({"ad_controlnet_model": "inpaint"}, "ad_controlnet_model", "is refused: use a unit of ControlNet"),
    ({"ad_prompt": "eyes <lora:detail:1>"}, "ad_prompt", "must have no LoRA tags"),
]


@pytest.mark.parametrize(("members", "key", "message"), WRONG_ADETAILER)
def test_what_a_unit_of_adetailer_may_not_hold(members: dict[str, Any], key: str, message: str) -> None:
    (complaint,) = complaints({"prompt": "x", **adetailer(True, False, {**UNIT, **members})})

    assert complaint.path == f"alwayson_scripts.ADetailer.args[2].{key}"
    assert message in complaint.message


def test_every_key_of_adetailer_is_known() -> None:
    recorded = json.loads((DATA / "webui-1.10.1/extensions/adetailer_v1_schema.json").read_text())

    assert set(adetailer_keys(LIMITS)) == set(recorded["response"]["body"]["properties"])


def test_no_key_of_controlnet_is_known_that_reads_a_file_or_belongs_to_the_page() -> None:
    dangerous = {"ipadapter_input", "batch_images", "output_dir", "batch_mask_dir", "is_ui", "input_mode", "loopback"}

    assert not dangerous & set(controlnet_keys(LIMITS))


# -- anything at all

TEXTS = st.text(max_size=6) | st.sampled_from([PICTURE, "/etc/passwd", "None", "canny"])
PLAIN = st.none() | st.booleans() | st.integers(-5, 3000) | st.floats(-9, 9, width=16) | TEXTS
INNER_KEYS = st.sampled_from(["image", "mask", "name", "url"])
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(INNER_KEYS, inner, max_size=3),
    max_leaves=4,
)
KNOWN = {*controlnet_keys(LIMITS), *adetailer_keys(LIMITS)}
KEYS = st.sampled_from([*sorted(KNOWN), "input_image", "lowvram", "ipadapter_input", "x"])
ARGS = st.lists(VALUES | st.dictionaries(KEYS, VALUES, max_size=6) | st.just(IMAGE), max_size=5)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["ControlNet", "adetailer"]), ARGS)
def test_whatever_a_unit_holds_only_known_keys_and_pictures_are_passed_on(script: str, args: list[Any]) -> None:
    try:
        request = parse(alwayson_scripts={script: {"args": args}})
    except InvalidRequest:
        return

    for unit in request.body.get("alwayson_scripts", {}).get(script, {}).get("args", ()):
        assert isinstance(unit, (dict, bool))
        assert isinstance(unit, bool) or set(unit) <= KNOWN - {"image", "mask"}  # these come in when they are prepared
    assert all(source.base64 == PICTURE for source in request.pictures.values())


# -- the answer


def test_the_parameters_of_an_answer_repeat_no_picture() -> None:
    unit = {"enabled": True, "module": "canny", "image": PICTURE, "mask": None}
    parameters = {"prompt": "x", "alwayson_scripts": {"controlnet": {"args": [unit]}, "other": {"args": [PICTURE]}}}

    shown = without_pictures(parameters)

    assert shown["alwayson_scripts"]["controlnet"]["args"] == [{**unit, "image": None}]
    assert shown["alwayson_scripts"]["other"] == {"args": [PICTURE]}
    assert without_pictures({"prompt": "x"}) == {"prompt": "x"}
    assert without_pictures(None) is None


def test_maps_are_expected_only_of_units_that_keep_theirs() -> None:
    units = [{"enabled": True, "save_detected_map": True}, {"enabled": True, "save_detected_map": False}]

    assert detected_maps({"alwayson_scripts": {"controlnet": {"args": [*units, {"enabled": False}]}}}) == 1
    assert detected_maps({}) == 0


def _context() -> Any:
    from a1111_worker.context import Deadline, JobContext

    return JobContext(Deadline(20))

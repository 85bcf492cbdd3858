"""Units against what the WebUI has: whole jobs against the sandbox's ControlNet and ADetailer."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from a1111_worker.webui.client import WebUI
from a1111_worker.webui.extensions import ANNOTATOR_FILES, NEEDS_NO_FILE
from image.pins import PINS, read_pins
from sandbox.models import sdxl_lora
from sandbox.webui_extensions import controlnet_modules
from tests.support import World, world

ANNOTATOR = "ControlNetAnnotators/hed/ControlNetHED.pth"


def picture(colour: str = "teal", side: int = 64) -> str:
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


PICTURE = picture()
UNIT = {"enabled": True, "image": PICTURE, "module": "canny", "model": "canny_xl"}


@pytest.fixture(scope="module")
def it(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A worker and a WebUI with both extensions, a model of ControlNet, an annotator, and a detector."""
    with world(tmp_path_factory.mktemp("world"), boot=False) as made:
        for path in ("ControlNet/canny_xl.safetensors", ANNOTATOR, "adetailer/face_yolov8n.pt"):
            (made.webui_models / path).parent.mkdir(parents=True, exist_ok=True)
            (made.webui_models / path).write_bytes(b"weights")
        made.webui.extensions = ("adetailer", "controlnet")
        made.webui.restart()
        made.boot()
        yield made


def controlnet(*units: Any) -> dict[str, Any]:
    return {"alwayson_scripts": {"ControlNet": {"args": list(units)}}}


def adetailer(*args: Any) -> dict[str, Any]:
    return {"alwayson_scripts": {"ADetailer": {"args": list(args)}}}


def sent(it: World) -> Any:
    """The arguments of the one script in the last request to the WebUI."""
    (script,) = it.generations()[-1]["alwayson_scripts"].values()
    return script["args"]


# units that can be used: module, model, and what is sent for them
USABLE = [
    ("canny", "canny_xl", "canny", "canny_xl [e3b0c442]"),
    ("Canny", "Canny_XL [e3b0c442]", "canny", "canny_xl [e3b0c442]"),
    ("softedge_hed", "canny_xl", "hed", "canny_xl [e3b0c442]"),  # what A1111's page calls it
    ("reference_only", "None", "reference_only", "None"),
    ("reference_only", "nope", "reference_only", "None"),  # it has no model
    ("none", "canny_xl", "none", "canny_xl [e3b0c442]"),
]


@pytest.mark.parametrize(("module", "model", "sent_module", "sent_model"), USABLE)
def test_a_unit_is_sent_under_the_extensions_own_names_and_changes_the_picture(
    it: World, module: str, model: str, sent_module: str, sent_model: str
) -> None:
    plain = it.ask()

    answer = it.ask(**controlnet({**UNIT, "module": module, "model": model}))

    assert answer.get("error") is None
    assert answer["images"] != plain["images"] and len(answer["images"]) == 1
    first, *others = sent(it)
    assert (first["module"], first["model"]) == (sent_module, sent_model)
    assert others == [{"enabled": False}] * 2  # as many as it runs
    assert first["image"].startswith("iVBORw0KGgo") and PICTURE not in json.dumps(answer)
    assert answer["parameters"]["alwayson_scripts"]["controlnet"]["args"][0]["image"] is None


def test_a_detected_map_is_in_the_answer_only_if_the_job_wants_it(it: World) -> None:
    answer = it.ask(**controlnet({**UNIT, "save_detected_map": True}))

    assert len(answer["images"]) == 2
    assert answer["worker"]["seeds"] == [42, None]


# units that A1111 would answer with a plain picture and all their keys
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (
        {"model": "None"},
        ".model",
        "is required; these are there: 'canny_xl [e3b0c442]'",
    ),
    ({"model": None}, ".model", "is required"),
    ({"module": "cany"}, ".module", "unknown module 'cany'; the nearest: 'canny'"),
    ({"module": "openpose"}, ".module", "'openpose' needs files that are not in this image"),
    ({"module": "depth_zoe"}, ".module", "'depth_zoe' needs files that are not in this image"),
    ({"image": None}, ".image", "is required"),
]


@pytest.mark.parametrize(("changes", "path", "message"), REFUSED)
def test_a_unit_that_would_do_nothing_is_refused(it: World, changes: dict[str, Any], path: str, message: str) -> None:
    before = len(it.generations())

    answer = it.ask(**controlnet({**UNIT, **changes}))

    assert answer["code"] == "INVALID_REQUEST"
    (complaint,) = answer["complaints"]
    assert complaint["path"] == f"alwayson_scripts.ControlNet.args[0]{path}"
    assert message in complaint["message"]
    assert len(it.generations()) == before


def test_a_model_may_be_a_reference_and_is_fetched_shown_and_listed(it: World) -> None:
    url = it.civitai.storage.publish(sdxl_lora(it.folder / "depth.safetensors", 77, 300_000), "/depth_xl.safetensors")
    unit = {**UNIT, "model": {"url": url, "name": "Depth XL"}}
    plain = it.ask()

    first = it.ask(**controlnet(unit))
    (file,) = (it.models_dir / "controlnet").glob("*.safetensors")
    again = it.ask(**controlnet({**UNIT, "model": file.stem}))

    assert first["images"] != plain["images"] and first["images"] == again["images"]
    (link,) = (link for link in (it.webui_models / "ControlNet").iterdir() if link.is_symlink())
    assert link.resolve() == file and link.stem.startswith(file.stem)
    assert sent(it)[0]["model"].startswith(f"{link.stem} [")


@pytest.mark.parametrize(("model", "code"), [("nope", "MODEL_NOT_FOUND"), ({"version_id": 1}, "MODEL_NOT_FOUND")])
def test_a_model_that_nobody_has_ends_the_job(it: World, model: Any, code: str) -> None:
    before = len(it.generations())

    answer = it.ask(**controlnet({**UNIT, "model": model}), on_lora_error="warn")

    assert answer["code"] == code and len(it.generations()) == before


def test_models_of_controlnet_can_be_prefetched(it: World) -> None:
    url = it.civitai.storage.publish(sdxl_lora(it.folder / "pose.safetensors", 78, 300_000), "/pose.safetensors")

    answer = it.run({"id": "job-1", "input": {"task": "prefetch", "controlnet_models": [{"url": url, "name": "Pose"}]}})

    (outcome,) = answer["prefetch"]["controlnet_models"]
    assert outcome["downloaded"] and (it.models_dir / "controlnet" / outcome["file"]).exists()


def test_a_fourth_unit_is_refused_where_a1111_would_drop_it(it: World) -> None:
    answer = it.ask(**controlnet(*[UNIT] * 4))

    assert answer["complaints"][0]["path"] == "alwayson_scripts.ControlNet.args[3]"
    assert "this WebUI runs 3" in answer["complaints"][0]["message"]


def test_in_img2img_a_unit_may_use_the_jobs_own_picture(it: World) -> None:
    body: dict[str, Any] = {"task": "img2img", "init_images": [PICTURE], "denoising_strength": 0.5}

    answer = it.ask(**body, **controlnet({**UNIT, "image": None}))

    assert answer.get("error") is None


def test_a_detector_runs_and_the_list_of_units_is_full(it: World) -> None:
    plain = it.ask()

    answer = it.ask(**adetailer({"ad_model": "Face_yolov8n.pt", "ad_confidence": 0.5}))

    assert answer["images"] != plain["images"]
    assert sent(it) == [True, False, {"ad_model": "face_yolov8n.pt", "ad_confidence": 0.5}, *[{"ad_model": "None"}] * 3]
    assert "ADetailer model 2nd" not in answer["info"]


REFUSED_ADETAILER = [
    ([{"ad_model": "hand_yolov8n.pt"}], "unknown detector 'hand_yolov8n.pt'; the nearest: 'face_yolov8n.pt'"),
    ([True], "must have a unit with ad_model"),
    ([{"ad_model": "face_yolov8n.pt"}] * 5, "has 5 units, and this WebUI runs 4"),
]


@pytest.mark.parametrize(("args", "message"), REFUSED_ADETAILER)
def test_a_detector_that_would_do_nothing_is_refused(it: World, args: list[Any], message: str) -> None:
    answer = it.ask(**adetailer(*args))

    (complaint,) = answer["complaints"]
    assert complaint["path"] == "alwayson_scripts.ADetailer.args" and message in complaint["message"]


def test_a_webui_that_does_not_tell_what_an_extension_has_gets_no_units(tmp_path: Path) -> None:
    with world(tmp_path, boot=False) as old:
        old.webui.extensions = ("adetailer", "controlnet")
        old.webui.restart()
        old.webui.extensions = ()  # its scripts are still listed, its endpoints are gone
        old.boot()

        answer = old.ask(**controlnet(UNIT))
        plain = old.ask()

    assert "this WebUI does not list what the extension has" in answer["error"]
    assert "error" not in plain


def test_every_file_of_an_annotator_is_pinned_and_every_module_is_known() -> None:
    pins = read_pins(PINS.read_text(encoding="utf-8"))
    pinned = {str(pin.path) for pin in pins if pin.argument == "CONTROLNET_ANNOTATORS"}

    assert {f"ControlNetAnnotators/{file}" for files in ANNOTATOR_FILES.values() for file in files} == pinned
    assert {*ANNOTATOR_FILES, *NEEDS_NO_FILE} <= set(controlnet_modules()["module_list"])
    assert not set(ANNOTATOR_FILES) & set(NEEDS_NO_FILE)


def test_the_lists_of_the_extensions_are_read(it: World) -> None:
    webui = WebUI(it.webui.url)

    assert "canny_xl [e3b0c442]" in webui.controlnet_models()
    assert webui.controlnet_units() == 3
    assert webui.controlnet_modules()["reference_only"] and not webui.controlnet_modules()["canny"]
    assert webui.adetailer_models()[0] == "face_yolov8n.pt"
    assert (webui.script_argument_count("adetailer"), webui.script_argument_count("nope")) == (6, 0)

"""Bodies of A1111 as they are read, and as jobs."""

from __future__ import annotations

import base64
import io
import json
import random
from typing import Any

import pytest
from PIL import Image

from a1111_client.gateway.bodies import fields, read
from a1111_client.gateway.errors import InvalidFields, Refused
from a1111_client.gateway.options import CHANGES_THE_PICTURE, OptionsStore, webui_defaults
from a1111_client.gateway.sizes import body_size, fit
from a1111_client.gateway.translate import generation_input
from a1111_client.snapshot import Snapshot, default_snapshot
from a1111_worker.catalog import CHECKPOINT_FILE, LORAS
from tests.client.scripted import models_answer
from tests.support import DATA

SNAPSHOT = Snapshot(models_answer(webui={"prompt-styles": [{"name": "noir"}]}))
ALWAYS = {"prompt": "x", "steps": 50, "cfg_scale": 7.0, "width": 512, "height": 512, "sampler_name": "Euler"}


def job(body: dict[str, Any], path: str = "txt2img", snapshot: Snapshot = SNAPSHOT) -> dict[str, Any]:
    return generation_input(path, read(path, {"prompt": "x", **body}), snapshot, OptionsStore())


def test_what_a_body_leaves_out_is_a1111s_default_not_the_workers() -> None:
    assert job({}) == ALWAYS


READ = [
    # as pydantic 1 converts
    ({"steps": "25"}, {"steps": 25}),
    ({"steps": 25.9}, {"steps": 25}),
    ({"cfg_scale": "7.5"}, {"cfg_scale": 7.5}),
    ({"seed": "-1"}, {"seed": -1}),
    ({"seed": 1234.0}, {"seed": 1234}),
    ({"restore_faces": 1}, {"restore_faces": True}),
    ({"tiling": "on"}, {"tiling": True}),
    ({"restore_faces": 0}, {}),
    ({"batch_size": None, "steps": None, "seed": None, "denoising_strength": None, "styles": None}, {}),
    # prompts, sizes and seeds that A1111 takes
    ({"prompt": " "}, {"prompt": "()"}),
    ({"width": 515, "height": "770"}, {"width": 512, "height": 768}),
    ({"seed": 2**63 - 1}, {"seed": 2**32 - 1}),
    # unknown fields, and what somebody's password is in
    ({"url": "http://x", "auth": "me:secret", "clip_skip": 2, "selection_info": {}}, {}),
    ({"save_images": True, "do_not_save_grid": False, "send_images": True}, {}),
    ({"override_settings_restore_afterwards": False, "force_task_id": "x"}, {}),
    # names in fields that are not used
    ({"enable_hr": False, "hr_scale": "1.0", "hr_upscaler": "ESRGAN_4x", "denoising_strength": 0.6}, {}),
    ({"hr_checkpoint_name": None, "hr_additional_modules": []}, {}),
    ({"styles": ["None", "gone"]}, {}),
    ({"styles": ["noir", "gone"]}, {"styles": ["noir"]}),
    ({"script_name": None, "script_args": [1]}, {}),
    ({"refiner_checkpoint": "", "refiner_switch_at": 0.8}, {}),
    ({"disable_extra_networks": False, "infotext": "", "firstphase_width": 0}, {}),
    # the second pass
    (
        {"enable_hr": True, "hr_scale": "1.5", "denoising_strength": "0.75", "hr_second_pass_steps": 15.0},
        {"enable_hr": True, "hr_scale": 1.5, "denoising_strength": 0.75, "hr_second_pass_steps": 15},
    ),
    ({"enable_hr": True, "hr_checkpoint_name": "house"}, {"enable_hr": True}),
    ({"enable_hr": True, "hr_sampler_name": "Use same sampler"}, {"enable_hr": True}),
    # samplers
    ({"sampler_index": "Euler a"}, {"sampler_name": "Euler a"}),
    ({"sampler_name": "DDIM", "sampler_index": "Euler"}, {"sampler_name": "DDIM"}),
    ({"sampler_name": "", "sampler_index": "PLMS"}, {"sampler_name": "PLMS"}),
    ({"sampler_name": "DPM++ 2M", "scheduler": "karras"}, {"sampler_name": "DPM++ 2M", "scheduler": "karras"}),
    ({"sampler_name": "DPM++ 2M Karras", "scheduler": "normal"}, {"sampler_name": "DPM++ 2M Karras"}),
    ({"scheduler": "automatic"}, {"scheduler": "automatic"}),
    ({"scheduler": "SGM Uniform"}, {"scheduler": "SGM Uniform"}),
    ({"scheduler": "nobody's"}, {}),
    # settings
    ({"override_settings": {"sd_model_checkpoint": "house.safetensors"}}, {}),
    ({"override_settings": {"sd_model_checkpoint": "ababababab"}}, {}),
    ({"override_settings": {"sd_model_checkpoint": "garden"}}, {"checkpoint": "Garden"}),
    ({"override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": None}}, {}),
    ({"override_settings": {"CLIP_stop_at_last_layers": "2"}}, {"override_settings": {"CLIP_stop_at_last_layers": 2}}),
    ({"override_settings": {"ddim_discretize": "uniform", "img2img_fix_steps": False, "sd_hypernetwork": "None"}}, {}),
    ({"override_settings": {"nobody": 1, "grid_format": "jpg", "samples_save": True}}, {}),
    ({"override_settings": {"face_restoration_model": "GFPGAN", "inpainting_mask_weight": 0.5}}, {}),  # neither is used
    ({"override_settings": {"face_restoration_model": "CodeFormer"}, "restore_faces": 1}, {"restore_faces": True}),
    (
        {"override_settings": {"face_restoration_model": "GFPGAN"}, "restore_faces": True},
        {"restore_faces": True, "override_settings": {"face_restoration_model": "GFPGAN"}},
    ),
    ({"override_settings": {"samples_format": "jpg"}}, {"output": {"format": "jpeg"}}),
    # always-on scripts
    ({"alwayson_scripts": {}}, {}),
    ({"alwayson_scripts": {"ControlNet": {"args": []}, "ADetailer": {"args": [False, {"ad_model": "face"}]}}}, {}),
    ({"alwayson_scripts": {"controlnet": {"args": [{"enabled": False}]}}}, {}),
    ({"alwayson_scripts": {"ADetailer": {"args": [{"ad_model": "None"}]}, "refiner": {"args": [True]}}}, {}),
    ({"alwayson_scripts": {"Hypertile": {"args": [True]}}}, {"alwayson_scripts": {"Hypertile": {"args": [True]}}}),
]


@pytest.mark.parametrize(("body", "differs"), READ)
def test_a_body_becomes_a_job_that_says_no_more_than_it_has_to(body: dict[str, Any], differs: dict[str, Any]) -> None:
    assert job(body) == {**ALWAYS, **differs}


REFUSED = [
    ({"alwayson_scripts": {"ControlNet": {"args": [{"image": "x"}]}}}, 422, "Script 'ControlNet' not found"),
    ({"alwayson_scripts": {"ADetailer": {"args": [{"ad_model": "face"}]}}}, 422, "Script 'ADetailer' not found"),
    ({"script_name": "nope"}, 422, "Script 'nope' not found"),
    ({"override_settings": {"sd_model_checkpoint": "cellar"}}, 404, "there is no checkpoint 'cellar'"),
    ({"override_settings": {"sd_unet": "x", "rho": 2}}, 422, "override_settings: rho, sd_unet: cannot be changed"),
    ({"override_settings": {"code_former_weight": 0.1}, "restore_faces": True}, 422, "cannot be changed"),
    ({"override_settings": {"samples_format": "avif"}}, 422, "samples_format: must be one of"),
]


@pytest.mark.parametrize(("body", "status", "reason"), REFUSED)
def test_what_would_change_the_picture_and_cannot_be_done_is_refused(
    body: dict[str, Any], status: int, reason: str
) -> None:
    with pytest.raises(Refused) as caught:
        job(body)

    assert caught.value.status == status
    assert reason in caught.value.body["detail"]


def test_an_endpoint_that_was_never_asked_may_have_more_than_the_default_list() -> None:
    body = {"override_settings": {"sd_model_checkpoint": "cellar"}, "alwayson_scripts": {"ADetailer": {"args": [True]}}}

    assert job({**body, "script_name": "nope"}, snapshot=default_snapshot()).items() >= {
        ("checkpoint", "cellar"),
        ("script_name", "nope"),
    }


def test_img2img_needs_a_picture() -> None:
    with pytest.raises(Refused, match="Init image not found"):
        job({"init_images": []}, "img2img")

    given = job({"init_images": ["x"], "mask": "y", "mask_blur": 4.0, "inpaint_full_res": 1}, "img2img")
    assert given.items() >= {("task", "img2img"), ("mask", "y"), ("mask_blur", 4), ("inpaint_full_res", True)}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "x", [], {}])
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(InvalidFields):
        read("txt2img", {"cfg_scale": value})


def test_the_fields_are_those_of_a1111s_own_document() -> None:
    document = json.loads((DATA / "webui-1.10.1" / "openapi.json").read_text(encoding="utf-8"))
    schemas = document["components"]["schemas"]
    names = {"txt2img": "StableDiffusionProcessingTxt2Img", "img2img": "StableDiffusionProcessingImg2Img"}

    for path, name in names.items():
        assert {field: about.get("default") for field, about in fields(path).items()} == {
            field: about.get("default") for field, about in schemas[name]["properties"].items()
        }
    assert set(webui_defaults()["options"]) >= CHANGES_THE_PICTURE


def test_the_default_lists_are_the_workers_own() -> None:
    snapshot = default_snapshot()

    assert [checkpoint.file for checkpoint in snapshot.checkpoints] == [CHECKPOINT_FILE]
    assert [entry["file"] for entry in snapshot.catalog] == [lora.file for lora in LORAS]


# -- the rule of 10 MB ------------------------------------------------------------------------------------------------


def noise(side: int, kind: str = "png") -> str:
    """A picture that no encoder makes small, as base64."""
    file = io.BytesIO()
    Image.frombytes("RGB", (side, side), random.Random(1).randbytes(side * side * 3)).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def test_pictures_are_encoded_anew_if_runpod_would_refuse_the_job(caplog: pytest.LogCaptureFixture) -> None:
    given = {"prompt": "x" * 100, "init_images": [noise(400)], "mask": noise(400)}
    limit = body_size(given) * 3 // 4

    smaller = fit(given, limit)

    assert body_size(smaller) <= limit
    assert smaller["prompt"] == given["prompt"]
    picture = Image.open(io.BytesIO(base64.b64decode(smaller["init_images"][0])))
    assert picture.format == "WEBP"
    assert "its pictures were encoded as WebP" in caplog.text


def test_what_fits_is_not_touched() -> None:
    given = {"init_images": [noise(200)]}

    assert fit(given, body_size(given)) is given


def test_a_job_that_stays_too_large_is_refused_with_the_sizes() -> None:
    with pytest.raises(Refused) as caught:
        fit({"prompt": "x" * 200_000, "init_images": ["no picture" * 20_000]}, 100_000)

    assert caught.value.status == 413
    assert "has 0.4 MB and RunPod takes 0.1 MB" in caught.value.body["detail"]

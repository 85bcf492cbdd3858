"""What programs with A1111's API send is a job, unless it asks for what would change the picture and cannot be done."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from a1111_worker.context import JobContext
from a1111_worker.domain import GenerationRequest, Model, ModelKind, UpscaleRequest
from a1111_worker.errors import InvalidRequest
from a1111_worker.pictures.prepare import PicturePreparer
from a1111_worker.request.fields import Limits
from a1111_worker.request.img2img import fit_pictures
from a1111_worker.request.parse import parse_request
from a1111_worker.request.upscale import fit_upscale
from a1111_worker.webui.checkpoint import checkpoint_names
from a1111_worker.webui.extras import resolve_extras
from a1111_worker.webui.resolution import resolve
from a1111_worker.webui.responses import Style
from tests.support import DATA, parse_generation
from tests.webui.test_composition import lists

SHA256 = "0123456789" + "ab" * 27
CHECKPOINT = Model(ModelKind.CHECKPOINT, "Tiny", "tiny.safetensors", Path("x"), SHA256, 1)
LISTS = replace(lists(), styles={"anime": Style("anime")}, checkpoint_names=checkpoint_names(CHECKPOINT))


TASKS = {
    "txt2img": "txt2img",
    "img2img": "img2img",
    "extra-single-image": "upscale",
    "extra-batch-images": "upscale",
    "png-info": "png_info",
}
"""The endpoints of A1111 that a job can be, and its task."""


def bodies() -> Iterator[Any]:
    """Every body that was recorded, or read in a client's source, with the task that it is for."""
    for path in sorted((DATA / "clients").glob("*.json")):
        recorded = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(recorded, list):
            for entry in recorded:
                yield pytest.param({**entry["body"], "task": entry.get("task", "txt2img")}, id=entry["client"])
        elif path.stem != "webuiapi_controlnet":
            for exchange in recorded["requests"]:
                if task := TASKS.get(exchange["path"].rpartition("/")[2]):
                    yield pytest.param({**exchange["body"], "task": task}, id=path.stem)


def resolved(body: dict[str, Any]) -> GenerationRequest:
    return resolve(parse_generation(body, Limits()), LISTS)


@pytest.mark.parametrize("body", list(bodies()))
def test_what_a_client_sends_is_a_job(body: dict[str, Any]) -> None:
    request = parse_request(body, Limits())
    if not isinstance(request, GenerationRequest):
        return
    request = resolve(request, LISTS)

    assert len(request.warnings) <= 1
    assert "user:pass" not in json.dumps([request.body, request.warnings])  # the password that SillyTavern sends along


@pytest.mark.parametrize("name", ["img2img", "inpaint", "extra_single_image", "extra_batch_images"])
def test_what_a_client_sends_with_pictures_is_a_job(name: str) -> None:
    recorded = json.loads((DATA / "clients" / f"webuiapi_{name}.json").read_text())
    (body,) = (exchange["body"] for exchange in recorded["requests"])
    prepare = PicturePreparer().prepare

    if name in ("img2img", "inpaint"):
        request = parse_generation({"task": "img2img", **body}, Limits())
        found = resolve(fit_pictures(request, prepare(request.pictures, JobContext()), Limits()), LISTS)
        assert len(found.body["init_images"]) == 1
        assert len(found.warnings) == 1  # what is dropped
    else:
        upscale = parse_request({"task": "upscale", **body}, Limits())
        assert isinstance(upscale, UpscaleRequest)
        fitted = fit_upscale(resolve_extras(upscale, LISTS), prepare(upscale.pictures, JobContext()), Limits())
        assert len(fitted.images) == len(body.get("imageList", [1]))
        assert len(fitted.warnings) == 1


def test_what_cannot_be_done_is_refused() -> None:
    """webuiapi's unit of ControlNet, and the plain job after it that still carries the unit."""
    recorded = json.loads((DATA / "clients" / "webuiapi_controlnet.json").read_text())

    for exchange in recorded["requests"]:
        if exchange["path"].endswith("/txt2img"):
            with pytest.raises(InvalidRequest) as refused:
                resolved(exchange["body"])
            assert [str(complaint) for complaint in refused.value.complaints] == [
                "alwayson_scripts.ControlNet: the script 'ControlNet' is not in this image"
            ]


NAMES_OF_CHECKPOINT = (
    "tiny.safetensors [0123456789]",
    "tiny_01234567.safetensors [0123456789]",
    "tiny.safetensors",
    "tiny",
    "tiny_01234567",
    "0123456789",
    SHA256,
    "Tiny",
    "TINY ",
)

# what is dropped: the field, and the path that the warning names
DROPPED = [
    ({"save_images": True}, "save_images"),
    ({"save_images": False}, "save_images"),
    ({"send_images": True}, "send_images"),
    ({"do_not_save_samples": False}, "do_not_save_samples"),
    ({"do_not_save_samples": True}, "do_not_save_samples"),
    ({"do_not_save_grid": False}, "do_not_save_grid"),
    ({"override_settings_restore_afterwards": False}, "override_settings_restore_afterwards"),
    ({"override_settings_restore_afterwards": True}, "override_settings_restore_afterwards"),
    ({"samples_format": "png"}, "samples_format"),
    ({"return_grid": True}, "return_grid"),
    ({"override_settings": {"samples_format": "jpg"}}, "override_settings.samples_format"),
    ({"override_settings": {"return_grid": True}}, "override_settings.return_grid"),
    ({"override_settings": {"sd_hypernetwork": "None"}}, "override_settings.sd_hypernetwork"),
    ({"styles": [""]}, "styles[0]"),
    ({"styles": ["None"]}, "styles[0]"),
    # names of hires, even such that are not there
    ({"hr_upscaler": "ESRGAN_4x"}, "hr_upscaler"),
    ({"enable_hr": False, "hr_sampler_name": "nobody"}, "hr_sampler_name"),
    ({"hr_scheduler": "nobody"}, "hr_scheduler"),
    ({"hr_checkpoint_name": "other.safetensors"}, "hr_checkpoint_name"),
    # the checkpoint that is there, in each of its forms
    *(
        ({"override_settings": {"sd_model_checkpoint": name}}, "override_settings.sd_model_checkpoint")
        for name in NAMES_OF_CHECKPOINT
    ),
    # extensions with nothing enabled
    ({"alwayson_scripts": {"ControlNet": {"args": [{"enabled": False}, {}]}}}, "alwayson_scripts.ControlNet"),
    ({"alwayson_scripts": {"controlnet": {"args": []}}}, "alwayson_scripts.controlnet"),
    ({"alwayson_scripts": {"ADetailer": {"args": [False, False, {"ad_model": "x"}]}}}, "alwayson_scripts.ADetailer"),
    ({"alwayson_scripts": {"ADetailer": {"args": [True, False, {"ad_model": "None"}]}}}, "alwayson_scripts.ADetailer"),
    ({"alwayson_scripts": {"ADetailer": {}}}, "alwayson_scripts.ADetailer"),
    # the new name of a sampler wins
    ({"sampler_name": "Euler a", "sampler_index": "DDIM"}, "sampler_index"),
    ({"sampler_index": "Euler a", "sampler": "Euler a"}, "sampler"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "path"), DROPPED)
def test_what_cannot_change_the_picture_is_dropped_with_a_warning(given: dict[str, Any], path: str) -> None:
    plain = resolved({"prompt": "a lighthouse", "sampler_name": "Euler a"})

    request = resolved({"prompt": "a lighthouse", "sampler_name": "Euler a", **given})

    assert request.warnings == (f"dropped, because it cannot change the pictures: '{path}'",)
    assert {**request.body, "enable_hr": False} == {**plain.body, "enable_hr": False}


def test_one_warning_names_all_that_was_dropped() -> None:
    given = {"prompt": "x", "save_images": True, "styles": ["None"], "url": "http://x", "auth": "secret"}

    (warning,) = resolved(given).warnings

    assert warning == "dropped, because it cannot change the pictures: 'save_images', 'url', 'auth', 'styles[0]'"


# what would change the picture
REFUSED = [
    ({"send_images": False}, "send_images: is refused: the pictures are the answer"),
    (
        {"override_settings": {"sd_model_checkpoint": "other"}},
        "override_settings.sd_model_checkpoint: is refused: the checkpoint is this worker's, not the job's; it is "
        "'tiny_01234567.safetensors [0123456789]'",
    ),
    ({"alwayson_scripts": {"ADetailer": {"args": [True]}}}, "the script 'ADetailer' is not in this image"),
    ({"alwayson_scripts": {"ADetailer": {"args": [{"ad_model": "face"}]}}}, "'ADetailer' is not in this image"),
    ({"alwayson_scripts": {"ControlNet": {"args": [{"enabled": True}]}}}, "'ControlNet' is not in this image"),
    # a script that no job may use is not suggested
    ({"alwayson_scripts": {"seeds": {"args": []}}}, "alwayson_scripts.seeds: the script 'seeds' is not in this image"),
    ({"alwayson_scripts": {"hypertil": {"args": []}}}, "is not in this image; the nearest: 'Hypertile'"),
    ({"script_name": "prompt matrx"}, "is not in this image; the nearest: 'prompt matrix'"),
    ({"sampler": "DDIM"}, "sampler: is unknown; did you mean 'sampler_name'?"),
    ({"override_settings": {"sd_hypernetwork": "anime"}}, "not a setting that a job may override"),
    ({"enable_hr": True, "denoising_strength": 0.5, "hr_checkpoint_name": "x"}, "hr_checkpoint_name: is refused"),
]


@pytest.mark.parametrize(("given", "sentence"), REFUSED)
def test_what_would_change_the_picture_and_cannot_be_done_is_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        resolved({"prompt": "a lighthouse", **given})

    (complaint,) = refused.value.complaints
    assert sentence in str(complaint)
    assert complaint.message.endswith("in this image") or "list" not in complaint.message


@pytest.mark.parametrize("recording", ["webui-1.9.3/txt2img_full", "webui-1.10.1/full_txt2img_ok"])
def test_the_parameters_of_a1111s_own_answer_are_a_job(recording: str) -> None:
    recorded = json.loads((DATA / f"{recording}.json").read_text())
    parameters = recorded.get("response", {}).get("body", recorded)["parameters"]
    assert len(parameters) > 40  # A1111 echoes every field, with its defaults

    request = resolved(parameters)

    assert request.body["prompt"] == parameters["prompt"]
    assert len(request.warnings) <= 1

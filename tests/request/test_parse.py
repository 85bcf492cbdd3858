"""A job is parsed as a whole: what it becomes, and every complaint at once."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1111_worker.domain import DeliveryMode, GenerationRequest, ImageFormat, OutputOptions
from a1111_worker.errors import Complaint, InvalidRequest
from a1111_worker.request.fields import FieldClass, Limits
from a1111_worker.request.generating import DEFAULT_SAMPLER
from a1111_worker.request.loras import scale_of
from a1111_worker.request.reader import MAX_COMPLAINTS
from a1111_worker.request.size import final_size
from a1111_worker.request.txt2img import txt2img_fields
from tests.request.helpers import LIMITS, URL, complaints, parse
from tests.support import parse_generation

NAN, INF = float("nan"), float("inf")


# -- what a good job becomes ------------------------------------------------------------------------------------------


def test_a_prompt_alone_gets_our_defaults_and_nothing_else() -> None:
    request = parse_generation({"prompt": "a lighthouse"}, LIMITS)

    assert request == GenerationRequest(
        {
            "prompt": "a lighthouse",
            "steps": 25,
            "cfg_scale": 7,
            "width": 1024,
            "height": 1024,
            "sampler_name": DEFAULT_SAMPLER,
        }
    )


FULL = {
    "prompt": "a lighthouse",
    "negative_prompt": "blurry",
    "steps": 30,
    "cfg_scale": 6.5,
    "width": 832,
    "height": 1216,
    "seed": 42,
    "sampler_name": "Euler a",
    "scheduler": "Karras",
    "batch_size": 2,
    "n_iter": 2,
    "styles": ["photo"],
    "subseed": 1,
    "subseed_strength": 0.5,
    "seed_resize_from_h": -1,
    "seed_resize_from_w": 0,
    "restore_faces": True,
    "tiling": False,
    "eta": 0.5,
    "s_min_uncond": 1,
    "s_churn": 1,
    "s_tmax": 999,
    "s_tmin": 0,
    "s_noise": 1,
    "denoising_strength": 0.5,
    "enable_hr": True,
    "hr_scale": 1.5,
    "hr_upscaler": "Latent",
    "hr_second_pass_steps": 0,
    "hr_resize_x": 0,
    "hr_resize_y": 0,
    "hr_sampler_name": "Euler",
    "hr_scheduler": "Karras",
    "hr_prompt": "sharp",
    "hr_negative_prompt": "",
    "comments": {"a": 1},
    "script_name": "x/y/z plot",
    "script_args": [1, "1,2", [], 0, "", [], 0, "", [], True, False, False, False, False, False, False, 0, False],
    "alwayson_scripts": {"Hypertile": {"args": [True]}, "other": {}},
    "override_settings": {"eta_ancestral": 0.5},
}


def test_the_fields_of_a1111_are_passed_on_as_they_are() -> None:
    request = parse_generation(FULL, LIMITS)

    assert request.body == FULL
    assert json.loads(json.dumps(request.body, allow_nan=False)) == FULL


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # JSON does not tell 25 from 25.0
        ({"steps": 25.0, "seed": 5.0}, {"steps": 25, "seed": 5}),
        # a string that is exactly one number is that number
        ({"steps": "20", "seed": "-1", "cfg_scale": "7.0"}, {"steps": 20, "seed": -1, "cfg_scale": 7.0}),
        ({"width": "512.0", "denoising_strength": "0"}, {"width": 512, "denoising_strength": 0}),
        ({"override_settings": {"eta_ddim": "0.5"}}, {"override_settings": {"eta_ddim": 0.5}}),
        # 1 and 0 are true and false
        ({"tiling": 1, "restore_faces": 0}, {"tiling": True, "restore_faces": False}),
        # null means absent
        ({"steps": None, "styles": None, "eta": None, "loras": None, "checkpoint": None, "nothing_like_it": None}, {}),
        # the ends of ranges
        ({"seed": 2**32 - 1, "subseed": -1}, {"seed": 2**32 - 1, "subseed": -1}),
        ({"width": 64, "height": 2048}, {"width": 64, "height": 2048}),
        ({"cfg_scale": 0, "denoising_strength": 0}, {"cfg_scale": 0, "denoising_strength": 0}),
        # convenience that does what it says
        ({"clip_skip": 2}, {"override_settings": {"CLIP_stop_at_last_layers": 2}}),
        ({"vae": "none"}, {"override_settings": {"sd_vae": "none"}}),
        (
            {"clip_skip": 2, "override_settings": {"CLIP_stop_at_last_layers": 2, "sd_vae": None}},
            {"override_settings": {"CLIP_stop_at_last_layers": 2}},
        ),
        # samplers: ours, ours with the job's scheduler, the old name
        ({"scheduler": "Beta"}, {"sampler_name": "DPM++ 2M", "scheduler": "Beta"}),
        ({"sampler_name": " ", "scheduler": ""}, {"sampler_name": DEFAULT_SAMPLER}),
        ({"sampler_index": "DDIM"}, {"sampler_name": "DDIM"}),
        ({"sampler_index": "ddim", "sampler_name": "DDIM"}, {"sampler_name": "DDIM"}),
        # "as in the first pass", in the words of A1111's page, which its API does not know
        ({"hr_sampler_name": "Use same sampler", "hr_scheduler": "use same scheduler"}, {}),
        ({"hr_checkpoint_name": "Use same checkpoint", "refiner_checkpoint": "", "infotext": ""}, {}),
        # what changes nothing is not sent
        ({"disable_extra_networks": False, "styles": [], "alwayson_scripts": {}}, {}),
        ({"hr_upscaler": "", "script_name": "", "vae": "", "force_task_id": "", "firstpass_image": ""}, {}),
        ({"loras": [], "on_lora_error": "fail", "override_settings": {}}, {}),
    ],
)
def test_the_same_job_may_be_written_in_several_ways(given: dict[str, Any], expected: dict[str, Any]) -> None:
    request = parse(**given)

    assert request.body == {**parse().body, **expected}
    assert request.warnings == ()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, OutputOptions()),
        (None, OutputOptions()),
        ({"format": None, "quality": None, "raw": None}, OutputOptions()),
        ({"format": "webp", "quality": 75}, OutputOptions(ImageFormat.WEBP, 75)),
        ({"format": "jpeg", "quality": 1.0}, OutputOptions(ImageFormat.JPEG, 1)),
        ({"metadata": False, "raw": True}, OutputOptions(metadata=False, raw=True)),
        ({"delivery": "inline", "raw": True}, OutputOptions(delivery=DeliveryMode.INLINE, raw=True)),
        ({"delivery": "bucket"}, OutputOptions(delivery=DeliveryMode.BUCKET)),
    ],
)
def test_a_job_says_how_it_wants_its_pictures(given: Any, expected: OutputOptions) -> None:
    request = parse_generation({"prompt": "x", "output": given}, Limits(has_bucket=True))

    assert request.output == expected
    assert "output" not in request.body
    assert request.warnings == ()


def test_delivery_to_a_bucket_that_is_not_set_up_is_a_complaint() -> None:
    assert complaints({"prompt": "x", "output": {"delivery": "bucket"}}, Limits(has_bucket=False)) == (
        Complaint("output.delivery", "is refused: this worker has no bucket"),
    )
    assert complaints({"prompt": "x", "output": {"delivery": "bucket", "raw": True}}, Limits(has_bucket=True)) == (
        Complaint("output.raw", "must be false with delivery bucket: the links are in the worker block"),
    )


def test_a_quality_for_png_is_a_warning() -> None:
    assert parse(output={"quality": 80}).warnings == ("output.quality does nothing for png, which is lossless",)


def test_a_job_may_allow_a_blank_picture() -> None:
    assert parse(allow_blank=True).allow_blank is True
    assert parse().allow_blank is False
    assert "allow_blank" not in parse(allow_blank=True).body


def test_a_prompt_may_be_exactly_20000_bytes_long() -> None:
    parse(negative_prompt="é" * 10_000)

    assert complaints({"prompt": "é" * 10_001}) == (
        Complaint("prompt", "must be at most 20,000 bytes of UTF-8, not 20,002"),
    )


def test_the_pixels_of_the_final_picture_are_limited_hires_included() -> None:
    parse(enable_hr=True, denoising_strength=0.5, hr_scale=2)
    parse(enable_hr=True, denoising_strength=0.5, hr_resize_x=4096, width=2048, height=512)


@pytest.mark.parametrize(
    "job",
    [
        {"hr_scale": 2.1},
        {"hr_resize_x": 4096},
        {"hr_resize_x": 4096, "hr_resize_y": 4096},
        # no bigger at the end, but on the way: upscaled to 2048×65536, then cut
        {"hr_resize_x": 2048, "hr_resize_y": 2048, "width": 64, "height": 2048},
    ],
)
def test_a_picture_that_is_too_large_in_any_pass_is_a_complaint(job: dict[str, Any]) -> None:
    (complaint,) = complaints({"prompt": "x", "enable_hr": True, "denoising_strength": 0.5, **job})

    assert complaint.path == next(iter(job))
    assert "pixels" in complaint.message


# -- what is wrong, one row each --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "path", "sentence"),
    [
        (None, "input", "is missing"),
        ([], "input", "must be an object, not a list of 0"),
        ("a cat", "input", "must be an object, not text"),
        (True, "input", "must be an object, not true"),
        ({}, "prompt", "is required"),
        ({"prompt": None}, "prompt", "must be text, not null"),
        ({"prompt": " \n"}, "prompt", "must not be blank"),
        ({"prompt": 5}, "prompt", "must be text, not 5"),
        ({"prompt": ["x"]}, "prompt", "must be text, not a list of 1"),
        ({"prompt": "x" * 1_000_000}, "prompt", "not 1,000,000"),
        ({"prompt": "x\ud800"}, "prompt", "valid text"),
        ({"prompt": "x", 5: 1}, "input", "field names of valid text"),
        ({"prompt": "x", "a\ud800": 1}, "input", "field names of valid text"),
        # a job of another worker of this kind
        (
            {"api": {"method": "POST", "endpoint": "/sdapi/v1/txt2img"}, "payload": {"prompt": "x"}},
            "input",
            "ashleykleynhans/runpod-worker-a1111",
        ),
        ({"workflow": {"3": {"class_type": "KSampler"}}, "images": []}, "input", "runpod-workers/worker-comfyui"),
        # a task that is not there
        ({"task": "img3img"}, "task", "must be one of txt2img"),
        ({"task": 5}, "task", "must be one of txt2img"),
        ({"task": "health", "prompt": "x"}, "prompt", "is unknown"),
    ],
)
def test_an_input_that_is_no_job_is_a_complaint(raw: object, path: str, sentence: str) -> None:
    (complaint,) = complaints(raw)

    assert complaint.path == path
    assert sentence in complaint.message


@pytest.mark.parametrize(
    ("job", "path", "sentence"),
    [
        # types: a number is neither a bool nor text
        ({"steps": "many"}, "steps", "whole number from 1 to 150, not text"),
        ({"steps": ""}, "steps", "not text"),
        ({"steps": "true"}, "steps", "not text"),
        ({"steps": "20 steps"}, "steps", "not text"),
        ({"steps": " 20"}, "steps", "not text"),
        ({"steps": "0x10"}, "steps", "not text"),
        ({"steps": "2.5"}, "steps", "not 2.5"),
        ({"steps": "500"}, "steps", "not 500"),
        ({"steps": True}, "steps", "not true"),
        ({"steps": 2.5}, "steps", "not 2.5"),
        ({"cfg_scale": "nan"}, "cfg_scale", "a number from 0 to 100, not text"),
        ({"cfg_scale": "1e9"}, "cfg_scale", "not 1e9"),
        ({"cfg_scale": False}, "cfg_scale", "not false"),
        ({"tiling": 2}, "tiling", "true or false, not 2"),
        ({"tiling": "true"}, "tiling", "true or false, not text"),
        ({"negative_prompt": {}}, "negative_prompt", "text, not an object"),
        ({"styles": "photo"}, "styles", "a list"),
        ({"styles": ["photo", 1]}, "styles[1]", "text, not 1"),
        ({"styles": ["x"] * 33}, "styles", "at most 32"),
        ({"comments": []}, "comments", "an object"),
        ({"script_args": {}}, "script_args", "a list"),
        # ranges: what A1111 would answer with a 500, or never
        ({"steps": 0}, "steps", "not 0"),
        ({"steps": 151}, "steps", "not 151"),
        ({"hr_second_pass_steps": 151}, "hr_second_pass_steps", "from 0 to 150"),
        ({"width": 0}, "width", "a multiple of 8 from 64 to 2048, not 0"),
        ({"width": -64}, "width", "not -64"),
        ({"width": 56}, "width", "not 56"),
        ({"width": 1025}, "width", "not 1025"),
        ({"height": 2056}, "height", "not 2056"),
        ({"batch_size": 0}, "batch_size", "from 1 to 16"),
        ({"n_iter": 0}, "n_iter", "from 1 to 16"),
        ({"batch_size": 4, "n_iter": 5}, "batch_size", "20 pictures"),
        ({"seed": -2}, "seed", "from -1 to 4294967295"),
        ({"seed": 2**32}, "seed", "not 4294967296"),
        ({"seed": 2**70}, "seed", "64 bits"),
        ({"seed": 10**5000}, "seed", "64 bits"),
        ({"subseed": 2**32}, "subseed", "not 4294967296"),
        ({"seed_resize_from_w": 5}, "seed_resize_from_w", "-1, or 0, or a multiple of 8"),
        ({"cfg_scale": 1e9}, "cfg_scale", "not 1000000000"),
        ({"cfg_scale": -5}, "cfg_scale", "not -5"),
        ({"denoising_strength": 1.01}, "denoising_strength", "0, or a number from 0.01 to 1"),
        ({"denoising_strength": 1e-300}, "denoising_strength", "from 0.01"),
        ({"eta": -1}, "eta", "from 0 to 1000"),
        ({"s_noise": 1001}, "s_noise", "from 0 to 1000"),
        ({"refiner_switch_at": 2}, "refiner_switch_at", "from 0 to 1"),
        ({"hr_scale": 0.5}, "hr_scale", "from 1 to 8"),
        ({"hr_resize_x": 100}, "hr_resize_x", "0, or a multiple of 8 from 64 to 65536"),
        ({"clip_skip": 13}, "clip_skip", "from 1 to 12"),
        # not finite, however deep
        ({"cfg_scale": NAN}, "cfg_scale", "finite"),
        ({"hr_scale": INF}, "hr_scale", "finite"),
        ({"script_args": [1, [{"a": -INF}]]}, "script_args[1][0].a", "finite"),
        ({"alwayson_scripts": {"x": {"args": [NAN]}}}, "alwayson_scripts.x.args[0]", "finite"),
        ({"comments": {"a": NAN}}, "comments.a", "finite"),
        # not JSON, or no UTF-8
        ({"script_args": [b"x"]}, "script_args[0]", "must be JSON, not bytes"),
        ({"script_args": [object()]}, "script_args[0]", "must be JSON"),
        ({"script_args": ["\udfff"]}, "script_args[0]", "valid text"),
        ({"comments": {"\udfff": 1}}, "comments", "keys of valid text"),
        ({"comments": {1: 1}}, "comments", "keys of valid text"),
        ({"nonsense": [NAN]}, "nonsense[0]", "finite"),
        # sizes together
        (
            {"width": 2048, "height": 2048, "enable_hr": True, "denoising_strength": 0.5},
            "enable_hr",
            "16,777,216 pixels",
        ),
        ({"enable_hr": True, "denoising_strength": 0.5, "hr_scale": 8}, "hr_scale", "8192×8192"),
        ({"enable_hr": True, "denoising_strength": 0.5, "height": 64, "hr_resize_x": 128}, "hr_resize_x", "128×8"),
        ({"firstphase_width": 512}, "firstphase_width", "firstphase_height"),
        ({"firstphase_height": 512, "firstphase_width": 0}, "firstphase_height", "firstphase_width"),
        ({"enable_hr": True}, "enable_hr", "denoising_strength"),
        # a checkpoint, by every door
        ({"checkpoint": "x"}, "checkpoint", "the checkpoint is this worker's"),
        ({"model": "x"}, "model", "the checkpoint is this worker's"),
        ({"sd_model": "x"}, "sd_model", "the checkpoint is this worker's"),
        ({"sd_model_checkpoint": "x"}, "sd_model_checkpoint", "the checkpoint is this worker's"),
        ({"refiner_checkpoint": "x"}, "refiner_checkpoint", "the checkpoint is this worker's"),
        (
            {"hr_checkpoint_name": "x", "enable_hr": True, "denoising_strength": 0.5},
            "hr_checkpoint_name",
            "the checkpoint is this worker's",
        ),
        (
            {"alwayson_scripts": {"Refiner": {"args": []}}},
            "alwayson_scripts.Refiner",
            "use refiner_checkpoint",
        ),
        ({"infotext": "Model: x"}, "infotext", "sets other fields unseen"),
        # what outlives the job, breaks the verification, fills the disk, or is ours
        ({"disable_extra_networks": True}, "disable_extra_networks", "keep the LoRAs of the job before"),
        ({"send_images": False}, "send_images", "the pictures are the answer"),
        ({"save_images": "yes"}, "save_images", "true or false"),
        ({"send_images": "yes"}, "send_images", "true or false"),
        ({"force_task_id": "x"}, "force_task_id", "its own tasks"),
        ({"firstpass_image": "aGk="}, "firstpass_image", "does not decode"),
        # settings
        ({"override_settings": []}, "override_settings", "an object"),
        (
            {"override_settings": {"samples_save": True}},
            "override_settings.samples_save",
            "not a setting that a job may",
        ),
        (
            {"override_settings": {"randn_sourse": "CPU"}},
            "override_settings.randn_sourse",
            "did you mean 'randn_source'",
        ),
        ({"override_settings": {"randn_source": "cpu"}}, "override_settings.randn_source", "one of GPU, CPU, NV"),
        ({"override_settings": {"sd_lora": "x"}}, "override_settings.sd_lora", "not a setting"),
        (
            {"override_settings": {"CLIP_stop_at_last_layers": "two"}},
            "override_settings.CLIP_stop_at_last_layers",
            "text",
        ),
        ({"clip_skip": 2, "override_settings": {"CLIP_stop_at_last_layers": 1}}, "clip_skip", "contradicts"),
        ({"vae": "a", "override_settings": {"sd_vae": "b"}}, "vae", "contradicts"),
        # samplers and scripts
        ({"sampler_name": 5}, "sampler_name", "text, not 5"),
        ({"sampler_name": "x" * 201}, "sampler_name", "200 bytes"),
        ({"alwayson_scripts": {"x": [1]}}, "alwayson_scripts.x", "an object like"),
        ({"alwayson_scripts": {"x": None}}, "alwayson_scripts.x", "an object like"),
        ({"alwayson_scripts": {"x": {"args": None}}}, "alwayson_scripts.x.args", "a list, not null"),
        ({"alwayson_scripts": {"x": {"arg": []}}}, "alwayson_scripts.x.arg", "did you mean 'args'"),
        ({"alwayson_scripts": {"seed": {}}}, "alwayson_scripts.seed", "subseed"),
        ({"alwayson_scripts": {"Sampler": {}}}, "alwayson_scripts.Sampler", "sampler_name"),
        ({"alwayson_scripts": {"extra options": {}}}, "alwayson_scripts.extra options", "override_settings"),
        # LoRAs
        ({"loras": {"version_id": 1}}, "loras", "a list, not an object"),
        ({"loras": [1.5]}, "loras[0]", "text or an object, not 1.5"),
        ({"loras": [True]}, "loras[0]", "text or an object, not true"),
        ({"loras": [0]}, "loras[0].version_id", "a whole number above 0"),
        ({"loras": [None]}, "loras[0]", "text or an object, not null"),
        ({"loras": [{}]}, "loras[0]", "names no model"),
        ({"loras": [{"scale": 1}]}, "loras[0]", "names no model"),
        ({"loras": [""]}, "loras[0]", "blank"),
        ({"loras": ["https://evil.example/x"]}, "loras[0]", "MODEL_HOSTS"),
        ({"loras": [{"url": "http://civitai.com/models/1"}]}, "loras[0].url", "https"),
        ({"loras": [{"url": "https://169.254.169.254/x"}]}, "loras[0].url", "MODEL_HOSTS"),
        ({"loras": [{"url": "file:///etc/passwd"}]}, "loras[0].url", "https"),
        ({"loras": [{"url": "https://me:secret@civitai.com/models/1"}]}, "loras[0].url", "password"),
        ({"loras": [{"name": "../x"}]}, "loras[0].name", "no / or"),
        ({"loras": [{"name": "a\x00"}]}, "loras[0].name", "control"),
        ({"loras": [{"name": "x" * 300}]}, "loras[0].name", "200 characters"),
        ({"loras": [{"name": "x", "scale": "abc"}]}, "loras[0].scale", "from -10 to 10, not text"),
        ({"loras": [{"name": "x", "scale": NAN}]}, "loras[0].scale", "finite"),
        ({"loras": [{"name": "x", "scale": 1e9}]}, "loras[0].scale", "not 1000000000"),
        ({"loras": [{"name": "x", "weight": 1}]}, "loras[0].weight", "did you mean 'scale'"),
        ({"loras": [{"name": "x", "scal": 1}]}, "loras[0].scal", "did you mean 'scale'"),
        ({"on_lora_error": "ignore"}, "on_lora_error", "one of fail, warn"),
        # how the pictures leave
        ({"output": "webp"}, "output", "must be an object"),
        ({"output": {"format": "jpg"}}, "output.format", "one of png, jpeg, webp"),
        ({"output": {"format": ["png"]}}, "output.format", "one of png, jpeg, webp"),
        ({"output": {"quality": 0}}, "output.quality", "from 1 to 100"),
        ({"output": {"quality": "high"}}, "output.quality", "from 1 to 100, not text"),
        ({"output": {"metadata": "no"}}, "output.metadata", "true or false"),
        ({"output": {"raw": "yes"}}, "output.raw", "true or false"),
        ({"output": {"delivery": "s3"}}, "output.delivery", "one of auto, inline, bucket"),
        ({"output": {"type": "webp"}}, "output.type", "did you mean 'format'"),
        ({"output": {"bucket": "theirs"}}, "output.bucket", "known here: format, quality, delivery, metadata, raw"),
        ({"output_format": "webp"}, "output_format", "did you mean 'output'"),
        ({"allow_blank": "1"}, "allow_blank", "true or false"),
        # tags
        ({"prompt": "<hypernet:x:1>"}, "prompt", "no hypernetworks"),
        ({"prompt": "<LoRA:x:1>"}, "prompt", "<lora:…> alone"),
        ({"prompt": "<lora:x:much>"}, "prompt", "must be a number"),
        ({"prompt": "<lora:x:nan>"}, "prompt", "must be a number"),
        ({"prompt": "<lora:x:11>"}, "prompt", "from -10 to 10"),
        ({"prompt": "<lora:x:1:te=-11>"}, "prompt", "from -10 to 10"),
        ({"prompt": "<lora:../x:1>"}, "prompt", "no / or"),
        ({"prompt": "<lora::1>"}, "prompt", "blank"),
        ({"prompt": "<lora:x <lora:y:1>"}, "prompt", "not closed"),
        ({"hr_prompt": "<lora:x:11>", "enable_hr": True, "denoising_strength": 0.5}, "hr_prompt", "from -10 to 10"),
    ],
)
def test_a_complaint_names_the_place_and_the_reason(job: dict[str, Any], path: str, sentence: str) -> None:
    (complaint,) = complaints({"prompt": "a lighthouse", **job})

    assert complaint.path == path
    assert sentence in complaint.message


@pytest.mark.parametrize(
    ("field", "meant"),
    [
        # from other APIs
        ("num_inference_steps", "steps"),
        ("guidance_scale", "cfg_scale"),
        ("num_images", "batch_size"),
        ("n", "n_iter"),
        ("negativePrompt", "negative_prompt"),
        ("sampler", "sampler_name"),
        ("hires", "enable_hr"),
        ("lora", "loras"),
        ("clipSkip", "clip_skip"),
        ("samplerName", "sampler_name"),
        # by a slip
        ("promt", "prompt"),
        ("widht", "width"),
        ("denoising_strenght", "denoising_strength"),
        ("override_setting", "override_settings"),
    ],
)
def test_an_unknown_field_names_the_field_that_was_meant(field: str, meant: str) -> None:
    (complaint,) = complaints({"prompt": "x", field: 1})

    assert complaint == Complaint(field, f"is unknown; did you mean {meant!r}?")


@pytest.mark.parametrize("field", ["zzzz", "user_id", "username", "style_id", "callback", "upscale", "tags"])
def test_an_unknown_field_that_resembles_no_other_gets_no_suggestion(field: str) -> None:
    (complaint,) = complaints({"prompt": "x", field: {}})

    assert complaint.path == field
    assert complaint.message.startswith("is unknown")
    assert "did you mean" not in complaint.message


def test_eighteen_complaints_come_at_once_in_the_order_of_the_input() -> None:
    job = {
        "steps": 0,
        "loras": [
            {"url": "http://x/", "scale": NAN},
            {"scale": 99, "name": ".."},
            "../x",
            {"hash": "x", "version_id": 0},
        ],
        "prompt": "<lora:x:much> <hypernet:y:1>",
        "nonsense": 1,
        "width": 5,
        "checkpoint": "x",
        "script_args": [NAN, INF],
        "override_settings": {"eta_ddim": 2, "nope_at_all": 1},
        "seed": 1.5,
        "sampler_index": "Euler",
        "sampler_name": "DDIM",
    }

    paths = [complaint.path for complaint in complaints(job)]

    assert paths == [
        "steps",
        "loras[0].scale",
        "loras[0].url",
        "loras[1].scale",
        "loras[1].name",
        "loras[2]",
        "loras[3].hash",
        "loras[3].version_id",
        "prompt",
        "prompt",
        "nonsense",
        "width",
        "checkpoint",
        "script_args[0]",
        "script_args[1]",
        "override_settings.eta_ddim",
        "override_settings.nope_at_all",
        "seed",
    ]


def test_the_operator_sets_the_limits() -> None:
    tight = Limits(max_steps=10, max_pixels=512 * 512, max_images=1)

    paths = [
        complaint.path for complaint in complaints({"prompt": "x", "steps": 11, "batch_size": 2, "height": 512}, tight)
    ]

    assert paths == ["steps", "batch_size", "height"]


NESTED: list[Any] = []
for _ in range(40):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    "job",
    [
        {"script_args": NESTED},
        {"comments": {f"k{number}": number for number in range(100_001)}},
        {f"field {number}": 1 for number in range(20_000)},
        {"override_settings": {f"k{number}": 1 for number in range(20_000)}},
        {"loras": [{f"k{number}": 1 for number in range(20_000)}]},
        {"alwayson_scripts": {"x": {f"k{number}": 1 for number in range(20_000)}}},
        {"prompt": "".join(f"<lora:t{number}:1>" for number in range(1_400))},
        {"prompt": "".join(f"<lora:t{number}:x>" for number in range(1_400))},
        {"script_args": [NAN] * 10_000},
    ],
)
def test_an_absurd_job_gets_a_short_answer(job: dict[str, Any]) -> None:
    found = complaints({"prompt": "x", **job})

    assert 1 <= len(found) <= MAX_COMPLAINTS + 1
    assert all(len(complaint.path) < 200 and len(complaint.message) < 500 for complaint in found)


# -- anything at all --------------------------------------------------------------------------------------------------

TEXT = st.text(max_size=20)
ANY_JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=10,
)
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "integer": st.sampled_from([-1, 0, 1, 2, 3, 64, 512.0, 1024, 2048]),
    "number": st.floats(0, 1) | st.integers(0, 9),
    "boolean": st.booleans(),
    "string": TEXT | st.sampled_from(["<lora:x:0.5> a <foo:1>", "DDIM", "Use same sampler", "warn", "None"]),
    "any": st.sampled_from([0, "x", [1]]),
    "array": st.lists(
        st.sampled_from(["civitai:1@2", {"name": "own", "scale": 0.5}, URL, {"version_id": 9}]), max_size=3
    ),
    "object": st.sampled_from([{}, {"Hypertile": {"args": [1]}}, {"eta_ddim": 0.5}, {"s_noise": 1, "sd_vae": None}]),
}
TAKEN = {name: field for name, field in txt2img_fields(LIMITS).items() if field.kind is not FieldClass.REFUSED}
LIKELY_JOBS = st.fixed_dictionaries(
    {"prompt": st.sampled_from(["a cat", "<lora:own:1> <lora:detail_tweaker_xl>", "a # <lora:x:1>"])},
    optional={name: LIKELY[field.value.type] for name, field in TAKEN.items() if name != "prompt"},
).flatmap(
    lambda job: st.sets(st.sampled_from(sorted(job)), max_size=6).map(
        lambda few: {"prompt": "a cat", **{name: job[name] for name in few}}
    )
)
ANY_FIELD = st.sampled_from(sorted(txt2img_fields(LIMITS)))
JOBS = LIKELY_JOBS | st.builds(lambda job, name, value: {**job, name: value}, LIKELY_JOBS, ANY_FIELD, ANY_JSON)


@settings(deadline=None, max_examples=300)
@given(st.one_of(ANY_JSON, JOBS))
def test_anything_gives_complaints_or_a_body_within_every_limit(raw: Any) -> None:
    error: InvalidRequest | None = None
    try:
        request = parse_generation(raw, LIMITS)
    except InvalidRequest as refusal:
        error = refusal

    if error is not None:
        assert all(one.path and one.message for one in error.complaints)
        assert json.dumps(error.answer(), allow_nan=False, ensure_ascii=False).encode()
        return
    body = json.loads(json.dumps(request.body, allow_nan=False))
    assert body == request.body
    table = txt2img_fields(LIMITS)
    assert all(table[name].kind is not FieldClass.REFUSED and table[name].is_webui_field for name in body)
    assert all(table[name].value.check(value) == value for name, value in body.items())
    assert final_size(body).pixels <= LIMITS.max_pixels
    assert 1 <= body.get("batch_size", 1) * body.get("n_iter", 1) <= LIMITS.max_images
    assert len(request.loras) <= 16
    assert all(-10 <= scale_of(lora) <= 10 for lora in request.loras)

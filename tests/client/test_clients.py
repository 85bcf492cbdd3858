"""Published clients, unmodified, with what `make gateway` starts: the sandbox's queue, a real worker, the gateway."""

from __future__ import annotations

import base64
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import webuiapi
from PIL import Image

from tests.client.started import Started
from tests.support import DATA, wait_until

SMALL = {"steps": 2, "width": 64, "height": 64, "seed": 42}
FILE = "jib_mix_illustrious_realistic_v2.safetensors"


@pytest.fixture(scope="module")
def api(started: Started) -> Any:
    url = httpx.URL(started.url)
    return webuiapi.WebUIApi(host=url.host, port=url.port)


def test_webuiapi_fills_its_menus_before_the_first_picture(api: Any) -> None:
    (model,) = api.get_sd_models()
    assert api.util_get_current_model() == model["title"]
    assert model["title"].startswith(f"{FILE} [") and model["hash"] in model["title"]
    assert "Euler a" in api.util_get_sampler_names()
    assert "Karras" in [entry["label"] for entry in api.get_schedulers()]
    assert api.get_upscalers()[0]["name"] == "None"
    assert {"txt2img", "img2img"} == set(api.get_scripts())
    for ask in (api.get_cmd_flags, api.get_face_restorers, api.get_realesrgan_models, api.get_prompt_styles):
        assert ask() is not None
    for ask in (api.get_embeddings, api.get_hypernetworks, api.get_sd_vae, api.get_memory, api.refresh_checkpoints):
        ask()


def test_webuiapi_draws_a_picture(api: Any) -> None:
    result = api.txt2img(prompt="a lighthouse", negative_prompt="fog", cfg_scale=6, sampler_name="Euler a", **SMALL)

    assert result.image.size == (64, 64)
    assert (result.info["seed"], result.info["sampler_name"]) == (42, "Euler a")
    assert "a lighthouse" in result.image.info["parameters"]
    assert (result.parameters["batch_size"], result.parameters["prompt"]) == (1, "a lighthouse")


def test_webuiapi_draws_a_second_pass_and_several_pictures(api: Any) -> None:
    hires = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": webuiapi.HiResUpscaler.Latent, "denoising_strength": 0.7}

    large, several = (
        api.txt2img(prompt="a lighthouse", **SMALL, **hires),
        api.txt2img(prompt="a lighthouse", n_iter=2, **SMALL),
    )

    assert large.image.size == (128, 128)
    assert len(several.images) == 2


def test_webuiapi_draws_from_a_picture_and_repaints_a_part_of_one(api: Any) -> None:
    picture, mask = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))

    changed = api.img2img(images=[picture], prompt="a door", denoising_strength=0.5, **SMALL)
    repainted = api.img2img(
        images=[picture],
        mask_image=mask,
        mask_blur=4,
        inpainting_fill=1,
        prompt="a door",
        inpaint_full_res=False,
        **SMALL,
    )

    assert changed.image.size == repainted.image.size == (64, 64)
    assert "Denoising strength: 0.5" in changed.info["infotexts"][0]
    assert "Mask blur: 4" in repainted.info["infotexts"][0]
    assert changed.parameters["init_images"] is None


def test_webuiapi_makes_pictures_larger(api: Any) -> None:
    picture = Image.new("RGB", (32, 24), "red")

    single = api.extra_single_image(image=picture, upscaling_resize=2, upscaler_1=webuiapi.Upscaler.Lanczos)
    batch = api.extra_batch_images(images=[picture, picture], upscaling_resize=3, upscaler_1="Lanczos")

    assert single.image.size == (64, 48)
    assert [image.size for image in batch.images] == [(96, 72), (96, 72)]
    with pytest.raises(RuntimeError, match=r"the nearest|these are there"):
        api.extra_single_image(image=picture, upscaler_1="ESRGAN_4x")


def test_webuiapi_uses_a_lora_by_its_tag(api: Any) -> None:
    names = [entry["name"] for entry in api.get_loras()]

    result = api.txt2img(prompt="a lighthouse <lora:detail_tweaker_xl:0.5>", **SMALL)

    assert "detail_tweaker_xl" in names
    assert "Lora hashes" in result.info["infotexts"][0]


def test_webuiapi_sets_options(api: Any, started: Started) -> None:
    api.set_options({"CLIP_stop_at_last_layers": 2})
    result = api.txt2img(prompt="a lighthouse", **SMALL)
    assert api.get_options()["CLIP_stop_at_last_layers"] == 2
    api.set_options({"CLIP_stop_at_last_layers": 1})

    assert "Clip skip: 2" in result.info["infotexts"][0]
    api.util_set_model("jib mix illustrious", find_closest=True)
    assert str(api.util_get_current_model()).startswith(FILE)
    assert api.set_options({"sd_model_checkpoint": "nope"})["errors"] == "model 'nope' not found"


def test_webuiapi_waits_until_idle_and_interrupts(api: Any) -> None:
    api.util_wait_for_ready(check_interval=0.05)
    with ThreadPoolExecutor(max_workers=1) as thread:
        drawing = thread.submit(api.txt2img, prompt="a long one", **{**SMALL, "steps": 150})
        wait_until(lambda: api.get_progress()["state"]["sampling_step"] > 0, "the first steps")
        assert api.skip() is None
        api.interrupt()
        assert drawing.result(20).images == []

    api.util_wait_for_ready(check_interval=0.05)
    assert api.get_progress()["progress"] == 0.0


def test_webuiapi_reads_pictures(api: Any) -> None:
    drawn = api.txt2img(prompt="a lighthouse", **SMALL)

    read = api.png_info(drawn.image)
    api.util_wait_for_ready(check_interval=0.05)

    assert read.parameters["Prompt"] in ("", "a lighthouse")  # Pillow writes no texts unless it is asked to


def test_a_refusal_reaches_the_client_with_the_workers_sentence(api: Any) -> None:
    with pytest.raises(RuntimeError, match="Sampler not found"):
        api.txt2img(prompt="x", sampler_name="Nope", **SMALL)
    with pytest.raises(RuntimeError, match="no model is known by the name"):
        api.txt2img(prompt="<lora:nobody:1>", **SMALL)


def test_openai_draws_and_lists(started: Started) -> None:
    with openai.OpenAI(base_url=f"{started.url}/v1", api_key="unused") as client:
        answer = client.images.generate(
            prompt="a lighthouse", size="64x64", n=2, model="dall-e-3", extra_body={"seed": 42, "steps": 2}
        )
        models = [model.id for model in client.models.list()]

    assert answer.data and len(answer.data) == 2
    picture = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json or "")))
    assert picture.size == (64, 64)
    assert models == [FILE.removesuffix(".safetensors")]


@pytest.mark.parametrize("name", ["open_webui_txt2img", "open_webui_admin_txt2img", "oobabooga_txt2img"])
def test_the_recorded_requests_of_other_clients_are_pictures(started: Started, name: str) -> None:
    recorded = json.loads((DATA / "clients" / f"{name}.json").read_text(encoding="utf-8"))["requests"]

    with httpx.Client(base_url=started.url, trust_env=False, timeout=60) as http:
        for request in recorded:
            body = request["body"]
            if isinstance(body, dict) and "prompt" in body:
                body |= {"width": 64, "height": 64, "steps": 2}
            answer = http.request(request["method"], request["path"], json=body)
            assert answer.status_code == 200, answer.text

    assert answer.json()["images"]


def test_two_clients_draw_at_once_and_each_has_its_own_picture(started: Started) -> None:
    ready = threading.Barrier(2)

    def draw(prompt: str) -> str:
        with httpx.Client(base_url=started.url, trust_env=False, timeout=60, headers={"User-Agent": prompt}) as http:
            ready.wait(20)
            answer = http.post("/sdapi/v1/txt2img", json={"prompt": prompt, **SMALL}).json()
            return str(json.loads(answer["info"])["prompt"])

    with ThreadPoolExecutor(max_workers=2) as threads:
        assert list(threads.map(draw, ["a red door", "a blue door"])) == ["a red door", "a blue door"]


def test_ctrl_c_ends_all_and_no_key_is_in_the_log(tmp_path: Path, started: Started) -> None:
    """The last test of this module: it ends what the others use."""
    with httpx.Client(base_url=started.url, trust_env=False, timeout=60) as http, ThreadPoolExecutor(1) as thread:
        body = {"prompt": "a long one", "auth": "me:a-password", **SMALL, "steps": 150}
        drawing = thread.submit(http.post, "/sdapi/v1/txt2img", json=body, headers={"Authorization": "Basic bWU6eA=="})
        wait_until(lambda: http.get("/sdapi/v1/progress").json()["state"]["sampling_step"] > 0, "the first steps")

        assert started.interrupt() == 0, started.log()
        assert drawing.result(20).json()["images"] == []

    log = started.log()
    for secret in ("rpa_NOT-FOR-THIS", "a-password", "bWU6eA==", "Traceback"):
        assert secret not in log

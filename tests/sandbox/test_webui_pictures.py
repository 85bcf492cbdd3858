"""The sandbox's img2img and Extras against recorded answers, and their traps."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sandbox.webui import SandboxWebUI
from tests.sandbox.webui_client import (
    get,
    in_background,
    open_image,
    pixels,
    post,
    recordings,
    sampling,
    switch,
    txt2img,
    typed,
    without_variable_parts,
)
from tests.support import DATA, wait_until

# Recorded, but not imitated, with the reason.
NOT_IMITATED = {
    "infotext": "the worker refuses the field before A1111 sees it",
}
TESTED_BELOW = {"not_reproducible", "progress", "progress_batch", "progress_sd_upscale"}
EXTRAS_TESTED_BELOW = {"interrupt_poisons_cache", "progress"}
EXTRAS_NOT_IMITATED = {
    "hanging_download": "a host that swallows packets: WebUIFault.HANG stands for all that hangs",
    "esrgan4x_offline": "ESRGAN's own class: its files",
    "esrgan_broken": "ESRGAN's own class",
    "esrgan_file_ok": "ESRGAN's own class",
    "esrgan_refused_pickle": "ESRGAN's own class",
    "upscalers_with_files": "ESRGAN's own class",
}


def png(image: Image.Image, file_format: str = "PNG", **how: Any) -> str:
    file = io.BytesIO()
    image.save(file, file_format, **how)
    return base64.b64encode(file.getvalue()).decode()


GRADIENT = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
HALF = Image.new("L", (64, 64))
HALF.paste(255, (0, 0, 64, 32))

# The recordings cut long texts. These pictures stand for those that were sent.
STAND_INS = {
    "bomb_15000": png(Image.new("1", (15_000, 15_000))),
    "cut_png": png(Image.effect_noise((64, 64), 90).convert("RGB"))[:6000],
    "mask_bigger_init": png(GRADIENT.resize((128, 128))),
    "mask_bigger_init_whole": png(GRADIENT.resize((128, 128))),
    "size_equal_not8": png(GRADIENT.resize((70, 100))),
}


def request_of(case: Any) -> Any:
    body = dict(case["request"]["body"])
    if "...<" in json.dumps(body.get("init_images", "")):
        body["init_images"] = [STAND_INS.get(case["name"], png(GRADIENT))]
    if "...<" in json.dumps(body.get("mask", "")):
        body["mask"] = png(HALF.resize((128, 128)))
    return body


def cases(folder: str, *left_out: str) -> list[Any]:
    return [row for row in recordings(folder) if row.values[1].stem not in left_out and not is_cpus(row.values[1])]


def is_cpus(path: Path) -> bool:
    """Whether 1.9.3 failed in a way that it has on a CPU alone."""
    return "Inplace update to inference tensor" in path.read_text()


@pytest.mark.parametrize(("version", "path"), cases("img2img", "scripts", *NOT_IMITATED, *TESTED_BELOW))
def test_img2img_answers_as_recorded(version: str, path: Path, servers: dict[str, SandboxWebUI]) -> None:
    case = json.loads(path.read_text())
    body = request_of(case)
    if "Clip skip: 2" in json.dumps(case["response"]):  # what a job before the recorded one has left
        post(servers[version], "options", {"CLIP_stop_at_last_layers": 2})

    ours = post(servers[version], "img2img", body)

    theirs = case["response"]["body"]
    assert ours.status_code == case["response"]["status"], ours.text
    if ours.status_code != 200:
        assert ours.json() == theirs
        return
    answer = ours.json()
    our_info, their_info = json.loads(answer["info"]), json.loads(theirs["info"])
    if not body.get("include_init_images"):
        assert answer["parameters"] == theirs["parameters"]
    assert len(answer["images"]) == len(theirs["images"])
    assert list(our_info) == list(their_info)
    assert typed(our_info) == typed(their_info)
    assert without_variable_parts(our_info) == without_variable_parts(their_info)


SIZES = {
    "mask_bigger_init": (128, 128),
    "mask_bigger_init_whole": (64, 64),
    "size_not8_70x100": (64, 96),
    "script_sd_upscale": (128, 128),
}


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_an_img2img_has_another_size_than_asked_for(
    name: str,
    size: tuple[int, int],
    servers: dict[str, SandboxWebUI],
) -> None:
    case = json.loads((DATA / "webui-1.10.1" / "img2img" / f"{name}.json").read_text())

    images = post(servers["1.10.1"], "img2img", request_of(case)).json()["images"]

    assert open_image(images[-1]).size == size


def test_the_lists_of_scripts_are_as_recorded(servers: dict[str, SandboxWebUI]) -> None:
    case = json.loads((DATA / "webui-1.10.1" / "img2img" / "scripts.json").read_text())

    assert get(servers["1.10.1"], "scripts") == case["response"]["body"]


TINY = {"prompt": "a dog", "steps": 4, "seed": 3, "width": 64, "height": 64, "sampler_name": "Euler"}


@pytest.fixture
def webui(model_files: Path) -> Iterator[SandboxWebUI]:
    with SandboxWebUI(model_files) as server:
        switch(server, "tiny_a")
        yield server


def picture_of(webui: SandboxWebUI, **fields: Any) -> Image.Image:
    answer = post(webui, "img2img", {**TINY, "init_images": [png(GRADIENT)], **fields})
    assert answer.status_code == 200, answer.text
    return open_image(answer.json()["images"][0]).convert("RGB")


def test_an_img2img_depends_on_the_request_before(webui: SandboxWebUI) -> None:
    found = []
    for seed in (5, 6, 5):
        txt2img(webui, seed=seed)
        found.append(picture_of(webui).tobytes())
    found.append(picture_of(webui).tobytes())
    found.append(picture_of(webui).tobytes())

    assert found[0] == found[2] != found[1]
    assert found[3] == found[4]


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_not_masked_comes_back_exactly(whole: bool, webui: SandboxWebUI) -> None:
    picture = picture_of(webui, mask=png(HALF), mask_blur=0, inpaint_full_res=not whole)

    lower = (0, 32, 64, 64)
    assert picture.crop(lower).tobytes() == GRADIENT.crop(lower).tobytes()
    assert picture.tobytes() != GRADIENT.tobytes()


def test_a_black_mask_repaints_everything_or_nothing(webui: SandboxWebUI) -> None:
    black = png(Image.new("L", (64, 64)))
    picture_of(webui)  # what the next ones depend on

    assert picture_of(webui, mask=black).tobytes() != GRADIENT.tobytes()
    assert picture_of(webui, mask=black, inpaint_full_res=False).tobytes() == GRADIENT.tobytes()


def test_a_hidden_colour_shows_and_16_bits_are_clipped(webui: SandboxWebUI) -> None:
    hidden = Image.new("LA", (64, 64), (90, 0))
    dark = Image.new("I;16", (64, 64), 10_000)
    picture_of(webui)  # what the next ones depend on

    found = [picture_of(webui, init_images=[png(image)]).tobytes() for image in (hidden, dark)]

    plain = [Image.new("RGB", (64, 64), (value,) * 3) for value in (90, 255)]
    assert found == [picture_of(webui, init_images=[png(image)]).tobytes() for image in plain]


def test_progress_counts_the_steps_that_are_done(webui: SandboxWebUI) -> None:
    webui.step_seconds = 0.05
    body = {**TINY, "steps": 40, "init_images": [png(GRADIENT)]}
    answer = sampling(webui, path="img2img", **body)

    state = get(webui, "progress")["state"]
    post(webui, "interrupt")
    answer()

    assert (state["job"], state["job_count"], state["sampling_steps"]) == ("scripts_img2img", 1, 31)


# -- Extras


@pytest.mark.parametrize(("version", "path"), cases("extras", *EXTRAS_NOT_IMITATED, *EXTRAS_TESTED_BELOW))
def test_extras_answer_as_recorded(version: str, path: Path, tmp_path: Path) -> None:
    case = json.loads(path.read_text())
    with SandboxWebUI(tmp_path, version=version) as webui:
        ours = post(webui, case["request"]["path"].removeprefix("/sdapi/v1/"), case["request"]["body"])

    theirs = case["response"]["body"]
    assert ours.status_code == case["response"]["status"], ours.text
    if ours.status_code != 200:
        assert ours.json() == theirs
        return
    assert ours.json()["html_info"] == theirs["html_info"]
    for one, other in zip(images_of(ours.json()), images_of(theirs), strict=True):
        header = Image.open(io.BytesIO(base64.b64decode(one)))
        assert size_of(other) == (header.size, header.mode)


def images_of(answer: Any) -> list[str]:
    return list(answer["images"]) if "images" in answer else [answer["image"]]


def size_of(image: str) -> tuple[tuple[int, int], str]:
    """From the first bytes of a PNG: recordings are cut short."""
    head = base64.b64decode(image[:44])
    return (int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")), {2: "RGB", 6: "RGBA"}[head[25]]


SMALL = {"image": png(GRADIENT.resize((40, 24)))}


def test_a_model_upscaler_without_its_file_is_lanczos(webui: SandboxWebUI) -> None:
    found = {
        name: pixels(post(webui, "extra-single-image", {**SMALL, "upscaler_1": name}).json()["image"])
        for name in ("R-ESRGAN 4x+", "Lanczos", "Nearest")
    }

    assert found["R-ESRGAN 4x+"] == found["Lanczos"] != found["Nearest"]


def test_an_interrupted_run_is_answered_again(tmp_path: Path) -> None:
    (tmp_path / "RealESRGAN").mkdir()
    (tmp_path / "RealESRGAN" / "RealESRGAN_x4plus.pth").write_bytes(b"weights")
    body = {**SMALL, "upscaler_1": "R-ESRGAN 4x+"}
    with SandboxWebUI(tmp_path, upscale_steps=1000, step_seconds=0.05) as webui:
        answer = sampling(webui, path="extra-single-image", **body)
        state = get(webui, "progress")
        post(webui, "interrupt")
        interrupted = pixels(answer()["image"])
        again = pixels(post(webui, "extra-single-image", body).json()["image"])
        webui.step_seconds = 0.0
        bigger = {**body, "upscaling_resize": 3}
        whole = post(webui, "extra-single-image", bigger).json()["image"]

    assert (state["state"]["job"], state["state"]["job_count"]) == ("Upscale", 1)
    assert interrupted == again
    assert open_image(whole).size == (120, 72)


def test_extras_wait_for_their_turn_and_need_no_checkpoint(tmp_path: Path) -> None:
    with SandboxWebUI(tmp_path) as webui:
        with webui.process.lock:
            answer = in_background(webui, "extra-single-image", {**SMALL, "upscaler_1": "Lanczos"})
            wait_until(lambda: webui.process.lock.waiting, "the request at the lock")

        assert open_image(answer.result()["image"]).size == (80, 48)

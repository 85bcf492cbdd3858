"""Whole jobs that bring pictures: the real handler against the sandbox's WebUI, over real HTTP."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sandbox.server import Exchange, Server
from sandbox.webui import WebUIFault
from tests.images import open_base64
from tests.support import DETAIL, World, wait_until, world

STEPS = {"steps": 2, "seed": 42, "denoising_strength": 0.5}


def picture(width: int = 128, height: int = 96, mode: str = "RGB") -> str:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert(mode).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def half_mask(width: int, height: int) -> str:
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width // 2, height))
    file = io.BytesIO()
    mask.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


class PictureHost(Server):
    def __init__(self) -> None:
        super().__init__()
        self.is_asked = threading.Event()
        self.may_answer = threading.Event()
        self.may_answer.set()

    def answer(self, exchange: Exchange) -> None:
        self.is_asked.set()
        self.may_answer.wait(30)
        exchange.send(200, base64.b64decode(picture()))


@pytest.fixture(scope="module")
def host() -> Iterator[PictureHost]:
    with PictureHost() as server:
        yield server


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, host: PictureHost) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("world"), IMAGE_HOSTS=host.url) as it:
        yield it


def ask(it: World, **given: Any) -> dict[str, Any]:
    fields = {"task": "img2img", "prompt": "a lighthouse", "init_images": [picture()], **STEPS, **given}
    return it.run({"id": "job-1", "input": fields})


def sent(it: World) -> Any:
    """The body of the last request to img2img."""
    return [asked.json() for asked in it.webui.asked if asked.path.endswith("/img2img")][-1]


def test_an_img2img_is_answered_and_proven_like_a_txt2img(shared: World) -> None:
    answer = ask(shared, loras=[{"version_id": DETAIL}])

    assert open_base64(answer["images"][0]).size == (128, 96)
    assert answer["worker"]["checkpoint"]["file"] == "jib_mix_illustrious_realistic_v2.safetensors"
    assert [lora["loaded"] for lora in answer["worker"]["loras"]] == [True]
    assert answer["worker"]["seeds"] == [42]
    assert answer["worker"]["warnings"] == []


def test_the_webui_gets_plain_pictures_and_the_answer_shows_none(shared: World) -> None:
    answer = ask(shared, init_images=[f"data:image/png;base64,{picture(128, 96, 'RGBA')}"], mask=half_mask(64, 48))

    body = sent(shared)
    images = [open_base64(one) for one in (*body["init_images"], body["mask"])]
    assert [(image.mode, image.size) for image in images] == [("RGB", (128, 96)), ("L", (128, 96))]
    assert (body["width"], body["height"]) == (128, 96)
    assert answer["parameters"]["init_images"] is None and answer["parameters"]["mask"] is None


@pytest.mark.parametrize(
    ("given", "sizes", "warning"),
    [
        ({}, [(128, 96)], ""),
        ({"init_images": [picture(70, 100)]}, [(72, 96)], "width and height are 72×96 by init_images[0], which has"),
        ({"width": 64, "height": 64}, [(64, 64)], ""),
        (
            {"width": 64, "height": 64, "mask": half_mask(8, 8)},
            [(128, 96)],
            "the answer has pictures of 128×96, and not of 64×64: with inpaint_full_res",
        ),
        ({"width": 64, "height": 64, "mask": half_mask(8, 8), "inpaint_full_res": False}, [(64, 64)], ""),
        ({"init_images": [picture(), picture(64, 64)], "batch_size": 2, "n_iter": 2}, [(128, 96)] * 4, ""),
        ({"init_images": [picture(), picture()], "batch_size": 3}, [(128, 96)] * 2, "batch_size 3 with 2 init_images"),
        ({"batch_size": 2}, [(128, 96)] * 2, ""),
        (
            {"script_name": "loopback", "script_args": [2, 0.3, "Linear", "None"]},
            [(256, 96), (128, 96), (128, 96)],  # a grid comes first
            "",
        ),
        (
            {"script_name": "SD upscale", "script_args": [None, 16, "lanczos", 2.0], "width": 64, "height": 64},
            [(256, 192)],
            "the answer has pictures of 256×192, and not of 64×64: a script decides",
        ),
    ],
)
def test_pictures_are_counted_and_another_size_is_said(
    given: dict[str, Any], sizes: list[tuple[int, int]], warning: str, shared: World
) -> None:
    answer = ask(shared, **given)

    assert [open_base64(image).size for image in answer["images"]] == sizes
    warnings = answer["worker"]["warnings"]
    assert [found.startswith(warning) for found in warnings] == [True] * bool(warning)


def test_a_script_gets_its_upscaler_by_the_webuis_own_name(shared: World) -> None:
    ask(shared, script_name="sd upscale", script_args=[None, 16, "lanczos", 2], width=64, height=64)
    assert sent(shared)["script_args"][2] == "Lanczos"

    answer = ask(shared, script_name="sd upscale", script_args=[None, 16, "R-ESRGAN 4x+", 2], width=64, height=64)
    assert answer["code"] == "INVALID_REQUEST"
    assert answer["complaints"][0]["path"] == "script_args[2]" and "is not there" in answer["message"]


def test_fewer_pictures_than_asked_for_are_no_success(shared: World) -> None:
    shared.webui.fail_next.append(WebUIFault.NO_IMAGES)

    assert ask(shared)["code"] == "GENERATION_FAILED"


def test_a_picture_of_one_colour_may_stay_one_and_another_may_not_become_one(shared: World) -> None:
    file = io.BytesIO()
    Image.new("RGB", (128, 96), "red").save(file, "PNG")
    red = base64.b64encode(file.getvalue()).decode()
    nothing = {"mask": half_mask(128, 96), "inpaint_full_res": False}

    shared.webui.fail_next = [WebUIFault.BLACK] * 2
    answers = [ask(shared, init_images=[init], **nothing) for init in (red, picture())]

    assert [answer.get("code") for answer in answers] == [None, "GENERATION_FAILED"]


def test_a_picture_behind_an_allowed_url_is_fetched(shared: World, host: PictureHost) -> None:
    answer = ask(shared, init_images=[f"{host.url}/a.png?signature=secret"])

    assert "error" not in answer
    assert open_base64(sent(shared)["init_images"][0]).size == (128, 96)


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({"init_images": ["https://elsewhere.example/a.png"]}, "init_images[0]"),
        ({"init_images": [picture(), picture()[:200]], "batch_size": 2}, "init_images[1]"),
        ({"mask": picture()[:200]}, "mask"),
        ({"mask": half_mask(1, 8)}, "mask"),  # all black
        ({"sampler_name": "Nope"}, "sampler_name"),
        ({"script_name": "prompt metrix"}, "script_name"),
    ],
)
def test_a_bad_picture_is_an_invalid_request_with_its_path(given: dict[str, Any], path: str, shared: World) -> None:
    before = len(shared.webui.asked)

    answer = ask(shared, **given)

    assert (answer["code"], answer["retryable"]) == ("INVALID_REQUEST", False)
    assert [complaint["path"] for complaint in answer["complaints"]] == [path]
    assert shared.requests_since(before) == []


def test_no_picture_is_in_the_log_or_in_an_answer(shared: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    one, cut = picture(), picture()[:300]

    answers = [ask(shared, init_images=[one]), ask(shared, init_images=[one, cut], batch_size=2)]

    texts = [caplog.text, *(json.dumps({**answer, "images": []}) for answer in answers)]
    assert not any(one[part : part + 40] in text for text in texts for part in (0, 100, 200))


def play(it: World, scene: Any) -> None:
    it.loop.run_until_complete(asyncio.wait_for(scene, timeout=60))


def job(name: str, **given: Any) -> dict[str, Any]:
    fields = {"task": "img2img", "prompt": name, "init_images": [picture()], **STEPS, **given}
    return {"id": name, "input": fields}


def test_pictures_are_prepared_while_another_job_generates(shared: World, host: PictureHost) -> None:
    it = shared
    it.webui.step_seconds = 0.1

    async def scene() -> None:
        first = asyncio.ensure_future(it.worker.handle(job("first", steps=100, denoising_strength=1)))
        await asyncio.to_thread(wait_until, lambda: it.webui.process.state.sampling_step, "the first step")
        host.is_asked.clear()
        second = asyncio.ensure_future(it.worker.handle(job("second", init_images=[f"{host.url}/a.png"])))
        await asyncio.to_thread(host.is_asked.wait, 30)
        assert not first.done()
        it.webui.step_seconds = 0.0
        assert "error" not in await first and "error" not in await second

    play(it, scene())


@pytest.mark.parametrize("while_fetching", [True, False], ids=["while a picture is fetched", "while it generates"])
def test_a_cancelled_job_leaves_the_next_one_whole(while_fetching: bool, shared: World, host: PictureHost) -> None:
    it = shared

    async def scene() -> None:
        if while_fetching:
            host.is_asked.clear()
            host.may_answer.clear()
            running = asyncio.ensure_future(it.worker.handle(job("cancelled", init_images=[f"{host.url}/a.png"])))
            await asyncio.to_thread(host.is_asked.wait, 30)
        else:
            it.webui.step_seconds = 0.1
            running = asyncio.ensure_future(it.worker.handle(job("cancelled", steps=150, denoising_strength=1)))
            await asyncio.to_thread(wait_until, lambda: it.webui.process.state.sampling_step, "the first step")
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        host.may_answer.set()
        it.webui.step_seconds = 0.0
        answer = await it.worker.handle(job("next"))
        assert open_base64(answer["images"][0]).size == (128, 96)
        assert sent(it)["prompt"] == "next"

    play(it, scene())


def test_a_worker_without_image_hosts_fetches_nothing(tmp_path: Path, host: PictureHost) -> None:
    with world(tmp_path) as it:
        before = len(host.asked)

        answer = ask(it, init_images=[f"{host.url}/a.png"])

    assert answer["complaints"][0]["message"].startswith("is a URL, and this worker fetches no pictures")
    assert len(host.asked) == before

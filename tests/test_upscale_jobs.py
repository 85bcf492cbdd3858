"""Whole jobs that enlarge pictures: the real handler against the sandbox's WebUI, over real HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.images import open_base64
from tests.support import World, wait_until, world
from tests.test_picture_jobs import picture

MODEL = "R-ESRGAN 4x+"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    file = folder / "webui-models" / "RealESRGAN" / "RealESRGAN_x4plus.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    with world(folder) as it:
        yield it


def job(**given: Any) -> dict[str, Any]:
    fields = {"task": "upscale", "image": picture(40, 24), "upscaler_1": "lanczos", **given}
    return {"id": "job-1", "input": {name: value for name, value in fields.items() if value is not None}}


def ask(it: World, **given: Any) -> dict[str, Any]:
    return it.run(job(**given))


def test_a_picture_is_enlarged_and_the_answer_says_what_was_checked(shared: World) -> None:
    answer = ask(shared)

    assert [open_base64(image).size for image in answer["images"]] == [(80, 48)]
    assert answer["html_info"] == "<p>Postprocess upscale by: 2, Postprocess upscaler: Lanczos</p>"
    worker = answer["worker"]
    assert worker["pictures"] == [{"width": 80, "height": 48, "seed": None, "steps": None}]
    assert worker["warnings"] == [] and worker["delivery"]["mode"] == "inline"
    assert "checkpoint" not in worker and "loras" not in worker


def test_several_pictures_come_in_their_order_in_the_format_of_the_job(shared: World) -> None:
    several = [{"data": picture(40, 24), "name": "a"}, picture(16, 16)]

    answer = ask(shared, image=None, imageList=several, output={"format": "webp"}, upscaling_resize=3)

    images = [open_base64(image) for image in answer["images"]]
    assert [(image.format, image.size) for image in images] == [("WEBP", (120, 72)), ("WEBP", (48, 48))]


def test_a_raw_answer_is_a1111s(shared: World) -> None:
    answer = ask(shared, output={"raw": True})

    assert answer.keys() == {"images", "html_info"}


@pytest.mark.parametrize(
    ("given", "path", "message"),
    [
        ({"upscaler_1": "Nope"}, "upscaler_1", "unknown"),
        ({"upscaler_1": "Latent"}, "upscaler_1", "unknown"),  # of hires fix alone
        ({"upscaler_1": "SwinIR 4x"}, "upscaler_1", "is not there or does not work"),
        ({"upscaler_2": "SwinIR 4x"}, "upscaler_2", "is not there or does not work"),
        ({"image": picture()[:100]}, "image", "is"),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_path(
    given: dict[str, Any], path: str, message: str, shared: World
) -> None:
    answer = ask(shared, **given)

    assert (answer["code"], [complaint["path"] for complaint in answer["complaints"]]) == ("INVALID_REQUEST", [path])
    assert message in answer["complaints"][0]["message"]


def test_faces_at_a_webui_whose_files_nobody_can_see_are_a_warning(shared: World) -> None:
    answer = ask(shared, gfpgan_visibility=1)

    assert answer["worker"]["warnings"][0].startswith("nothing shows whether gfpgan_visibility did anything")


def test_a_model_is_used_when_it_has_shown_that_it_works(shared: World) -> None:
    answers = [ask(shared, upscaler_1=name) for name in (MODEL, "Lanczos")]

    one, other = (open_base64(answer["images"][0]).tobytes() for answer in answers)
    assert one != other


def test_a_picture_of_an_interrupted_job_is_not_answered_to_the_next_one(shared: World) -> None:
    it = shared
    whole = ask(it, upscaler_1=MODEL)["images"][0]
    it.webui.step_seconds, it.webui.upscale_steps = 0.05, 200

    async def scene() -> None:
        running = asyncio.ensure_future(it.worker.handle(job(upscaler_1=MODEL)))
        await asyncio.to_thread(wait_until, lambda: it.webui.process.state.sampling_step, "the first step")
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    it.loop.run_until_complete(asyncio.wait_for(scene(), timeout=60))
    it.webui.step_seconds, it.webui.upscale_steps = 0.0, 1

    assert open_base64(ask(it, upscaler_1=MODEL)["images"][0]).tobytes() == open_base64(whole).tobytes()


def test_extras_that_fail_are_a_failure(shared: World) -> None:
    it = shared
    it.webui.before.append(lambda exchange: answer_without_a_picture(exchange))

    answer = ask(it)
    it.webui.before.clear()

    assert answer["code"] == "WEBUI_LOST"


def answer_without_a_picture(exchange: Any) -> bool:
    if exchange.asked.path.endswith("/extra-single-image"):
        exchange.send_json(200, {"html_info": "<p></p>"})
        return True
    return False


def test_an_enlarged_picture_may_go_nowhere_near_a_private_file(shared: World, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"\x89PNG")

    assert ask(shared, image=str(secret))["code"] == "INVALID_REQUEST"

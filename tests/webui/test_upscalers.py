"""A model upscaler works, or the job that names it is refused with those that do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from a1111_worker.webui.upscalers import used_upscalers
from sandbox.webui_files import REFUSED_PICKLE
from tests.support import World, wait_until
from tests.webui.supervised import FakeStartSh, supervised

HIRES: dict[str, Any] = {"enable_hr": True, "denoising_strength": 0.5, "hr_scale": 1.5}


@pytest.fixture
def supervised_world(tmp_path: Path) -> Iterator[tuple[World, FakeStartSh]]:
    """A worker whose WebUI has a model that works, one that its unpickler refuses, and an R-ESRGAN that it refuses."""
    models = tmp_path / "webui-models"
    contents = {
        "ESRGAN/sharp.pth": b"weights",
        "ESRGAN/new_torch.pth": REFUSED_PICKLE,
        "RealESRGAN/RealESRGAN_x4plus.pth": REFUSED_PICKLE,
    }
    for path, content in contents.items():
        (models / path).parent.mkdir(parents=True, exist_ok=True)
        (models / path).write_bytes(content)
    with supervised(tmp_path) as (it, start_sh):
        yield it, start_sh


def proofs(it: World) -> list[str]:
    """The upscalers that have enlarged a tiny picture so far."""
    return [asked.json()["upscaler_1"] for asked in it.webui.asked if asked.path.endswith("/extra-single-image")]


def test_a_model_is_proven_once_in_a_life_of_the_webui(supervised_world: tuple[World, FakeStartSh]) -> None:
    it, start_sh = supervised_world

    answers = [it.ask(**HIRES, hr_upscaler="Sharp") for _ in range(2)]
    once = proofs(it)
    start_sh.kill()
    wait_until(lambda: start_sh.restarted == 1, "the WebUI's next life")
    answers.append(it.ask(**HIRES, hr_upscaler="sharp"))

    assert [answer.get("code") for answer in answers] == [None, None, None]
    assert once == ["sharp", "Lanczos"]
    assert proofs(it) == [*once, *once]


@pytest.mark.parametrize("name", ["new_torch", "R-ESRGAN 4x+"])
def test_a_model_that_does_not_work_is_refused_and_not_listed_any_more(
    supervised_world: tuple[World, FakeStartSh], name: str
) -> None:
    it, _ = supervised_world

    listed = name in it.worker.readiness.lists.upscalers
    first = it.ask(**HIRES, hr_upscaler=name)
    asked = proofs(it)
    second = it.ask(**HIRES, hr_upscaler=name)
    it.worker.readiness.invalidate()
    other = it.ask(**HIRES, hr_upscaler="sharp")

    assert listed and name not in it.worker.readiness.lists.upscalers
    for answer in (first, second):
        assert answer["code"] == "INVALID_REQUEST"
        (complaint,) = answer["complaints"]
        assert complaint["path"] == "hr_upscaler"
        assert f"the file of '{name}' is not there or does not work" in complaint["message"]
        assert "'sharp'" in complaint["message"].partition("these are there")[2]
    assert asked[0] == name and proofs(it)[len(asked) :] == ["sharp", "Lanczos"]
    assert "error" not in other and len(it.generations()) == 1


def test_what_has_no_file_needs_no_proof(supervised_world: tuple[World, FakeStartSh]) -> None:
    it, _ = supervised_world

    answers = [it.ask(**HIRES, hr_upscaler=name) for name in ("Lanczos", "Nearest", "Latent")]
    answers.append(it.ask(hr_upscaler="new_torch"))  # without enable_hr it is not used

    assert [answer.get("code") for answer in answers] == [None] * 4
    assert proofs(it) == []


def plot(axis: int, values: Any) -> list[Any]:
    return [axis, "", values, 0, "", [], 0, "", [], True, False, False, False, False, False, False, 0, False]


def test_the_upscalers_of_a_plot_are_used_too() -> None:
    axes = ["Nothing", "Hires upscaler"]
    body = {"script_name": "x/y/z plot", "script_args": plot(1, ["sharp", "Lanczos"])}

    found = list(used_upscalers({**HIRES, **body, "hr_upscaler": "Latent"}, 16, axes))

    assert [name for _, name in found] == ["Latent", "sharp", "Lanczos"]
    assert {path for path, _ in found} == {"hr_upscaler", "script_args[2]"}

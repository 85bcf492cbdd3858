"""The sandbox's ControlNet and ADetailer against recorded answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

from sandbox import models
from sandbox.webui import SandboxWebUI
from tests.sandbox.webui_client import get, pixels, post, switch
from tests.support import DATA

RECORDED = DATA / "webui-1.10.1" / "extensions"
GENERATIONS = sorted([*RECORDED.glob("cn_*.json"), *RECORDED.glob("ad_*.json")])
LISTS = ["adetailer_v1_ad_model", "adetailer_v1_schema", "adetailer_v1_version"]
LISTS += ["controlnet_model_list", "controlnet_settings", "controlnet_version"]
OF_OTHERS = ("Needs Thing", "Linked Thing", "My Thing")  # further extensions of the WebUI that was recorded


@pytest.fixture(scope="module")
def webui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxWebUI]:
    folder = tmp_path_factory.mktemp("models")
    models.sd15_checkpoint(folder / "Stable-diffusion" / "tiny_a.safetensors", 1)
    with SandboxWebUI(folder, extensions=("adetailer", "controlnet")) as server:
        switch(server, "tiny_a")
        yield server


def ask(webui: SandboxWebUI, path: str) -> Any:
    return requests.get(f"{webui.url}{path}", timeout=30).json()


def recorded(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", GENERATIONS, ids=lambda path: path.stem)
def test_units_do_what_was_recorded(path: Path, webui: SandboxWebUI) -> None:
    case = recorded(path)

    ours = post(webui, case["request"]["path"].removeprefix("/sdapi/v1/"), case["request"]["body"])

    theirs = case["response"]["body"]
    assert ours.status_code == case["response"]["status"]
    if ours.status_code != 200:
        assert ours.json() == theirs
        return
    their_params = json.loads(theirs["info"])["extra_generation_params"]
    assert len(ours.json()["images"]) == len(theirs["images"])
    assert json.loads(ours.json()["info"])["extra_generation_params"] == {
        key: value for key, value in their_params.items() if key not in OF_OTHERS
    }


@pytest.mark.parametrize("name", LISTS)
def test_the_lists_of_the_extensions_are_as_recorded(name: str, webui: SandboxWebUI) -> None:
    case = recorded(RECORDED / f"{name}.json")

    assert ask(webui, case["request"]["path"]) == case["response"]["body"]


def test_the_modules_are_as_recorded(webui: SandboxWebUI) -> None:
    theirs = recorded(RECORDED / "controlnet_module_list.json")["response"]["body"]

    ours = ask(webui, "/controlnet/module_list")

    assert ours["module_detail"] == theirs["module_detail"]
    assert len(ours["module_list"]) == 72 and ours["module_list"][:40] == theirs["module_list"][:40]


def test_without_the_extensions_there_is_nothing_of_them(tmp_path: Path) -> None:
    with SandboxWebUI(tmp_path) as bare:
        scripts = get(bare, "scripts")["txt2img"]
        refused = post(bare, "txt2img", {"alwayson_scripts": {"controlnet": {"args": []}}})

    assert "controlnet" not in scripts
    assert (refused.status_code, refused.json()["detail"]) == (422, "Script 'controlnet' not found")


def test_a_unit_acts_only_if_its_model_and_its_annotator_are_there(webui: SandboxWebUI) -> None:
    picture = recorded(RECORDED / "cn_canny_nomodel.json")["request"]["body"]
    plain = post(webui, "txt2img", {**picture, "alwayson_scripts": {}}).json()["images"]
    (webui.models_dir / "ControlNet").mkdir()
    (webui.models_dir / "ControlNet" / "canny.safetensors").write_bytes(b"weights")
    (model,) = ask(webui, "/controlnet/model_list")["model_list"]

    def draw(module: str, model: str) -> list[str]:
        unit = {**picture["alwayson_scripts"]["controlnet"]["args"][0], "module": module, "model": model}
        images: list[str] = post(
            webui, "txt2img", {**picture, "alwayson_scripts": {"controlnet": {"args": [unit]}}}
        ).json()["images"]
        return images

    assert model == "canny [e3b0c442]"
    assert pixels(draw("canny", "None")[0]) == pixels(draw("hed", model)[0]) == pixels(plain[0])
    assert pixels(draw("canny", model)[0]) != pixels(plain[0])


def test_a_path_as_a_picture_is_opened(webui: SandboxWebUI, tmp_path: Path) -> None:
    """What the worker must never let through."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "secret.png")
    unit = {"enabled": True, "module": "reference_only", "image": str(tmp_path / "secret.png")}

    body = {"prompt": "x", "steps": 1, "width": 64, "height": 64, "alwayson_scripts": {"controlnet": {"args": [unit]}}}
    images = post(webui, "txt2img", body).json()["images"]

    assert len(images) == 2

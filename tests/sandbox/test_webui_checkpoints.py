"""The sandbox's refiner and hires checkpoint against recorded answers, and their traps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox import models
from sandbox.webui import SandboxWebUI
from tests.sandbox.webui_client import get, image, post, recordings, switch, txt2img, typed, without_variable_parts

HIRES = {"enable_hr": True, "denoising_strength": 0.5, "hr_upscaler": "Lanczos"}
REFINER = {"refiner_checkpoint": "tiny_b", "refiner_switch_at": 0.5}


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("tiny_a", "tiny_b", "tiny_c"), start=1):
        models.sd15_checkpoint(folder / "Stable-diffusion" / f"{name}.safetensors", seed)
    models.sd15_lora(folder / "Lora" / "lora_one.safetensors", 10)
    return folder


@pytest.fixture
def servers(model_files: Path) -> Iterator[dict[str, SandboxWebUI]]:
    """A WebUI of each version that knows all hashes, with `tiny_a` loaded."""
    with SandboxWebUI(model_files, version="1.9.3") as old, SandboxWebUI(model_files, version="1.10.1") as new:
        for webui in (old, new):
            for name in ("tiny_c", "tiny_b", "tiny_a"):
                switch(webui, name)
        yield {"1.9.3": old, "1.10.1": new}


@pytest.mark.parametrize(("version", "path"), recordings("checkpoints"))
def test_answers_as_recorded(version: str, path: Path, servers: dict[str, SandboxWebUI]) -> None:
    case = json.loads(path.read_text())
    if "Clip skip: 2" in json.dumps(case["response"]):  # what a job before the recorded one has left
        post(servers[version], "options", {"CLIP_stop_at_last_layers": 2})

    ours = post(servers[version], "txt2img", case["request"]["body"])

    theirs = case["response"]["body"]
    assert ours.status_code == case["response"]["status"], ours.text
    if ours.status_code != 200:
        assert ours.json() == theirs
        return
    our_info, their_info = json.loads(ours.json()["info"]), json.loads(theirs["info"])
    assert ours.json()["parameters"] == theirs["parameters"]
    assert typed(our_info) == typed(their_info)
    assert without_variable_parts(our_info) == without_variable_parts(their_info)


@pytest.mark.parametrize("fields", [REFINER, {**HIRES, "hr_checkpoint_name": "tiny_b"}])
def test_the_other_checkpoint_draws_and_stays_loaded_and_the_options_still_name_the_first(
    fields: dict[str, object], servers: dict[str, SandboxWebUI]
) -> None:
    webui = servers["1.10.1"]
    hires = HIRES if "enable_hr" in fields else {}
    before = get(webui, "options")
    plain = image(webui, **hires)

    other = image(webui, **fields)
    after = get(webui, "options")

    assert other != plain
    assert after["sd_model_checkpoint"] == before["sd_model_checkpoint"]
    assert after["sd_checkpoint_hash"] != before["sd_checkpoint_hash"]
    assert image(webui, **hires) == plain  # it switches back by itself
    assert get(webui, "options")["sd_checkpoint_hash"] == before["sd_checkpoint_hash"]


def test_a_checkpoint_that_was_never_loaded_is_named_without_its_hash(model_files: Path) -> None:
    with SandboxWebUI(model_files, version="1.10.1") as webui:
        switch(webui, "tiny_a")
        first, second = (txt2img(webui, **REFINER)["info"]["extra_generation_params"]["Refiner"] for _ in range(2))

    assert first == "tiny_b"
    assert second.startswith("tiny_b [")


def test_a_title_with_a_hash_that_is_not_known_yet_may_mean_another_file(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "x", "ax"), start=1):
        models.sd15_checkpoint(tmp_path / "Stable-diffusion" / f"{name}.safetensors", seed)
    with SandboxWebUI(tmp_path, version="1.10.1") as webui:
        switch(webui, "x")
        switch(webui, "base")
        wrong = txt2img(webui, refiner_checkpoint="x.safetensors [0123456789]", refiner_switch_at=0.5)
        right = txt2img(webui, refiner_checkpoint="x.safetensors", refiner_switch_at=0.5)

    assert wrong["info"]["extra_generation_params"]["Refiner"] == "ax"
    assert right["info"]["extra_generation_params"]["Refiner"].startswith("x [")

"""Whole jobs with A1111's scripts: each picture is reported by what it says about itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.images import open_base64
from tests.support import world

VERSIONS = ("1.9.3", "1.10.1")
LORA = "<lora:detail_tweaker_xl:1>"
LINES = "red house\nblue\n--prompt green --steps 3 --seed 9 --width 128"
XYZ = [4, "2,3", [], 0, "", [], 0, "", [], True, True, False, False, False, False, False, 0, False]

# a job's script, the seeds of its pictures, and their steps; the body has seed 42 and 2 steps
JOBS: dict[str, tuple[dict[str, Any], list[int | None], list[int | None]]] = {
    "file": (
        {"script_name": "prompts from file or textbox", "script_args": [True, False, "start", LINES]},
        [42, 43, 9],
        [2, 2, 3],
    ),
    "matrix": (
        {"prompt": "a cat|red", "script_name": "prompt matrix", "script_args": [False, True, "positive", "comma", 0]},
        [None, 42, 43],
        [None, 2, 2],
    ),
    "xyz": ({"script_name": "x/y/z plot", "script_args": XYZ}, [None, 42, 42], [None, 2, 3]),
    "plain": ({"n_iter": 2}, [42, 43], [2, 2]),
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", JOBS)
def test_every_picture_is_reported_with_its_own_seed_and_steps(tmp_path: Path, version: str, name: str) -> None:
    given, seeds, steps = JOBS[name]
    with world(tmp_path, version=version, OUTPUT_DIR=str(tmp_path / "out")) as it:
        answer = it.ask(**given)

    found = answer["worker"]
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found["seeds"] == [picture["seed"] for picture in found["pictures"]] == seeds
    assert [picture["steps"] for picture in found["pictures"]] == steps
    assert files == [f"job-1-{n}{'' if seed is None else f'-{seed}'}.png" for n, seed in enumerate(seeds, start=1)]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_line_with_its_own_width_is_reported_with_it(tmp_path: Path, version: str) -> None:
    with world(tmp_path, version=version) as it:
        answer = it.ask(**JOBS["file"][0])

    assert [(picture["width"], picture["height"]) for picture in answer["worker"]["pictures"]] == [
        (64, 64),
        (64, 64),
        (128, 64),
    ]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_lora_is_counted_for_the_pictures_that_were_made_with_it(tmp_path: Path, version: str) -> None:
    swapped = [7, f"{LORA},dog", [], 0, "", [], 0, "", [], True, True, False, False, False, False, False, 0, False]
    with world(tmp_path, version=version) as it:
        plain = it.ask(prompt=f"a cat {LORA}", n_iter=2)["worker"]
        partly = it.ask(prompt=f"a cat {LORA}", script_name="x/y/z plot", script_args=swapped)["worker"]

    assert [(lora["loaded"], lora["pictures"]) for lora in (*plain["loras"], *partly["loras"])] == [
        (True, 2),
        (True, 1),
    ]
    assert plain["warnings"] == []
    assert partly["warnings"] == ["the script used the LoRA 'Detail Tweaker XL' for 1 of 2 pictures"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_lora_that_only_a_line_names_is_fetched_drawn_and_proven(tmp_path: Path, version: str) -> None:
    lines = f"red {LORA.replace(':1>', ':0.5>')}\nblue"
    script: dict[str, Any] = {
        "script_name": "prompts from file or textbox",
        "script_args": [False, False, "start", lines],
    }
    with world(tmp_path, version=version) as it:
        answer = it.ask(**script)
        plain = it.ask(prompt="red <lora:detail_tweaker_xl:0.5> a lighthouse")

    (lora,) = answer["worker"]["loras"]
    assert (lora["loaded"], lora["pictures"], lora["scale"]) == (True, 1, 0.5)
    assert answer["worker"]["warnings"] == []
    assert open_base64(answer["images"][0]).tobytes() == open_base64(plain["images"][0]).tobytes()


@pytest.mark.parametrize("version", VERSIONS)
def test_the_loras_of_the_list_are_drawn_in_every_picture_of_a_matrix(tmp_path: Path, version: str) -> None:
    matrix: dict[str, Any] = {"script_name": "prompt matrix", "script_args": [False, False, "positive", "comma", 0]}
    with world(tmp_path, version=version) as it:
        answer = it.ask(prompt="a cat|red|blue", loras=["detail_tweaker_xl"], **matrix)

    (lora,) = answer["worker"]["loras"]
    assert (lora["loaded"], lora["pictures"]) == (True, 4)

"""The sandbox's WebUI against recorded answers: scripts, LoRAs, hires, faces, formats, `sd_lora`, sampler names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sandbox.webui import SandboxWebUI
from tests.sandbox.webui_client import (
    VERSIONS,
    get,
    open_image,
    pixels,
    post,
    recordings,
    typed,
    without_variable_parts,
)
from tests.support import DATA

# The options that were set before a recorded request, by the beginning of its name.
OPTIONS_BEFORE: dict[str, dict[str, Any]] = {
    "restore_faces_gfpgan": {"face_restoration_model": "GFPGAN"},
    "samples_format_jpg": {"samples_format": "jpg"},
    "samples_format_webp": {"samples_format": "webp"},
    "samples_format_gif": {"samples_format": "gif"},
    "samples_format_override": {"samples_format": "png"},
    "sd_lora_option_unknown": {"sd_lora": "nope"},
    "sd_lora_option": {"sd_lora": "lora_three"},
    "matrix_return_grid_false": {"return_grid": False},
    "xyz_seed_return_grid_false": {"return_grid": False},
}


def replay(webui: SandboxWebUI, case: Any) -> Any:
    """Our answer to a recorded request."""
    given = [options for name, options in OPTIONS_BEFORE.items() if case["name"].startswith(name)]
    if given:
        post(webui, "options", given[0])
    request = case["request"]
    path = request["path"].removeprefix("/sdapi/v1/")
    return get(webui, path) if request["method"] == "GET" else post(webui, path, request["body"])


@pytest.mark.parametrize(("version", "path"), [*recordings("scripts"), *recordings("answers")])
def test_answers_as_recorded(version: str, path: Path, servers: dict[str, SandboxWebUI]) -> None:
    case = json.loads(path.read_text())
    theirs = case["response"]["body"]

    ours = replay(servers[version], case)

    if case["name"] in ("face_restorers_offline", "upscalers_offline"):
        assert ours == theirs
        return
    if case["name"] == "lora_list":
        assert {entry["name"] for entry in ours} <= {entry["name"] for entry in theirs}
        return
    assert ours.status_code == case["response"]["status"]
    if ours.status_code != 200:
        assert ours.json() == theirs
        return
    body = ours.json()
    our_info, their_info = json.loads(body["info"]), json.loads(theirs["info"])
    is_random = case["request"]["body"]["seed"] == -1
    assert body["parameters"] == theirs["parameters"]
    assert list(our_info) == list(their_info)
    assert typed(our_info) == typed(their_info)
    assert without_variable_parts(our_info, is_random) == without_variable_parts(their_info, is_random)
    compare_pictures(body["images"], our_info, case)


def compare_pictures(images: list[str], info: Any, case: Any) -> None:
    """Which pictures have a text, and which one; their formats and sizes; which of them are equal."""
    opened = [open_image(image) for image in images]
    texts = [text_of(image) for image in opened]
    their_infotexts = json.loads(case["response"]["body"]["info"])["infotexts"]
    assert [text and text in info["infotexts"] for text in texts] == [
        text and (text in their_infotexts or "UNICODE" not in text) for text in case["png_infotexts"]
    ]
    theirs = case["png_pictures"]
    assert [image.format for image in opened] == [picture["format"] for picture in theirs]
    drawn = [index for index, text in enumerate(texts) if text]  # A1111 draws a legend on grids, the sandbox does not
    assert [list(opened[index].size) for index in drawn] == [theirs[index]["size"] for index in drawn]
    ours_by_pixels = [pixels(images[index]) for index in drawn]
    theirs_by_pixels = [theirs[index]["pixels_sha256"] for index in drawn]
    assert [ours_by_pixels.index(each) for each in ours_by_pixels] == [
        theirs_by_pixels.index(each) for each in theirs_by_pixels
    ]


def text_of(image: Image.Image) -> str | None:
    if image.format == "PNG":
        text = image.info.get("parameters")
        return None if text is None else str(text)
    comment = image.getexif().get_ifd(0x8769)[0x9286]
    return bytes(comment).removeprefix(b"UNICODE\0").decode("utf-16-be")


# Recordings whose (last) pictures are equal although their requests differ: a LoRA that was not applied, a file that is
# not there.
SAME_PIXELS = [
    ("scripts/file_iterate_false", 1, "scripts/file_compare_blue_plain", 0),
    ("answers/restore_faces_offline", 0, "answers/lora_none", 0),
    ("answers/restore_faces_gfpgan_offline", 0, "answers/lora_none", 0),
    ("answers/hires_resrgan_offline", 0, "answers/hires_lanczos", 0),
    ("answers/samples_format_override_jpg", 0, "answers/lora_none", 0),
    ("scripts/xyz_sr_unknown_lora", 2, "answers/lora_none", 0),
]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("one", "at", "other", "at_other"), SAME_PIXELS)
def test_what_had_no_effect_has_none_here(
    version: str, one: str, at: int, other: str, at_other: int, servers: dict[str, SandboxWebUI]
) -> None:
    cases = [json.loads((DATA / f"webui-{version}" / f"{name}.json").read_text()) for name in (one, other)]

    ours = [replay(servers[version], case).json()["images"] for case in cases]

    assert cases[0]["png_pictures"][at]["pixels_sha256"] == cases[1]["png_pictures"][at_other]["pixels_sha256"]
    assert pixels(ours[0][at]) == pixels(ours[1][at_other])


def test_a_model_that_a_line_names_stays_loaded_under_the_old_option(servers: dict[str, SandboxWebUI]) -> None:
    case = json.loads((DATA / "webui-1.10.1" / "scripts" / "file_line_model.json").read_text())

    replay(servers["1.10.1"], case)

    options, listed = get(servers["1.10.1"], "options"), get(servers["1.10.1"], "sd-models")
    assert options["sd_model_checkpoint"].startswith("tiny_a")
    assert options["sd_checkpoint_hash"] == listed[1]["sha256"]


@pytest.mark.parametrize(("version", "path"), recordings("samplers"))
def test_sampler_names_are_understood_as_recorded(version: str, path: Path, servers: dict[str, SandboxWebUI]) -> None:
    case = json.loads(path.read_text())

    for theirs in case["answers"]:
        names = {key: theirs[key] for key in ("sampler_name", "scheduler")}
        ours = post(servers[version], "txt2img", {**case["request"]["body"], **names})

        assert ours.status_code == theirs["status"], names
        if ours.status_code != 200:
            assert ours.json() == theirs["error"]
            continue
        info = json.loads(ours.json()["info"])
        ours_and_theirs = (info["infotexts"][0], theirs["infotext"])
        our_text, their_text = (re.sub(r"Model hash: \w+", "", text) for text in ours_and_theirs)
        assert our_text == their_text, names
        assert info["sampler_name"] == theirs["info.sampler_name"]
        assert info["extra_generation_params"] == theirs["info.extra_generation_params"]


def test_an_upscaler_is_used_if_its_file_is_there(model_files: Path, tmp_path: Path) -> None:
    for folder in ("Stable-diffusion", "Lora"):
        (tmp_path / folder).symlink_to(model_files / folder)
    (tmp_path / "RealESRGAN").mkdir()
    (tmp_path / "RealESRGAN" / "RealESRGAN_x4plus.pth").write_bytes(b"weights")
    hires = {"prompt": "a cat", "seed": 5, "steps": 2, "width": 64, "height": 64, "denoising_strength": 0.7}
    with SandboxWebUI(tmp_path) as webui:
        paths = {entry["name"]: entry["model_path"] for entry in get(webui, "upscalers")}

        ours = [
            post(webui, "txt2img", {**hires, "enable_hr": True, "hr_upscaler": name}).json()["images"][0]
            for name in ("R-ESRGAN 4x+", "SwinIR 4x", "Lanczos")
        ]

    assert paths["R-ESRGAN 4x+"] == str(tmp_path / "RealESRGAN" / "RealESRGAN_x4plus.pth")
    assert paths["SwinIR 4x"].startswith("https://")
    assert [pixels(ours[0]) == pixels(ours[2]), pixels(ours[1]) == pixels(ours[2])] == [False, True]


def test_faces_are_restored_if_all_files_are_there(model_files: Path, tmp_path: Path) -> None:
    for folder in ("Stable-diffusion", "Lora"):
        (tmp_path / folder).symlink_to(model_files / folder)
    files = ("Codeformer/codeformer-v0.1.0.pth", "GFPGAN/detection_Resnet50_Final.pth", "GFPGAN/parsing_parsenet.pth")
    pictures = []
    with SandboxWebUI(tmp_path) as webui:
        for file in ("", *files):
            if file:
                (tmp_path / file).parent.mkdir(exist_ok=True)
                (tmp_path / file).write_bytes(b"weights")
            body = {"prompt": "a cat", "seed": 5, "steps": 2, "width": 64, "height": 64, "restore_faces": True}
            pictures.append(pixels(post(webui, "txt2img", body).json()["images"][0]))

    assert [picture == pictures[0] for picture in pictures] == [True, True, True, False]

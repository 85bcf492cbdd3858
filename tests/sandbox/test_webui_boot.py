"""What the sandbox's WebUI loads after a start with `--skip-load-model-at-start`, as recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sandbox import models
from sandbox.webui import SandboxWebUI
from tests.sandbox.webui_client import get, post, recordings, txt2img

OPTIONS = ("sd_model_checkpoint", "sd_checkpoint_hash")


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("tiny_a", "tiny_b"), start=1):
        models.sd15_checkpoint(folder / "Stable-diffusion" / f"{name}.safetensors", seed)
    return folder


def our_hashes(model_files: Path) -> dict[str, str]:
    """Recorded hash → our hash, whole and short."""
    found = {}
    recorded = (
        "92e79e2e23e08d8f9de9a6a1100090c2a693ae74ca048bbee677cc19f039f0c5",
        "977ddb8789e0b135b0a37ac8ebf6f7402cb21b4708082919b40cadea93e16f6e",
    )
    for name, theirs in zip(("tiny_a", "tiny_b"), recorded, strict=True):
        ours = models.sha256_of(model_files / "Stable-diffusion" / f"{name}.safetensors")
        found[theirs] = ours
    return {**found, **{theirs[:10]: ours[:10] for theirs, ours in found.items()}}


def with_our_hashes(value: Any, hashes: Mapping[str, str]) -> Any:
    text = json.dumps(value)
    for theirs, ours in hashes.items():
        text = text.replace(theirs, ours)
    return json.loads(text)


@pytest.mark.parametrize(("version", "path"), recordings("cold_boot"))
def test_a_cold_boot_goes_as_recorded(version: str, path: Path, model_files: Path) -> None:
    case = with_our_hashes(json.loads(path.read_text()), our_hashes(model_files))
    config = case.get("config_json_before")
    with SandboxWebUI(model_files, version=version, config_json=config) as webui:
        if case.get("hash_cache_before") and config:
            # It was loaded by an earlier process: of a name in config.json that was not, the cache knows nothing.
            known = "tiny_a"
            webui.hashes.compute(
                f"checkpoint/{known}.safetensors", model_files / "Stable-diffusion" / f"{known}.safetensors"
            )
            webui.restart()
            webui.loads.clear()

        for exchange in exchanges(case):
            request = exchange["request"]
            answer = post(webui, request["path"].removeprefix("/sdapi/v1/"), request["body"])

            assert answer.status_code == exchange["response"]["status"]
            theirs = exchange["response"]["body"]
            if isinstance(theirs, dict) and "info" in theirs:
                used = ("sd_model_name", "sd_model_hash")
                ours, recorded = json.loads(answer.json()["info"]), json.loads(theirs["info"])
                assert [ours[key] for key in used] == [recorded[key] for key in used]
            else:
                assert answer.json() == theirs
            if "options_after" in exchange:
                ours = get(webui, "options")
                assert [ours[key] or None for key in OPTIONS] == [
                    exchange["options_after"][key] or None for key in OPTIONS
                ]


def exchanges(case: Any) -> list[Any]:
    """The requests of a recording in order, each with the options after it."""
    if "requests" in case:
        return list(case["requests"])
    first = case["first"]
    looked = case["looks_after_it"][-1]["options"]
    drawn = {**case["txt2img"], "options_after": case["options_after_txt2img"]}
    return [*([{**first, "options_after": looked}] if first else []), drawn]


# (version, the first request, the file names that were loaded then and with a txt2img after it); tiny_a is the first
LOADS = [
    ("1.9.3", ("options", {"sd_model_checkpoint": "tiny_b"}), ["tiny_a"]),
    ("1.10.1", ("options", {"sd_model_checkpoint": "tiny_b"}), ["tiny_b"]),
    ("1.9.3", ("reload-checkpoint", None), ["tiny_a"]),
    ("1.10.1", ("reload-checkpoint", None), ["tiny_a"]),
    # the option's model is loaded before the override's
    ("1.9.3", ("txt2img", {"override_settings": {"sd_model_checkpoint": "tiny_b"}}), ["tiny_a", "tiny_b", "tiny_a"]),
    ("1.10.1", ("txt2img", {"override_settings": {"sd_model_checkpoint": "tiny_b"}}), ["tiny_a", "tiny_b", "tiny_a"]),
]


@pytest.mark.parametrize(("version", "first", "loads"), LOADS)
def test_every_load_is_counted(version: str, first: tuple[str, Any], loads: list[str], model_files: Path) -> None:
    with SandboxWebUI(model_files, version=version) as webui:
        path, body = first
        post(
            webui,
            path,
            {"prompt": "a cat", "steps": 1, "width": 64, "height": 64, **(body or {})} if path == "txt2img" else body,
        )
        txt2img(webui)

        assert webui.loads == [f"{name}.safetensors" for name in loads]


def test_a_checkpoint_on_the_command_line_is_the_option_from_the_start(model_files: Path) -> None:
    with SandboxWebUI(model_files, initial_checkpoint="tiny_b", config_json={"sd_model_checkpoint": "tiny_a"}) as webui:
        post(webui, "reload-checkpoint")  # waits for the load at the start

        assert get(webui, "options")["sd_model_checkpoint"].startswith("tiny_b")
        assert webui.loads == ["tiny_b.safetensors"]


def test_options_are_kept_in_config_json(model_files: Path) -> None:
    with SandboxWebUI(model_files) as webui:
        post(webui, "options", {"CLIP_stop_at_last_layers": 2})
        post(webui, "options", {"CLIP_stop_at_last_layers": 3, "nope": 1})  # fails midway: not saved

        assert webui.config_json == {"CLIP_stop_at_last_layers": 2}
        assert get(webui, "options")["CLIP_stop_at_last_layers"] == 3
        webui.restart()
        assert get(webui, "options")["CLIP_stop_at_last_layers"] == 2

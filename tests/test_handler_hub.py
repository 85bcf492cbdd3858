"""Whole jobs with models of Hugging Face: the real worker, the sandbox's hub."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from sandbox.models import sdxl_checkpoint, sdxl_lora, sha256_of
from tests.support import world

TOKEN = "the-hub-token"
STYLE = "hf:owner/loras/style.safetensors"


def test_a_lora_of_hugging_face_is_drawn_and_proven(tmp_path: Path) -> None:
    path = sdxl_lora(tmp_path / "style.safetensors", 5, 300_000)
    with world(tmp_path, HF_TOKEN=TOKEN) as it:
        it.hub.add("owner/loras", "style.safetensors", path)
        answer = it.ask(loras=[{"url": STYLE, "scale": 0.6}])

    (lora,) = answer["worker"]["loras"]
    assert (lora["sha256"], lora["loaded"], lora["downloaded"], lora["scale"]) == (sha256_of(path), True, True, 0.6)
    assert {asked.headers.get("authorization") for asked in it.hub.asked} == {None}


@pytest.mark.parametrize("is_listed", [True, False])
def test_a_private_repository_is_for_callers_if_the_operator_lists_it(
    tmp_path: Path, is_listed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with world(tmp_path, HF_TOKEN=TOKEN, HF_REPOS="Owner/Loras" if is_listed else "owner/others") as it:
        it.hub.add("owner/loras", "style.safetensors", sdxl_lora(tmp_path / "style.safetensors", 5, 300_000))
        it.hub.repos["owner/loras"].private = True
        it.hub.repos["owner/loras"].readers = {TOKEN}
        answer = it.ask(loras=[STYLE])
        missing = it.ask(loras=[STYLE.replace("owner/loras", "owner/nothing")])

    if is_listed:
        assert answer["worker"]["loras"][0]["loaded"]
    else:
        assert answer["code"] == "MODEL_ACCESS_DENIED"
        assert answer["error"].replace("owner/loras", "") == missing["error"].replace("owner/nothing", "")
        assert answer["hint"] == missing["hint"]
    assert it.hub.storage.keys_seen == []
    assert TOKEN not in caplog.text


def test_the_checkpoint_of_an_operator_may_be_a_private_file_of_hugging_face(tmp_path: Path) -> None:
    path = sdxl_checkpoint(tmp_path / "own.safetensors", 7, 3_000_000)
    settings = {"CHECKPOINT_URL": "hf:owner/own/own.safetensors", "CHECKPOINT_FILE": "own.safetensors"}
    with world(tmp_path, boot=False, HF_TOKEN=TOKEN, **settings) as it:
        it.hub.add("owner/own", "own.safetensors", path)
        it.hub.repos["owner/own"].private = True
        it.hub.repos["owner/own"].readers = {TOKEN}
        it.boot()
        answer = it.ask()

    assert answer["worker"]["checkpoint"]["sha256"] == sha256_of(path)

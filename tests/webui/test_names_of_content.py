"""Whole jobs with files that were replaced under their names, and with files of any name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from sandbox.models import sdxl_checkpoint, sdxl_lora, sha256_of
from tests.images import open_base64
from tests.support import World, world

HASH = "0123456789ab" * 5 + "0123"  # what a trainer wrote into the file; A1111 believes it


def put_lora(source: World, name: str, seed: int, *, age: float = 0.0, metadata: str | None = None) -> str:
    """Put a LoRA into the cache by hand, and return its SHA-256. `age` is seconds."""
    about = {} if metadata is None else {"sshs_model_hash": metadata}
    path = sdxl_lora(source.models_dir / "loras" / f"{name}.safetensors", seed, None, hashed=False, **about)
    os.utime(path, (path.stat().st_mtime - age,) * 2)
    return sha256_of(path)


def pixels(answer: dict[str, Any]) -> list[bytes]:
    return [open_base64(image).tobytes() for image in answer["images"]]


def lora_of(answer: dict[str, Any]) -> dict[str, Any]:
    (lora,) = answer["worker"]["loras"]
    return dict(lora)


@pytest.mark.parametrize("age", [0.0, 1_000.0], ids=["newer", "older"])
@pytest.mark.parametrize("metadata", [None, HASH], ids=["hashed", "hash in the file"])
def test_a_lora_that_was_replaced_is_drawn_and_reported_as_it_is_now(
    tmp_path: Path, age: float, metadata: str | None
) -> None:
    with world(tmp_path) as it:
        put_lora(it, "own", 1, age=500, metadata=metadata)
        before = it.ask(loras=["own"])
        sha256 = put_lora(it, "own", 2, age=age, metadata=metadata)

        after = it.ask(loras=["own"])
        put_lora(it, "other", 2)
        same_content = it.ask(loras=["other"])

    assert lora_of(after) | {"sha256": sha256, "tag": f"own_{sha256[:8]}", "loaded": True} == lora_of(after)
    assert after["images"] != before["images"]
    assert pixels(after) == pixels(same_content)


def test_a_checkpoint_that_was_replaced_by_an_older_file_is_reported_as_it_is_now(tmp_path: Path) -> None:
    checkpoint = "my_own.safetensors"
    settings = {"CHECKPOINT_FILE": checkpoint, "CHECKPOINT_NAME": "My own"}
    with world(tmp_path, boot=False, **settings) as it:
        path = it.models_dir / "checkpoints" / checkpoint
        sdxl_checkpoint(path, 1)
        it.boot()
        before = it.ask()
        it.stop()
        sdxl_checkpoint(path, 2)
        os.utime(path, (path.stat().st_mtime - 1_000,) * 2)

        it.boot()
        after = it.ask()

    assert after["worker"]["checkpoint"]["sha256"] == sha256_of(path) != before["worker"]["checkpoint"]["sha256"]
    assert pixels(after) != pixels(before)


@pytest.mark.parametrize("name", ["a#b", "a=b", "<a>", "a:b", "a, b", "名前"])
def test_a_lora_is_applied_whatever_its_file_is_called(tmp_path: Path, name: str) -> None:
    with world(tmp_path) as it:
        put_lora(it, name, 1)
        put_lora(it, "plain", 1)

        listed = it.ask(loras=[{"name": name, "scale": 0.5}])
        plain = it.ask(prompt="a lighthouse <lora:plain:0.5>")

    assert lora_of(listed)["loaded"] and lora_of(listed)["name"] == name
    assert pixels(listed) == pixels(plain)


@pytest.mark.parametrize("form", ["own file", "OWN FILE", "{tag}", "own file.safetensors"])
def test_a_tag_may_name_a_file_by_its_stem_or_by_the_webuis_name(tmp_path: Path, form: str) -> None:
    with world(tmp_path) as it:
        sha256 = put_lora(it, "own file", 1)
        tag = f"own file_{sha256[:8]}"

        answer = it.ask(prompt=f"a lighthouse <lora:{form.format(tag=tag)}:0.5>")
        sent = it.generations()[-1]["prompt"]

    assert lora_of(answer) | {"file": "own file.safetensors", "tag": tag, "loaded": True} == lora_of(answer)
    assert sent == f"a lighthouse <lora:{tag}:0.5>"


def test_the_webuis_name_of_other_content_means_nothing(tmp_path: Path) -> None:
    with world(tmp_path) as it:
        put_lora(it, "own", 1)

        answer = it.ask(prompt="a lighthouse <lora:own_01234567:0.5>")

    assert answer["code"] == "MODEL_NOT_FOUND"


def test_the_list_and_a_tag_with_the_webuis_name_are_one_lora_with_the_tags_weight(tmp_path: Path) -> None:
    with world(tmp_path) as it:
        sha256 = put_lora(it, "own", 1)

        answer = it.ask(prompt=f"a lighthouse <lora:own_{sha256[:8]}:0.5>", loras=["own"])

    assert lora_of(answer)["scale"] == 0.5

"""A CivitAI that serves one LoRA, and a WebUI of each version."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import models
from sandbox.civitai import SandboxCivitAI
from sandbox.webui import SandboxWebUI
from tests.sandbox.client import SIZE
from tests.sandbox.webui_client import switch


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.sdxl_lora(tmp_path_factory.mktemp("models") / "add-detail-xl.safetensors", 1, SIZE)


@pytest.fixture
def civitai(lora: Path) -> Iterator[SandboxCivitAI]:
    with SandboxCivitAI(key="the-key") as server:
        server.add(135867, lora, name="Detail Tweaker XL", model_id=122359, file_id=99264, trained_words=["detail"])
        yield server


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small versions of the files with which the recordings were made."""
    folder = tmp_path_factory.mktemp("models")
    checkpoints, loras = folder / "Stable-diffusion", folder / "Lora"
    for seed, name in enumerate(("tiny_a", "tiny_b"), start=1):
        models.sd15_checkpoint(checkpoints / f"{name}.safetensors", seed)
    aliases = {"pa": "pb", "pb": "pb", "qa": "qa", "qb": "qa", "forged": "forged_out", "lora_two": "something_else"}
    hashes = {"comma_hash": "0123, 4567, 89ab", "forged": "a, other: 123456789abcdef", "lora_two": "ab" * 32}
    for seed, name in enumerate(("lora_one", "lora_two", "lora_three", "comma_hash", "forged", "pa", "pb", "qa", "qb")):
        metadata = {"ss_output_name": aliases.get(name), "sshs_model_hash": hashes.get(name)}
        given: dict[str, Any] = {key: value for key, value in metadata.items() if value is not None}
        models.sd15_lora(loras / f"{name}.safetensors", 10 + seed, **given)
    return folder


@pytest.fixture
def servers(model_files: Path) -> Iterator[dict[str, SandboxWebUI]]:
    """A WebUI of each version with `tiny_a` loaded."""
    with SandboxWebUI(model_files, version="1.9.3") as old, SandboxWebUI(model_files, version="1.10.1") as new:
        for webui in (old, new):
            switch(webui, "tiny_a")
        yield {"1.9.3": old, "1.10.1": new}

"""A CivitAI that serves one LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox import models
from sandbox.civitai import SandboxCivitAI
from tests.sandbox.client import SIZE


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.sdxl_lora(tmp_path_factory.mktemp("models") / "add-detail-xl.safetensors", 1, SIZE)


@pytest.fixture
def civitai(lora: Path) -> Iterator[SandboxCivitAI]:
    with SandboxCivitAI(key="the-key") as server:
        server.add(135867, lora, name="Detail Tweaker XL", model_id=122359, file_id=99264, trained_words=["detail"])
        yield server

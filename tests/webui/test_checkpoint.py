"""The switch to a checkpoint is believed only if its hash verifies it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from a1111_worker.context import Deadline
from a1111_worker.domain import Model, ModelKind
from a1111_worker.errors import CheckpointNotLoaded
from a1111_worker.webui import client
from a1111_worker.webui.checkpoint import CheckpointSwitch
from sandbox.models import sdxl_checkpoint
from sandbox.server import Exchange
from sandbox.webui import SandboxWebUI
from tests.support import QUICK


@pytest.fixture
def webui(tmp_path: Path) -> Iterator[SandboxWebUI]:
    """A WebUI with two checkpoints, and none of them loaded."""
    for folder in ("Stable-diffusion", "Lora", "VAE"):
        (tmp_path / folder).mkdir()
    for number, name in enumerate(("ours", "another")):
        sdxl_checkpoint(tmp_path / "Stable-diffusion" / f"{name}.safetensors", number, 3_000_000)
    with SandboxWebUI(tmp_path) as it:
        yield it


def checkpoint(webui: SandboxWebUI, stem: str = "ours", *, sha256: str = "") -> Model:
    path = webui.models_dir / "Stable-diffusion" / f"{stem}.safetensors"
    if not sha256:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Model(ModelKind.CHECKPOINT, stem.title(), path.name, path, sha256=sha256, size=1)


def switch_to(webui: SandboxWebUI, model: Model, *, timeout: float = 5.0) -> CheckpointSwitch:
    return CheckpointSwitch(client.WebUI(webui.url), model, timeout=timeout, timings=QUICK)


def test_a_switch_loads_the_checkpoint(webui: SandboxWebUI) -> None:
    switch = switch_to(webui, checkpoint(webui))
    listed = switch.find()

    assert not switch.is_loaded(listed)
    switch.run(listed, Deadline(20))

    assert switch.is_loaded(switch.find())
    assert not switch_to(webui, checkpoint(webui, "another")).is_loaded(listed)


def test_a_checkpoint_that_came_after_the_start_is_found(webui: SandboxWebUI) -> None:
    sdxl_checkpoint(webui.models_dir / "Stable-diffusion" / "late.safetensors", 7, 3_000_000)

    assert switch_to(webui, checkpoint(webui, "late")).find().file == "late.safetensors"


def test_a_checkpoint_that_the_webui_does_not_see_is_an_error(webui: SandboxWebUI) -> None:
    with pytest.raises(CheckpointNotLoaded, match=r"does not list gone\.safetensors"):
        switch_to(webui, checkpoint(webui, "gone", sha256="ab" * 32)).find()


def test_a_file_with_other_bytes_under_the_name_is_not_believed(webui: SandboxWebUI) -> None:
    switch = switch_to(webui, checkpoint(webui, sha256="ab" * 32), timeout=0.4)
    listed = switch.find()

    with pytest.raises(CheckpointNotLoaded, match="did not load Ours in 0 s"):
        switch.run(listed, Deadline(20))


def test_a_switch_that_answers_200_and_loads_nothing_is_not_believed(webui: SandboxWebUI) -> None:
    def ignore(exchange: Exchange) -> bool:
        if exchange.asked.method != "POST":
            return False
        exchange.send_json(200, None)
        return True

    webui.before.append(ignore)
    switch = switch_to(webui, checkpoint(webui))
    listed = switch.find()

    with pytest.raises(CheckpointNotLoaded, match="its hash shows that it is not"):
        switch.run(listed, Deadline(20))


def test_a_switch_that_the_webui_refuses_names_the_checkpoint(webui: SandboxWebUI) -> None:
    def refuse(exchange: Exchange) -> bool:
        if exchange.asked.method != "POST":
            return False
        exchange.send_json(422, {"error": "HTTPException", "detail": "no", "body": "", "errors": ""})
        return True

    webui.before.append(refuse)
    switch = switch_to(webui, checkpoint(webui))
    listed = switch.find()

    with pytest.raises(CheckpointNotLoaded, match="refused to load Ours"):
        switch.run(listed, Deadline(20))

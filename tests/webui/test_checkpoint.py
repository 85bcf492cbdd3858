"""How the checkpoint gets loaded: with one load wherever A1111 allows that, and never believed without its hash."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from a1111_worker.context import Deadline
from a1111_worker.domain import Model, ModelKind
from a1111_worker.errors import CheckpointNotLoaded
from a1111_worker.webui import client
from a1111_worker.webui.checkpoint import CheckpointSwitch, file_loaded_from_cold, listed_title
from a1111_worker.webui.responses import ListedCheckpoint
from sandbox.models import sdxl_checkpoint
from sandbox.server import Exchange
from sandbox.webui import SandboxWebUI
from tests.support import QUICK, wait_until

VERSIONS = ("1.9.3", "1.10.1")
OURS, ANOTHER = "ours.safetensors", "another.safetensors"


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints. The other one is the first of A1111's list."""
    folder = tmp_path_factory.mktemp("models")
    for number, name in enumerate((OURS, ANOTHER)):
        sdxl_checkpoint(folder / "Stable-diffusion" / name, number, 3_000_000)
    return folder


@contextlib.contextmanager
def cold(models_dir: Path, version: str, **given: Any) -> Iterator[SandboxWebUI]:
    """A WebUI in which nothing is loaded."""
    with SandboxWebUI(models_dir, version=version, **given) as webui:
        yield webui


@pytest.fixture(params=VERSIONS)
def webui(request: pytest.FixtureRequest, models_dir: Path) -> Iterator[SandboxWebUI]:
    with cold(models_dir, request.param) as it:
        yield it


def checkpoint(webui: SandboxWebUI, file: str = OURS, *, sha256: str = "") -> Model:
    path = webui.models_dir / "Stable-diffusion" / file
    if not sha256:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Model(ModelKind.CHECKPOINT, path.stem.title(), file, path, sha256=sha256, size=1, version_id=1)


LISTED = [ListedCheckpoint("xours.safetensors", None), ListedCheckpoint("ours.safetensors [abababab12]", "ab" * 32)]


def test_a_checkpoint_is_named_by_the_title_that_is_listed_now() -> None:
    ours = Model(ModelKind.CHECKPOINT, "Ours", OURS, Path(OURS), sha256="ab" * 32, size=1, version_id=1)

    assert listed_title(ours, LISTED) == "ours.safetensors [abababab12]"
    for model in (replace(ours, sha256="cd" * 32), replace(ours, file="urs.safetensors")):
        with pytest.raises(CheckpointNotLoaded):
            listed_title(model, LISTED)


def load(webui: SandboxWebUI, model: Model) -> None:
    CheckpointSwitch(client.WebUI(webui.url), model, timeout=5.0, timings=QUICK).run(Deadline(20))


def title(webui: SandboxWebUI, file: str) -> str:
    return f"{file} [{checkpoint(webui, file).sha256[:10]}]"


def test_a_text_that_is_no_name_of_a_file_means_the_first_one() -> None:
    listed = [ListedCheckpoint("a.safetensors", None), ListedCheckpoint("b.safetensors [0123456789]", "01" * 32)]

    named = ["b.safetensors [0123456789]", "b.safetensors", "b", "b.safetensors [9876543210]", "a", None]
    assert [file_loaded_from_cold(text, listed) for text in named] == [*["b.safetensors"] * 3, *["a.safetensors"] * 3]
    assert file_loaded_from_cold("a", []) is None


# What config.json holds at the start (`{file title}` in braces), whether the hashes of both files are known, and which
# files 1.9.3 and 1.10.1 load until ours is there.
CONFIGS = {
    "start.sh wrote our file's name": (OURS, False, [OURS], [OURS]),
    "our title, its hash is known": (f"{{{OURS}}}", True, [OURS], [OURS]),
    "our file's name, its hash is known": (OURS, True, [OURS], [OURS]),
    # somebody else's: 1.9.3 loses every switch before a first load
    "no config.json": (None, False, [ANOTHER, OURS], [OURS]),
    "our title, its hash is not known": (f"{{{OURS}}}", False, [ANOTHER, OURS], [OURS]),
    "another file": (ANOTHER, False, [ANOTHER, OURS], [OURS]),
    "another title, its hash is known": (f"{{{ANOTHER}}}", True, [ANOTHER, OURS], [OURS]),
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_boot_loads_nothing_twice_and_nothing_else_if_it_can(models_dir: Path, version: str, name: str) -> None:
    named, knows_hashes, *loads = CONFIGS[name]
    with cold(models_dir, version) as webui:
        if knows_hashes:
            for file in (OURS, ANOTHER):
                webui.hashes.compute(f"checkpoint/{file}", models_dir / "Stable-diffusion" / file)
        if named and named.startswith("{"):
            named = title(webui, named[1:-1])
        webui.config_json = {"sd_model_checkpoint": named} if named else None
        if named == title(webui, OURS):
            webui.config_json = {**(webui.config_json or {}), "sd_checkpoint_hash": checkpoint(webui).sha256}
        webui.restart()

        load(webui, checkpoint(webui))

        assert webui.loads == loads[VERSIONS.index(version)]
        assert webui.process.model.loaded is not None
        assert webui.process.model.loaded.checkpoint.name == OURS


@pytest.mark.parametrize("version", VERSIONS)
def test_a_load_that_began_with_the_webui_is_waited_for(models_dir: Path, version: str) -> None:
    with cold(models_dir, version, initial_checkpoint=OURS, switch_seconds=0.3) as webui:
        wait_until(lambda: webui.loads, "the load at the start")

        load(webui, checkpoint(webui))

        assert webui.loads == [OURS]


def test_a_loaded_checkpoint_is_not_loaded_again(webui: SandboxWebUI) -> None:
    load(webui, checkpoint(webui))
    before = list(webui.loads)

    load(webui, checkpoint(webui))

    assert webui.loads == before


def test_another_checkpoint_is_switched_to(webui: SandboxWebUI) -> None:
    load(webui, checkpoint(webui, ANOTHER))

    load(webui, checkpoint(webui))

    assert webui.loads == [ANOTHER, OURS]


def test_other_weights_under_our_option_are_switched_back(webui: SandboxWebUI) -> None:
    load(webui, checkpoint(webui))
    api = client.WebUI(webui.url)
    override = {
        "prompt": "x",
        "steps": 1,
        "width": 64,
        "height": 64,
        "override_settings": {"sd_model_checkpoint": ANOTHER},
    }
    api.txt2img(override, timeout=5).read()  # A1111 restores the option's text, and not the weights

    load(webui, checkpoint(webui))

    assert webui.process.model.loaded is not None
    assert webui.process.model.loaded.checkpoint.name == OURS


def test_a_checkpoint_that_came_after_the_start_is_found(tmp_path: Path) -> None:
    with cold(tmp_path, "1.10.1") as webui:
        sdxl_checkpoint(tmp_path / "Stable-diffusion" / "late.safetensors", 7, 3_000_000)

        load(webui, checkpoint(webui, "late.safetensors"))

        assert webui.loads == ["late.safetensors"]


def test_a_checkpoint_that_the_webui_does_not_see_is_an_error(webui: SandboxWebUI) -> None:
    with pytest.raises(CheckpointNotLoaded, match=r"does not list gone\.safetensors"):
        load(webui, checkpoint(webui, "gone.safetensors", sha256="ab" * 32))


def test_a_file_with_other_bytes_under_the_name_is_not_believed(webui: SandboxWebUI) -> None:
    with pytest.raises(CheckpointNotLoaded, match="its hash shows that it is not"):
        load(webui, checkpoint(webui, sha256="ab" * 32))


def answer_posts(webui: SandboxWebUI, status: int, body: Mapping[str, Any] | None) -> None:
    def answer(exchange: Exchange) -> bool:
        if exchange.asked.method != "POST" or exchange.asked.path.endswith("refresh-checkpoints"):
            return False
        exchange.send_json(status, body)
        return True

    webui.before.append(answer)


def test_a_switch_that_answers_200_and_loads_nothing_is_not_believed(webui: SandboxWebUI) -> None:
    answer_posts(webui, 200, None)

    with pytest.raises(CheckpointNotLoaded, match="its hash shows that it is not"):
        load(webui, checkpoint(webui))


def test_a_switch_that_the_webui_refuses_names_the_checkpoint(webui: SandboxWebUI) -> None:
    answer_posts(webui, 422, {"error": "HTTPException", "detail": "no", "body": "", "errors": ""})

    with pytest.raises(CheckpointNotLoaded, match="refused to load Ours"):
        load(webui, checkpoint(webui))

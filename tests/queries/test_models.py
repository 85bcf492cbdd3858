"""A `models` job: everything that a client's menus show, in A1111's own words and without a path of the container."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from a1111_worker import __version__
from a1111_worker.catalog import LORAS
from a1111_worker.domain import Task
from a1111_worker.queries.models import PATHS, with_bare_names
from a1111_worker.request.fields import OVERRIDABLE_OPTIONS
from a1111_worker.webui.responses import MENUS, parse_menu
from sandbox.models import sdxl_lora
from sandbox.server import Exchange
from tests.support import DATA, DETAIL, SMALL, World, wait_until, world


@pytest.fixture(params=["1.9.3", "1.10.1"])
def it(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    with world(tmp_path, version=request.param) as a_world:
        yield a_world


def models(it: World) -> dict[str, Any]:
    answer: dict[str, Any] = it.run({"id": "menus", "input": {"task": "models"}})["models"]
    return answer


def test_the_menus_show_what_is_there(it: World) -> None:
    sdxl_lora(it.models_dir / "loras" / "by_hand.safetensors", 7, 100_000)
    it.ask(loras=[{"version_id": DETAIL}])

    found = models(it)

    assert set(found["webui"]) == set(MENUS)
    assert found["tasks"] == [task.value for task in Task]
    assert found["options"] == {name: option.default for name, option in OVERRIDABLE_OPTIONS.items()}
    assert found["limits"]["max_steps"] == 150
    assert found["versions"] == {"worker": __version__, "webui": it.webui.version}
    assert [(entry["version_id"], entry["scale"]) for entry in found["catalog"]] == [
        (lora.version_id, lora.scale) for lora in LORAS
    ]
    (checkpoint,) = found["checkpoints"]
    assert (checkpoint["default"], checkpoint["loaded"], checkpoint["cached"]) == (True, True, True)
    assert checkpoint["title"] in [entry["title"] for entry in found["webui"]["sd-models"]]
    by_hand, detail = found["cached"]["loras"]
    assert (by_hand["file"], by_hand["sha256"], by_hand["version_id"]) == ("by_hand.safetensors", None, None)
    assert (detail["name"], detail["scale"], detail["version_id"]) == ("Detail Tweaker XL", 1.5, DETAIL)
    assert detail["tag"] in [entry["name"] for entry in found["webui"]["loras"]]


def test_only_upscalers_whose_file_is_there_are_listed(it: World) -> None:
    listed = [entry["name"] for entry in models(it)["webui"]["upscalers"]]

    assert "Lanczos" in listed
    assert "R-ESRGAN 4x+" not in listed


def test_lists_that_the_worker_has_are_not_asked_for_again(it: World) -> None:
    models(it)
    before = len(it.webui.asked)

    models(it)

    assert {path.rpartition("/")[2] for path in it.requests_since(before)} == {
        "sd-models",
        "loras",
        "embeddings",
        "sd-vae",
    }


def test_menus_come_while_a_generation_hangs(it: World) -> None:
    it.webui.step_seconds = 60

    async def scene() -> None:
        hanging = asyncio.ensure_future(it.worker.handle({"id": "a", "input": {"prompt": "a lighthouse", **SMALL}}))
        await asyncio.to_thread(wait_until, it.generations, "the generation")
        answer = await it.worker.handle({"id": "b", "input": {"task": "models"}})

        assert answer["models"]["webui"]["samplers"]
        assert not hanging.done()
        it.webui.step_seconds = 0
        hanging.cancel()
        await asyncio.wait([hanging])

    it.loop.run_until_complete(asyncio.wait_for(scene(), timeout=60))


def fail_list(exchange: Exchange) -> bool:
    fails = exchange.asked.path.endswith("/sd-models")
    if fails:
        exchange.send_json(500, {"error": "RuntimeError", "detail": "", "errors": "it is busy"})
    return fails


def test_a_list_that_the_webui_does_not_give_is_the_last_one_that_it_gave(it: World) -> None:
    before = models(it)
    it.webui.before.append(fail_list)

    assert models(it)["webui"]["sd-models"] == before["webui"]["sd-models"]


def test_a_generation_may_include_the_menus(it: World) -> None:
    plain = it.ask()
    answer = it.ask(include=["models"])

    assert answer["models"] == models(it)
    assert answer["worker"]["lists"] == answer["models"]["fingerprint"] == plain["worker"]["lists"]
    assert "models" not in plain


def test_the_fingerprint_changes_with_what_the_menus_show(it: World) -> None:
    first = it.ask()["worker"]["lists"]
    same = it.ask(seed=7)["worker"]["lists"]
    downloaded = it.ask(loras=[{"version_id": DETAIL}])["worker"]["lists"]

    assert len(first) == 16 and int(first, 16)
    assert first == same != downloaded
    assert models(it)["fingerprint"] == downloaded


# -- the recorded lists ------------------------------------------------------------------------------------------------


def recordings() -> Iterator[Any]:
    """Every recorded answer to one of MENUS."""
    for path in sorted(DATA.glob("webui-*/**/*.json")):
        name = path.stem.removeprefix("full_")
        if path.stem.startswith("full_") and name in MENUS:
            yield pytest.param(name, json.loads(path.read_text(encoding="utf-8")), id=str(path.relative_to(DATA)))
        recorded = json.loads(path.read_text(encoding="utf-8"))
        asked = recorded.get("request") if isinstance(recorded, dict) else None
        menu = str(asked.get("path")).rpartition("/")[2] if isinstance(asked, dict) else ""
        if menu in MENUS and asked and asked.get("method") == "GET":
            yield pytest.param(menu, recorded["response"]["body"], id=str(path.relative_to(DATA)))


def differences(one: Any, other: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two JSON values differ: the key of the object there, and both values."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for name in one:
            yield from differences(one[name], other[name], name)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for first, second in zip(one, other, strict=True):
            yield from differences(first, second, key)
    elif one != other:
        yield key, one, other


@pytest.mark.parametrize(("menu", "recorded"), list(recordings()))
def test_a_recorded_list_is_passed_on_as_it_is_but_for_its_paths(menu: str, recorded: Any) -> None:
    assert parse_menu(recorded) == recorded

    changed = list(differences(recorded, with_bare_names(recorded)))

    assert {key for key, _, _ in changed} <= set(PATHS)
    assert all(path.endswith(f"/{name}") and "/" not in name for _, path, name in changed)
    assert menu in ("sd-models", "loras", "sd-vae", "upscalers") or not changed
    assert '"/' not in json.dumps(with_bare_names(recorded))

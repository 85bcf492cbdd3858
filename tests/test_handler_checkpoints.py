"""Whole jobs that name a checkpoint of the operator's list."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from a1111_worker.errors import ConfigError
from sandbox.civitai import NOT_FOUND
from sandbox.models import sd15_checkpoint, sd15_lora, sdxl_checkpoint, sha256_of
from tests.support import SMALL, World, wait_until, world

OTHER, OLD, OLD_LORA = 77, 78, 79
LISTED = [{"name": "Other XL", "reference": "civitai:5@77"}, {"name": "Old", "reference": "civitai:6@78"}]


@contextlib.contextmanager
def several(folder: Path, *, version: str = "1.10.1") -> Iterator[World]:
    with world(folder, version=version, boot=False, CHECKPOINTS=json.dumps(LISTED)) as it:
        for number, make in ((OTHER, sdxl_checkpoint), (OLD, sd15_checkpoint)):
            path = make(folder / f"{number}.safetensors", number, 3_000_000)
            base = "SDXL 1.0" if number == OTHER else "SD 1.5"
            it.civitai.add(number, path, name=f"Model {number}", base_model=base, model_type="Checkpoint")
        it.civitai.add(OLD_LORA, sd15_lora(folder / "lora.safetensors", 9), name="Old ink", base_model="SD 1.5")
        it.boot()
        yield it


def drawn_by(answer: dict[str, Any]) -> tuple[str, str]:
    """The checkpoint as the worker reports it, and as A1111's own info does."""
    return answer["worker"]["checkpoint"]["name"], json.loads(answer["info"])["sd_model_name"]


OWN = ("Jib Mix Illustrious Realistic", "jib_mix_illustrious_realistic_v2")


@pytest.mark.parametrize("version", ["1.9.3", "1.10.1"])
def test_a_job_is_drawn_by_the_checkpoint_that_it_names_and_the_next_one_by_the_workers_own(
    tmp_path: Path, version: str
) -> None:
    with several(tmp_path, version=version) as it:
        own = it.ask()
        other = it.ask(checkpoint="other xl")
        again = it.ask(checkpoint="Other XL")
        back = it.ask(checkpoint="Jib Mix Illustrious Realistic")
        loads = it.webui.loads

    assert [drawn_by(answer) for answer in (own, other, again, back)] == [
        OWN,
        ("Other XL", "Other_XL_77"),
        ("Other XL", "Other_XL_77"),
        OWN,
    ]
    assert other["worker"]["checkpoint"]["sha256"] == sha256_of(tmp_path / "77.safetensors")
    assert other["images"] != own["images"] == back["images"]
    assert len(loads) == 3  # one for each switch, and none for the job that wants what is there
    assert other["worker"]["timings"]["switch"] > 0


def test_a_lora_must_fit_the_checkpoint_that_the_job_names(tmp_path: Path) -> None:
    with several(tmp_path) as it:
        fits = it.ask(checkpoint="Old", loras=[{"version_id": OLD_LORA}])
        misfits = it.ask(loras=[{"version_id": OLD_LORA}])
        other_way = it.ask(checkpoint="Old", loras=["detail_tweaker_xl"], on_lora_error="warn")

    assert fits["worker"]["loras"][0]["matched"] == [2, 2]
    assert misfits["code"] == "MODEL_REJECTED"
    assert "and the checkpoint is SD 1.5" in other_way["worker"]["warnings"][0]


@pytest.mark.parametrize("on_lora_error", ["fail", "warn"])
def test_a_checkpoint_that_cannot_be_had_ends_the_job_and_no_other(tmp_path: Path, on_lora_error: str) -> None:
    with several(tmp_path) as it:
        it.civitai.fail(NOT_FOUND, times=None, on="/77")
        failed = it.ask(checkpoint="Other XL", on_lora_error=on_lora_error)
        after = it.ask()

    assert failed["code"] == "MODEL_NOT_FOUND"
    assert drawn_by(after) == OWN


def test_an_unknown_checkpoint_is_refused_with_those_that_are_there(tmp_path: Path) -> None:
    with several(tmp_path) as it:
        answer = it.ask(checkpoint="Otter XL")

    (complaint,) = answer["complaints"]
    assert complaint == {
        "path": "checkpoint",
        "message": "is unknown to this worker, which has 'Jib Mix Illustrious Realistic', 'Other XL', 'Old'",
    }


def test_the_loaded_checkpoint_is_not_evicted_until_another_one_is_loaded(tmp_path: Path) -> None:
    def evict(it: World) -> bool:
        cache = it.worker.models.cache
        (entry,) = [entry for entry in cache.list_entries() if entry.file == "Other_XL_77.safetensors"]
        return cache.evict(entry, "a test")

    with several(tmp_path) as it:
        it.ask(checkpoint="Other XL")
        while_loaded = evict(it)
        it.ask()
        afterwards = evict(it)
        again = it.ask(checkpoint="Other XL")

    assert (while_loaded, afterwards) == (False, True)
    assert drawn_by(again)[0] == "Other XL"


def test_a_job_that_is_cancelled_in_the_middle_of_its_switch_does_not_change_the_next_ones_checkpoint(
    tmp_path: Path,
) -> None:
    with several(tmp_path) as it:
        it.ask(checkpoint="Other XL")
        it.webui.switch_seconds = 0.5
        loads = len(it.webui.loads)

        async def scene() -> dict[str, Any]:
            first = asyncio.create_task(it.worker.handle(job("a", checkpoint="Old")))
            await asyncio.to_thread(wait_until, lambda: len(it.webui.loads) > loads, "the switch")
            first.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await first
            return await it.worker.handle(job("b", checkpoint="Other XL"))

        answer = it.loop.run_until_complete(asyncio.wait_for(scene(), timeout=60))

    assert drawn_by(answer) == ("Other XL", "Other_XL_77")


def job(name: str, **given: Any) -> dict[str, Any]:
    return {"id": name, "input": {"prompt": name, **SMALL, **given}}


def test_the_menus_list_every_checkpoint_and_which_one_is_loaded(tmp_path: Path) -> None:
    with several(tmp_path) as it:
        it.ask(checkpoint="Other XL")
        listed = it.run({"id": "m", "input": {"task": "models"}})["models"]["checkpoints"]
        fetched = it.run({"id": "p", "input": {"task": "prefetch", "checkpoints": ["Old"]}})["prefetch"]["checkpoints"]

    facts = [(entry["name"], entry["default"], entry["loaded"], entry["cached"]) for entry in listed]
    assert facts == [(OWN[0], True, False, True), ("Other XL", False, True, True), ("Old", False, False, False)]
    assert [(entry["name"], entry["downloaded"]) for entry in fetched] == [("Old", True)]


@pytest.mark.parametrize("reference", ["a name", "https://elsewhere.example/x.safetensors", "civitai:x"])
def test_a_listed_checkpoint_that_can_never_be_had_stops_the_start(tmp_path: Path, reference: str) -> None:
    listed = json.dumps([{"name": "Mine", "reference": reference}])

    with world(tmp_path, boot=False) as it, pytest.raises(ConfigError, match=r"^CHECKPOINTS: Mine: "):
        it.boot(CHECKPOINTS=listed)

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
from sandbox.models import sd15_checkpoint, sd15_lora, sdxl_checkpoint, sha256_of, write_safetensors
from sandbox.server import Exchange
from tests.sandbox.webui_client import pixels
from tests.support import SMALL, World, wait_until, world
from tests.webui.supervised import supervised

OTHER, OLD, OLD_LORA = 77, 78, 79
LISTED = [{"name": "Other XL", "reference": "civitai:5@77"}, {"name": "Old", "reference": "civitai:6@78"}]


@contextlib.contextmanager
def several(folder: Path, *, version: str = "1.10.1", listed: Any = LISTED, **settings: str) -> Iterator[World]:
    with world(folder, version=version, boot=False, CHECKPOINTS=json.dumps(listed), **settings) as it:
        publish(it)
        it.boot()
        yield it


def publish(it: World) -> None:
    for number, make in ((OTHER, sdxl_checkpoint), (OLD, sd15_checkpoint)):
        path = make(it.folder / f"{number}.safetensors", number, 3_000_000)
        base = "SDXL 1.0" if number == OTHER else "SD 1.5"
        it.civitai.add(number, path, name=f"Model {number}", base_model=base, model_type="Checkpoint")
    it.civitai.add(OLD_LORA, sd15_lora(it.folder / "lora.safetensors", 9), name="Old ink", base_model="SD 1.5")


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
        it.webui.switch_seconds = 0.2
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
    assert other["worker"]["timings"]["switch"] > 0.1  # a look alone, without a switch, takes milliseconds


def test_a_preparation_that_fails_after_its_switch_does_not_fail_the_next_job(tmp_path: Path) -> None:
    with supervised(tmp_path, boot=False, CHECKPOINTS=json.dumps(LISTED)) as (it, _):
        publish(it)
        it.boot()

        def refuse_once(exchange: Exchange) -> bool:
            if exchange.asked.method != "POST" or b"CLIP_stop_at_last_layers" not in exchange.asked.body:
                return False
            it.webui.before.remove(refuse_once)
            exchange.send_json(500, {"error": "RuntimeError", "detail": "", "errors": "an extension's own"})
            return True

        it.webui.before.append(refuse_once)  # when the other checkpoint is loaded, and the options are set

        failed = it.ask(checkpoint="Other XL")
        own = it.ask()

    assert failed["code"] == "GENERATION_FAILED"
    assert drawn_by(own) == OWN


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


def evict_other(it: World) -> bool:
    cache = it.worker.models.cache
    (entry,) = [entry for entry in cache.list_entries() if entry.file == "Other_XL_77.safetensors"]
    return cache.evict(entry, "a test")


def test_the_loaded_checkpoint_is_not_evicted_until_another_one_is_loaded(tmp_path: Path) -> None:
    with several(tmp_path) as it:
        it.ask(checkpoint="Other XL")
        while_loaded = evict_other(it)
        it.ask()
        afterwards = evict_other(it)
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


HIRES: dict[str, Any] = {"enable_hr": True, "hr_scale": 1.5, "denoising_strength": 0.5}
OTHER_AS_REFINER: dict[str, Any] = {"refiner_checkpoint": "Other XL", "refiner_switch_at": 0.5}


@pytest.mark.parametrize("version", ["1.9.3", "1.10.1"])
@pytest.mark.parametrize(
    ("fields", "key", "field"),
    [
        (OTHER_AS_REFINER, "refiner", "refiner_checkpoint"),
        ({**HIRES, "hr_checkpoint_name": "other xl"}, "hires_checkpoint", "hr_checkpoint_name"),
    ],
)
def test_a_second_checkpoint_draws_and_the_next_job_is_drawn_by_its_own_again(
    tmp_path: Path, version: str, fields: dict[str, Any], key: str, field: str
) -> None:
    plain = {name: value for name, value in fields.items() if name not in (*OTHER_AS_REFINER, "hr_checkpoint_name")}
    with several(tmp_path, version=version) as it:
        before = it.ask(**plain)
        first, second = it.ask(**fields), it.ask(**fields)
        was_ready = it.worker.readiness.is_ready
        after = it.ask(**plain)
        is_ready = it.worker.readiness.is_ready
        titles = [body.get(field) for body in it.generations()]

    other = {"name": "Other XL", "file": "Other_XL_77.safetensors", "sha256": sha256_of(tmp_path / "77.safetensors")}
    assert [answer["worker"][key] for answer in (before, first, second, after)] == [None, other, other, None]
    assert [drawn_by(answer) for answer in (before, first, second, after)] == [OWN] * 4
    digits = f" [{other['sha256'][:10]}]"
    # The title is as A1111 lists it: with its hash only after the first load.
    assert titles == [None, "Other_XL_77.safetensors", f"Other_XL_77.safetensors{digits}", None]
    drawn = [pixels(answer["images"][0]) for answer in (before, first, second, after)]
    assert drawn[0] == drawn[3] != drawn[1] == drawn[2]
    assert (was_ready, is_ready) == (False, True)  # the switch back is the next job's, and verified


def test_three_checkpoints_of_one_job_and_the_workers_own_as_a_refiner(tmp_path: Path) -> None:
    more = [*LISTED, {"name": "Third", "reference": "civitai:7@80"}]
    with several(tmp_path, listed=more) as it:
        path = sdxl_checkpoint(tmp_path / "80.safetensors", 80, 3_000_000)
        it.civitai.add(80, path, name="Model 80", base_model="SDXL 1.0", model_type="Checkpoint")
        own = "Jib Mix Illustrious Realistic"
        names: dict[str, Any] = {"checkpoint": "Third", "refiner_checkpoint": own, "refiner_switch_at": 0.5}
        answer = it.ask(**names, **HIRES, hr_checkpoint_name="Other XL")

    worker = answer["worker"]
    assert [worker[key]["name"] for key in ("checkpoint", "refiner", "hires_checkpoint")] == ["Third", own, "Other XL"]
    assert worker["warnings"] == []


def test_an_img2img_has_a_refiner(tmp_path: Path) -> None:
    with several(tmp_path) as it:
        picture = it.ask()["images"][0]
        answer = it.ask(task="img2img", init_images=[picture], **OTHER_AS_REFINER)

    assert answer["worker"]["refiner"]["name"] == "Other XL"


def test_a_refiner_whose_time_does_not_come_is_not_reported_as_used(tmp_path: Path) -> None:
    with several(tmp_path) as it:
        answer = it.ask(refiner_checkpoint="Other XL", refiner_switch_at=1)

    assert answer["worker"]["refiner"] is None
    assert answer["worker"]["warnings"] == [
        "the refiner 'Other XL' did not draw: no step came after refiner_switch_at 1"
    ]


@pytest.mark.parametrize(
    ("fields", "dropped"),
    [
        ({"refiner_checkpoint": OWN[0], "refiner_switch_at": 0.5}, ["refiner_checkpoint", "refiner_switch_at"]),
        ({"refiner_checkpoint": "None", "refiner_switch_at": 0.5}, ["refiner_switch_at"]),
        ({**HIRES, "hr_checkpoint_name": OWN[0]}, ["hr_checkpoint_name"]),
        ({"hr_checkpoint_name": "Other XL"}, ["hr_checkpoint_name"]),
        ({**HIRES, "hr_checkpoint_name": "Use same checkpoint", "refiner_checkpoint": ""}, []),
    ],
)
def test_a_second_checkpoint_that_would_change_nothing_is_dropped(
    tmp_path: Path, fields: dict[str, Any], dropped: list[str]
) -> None:
    with several(tmp_path) as it:
        answer = it.ask(**fields)
        (body,) = it.generations()

    assert (answer["worker"]["refiner"], answer["worker"]["hires_checkpoint"]) == (None, None)
    assert not body.keys() & {"refiner_checkpoint", "refiner_switch_at", "hr_checkpoint_name"}
    (warning,) = answer["worker"]["warnings"] or [""]
    assert [name for name in (*OTHER_AS_REFINER, "hr_checkpoint_name") if f"'{name}'" in warning] == dropped


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"refiner_checkpoint": "Other XL"}, "INVALID_REQUEST", "must come with refiner_switch_at"),
        ({"refiner_checkpoint": "Otter", "refiner_switch_at": 0.5}, "INVALID_REQUEST", "is unknown to this worker"),
        ({**OTHER_AS_REFINER, "checkpoint": "Old"}, "MODEL_REJECTED", "is made for SDXL 1.0"),
        ({**OTHER_AS_REFINER, "refiner_checkpoint": "Old"}, "MODEL_REJECTED", "is made for SD 1.5"),
        (
            {**HIRES, "hr_checkpoint_name": OWN[0], "checkpoint": "Old"},
            "MODEL_REJECTED",
            "and the checkpoint is SD 1.5",
        ),
    ],
)
def test_a_second_checkpoint_that_cannot_be_used_is_refused_before_the_gpu_is_asked(
    tmp_path: Path, fields: dict[str, Any], code: str, message: str
) -> None:
    with several(tmp_path) as it:
        answer = it.ask(**fields)

        assert answer["code"] == code
        assert message in answer["error"]
        assert not it.generations()


def test_all_checkpoints_of_a_job_are_kept_until_others_are_loaded(tmp_path: Path) -> None:
    with several(tmp_path) as it:
        it.ask(**OTHER_AS_REFINER)
        while_loaded = evict_other(it)
        it.ask()
        afterwards = evict_other(it)

    assert (while_loaded, afterwards) == (False, True)


BROUGHT = 81


def test_a_job_may_bring_any_checkpoint_if_the_operator_allows_that(tmp_path: Path) -> None:
    with several(tmp_path, ANY_CHECKPOINT="1", MAX_CHECKPOINT_GB="0.01") as it:
        # The bytes of the worker's own checkpoint, under another name.
        path = sdxl_checkpoint(tmp_path / "brought.safetensors", 1, 3_000_000)
        it.civitai.add(BROUGHT, path, name="Model 81", base_model="SDXL 1.0", model_type="Checkpoint")
        answers = [it.ask(checkpoint=given) for given in (BROUGHT, f"civitai:9@{BROUGHT}", {"version_id": BROUGHT})]
        prefetched = it.run({"id": "p", "input": {"task": "prefetch", "checkpoints": [BROUGHT]}})["prefetch"]
        loads = len(it.webui.loads)

    assert [drawn_by(answer) for answer in answers] == [("Model 81", "Model-81_81")] * 3
    assert prefetched["checkpoints"][0]["downloaded"] is False
    assert loads == 2  # at the start, and for the first of them


@pytest.mark.parametrize(("given", "name"), [(1590699, OWN[0]), ("civitai:5@77", "Other XL")])
def test_a_reference_to_a_checkpoint_that_is_known_fetches_nothing_new(tmp_path: Path, given: Any, name: str) -> None:
    with several(tmp_path, ANY_CHECKPOINT="1") as it:
        answer = it.ask(checkpoint=given)

    assert answer["worker"]["checkpoint"]["name"] == name


@pytest.mark.parametrize("size_is_known", [True, False])
def test_a_checkpoint_that_is_too_large_is_refused_and_not_fetched(tmp_path: Path, size_is_known: bool) -> None:
    with several(tmp_path, ANY_CHECKPOINT="1", MAX_CHECKPOINT_GB="0.002") as it:
        path = sdxl_checkpoint(tmp_path / "brought.safetensors", 1, 3_000_000)
        it.civitai.add(BROUGHT, path, name="Model 81", base_model="SDXL 1.0", model_type="Checkpoint")
        answer = it.ask(checkpoint=BROUGHT if size_is_known else it.civitai.storage.publish(path))
        listed = it.ask(checkpoint="Other XL")
        left = it.leftovers()

    assert answer["code"] == "MODEL_REJECTED"
    assert ("a job may bring 0.002 GB" if size_is_known else "at most 2,000,000") in answer["error"]
    assert drawn_by(listed)[0] == "Other XL"  # the operator's own are not held to it
    assert not left


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        (OLD_LORA, "MODEL_REJECTED", "is no checkpoint: CivitAI lists it as LORA"),
        (82, "MODEL_REJECTED", "A1111 cannot load Model 82: it is Flux.1 D"),
        (83, "MODEL_REJECTED", "Model 83 is no whole checkpoint: it has no VAE and no text encoder"),
        ("Otter", "INVALID_REQUEST", "is unknown to this worker, which has"),
        ("https://elsewhere.example/x.safetensors", "INVALID_REQUEST", "checkpoint"),
        ({"url": "civitai:5@77", "x": 1}, "INVALID_REQUEST", "checkpoint.x"),
        (["a"], "INVALID_REQUEST", "must be a checkpoint's name, or a reference"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, given: Any, code: str, message: str) -> None:
    with several(tmp_path, ANY_CHECKPOINT="1") as it:
        parts: dict[int, dict[str, tuple[str, tuple[int, ...]]]] = {
            82: {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": ("F16", (96, 32))},
            83: {"model.diffusion_model.input_blocks.0.0.weight": ("F16", (320, 4, 3, 3))},
        }
        for number, tensors in parts.items():
            path = write_safetensors(tmp_path / f"{number}.safetensors", tensors, {})
            base = "Flux.1 D" if number == 82 else "SDXL 1.0"
            it.civitai.add(number, path, name=f"Model {number}", base_model=base, model_type="Checkpoint")
        answer = it.ask(checkpoint=given)

    assert answer["code"] == code
    assert message in answer["error"]


def test_the_next_jobs_checkpoint_is_fetched_and_read_ahead_while_another_job_generates(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def read() -> list[str]:
        return [message for message in caplog.messages if "read ahead" in message]

    with caplog.at_level("INFO"), several(tmp_path, JOBS_IN_FLIGHT="2") as it:
        it.webui.step_seconds = 60.0

        async def scene() -> list[Any]:
            first = asyncio.create_task(it.worker.handle(job("a")))
            await asyncio.to_thread(wait_until, it.generations, "the generation")
            tasks = [first, asyncio.create_task(it.worker.handle(job("b")))]  # its checkpoint is in memory already
            tasks.append(asyncio.create_task(it.worker.handle(job("c", checkpoint="Other XL"))))
            await asyncio.to_thread(wait_until, read, "the reading")
            is_running = not first.done()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return [is_running, len(it.generations())]

        assert it.loop.run_until_complete(asyncio.wait_for(scene(), timeout=60)) == [True, 1]
        it.webui.step_seconds = 0.0
        it.ask(checkpoint="Old")  # the GPU is free: A1111 reads the file itself
        assert read() == ["3.0 MB of Other_XL_77.safetensors were read ahead"]


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

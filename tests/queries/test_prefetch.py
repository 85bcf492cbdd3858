"""A `prefetch` job: models come into the cache, each with its own outcome, and nobody waits for the GPU."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from a1111_worker.errors import Complaint
from sandbox import civitai as c
from tests.request.helpers import complaints
from tests.support import CHECKPOINT, DETAIL, HAND, SMALL, World, wait_until, world


@pytest.fixture
def it(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path) as a_world:
        yield a_world


def prefetch(it: World, **given: Any) -> dict[str, Any]:
    answer: dict[str, Any] = it.run({"id": "prefetch", "input": {"task": "prefetch", **given}})
    return answer


def test_each_model_has_its_own_outcome(it: World) -> None:
    answer = prefetch(
        it, loras=[DETAIL, "nobody", {"version_id": HAND, "scale": 0.5}, 404404], checkpoints=[CHECKPOINT]
    )

    detail, nobody, hand, unknown = answer["prefetch"]["loras"]
    (checkpoint,) = answer["prefetch"]["checkpoints"]
    file = it.models_dir / "loras" / "detail_tweaker_xl.safetensors"
    assert (detail["name"], detail["file"], detail["size"]) == ("Detail Tweaker XL", file.name, file.stat().st_size)
    assert detail["downloaded"] is True and detail["seconds"] >= 0 and len(detail["sha256"]) == 64
    assert hand["downloaded"] is True
    assert [(failed["code"], set(failed)) for failed in (nobody, unknown)] == [
        ("MODEL_NOT_FOUND", {"name", "code", "message"})
    ] * 2
    assert (checkpoint["downloaded"], checkpoint["file"]) == (False, it.worker.readiness.checkpoint.file)


def test_a_job_finds_what_was_prefetched(it: World) -> None:
    before = it.ask()["worker"]["lists"]
    tag = prefetch(it, loras=[DETAIL])["prefetch"]["loras"][0]["tag"]

    answer = it.ask(prompt=f"a lighthouse <lora:{tag}:0.5>")

    (lora,) = answer["worker"]["loras"]
    assert (lora["loaded"], lora["downloaded"], lora["scale"]) == (True, False, 0.5)
    assert answer["worker"]["lists"] != before


def test_a_checkpoint_of_somebody_else_is_no_checkpoint_of_this_worker(it: World) -> None:
    (outcome,) = prefetch(it, checkpoints=[777])["prefetch"]["checkpoints"]

    assert outcome["code"] == "MODEL_REJECTED"
    assert it.civitai.resolves[777] == 0


def test_models_are_prefetched_while_a_generation_hangs(it: World) -> None:
    it.webui.step_seconds = 60

    async def scene() -> None:
        hanging = asyncio.ensure_future(it.worker.handle({"id": "a", "input": {"prompt": "a lighthouse", **SMALL}}))
        await asyncio.to_thread(wait_until, it.generations, "the generation")
        answer = await it.worker.handle({"id": "b", "input": {"task": "prefetch", "loras": [DETAIL]}})

        assert answer["prefetch"]["loras"][0]["downloaded"] is True
        assert not hanging.done()
        it.webui.step_seconds = 0
        hanging.cancel()
        await asyncio.wait([hanging])

    it.loop.run_until_complete(asyncio.wait_for(scene(), timeout=60))


def test_what_does_not_arrive_in_time_has_that_as_its_outcome(tmp_path: Path) -> None:
    with world(tmp_path, PREFETCH_TIMEOUT="0.6") as it:
        it.civitai.storage.fail(c.ServerFault(rate=100_000.0), times=None)  # three seconds for a LoRA

        (late,) = prefetch(it, loras=[HAND])["prefetch"]["loras"]
        it.civitai.storage.heal()

        assert late["code"] == "JOB_TIMEOUT"
        assert it.ask(loras=[HAND])["worker"]["loras"][0]["downloaded"] is True


BAD = [
    ({}, "input", "names no model: give loras or embeddings or vaes or checkpoints or controlnet_models"),
    ({"loras": []}, "input", "names no model: give loras or embeddings or vaes or checkpoints or controlnet_models"),
    ({"loras": "x"}, "loras", "must be a list of at most 64 loras, not text"),
    ({"loras": [None]}, "loras[0]", "must be text or an object, not null"),
    ({"loras": [{"version_id": 1, "weight": 1}]}, "loras[0].weight", "is unknown; did you mean 'scale'?"),
    ({"loras": ["../x"]}, "loras[0]", "a URL starts with https://, and a name holds no / or \\"),
    ({"loras": list(range(1, 66))}, "loras", "must be a list of at most 64 loras, not a list of 65"),
    (
        {"prompt": "x", "loras": [1]},
        "prompt",
        "is unknown; known here: task, loras, embeddings, vaes, checkpoints, controlnet_models",
    ),
]


@pytest.mark.parametrize(("given", "path", "message"), BAD)
def test_bad_input_is_a_complaint(given: dict[str, Any], path: str, message: str) -> None:
    assert complaints({"task": "prefetch", **given}) == (Complaint(path, message),)

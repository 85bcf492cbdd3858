"""A `health` job: what the worker says of itself, and that it never waits for the GPU."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from a1111_worker import __version__
from tests.support import DETAIL, SMALL, World, wait_until, world


@pytest.fixture
def it(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path) as a_world:
        yield a_world


def health(it: World) -> dict[str, Any]:
    answer: dict[str, Any] = it.run({"id": "health", "input": {"task": "health"}})["health"]
    return answer


def test_a_new_worker_has_no_jobs_and_no_proof(it: World) -> None:
    answer = it.run({"id": "health", "input": {"task": "health"}})

    found = answer["health"]
    assert found["versions"] == {"worker": __version__, "webui": None}
    assert (found["jobs"], found["checkpoint_proven"]) == ({}, False)
    assert found["uptime_s"] >= 0
    assert 0 < found["disk"]["free"] <= shutil.disk_usage(it.folder).free + 2**30
    assert answer["worker"]["versions"] == found["versions"]


def test_jobs_are_counted_by_their_outcome_and_a_picture_proves_the_checkpoint(it: World) -> None:
    it.ask()
    it.ask()
    it.ask(steps=0)

    found = health(it)

    assert found["jobs"] == {"COMPLETED": 2, "INVALID_REQUEST": 1}
    assert found["checkpoint_proven"] is True
    assert found["versions"]["webui"] == "1.10.1"
    assert health(it)["jobs"]["COMPLETED"] == 3  # the first health job was one


def test_the_models_in_the_cache_are_counted(it: World) -> None:
    it.ask(loras=[{"version_id": DETAIL}])

    cache = health(it)["cache"]

    sizes = [path.stat().st_size for path in it.models_dir.rglob("*.safetensors")]
    counts = {"checkpoints": 1, "loras": 1, "embeddings": 0, "vaes": 0, "controlnet_models": 0}
    assert cache == {**counts, "bytes": sum(sizes), "limit": None}


def test_a_cache_that_cannot_be_read_has_no_figures(it: World) -> None:
    shutil.rmtree(it.models_dir)

    assert health(it)["disk"] is None


def test_health_answers_while_a_generation_hangs(it: World) -> None:
    it.webui.step_seconds = 60

    async def scene() -> None:
        hanging = asyncio.ensure_future(it.worker.handle({"id": "a", "input": {"prompt": "a lighthouse", **SMALL}}))
        await asyncio.to_thread(wait_until, it.generations, "the generation")
        answer = await it.worker.handle({"id": "b", "input": {"task": "health"}})

        assert answer["health"]["jobs"] == {}
        assert not hanging.done()
        it.webui.step_seconds = 0
        hanging.cancel()
        await asyncio.wait([hanging])

    it.loop.run_until_complete(asyncio.wait_for(scene(), timeout=60))

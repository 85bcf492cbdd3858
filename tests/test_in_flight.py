"""Jobs in flight: one generates, the others prepare or deliver, and none harms another."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from a1111_worker.context import JobContext
from handler import Worker
from sandbox import civitai as c
from sandbox.server import Exchange
from tests.support import DETAIL, HAND, SMALL, World, parse_generation, wait_until, world


@pytest.fixture
def it(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path, JOBS_IN_FLIGHT="3") as a_world:
        yield a_world


def job(name: str, **given: Any) -> dict[str, Any]:
    return {"id": name, "input": {"prompt": name, **SMALL, **given}}


def play(it: World, scene: Coroutine[Any, Any, None]) -> None:
    it.loop.run_until_complete(asyncio.wait_for(scene, timeout=60))


def seen(it: World, path: str) -> threading.Event:
    """Set when the WebUI is asked for `path` the next time."""
    event = threading.Event()

    def watching(exchange: Exchange) -> bool:
        if exchange.asked.path == path:
            event.set()
        return False

    it.webui.before.append(watching)
    return event


def prompts(it: World) -> list[str]:
    return [body["prompt"] for body in it.generations()]


def test_jobs_that_come_together_all_generate_whichever_is_prepared_first(it: World) -> None:
    it.webui.step_seconds = 0.02

    async def scene() -> None:
        answers = await asyncio.gather(*(it.worker.handle(job(name)) for name in "abc"))

        assert ["error" in answer for answer in answers] == [False] * 3
        assert sorted(prompts(it)) == ["a", "b", "c"]

    play(it, scene())


def test_a_lora_that_was_evicted_while_its_job_waited_is_fetched_again(it: World) -> None:
    # As by another worker that thought this one dead: it was paused for a minute.
    it.webui.step_seconds = 0.2

    async def scene() -> None:
        first = asyncio.ensure_future(it.worker.handle(job("first", steps=10)))
        generating = seen(it, "/sdapi/v1/txt2img")
        await asyncio.to_thread(generating.wait, 10)
        second = asyncio.ensure_future(it.worker.handle(job("second", loras=[{"version_id": HAND}])))
        loras = it.models_dir / "loras"
        await asyncio.to_thread(wait_until, lambda: [*(loras / ".holds").glob("hand_detail_flux_xl*")], "the hold")
        (loras / "hand_detail_flux_xl.safetensors").unlink()
        it.webui.step_seconds = 0.0

        assert "error" not in await first
        answer = await second
        assert [lora["loaded"] for lora in answer["worker"]["loras"]] == [True]

    play(it, scene())
    assert it.civitai.resolves[HAND] == 2


def test_a_download_for_one_job_does_not_keep_the_gpu_from_another(it: World) -> None:
    it.civitai.storage.fail(c.ServerFault(rate=100_000.0), times=None)  # three seconds for a LoRA

    async def scene() -> None:
        slow = asyncio.ensure_future(it.worker.handle(job("slow", loras=[{"version_id": HAND}])))
        quick = await it.worker.handle(job("quick"))

        assert "error" not in quick
        assert not slow.done()
        it.civitai.storage.heal()
        assert "error" not in await slow

    play(it, scene())


class PriorityRecorder:
    """In place of the model manager: records `is_next` of two jobs while both prepare, and of the second one after the
    first one is prepared."""

    def __init__(self) -> None:
        self.first: list[bool] = []
        self.second: list[bool] = []
        self._holds = 0
        self.begun, self._both_hold, self.first_is_prepared = threading.Event(), threading.Event(), threading.Event()

    @contextlib.contextmanager
    def hold(self, refs: Any, context: JobContext, **_how: Any) -> Iterator[None]:
        self._holds += 1
        self.begun.set()
        if self._holds == 1:
            self._both_hold.wait(20)
            self.first.append(context.is_next())
            yield
            return
        self.second.append(context.is_next())
        self._both_hold.set()
        self.first_is_prepared.wait(20)
        self.second.append(context.is_next())
        yield


def test_of_the_jobs_that_prepare_the_oldest_is_next(it: World) -> None:
    recorder: Any = PriorityRecorder()
    worker = Worker(it.config(), models=recorder)
    request = parse_generation({"prompt": "a lighthouse"}, worker.limits)

    second_is_prepared = threading.Event()

    def prepare_first() -> None:
        with worker.models_for(request, JobContext()):
            recorder.first_is_prepared.set()
            second_is_prepared.wait(20)  # as if it were at the GPU meanwhile

    def prepare_second() -> None:
        with worker.models_for(request, JobContext()):
            second_is_prepared.set()

    threads = [threading.Thread(target=prepare) for prepare in (prepare_first, prepare_second)]
    threads[0].start()
    recorder.begun.wait(20)
    threads[1].start()
    for thread in threads:
        thread.join(20)

    assert (recorder.first, recorder.second) == ([True], [False, True])


def test_a_job_that_is_cancelled_while_it_waits_is_simply_gone(it: World) -> None:
    it.webui.step_seconds = 0.03
    generating = seen(it, "/sdapi/v1/progress")

    async def scene() -> None:
        running = asyncio.ensure_future(it.worker.handle(job("running", steps=20)))
        await asyncio.to_thread(generating.wait, 20)
        waiting = asyncio.ensure_future(it.worker.handle(job("waiting")))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

        assert "error" not in await running
        assert prompts(it) == ["running"]
        assert "/sdapi/v1/interrupt" not in [asked.path for asked in it.webui.asked]

    play(it, scene())


def test_cancelling_the_job_that_generates_does_not_touch_the_job_that_waits(it: World) -> None:
    it.webui.step_seconds = 0.03
    generating = seen(it, "/sdapi/v1/progress")

    async def scene() -> None:
        running = asyncio.ensure_future(it.worker.handle(job("running", steps=150)))
        await asyncio.to_thread(generating.wait, 20)
        waiting = asyncio.ensure_future(it.worker.handle(job("waiting", n_iter=2)))
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        answer = await waiting

        assert len(answer["images"]) == 2
        assert prompts(it) == ["running", "waiting"]

    play(it, scene())


def test_a_job_that_fails_does_not_touch_the_jobs_beside_it(it: World) -> None:
    async def scene() -> None:
        bad, missing, good = await asyncio.gather(
            it.worker.handle(job("bad", steps=0)),
            it.worker.handle(job("missing", loras=[{"version_id": 404404}])),
            it.worker.handle(job("good", loras=[{"version_id": DETAIL}])),
        )

        assert (bad["code"], missing["code"]) == ("INVALID_REQUEST", "MODEL_NOT_FOUND")
        assert good["worker"]["loras"][0]["loaded"] is True

    play(it, scene())


def test_two_jobs_with_the_same_lora_download_it_once(it: World) -> None:
    async def scene() -> None:
        answers = await asyncio.gather(*(it.worker.handle(job(name, loras=[{"version_id": HAND}])) for name in "ab"))

        assert all(answer["worker"]["loras"][0]["loaded"] for answer in answers)
        assert it.civitai.resolves[HAND] == 1

    play(it, scene())


def test_a_download_that_another_job_waits_for_survives_a_cancellation(it: World) -> None:
    it.civitai.storage.fail(c.ServerFault(rate=300_000.0), times=None)
    downloading = threading.Event()

    def watching(exchange: Exchange) -> bool:
        downloading.set()
        return False

    it.civitai.storage.before.append(watching)

    async def scene() -> None:
        first = asyncio.ensure_future(it.worker.handle(job("first", loras=[{"version_id": HAND}])))
        await asyncio.to_thread(downloading.wait, 20)
        second = asyncio.ensure_future(it.worker.handle(job("second", loras=[{"version_id": HAND}])))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first

        assert (await second)["worker"]["loras"][0]["loaded"] is True

    play(it, scene())


def test_the_next_request_is_sent_while_the_last_answer_is_still_being_read(it: World) -> None:
    next_came, first = threading.Event(), threading.Lock()

    def slowly(exchange: Exchange) -> bool:
        """The first job's answer: its head at once, its end only when the next job's request has come."""
        name = exchange.asked.json()["prompt"] if exchange.asked.path.endswith("/txt2img") else ""
        if name == "next":
            next_came.set()
        if name != "first" or not first.acquire(blocking=False):
            return False
        whole = requests.post(f"{it.webui.url}/sdapi/v1/txt2img", data=exchange.asked.body, timeout=20).content
        exchange.begin(200, {"content-length": str(len(whole)), "content-type": "application/json"})
        exchange.write(whole[:100])
        exchange.flush()
        if next_came.wait(20):
            exchange.write(whole[100:])
        return True

    it.webui.before.append(slowly)

    async def scene() -> None:
        answers = await asyncio.gather(*(it.worker.handle(job(name)) for name in ("first", "next")))

        assert ["error" in answer for answer in answers] == [False, False]

    play(it, scene())

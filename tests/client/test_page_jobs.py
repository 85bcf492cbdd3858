"""The routes of the page, with a scripted worker behind the sandbox's queue."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from a1111_client.gateway.guard import parse_access
from a1111_client.gateway.jobs import Client, OpenJob
from a1111_client.gateway.page_jobs import PageJob, too_many
from sandbox.runpod import CANCELLED
from tests.client.scripted import PNG, Desk, desk
from tests.support import wait_until

SMALL = {"prompt": "a lighthouse", "steps": 2, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def awake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A gateway whose worker answers at once."""
    with desk(tmp_path_factory.mktemp("awake")) as made:
        yield made


def send(its: Desk, given: Any = SMALL, **more: Any) -> httpx.Response:
    return its.http.post("/page/jobs", json={"input": given}, **more)


def ended(its: Desk, job_id: str) -> dict[str, Any]:
    """The job once it has ended."""

    def look() -> dict[str, Any] | None:
        job: dict[str, Any] = its.http.get(f"/page/jobs/{job_id}").json()
        return job if job["state"] != "open" else None

    return wait_until(look, "the end of the job")


def test_a_job_is_sent_as_it_is_and_its_answer_is_kept(awake: Desk) -> None:
    given = {**SMALL, "loras": [{"name": "fog_1", "scale": 0.5}]}

    job = ended(awake, send(awake, given).json()["id"])

    assert (job["state"], job["input"], job["error"]) == ("done", given, None)
    assert job["gpu_seconds"] >= 0
    assert (job["answer"]["images"], job["answer"]["worker"]["delivery"]["mode"]) == ([PNG], "inline")
    assert awake.worker.inputs[-1] == given
    assert job["id"] in [known["id"] for known in awake.http.get("/page/jobs").json()]
    assert awake.http.delete(f"/page/jobs/{job['id']}").status_code == 200
    assert awake.http.get(f"/page/jobs/{job['id']}").status_code == 404


@pytest.mark.parametrize("body", [{}, {"input": "x"}, {"input": {"task": "health"}}, []])
def test_what_is_no_job_for_pictures_is_refused(awake: Desk, body: Any) -> None:
    answer = awake.http.post("/page/jobs", json=body)

    assert answer.status_code == 422
    assert answer.json()["detail"]


def test_a_failed_job_keeps_its_code_its_sentence_and_its_hint(tmp_path: Path) -> None:
    failure = {"error": "OUT_OF_MEMORY: no room", "code": "OUT_OF_MEMORY", "message": "no room", "hint": "smaller"}
    with desk(tmp_path) as its:
        its.worker.work = lambda taken: dict(failure)

        job = ended(its, send(its).json()["id"])

    assert job["state"] == "failed"
    assert {name: job["error"][name] for name in ("code", "message", "hint")} == {
        "code": "OUT_OF_MEMORY",
        "message": "no room",
        "hint": "smaller",
    }


def test_an_answer_that_makes_no_sense_fails_its_job_and_no_other(tmp_path: Path) -> None:
    with desk(tmp_path) as its:
        its.worker.work = lambda taken: {"worker": {"delivery": {"urls": 5}}}
        failed = ended(its, send(its).json()["id"])
        its.worker.work = lambda taken: {"images": [PNG]}
        drawn = ended(its, send(its).json()["id"])

    assert (failed["state"], failed["error"]["message"]) == ("failed", "the gateway failed; its log says why")
    assert drawn["state"] == "done"


def test_an_open_job_shows_its_progress_and_is_cancelled_at_runpod(tmp_path: Path) -> None:
    told, over = threading.Event(), threading.Event()

    def work(taken: Any) -> None:
        taken.report(stage="generate", percent=50, detail="step 1 of 2", preview="AAAA")
        told.set()
        taken.wait_for(over)

    with desk(tmp_path) as its:
        its.worker.work = work
        job_id = send(its).json()["id"]
        assert told.wait(20)
        shown = wait_until(
            lambda: next((job for job in its.http.get("/page/jobs").json() if job["preview"]), None), "the preview"
        )
        its.http.delete(f"/page/jobs/{job_id}")
        job = ended(its, job_id)
        wait_until(lambda: all(known.status == CANCELLED for known in its.queue.jobs.values()), "a cancelled job")
        over.set()

    assert (shown["preview"], shown["text"], 0.5 < shown["progress"] < 0.6) == ("AAAA", "generate, step 1 of 2", True)
    assert (job["state"], job["answer"]) == ("cancelled", None)


def test_the_end_of_the_gateway_cancels_the_jobs_of_its_page(tmp_path: Path) -> None:
    with desk(tmp_path, asleep=True) as its:
        for _ in range(3):
            send(its)
        wait_until(lambda: len(its.queue.jobs) == 3, "three jobs in the queue")
        its.stop()

        assert {job.status for job in its.queue.jobs.values()} == {CANCELLED}


def test_each_user_sees_the_jobs_of_that_user_alone_and_nobody_else_any(tmp_path: Path) -> None:
    access = parse_access(host="127.0.0.1", api_auth="ann:one,bob:two")
    ann, bob = ("ann", "one"), ("bob", "two")
    with desk(tmp_path, access=access, asleep=True) as its:
        job_id = send(its, auth=ann).json()["id"]

        assert [job["id"] for job in its.http.get("/page/jobs", auth=ann).json()] == [job_id]
        assert its.http.get("/page/jobs", auth=bob).json() == []
        assert its.http.get(f"/page/jobs/{job_id}", auth=bob).status_code == 404
        assert its.http.delete(f"/page/jobs/{job_id}", auth=bob).status_code == 404
        for method, path in [("POST", "jobs"), ("GET", "jobs"), ("GET", f"jobs/{job_id}"), ("GET", "models")]:
            assert its.http.request(method, f"/page/{path}").status_code == 401
        assert its.http.delete(f"/page/jobs/{job_id}").status_code == 401
        assert its.http.get("/page/main.js").status_code == its.http.get("/").status_code == 200


@pytest.mark.parametrize(
    ("sizes", "limit", "forgotten"),
    [([], 10, 0), ([5, 5], 10, 0), ([5, 5, 1], 10, 1), ([5, 5, 9], 10, 2), ([11], 10, 0), ([None, 9, 9], 10, 1)],
)
def test_the_oldest_results_make_room_and_open_jobs_and_the_newest_result_stay(
    sizes: list[int | None], limit: int, forgotten: int
) -> None:
    opened = OpenJob(Client("", "", ""), "txt2img")
    jobs = [PageJob(opened, {}, state="done" if size else "open", size=size or 0) for size in sizes]

    assert too_many(jobs, limit) == [job for job in jobs if job.state == "done"][:forgotten]


def test_another_page_sends_no_job(awake: Desk) -> None:
    before = len(awake.queue.jobs)

    assert send(awake, headers={"Origin": "https://evil.example.com"}).status_code == 403
    assert len(awake.queue.jobs) == before


def test_the_menus_show_what_the_endpoint_has_and_start_no_worker(tmp_path: Path) -> None:
    with desk(tmp_path, asleep=True) as its:
        models = its.http.get("/page/models").json()

        assert its.queue.jobs == {}
    assert models["checkpoints"] == ["House", "Garden"]
    assert [entry["name"] for kind in ("catalog", "cached") for entry in models[kind]] == ["Detail", "Fog"]
    assert "Euler a" in models["samplers"] and "Karras" in models["schedulers"] and "Lanczos" in models["upscalers"]


def test_the_page_may_ask_nobody_else_and_be_in_no_frame(awake: Desk) -> None:
    policy = awake.http.get("/").headers["content-security-policy"]

    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert awake.http.get("/page/main.js").headers["cache-control"] == "no-cache"

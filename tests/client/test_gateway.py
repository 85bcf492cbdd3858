"""The gateway over HTTP, with a scripted worker behind the sandbox's queue."""

from __future__ import annotations

import base64
import json
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from a1111_client.gateway.bodies import fields
from sandbox.runpod import CANCELLED, COMPLETED
from sandbox.storage import json_fault
from tests.client.scripted import CHECKPOINT, KEY, PNG, SHA256, Desk, Taken, desk, models_answer, picture_answer
from tests.support import DATA, wait_until

TITLE = f"{CHECKPOINT} [{SHA256[:10]}]"
SMALL = {"prompt": "a lighthouse", "steps": 2, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def awake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A gateway whose worker answers at once. Tests leave no options in it."""
    with desk(tmp_path_factory.mktemp("awake")) as made:
        yield made


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Desk]:
    """A gateway of a test's own."""
    with desk(tmp_path) as made:
        yield made


@pytest.fixture
def asleep(tmp_path: Path) -> Iterator[Desk]:
    """A gateway whose endpoint has no worker."""
    with desk(tmp_path, asleep=True) as made:
        yield made


def in_background(call: Any, *arguments: Any, **more: Any) -> Any:
    """The future of a call in a thread of its own."""
    threads = ThreadPoolExecutor(max_workers=1)
    try:
        return threads.submit(call, *arguments, **more)
    finally:
        threads.shutdown(wait=False)


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_a_picture_has_the_form_of_a1111s_own_answer(awake: Desk) -> None:
    answer = awake.post("txt2img", {**SMALL, "seed": "-1", "n_iter": 2}).json()

    assert set(answer) == {"images", "parameters", "info"}
    assert answer["images"] == [PNG, PNG]
    assert json.loads(answer["info"])["all_seeds"] == [42]
    asked = answer["parameters"]
    assert (asked["prompt"], asked["seed"], asked["batch_size"], asked["n_iter"]) == ("a lighthouse", -1, 1, 2)
    assert (asked["sampler_index"], asked["sampler_name"], asked["denoising_strength"]) == ("Euler", None, None)


def test_who_wants_it_gets_what_the_worker_tells_beside_the_picture(awake: Desk) -> None:
    answer = awake.post("txt2img?worker=1", SMALL).json()

    assert answer["worker"]["delivery"]["mode"] == "inline"


def test_who_wants_no_pictures_gets_what_is_said_about_them(awake: Desk) -> None:
    answer = awake.post("txt2img", {**SMALL, "send_images": False}).json()

    assert (answer["images"], json.loads(answer["info"])["seed"]) == ([], 42)


def test_img2img_echoes_its_pictures_only_if_asked(awake: Desk) -> None:
    body = {**SMALL, "init_images": [PNG], "mask": PNG}

    plain, echoed = (awake.post("img2img", {**body, "include_init_images": on}).json() for on in (False, True))

    assert (plain["parameters"]["init_images"], plain["parameters"]["mask"]) == (None, None)
    assert echoed["parameters"]["init_images"] == [PNG]
    assert awake.worker.inputs[-1]["task"] == "img2img"


def test_upscaled_pictures_have_the_form_of_a1111s_answers(fresh: Desk) -> None:
    fresh.worker.work = lambda taken: {"images": [PNG, PNG], "html_info": "<p>Lanczos</p>", "worker": {}}

    single = fresh.post("extra-single-image", {"image": PNG, "upscaling_resize": "2.0", "upscaler_1": "Lanczos"}).json()
    several = {"imageList": [{"data": PNG, "name": "a.png"}] * 2, "upscaler_1": "Lanczos"}
    batch = fresh.post("extra-batch-images", several).json()

    assert single == {"html_info": "<p>Lanczos</p>", "image": PNG}
    assert batch == {"html_info": "<p>Lanczos</p>", "images": [PNG, PNG]}
    assert fresh.worker.inputs[0]["task"] == "upscale"
    assert fresh.worker.inputs[0]["upscaling_resize"] == 2.0


# What A1111 1.10.1 answered without doing anything to a picture.
WITHOUT_WORK = [
    *("extras/batch_bad", "extras/batch_empty", "extras/batch_missing", "extras/batch_noname", "extras/batch_strings"),
    *("extras/default_no_image", "extras/garbage", "extras/null_upscaler", "img2img/err_mask_garbage"),
]


def test_what_a1111_answers_without_work_starts_no_worker(asleep: Desk) -> None:
    for name in WITHOUT_WORK:
        exchange = json.loads((DATA / "webui-1.10.1" / f"{name}.json").read_text(encoding="utf-8"))
        asked, recorded = exchange["request"], exchange["response"]
        answer = asleep.http.post(asked["path"], json=asked["body"])
        assert (answer.status_code, answer.json()) == (recorded["status"], recorded["body"]), name
    for more in ({}, {"upscaling_resize": 4}, {"upscaler_1": "None"}):
        as_it_came = asleep.post("extra-single-image", {"image": f"data:image/png;base64,{PNG}", **more}).json()
        assert as_it_came == {"html_info": "<p></p>", "image": PNG}
    assert asleep.queue.jobs == {}


def test_links_into_a_bucket_are_fetched(fresh: Desk) -> None:
    links = [f"{fresh.queue.url}/v2/sandbox/picture?signature=secret", f"{fresh.queue.url}/v2/sandbox/picture?b"]
    for _ in links:
        fresh.queue.fail(json_fault(200, 1), on="/picture")
    fresh.worker.work = lambda taken: {
        "images": [],
        "info": "{}",
        "worker": {"delivery": {"mode": "bucket", "urls": links}},
    }

    answer = fresh.post("txt2img", SMALL).json()

    assert answer["images"] == [base64.b64encode(b"1").decode()] * 2
    asked = [request for request in fresh.queue.asked if request.path.endswith("/picture")]
    assert [request.headers.get("authorization") for request in asked] == [None, None]


def test_a_link_that_leads_nowhere_is_an_error_without_the_link(fresh: Desk) -> None:
    link = f"{fresh.queue.url}/v2/sandbox/nothing?signature=secret"
    fresh.worker.work = lambda taken: {"images": [], "info": "", "worker": {"delivery": {"urls": [link]}}}

    answer = fresh.post("txt2img", SMALL)

    assert answer.status_code == 500
    assert answer.json()["error"] == "DELIVERY_FAILED"
    assert "secret" not in answer.text


# -- what costs nothing -----------------------------------------------------------------------------------------------

GETS = [
    *("samplers", "schedulers", "upscalers", "latent-upscale-modes", "sd-models", "sd-vae", "hypernetworks", "loras"),
    *("face-restorers", "realesrgan-models", "prompt-styles", "embeddings", "scripts", "script-info", "options"),
    *("cmd-flags", "memory", "progress", "extensions"),
]
POSTS = [
    *("interrupt", "skip", "refresh-checkpoints", "refresh-vae", "refresh-loras", "refresh-embeddings"),
    *("unload-checkpoint", "reload-checkpoint"),
]


def test_every_path_of_a1111s_document_is_answered(awake: Desk) -> None:
    document = json.loads((DATA / "webui-1.10.1" / "openapi.json").read_text(encoding="utf-8"))

    ours = awake.http.get("/openapi.json").json()["paths"]

    for path, methods in document["paths"].items():
        assert set(methods) <= set(ours.get(path, {})), path


def test_nothing_but_pictures_starts_a_worker_not_even_while_thirty_requests_hang(asleep: Desk) -> None:
    hanging = []
    for _ in range(30):
        connection = socket.create_connection((asleep.http.base_url.host, asleep.http.base_url.port or 0))
        body = json.dumps(SMALL).encode()
        head = "POST /sdapi/v1/txt2img HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        hanging.append(connection)
    wait_until(lambda: len(asleep.queue.jobs) == 30, "thirty jobs in the queue")

    for path in GETS:
        assert asleep.get(path, timeout=5).status_code == 200, path
    for path in POSTS:
        for content in (None, b"{}", b'""'):
            answer = asleep.http.post(f"/sdapi/v1/{path}", content=content, timeout=5)
            assert answer.status_code == 200, path
    assert asleep.post("options", {"CLIP_stop_at_last_layers": 2}, timeout=5).text == "null"
    assert asleep.post("png-info", {"image": PNG}, timeout=5).status_code == 200

    for connection in hanging:
        connection.close()
    wait_until(lambda: all(job.status == CANCELLED for job in asleep.queue.jobs.values()), "thirty cancelled jobs")
    assert len(asleep.queue.jobs) == 30


def test_before_the_first_answer_a_default_list_is_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with desk(tmp_path, asleep=True, known=False) as made:
        titles = [entry["title"] for entry in made.get("sd-models").json()]
        samplers = [entry["name"] for entry in made.get("samplers").json()]
        chosen = made.get("options").json()["sd_model_checkpoint"]

        assert titles == [chosen] == ["jib_mix_illustrious_realistic_v2.safetensors"]
        assert {"Euler a", "DPM++ 2M"} <= set(samplers)
        assert made.get("upscalers").json()[0]["name"] == "None"
        assert made.queue.jobs == {}
    assert "not known yet" in caplog.text


def test_lists_name_what_the_snapshot_has(awake: Desk) -> None:
    assert [entry["title"] for entry in awake.get("sd-models").json()] == [TITLE, f"garden.safetensors [{'cd' * 5}]"]
    loras = awake.get("loras").json()
    assert [entry["name"] for entry in loras] == [entry["alias"] for entry in loras] == ["mist_2", "fog_1", "detail"]
    assert awake.get("prompt-styles").json()[0]["name"] == "noir"
    assert awake.get("sd-vae").json() == [{"model_name": "v.pt", "filename": "v.pt"}]
    options = awake.get("options").json()
    assert (options["sd_model_checkpoint"], options["sd_checkpoint_hash"]) == (TITLE, SHA256)
    assert (options["samples_format"], len(options) >= 312, "forge_preset" in options) == ("png", True, False)


def test_png_info_reads_the_picture_here(asleep: Desk) -> None:
    exchange = json.loads((DATA / "webui-1.10.1" / "png_info" / "foreign_png_text.json").read_text(encoding="utf-8"))

    answers = [asleep.post("png-info", {"image": exchange["request"]["body"]["image"]}) for _ in range(2)]
    bad, missing = asleep.post("png-info", {"image": "!!!"}), asleep.post("png-info", {})

    assert answers[0].json() == exchange["response"]["body"]
    assert (bad.status_code, bad.json()["detail"]) == (500, "Invalid encoded image")
    assert missing.json() == {
        "detail": [{"loc": ["body", "image"], "msg": "field required", "type": "value_error.missing"}]
    }


def test_the_rest_of_the_port_is_as_clients_expect_it(awake: Desk) -> None:
    not_found = {"detail": "Not Found"}

    assert awake.http.get("/queue/status").status_code == 200
    assert awake.http.head("/").status_code == 200
    assert not re.search(r'(src|href)="[a-z]*:?//', awake.http.get("/docs").text)
    for path in ("/config", "/sdapi/v1/sd-modules", "/sdapi/v1/version", "/controlnet/model_list"):
        assert (awake.http.get(path).status_code, awake.http.get(path).json()) == (404, not_found)
    assert awake.http.post("/login", data={"username": "x"}).json() == not_found
    assert awake.http.get("/sdapi/v1/txt2img").json() == {"detail": "Method Not Allowed"}
    refused = awake.post("interrogate", {"image": PNG})
    assert (refused.status_code, refused.json()["detail"]) == (
        501,
        "interrogate: no worker has a model that describes pictures",
    )


# -- progress and interrupt -------------------------------------------------------------------------------------------


def test_progress_is_zero_if_idle_small_while_waiting_and_never_goes_back(asleep: Desk) -> None:
    steps = threading.Event(), threading.Event()

    def work(taken: Taken) -> Any:
        taken.report(stage="generate", percent=50.0, detail="step 10 of 20, image 1 of 2", eta_s=3.5, preview="cHJl")
        taken.wait_for(steps[0])
        taken.report(stage="models", percent=0, detail="", mb_per_s=120.5)
        taken.wait_for(steps[1])
        return picture_answer(taken.given)

    idle = asleep.get("progress").json()
    waiting = in_background(asleep.post, "txt2img", {**SMALL, "n_iter": 2})
    queued = wait_until(lambda: (now := asleep.get("progress").json())["progress"] and now, "progress")
    starting = wait_until(lambda: "starting" in str((now := asleep.get("progress").json())["textinfo"]) and now, "it")
    asleep.worker.work = work
    asleep.worker.start()
    half = wait_until(lambda: (now := asleep.get("progress").json())["progress"] > 0.4 and now, "half of it")
    without = asleep.get("progress", params={"skip_current_image": "true"}).json()
    steps[0].set()
    back = wait_until(lambda: "120.5 MB/s" in str((now := asleep.get("progress").json())["textinfo"]) and now, "it")
    steps[1].set()

    assert len(waiting.result(20).json()["images"]) == 2
    assert (idle["progress"], idle["state"]["job"], idle["state"]["job_count"]) == (0.0, "", 0)
    assert 0 < queued["progress"] < 0.1 and queued["state"]["job_count"] == 2 and queued["state"]["job"]
    assert re.fullmatch(r"a worker is starting, \d+ s", starting["textinfo"])
    assert half["state"]["job"] == "Batch 1 out of 2"
    assert (half["state"]["sampling_step"], half["state"]["sampling_steps"]) == (10, 20)
    assert (half["eta_relative"], half["current_image"], without["current_image"]) == (3.5, "cHJl", None)
    assert back["progress"] == half["progress"]
    assert asleep.get("progress").json() == idle


def test_an_interrupt_ends_a_job_that_still_waits_and_the_open_post_has_an_answer(asleep: Desk) -> None:
    waiting = in_background(asleep.post, "txt2img", SMALL)
    job = wait_until(lambda: next(iter(asleep.queue.jobs.values()), None), "a job")

    assert asleep.http.post("/sdapi/v1/interrupt", headers={"Content-Type": "application/json"}).json() == {}

    answer = waiting.result(20)
    assert (answer.status_code, answer.json()["images"]) == (200, [])
    assert json.loads(answer.json()["info"])["prompt"] == "a lighthouse"
    assert asleep.get("progress").json()["state"]["interrupted"] is False
    wait_until(lambda: job.status == CANCELLED, "the job's cancellation")


def test_two_clients_at_once_and_the_interrupt_of_one_leaves_the_other_alone(asleep: Desk) -> None:
    finish = threading.Event()

    def work(taken: Taken) -> Any:
        taken.wait_for(finish)
        return picture_answer(taken.given)

    asleep.worker.work = work
    one, two = {"User-Agent": "one"}, {"User-Agent": "two"}
    of_one = in_background(asleep.post, "txt2img", {**SMALL, "prompt": "one"}, headers=one)
    wait_until(lambda: len(asleep.queue.jobs) == 1, "the first job")
    of_two = in_background(asleep.post, "txt2img", {**SMALL, "prompt": "two"}, headers=two)
    wait_until(lambda: len(asleep.queue.jobs) == 2, "the second job")
    asleep.worker.start()

    assert asleep.get("progress", headers={"User-Agent": "three"}).json()["progress"] == 0.0
    asleep.post("interrupt", headers=one)
    assert of_one.result(20).json()["images"] == []
    assert asleep.get("progress", headers=one).json()["progress"] == 0.0
    first, second = asleep.queue.jobs.values()
    wait_until(lambda: first.status == CANCELLED, "the cancellation")
    finish.set()

    assert json.loads(of_two.result(20).json()["info"])["prompt"] == "two"
    assert second.status == COMPLETED


def test_a_dropped_line_cancels_that_lines_job_only(asleep: Desk) -> None:
    other = in_background(asleep.post, "txt2img", {**SMALL, "prompt": "other"})
    wait_until(lambda: len(asleep.queue.jobs) == 1, "the first job")
    with pytest.raises(httpx.ReadTimeout):
        asleep.post("txt2img", SMALL, timeout=httpx.Timeout(5, read=0.2))

    wait_until(lambda: len(asleep.queue.jobs) == 2, "two jobs")
    first, second = asleep.queue.jobs.values()
    wait_until(lambda: second.status == CANCELLED, "the cancellation")
    asleep.worker.start()
    assert other.result(20).json()["images"] == [PNG]
    assert first.status == COMPLETED


def test_the_jobs_of_a_client_that_watches_make_previews(fresh: Desk) -> None:
    fresh.get("progress", params={"skip_current_image": "true"})
    fresh.post("txt2img", SMALL)
    fresh.get("progress")
    fresh.post("txt2img", SMALL)
    fresh.post("txt2img", SMALL, headers={"User-Agent": "another"})

    assert [given.get("preview") for given in fresh.worker.inputs] == [None, True, None]


def test_an_interrupt_beside_a_dropped_line_ends_no_second_job(asleep: Desk) -> None:
    """SillyTavern's stop button does both."""
    other = in_background(asleep.post, "txt2img", {**SMALL, "prompt": "other"})
    wait_until(lambda: len(asleep.queue.jobs) == 1, "the first job")
    with pytest.raises(httpx.ReadTimeout):
        asleep.post("txt2img", SMALL, timeout=httpx.Timeout(5, read=0.2))
    first, second = asleep.queue.jobs.values()
    wait_until(lambda: second.status == CANCELLED, "the cancellation")

    asleep.post("interrupt")
    still_there = asleep.get("progress").json()["state"]["job_count"]
    asleep.post("interrupt")

    assert (still_there, other.result(20).json()["images"]) == (1, [])
    wait_until(lambda: first.status == CANCELLED, "the second cancellation")


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        "garden.safetensors [cdcdcdcdcd]",
        "garden.safetensors",
        "garden",
        "cdcdcdcdcd",
        "cd" * 32,
        "Garden",
    ],
)
def test_a_checkpoint_is_shown_by_its_title_in_whatever_form_it_was_posted(fresh: Desk, form: str) -> None:
    assert fresh.post("options", {"sd_model_checkpoint": form}).text == "null"

    shown = fresh.get("options").json()
    fresh.post("txt2img", SMALL)

    assert shown["sd_model_checkpoint"] == "garden.safetensors [cdcdcdcdcd]"
    assert shown["sd_checkpoint_hash"] == "cd" * 32
    assert fresh.worker.inputs[-1]["checkpoint"] == "Garden"


def test_posted_settings_are_shown_and_go_along_with_later_jobs(fresh: Desk) -> None:
    fresh.post("options", {"CLIP_stop_at_last_layers": 2, "sd_vae": "v.pt", "samples_save": False, "nobody": 1})
    fresh.post("txt2img", SMALL)
    everything = fresh.get("options").json()
    fresh.post("options", {**everything, "CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic"})
    fresh.post("txt2img", SMALL)

    assert everything["CLIP_stop_at_last_layers"] == 2 and everything["samples_save"] is False
    assert "nobody" not in everything
    assert fresh.worker.inputs[0]["override_settings"] == {"CLIP_stop_at_last_layers": 2, "sd_vae": "v.pt"}
    assert "override_settings" not in fresh.worker.inputs[1]


def test_a_checkpoint_that_is_not_there_is_a1111s_error(awake: Desk) -> None:
    answer = awake.post("options", {"sd_model_checkpoint": "cellar"})

    assert answer.status_code == 500
    assert answer.json()["error"] == "RuntimeError"
    assert answer.json()["errors"] == "model 'cellar' not found"
    assert all(isinstance(text, str) for text in answer.json().values())


# -- the snapshot -----------------------------------------------------------------------------------------------------


def test_the_first_job_brings_the_lists_along_and_the_next_does_not(tmp_path: Path) -> None:
    with desk(tmp_path, known=False) as made:
        made.post("txt2img", SMALL)
        made.post("txt2img", SMALL)

        assert [given.get("include") for given in made.worker.inputs] == [["models"], None]
        assert made.get("options").json()["sd_model_checkpoint"] == TITLE
        assert made.snapshots.load(made.endpoint_url).fingerprint == "00000000000000aa"
        assert len(made.queue.jobs) == 2


def test_another_fingerprint_makes_the_next_job_bring_the_lists_along(fresh: Desk) -> None:
    fresh.worker.work = lambda taken: picture_answer(taken.given, lists="00000000000000bb")

    for _ in range(2):
        fresh.post("txt2img", SMALL)

    assert [given.get("include") for given in fresh.worker.inputs] == [None, ["models"]]


def test_a_refresh_makes_the_next_job_bring_the_lists_along(fresh: Desk) -> None:
    fresh.post("refresh-loras")
    fresh.post("txt2img", SMALL)

    assert fresh.worker.inputs[0]["include"] == ["models"]


def test_a_worker_that_knows_no_lists_still_draws(tmp_path: Path) -> None:
    def work(taken: Taken) -> Any:
        if "include" in taken.given:
            complaint = {"path": "include", "message": "is unknown"}
            return {
                "error": "x",
                "code": "INVALID_REQUEST",
                "message": "include: is unknown",
                "complaints": [complaint],
            }
        return picture_answer(taken.given)

    with desk(tmp_path, known=False) as made:
        made.worker.work = work
        assert [made.post("txt2img", SMALL).json()["images"] for _ in range(2)] == [[PNG], [PNG]]
        assert len(made.queue.jobs) == 3


def test_a_name_that_only_an_old_snapshot_had_renews_it_and_the_job_is_tried_once_more(fresh: Desk) -> None:
    """The style was renamed on the worker: with new lists it is dropped, as A1111 drops unknown styles."""

    def work(taken: Taken) -> Any:
        if taken.given.get("task") == "models":
            return {"models": models_answer(fingerprint="bb", webui={"prompt-styles": []}), "worker": {}}
        if "styles" in taken.given:
            complaint = {"path": "styles[0]", "message": "unknown style 'noir'"}
            return {"error": "x", "code": "INVALID_REQUEST", "message": "unknown style", "complaints": [complaint]}
        return picture_answer(taken.given, lists="bb")

    fresh.worker.work = work

    answer = fresh.post("txt2img", {**SMALL, "styles": ["noir"]})

    assert answer.json()["images"] == [PNG]
    assert [given.get("task", "txt2img") for given in fresh.worker.inputs] == ["txt2img", "models", "txt2img"]
    assert fresh.get("prompt-styles").json() == []


def test_a_name_that_nobody_ever_had_is_refused_without_another_job(fresh: Desk) -> None:
    complaint = {"path": "sampler_name", "message": "unknown sampler 'Nope'"}
    fresh.worker.work = lambda taken: {
        "error": "x",
        "code": "INVALID_REQUEST",
        "message": "sampler_name: unknown sampler 'Nope'; the nearest: 'Euler'",
        "complaints": [complaint],
    }

    answer = fresh.post("txt2img", {**SMALL, "sampler_name": "Nope"})

    assert (answer.status_code, answer.json()["detail"]) == (404, "Sampler not found")
    assert "the nearest: 'Euler'" in answer.json()["errors"]
    assert len(fresh.queue.jobs) == 1


# -- failures ---------------------------------------------------------------------------------------------------------

FAILURES = [
    ("INVALID_REQUEST", 422, "HTTPException"),
    ("MODEL_NOT_FOUND", 404, "HTTPException"),
    ("OUT_OF_MEMORY", 500, "OutOfMemoryError"),
    ("WEBUI_LOST", 503, "WEBUI_LOST"),
    ("GENERATION_FAILED", 500, "RuntimeError"),
]


@pytest.mark.parametrize(("code", "status", "name"), FAILURES)
def test_a_failed_job_is_an_error_in_a1111s_form_with_the_workers_sentence(
    fresh: Desk, code: str, status: int, name: str
) -> None:
    fresh.worker.work = lambda taken: {"error": f"{code}: no luck", "code": code, "message": "no luck", "hint": "pray"}

    answer = fresh.post("txt2img", SMALL)

    assert answer.status_code == status
    assert answer.json()["error"] == name
    assert answer.json()["detail"] == "no luck (pray)"
    assert set(answer.json()) == {"error", "detail", "body", "errors"}
    assert all(isinstance(text, str) for text in answer.json().values())


def test_all_that_is_wrong_with_a_body_is_told_at_once_as_pydantic_does(awake: Desk) -> None:
    answer = awake.post(
        "txt2img", {"steps": "abc", "width": None, "tiling": "maybe", "styles": "x", "sampler_index": None}
    )

    assert answer.status_code == 422
    assert {tuple(problem["loc"]): problem["type"] for problem in answer.json()["detail"]} == {
        ("body", "steps"): "type_error.integer",
        ("body", "tiling"): "type_error.bool",
        ("body", "styles"): "type_error.list",
        ("body", "sampler_index"): "type_error.none.not_allowed",
    }


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "value_error.missing"),
        (b"{", "value_error.jsondecode"),
        (b"[]", "type_error.dict"),
        (b"\xff", "value_error.jsondecode"),
    ],
)
def test_what_is_no_json_object_is_refused_as_fastapi_does(awake: Desk, content: bytes, kind: str) -> None:
    headers = {"Content-Type": "application/json; charset=utf-8"}

    answer = awake.http.post("/sdapi/v1/txt2img", content=content, headers=headers)

    assert (answer.status_code, answer.json()["detail"][0]["type"]) == (422, kind)


@pytest.mark.parametrize("status", [429, 500, 502])
def test_an_answer_of_runpod_that_says_not_now_is_asked_again(fresh: Desk, status: int) -> None:
    for path in ("/run", "/status"):
        fresh.queue.fail(json_fault(status, {"error": "slow down"}), on=path)

    assert fresh.post("txt2img", SMALL).json()["images"] == [PNG]
    assert len(fresh.queue.jobs) == 1


def test_runpod_out_of_reach_is_an_error_that_says_so(fresh: Desk) -> None:
    for _ in range(20):
        fresh.queue.fail(json_fault(500, {}), on="/run")

    answer = fresh.post("txt2img", SMALL)

    assert (answer.status_code, answer.json()["error"]) == (503, "ENDPOINT_UNREACHABLE")
    assert "it answers 500" in answer.json()["detail"]


def test_a_worker_that_dies_in_the_middle_is_an_error_when_runpod_gives_up(tmp_path: Path) -> None:
    with desk(tmp_path, timeout=0.3) as made:
        made.worker.work = lambda taken: None
        answer = made.post("txt2img", SMALL)

    assert (answer.status_code, answer.json()["error"]) == (500, "JOB_TIMED_OUT")


def test_a_result_that_runpod_lost_is_an_error(fresh: Desk) -> None:
    fresh.worker.work = lambda taken: {}

    answer = fresh.post("txt2img", SMALL)

    assert (answer.status_code, answer.json()["error"]) == (500, "JOB_LOST")


def test_a_job_that_somebody_cancels_at_runpod_ends_without_pictures(asleep: Desk) -> None:
    waiting = in_background(asleep.post, "txt2img", SMALL)
    (job_id,) = wait_until(lambda: list(asleep.queue.jobs), "a job")

    asleep.queue.cancel(job_id)

    assert (waiting.result(20).status_code, waiting.result(20).json()["images"]) == (200, [])


def test_the_key_goes_to_the_endpoint_alone_and_is_in_no_output(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="a1111_client")
    with desk(tmp_path) as made:
        made.queue.fail(json_fault(500, {}), on="/run")
        answers = [made.post("txt2img", SMALL)]
        made.queue.fail(json_fault(401, {"error": f"not the key {KEY}"}), on="/run")
        answers += [made.post("txt2img", {**SMALL, "auth": "user:pass"}), made.get("options"), made.get("cmd-flags")]

        assert answers[1].status_code == 503
        assert answers[1].json()["error"] == "ENDPOINT_REFUSED"
        for text in (caplog.text, *(answer.text + str(answer.headers) for answer in answers)):
            assert KEY not in text and "user:pass" not in text
        assert {asked.headers["authorization"] for asked in made.queue.asked if "/run" in asked.path} == {
            f"Bearer {KEY}"
        }


# -- the recorded requests of clients ---------------------------------------------------------------------------------

RECORDED = sorted([*(DATA / "clients").glob("oobabooga_*.json"), *(DATA / "clients").glob("open_webui_*.json")])


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_what_a_client_sends_is_answered_as_it_needs_it(fresh: Desk, path: Path) -> None:
    title = fresh.get("sd-models").json()[0]["title"]
    text = path.read_text(encoding="utf-8").replace("tiny.safetensors [0123456789]", title)

    for request in json.loads(text)["requests"]:
        headers = {name: value for name, value in request["headers"].items() if name != "Content-Length"}
        body = None if request["body"] is None else json.dumps(request["body"])
        answer = fresh.http.request(request["method"], request["path"], headers=headers, content=body)

        assert answer.status_code == 200, (request["path"], answer.text)
        if request["path"].endswith("txt2img"):
            assert answer.json()["images"] and json.loads(answer.json()["info"])
        elif request["path"] == "/sdapi/v1/options" and request["method"] == "GET":
            assert answer.json()["sd_model_checkpoint"] == title
    for given in fresh.worker.inputs:
        assert_says_no_more_than_it_must(given)


SOURCES = [
    entry
    for entry in json.loads(
        (DATA / "clients" / "read_in_sources.json")
        .read_text(encoding="utf-8")
        .replace("tiny.safetensors [0123456789]", TITLE)
    )
    if entry.get("task") != "upscale"
]


@pytest.mark.parametrize("entry", SOURCES, ids=lambda entry: f"{entry['client']} {entry['version']}")
def test_the_bodies_of_clients_that_were_read_in_their_sources_become_pictures(
    awake: Desk, entry: dict[str, Any]
) -> None:
    body = entry["body"]

    answer = awake.post("img2img" if "init_images" in body else "txt2img", body)

    assert answer.status_code == 200, answer.text
    assert answer.json()["images"] and json.loads(answer.json()["info"])
    assert not {"url", "auth"} & set(answer.json()["parameters"])
    assert_says_no_more_than_it_must(awake.worker.inputs[-1])


def assert_says_no_more_than_it_must(given: dict[str, Any]) -> None:
    """What cannot change a picture is not in the job."""
    known = {*fields("img2img"), *fields("txt2img"), "task", "checkpoint", "output"}
    dropped = {"sampler_index", "override_settings_restore_afterwards", "do_not_save_samples", "save_images"}
    assert set(given) <= known - dropped

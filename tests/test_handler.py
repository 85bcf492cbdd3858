"""Whole jobs: the real handler and model manager against the sandbox's WebUI and CivitAI, over real HTTP."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from a1111_worker import logs
from a1111_worker.errors import CheckpointNotLoaded, WebUINotReady
from a1111_worker.webui.client import WebUI
from handler import Worker
from sandbox import civitai as c
from sandbox.models import sd15_lora, sdxl_lora
from sandbox.server import Exchange
from sandbox.webui import CannedAnswer, WebUIFault
from tests.support import CHECKPOINT, DETAIL, HAND, QUICK, ROOT, SMALL, World, quick_manager, world

URL = "https://civitai.com/api/download/models/"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A booted worker for jobs that must leave no trace."""
    with world(tmp_path_factory.mktemp("world")) as it:
        yield it


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[World]:
    """A booted worker of a test's own."""
    with world(tmp_path) as it:
        yield it


def assert_unharmed(it: World) -> None:
    """The next job succeeds, and the cache holds nothing but models."""
    answer = it.ask("next")
    assert "error" not in answer
    assert it.leftovers() == []


# -- success ----------------------------------------------------------------------------------------------------------


def test_a_job_returns_its_image_and_what_made_it(shared: World) -> None:
    answer = shared.ask(loras=[{"url": f"{URL}{DETAIL}?type=Model&format=SafeTensor", "name": "x", "scale": 0.7}])

    image = Image.open(io.BytesIO(base64.b64decode(answer["images"][0])))
    assert image.size == (64, 64)
    tag = answer["worker"]["loras"][0]["tag"]
    assert f"<lora:{tag}:0.7>" in str(image.info["parameters"])
    assert json.loads(answer["info"])["all_seeds"] == answer["worker"]["seeds"] == [42]
    (lora,) = answer["worker"]["loras"]
    assert (lora["version_id"], lora["scale"], lora["loaded"]) == (DETAIL, 0.7, True)


def test_a_warm_job_costs_somebody_elses_webui_one_look_and_one_request_and_civitai_none(shared: World) -> None:
    shared.ask(loras=[{"version_id": DETAIL}])
    before, asked = len(shared.webui.asked), len(shared.civitai.asked)

    shared.ask(loras=[{"version_id": DETAIL}])

    assert shared.requests_since(before) == ["/sdapi/v1/options", "/sdapi/v1/txt2img"]
    assert len(shared.civitai.asked) == asked


def test_a_field_that_the_job_leaves_out_has_our_default_or_is_not_sent(shared: World) -> None:
    shared.run({"id": "job-1", "input": {"prompt": "a lighthouse"}})

    assert shared.generations()[-1] == {
        "prompt": "a lighthouse",
        "steps": 25,
        "cfg_scale": 7,
        "width": 1024,
        "height": 1024,
        "sampler_name": "DPM++ 2M",
        "scheduler": "Karras",
    }


@pytest.mark.parametrize("version", ["1.9.3", "1.10.1"])
def test_the_old_name_of_a_sampler_works_with_every_webui(tmp_path: Path, version: str) -> None:
    with world(tmp_path, version=version) as it:
        answer = it.ask(sampler_name="dpm++ 2m karras")

    # Both have the scheduler as a field of its own; 1.9.3 answers 404 to the old name itself.
    body = it.generations()[-1]
    assert (body["sampler_name"], body.get("scheduler")) == ("DPM++ 2M", "Karras")
    info = json.loads(answer["info"])
    assert (info["version"], info["sampler_name"]) == (version, "DPM++ 2M")
    assert info["extra_generation_params"] == {"Schedule type": "Karras"}


@pytest.mark.parametrize("scheduler", ["automatic", "AUTOMATIC", "Automatic"])
def test_the_automatic_scheduler_is_understood_in_any_case(tmp_path: Path, scheduler: str) -> None:
    hires: dict[str, Any] = {"enable_hr": True, "denoising_strength": 0.5, "hr_upscaler": "Latent"}
    with world(tmp_path, version="1.9.3") as it:  # which draws without Karras for "automatic", and says so in no list
        answer = it.ask(sampler_name="DPM++ 2M", scheduler=scheduler, hr_scheduler=scheduler, **hires)

    body, info = it.generations()[-1], json.loads(answer["info"])
    assert (body["scheduler"], body["hr_scheduler"]) == ("Automatic", "Automatic")
    assert info["extra_generation_params"]["Schedule type"] == "Karras"


@pytest.mark.parametrize("version", ["1.9.3", "1.10.1"])
def test_a_second_pass_with_another_lora_verifies_both(tmp_path: Path, version: str) -> None:
    hires: dict[str, Any] = {"enable_hr": True, "denoising_strength": 0.5, "hr_scale": 2, "hr_upscaler": "Latent"}
    with world(tmp_path, version=version) as it:
        answer = it.ask(prompt="a <lora:detail_tweaker_xl:1>", hr_prompt="a <lora:hand_detail_flux_xl:1>", **hires)

    assert [lora["loaded"] for lora in answer["worker"]["loras"]] == [True, True]


def test_a_failed_jobs_lines_carry_its_id_and_its_timings(shared: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    caplog.handler.addFilter(logs.add_job_id)
    shared.webui.fail_next = [WebUIFault.OUT_OF_MEMORY]

    shared.ask("job-77")

    logged = {record.getMessage().partition(":")[0]: record for record in caplog.records}
    assert {logged[words].__dict__["job"] for words in ("the job failed", "ended early")} == {"job-77"}
    assert "total" in logged["ended early"].getMessage()


def test_the_log_has_what_a_failed_jobs_caller_is_told_to_do(shared: World, caplog: pytest.LogCaptureFixture) -> None:
    answer = shared.ask(prompt="a lighthouse <lora:nobody_knows:1>")

    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("the job failed")]
    assert answer["error"] in line
    assert answer["hint"] in line


def test_a_successful_jobs_last_line_carries_its_id(shared: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    caplog.handler.addFilter(logs.add_job_id)

    shared.ask("job-78")

    (last,) = [record for record in caplog.records if record.getMessage().startswith("done with ")]
    assert last.__dict__["job"] == "job-78"  # logged by a thread


def test_a_job_does_not_leak_into_the_next(shared: World) -> None:
    plain = shared.ask()["images"]

    shared.ask(clip_skip=2, override_settings={"eta_noise_seed_delta": 31337})
    after = shared.ask()["images"]

    assert after == plain


def test_the_same_lora_twice_in_a_row_is_fetched_once(fresh: World) -> None:
    first = fresh.ask(loras=[{"version_id": HAND}])
    second = fresh.ask(loras=[f"civitai:1@{HAND}"])

    assert [answer["worker"]["loras"][0]["downloaded"] for answer in (first, second)] == [True, False]
    assert fresh.civitai.resolves[HAND] == 1


def test_a_lora_may_be_named_in_every_documented_way(shared: World) -> None:
    for named in (
        {"url": f"{URL}{DETAIL}?type=Model&format=SafeTensor"},
        {"version_id": DETAIL},
        f"urn:air:sdxl:lora:civitai:122359@{DETAIL}",
        f"https://civitai.com/models/122359?modelVersionId={DETAIL}",
        f"https://civitai.red/models/122359/detail-tweaker-xl?modelVersionId={DETAIL}",
        {"name": "detail_tweaker_xl"},
        {"name": "Detail Tweaker XL"},
        DETAIL,
        str(DETAIL),
        {"version_id": str(DETAIL)},
        f"civitai:{shared.civitai.versions[DETAIL].model_id}",
        f"https://civitai.com/models/{shared.civitai.versions[DETAIL].model_id}",
    ):
        answer = shared.ask(loras=[named])

        assert answer["worker"]["loras"][0]["version_id"] == DETAIL, named
        assert answer["worker"]["loras"][0]["scale"] == 1.5, named


def test_the_parameters_of_an_answer_are_a_job_that_makes_the_same_picture(shared: World) -> None:
    hires: dict[str, Any] = {"enable_hr": True, "denoising_strength": 0.5, "hr_scale": 2, "hr_upscaler": "Latent"}
    first = shared.ask(loras=[{"version_id": DETAIL}], clip_skip=2, **hires)

    again = shared.run({"id": "again", "input": first["parameters"]})

    assert again["images"] == first["images"]
    assert again["worker"]["loras"] == [{**lora, "downloaded": False} for lora in first["worker"]["loras"]]


def test_a_model_that_was_copied_into_the_cache_is_known_by_its_stem(fresh: World) -> None:
    sdxl_lora(fresh.models_dir / "loras" / "my_style.safetensors", 5, 300_000)

    answer = fresh.ask(prompt="a lighthouse <lora:my_style:0.6>")

    assert answer["worker"]["loras"][0]["file"] == "my_style.safetensors"
    assert answer["worker"]["loras"][0]["loaded"] is True


def test_a_job_may_go_on_without_its_lora(shared: World) -> None:
    answer = shared.ask(loras=[{"version_id": 404404}, {"version_id": DETAIL}], on_lora_error="warn")

    assert [lora["loaded"] for lora in answer["worker"]["loras"]] == [False, True]
    assert "MODEL_NOT_FOUND" in answer["worker"]["warnings"][0]


def test_a_local_run_saves_its_images(tmp_path: Path) -> None:
    with world(tmp_path, OUTPUT_DIR=str(tmp_path / "out")) as it:
        answer = it.ask("local_test")

    (saved,) = (tmp_path / "out").iterdir()
    assert saved.read_bytes() == base64.b64decode(answer["images"][0])


# -- bad input: a row each, through the whole handler -----------------------------------------------------------------

DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]

NO_INPUT: list[tuple[dict[str, Any], str]] = [
    ({}, "input"),  # no `input` at all
    ({"input": None}, "input"),
    ({"input": "a lighthouse"}, "object"),
    ({"input": ["a lighthouse"]}, "object"),
    ({"input": {}}, "prompt"),
]


@pytest.mark.parametrize(("job", "words"), NO_INPUT)
def test_a_job_without_a_proper_input_is_refused(shared: World, job: dict[str, Any], words: str) -> None:
    answer = shared.run({"id": "job-1", **job})

    assert answer["code"] == "INVALID_REQUEST"
    assert words in answer["error"]


# what the job gives, and words that must be in the error
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "  \n"}, "prompt: must not be blank"),
    ({"prompt": 7}, "prompt: must be text"),
    ({"prompt": None}, "prompt"),
    ({"prompt": "x" * 1_000_000}, "prompt: must be at most 20,000 bytes"),
    ({"prompt": "half a pair \ud800"}, "prompt: must be valid text"),
    ({"num_inference_steps": 5}, "did you mean 'steps'"),
    ({"promt": "x"}, "did you mean 'prompt'"),
    ({"\ud800": 1}, "name"),
    ({"x" * 100_000: 1}, "is unknown"),
    ({"steps": "many"}, "steps: must be a whole number"),
    ({"steps": True}, "steps"),  # nor is true
    ({"steps": 0}, "steps"),  # 500 ZeroDivisionError in A1111
    ({"steps": 151}, "steps"),
    ({"batch_size": 0}, "batch_size"),  # 500 IndexError in A1111
    ({"seed": 2**70}, "seed"),  # 500 overflow in A1111
    ({"seed": -5}, "seed"),
    ({"width": 65}, "width"),
    ({"width": 4096}, "width"),
    ({"batch_size": 5, "n_iter": 5}, "25 pictures"),
    ({"enable_hr": True, "denoising_strength": 0.5, "hr_scale": 4, "width": 1024, "height": 1024}, "pixels"),
    ({"cfg_scale": float("nan")}, "cfg_scale: must be a finite number"),
    ({"cfg_scale": float("inf")}, "cfg_scale"),
    ({"script_args": [{"x": [float("nan")]}]}, "script_args[0].x[0]"),
    ({"alwayson_scripts": {"Hypertile": {"args": DEEP}}}, "nested deeper"),
    ({"sampler_name": "Eulerr"}, "'Euler'"),
    ({"scheduler": "Karas"}, "'Karras'"),
    ({"sampler_name": "Euler", "scheduler": "No"}, "unknown scheduler"),
    ({"enable_hr": True, "denoising_strength": 0.5, "hr_scale": 1.5, "hr_upscaler": "Lanczoss"}, "'Lanczos'"),
    ({"enable_hr": True, "denoising_strength": 0.5, "hr_upscaler": "R-ESRGAN 4x+"}, "'R-ESRGAN 4x+' is not there"),
    ({"script_name": "x/y plot"}, "'x/y/z plot'"),
    ({"alwayson_scripts": {"ControlNet": {"args": [{"enabled": True}]}}}, "is not in this image"),
    ({"styles": ["cinematic"]}, "unknown style"),
    ({"checkpoint": "other"}, "checkpoint"),
    ({"refiner_checkpoint": "other"}, "refiner_checkpoint"),
    ({"enable_hr": True, "denoising_strength": 0.5, "hr_checkpoint_name": "other"}, "hr_checkpoint_name"),
    ({"override_settings": {"sd_model_checkpoint": "other"}}, "sd_model_checkpoint"),
    ({"alwayson_scripts": {"Refiner": {"args": [True, "other", 0.8]}}}, "Refiner"),
    ({"infotext": "a\nModel: other"}, "infotext"),
    ({"send_images": False}, "send_images"),
    ({"disable_extra_networks": True}, "disable_extra_networks"),
    ({"force_task_id": "x"}, "force_task_id"),
    ({"loras": [{}]}, "loras[0]"),
    ({"loras": [{"scale": 1}]}, "loras[0]"),
    ({"loras": [{"version_id": n + 1} for n in range(17)]}, "16"),
    ({"loras": [{"version_id": DETAIL}, {"name": "Detail Tweaker XL"}]}, "loras[1]"),
    ({"loras": [{"version_id": DETAIL, "scale": "abc"}]}, "loras[0].scale"),
    ({"loras": [{"version_id": DETAIL, "scale": float("nan")}]}, "loras[0].scale"),
    ({"loras": [{"version_id": DETAIL, "scale": 1e9}]}, "loras[0].scale"),
    ({"loras": [{"name": "../../etc/passwd"}]}, "loras[0].name"),
    ({"loras": [{"name": "x\0y"}]}, "loras[0].name"),
    ({"loras": [{"url": "https://evil.example/x.safetensors"}]}, "loras[0]"),
    ({"loras": [{"url": "http://civitai.com/api/download/models/1"}]}, "loras[0]"),
    ({"loras": [{"url": "https://169.254.169.254/latest/meta-data"}]}, "loras[0]"),
    ({"loras": [{"url": "http://169.254.169.254/latest/meta-data"}]}, "loras[0]"),
    ({"loras": [{"url": "file:///etc/passwd"}]}, "loras[0]"),
    ({"loras": [{"url": "https://user:word@civitai.com/api/download/models/1"}]}, "loras[0]"),
    ({"loras": [{"url": f"{URL}{DETAIL}?token=abc"}]}, "loras[0]"),
    ({"loras": [{"url": "https://civitai.com.evil.example/api/download/models/1"}]}, "loras[0]"),
    ({"on_lora_error": "ignore"}, "on_lora_error"),
    ({"prompt": "x <lora:y:much>"}, "weight"),
]


@pytest.mark.parametrize(("given", "words"), REFUSED, ids=lambda value: str(value)[:60])
def test_bad_input_is_refused_before_anything_is_asked(shared: World, given: dict[str, Any], words: str) -> None:
    generations, asked = len(shared.generations()), len(shared.civitai.asked)

    answer = shared.ask(**given)

    assert answer["code"] == "INVALID_REQUEST", answer
    assert answer["retryable"] is False
    assert words in answer["error"]
    assert (len(shared.generations()), len(shared.civitai.asked)) == (generations, asked)


def test_seventeen_complaints_come_at_once(shared: World) -> None:
    wrong: dict[str, Any] = {
        **{f"nonsense_{n}": n for n in range(10)},
        "steps": -1,
        "width": 3,
        "height": 3,
        "seed": "x",
        "cfg_scale": None,
        "batch_size": 99,
        "checkpoint": "y",
        "loras": "z",
    }

    answer = shared.ask(**wrong)

    assert sum(f"{path}:" in answer["error"] for path in wrong if path != "cfg_scale") == 17
    assert {complaint["path"] for complaint in answer["complaints"]} == set(wrong) - {"cfg_scale"}


def test_nothing_that_was_refused_harmed_the_next_job(shared: World) -> None:
    assert_unharmed(shared)


@pytest.mark.parametrize("name", ["x" * 300, "💡" * 20, "a/b", "..", "CON", ".hidden"])
def test_a_strange_name_beside_an_id_never_reaches_the_disk(shared: World, name: str) -> None:
    answer = shared.ask(loras=[{"version_id": HAND, "name": name}])

    files = [path.name for path in (shared.models_dir / "loras").glob("*.safetensors")]
    assert all(file in ("detail_tweaker_xl.safetensors", "hand_detail_flux_xl.safetensors") for file in files)
    assert answer.get("code") in (None, "INVALID_REQUEST")


class ObservedInput(dict[str, Any]):
    """A job's input that notes in which threads it is read."""

    def __init__(self, readers: set[int], **given: Any) -> None:
        super().__init__(given)
        self._readers = readers

    def items(self) -> Any:
        self._readers.add(threading.get_ident())
        return super().items()


class ObservedName(str):
    """A name in a job's input that notes in which threads it is compared."""

    readers: set[int]
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        self.readers.add(threading.get_ident())
        return str.__eq__(self, other)


def test_the_input_is_parsed_and_its_names_are_resolved_beside_the_event_loop(shared: World) -> None:
    name = ObservedName("Automatic")
    parsing, name.readers = set[int](), set[int]()

    answer = shared.run({"id": "job-1", "input": ObservedInput(parsing, prompt="x", **SMALL, vae=name)})

    assert "error" not in answer
    assert parsing and name.readers
    assert threading.get_ident() not in parsing | name.readers


# -- LoRAs that are not available --------------------------------------------------------------------------------------

# what CivitAI answers to every request for this version, and what the job must end with
CIVITAI_RESPONSES: list[tuple[c.ServerFault, str, bool]] = [
    (c.BAD_REQUEST, "DOWNLOAD_FAILED", True),
    (c.LOGIN_REQUIRED, "MODEL_ACCESS_DENIED", False),
    (c.DOWNLOADS_DISABLED, "MODEL_ACCESS_DENIED", False),
    (c.PRIVATE, "MODEL_ACCESS_DENIED", False),
    (c.EARLY_ACCESS, "MODEL_ACCESS_DENIED", False),
    (c.NOT_FOUND, "MODEL_NOT_FOUND", False),
    (c.ARCHIVED, "MODEL_NOT_FOUND", False),
    (c.REGION_BLOCKED, "MODEL_ACCESS_DENIED", False),
    (c.TOO_MANY, "DOWNLOAD_FAILED", True),
    (c.too_many(3600), "DOWNLOAD_FAILED", True),  # an hour is not waited for
    (c.SERVER_ERROR, "DOWNLOAD_FAILED", True),
    (c.CLOUDFLARE_522, "DOWNLOAD_FAILED", True),
    (c.SILENCE, "DOWNLOAD_FAILED", True),
]


@pytest.mark.parametrize(("response", "code", "retryable"), CIVITAI_RESPONSES, ids=lambda value: str(value)[:40])
def test_a_lora_that_is_not_available_ends_the_job(
    fresh: World, response: c.ServerFault, code: str, retryable: bool
) -> None:
    fresh.civitai.fail(response, times=None, on="/api/download/")

    answer = fresh.ask(loras=[{"version_id": HAND}])

    assert (answer["code"], answer["retryable"]) == (code, retryable), answer
    assert "html" not in answer["error"].lower()
    assert fresh.generations() == []
    fresh.civitai.heal()
    assert_unharmed(fresh)


# what the storage sends in the file's place, and what the job must end with
STORAGE_RESPONSES: list[tuple[c.ServerFault, str]] = [
    (c.HTML_PAGE, "MODEL_REJECTED"),  # a login page
    (c.ServerFault(cut_after=1000), "DOWNLOAD_FAILED"),  # half a file, every time
    (c.ServerFault(extra=1000), "DOWNLOAD_FAILED"),  # lengths that contradict each other
    (c.STORE_ERROR, "DOWNLOAD_FAILED"),
    (c.ServerFault(stall_after=1000), "DOWNLOAD_FAILED"),  # nothing for 60 s
    (c.redirect("http://169.254.169.254/latest/meta-data"), "MODEL_REJECTED"),
    (c.redirect("https://10.0.0.1/x"), "MODEL_REJECTED"),
]


@pytest.mark.parametrize(("response", "code"), STORAGE_RESPONSES, ids=lambda value: str(value)[:60])
def test_a_broken_download_ends_the_job_and_leaves_nothing(fresh: World, response: c.ServerFault, code: str) -> None:
    fresh.civitai.storage.fail(response, times=None)

    answer = fresh.ask(loras=[{"version_id": HAND}])

    assert answer["code"] == code, answer
    fresh.civitai.storage.heal()
    assert "error" not in fresh.ask("next", loras=[{"version_id": HAND}])
    assert fresh.leftovers() == []


def pickle_of(path: Path) -> Path:
    path.write_bytes(b"\x80\x04\x95" + b"x" * 5000)
    return path


def zip_of(path: Path) -> Path:
    path.write_bytes(b"PK\x03\x04" + b"x" * 5000)
    return path


def cut_short(path: Path) -> Path:
    whole = sdxl_lora(path, 1, 300_000)
    whole.write_bytes(whole.read_bytes()[:-1000])
    return whole


@pytest.mark.parametrize("make", [pickle_of, zip_of, cut_short, lambda path: sd15_lora(path, 1)])
def test_a_file_that_may_not_be_loaded_is_rejected(fresh: World, make: Callable[[Path], Path]) -> None:
    fresh.civitai.add(555, make(fresh.folder / "bad.safetensors"), name="Bad", base_model="SDXL 1.0")

    answer = fresh.ask(loras=[{"version_id": 555}])

    assert answer["code"] == "MODEL_REJECTED"
    assert_unharmed(fresh)


def test_a_file_with_another_checksum_is_rejected(fresh: World) -> None:
    fresh.civitai.replace(HAND, sdxl_lora(fresh.folder / "other.safetensors", 9, 300_000))

    answer = fresh.ask(loras=[{"version_id": HAND}])

    assert answer["code"] == "MODEL_REJECTED"
    assert_unharmed(fresh)


def test_an_unknown_tag_ends_the_job(shared: World) -> None:
    answer = shared.ask(prompt="a lighthouse <lora:nobody_knows:1>")

    assert answer["code"] == "MODEL_NOT_FOUND"
    assert "nobody_knows" in answer["error"]


def test_the_key_is_sent_to_civitais_api_alone(fresh: World) -> None:
    fresh.ask(loras=[{"version_id": DETAIL}])

    assert all("authorization" not in asked.headers for asked in fresh.civitai.storage.asked)
    assert all("the-key" not in str(asked.headers) for asked in fresh.webui.asked)


# -- a WebUI that fails -----------------------------------------------------------------------------------------------


HTML = CannedAnswer(200, b"<html>hello</html>", "text/html")

# what the next txt2img answers, and what its job must end with
WEBUI_RESPONSES: list[tuple[WebUIFault | CannedAnswer, str]] = [
    (
        CannedAnswer(500, {"error": "TypeError", "detail": "", "body": "", "errors": "in /opt/webui/x.py"}),
        "GENERATION_FAILED",
    ),
    (WebUIFault.BAD_GATEWAY, "WEBUI_LOST"),
    (HTML, "WEBUI_LOST"),
    (WebUIFault.CUT, "WEBUI_LOST"),  # half an answer
    (WebUIFault.RESET, "WEBUI_LOST"),
    (WebUIFault.NO_IMAGES, "GENERATION_FAILED"),
    (WebUIFault.OTHER_CHECKPOINT, "CHECKPOINT_NOT_LOADED"),
    (WebUIFault.OUT_OF_MEMORY, "OUT_OF_MEMORY"),
    (WebUIFault.NANS, "GENERATION_FAILED"),
    (WebUIFault.BLACK, "GENERATION_FAILED"),  # --disable-nan-check, or a checkpoint that makes nothing else
    (
        CannedAnswer(422, {"error": "HTTPException", "detail": "Script 'x' not found", "body": "", "errors": ""}),
        "INVALID_REQUEST",
    ),
    (
        CannedAnswer(404, {"error": "HTTPException", "detail": "Sampler not found", "body": "", "errors": ""}),
        "INVALID_REQUEST",
    ),
]


@pytest.mark.parametrize(("response", "code"), WEBUI_RESPONSES, ids=lambda value: str(value)[:60])
def test_a_webui_that_fails_costs_one_job(shared: World, response: WebUIFault | CannedAnswer, code: str) -> None:
    before = len(shared.generations())
    shared.webui.fail_next = [response]

    answer = shared.ask()

    assert answer["code"] == code, answer
    assert "/opt" not in answer["error"]
    assert len(shared.generations()) == before + 1  # never asked for twice
    assert_unharmed(shared)


def test_a_job_may_allow_a_black_image(shared: World) -> None:
    shared.webui.fail_next = [WebUIFault.BLACK]

    answer = shared.ask(allow_blank=True)

    assert len(answer["images"]) == 1


def test_a_bare_404_is_waited_out(shared: World) -> None:
    shared.webui.fail_next = [WebUIFault.NOT_FOUND, WebUIFault.NOT_FOUND]

    answer = shared.ask()

    assert "error" not in answer


def test_a_bare_404_that_stays_ends_the_job_after_three_tries(shared: World) -> None:
    before = len(shared.generations())
    shared.webui.fail_next = [WebUIFault.NOT_FOUND] * 3

    answer = shared.ask()

    assert (answer["code"], answer["refresh_worker"]) == ("WEBUI_NOT_READY", True)
    assert len(shared.generations()) == before + 3
    assert_unharmed(shared)


def test_a_lora_that_was_not_applied_ends_the_job(fresh: World) -> None:
    (lora,) = fresh.ask(loras=[{"version_id": DETAIL}])["worker"]["loras"]
    link = fresh.webui_models / "Lora" / f"{lora['tag']}.safetensors"
    link.resolve().write_bytes(link.resolve().read_bytes()[:-1] + b"?")  # other bytes behind the name

    fresh.webui.restart(forget_hashes=True)
    answer = fresh.ask(loras=[{"version_id": DETAIL}])

    assert answer["code"] == "LORA_NOT_APPLIED"
    assert "Detail Tweaker XL" in answer["error"]


def test_a_webui_that_dies_during_a_job_costs_that_job_alone(fresh: World) -> None:
    fresh.webui.step_seconds = 0.05
    started = threading.Event()
    watch_for(fresh, "/sdapi/v1/progress", started)

    def crash() -> None:
        started.wait(10)
        fresh.webui.crash()

    crashing = threading.Thread(target=crash)
    crashing.start()
    answer = fresh.ask(steps=100)
    crashing.join()
    fresh.webui.restart()
    fresh.webui.step_seconds = 0.0

    assert (answer["code"], answer["retryable"]) == ("WEBUI_LOST", True)
    assert_unharmed(fresh)


def test_a_webui_that_is_gone_is_not_ready(fresh: World) -> None:
    fresh.webui.crash()

    answer = fresh.ask()

    assert (answer["code"], answer["refresh_worker"]) == ("WEBUI_NOT_READY", True)
    assert "make demo" in answer["hint"]


def test_the_next_job_prepares_a_restarted_webui_again(fresh: World) -> None:
    fresh.ask()
    fresh.webui.restart()

    answer = fresh.ask()

    # The fresh WebUI loads its only checkpoint by itself. That is verified from the answer.
    assert "error" not in answer


# -- time and cancellation --------------------------------------------------------------------------------------------


def watch_for(it: World, path: str, event: threading.Event) -> None:
    """Set the event when the WebUI is asked for `path`, from now on."""

    def watching(exchange: Exchange) -> bool:
        if exchange.asked.path == path:
            event.set()
        return False

    it.webui.before.append(watching)


def cancel_when(it: World, event: threading.Event, **given: Any) -> None:
    """Run a job and cancel it, as the SDK does, when the event is set; returns when the job's task has ended."""

    async def scene() -> None:
        job = {"id": "job-1", "input": {"prompt": "a lighthouse", **SMALL, **given}}
        running = asyncio.ensure_future(it.worker.handle(job))
        await asyncio.to_thread(event.wait, 20)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    it.loop.run_until_complete(asyncio.wait_for(scene(), timeout=30))


def test_a_cancelled_generation_is_interrupted_and_its_answer_awaited(fresh: World) -> None:
    fresh.webui.step_seconds = 0.05
    generating = threading.Event()
    watch_for(fresh, "/sdapi/v1/progress", generating)

    cancel_when(fresh, generating, steps=150)
    paths = [asked.path for asked in fresh.webui.asked]
    fresh.webui.step_seconds = 0.0

    assert "/sdapi/v1/interrupt" in paths
    assert WebUI(fresh.webui.url).progress().images == 0  # nothing of it runs on
    assert_unharmed(fresh)


def test_a_cancelled_download_stops_and_generates_nothing(fresh: World) -> None:
    downloading = threading.Event()
    fresh.civitai.storage.fail(c.ServerFault(rate=1000.0), times=None)

    def watching(exchange: Exchange) -> bool:
        downloading.set()
        return False

    fresh.civitai.storage.before.append(watching)

    cancel_when(fresh, downloading, loras=[{"version_id": HAND}])

    assert fresh.generations() == []
    fresh.civitai.storage.heal()
    assert "error" not in fresh.ask(loras=[{"version_id": HAND}])


def test_a_job_whose_time_is_up_is_interrupted_and_times_out(tmp_path: Path) -> None:
    with world(tmp_path, JOB_TIMEOUT="0.5") as it:
        it.webui.step_seconds = 0.05

        answer = it.ask(steps=150)
        it.webui.step_seconds = 0.0

        assert (answer["code"], answer["retryable"]) == ("JOB_TIMEOUT", True)
        assert_unharmed(it)


def test_a_webui_that_hangs_even_when_interrupted_is_lost(tmp_path: Path) -> None:
    with world(tmp_path, GENERATION_TIMEOUT="0.3") as it:
        it.webui.fail_next = [WebUIFault.HANG]

        answer = it.ask()
        it.webui.release()

    assert (answer["code"], answer["refresh_worker"]) == ("WEBUI_LOST", True)


# -- the platform -----------------------------------------------------------------------------------------------------


def test_a_result_the_platform_would_drop_is_an_error(tmp_path: Path) -> None:
    with world(tmp_path) as it:
        it.webui.image_bytes = 8_000_000

        run, runsync = it.ask("job-1"), it.ask("sync-1")

    assert run["code"] == "RESULT_TOO_LARGE"
    assert "/runsync" in run["hint"]
    assert "error" not in runsync


def test_the_job_itself_is_never_changed(shared: World) -> None:
    job = {"id": "job-1", "input": {"prompt": "a lighthouse", **SMALL, "loras": [{"version_id": DETAIL}]}}
    before = json.dumps(job)

    shared.run(job)

    assert json.dumps(job) == before


# -- boot -------------------------------------------------------------------------------------------------------------


def test_a_second_boot_downloads_nothing(tmp_path: Path) -> None:
    with world(tmp_path) as it:
        it.worker.close()

        it.boot()

        assert it.civitai.resolves[CHECKPOINT] == 1


def test_without_a_webui_nothing_is_downloaded(tmp_path: Path) -> None:
    with world(tmp_path, boot=False) as it:
        it.webui.crash()
        config = it.config()
        it.worker = Worker(config, models=quick_manager(config), timings=QUICK)

        with pytest.raises(WebUINotReady, match="nothing is starting one"):
            it.worker.boot()

        assert it.civitai.asked == []


def test_the_checkpoint_is_downloaded_while_the_webui_starts(tmp_path: Path) -> None:
    state = tmp_path / "webui.state"
    state.write_text(str(os.getpid()))  # start.sh is starting it
    with world(tmp_path, boot=False, WEBUI_STATE_FILE=str(state)) as it:
        it.webui.not_mounted_for = 10**9
        requested = threading.Event()

        def serving(exchange: Exchange) -> bool:
            it.webui.not_mounted_for = 0  # the WebUI is up only when the file is asked for
            requested.set()
            return False

        it.civitai.storage.before.append(serving)
        it.boot()

        assert requested.is_set()


def test_a_webui_that_start_sh_has_given_up_ends_the_boot(tmp_path: Path) -> None:
    state = tmp_path / "webui.state"
    state.write_text("failed: no GPU found\n")
    with world(tmp_path, boot=False, WEBUI_STATE_FILE=str(state)) as it:
        it.webui.crash()
        config = it.config()
        it.worker = Worker(config, models=quick_manager(config), timings=QUICK)

        with pytest.raises(WebUINotReady, match="the WebUI could not be started: no GPU found"):
            it.worker.boot()


def test_a_webui_whose_checkpoint_cannot_be_verified_ends_the_boot(tmp_path: Path) -> None:
    with world(tmp_path, boot=False) as it:
        it.webui.misshapen_models = {"jib_mix_illustrious_realistic_v2"}

        with pytest.raises(CheckpointNotLoaded):
            it.boot()


def test_a_broken_worker_answers_each_job_with_the_reason(tmp_path: Path) -> None:
    with world(tmp_path) as it:
        it.worker.broken = WebUINotReady("it did not start", hint="look at its log")

        answer = it.ask()

    assert (answer["code"], answer["refresh_worker"]) == ("WEBUI_NOT_READY", True)


def test_a_local_run_without_a_webui_ends_with_a_hint(tmp_path: Path) -> None:
    environ = {
        "PATH": os.environ["PATH"],
        "WEBUI_URL": "http://127.0.0.1:9",
        "WEBUI_READY_TIMEOUT": "0.2",
        "MODELS_DIR": str(tmp_path / "models"),
        "WEBUI_MODELS_DIR": str(tmp_path / "webui"),
    }

    done = subprocess.run(
        [sys.executable, "handler.py", "--test_input", '{"input": {"prompt": "a lighthouse"}}'],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 1
    assert "WEBUI_NOT_READY" in done.stderr
    for word in ("make demo", "WEBUI_URL", "start.sh"):
        assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "models").rglob("*.safetensors"))


def start_handler(*arguments: str, folder: Path = ROOT, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run `python handler.py` until it ends. `-X importtime` names every module that it imports, on stderr."""
    return subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "handler.py", *arguments],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "WEBUI_URL": "http://127.0.0.1:9", **settings},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def printed_by(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines on stderr. The SDK was not imported for them."""
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert "handler" in imported or "a1111_worker" in imported
    assert "runpod" not in imported
    return [line for line in lines if not line.startswith("import time:")]


def test_help_is_printed_at_once() -> None:
    done = start_handler("--help", MAX_STEPS="many")

    assert done.returncode == 0
    assert printed_by(done) == []
    for words in ("usage: python handler.py", "--test_input", "--rp_api_port", '{"input": {"prompt": '):
        assert words in done.stdout


@pytest.mark.parametrize("given", ["{'input': {}}", "[]", '{"prompt": "a lighthouse"}'])
def test_a_bad_test_input_ends_the_start_at_once_with_one_line(given: str) -> None:
    done = start_handler("--test_input", given)

    (line,) = printed_by(done)
    assert done.returncode == 2
    assert line.startswith("handler.py: --test_input is ")


def test_a_local_run_without_a_job_ends_at_once_with_one_line(tmp_path: Path) -> None:
    done = start_handler(folder=tmp_path)

    (line,) = printed_by(done)
    assert done.returncode == 2
    assert line.startswith("handler.py: there is no test_input.json here")


def test_a_taken_port_ends_the_start_at_once_with_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = start_handler("--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port", str(port))

    (line,) = printed_by(done)
    assert done.returncode == 2
    assert line.startswith(f"handler.py: port {port} of 127.0.0.1 is taken")
    assert "--rp_api_port" in line


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_during_the_boot_ends_it_with_one_line(tmp_path: Path, number: signal.Signals, name: str) -> None:
    with world(tmp_path, boot=False) as it:
        downloading = threading.Event()

        def watching(exchange: Exchange) -> bool:
            downloading.set()
            return False

        it.civitai.storage.before.append(watching)
        it.civitai.storage.fail(c.ServerFault(rate=1000.0), times=None)  # an hour for the checkpoint
        process = subprocess.Popen(
            [sys.executable, "handler.py"],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], **it.environ()},
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert downloading.wait(30)
            process.send_signal(number)
            _, printed = process.communicate(timeout=30)
        finally:
            process.kill()

    assert process.returncode == 128 + number
    assert printed.splitlines()[-1] == f"handler.py: stopped by {name} before the worker was ready"
    assert "Traceback" not in printed and "WARNING" not in printed and "ERROR" not in printed
    assert not [path for path in it.models_dir.rglob(".leases/*") if path.is_file()]  # no other worker waits for it


def test_a_variable_that_looks_like_a_setting_is_named_in_the_log(tmp_path: Path) -> None:
    done = start_handler(folder=tmp_path, MAX_STEP="hush", WEBUI_XYZZY_PLUGH="hush")

    first, second, _ = (line.partition("WARNING")[2].strip() for line in printed_by(done))
    assert first == "MAX_STEP is set, but no setting has that name; did you mean MAX_STEPS?"
    assert second == "WEBUI_XYZZY_PLUGH is set, but no setting has that name"
    assert "hush" not in done.stderr + done.stdout


# the settings, and how the one line begins
BAD_SETTINGS = [
    ({"MAX_STEPS": "many"}, "MAX_STEPS='many': takes a whole number from 1 to 10000"),
    ({"CHECKPOINT_URL": "https://elsewhere.example/x", "CHECKPOINT_FILE": "x.safetensors"}, "CHECKPOINT_URL: "),
]


@pytest.mark.parametrize(("settings", "begins"), BAD_SETTINGS)
def test_a_bad_setting_ends_the_start_with_one_line(tmp_path: Path, settings: dict[str, str], begins: str) -> None:
    folders = {"MODELS_DIR": str(tmp_path / "models"), "WEBUI_MODELS_DIR": str(tmp_path / "webui")}

    done = subprocess.run(
        [sys.executable, "handler.py"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **folders, **settings},
        capture_output=True,
        text=True,
        check=False,
    )

    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith(begins)

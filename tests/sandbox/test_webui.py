"""The sandbox's WebUI, compared with recorded answers of A1111 1.9.3 and 1.10.1 and with its known behaviour."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

from sandbox import models
from sandbox.webui import CannedAnswer, SandboxWebUI, WebUIFault
from tests.sandbox.webui_client import (
    TINY,
    assert_same_shape,
    get,
    image,
    pixels,
    post,
    sampling,
    started,
    switch,
    txt2img,
    typed,
    without_variable_parts,
)
from tests.support import DATA, ROOT, wait_until

A, B = "deliberate_v6", "jib_mix_illustrious_realistic_v2"

# --- The recorded answers -----------------------------------------------------------------------------------------

# Recorded, but not imitated, with the reason.
NOT_IMITATED = {
    "auth_loras_unprotected": "--api-auth, which start.sh never sets",
    "auth_none": "--api-auth",
    "auth_ok": "--api-auth",
    "auth_refresh_loras_unprotected": "--api-auth",
    "auth_wrong": "--api-auth",
    "docs": "an HTML page",
    "err_infotext": "the worker refuses the field before A1111 sees it",
    "extra_single_lanczos": "its picture is cut short; test_webui_pictures.py has others like it",
    "extra_single_unknown_upscaler": "its picture is cut short; test_webui_pictures.py has others like it",
    "img2img_basic": "its picture is cut short; test_webui_pictures.py has others like it",
    "img2img_include_init": "its picture is cut short; test_webui_pictures.py has others like it",
    "internal_pending_tasks": "only in UI mode; start.sh starts with --nowebui",
    "internal_progress_jobA": "only in UI mode",
    "internal_progress_jobB": "only in UI mode",
    "internal_progress_nope": "only in UI mode",
    "interrogate_clip": "the worker asks for no captions",
    "latency": "durations on one machine",
    "openapi": "the sandbox's tables of 1.9.3 and 1.10.1 are made from it",
    "png_info_dataurl": "the worker reads no pictures",
    "pictures_of_scripts": "what scripts draw: tests/request/test_scripts.py checks the worker against it",
    "png_info_of_result": "the worker reads no pictures",
}

# Recorded, and checked by a test further down, because it takes more than one request.
TESTED_BY = {
    "failed_switch_poison": "test_a_file_that_cannot_be_opened_leaves_the_old_model_misreading_prompts",
    "full_error_shapes": "test_recorded_error_shapes",
    "full_progress_running": "test_progress_starts_above_zero_and_stays_below_one",
    "override_settings_leak": "test_overridden_options_stay_set_unless_they_were_set_before",
    "permanent_breakage": "test_tensors_of_another_architecture_that_do_not_fit_break_it_for_good",
    "progress_running_skip_image": "test_progress_shows_a_preview_every_ten_steps_unless_skipped",
    "progress_running_with_image": "test_progress_shows_a_preview_every_ten_steps_unless_skipped",
    "race_options_during_niter": "test_options_posted_during_a_job_mix_two_models_under_one_name",
    "server_kill": "test_a_killed_process_answers_no_request_and_restarts_with_nothing_loaded",
    "txt2img_interrupted": "test_an_interrupted_job_is_a_success_with_fewer_images",
    "watch_gen_after_override_norestore": "test_an_override_of_the_checkpoint_switches_and_restores_only_the_option",
    "watch_gen_after_override_restore": "test_an_override_of_the_checkpoint_switches_and_restores_only_the_option",
    "watch_override_tiny_to_big_norestore": "test_an_override_of_the_checkpoint_switches_and_restores_only_the_option",
    "watch_override_tiny_to_big_restore": "test_an_override_of_the_checkpoint_switches_and_restores_only_the_option",
    "watch_switch_big_a_to_big_b_first_time_hash": "test_a_switch_shows_the_posted_name_then_the_title_then_the_hash",
    "watch_switch_big_a_to_big_b_hash_cached": "test_a_switch_shows_the_posted_name_then_the_title_then_the_hash",
    "watch_switch_big_b_to_big_a_hash_cached": "test_a_switch_shows_the_posted_name_then_the_title_then_the_hash",
    "watch_switch_big_b_to_tiny": "test_a_switch_shows_the_posted_name_then_the_title_then_the_hash",
    "watch_switch_tiny_to_big_a_first_time_hash": "test_a_switch_shows_the_posted_name_then_the_title_then_the_hash",
}

# The requests of recordings that have no body: body and content type.
RAW: dict[str, tuple[bytes | None, str | None]] = {
    "err_invalid_json": (b"{not json", "application/json"),
    "err_json_list": (b"[1]", "application/json"),
    "err_no_body": (None, None),
    "err_text_plain": (json.dumps(TINY).encode(), "text/plain"),
    "err_no_content_type": (json.dumps(TINY).encode(), None),
    "err_nan_json": (json.dumps({**TINY, "cfg_scale": float("nan")}).encode(), "application/json"),
}

# Recordings that are only a body (of 1.10.1): their paths.
PATHS = {
    "full_cmd-flags": "cmd-flags",
    "full_embeddings": "embeddings",
    "full_loras": "loras",
    "full_memory": "memory",
    "full_options": "options",
    "full_progress_idle": "progress",
    "full_samplers": "samplers",
    "full_schedulers": "schedulers",
    "full_scripts": "scripts",
    "full_sd-models": "sd-models",
    "full_upscalers": "upscalers",
    "cmd_flags": "cmd-flags",
}

# Answers with files, folders, memory or times of the machine on which they were recorded: only their shape is compared.
ONLY_SHAPE = {
    "cmd_flags",
    "full_cmd-flags",
    "full_loras",
    "full_memory",
    "full_options",
    "full_progress_idle",
    "full_sd-models",
    "loras",
    "memory",
    "options_get",
    "progress_after_corrupt",
    "progress_after_idle_interrupt",
    "progress_idle",
    "progress_idle_skip",
    "sd_models",
    "sd_vae",
}


def recorded(version: str) -> list[Any]:
    """The recordings that are replayed. `test_every_recording…` checks that the others have a reason."""
    files = sorted((DATA / f"webui-{version}").glob("*.json"))
    return [
        pytest.param(path, id=path.stem) for path in files if path.stem not in (NOT_IMITATED.keys() | TESTED_BY.keys())
    ]


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small versions of the files with which the recordings were made."""
    folder = tmp_path_factory.mktemp("models")
    checkpoints, loras = folder / "Stable-diffusion", folder / "Lora"
    models.sd15_checkpoint(checkpoints / f"{A}.safetensors", 1)
    models.sd15_checkpoint(checkpoints / f"{B}.safetensors", 2)
    models.sd15_lora(loras / "detail_tweaker.safetensors", 3, ss_output_name="detail_tweaker")
    models.sd15_lora(loras / "style_a_v3.safetensors", 4, ss_output_name="styleA")
    models.vae(folder / "VAE" / "tiny_vae.safetensors", 5)
    for name in (A, B):
        (checkpoints / f"{name}.yaml").write_text("model: {}\n")
    return folder


@pytest.fixture
def models_dir(model_files: Path, tmp_path: Path) -> Path:
    """Links to these files in a folder of the test's own, as in the worker's folder."""
    for part in ("Stable-diffusion", "Lora", "VAE"):
        (tmp_path / part).mkdir()
        for file in (model_files / part).glob("*.safetensors"):
            (tmp_path / part / file.name).symlink_to(file)
    return tmp_path


@pytest.fixture(params=["1.9.3", "1.10.1"])
def webui(request: pytest.FixtureRequest, models_dir: Path) -> Iterator[SandboxWebUI]:
    with SandboxWebUI(models_dir, version=request.param) as server:
        yield server


@pytest.mark.parametrize("path", recorded("1.9.3"))
def test_answers_as_1_9_3_was_recorded(path: Path, models_dir: Path, model_files: Path) -> None:
    compare_with_recording(path, "1.9.3", models_dir)


@pytest.mark.parametrize("path", recorded("1.10.1"))
def test_answers_as_1_10_1_was_recorded(path: Path, models_dir: Path, model_files: Path) -> None:
    compare_with_recording(path, "1.10.1", models_dir)


def test_every_recording_that_is_not_replayed_has_a_reason_or_a_test() -> None:
    names = {path.stem for folder in DATA.glob("webui-*") for path in folder.glob("*.json*")}

    assert set(NOT_IMITATED) <= names
    assert set(TESTED_BY) <= names
    assert not set(NOT_IMITATED) & set(TESTED_BY)
    assert all(test in globals() for test in TESTED_BY.values())


def compare_with_recording(path: Path, version: str, models_dir: Path) -> None:
    name = path.stem
    case = json.loads(path.read_text())
    if "request" not in case:
        body = case if name in PATHS else None
        wire = {"method": "GET", "path": f"/sdapi/v1/{PATHS.get(name, 'txt2img')}", "body": None}
        case = {"request": wire, "response": {"status": 200, "body": body or case}}
        if body is None:  # only an answer of txt2img: the request is in `parameters`
            defaults = json.loads((ROOT / "sandbox" / "data" / version / "txt2img.json").read_text())
            echoed = case["response"]["body"]["parameters"].items()
            given = {key: value for key, value in echoed if value != defaults[key]["default"]}
            case["request"] = {"method": "POST", "path": "/sdapi/v1/txt2img", "body": given}
    if "method" not in case["request"]:  # the request has only the fields of a txt2img
        fields = {**TINY, **({"steps": 4} if name.startswith("lora_") else {}), **case["request"]}
        if name == "txt2img_save_images_grid":
            fields["prompt"] = "x"
        case["request"] = {"method": "POST", "path": "/sdapi/v1/txt2img", "body": fields}
    with SandboxWebUI(models_dir, version=version) as webui:
        hashes = prepare(name, webui, models_dir, case)
        answer = send(webui, name, json.loads(with_our_hashes(json.dumps(case["request"]), hashes)))
        compare(name, case["response"], answer, case["request"]["body"])


def prepare(name: str, webui: SandboxWebUI, folder: Path, case: Any) -> dict[str, str]:
    """Bring the server into its state before the recorded request. Returns recorded hash → our hash."""
    if name.startswith("progress_idle"):
        return {}
    checkpoints = folder / "Stable-diffusion"
    if name == "full_txt2img_ok":
        models.sd15_checkpoint(checkpoints / "empty.safetensors", 9)
        webui.hashes.enabled = False
        webui.restart()
        switch(webui, "empty")
        return {}
    for stem in ("corrupt_model", "truncated_model", "truncated"):
        if stem in name or stem in json.dumps(case["request"]):
            (checkpoints / f"{stem}.safetensors").write_bytes(b"<html>not a model</html>")
    for stem in ("missingkeys", "nanmodel", "wrongshape", "late_model_v1"):
        if stem in json.dumps(case["request"]) and "norefresh" not in name:
            models.sd15_checkpoint(checkpoints / f"{stem}.safetensors", 10)
    if "actually_a_lora" in name:
        models.sd15_lora(checkpoints / "actually_a_lora.safetensors", 11)
    if "wrongshape" in name:
        webui.misshapen_models.add("wrongshape")
    post(webui, "refresh-checkpoints")
    response = json.dumps(case["response"])
    switch(webui, B)
    if name in ("options_post_null_while_jib", "err_gen_with_vae_unknown"):
        pass
    elif A in response or B not in response:
        switch(webui, A)
    if name == "options_post_deleted":
        (checkpoints / "late_model_v1.safetensors").unlink()
    if name.startswith("lora_"):
        prepare_loras(name, folder / "Lora")
        if "late" not in name:
            post(webui, "refresh-loras")
    if name == "lora_deleted":
        (folder / "Lora" / "late_lora.safetensors").unlink()
    if name == "err_nan_unet":
        models.sd15_lora(folder / "Lora" / "exploding.safetensors", 12)
        webui.nan_models.add(A)
        switch(webui, B), switch(webui, A)
    if name == "err_after_badtype_clip":
        post(webui, "options", {"CLIP_stop_at_last_layers": "two"})
    if name == "err_gen_with_vae_unknown":
        post(webui, "options", {"sd_vae": "nope.safetensors"})
    if name == "leak2_next":
        txt2img(webui, override_settings={"CLIP_stop_at_last_layers": 2, "samples_format": "jpg"})
    if name in ("progress_after_idle_interrupt", "txt2img_after_idle_interrupt"):
        txt2img(webui), post(webui, "interrupt"), post(webui, "skip")
    if name == "progress_after_corrupt":
        txt2img(webui)
    if name == "full_sd-models":
        webui.restart(forget_hashes=True)
    known = {item["model_name"]: item["sha256"] for item in get(webui, "sd-models")}
    return {
        "80f67ca777200175af62aecd2f9bcaf68060dce19de1ce913aee1fd181348335": known[B] or "",
        **dict.fromkeys(("80f67ca777", "4a4f5dcb12"), (known[B] or "")[:10]),
        **dict.fromkeys(("b9b5ea4cd3", "edd2c64bcf"), (known[A] or "")[:10]),
    }


def prepare_loras(name: str, loras: Path) -> None:
    late = {"lora_late_norefresh": "late_lora", "lora_deleted": "late_lora", "lora_exploding": "exploding"}
    if name in late:
        models.sd15_lora(loras / f"{late[name]}.safetensors", 20)
    elif name == "lora_late_alias":
        models.sd15_lora(loras / "late_file.safetensors", 21, ss_output_name="late_alias")
    elif name == "lora_special":
        models.sd15_lora(loras / "name with spaces (v1.0) & é.safetensors", 22)
    elif name == "lora_dup_alias":
        models.sd15_lora(loras / "other.safetensors", 23, ss_output_name="styleA")
    elif name == "lora_dup_name_after_refresh":
        models.sd15_lora(loras / "zz" / "detail_tweaker.safetensors", 24)
    elif name == "lora_wrong_shapes":
        models.sdxl_lora(loras / "sdxl_shapes.safetensors", 25)
    elif name == "lora_corrupt":
        (loras / "corrupt.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{broken")


def send(webui: SandboxWebUI, name: str, request: Any) -> requests.Response:
    headers = {"accept-encoding": "identity"}
    if name in RAW:
        data, kind = RAW[name]
        headers |= {"content-type": kind} if kind else {}
        return requests.post(webui.url + request["path"], data=data, headers=headers, timeout=30)
    if request["method"] == "GET":
        return requests.get(webui.url + request["path"], headers=headers, timeout=30)
    return requests.post(webui.url + request["path"], json=request["body"], headers=headers, timeout=30)


def compare(name: str, expected: Any, answer: requests.Response, sent: Any) -> None:
    assert answer.status_code == expected.get("status", 200)
    for header in ("content-type", "allow"):
        assert expected.get("headers", {}).get(header) in (answer.headers.get(header), None)
    if "headers" in expected:
        assert ("x-process-time" in expected["headers"]) == ("x-process-time" in answer.headers)
    if "body" not in expected and "info" not in expected:  # the recording is the answer itself
        expected = {"body": {key: expected[key] for key in ("images", "parameters", "info") if key in expected}}
    ours: Any = answer.json() if answer.text else ""
    if "info" in expected:  # the recording has only `info` of the answer of a txt2img
        assert without_variable_parts(json.loads(ours["info"])) == without_variable_parts(json.loads(expected["info"]))
        return
    theirs: Any = expected["body"]
    if isinstance(theirs, dict) and "info" in theirs and answer.status_code == 200:
        assert list(ours) == ["images", "parameters", "info"]
        assert [each[:5] for each in ours["images"]] == [each[:5] for each in theirs["images"]]
        if "..." in theirs["info"]:  # the recording is cut short
            assert ours["info"].startswith(theirs["info"].partition("...")[0])
            return
        assert list(ours["parameters"].items()) == list(theirs["parameters"].items())
        assert typed(ours["parameters"]) == typed(theirs["parameters"])
        ours, theirs = json.loads(ours["info"]), json.loads(theirs["info"])
        assert list(ours) == list(theirs)
        assert typed(ours) == typed(theirs)
        random_seed = (sent or TINY).get("seed", -1) == -1
        assert without_variable_parts(ours, random_seed) == without_variable_parts(theirs, random_seed)
    elif name in ONLY_SHAPE:
        assert_same_shape(ours, theirs)
    else:
        assert ours == theirs


def with_our_hashes(text: str, hashes: dict[str, str]) -> str:
    for theirs, ours in hashes.items():
        text = text.replace(theirs, ours)
    return text


# 1.10.1's list of error shapes, and a request for each (those of img2img and tokenizers are not imitated).
ERROR_SHAPES: dict[str, tuple[str, str, Any]] = {
    "route missing": ("1.10.1", "nope", {}),
    "A1111 1.9.x unknown/legacy sampler e.g. 'DPM++ 2M Karras'": (
        *("1.9.3", "txt2img"),
        {"prompt": "a cat", "sampler_name": "DPM++ 2M Karras"},
    ),
    "unknown script / alwayson script": ("1.10.1", "txt2img", {"prompt": "a cat", "script_name": "nope"}),
    "wrong type": ("1.10.1", "txt2img", {"prompt": "a cat", "steps": "many"}),
    "POST /options unknown checkpoint": ("1.10.1", "options", {"sd_model_checkpoint": "X"}),
    "POST /options known checkpoint but load FAILED (corrupt file, missing tokenizer)": (
        *("1.10.1", "options"),
        {"sd_model_checkpoint": "broken"},
    ),
}


def test_recorded_error_shapes(models_dir: Path) -> None:
    cases = {case["case"]: case for case in json.loads((DATA / "webui-1.10.1" / "full_error_shapes.json").read_text())}
    (models_dir / "Stable-diffusion" / "broken.safetensors").write_bytes(b"<html>")

    for name, (version, path, body) in ERROR_SHAPES.items():
        with SandboxWebUI(models_dir, version=version) as webui:
            answer = post(webui, path, body)

        assert (answer.status_code, answer.json()) == (cases[name]["status"], cases[name]["body"]), name


# --- Switching ----------------------------------------------------------------------------------------------------


def test_nothing_is_loaded_at_first_and_hashes_are_unknown(webui: SandboxWebUI) -> None:
    options, listed = get(webui, "options"), get(webui, "sd-models")

    assert options["sd_model_checkpoint"] is None
    assert not options["sd_checkpoint_hash"]
    assert [(item["title"], item["hash"], item["sha256"]) for item in listed] == [
        (f"{A}.safetensors", None, None),
        (f"{B}.safetensors", None, None),
    ]


def test_a_loaded_checkpoint_shows_its_title_and_its_hash(webui: SandboxWebUI, model_files: Path) -> None:
    sha256 = models.sha256_of(model_files / "Stable-diffusion" / f"{B}.safetensors")

    answer = switch(webui, B)

    options = get(webui, "options")
    assert (answer.status_code, answer.json()) == (200, None)
    assert options["sd_model_checkpoint"] == f"{B}.safetensors [{sha256[:10]}]"
    assert options["sd_checkpoint_hash"] == sha256
    assert get(webui, "sd-models")[1]["sha256"] == sha256
    assert txt2img(webui)["info"]["sd_model_hash"] == sha256[:10]


def test_the_first_job_loads_the_first_checkpoint_of_the_list(webui: SandboxWebUI) -> None:
    answer = txt2img(webui)

    assert answer["info"]["sd_model_name"] == A


def test_the_initial_checkpoint_is_loaded_at_the_start(models_dir: Path) -> None:
    with SandboxWebUI(models_dir, initial_checkpoint=B) as webui:
        wait_until(lambda: get(webui, "options")["sd_checkpoint_hash"], "the initial checkpoint")

        assert get(webui, "options")["sd_model_checkpoint"].startswith(B)


def test_it_starts_without_a_checkpoint_and_generates_after_one_is_added(tmp_path: Path) -> None:
    with SandboxWebUI(tmp_path) as webui:
        refused, unload = post(webui, "txt2img", TINY), post(webui, "unload-checkpoint")
        models.sd15_checkpoint(tmp_path / "Stable-diffusion" / "new.safetensors")
        post(webui, "refresh-checkpoints")

        assert refused.status_code == 500
        assert refused.json()["error"] == "FileNotFoundError"
        assert refused.json()["errors"].startswith("No checkpoints found. ")
        assert (unload.status_code, unload.json()["error"]) == (500, "AttributeError")
        assert txt2img(webui)["info"]["sd_model_name"] == "new"


def test_a_switch_shows_the_posted_name_then_the_title_then_the_hash(models_dir: Path) -> None:
    with SandboxWebUI(models_dir, switch_seconds=0.4, hash_seconds=0.2) as webui:
        switch(webui, A)

        first = watched_switch(webui, B)
        switch(webui, A)
        again = watched_switch(webui, B)

        a, b = (item["sha256"] for item in get(webui, "sd-models"))
        old, new = f"{A}.safetensors [{a[:10]}]", f"{B}.safetensors [{b[:10]}]"
        order = [(old, a), (B, a), (new, a), (new, b)]
        assert [state for state in order if state in first] == first  # in this order, and nothing else
        assert {(B, a), (new, a), (new, b)} <= set(first)
        assert [state for state in order if state in again] == again
        assert {(new, a), (new, b)} <= set(again)


def watched_switch(webui: SandboxWebUI, name: str) -> list[tuple[str, str]]:
    """The states that /options shows during a switch. /progress shows nothing."""
    seen: list[tuple[str, str]] = []
    thread = threading.Thread(target=switch, args=(webui, name))
    thread.start()
    while True:
        last = not thread.is_alive()
        options, progress = get(webui, "options"), get(webui, "progress")
        state = options["sd_model_checkpoint"], options["sd_checkpoint_hash"]
        seen += [state] if state not in seen[-1:] else []
        assert (progress["progress"], progress["state"]["job"], progress["state"]["job_count"]) == (0, "", 0)
        if last:
            return seen


def test_another_name_of_the_loaded_model_is_kept_as_posted(webui: SandboxWebUI) -> None:
    switch(webui, B)

    switch(webui, B)

    assert get(webui, "options")["sd_model_checkpoint"] == B


def test_names_with_a_hash_are_accepted_after_the_hash_is_known(webui: SandboxWebUI, model_files: Path) -> None:
    sha256 = models.sha256_of(model_files / "Stable-diffusion" / f"{B}.safetensors")
    forms = [sha256, sha256[:10], f"{B}.safetensors [{sha256[:10]}]", f"{B} [{sha256[:10]}]"]

    before = [switch(webui, form).status_code for form in forms]
    switch(webui, B)
    after = [(switch(webui, A).status_code, switch(webui, form).status_code) for form in forms]

    assert before == [500] * 4
    assert after == [(200, 200)] * 4


def test_a_switch_waits_for_the_job_but_shows_its_name_at_once(models_dir: Path) -> None:
    with SandboxWebUI(models_dir, step_seconds=0.01) as webui:
        switch(webui, A)
        job = sampling(webui, steps=5000)
        thread = threading.Thread(target=switch, args=(webui, B))
        thread.start()

        wait_until(lambda: get(webui, "options")["sd_model_checkpoint"] == B, "the new name in /options")

        assert thread.is_alive()
        assert get(webui, "progress")["state"]["job"] == "scripts_txt2img"
        post(webui, "interrupt")
        assert job()["info"]["sd_model_name"] == A
        thread.join()
        assert txt2img(webui)["info"]["sd_model_name"] == B


def test_options_posted_during_a_job_mix_two_models_under_one_name(models_dir: Path) -> None:
    with SandboxWebUI(models_dir) as webui:
        switch(webui, A)
        pure = [pixels(each) for each in txt2img(webui, steps=40, n_iter=2)["images"]]
        webui.step_seconds = 0.01
        job = sampling(webui, steps=40, n_iter=2)
        switch(webui, B)

        mixed = job()

        raced = [pixels(each) for each in mixed["images"]]
        assert raced[0] == pure[0]
        assert raced[1] != pure[1]
        assert mixed["info"]["sd_model_name"] == A
        assert all(f"Model: {A}," in text for text in mixed["info"]["infotexts"])


def test_a_new_checkpoint_needs_a_refresh(webui: SandboxWebUI, models_dir: Path) -> None:
    models.sd15_checkpoint(models_dir / "Stable-diffusion" / "later.safetensors", 7)

    before = switch(webui, "later").status_code
    post(webui, "refresh-checkpoints")
    after = switch(webui, "later").status_code

    assert (before, after) == (500, 200)


def test_without_hashing_no_checkpoint_can_be_verified(models_dir: Path) -> None:
    with SandboxWebUI(models_dir, no_hashing=True) as webui:
        models.sd15_lora(models_dir / "Lora" / "hashed.safetensors", 8, hashed=True)
        switch(webui, B)

        info = txt2img(webui, prompt="a cat <lora:hashed:1> <lora:detail_tweaker:1>")["info"]

        assert get(webui, "options")["sd_model_checkpoint"] == f"{B}.safetensors"
        assert get(webui, "options")["sd_checkpoint_hash"] is None
        assert info["sd_model_hash"] is None
        assert "Model hash" not in info["infotexts"][0]
        assert re.fullmatch("hashed: [0-9a-f]{12}", info["extra_generation_params"]["Lora hashes"])


# --- Switches that fail -------------------------------------------------------------------------------------------


def break_file(folder: Path, how: str) -> str:
    path = folder / "Stable-diffusion" / f"{how}.safetensors"
    models.sd15_checkpoint(path, 30)
    if how == "truncated":
        os.truncate(path, 5000)
    elif how == "html":
        path.write_bytes(b"<!DOCTYPE html><html><body>Sign in</body></html>")
    return how


@pytest.mark.parametrize("how", ["truncated", "html", "deleted"])
def test_a_file_that_cannot_be_opened_leaves_the_old_model_misreading_prompts(
    how: str, webui: SandboxWebUI, models_dir: Path
) -> None:
    break_file(models_dir, how)
    post(webui, "refresh-checkpoints")
    switch(webui, A)
    if how == "deleted":
        (models_dir / "Stable-diffusion" / "deleted.safetensors").unlink()
    prompts = {"plain": "a cat", "emphasis": "a (cat:1.6)", "brackets": "a [cat]", "long": "cat, " * 60}
    right = {kind: image(webui, prompt=prompt) for kind, prompt in prompts.items()}
    title = get(webui, "options")["sd_model_checkpoint"]

    answer = switch(webui, how)

    wrong = {kind for kind, prompt in prompts.items() if image(webui, prompt=prompt) != right[kind]}
    assert (answer.status_code, answer.json()) == (200, None)
    assert get(webui, "options")["sd_model_checkpoint"] == title
    assert wrong == {"emphasis", "brackets", "long"}
    switch(webui, A), post(webui, "reload-checkpoint")
    assert image(webui, prompt=prompts["emphasis"]) != right["emphasis"]
    switch(webui, B), switch(webui, A)
    assert image(webui, prompt=prompts["emphasis"]) == right["emphasis"]


def test_two_loads_in_a_row_with_tensors_that_do_not_fit_break_it(webui: SandboxWebUI, models_dir: Path) -> None:
    tensors = {**models.SD15_CHECKPOINT, "model.diffusion_model.input_blocks.0.0.weight": ("F16", (64, 4, 3, 3))}
    models.write_safetensors(models_dir / "Stable-diffusion" / "misfit.safetensors", tensors)
    post(webui, "refresh-checkpoints")
    switch(webui, A)
    before = image(webui, prompt="a (cat:1.6)"), get(webui, "options")

    first = switch(webui, "misfit")
    after = image(webui, prompt="a (cat:1.6)"), get(webui, "options")
    second = switch(webui, "misfit")

    assert (first.status_code, second.status_code) == (200, 200)
    assert after == before
    assert post(webui, "txt2img", TINY).status_code == 500


def test_tensors_of_another_architecture_that_do_not_fit_break_it_for_good(
    webui: SandboxWebUI, models_dir: Path
) -> None:
    tensors = {**models.SDXL_CHECKPOINT, "conditioner.embedders.1.model.ln_final.weight": ("F16", (64,))}
    models.write_safetensors(models_dir / "Stable-diffusion" / "misfit.safetensors", tensors)
    post(webui, "refresh-checkpoints")
    switch(webui, A)
    before = get(webui, "options")

    answers = [switch(webui, name).status_code for name in ("misfit", B, A)]

    broken = {"error": "AttributeError", "errors": "'NoneType' object has no attribute 'lowvram'"}
    assert answers == [200, 200, 200]
    assert get(webui, "options") == before
    for path in ("txt2img", "unload-checkpoint", "reload-checkpoint"):
        failed = post(webui, path, TINY)
        assert (failed.status_code, {**failed.json(), **broken}) == (500, failed.json())
    assert post(webui, "refresh-checkpoints").status_code == 200
    assert get(webui, "progress")["progress"] == 0
    webui.restart()
    assert txt2img(webui)["info"]["sd_model_name"] == A


def test_a_lora_in_the_checkpoint_folder_generates_with_the_old_weights_under_its_own_name(
    webui: SandboxWebUI, models_dir: Path
) -> None:
    models.sd15_lora(models_dir / "Stable-diffusion" / "a_lora.safetensors", 31)
    post(webui, "refresh-checkpoints")
    switch(webui, A)
    before = image(webui)

    switch(webui, "a_lora")

    answer = txt2img(webui)
    assert get(webui, "options")["sd_model_checkpoint"].startswith("a_lora")
    assert answer["info"]["sd_model_name"] == "a_lora"
    assert pixels(answer["images"][0]) == before


def test_a_lora_loaded_over_another_architecture_gives_nan(webui: SandboxWebUI, models_dir: Path) -> None:
    models.sdxl_checkpoint(models_dir / "Stable-diffusion" / "xl.safetensors", 32)
    models.sd15_lora(models_dir / "Stable-diffusion" / "a_lora.safetensors", 31)
    post(webui, "refresh-checkpoints")
    switch(webui, "xl"), switch(webui, "a_lora")

    checked = post(webui, "txt2img", TINY)
    webui.nan_check = False
    unchecked = txt2img(webui)

    assert checked.json()["error"] == "NansException"
    picture = Image.open(io.BytesIO(base64.b64decode(unchecked["images"][0])))
    assert picture.getextrema() == ((0, 0), (0, 0), (0, 0))


# --- Overrides and options ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("restore", [True, False])
def test_an_override_of_the_checkpoint_switches_and_restores_only_the_option(
    restore: bool, webui: SandboxWebUI
) -> None:
    switch(webui, A)
    webui.switch_seconds = 1.5
    override: dict[str, Any] = {
        "override_settings": {"sd_model_checkpoint": B},
        "override_settings_restore_afterwards": restore,
    }

    job = started(webui, **override)
    loading = get(webui, "progress")
    webui.switch_seconds = 0.0
    info = job()["info"]

    options, expected = get(webui, "options"), A if restore else B
    assert (loading["progress"], loading["state"]["job"], loading["state"]["job_count"]) == (
        0.01,
        "scripts_txt2img",
        -1,
    )
    assert info["sd_model_name"] == B
    assert options["sd_model_checkpoint"].startswith(expected)
    assert options["sd_checkpoint_hash"].startswith(info["sd_model_hash"])
    assert txt2img(webui)["info"]["sd_model_name"] == expected


def test_an_override_with_a_file_that_cannot_be_opened_is_a_500(webui: SandboxWebUI, models_dir: Path) -> None:
    break_file(models_dir, "html")
    post(webui, "refresh-checkpoints")

    answer = post(webui, "txt2img", {**TINY, "override_settings": {"sd_model_checkpoint": "html"}})

    assert (answer.status_code, answer.json()["error"]) == (500, "SafetensorError")


def test_overridden_options_stay_set_unless_they_were_set_before(webui: SandboxWebUI) -> None:
    overrides = {"CLIP_stop_at_last_layers": 2, "sd_vae": "tiny_vae.safetensors", "samples_format": "jpg"}
    recorded = json.loads((DATA / "webui-1.9.3" / "override_settings_leak.json").read_text())

    txt2img(webui, override_settings=overrides)
    leaked = txt2img(webui)
    options = get(webui, "options")
    post(webui, "options", {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic", "samples_format": "png"})
    txt2img(webui, override_settings=overrides)
    clean = txt2img(webui)

    tail = re.sub(r"(?<=VAE hash: )\w+", "H", recorded["next_request_infotext_tail"]).replace("1.9.3", webui.version)
    assert {key: options[key] for key in overrides} == recorded["options_after"]
    assert re.sub(r"(?<=VAE hash: )\w+", "H", leaked["info"]["infotexts"][0]).endswith(tail)
    assert leaked["images"][0].startswith("/9j/")
    assert clean["images"][0].startswith("iVBOR")
    assert clean["info"]["clip_skip"] == 1
    assert clean["info"]["sd_vae_name"] is None


def test_a_vae_set_before_anything_is_loaded_loads_the_first_checkpoint(webui: SandboxWebUI) -> None:
    post(webui, "options", {"sd_vae": "Automatic"})

    assert get(webui, "options")["sd_model_checkpoint"].startswith(A)


def test_an_option_of_the_wrong_type_is_accepted_and_breaks_every_job_until_it_is_corrected(
    webui: SandboxWebUI,
) -> None:
    accepted = post(webui, "options", {"CLIP_stop_at_last_layers": "two"}).status_code
    broken = [post(webui, "txt2img", TINY).json()["error"] for _ in range(2)]
    post(webui, "options", {"CLIP_stop_at_last_layers": 1})

    assert (accepted, broken) == (200, ["TypeError", "TypeError"])
    assert txt2img(webui)["info"]["clip_skip"] == 1


# --- Samplers -----------------------------------------------------------------------------------------------------

# 1.9.3 accepts only exact names; 1.10.1 never refuses: (sampler and scheduler of the request, those that it uses).
SAMPLERS_OF_1_10_1 = [
    (("DPM++ 2M Karras", None), ("DPM++ 2M", "Karras")),
    (("Euler a", None), ("Euler a", None)),
    (("Euler", "Karras"), ("Euler", "Karras")),
    # it looks for "Uniform" first, and "Euler SGM" is no sampler
    (("Euler SGM Uniform", None), ("DPM++ 2M", "Uniform")),
    # a scheduler in its own field takes precedence
    (("DPM++ 2M Karras", "Exponential"), ("DPM++ 2M", "Exponential")),
    # another sampler, without an error
    (("euler a", None), ("DPM++ 2M", "Karras")),
    (("k_euler_a", None), ("DPM++ 2M", "Karras")),
    (("Nope", None), ("DPM++ 2M", "Karras")),
    # samplers without sigmas have no schedule
    (("DDIM", "Karras"), ("DDIM", None)),
]


@pytest.mark.parametrize(("requested", "used"), SAMPLERS_OF_1_10_1)
def test_1_10_1_uses_what_it_understands_of_a_sampler_name(
    requested: tuple[str, str | None], used: tuple[str, str | None], models_dir: Path
) -> None:
    with SandboxWebUI(models_dir) as webui:
        info = txt2img(webui, sampler_name=requested[0], scheduler=requested[1])["info"]

        assert (info["sampler_name"], info["extra_generation_params"].get("Schedule type")) == used


# --- LoRAs --------------------------------------------------------------------------------------------------------

# (tag, whether it is applied). The folder has detail_tweaker, style_a_v3 with the alias styleA, and sub/nested.
TAGS = [
    ("<lora:detail_tweaker:1>", True),
    ("<lora:detail_tweaker>", True),
    ("<lora:styleA:0.5>", True),
    ("<lora:style_a_v3:0.5:0.7>", True),
    ("<lora:style_a_v3:te=0.5:unet=1>", True),
    ("<lyco:detail_tweaker:1>", True),
    ("<lora:nested:1>", True),
    ("<LORA:detail_tweaker:1>", False),
    ("<lora:Detail_Tweaker:1>", False),
    ("<lora: detail_tweaker:1>", False),
    ("<lora:detail_tweaker.safetensors:1>", False),
    ("<lora:sub/nested:1>", False),
    ("<lora:detail_tweaker:abc>", False),
    ("<lora:detail_tweaker:>", False),
    ("<lora:unknown:1>", False),
    # a comment is cut off before tags are read
    ("# <lora:detail_tweaker:1>", False),
]


@pytest.mark.parametrize(("tag", "applied"), TAGS)
def test_only_correct_lora_tags_are_applied(tag: str, applied: bool, webui: SandboxWebUI, models_dir: Path) -> None:
    models.sd15_lora(models_dir / "Lora" / "sub" / "nested.safetensors", 40)
    switch(webui, A)
    plain = image(webui)

    answer = txt2img(webui, prompt=f"a cat {tag}")

    assert ("Lora hashes" in answer["info"]["extra_generation_params"]) is applied
    assert (pixels(answer["images"][0]) != plain) is applied


def test_a_lora_hash_is_that_of_the_tensors_or_the_one_in_the_file(webui: SandboxWebUI, models_dir: Path) -> None:
    named = models.sd15_lora(models_dir / "Lora" / "named.safetensors", 41, sshs_model_hash="ab" * 32)
    plain = models.tensor_hash(models_dir / "Lora" / "style_a_v3.safetensors")

    info = txt2img(webui, prompt="a cat <lora:styleA:1> <lora:named:2>")["info"]

    listed = f"styleA: {plain[:12]}, named: abababababab"
    assert named.exists()
    assert info["extra_generation_params"]["Lora hashes"] == listed
    assert f'Lora hashes: "{listed}"' in info["infotexts"][0]
    assert info["prompt"] == "a cat <lora:styleA:1> <lora:named:2>"


def test_a_lora_of_another_architecture_is_listed_and_has_no_effect(webui: SandboxWebUI, models_dir: Path) -> None:
    models.sdxl_lora(models_dir / "Lora" / "xl.safetensors", 42)

    plain, answer = image(webui), txt2img(webui, prompt="a cat<lora:xl:1>")

    assert "xl: " in answer["info"]["extra_generation_params"]["Lora hashes"]
    assert pixels(answer["images"][0]) == plain


def test_one_weight_that_is_not_a_number_disables_all_loras(webui: SandboxWebUI) -> None:
    info = txt2img(webui, prompt="a cat <lora:styleA:1> <lora:detail_tweaker:abc>")["info"]

    assert info["extra_generation_params"].keys().isdisjoint({"Lora hashes"})


def test_loras_of_a_negative_prompt_are_not_read(webui: SandboxWebUI) -> None:
    info = txt2img(webui, negative_prompt="<lora:styleA:1>")["info"]

    assert "Lora hashes" not in info["extra_generation_params"]


def test_loras_of_a_style_are_read(webui: SandboxWebUI) -> None:
    webui.styles = [{"name": "mine", "prompt": "{prompt}, oil <lora:styleA:1>", "negative_prompt": "blur"}]

    info = txt2img(webui, styles=["mine"])["info"]

    assert get(webui, "prompt-styles") == webui.styles
    assert info["prompt"] == "a cat, oil <lora:styleA:1>"
    assert info["negative_prompt"] == "blur"
    assert "styleA" in info["extra_generation_params"]["Lora hashes"]


def test_1_9_3_drops_the_loras_of_the_first_pass_if_the_hires_prompt_has_others(webui: SandboxWebUI) -> None:
    hires = {"enable_hr": True, "denoising_strength": 0.5, "hr_upscaler": "Latent"}

    answer = txt2img(webui, prompt="a <lora:styleA:1>", hr_prompt="a <lora:detail_tweaker:1>", **hires)

    listed = answer["info"]["extra_generation_params"]["Lora hashes"]
    assert (
        re.findall(r"(\w+):", listed) == ["detail_tweaker"]
        if webui.version == "1.9.3"
        else ["styleA", "detail_tweaker"]
    )
    assert Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))).size == (128, 128)


def test_a_new_lora_is_listed_after_a_prompt_names_it_or_after_a_refresh(webui: SandboxWebUI, models_dir: Path) -> None:
    def names() -> set[str]:
        return {lora["name"] for lora in get(webui, "loras")}

    models.sd15_lora(models_dir / "Lora" / "one.safetensors", 43)
    unseen = names()
    txt2img(webui, prompt="<lora:one:1>")
    missed = names()
    models.sd15_lora(models_dir / "Lora" / "two.safetensors", 44)
    post(webui, "refresh-loras")

    assert "one" not in unseen
    assert "one" in missed
    assert "two" in names()


# --- Progress, interrupt, concurrency -----------------------------------------------------------------------------


def test_progress_starts_above_zero_and_stays_below_one(models_dir: Path) -> None:
    lines = (DATA / "webui-1.10.1" / "full_progress_running.jsonl").read_text().splitlines()
    theirs = [json.loads(line) for line in lines]
    with SandboxWebUI(models_dir, step_seconds=0.02) as webui:
        job = started(webui, steps=3, n_iter=2)
        ours = [get(webui, "progress")]
        while ours[-1]["state"]["job"]:
            ours.append(get(webui, "progress"))
        job()

    running = [each["progress"] for each in ours if each["state"]["job"]]
    assert_same_shape(ours[0], theirs[0])
    assert running == sorted(running)
    assert running[0] >= 0.01
    assert running[-1] < 1
    for each in (*theirs, *ours):
        assert each["progress"] == pytest.approx(expected_progress(**each["state"]))
    theirs[-1]["state"]["job_timestamp"] = ours[-1]["state"]["job_timestamp"]
    assert ours[-1]["state"] | {"sampling_steps": 3} == theirs[-1]["state"]


def expected_progress(job_count: int, job_no: int, sampling_step: int, sampling_steps: int, **_: Any) -> float:
    """A1111's own arithmetic (`progressapi`)."""
    if job_count == 0:
        return 0.0
    before = job_no / job_count if job_count > 0 else 0.0
    return 0.01 + before + (sampling_step / sampling_steps / job_count if sampling_steps else 0.0)


def test_progress_shows_a_preview_every_ten_steps_unless_skipped(models_dir: Path) -> None:
    theirs = [
        json.loads((DATA / "webui-1.9.3" / f"progress_running_{how}.json").read_text())["response"]["body"]
        for how in ("with_image", "skip_image")
    ]
    with SandboxWebUI(models_dir, step_seconds=0.01) as webui:
        job = started(webui, steps=60, n_iter=2)
        before = get(webui, "progress")
        shown = wait_until(lambda: (now := get(webui, "progress"))["current_image"] and now, "a preview")
        skipped = get(webui, "progress?skip_current_image=true")
        post(webui, "interrupt")
        job()

        assert before["current_image"] is None
        assert shown["state"]["sampling_step"] >= 10
        assert_same_shape(shown, theirs[0])
        assert (skipped["current_image"], theirs[1]["current_image"]) == (None, None)
        assert Image.open(io.BytesIO(base64.b64decode(shown["current_image"]))).size == (16, 16)


def test_an_interrupted_job_is_a_success_with_fewer_images(models_dir: Path) -> None:
    theirs = json.loads((DATA / "webui-1.9.3" / "txt2img_interrupted.json").read_text())["response"]["body"]
    with SandboxWebUI(models_dir, version="1.9.3", step_seconds=0.05) as webui:
        webui.step_seconds = 0.0
        whole = image(webui, steps=60, seed=30)
        webui.step_seconds = 0.05
        job = sampling(webui, steps=60, seed=30, n_iter=3)
        post(webui, "interrupt")

        ours = job()

        info = json.loads(theirs["info"])
        assert len(ours["images"]) == len(theirs["images"]) == 1
        assert ours["info"]["all_seeds"] == info["all_seeds"]
        assert typed(ours["info"]) == typed(info)
        assert pixels(ours["images"][0]) != whole
        assert get(webui, "progress")["state"]["interrupted"] is True
        webui.step_seconds = 0.0
        assert image(webui, steps=60, seed=30) == whole
        assert get(webui, "progress")["state"]["interrupted"] is False


def test_an_interrupt_does_not_affect_a_waiting_job(models_dir: Path) -> None:
    with SandboxWebUI(models_dir, step_seconds=0.02) as webui:
        switch(webui, A)
        first = sampling(webui, steps=500)
        answers: list[Any] = []
        second = threading.Thread(target=lambda: answers.append(txt2img(webui, steps=3, n_iter=2)))
        second.start()
        wait_until(lambda: webui.process.lock.waiting, "a job that waits for the lock")

        post(webui, "interrupt")
        first()
        second.join()

        assert len(answers[0]["images"]) == 2


def test_skip_continues_with_the_next_batch(models_dir: Path) -> None:
    with SandboxWebUI(models_dir, step_seconds=0.03) as webui:
        job = sampling(webui, steps=400, n_iter=2)
        post(webui, "skip")
        wait_until(lambda: get(webui, "progress")["state"]["job"] == "Batch 2 out of 2", "the second batch")
        wait_until(lambda: get(webui, "progress")["state"]["sampling_step"], "its first step")
        post(webui, "skip")

        assert len(job()["images"]) == 2


def test_jobs_run_one_after_the_other_in_order(models_dir: Path) -> None:
    with SandboxWebUI(models_dir, step_seconds=0.01) as webui:
        done: list[int] = []

        def work(number: int) -> None:
            txt2img(webui, steps=5, seed=number)
            done.append(number)

        running = sampling(webui, steps=5000)
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        started: list[threading.Thread] = []
        for thread in threads:
            thread.start()
            started.append(thread)
            wait_until(lambda: webui.process.lock.waiting == len(started), f"{len(started)} waiting jobs")
        post(webui, "interrupt")
        running()
        for thread in threads:
            thread.join()

        assert done == [0, 1, 2, 3]


# --- Misbehaviour -------------------------------------------------------------------------------------------------


def test_the_next_jobs_fail_as_requested(webui: SandboxWebUI) -> None:
    whole = txt2img(webui)
    webui.fail_next = [
        *(
            WebUIFault.BAD_GATEWAY,
            WebUIFault.NOT_FOUND,
            WebUIFault.OUT_OF_MEMORY,
            WebUIFault.NANS,
            CannedAnswer(418, {"detail": "tea"}),
        ),
        *(WebUIFault.NO_IMAGES, WebUIFault.BLACK, WebUIFault.OTHER_CHECKPOINT),
    ]

    failed = [post(webui, "txt2img", TINY) for _ in range(5)]
    empty, black, other = (txt2img(webui) for _ in range(3))

    assert [answer.status_code for answer in failed] == [502, 404, 500, 500, 418]
    assert failed[0].headers["content-type"] == "text/html"
    assert failed[1].json() == {"detail": "Not Found"}
    assert failed[2].json()["error"] == "OutOfMemoryError"
    assert failed[2].json()["errors"].startswith("CUDA out of memory. Tried to allocate ")
    assert failed[3].json()["error"] == "NansException"
    assert empty["images"] == []
    assert pixels(black["images"][0]) == hashlib.sha256(bytes(64 * 64 * 3)).hexdigest()
    assert other["info"]["sd_model_name"] == "another_model"
    assert txt2img(webui)["images"] == whole["images"]
    assert get(webui, "progress")["progress"] == 0


def test_an_answer_can_be_reset_or_cut(webui: SandboxWebUI) -> None:
    webui.fail_next = [WebUIFault.RESET, WebUIFault.CUT]

    with pytest.raises(requests.ConnectionError):
        post(webui, "txt2img", TINY)
    with pytest.raises((requests.exceptions.ChunkedEncodingError, requests.ConnectionError)):
        post(webui, "txt2img", TINY)

    assert txt2img(webui)["images"]
    assert len([asked for asked in webui.asked if asked.path == "/sdapi/v1/txt2img"]) == 3


def test_a_hanging_job_ignores_interrupts_until_it_is_released(webui: SandboxWebUI) -> None:
    whole = txt2img(webui, n_iter=2)["images"]
    webui.fail_next = [WebUIFault.HANG]
    job = started(webui, n_iter=2)

    post(webui, "interrupt")
    hanging = get(webui, "progress")
    webui.release()

    assert hanging["progress"] == 0.01
    assert hanging["state"]["job_count"] == -1
    assert job()["images"] == whole


def test_its_routes_can_be_missing_for_a_while(webui: SandboxWebUI) -> None:
    webui.not_mounted_for = 2

    statuses = [requests.get(f"{webui.url}/sdapi/v1/samplers", timeout=5).status_code for _ in range(3)]

    assert statuses == [404, 404, 200]


def test_a_killed_process_answers_no_request_and_restarts_with_nothing_loaded(models_dir: Path) -> None:
    with SandboxWebUI(models_dir, step_seconds=10) as webui:
        url = webui.url
        switch(webui, B), post(webui, "options", {"CLIP_stop_at_last_layers": 2})
        failures: list[Exception] = []

        def ask() -> None:
            try:
                txt2img(webui)
            except requests.ConnectionError as error:
                failures.append(error)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: webui.process.lock.waiting, "a job that waits for the lock")

        with pytest.raises(requests.ConnectionError):
            post(webui, "server-kill")
        for thread in threads:
            thread.join()
        with pytest.raises(requests.ConnectionError):
            get(webui, "options")
        webui.restart()

        assert len(failures) == 2
        assert webui.url == url
        assert webui.process.model.loaded is None
        assert get(webui, "options")["CLIP_stop_at_last_layers"] == 2  # config.json remembers
        assert get(webui, "progress")["state"]["job_timestamp"] == "0"
        assert get(webui, "sd-models")[1]["sha256"]  # cache.json remembers


def test_as_a_separate_process_it_answers_the_running_job_before_it_ends(models_dir: Path) -> None:
    command = [sys.executable, "-m", "sandbox.webui", "--models-dir", str(models_dir), "--step-seconds", "0.1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        answers: list[requests.Response] = []
        body = {**TINY, "steps": 8}
        job = threading.Thread(
            target=lambda: answers.append(requests.post(f"{url}/sdapi/v1/txt2img", json=body, timeout=9))
        )
        job.start()
        wait_until(lambda: requests.get(f"{url}/sdapi/v1/progress", timeout=5).json()["progress"], "the job")

        process.send_signal(signal.SIGTERM)
        job.join()

        assert answers[0].json()["images"]
        assert process.wait() == 0


# --- HTTP ---------------------------------------------------------------------------------------------------------

# (method, path, status, Allow): HEAD and OPTIONS are refused too; a slash too many is a redirect.
ROUTER = [
    ("GET", "/", 404, None),
    ("GET", "/internal/ping", 404, None),
    ("HEAD", "/sdapi/v1/options", 405, "GET"),
    ("OPTIONS", "/sdapi/v1/txt2img", 405, "POST"),
    ("GET", "/sdapi/v1/samplers/", 307, None),
    ("GET", "/sdapi/v1/progress?skip_current_image=maybe", 422, None),
]


@pytest.mark.parametrize(("method", "path", "status", "allow"), ROUTER)
def test_the_router_answers_as_starlette_does(
    method: str, path: str, status: int, allow: str | None, webui: SandboxWebUI
) -> None:
    answer = requests.request(method, webui.url + path, allow_redirects=False, timeout=5)

    assert (answer.status_code, answer.headers.get("allow")) == (status, allow)


# How pydantic 1 reads a value: (field, value, the value in `parameters` or the message of the 422).
COERCED = [
    ("steps", "3", 3),
    ("steps", 2.9, 2),
    ("steps", True, 1),
    ("cfg_scale", 5, 5.0),
    ("prompt", 5, "5"),
    ("enable_hr", "no", False),
    ("styles", [1], ["1"]),
    ("override_settings", [], {}),
    ("steps", "2.5", "value is not a valid integer"),
    ("steps", [1], "value is not a valid integer"),
    ("cfg_scale", "much", "value is not a valid float"),
    ("prompt", {}, "str type expected"),
    ("enable_hr", "maybe", "value could not be parsed to a boolean"),
    ("styles", "mine", "value is not a valid list"),
    ("override_settings", 5, "value is not a valid dict"),
    ("send_images", None, "none is not an allowed value"),
]


@pytest.mark.parametrize(("name", "value", "expected"), COERCED)
def test_fields_are_coerced_or_refused_as_pydantic_1_does(
    name: str, value: Any, expected: Any, webui: SandboxWebUI
) -> None:
    answer = post(webui, "txt2img", {**TINY, name: value})

    if answer.status_code == 422:
        (problem,) = answer.json()["detail"]
        assert (problem["loc"], problem["msg"]) == (["body", name], expected)
    else:
        echoed = answer.json()["parameters"][name]
        assert (echoed, type(echoed)) == (expected, type(expected))


def test_large_answers_are_compressed_for_clients_that_accept_it(webui: SandboxWebUI) -> None:
    plain = requests.get(f"{webui.url}/sdapi/v1/options", headers={"accept-encoding": "identity"}, timeout=5)

    packed = requests.get(f"{webui.url}/sdapi/v1/options", timeout=5)

    assert packed.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in plain.headers
    assert packed.json() == plain.json()


# --- Pictures -----------------------------------------------------------------------------------------------------


def test_the_same_job_gives_the_same_bytes_and_another_job_another_picture(models_dir: Path) -> None:
    def bytes_of(folder: Path) -> list[str]:
        with SandboxWebUI(folder) as webui:
            switch(webui, A)
            return list(txt2img(webui, n_iter=2)["images"])

    first, second = bytes_of(models_dir), bytes_of(models_dir)

    assert first == second
    assert first[0] != first[1]


# Each of these changes the picture.
CHANGES: list[dict[str, Any]] = [
    {},
    {"prompt": "a dog"},
    {"negative_prompt": "a dog"},
    {"seed": 2},
    {"steps": 3},
    {"cfg_scale": 5},
    {"sampler_name": "Euler a"},
    {"scheduler": "Karras"},
    {"prompt": "a cat <lora:styleA:1>"},
    {"prompt": "a cat <lora:styleA:0.5>"},
    {"override_settings": {"CLIP_stop_at_last_layers": 2}},
    {"override_settings": {"sd_vae": "tiny_vae.safetensors"}},
    {"override_settings": {"sd_model_checkpoint": B}},
    {"subseed": 5, "subseed_strength": 0.5},
    {"tiling": True},
]


def test_a_picture_depends_on_every_setting_that_matters(webui: SandboxWebUI) -> None:
    post(webui, "options", {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic"})
    switch(webui, A)

    pictures = [image(webui, **fields) for fields in CHANGES]

    assert len(set(pictures)) == len(CHANGES)


def test_a_picture_has_its_infotext_and_can_be_made_large(models_dir: Path) -> None:
    with SandboxWebUI(models_dir, image_bytes=300_000) as webui:
        answer = txt2img(webui, prompt="猫 café")

    png = base64.b64decode(answer["images"][0])
    picture = Image.open(io.BytesIO(png))
    picture.load()
    assert len(png) >= 300_000
    assert picture.info["parameters"] == answer["info"]["infotexts"][0]
    assert picture.size == (64, 64)

"""What the sandbox's WebUI shows of a job while it runs and after it, against recorded looks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sandbox import models
from sandbox.webui import SandboxWebUI
from sandbox.webui_process import SharedState
from tests.sandbox.webui_client import VERSIONS, get, image, post, recordings, sampling, started, txt2img
from tests.support import DATA, wait_until


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    models.sd15_checkpoint(folder / "Stable-diffusion" / "tiny_a.safetensors")
    return folder


@pytest.mark.parametrize(("version", "path"), recordings("progress"))
def test_progress_is_computed_as_recorded(version: str, path: Path) -> None:
    case = json.loads(path.read_text())
    looks = case.get("progress_changes") or case["progress"]

    for theirs in looks:
        state = SharedState()
        state.job_count, state.job_no = theirs["state"]["job_count"], theirs["state"]["job_no"]
        state.sampling_step = theirs["state"]["sampling_step"]
        state.sampling_steps = theirs["state"]["sampling_steps"]
        state.job_timestamp, state.job = theirs["state"]["job_timestamp"], theirs["state"]["job"]
        ours = state.answer(preview=False)

        assert ours["progress"] == pytest.approx(theirs["progress"])
        assert list(ours["state"]) == list(theirs["state"])
    assert len(looks) > 3


def look(webui: SandboxWebUI) -> Any:
    return get(webui, "progress?skip_current_image=true")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_first_looks_at_a_job_show_the_steps_of_the_job_before(version: str, model_files: Path) -> None:
    theirs = json.loads((DATA / f"webui-{version}" / "progress" / "progress_4_after_20.json").read_text())
    with SandboxWebUI(model_files, version=version) as webui:
        txt2img(webui, steps=20)
        webui.encode_seconds = 60.0  # its first step never comes
        started(webui, steps=4)

        first = look(webui)

    recorded = [each["state"]["sampling_steps"] for each in theirs["progress_changes"] if each["state"]["job"]]
    assert recorded[0] == first["state"]["sampling_steps"] == 20
    assert recorded[-1] == 4
    assert (first["progress"], first["state"]["sampling_step"]) == (0.01, 0)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_adaptive_sampler_goes_past_its_steps(version: str, model_files: Path) -> None:
    theirs = json.loads((DATA / f"webui-{version}" / "progress" / "progress_4_steps_DPM_adaptive.json").read_text())
    last = max(each["state"]["sampling_step"] for each in theirs["progress_changes"])
    with SandboxWebUI(model_files, version=version, step_seconds=0.05) as webui:
        job = started(webui, steps=4, sampler_name="DPM adaptive")
        ours = wait_until(lambda: (now := look(webui))["state"]["sampling_step"] == last and now, "its last step")
        job()

    assert ours["progress"] == 1.0
    assert ours["state"]["sampling_steps"] == 4
    assert ours["eta_relative"] < 0


def test_a_second_pass_counts_as_a_job_of_its_own(model_files: Path) -> None:
    hires: dict[str, Any] = {"enable_hr": True, "denoising_strength": 0.5, "hr_upscaler": "Latent"}
    hires["hr_second_pass_steps"] = 2
    with SandboxWebUI(model_files, step_seconds=0.05, encode_seconds=1.0) as webui:
        started(webui, steps=4, **hires)
        between = wait_until(lambda: (now := look(webui))["state"]["job_no"] == 1 and now, "the second pass")
        webui.step_seconds = 60.0  # its first step never ends
        second = wait_until(lambda: (now := look(webui))["state"]["sampling_steps"] == 2 and now, "its own steps")

    assert (between["state"]["job_count"], between["state"]["sampling_step"]) == (2, 0)
    assert between["state"]["sampling_steps"] == 4  # still those of the first pass
    assert between["progress"] == pytest.approx(0.51)
    assert second["state"]["job_no"] == 1


def test_an_interrupted_picture_is_a_success_and_only_the_state_tells(model_files: Path) -> None:
    theirs = json.loads((DATA / "webui-1.10.1" / "progress" / "interrupt_one_picture.json").read_text())
    their_info = json.loads(theirs["response"]["body"]["info"])
    after = [each["state"] for each in theirs["progress"] if each["t"] > theirs["answer_at"]]
    with SandboxWebUI(model_files, step_seconds=0.05) as webui:
        webui.step_seconds = 0.0
        whole = image(webui, steps=52)
        webui.step_seconds = 0.05
        job = sampling(webui, steps=52)
        post(webui, "interrupt")
        ours = job()
        state = look(webui)["state"]
        webui.step_seconds = 0.0
        unchanged = image(webui, steps=52)
        next_state = look(webui)["state"]

    assert (after[0]["interrupted"], after[0]["job_timestamp"]) == (True, their_info["job_timestamp"])
    assert (state["interrupted"], state["job_timestamp"]) == (True, ours["info"]["job_timestamp"])
    assert [state[key] for key in ("job", "job_count")] == [after[0][key] for key in ("job", "job_count")] == ["", 0]
    assert ours["info"]["infotexts"][0].count("Steps: 52") == their_info["infotexts"][0].count("Steps: 52") == 1
    assert unchanged == whole
    assert next_state["interrupted"] is False

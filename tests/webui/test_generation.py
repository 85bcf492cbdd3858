"""What can happen to a WebUI while it generates: it costs that job, and never the next one."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from a1111_worker.webui import client
from sandbox.webui import CannedAnswer, WebUIFault
from tests.support import QUICK, wait_until, world
from tests.webui.supervised import HeldRequest, silence, supervised, when_asked

MATRIX = [False, False, "positive", "comma", 0]
LOWVRAM = CannedAnswer(
    500,
    {"error": "AttributeError", "detail": "", "body": "", "errors": "'NoneType' object has no attribute 'lowvram'"},
)


def test_a_webui_that_dies_during_a_job_costs_that_job(tmp_path: Path) -> None:
    with supervised(tmp_path) as (it, start_sh):
        it.webui.step_seconds = 0.05
        when_asked(it, "/sdapi/v1/progress", start_sh.kill)

        lost = it.ask(steps=100)
        it.webui.step_seconds = 0.0
        after = it.ask()

        assert (lost["code"], lost["retryable"], lost.get("refresh_worker")) == ("WEBUI_LOST", True, None)
        assert "error" not in after


def test_a_webui_whose_connection_breaks_is_prepared_again_for_the_next_job(tmp_path: Path) -> None:
    with supervised(tmp_path) as (it, start_sh):
        it.webui.fail_next = [WebUIFault.RESET]

        lost = it.ask()
        before = len(it.webui.asked)
        after = it.ask()

        assert lost["code"] == "WEBUI_LOST"
        assert "error" not in after
        assert "/sdapi/v1/options" in it.requests_since(before)
        assert start_sh.restarted == 0


def test_a_webui_that_hangs_in_a_job_is_killed_and_the_next_job_succeeds(tmp_path: Path) -> None:
    with supervised(tmp_path, GENERATION_TIMEOUT="0.3") as (it, start_sh):
        it.webui.fail_next = [WebUIFault.HANG]

        lost, after = it.ask(), it.ask()

        assert (lost["code"], lost["retryable"], lost.get("refresh_worker")) == ("WEBUI_LOST", True, None)
        assert "error" not in after
        assert start_sh.restarted == 1


def test_an_answer_that_stops_after_its_head_takes_no_longer_than_the_job_has(tmp_path: Path) -> None:
    with world(tmp_path, JOB_TIMEOUT="1") as it:
        it.ask()
        held = HeldRequest(it, "/sdapi/v1/txt2img", head=b'{"images": [')

        answer = it.ask()
        wait_until(lambda: not held.is_running, "the end of the request")  # nobody reads it any more
        after = it.ask()

        assert answer["code"] == "JOB_TIMEOUT"
        assert "error" not in after


def test_a_job_whose_time_is_up_leaves_a_generation_that_does_not_end_to_the_next(tmp_path: Path) -> None:
    with supervised(tmp_path, JOB_TIMEOUT="1") as (it, start_sh):
        it.worker.readiness.timings = replace(QUICK, interrupt_patience=0.05, interrupt_grace=0.5)
        it.webui.fail_next = [WebUIFault.HANG]

        ended = it.ask()
        restarted = start_sh.restarted
        after = it.ask()

        assert ended["code"] == "JOB_TIMEOUT"
        assert restarted == 0
        assert "error" not in after
        assert start_sh.restarted == 1


def test_a_generation_that_never_ends_in_somebody_elses_webui_asks_for_another_worker(tmp_path: Path) -> None:
    with world(tmp_path, JOB_TIMEOUT="1") as it:
        it.worker.readiness.timings = replace(QUICK, interrupt_patience=0.05, interrupt_grace=0.5)
        it.webui.fail_next = [WebUIFault.HANG]

        ended, after = it.ask(), it.ask()
        it.webui.release()

        assert ended["code"] == "JOB_TIMEOUT"
        assert (after["code"], after["refresh_worker"]) == ("WEBUI_LOST", True)


def test_a_webui_that_falls_silent_in_a_job_is_killed(tmp_path: Path) -> None:
    with supervised(tmp_path) as (it, start_sh):
        it.worker.readiness.timings = replace(QUICK, silence=0.2)
        silence(it)

        lost, after = it.ask(), it.ask()

        assert lost["code"] == "WEBUI_LOST"
        assert "error" not in after
        assert start_sh.restarted == 1


@pytest.mark.parametrize("more", [{}, {"n_iter": 2}, {"script_name": "prompt matrix", "script_args": MATRIX}])
def test_a_picture_that_somebody_interrupts_is_not_completed(tmp_path: Path, more: dict[str, Any]) -> None:
    with world(tmp_path) as it:
        it.webui.step_seconds = 0.05

        def interrupt() -> None:
            wait_until(lambda: it.webui.process.state.sampling_step, "the first step")
            client.WebUI(it.webui.url).interrupt()

        threading.Thread(target=interrupt).start()

        answer = it.ask(steps=60, **more)
        it.webui.step_seconds = 0.0
        after = it.ask()

        assert (answer["code"], answer["retryable"]) == ("GENERATION_FAILED", False)
        assert "interrupted by somebody else" in answer["hint"]
        assert "error" not in after


def test_an_interrupt_between_two_jobs_costs_neither(tmp_path: Path) -> None:
    with world(tmp_path) as it:
        it.ask()
        client.WebUI(it.webui.url).interrupt()

        assert "error" not in it.ask()


def test_out_of_memory_frees_the_gpu_and_touches_nothing_else(tmp_path: Path) -> None:
    with supervised(tmp_path) as (it, start_sh):
        it.webui.fail_next = [WebUIFault.OUT_OF_MEMORY]
        before = len(it.webui.asked)

        lost, after = it.ask(), it.ask()

        assert (lost["code"], lost["retryable"], lost.get("refresh_worker")) == ("OUT_OF_MEMORY", False, None)
        assert "batch_size" in lost["hint"]
        assert "error" not in after
        assert start_sh.restarted == 0
        assert it.requests_since(before) == [
            "/sdapi/v1/txt2img",
            "/sdapi/v1/unload-checkpoint",
            "/sdapi/v1/reload-checkpoint",
            "/sdapi/v1/txt2img",
        ]


# how many good jobs lie between two out-of-memories, and whether the worker is fit after the second
@pytest.mark.parametrize(("between", "fit"), [(0, False), (2, False), (3, True)])
def test_the_second_out_of_memory_within_three_jobs_ends_the_worker(tmp_path: Path, between: int, fit: bool) -> None:
    with world(tmp_path) as it:
        it.webui.fail_next = [WebUIFault.OUT_OF_MEMORY]
        it.ask()
        for _ in range(between):
            it.ask()
        it.webui.fail_next = [WebUIFault.OUT_OF_MEMORY]

        again = it.ask()

        assert again.get("refresh_worker", False) is not fit


def test_a_webui_that_a_switch_has_broken_is_restarted_and_the_job_notices_nothing(tmp_path: Path) -> None:
    with supervised(tmp_path) as (it, start_sh):
        it.webui.fail_next = [LOWVRAM]

        answer = it.ask()

        assert "error" not in answer
        assert start_sh.restarted == 1


def test_a_broken_webui_that_start_sh_does_not_own_is_left_alone(tmp_path: Path) -> None:
    with world(tmp_path) as it:
        it.webui.fail_next = [LOWVRAM]

        answer = it.ask()

        assert (answer["code"], answer["refresh_worker"]) == ("CHECKPOINT_NOT_LOADED", True)


def test_another_checkpoint_in_an_answer_is_switched_back_by_the_next_job(tmp_path: Path) -> None:
    with world(tmp_path) as it:
        it.webui.fail_next = [WebUIFault.OTHER_CHECKPOINT]

        lost, after = it.ask(), it.ask()

        assert (lost["code"], lost["retryable"]) == ("CHECKPOINT_NOT_LOADED", True)
        assert "error" not in after

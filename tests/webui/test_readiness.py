"""What can happen to a WebUI before a job generates, and that it costs no job if that can be avoided."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from a1111_worker.errors import CheckpointNotLoaded, WebUINotReady
from sandbox.server import Exchange
from sandbox.webui import WebUIFault
from tests.support import QUICK, wait_until, world
from tests.webui.supervised import HeldRequest, runs, silence, supervised, when_asked


def test_a_webui_that_dies_idle_costs_no_job(tmp_path: Path) -> None:
    with supervised(tmp_path) as (it, start_sh):
        it.ask()

        start_sh.kill()
        answer = it.ask()

        assert "error" not in answer
        assert start_sh.restarted == 1


def test_a_webui_that_was_restarted_unseen_leaks_no_setting_from_job_to_job(tmp_path: Path) -> None:
    with supervised(tmp_path) as (it, start_sh):
        plain = it.ask()["images"]
        start_sh.kill()
        wait_until(lambda: start_sh.restarted == 1 and it.webui.is_up, "another WebUI")  # before anybody has looked

        it.ask(clip_skip=2)
        after = it.ask()

        assert after["images"] == plain


@pytest.mark.parametrize("version", ["1.9.3", "1.10.1"])
def test_a_boot_loads_the_checkpoint_once(tmp_path: Path, version: str) -> None:
    with world(tmp_path, version=version, WARMUP="1") as it:
        answer = it.ask()

        assert "error" not in answer
        assert it.webui.loads == ["jib_mix_illustrious_realistic_v2.safetensors"]


def test_without_a_warm_up_nothing_is_called_proven(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), world(tmp_path, boot=False) as it:
        it.boot(WARMUP="0")
        without = caplog.text
        it.stop()
        it.boot(WARMUP="1")

    assert "is loaded after" in without
    assert "proven" not in without
    assert "proven that it uses Jib Mix" in caplog.text


def test_a_boot_whose_first_picture_names_another_checkpoint_fails(tmp_path: Path) -> None:
    with world(tmp_path, boot=False) as it:
        it.webui.fail_next = [WebUIFault.OTHER_CHECKPOINT]

        with pytest.raises(CheckpointNotLoaded):
            it.boot(WARMUP="1")


def test_a_webui_that_dies_during_its_preparation_costs_no_job(tmp_path: Path) -> None:
    with supervised(tmp_path) as (it, start_sh):
        start_sh.kill()
        it.worker.readiness.invalidate()  # as after a job that lost it
        when_asked(it, "/sdapi/v1/sd-models", start_sh.kill)  # dies again while it is being prepared

        answer = it.ask()

        assert "error" not in answer
        assert start_sh.restarted == 2


def test_a_webui_that_dies_during_the_boot_is_waited_for(tmp_path: Path) -> None:
    with supervised(tmp_path, boot=False) as (it, start_sh):
        when_asked(it, "/sdapi/v1/samplers", start_sh.kill)

        it.boot()

        assert "error" not in it.ask()
        assert start_sh.restarted == 1


def test_a_webui_that_start_sh_gives_up_on_ends_the_job_and_the_worker(tmp_path: Path) -> None:
    with supervised(tmp_path) as (it, start_sh):
        pid = int((tmp_path / "webui.state").read_text())
        start_sh.may_restart.clear()
        start_sh.kill()
        wait_until(lambda: not runs(pid), "the WebUI's end")
        (tmp_path / "webui.state").write_text("failed")

        answer = it.ask()

        assert (answer["code"], answer["refresh_worker"]) == ("WEBUI_NOT_READY", True)


def test_a_webui_that_hangs_idle_costs_no_job(tmp_path: Path) -> None:
    with supervised(tmp_path) as (it, start_sh):
        it.worker.readiness.timings = replace(QUICK, silence=0.2)
        silence(it)

        is_up = it.worker.readiness.check_idle()
        answer = it.ask()

        assert not is_up
        assert "error" not in answer
        assert start_sh.restarted == 1


@pytest.mark.parametrize("hiccup", ["reset", "502"])
def test_a_single_failed_check_does_not_kill_the_webui(tmp_path: Path, hiccup: str) -> None:
    with supervised(tmp_path) as (it, start_sh):
        once = threading.Lock()

        def disturb(exchange: Exchange) -> bool:
            if not exchange.asked.path.endswith("/progress") or not once.acquire(blocking=False):
                return False
            exchange.reset() if hiccup == "reset" else exchange.send(502, b"<html>")
            return True

        it.webui.before.append(disturb)

        is_up = it.worker.readiness.check_idle()
        answer = it.ask()

        assert not is_up
        assert "error" not in answer
        assert start_sh.restarted == 0


def test_a_webui_that_hangs_while_it_switches_is_killed_and_costs_no_job(tmp_path: Path) -> None:
    with supervised(tmp_path, JOB_TIMEOUT="5") as (it, start_sh):
        it.worker.readiness.timings = replace(QUICK, silence=0.2)
        it.webui.restart()  # nothing is loaded any more, as in any new life
        it.worker.readiness.invalidate()

        def stuck(exchange: Exchange) -> bool:
            if not exchange.asked.path.endswith("/reload-checkpoint") or start_sh.restarted:
                return False
            silence(it)
            return exchange.hold(20) or True

        it.webui.before.append(stuck)

        answer = it.ask()

        assert "error" not in answer
        assert start_sh.restarted == 1
        assert len(it.webui.loads) == 2  # at the boot, and after the restart: none was loaded twice


@pytest.mark.parametrize("path", ["/sdapi/v1/progress", "/sdapi/v1/samplers", "/sdapi/v1/options"])
def test_a_job_whose_time_is_up_does_not_wait_for_the_preparation(tmp_path: Path, path: str) -> None:
    with world(tmp_path, JOB_TIMEOUT="1") as it:
        it.worker.readiness.invalidate()
        held = HeldRequest(it, path)

        answer = it.ask()

        assert answer["code"] == "JOB_TIMEOUT"
        assert held.is_running


def test_a_failed_switch_is_repaired_by_a_restart(tmp_path: Path) -> None:
    with supervised(tmp_path, boot=False) as (it, start_sh):
        it.webui.misshapen_models = {"jib_mix_illustrious_realistic_v2"}
        first = it.webui.process

        def healed(exchange: Exchange) -> bool:
            if it.webui.process is not first:
                it.webui.misshapen_models.clear()
            return False

        it.webui.before.append(healed)

        it.boot()

        assert "error" not in it.ask()
        assert start_sh.restarted == 1


def test_a_job_that_ends_during_a_switch_leaves_it_to_the_next(tmp_path: Path) -> None:
    with world(tmp_path, JOB_TIMEOUT="1.5") as it:
        it.webui.restart()
        it.webui.switch_seconds = 3.0
        it.worker.readiness.invalidate()  # as after a job that lost it

        ended = it.ask()
        wait_until(lambda: not it.worker.readiness.is_preparing, "the preparation")
        after = it.ask()

        assert ended["code"] == "JOB_TIMEOUT"
        assert "error" not in after
        assert len(it.webui.loads) == 2  # at the boot, and the one that both jobs waited for


def test_a_boot_whose_webui_never_answers_reports_that(tmp_path: Path) -> None:
    with supervised(tmp_path, boot=False, WEBUI_READY_TIMEOUT="0.3") as (it, start_sh):
        start_sh.may_restart.clear()
        start_sh.kill()

        with pytest.raises(WebUINotReady, match="did not answer within"):
            it.boot()

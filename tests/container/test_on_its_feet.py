"""What can happen to a WebUI, and what it costs: the job that was running, never another.

The WebUI is the sandbox's; a real process whose pid stands in the state file lives and dies with it, as under start.sh.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from a1111_worker.errors import WebUINotReady
from a1111_worker.webui.supervisor import Ownership, Supervisor
from sandbox.server import Exchange
from sandbox.webui import Canned, Fault
from tests.support import QUICK, World, world

LOWVRAM = Canned(
    500,
    {"error": "AttributeError", "detail": "", "body": "", "errors": "'NoneType' object has no attribute 'lowvram'"},
)


class Keeper:
    """Keeps the sandbox's WebUI alive as start.sh does; `restarted` counts."""

    def __init__(self, it: World, state: Path) -> None:
        self._it = it
        self._state = state
        self._stopped = False
        self.restarted = 0
        self._down = threading.Event()
        self.may_restart = threading.Event()
        self.may_restart.set()
        self._process = self._spawn()
        it.webui.before.append(self._dead)
        self._thread = threading.Thread(target=self._keep)
        self._thread.start()

    def kill(self) -> None:
        """The WebUI dies, at once and altogether."""
        self._down.clear()
        self._process.kill()
        self._down.wait(20)

    def stop(self) -> None:
        self._stopped = True
        self.may_restart.set()
        self._process.kill()
        self._thread.join()

    def _keep(self) -> None:
        while not self._stopped:
            self._process.wait()
            self._it.webui.crash()
            self._down.set()
            self.may_restart.wait(20)
            if not self._is_over():
                self._process = self._spawn()
                self.restarted += 1
                self._it.webui.restart()
        self._process.kill()  # one that was started while the end came
        self._process.wait()

    def _is_over(self) -> bool:
        return self._stopped

    def _dead(self, exchange: Exchange) -> bool:
        """A dead process answers nothing, also in the moment before its server is down."""
        with contextlib.suppress(ChildProcessError):  # it is buried already
            if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return False
        exchange.reset()
        return True

    def _spawn(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(["sleep", "600"], start_new_session=True)
        self._state.write_text(str(process.pid))
        return process


@contextlib.contextmanager
def kept(folder: Path, *, boot: bool = True, **settings: str) -> Iterator[tuple[World, Keeper]]:
    state = folder / "webui.state"
    with world(folder, boot=False, WEBUI_STATE_FILE=str(state), **settings) as it:
        keeper = Keeper(it, state)
        try:
            if boot:
                it.boot()
            yield it, keeper
        finally:
            keeper.stop()


def when_asked(it: World, path: str, do: Callable[[], None]) -> None:
    """Do something, once, when the WebUI is asked for `path` the next time, before it answers."""
    done = threading.Lock()

    def watching(exchange: Exchange) -> bool:
        if exchange.asked.path == path and done.acquire(blocking=False):
            do()
        return False

    it.webui.before.append(watching)


def wait_for(condition: Callable[[], bool]) -> None:
    """Return when it is so; the test's own timeout ends one that never is."""
    pause = threading.Event()
    while not condition():
        pause.wait(0.01)


def test_one_that_dies_idle_costs_no_job(tmp_path: Path) -> None:
    with kept(tmp_path) as (it, keeper):
        it.ask()

        keeper.kill()
        answer = it.ask()

        assert "error" not in answer
        assert keeper.restarted == 1


def test_one_that_was_restarted_unseen_leaks_no_setting_from_job_to_job(tmp_path: Path) -> None:
    with kept(tmp_path) as (it, keeper):
        plain = it.ask()["images"]
        keeper.kill()
        wait_for(lambda: keeper.restarted == 1 and it.webui.is_up)  # before anybody has looked

        it.ask(clip_skip=2)
        after = it.ask()

        assert after["images"] == plain


def test_one_that_dies_during_a_job_costs_that_job(tmp_path: Path) -> None:
    with kept(tmp_path) as (it, keeper):
        it.webui.step_seconds = 0.05
        when_asked(it, "/sdapi/v1/progress", keeper.kill)

        lost = it.ask(steps=100)
        it.webui.step_seconds = 0.0
        after = it.ask()

        assert (lost["code"], lost["retryable"], lost.get("refresh_worker")) == ("WEBUI_LOST", True, None)
        assert "error" not in after


def test_one_that_dies_while_it_switches_costs_no_job(tmp_path: Path) -> None:
    with kept(tmp_path) as (it, keeper):
        keeper.kill()
        it.worker.readiness.invalidate()  # as after a job that lost it
        when_asked(it, "/sdapi/v1/sd-models", keeper.kill)  # dies again while it is being made ready

        answer = it.ask()

        assert "error" not in answer
        assert keeper.restarted == 2


def test_one_that_dies_during_boot_is_waited_for(tmp_path: Path) -> None:
    with kept(tmp_path, boot=False) as (it, keeper):
        when_asked(it, "/sdapi/v1/samplers", keeper.kill)

        it.boot()

        assert "error" not in it.ask()
        assert keeper.restarted == 1


def test_one_that_start_sh_gives_up_on_ends_the_job_and_the_worker(tmp_path: Path) -> None:
    with kept(tmp_path) as (it, keeper):
        keeper.may_restart.clear()
        keeper.kill()
        wait_for(lambda: Supervisor(tmp_path / "webui.state").ownership is Ownership.RESTARTING)
        (tmp_path / "webui.state").write_text("failed")

        answer = it.ask()

        assert (answer["code"], answer["refresh_worker"]) == ("WEBUI_NOT_READY", True)


def test_one_that_hangs_in_a_job_is_killed_and_the_next_job_succeeds(tmp_path: Path) -> None:
    with kept(tmp_path, GENERATION_TIMEOUT="0.3") as (it, keeper):
        it.webui.fail_next = [Fault.HANG]

        lost, after = it.ask(), it.ask()

        assert (lost["code"], lost["retryable"], lost.get("refresh_worker")) == ("WEBUI_LOST", True, None)
        assert "error" not in after
        assert keeper.restarted == 1


def silence(it: World) -> None:
    """From now on this life of the WebUI answers nothing."""
    process = it.webui.process

    def silent(exchange: Exchange) -> bool:
        if it.webui.process is not process:
            return False
        exchange.hold(20)
        return True

    it.webui.before.append(silent)


def test_one_that_hangs_while_idle_costs_no_job(tmp_path: Path) -> None:
    with kept(tmp_path) as (it, keeper):
        it.worker.readiness.timings = replace(QUICK, silence=0.2)
        silence(it)

        is_up = it.worker.readiness.check_idle()
        answer = it.ask()

        assert not is_up
        assert "error" not in answer
        assert keeper.restarted == 1


@pytest.mark.parametrize("hiccup", ["reset", "502"])
def test_a_look_that_goes_wrong_kills_no_webui(tmp_path: Path, hiccup: str) -> None:
    with kept(tmp_path) as (it, keeper):
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
        assert keeper.restarted == 0


def test_one_that_hangs_while_it_switches_costs_one_job(tmp_path: Path) -> None:
    with kept(tmp_path, JOB_TIMEOUT="5") as (it, keeper):
        it.worker.readiness.timings = replace(QUICK, silence=0.2)
        it.webui.restart()  # nothing is loaded any more, as in any new life
        it.worker.readiness.invalidate()

        def stuck(exchange: Exchange) -> bool:
            if b"sd_model_checkpoint" not in exchange.asked.body or keeper.restarted:
                return False
            silence(it)
            return exchange.hold(20) or True

        it.webui.before.append(stuck)

        answer = it.ask()

        assert "error" not in answer
        assert keeper.restarted == 1
        assert it.switches() == 3  # the boot's, that of the silent one, and that of the next: none is asked for twice


class Held:
    """Holds one request to `path` for as long as the worker wants its answer; `is_under_way` tells."""

    def __init__(self, it: World, path: str, *, head: bytes | None = None) -> None:
        self._path = path
        self._head = head
        self.is_under_way = False
        self._once = threading.Lock()
        it.webui.before.append(self._hold)

    def _hold(self, exchange: Exchange) -> bool:
        if exchange.asked.path != self._path or not self._once.acquire(blocking=False):
            return False
        self.is_under_way = True
        if self._head is not None:
            exchange.begin(200, {"content-type": "application/json", "content-length": "100000"})
            exchange.write(self._head)
        exchange.hold()
        self.is_under_way = False
        return True


@pytest.mark.parametrize("path", ["/sdapi/v1/progress", "/sdapi/v1/samplers", "/sdapi/v1/options"])
def test_a_job_out_of_time_does_not_wait_for_what_makes_the_webui_ready(tmp_path: Path, path: str) -> None:
    with world(tmp_path, JOB_TIMEOUT="1") as it:
        it.worker.readiness.invalidate()
        held = Held(it, path)

        answer = it.ask()

        assert answer["code"] == "JOB_TIMEOUT"
        assert held.is_under_way


def test_an_answer_that_stops_after_its_head_takes_no_longer_than_the_job_has(tmp_path: Path) -> None:
    with world(tmp_path, JOB_TIMEOUT="1") as it:
        it.ask()
        held = Held(it, "/sdapi/v1/txt2img", head=b'{"images": [')

        answer = it.ask()
        wait_for(lambda: not held.is_under_way)  # nobody reads it any more
        after = it.ask()

        assert answer["code"] == "JOB_TIMEOUT"
        assert "error" not in after


def test_a_job_out_of_time_leaves_a_generation_that_does_not_end_to_the_next(tmp_path: Path) -> None:
    with kept(tmp_path, JOB_TIMEOUT="1") as (it, keeper):
        it.worker.readiness.timings = replace(QUICK, interrupt_patience=0.05, interrupt_grace=0.5)
        it.webui.fail_next = [Fault.HANG]

        ended = it.ask()
        restarted = keeper.restarted
        after = it.ask()

        assert ended["code"] == "JOB_TIMEOUT"
        assert restarted == 0
        assert "error" not in after
        assert keeper.restarted == 1


def test_what_a_script_set_ends_with_its_job(tmp_path: Path) -> None:
    with world(tmp_path) as it:
        options = it.webui.process.data

        def leave_behind() -> None:
            options["sigma_min"] = 0.5  # an axis of an X/Y/Z plot; A1111 restores what was set before, and this was not

        when_asked(it, "/sdapi/v1/txt2img", leave_behind)
        it.ask(script_name="x/y/z plot")
        it.ask()

        assert options["sigma_min"] == 0.0


def test_a_script_can_keep_nothing_on_the_disk(tmp_path: Path) -> None:
    with world(tmp_path) as it:
        assert [it.webui.process.option(name) for name in ("samples_save", "grid_save")] == [False, False]


def test_one_that_falls_silent_in_a_job_is_killed(tmp_path: Path) -> None:
    with kept(tmp_path) as (it, keeper):
        it.worker.readiness.timings = replace(QUICK, silence=0.2)
        silence(it)

        lost, after = it.ask(), it.ask()

        assert lost["code"] == "WEBUI_LOST"
        assert "error" not in after
        assert keeper.restarted == 1


def test_out_of_memory_frees_the_gpu_and_touches_nothing_else(tmp_path: Path) -> None:
    with kept(tmp_path) as (it, keeper):
        it.webui.fail_next = [Fault.OUT_OF_MEMORY]
        before = len(it.webui.asked)

        lost, after = it.ask(), it.ask()

        assert (lost["code"], lost["retryable"], lost.get("refresh_worker")) == ("OUT_OF_MEMORY", False, None)
        assert "batch_size" in lost["hint"]
        assert "error" not in after
        assert keeper.restarted == 0
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
        it.webui.fail_next = [Fault.OUT_OF_MEMORY]
        it.ask()
        for _ in range(between):
            it.ask()
        it.webui.fail_next = [Fault.OUT_OF_MEMORY]

        again = it.ask()

        assert again.get("refresh_worker", False) is not fit


def test_a_poisoned_one_is_restarted_and_the_job_notices_nothing(tmp_path: Path) -> None:
    with kept(tmp_path) as (it, keeper):
        it.webui.fail_next = [LOWVRAM]

        answer = it.ask()

        assert "error" not in answer
        assert keeper.restarted == 1


def test_a_poisoned_one_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    with world(tmp_path) as it:
        it.webui.fail_next = [LOWVRAM]

        answer = it.ask()

        assert (answer["code"], answer["refresh_worker"]) == ("CHECKPOINT_NOT_LOADED", True)


def test_a_switch_that_failed_is_healed_by_a_restart(tmp_path: Path) -> None:
    with kept(tmp_path, boot=False) as (it, keeper):
        it.webui.misshapen_models = {"jib_mix_illustrious_realistic_v2"}
        first = it.webui.process

        def healed(exchange: Exchange) -> bool:
            if it.webui.process is not first:
                it.webui.misshapen_models.clear()
            return False

        it.webui.before.append(healed)

        it.boot()

        assert "error" not in it.ask()
        assert keeper.restarted == 1


def test_another_checkpoint_in_an_answer_is_switched_back_by_the_next_job(tmp_path: Path) -> None:
    with world(tmp_path) as it:
        it.webui.fail_next = [Fault.OTHER_CHECKPOINT]

        lost, after = it.ask(), it.ask()

        assert (lost["code"], lost["retryable"]) == ("CHECKPOINT_NOT_LOADED", True)
        assert "error" not in after


def test_a_job_that_ends_during_a_switch_leaves_it_to_the_next(tmp_path: Path) -> None:
    with world(tmp_path, JOB_TIMEOUT="1.5") as it:
        it.webui.restart()
        it.webui.switch_seconds = 3.0
        it.worker.readiness.invalidate()  # as after a job that lost it

        ended = it.ask()
        wait_for(lambda: not it.worker.readiness.is_preparing)
        after = it.ask()

        assert ended["code"] == "JOB_TIMEOUT"
        assert "error" not in after
        assert it.switches() == 2  # the boot's, and the one that both jobs waited for


def test_a_boot_whose_webui_never_comes_says_so(tmp_path: Path) -> None:
    with kept(tmp_path, boot=False, WEBUI_READY_TIMEOUT="0.3") as (it, keeper):
        keeper.may_restart.clear()
        keeper.kill()

        with pytest.raises(WebUINotReady, match="did not answer within"):
            it.boot()

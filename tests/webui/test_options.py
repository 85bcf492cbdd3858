"""No job leaves an option to the next one."""

from __future__ import annotations

from pathlib import Path

from a1111_worker.request.fields import OVERRIDABLE_OPTIONS
from tests.support import wait_until, world
from tests.webui.supervised import supervised, when_asked

PLOT = [1, "5", [], 0, "", [], 0, "", [], True, False, False, False, False, False, False, 0, False]


def test_an_option_that_a_script_set_is_reset_after_its_job(tmp_path: Path) -> None:
    with world(tmp_path) as it:
        options = it.webui.process.data

        def leave_behind() -> None:
            options["sigma_min"] = 0.5  # an axis of an X/Y/Z plot; A1111 restores what was set before, and this was not

        when_asked(it, "/sdapi/v1/txt2img", leave_behind)
        it.ask(script_name="x/y/z plot", script_args=PLOT)
        it.ask()

        assert options["sigma_min"] == 0.0


def test_a_restarted_webui_has_new_original_options(tmp_path: Path) -> None:
    with supervised(tmp_path) as (it, start_sh):
        start_sh.kill()
        wait_until(lambda: start_sh.restarted == 1 and it.webui.is_up, "another WebUI")
        options = it.webui.process.data
        options["sigma_min"] = 0.5  # this process began with it

        it.ask()
        it.worker.readiness.invalidate()
        it.ask()

        assert options["sigma_min"] == 0.5


def test_every_option_that_a_job_may_override_is_set_at_the_boot(tmp_path: Path) -> None:
    with world(tmp_path) as it:
        set_options = {key: value for key, value in it.webui.process.data.items() if key in OVERRIDABLE_OPTIONS}

    assert set_options == {key: option.default for key, option in OVERRIDABLE_OPTIONS.items()}


def test_a_script_can_save_no_files(tmp_path: Path) -> None:
    with world(tmp_path) as it:
        assert [it.webui.process.option(name) for name in ("samples_save", "grid_save")] == [False, False]

"""Somebody else's WebUI gets its own settings back, and what its owner does meanwhile is noticed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from a1111_worker.errors import WebUINotReady
from a1111_worker.webui import client
from a1111_worker.webui.owner import OwnersOptions, as_number, is_same, owner_file
from sandbox.models import sdxl_checkpoint, sdxl_lora
from sandbox.server import Exchange
from tests.sandbox.webui_client import post
from tests.support import ROOT, World, world
from tests.webui.supervised import supervised, when_asked

OWNERS = {"CLIP_stop_at_last_layers": 2, "eta_noise_seed_delta": 31337, "samples_save": True, "sd_lora": "of_owner"}
OURS = {"CLIP_stop_at_last_layers": 1, "eta_noise_seed_delta": 0, "samples_save": False, "sd_lora": "None"}


def options_of(it: World, keys: Mapping[str, Any] = OWNERS) -> dict[str, Any]:
    return {key: it.webui.process.data.get(key) for key in keys}


def give_settings(it: World) -> None:
    """The owner's settings, a LoRA and a checkpoint of the owner's that is loaded."""
    sdxl_lora(it.webui_models / "Lora" / "of_owner.safetensors", 7, 300_000)
    sdxl_checkpoint(it.webui_models / "Stable-diffusion" / "of_owner.safetensors", 9, 3_000_000)
    post(it.webui, "refresh-loras")
    api = client.WebUI(it.webui.url)
    api.refresh_checkpoints()
    api.reload_checkpoint()
    api.set_options(OWNERS)


def test_an_owner_gets_every_setting_back_when_the_worker_stops(tmp_path: Path) -> None:
    with world(tmp_path, boot=False) as it:
        give_settings(it)
        it.boot()
        during = options_of(it), it.ask(clip_skip=3), options_of(it)
        it.stop()
        after = options_of(it)

        assert during[0] == during[2] == OURS
        assert after == OWNERS
        assert type(after["CLIP_stop_at_last_layers"]) is int
        assert it.webui.process.data["sd_model_checkpoint"].startswith("of_owner")
        assert it.webui.process.model.loaded is not None
        assert it.webui.process.model.loaded.checkpoint.bare_name == "of_owner"
        assert not list(tmp_path.glob("*webui-options*"))


BOOT_AND_WAIT = """
import os, signal, sys
from a1111_worker.config import Config
from handler import Worker
Worker(Config.from_env(os.environ)).boot()
print("ready", flush=True)
signal.pause()
"""


def test_a_worker_that_was_killed_gives_them_back_after_its_next_start(tmp_path: Path) -> None:
    with world(tmp_path, boot=False) as it:
        give_settings(it)
        environ = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
        command = [sys.executable, "-c", BOOT_AND_WAIT]
        given = {**environ, **it.environ(), "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, cwd=tmp_path, env=given, stdout=subprocess.PIPE) as killed:
            assert killed.stdout is not None
            assert killed.stdout.readline() == b"ready\n"
            killed.send_signal(signal.SIGKILL)
        between = options_of(it)

        it.boot()
        it.stop()

        assert between == OURS
        assert options_of(it) == OWNERS
        assert it.webui.process.data["sd_model_checkpoint"].startswith("of_owner")


def test_what_the_owner_sets_meanwhile_is_the_owners(tmp_path: Path) -> None:
    with world(tmp_path, boot=False) as it:
        give_settings(it)
        it.boot()
        plain = it.ask()["images"]
        client.WebUI(it.webui.url).set_options({"CLIP_stop_at_last_layers": 4, "live_previews_enable": False})

        again = it.ask()["images"]
        during = options_of(it)
        it.stop()

        assert again == plain
        assert during == OURS
        assert options_of(it) == {**OWNERS, "CLIP_stop_at_last_layers": 4}
        assert it.webui.process.data["live_previews_enable"] is False  # not the worker's business, at no time


@pytest.mark.parametrize(
    "change",
    [{"sd_lora": "of_owner"}, {"sd_model_checkpoint": "of_owner"}, {"sd_vae": "None"}, {"enable_pnginfo": False}],
)
def test_a_change_in_mid_life_changes_no_picture(tmp_path: Path, change: dict[str, Any]) -> None:
    with world(tmp_path, boot=False) as it:
        give_settings(it)
        it.boot()
        before = it.ask()
        client.WebUI(it.webui.url).set_options(change)

        after = it.ask()

        assert after["images"] == before["images"]
        assert after["worker"]["warnings"] == []


def test_a_lora_that_the_owner_adds_in_the_last_moment_is_a_warning(tmp_path: Path) -> None:
    with world(tmp_path, boot=False) as it:
        give_settings(it)
        it.boot()
        when_asked(it, "/sdapi/v1/txt2img", lambda: it.webui.process.data.update(sd_lora="of_owner"))

        answer = it.ask()

        assert answer["worker"]["warnings"] == ["the WebUI also applied 'of_owner', a LoRA that the job does not name"]


def test_pictures_in_another_format_stop_the_boot_with_a_hint(tmp_path: Path) -> None:
    with world(tmp_path, boot=False) as it:
        it.webui.process.options.set("samples_format", "jpg")

        with pytest.raises(WebUINotReady, match="samples_format is 'jpg'") as raised:
            it.boot()

        assert "set samples_format to png" in str(raised.value.hint)
        assert it.webui.loads == []


def test_a_format_that_changes_in_mid_life_ends_jobs_with_a_hint_until_it_is_back(tmp_path: Path) -> None:
    with world(tmp_path) as it:
        it.webui.process.options.set("samples_format", "webp")
        refused = it.ask()
        it.webui.process.options.set("samples_format", "png")

        assert (refused["code"], "samples_format" in refused["hint"]) == ("WEBUI_NOT_READY", True)
        assert "error" not in it.ask()


def test_settings_that_cannot_be_read_are_prepared_again(tmp_path: Path) -> None:
    with world(tmp_path) as it:
        left = [{"detail": "no options today"}]

        def disturb(exchange: Exchange) -> bool:
            if exchange.asked.method != "GET" or not exchange.asked.path.endswith("/options") or not left:
                return False
            exchange.send_json(200, left.pop())
            return True

        it.webui.before.append(disturb)

        answer = it.ask()

        assert "error" not in answer
        assert not left


def test_our_own_webui_is_asked_nothing_more_and_gets_nothing_back(tmp_path: Path) -> None:
    with supervised(tmp_path) as (it, _):
        it.ask()
        before = len(it.webui.asked)

        it.ask()
        paths = [asked.path for asked in it.webui.asked[before:]]
        it.stop()

        assert [path for path in paths if not path.endswith("/progress")] == ["/sdapi/v1/txt2img"]
        assert paths[-1] == "/sdapi/v1/txt2img"  # no look after it
        assert options_of(it, {"samples_save": None}) == {"samples_save": False}
        assert not list(tmp_path.glob("*webui-options*"))


def test_a_webui_that_is_gone_at_the_end_gets_them_at_the_next_start(tmp_path: Path) -> None:
    with world(tmp_path, boot=False) as it:
        give_settings(it)
        it.boot()
        it.webui.crash()
        it.stop()
        kept = list(tmp_path.glob("*webui-options*"))
        it.webui.restart()

        it.boot()
        it.stop()

        assert len(kept) == 1
        assert options_of(it) == OWNERS


# --- The file -----------------------------------------------------------------------------------------------------


def test_the_file_keeps_what_was_before_the_first_worker(tmp_path: Path) -> None:
    path = tmp_path / "options.json"
    OwnersOptions(path).remember(
        {"a": 2, "b": 5, "sd_model_checkpoint": "x"}, {"a": 1, "sd_model_checkpoint": "y.safetensors"}
    )

    second = OwnersOptions(path)  # of a worker with another checkpoint, and another default of `a`
    second.remember({"a": 1, "sd_model_checkpoint": "y.safetensors [0123]"}, {"a": 3, "sd_model_checkpoint": "z"})

    assert second.to_put_back({"a": 3, "sd_model_checkpoint": "z"}) == {"a": 2, "sd_model_checkpoint": "x"}
    assert second.to_put_back({"a": 7, "sd_model_checkpoint": "w"}) == {}  # changed by the owner
    second.forget()
    assert OwnersOptions(path).to_put_back({"a": 3}) == {}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": 2}', b'{"a": {"was": 2}}', b"\xff"])
def test_a_file_in_another_form_is_left_out(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "options.json"
    path.write_bytes(content)

    owners = OwnersOptions(path)
    owners.remember({"a": 2}, {"a": 1})

    assert owners.to_put_back({"a": 1}) == {"a": 2}


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")
def test_a_file_of_another_user_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "options.json"
    OwnersOptions(path).remember({"a": 2}, {"a": 1})
    os.chown(path, 12345, -1)

    assert OwnersOptions(path).to_put_back({"a": 1}) == {}


def test_without_a_place_for_the_file_the_worker_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    owners = OwnersOptions(tmp_path / "file" / "options.json")

    owners.remember({"a": 2}, {"a": 1})

    assert owners.to_put_back({"a": 1}) == {"a": 2}
    assert "if this worker is killed" in caplog.text


def test_the_file_lies_beside_the_workers_state_or_in_a_folder_of_the_user(tmp_path: Path) -> None:
    beside = owner_file(tmp_path / "worker.state", "http://a:1")
    alone, other = owner_file(None, "http://a:1"), owner_file(None, "http://a:2")
    alone.parent.mkdir(exist_ok=True)

    assert beside.parent == tmp_path
    assert alone != other
    assert str(os.getuid()) in alone.parent.name


def test_numbers_are_set_as_a1111_stores_them() -> None:
    assert [as_number(value) for value in (2.0, 0.5, True, "2.0", None)] == [2, 0.5, True, "2.0", None]
    assert json.dumps(as_number(2.0)) == "2"
    assert is_same("sd_model_checkpoint", "x.safetensors [0123456789]", "x")
    assert not is_same("sd_lora", "x.safetensors", "x")

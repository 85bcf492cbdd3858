"""The sandbox's upscalers against recordings: which files A1111 finds, and when it looks for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sandbox.webui import SandboxWebUI
from tests.sandbox.webui_client import get
from tests.support import DATA


@pytest.mark.parametrize("version", ["1.9.3", "1.10.1"])
def test_upscalers_are_listed_with_their_files_as_recorded(version: str, tmp_path: Path) -> None:
    recorded = json.loads((DATA / f"webui-{version}/upscalers/with_files.json").read_text())["response"]["body"]
    for path in (upscaler["model_path"] for upscaler in recorded):
        if path and path.startswith("/webui/data/models/"):
            file = tmp_path / path.removeprefix("/webui/data/models/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"weights")

    with SandboxWebUI(tmp_path / "shown", version=version, own_models_dir=tmp_path) as webui:
        listed = get(webui, "upscalers")

    assert json.loads(json.dumps(listed).replace(str(tmp_path), "/webui/data/models")) == recorded


def test_upscalers_of_both_folders_are_found_at_the_next_start(tmp_path: Path) -> None:
    own, shown = tmp_path / "own/ESRGAN", tmp_path / "shown/ESRGAN"
    with SandboxWebUI(tmp_path / "shown", own_models_dir=tmp_path / "own") as webui:
        for folder, name in ((own, "one"), (shown, "two")):
            folder.mkdir(parents=True)
            (folder / f"{name}.pth").write_bytes(b"weights")

        before = {upscaler["name"] for upscaler in get(webui, "upscalers")}
        webui.restart()
        after = {upscaler["name"] for upscaler in get(webui, "upscalers")}

    assert before - after == {"ESRGAN_4x"} and after - before == {"one", "two"}

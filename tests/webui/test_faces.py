"""Faces are restored, or the job hears that they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from a1111_worker.webui.faces import can_restore_faces
from a1111_worker.webui.responses import WebUIFlags
from tests.support import world
from tests.webui.supervised import supervised

FILES = ("Codeformer/codeformer-v0.1.0.pth", "GFPGAN/detection_Resnet50_Final.pth", "GFPGAN/parsing_parsenet.pth")


def add(folder: Path, *files: str) -> None:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(b"weights")


# the files that are there, and which restorers can work
FOLDERS = [
    ((), ()),
    (FILES, ("CodeFormer",)),
    (FILES[:2], ()),
    (FILES[1:], ()),
    (("GFPGAN/GFPGANv1.4.pth", *FILES[1:]), ("GFPGAN",)),
    (("GFPGAN/GFPGANv1.4.pth", *FILES), ("CodeFormer", "GFPGAN")),
]


@pytest.mark.parametrize(("files", "able"), FOLDERS)
def test_a_restorer_needs_its_own_file_and_facexlibs(
    tmp_path: Path, files: tuple[str, ...], able: tuple[str, ...]
) -> None:
    add(tmp_path, *files)
    flags = WebUIFlags(False, str(tmp_path / "Codeformer"), str(tmp_path / "GFPGAN"))

    found = [name for name in ("CodeFormer", "GFPGAN", "Nope", "None") if can_restore_faces(flags, name)]

    assert tuple(found) == able


def test_a_webui_without_these_folders_restores_nothing() -> None:
    assert not can_restore_faces(WebUIFlags(False), "CodeFormer")


def test_our_own_webui_refuses_to_restore_faces_without_the_files(tmp_path: Path) -> None:
    with supervised(tmp_path) as (it, _):
        refused = it.ask(restore_faces=True)

        assert refused["code"] == "INVALID_REQUEST"
        assert "restore_faces: is refused: the files for it are not there" in refused["error"]
        assert "error" not in it.ask(restore_faces=False)


def test_our_own_webui_restores_faces_with_an_operators_files(tmp_path: Path) -> None:
    add(tmp_path / "webui-models", *FILES)
    with supervised(tmp_path) as (it, _):
        plain, restored = it.ask(), it.ask(restore_faces=True)

        assert restored["worker"]["warnings"] == []
        assert restored["images"] != plain["images"]


def test_our_own_webui_uses_the_restorer_that_has_its_files(tmp_path: Path) -> None:
    add(tmp_path / "webui-models", "GFPGAN/GFPGANv1.4.pth", *FILES[1:])
    with supervised(tmp_path) as (it, _):
        answer = it.ask(restore_faces=True)

        assert "Face restoration: GFPGAN" in answer["info"]


def test_a_job_may_name_the_restorer_of_its_faces(tmp_path: Path) -> None:
    add(tmp_path / "webui-models", "GFPGAN/GFPGANv1.4.pth", *FILES)
    by_name: dict[str, Any] = {"override_settings": {"face_restoration_model": "GFPGAN"}}
    with supervised(tmp_path) as (it, _):
        infos = [it.ask(restore_faces=True, **more)["info"] for more in ({}, by_name, {})]

    assert ["Face restoration: GFPGAN" in info for info in infos] == [False, True, False]


def test_a_restorer_without_its_files_is_refused_by_name(tmp_path: Path) -> None:
    add(tmp_path / "webui-models", "GFPGAN/GFPGANv1.4.pth", *FILES[1:])
    with supervised(tmp_path) as (it, _):
        refused = it.ask(restore_faces=True, override_settings={"face_restoration_model": "CodeFormer"})
        unused = it.ask(override_settings={"face_restoration_model": "CodeFormer"})

    assert "face_restoration_model: is refused: the files of CodeFormer are not there" in refused["error"]
    assert "there is 'GFPGAN'" in refused["error"]
    assert "error" not in unused


def test_somebody_elses_webui_restores_faces_with_a_warning(tmp_path: Path) -> None:
    with world(tmp_path) as it:
        answer = it.ask(restore_faces=True)

    (warning,) = answer["worker"]["warnings"]
    assert "nothing shows whether restore_faces did anything" in warning

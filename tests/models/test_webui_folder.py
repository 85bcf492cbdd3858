"""What the WebUI sees of the models."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from a1111_worker.domain import Model, ModelKind
from a1111_worker.models.volume import CacheDirectory
from a1111_worker.models.webui_folder import WebUIFolder


@pytest.fixture
def directory(tmp_path: Path) -> CacheDirectory:
    directory = CacheDirectory(tmp_path / "loras", ModelKind.LORA, is_writable=True)
    directory.prepare()
    return directory


def model(path: Path, content: str) -> Model:
    path.write_text(content)
    return Model(ModelKind.LORA, path.stem, path.name, path, hashlib.sha256(content.encode()).hexdigest(), len(content))


def links(folder: WebUIFolder) -> list[str]:
    return sorted(path.name for path in folder.folder(ModelKind.LORA).iterdir())


def test_the_webui_sees_a_link_to_a_model_under_a_name_of_its_content(
    tmp_path: Path, directory: CacheDirectory
) -> None:
    folder = WebUIFolder(tmp_path / "webui", "me")
    folder.prepare()

    link = folder.show(model(directory.path("a#b.safetensors"), "1"))

    assert link == tmp_path / "webui/Lora/a_b_6b86b273.safetensors"
    assert link.is_symlink()
    assert link.read_bytes() == b"1"
    folders = sorted(path.name for path in (tmp_path / "webui").iterdir())
    assert folders == ["ControlNet", "Lora", "Stable-diffusion", "VAE", "embeddings"]


def test_a_file_with_other_content_has_another_link_and_no_second_one(
    tmp_path: Path, directory: CacheDirectory
) -> None:
    folder = WebUIFolder(tmp_path / "webui", "me")
    folder.prepare()
    folder.show(model(directory.path("a.safetensors"), "1"))

    folder.show(model(directory.path("a.safetensors"), "2"))

    assert links(folder) == ["a_d4735e3a.safetensors"]


def test_a_link_changes_at_once_and_is_hidden_only_by_its_own_model(tmp_path: Path, directory: CacheDirectory) -> None:
    other = CacheDirectory(tmp_path / "source", ModelKind.LORA)
    other.folder.mkdir()
    ours, theirs = (model(where.path("a.safetensors"), "same") for where in (directory, other))
    folder = WebUIFolder(tmp_path / "webui", "me")
    folder.prepare()
    folder.show(ours)

    link = folder.show(theirs)
    folder.hide(ModelKind.LORA, ours.path)

    assert link.readlink() == theirs.path
    folder.hide(ModelKind.LORA, theirs.path)
    assert not link.is_symlink()


def test_the_start_removes_links_and_nothing_else(tmp_path: Path, directory: CacheDirectory) -> None:
    folder = WebUIFolder(tmp_path / "webui", "me")
    folder.prepare()
    folder.show(model(directory.path("good.safetensors"), "1"))
    webui = folder.folder(ModelKind.LORA)
    (webui / "dangling.safetensors").symlink_to(directory.path("gone.safetensors"))
    (webui / "Put models here.txt").write_text("the WebUI's own")

    folder.prepare()

    assert links(folder) == ["Put models here.txt"]


def test_links_of_models_that_went_are_pruned(tmp_path: Path, directory: CacheDirectory) -> None:
    folder = WebUIFolder(tmp_path / "webui", "me")
    folder.prepare()
    stays, goes = (model(directory.path(f"{name}.safetensors"), name) for name in ("stays", "goes"))
    for each in (stays, goes):
        folder.show(each)
    goes.path.unlink()

    folder.prune()

    assert links(folder) == [stays.shown_file]

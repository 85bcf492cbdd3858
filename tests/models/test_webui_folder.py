"""What the WebUI sees of the models."""

from __future__ import annotations

from pathlib import Path

import pytest

from a1111_worker.domain import ModelKind
from a1111_worker.models.volume import CacheDirectory
from a1111_worker.models.webui_folder import WebUIFolder


@pytest.fixture
def directory(tmp_path: Path) -> CacheDirectory:
    directory = CacheDirectory(tmp_path / "loras", ModelKind.LORA, is_writable=True)
    directory.prepare()
    return directory


def test_the_webui_sees_links_to_models_under_their_names(tmp_path: Path, directory: CacheDirectory) -> None:
    directory.path("a.safetensors").write_bytes(b"1")
    webui = WebUIFolder(tmp_path / "webui", "me")
    webui.prepare([directory.folder])

    link = webui.show(ModelKind.LORA, directory.path("a.safetensors"))

    assert link == tmp_path / "webui/Lora/a.safetensors"
    assert link.is_symlink()
    assert link.read_bytes() == b"1"
    assert sorted(path.name for path in (tmp_path / "webui").iterdir()) == ["Lora", "Stable-diffusion", "VAE"]


def test_a_link_changes_at_once_and_is_hidden_only_by_its_own_model(tmp_path: Path, directory: CacheDirectory) -> None:
    other = CacheDirectory(tmp_path / "source", ModelKind.LORA)
    other.folder.mkdir()
    for where in (directory, other):
        where.path("a.safetensors").write_bytes(str(where.folder).encode())
    webui = WebUIFolder(tmp_path / "webui", "me")
    webui.prepare([directory.folder, other.folder])
    webui.show(ModelKind.LORA, directory.path("a.safetensors"))

    link = webui.show(ModelKind.LORA, other.path("a.safetensors"))
    webui.hide(ModelKind.LORA, directory.path("a.safetensors"))

    assert link.read_bytes() == str(other.folder).encode()
    webui.hide(ModelKind.LORA, other.path("a.safetensors"))
    assert not link.is_symlink()


def test_the_start_removes_links_that_lead_nowhere_or_elsewhere(tmp_path: Path, directory: CacheDirectory) -> None:
    webui = WebUIFolder(tmp_path / "webui", "me")
    webui.prepare([directory.folder])
    directory.path("good.safetensors").write_bytes(b"1")
    webui.show(ModelKind.LORA, directory.path("good.safetensors"))
    folder = webui.folder(ModelKind.LORA)
    (tmp_path / "secret").write_text("not a model")
    (folder / "foreign.safetensors").symlink_to(tmp_path / "secret")
    (folder / "dangling.safetensors").symlink_to(directory.path("gone.safetensors"))
    (folder / "Put models here.txt").write_text("the WebUI's own")

    webui.prepare([directory.folder])

    assert sorted(path.name for path in folder.iterdir()) == ["Put models here.txt", "good.safetensors"]


def test_links_of_models_that_went_are_pruned(tmp_path: Path, directory: CacheDirectory) -> None:
    webui = WebUIFolder(tmp_path / "webui", "me")
    webui.prepare([directory.folder])
    for name in ("stays.safetensors", "goes.safetensors"):
        directory.path(name).write_bytes(b"1")
        webui.show(ModelKind.LORA, directory.path(name))
    directory.path("goes.safetensors").unlink()

    webui.prune()

    assert [path.name for path in webui.folder(ModelKind.LORA).iterdir()] == ["stays.safetensors"]

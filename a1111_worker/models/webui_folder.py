"""The folder of models that the WebUI is started on: links to verified files.

    /tmp/webui-models/                                   WEBUI_MODELS_DIR: of this container alone
    ├── Stable-diffusion/jib_mix….safetensors       →    links to models, nothing else
    ├── Lora/detail_tweaker_xl_0d9bd1b8.safetensors →    models/loras/detail_tweaker_xl.safetensors
    ├── ControlNet/…
    ├── embeddings/easynegative_c74b4e81.safetensors →   a name in a prompt: letters, digits, _ and - alone
    └── VAE/~sdxl_vae_63aeecb9.safetensors          →    `~`: no checkpoint's name begins like that

A link's name is `Model.shown_file`: the same name never leads to other content.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from a1111_worker.domain import Model, ModelKind
from a1111_worker.errors import VolumeFailed
from a1111_worker.files import look
from a1111_worker.models.names import short_name

_FOLDERS = {
    ModelKind.CHECKPOINT: "Stable-diffusion",
    ModelKind.LORA: "Lora",
    ModelKind.EMBEDDING: "embeddings",
    ModelKind.VAE: "VAE",
    ModelKind.CONTROLNET: "ControlNet",
}


class WebUIFolder:
    """Links to models, one for each. Other files in the folder are left alone."""

    def __init__(self, root: Path, owner: str) -> None:
        self._root = root
        self._owner = owner

    def prepare(self) -> None:
        """Make the folders, without any link: what an earlier one leads to may have been replaced."""
        for name in _FOLDERS.values():
            folder = self._root / name
            folder.mkdir(parents=True, exist_ok=True)
            for link in folder.iterdir():
                if link.is_symlink():
                    link.unlink(missing_ok=True)

    def folder(self, kind: ModelKind) -> Path:
        return self._root / _FOLDERS[kind]

    def show(self, model: Model) -> Path:
        """Let the WebUI see a model. Returns the link.

        A link under another name is removed: it was made for what the file held before.
        """
        link = self.folder(model.kind) / model.shown_file
        for earlier in self._links_to(model.kind, model.path):
            if earlier != link:
                earlier.unlink(missing_ok=True)
        self._link(link, model.path)
        return link

    def hide(self, kind: ModelKind, path: Path) -> None:
        """Remove the links to this model."""
        for link in self._links_to(kind, path):
            with contextlib.suppress(OSError):
                link.unlink()

    def prune(self) -> None:
        """Remove the links to models that another worker has evicted."""
        for folder in (self._root / name for name in _FOLDERS.values()):
            for link in _children(folder):
                with contextlib.suppress(OSError):
                    if link.is_symlink() and _is_dangling(link):
                        link.unlink()

    def _links_to(self, kind: ModelKind, path: Path) -> Iterator[Path]:
        target = _target(path)
        for link in _children(self.folder(kind)):
            with contextlib.suppress(OSError):
                if link.readlink() == target and not link.name.startswith("."):  # a draft of another thread
                    yield link

    def _link(self, link: Path, path: Path) -> None:
        make_link(link, _target(path), self._owner)


def make_link(link: Path, target: Path, owner: str) -> None:
    """Let a link lead to a file from now on, whatever it led to before. Raises OSError."""
    with contextlib.suppress(OSError):
        if link.readlink() == target:
            return
    draft = link.with_name(f".{short_name(link.name)}.{owner}-{threading.get_ident()}")
    draft.unlink(missing_ok=True)
    draft.symlink_to(target)
    draft.replace(link)  # the old link may be in use: it changes at once


def _target(path: Path) -> Path:
    """Where a link leads: the real folder, but the model's own name, which may itself be somebody's link."""
    return Path(os.path.realpath(path.parent)) / path.name


def _is_dangling(link: Path) -> bool:
    """Whether a link leads to nothing. If the volume does not tell, it may lead to a model in use."""
    try:
        return look(link) is None
    except VolumeFailed:
        return False


def _children(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from list(folder.iterdir())

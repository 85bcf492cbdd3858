"""The folder of models that the WebUI is started on: links to verified files.

/tmp/webui-models/                              WEBUI_MODELS_DIR: of this container alone
├── Stable-diffusion/jib_mix….safetensors  →    links to models, nothing else
├── Lora/…
└── VAE/…
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from a1111_worker.domain import ModelKind
from a1111_worker.errors import VolumeFailed
from a1111_worker.files import look
from a1111_worker.models.names import short_name

log = logging.getLogger(__name__)

_FOLDERS = {ModelKind.CHECKPOINT: "Stable-diffusion", ModelKind.LORA: "Lora"}
_VAE = "VAE"


class WebUIFolder:
    """Links to models, one under each file name. Other files in the folder are left alone."""

    def __init__(self, root: Path, owner: str) -> None:
        self._root = root
        self._owner = owner

    def prepare(self, model_folders: Iterable[Path]) -> None:
        """Make the folders. Remove every link that leads nowhere, or to anything outside `model_folders`."""
        allowed = {os.path.realpath(folder) for folder in model_folders}
        for name in (*_FOLDERS.values(), _VAE):
            folder = self._root / name
            folder.mkdir(parents=True, exist_ok=True)
            for link in folder.iterdir():
                if link.is_symlink() and (_is_dangling(link) or str(link.readlink().parent) not in allowed):
                    log.info("removing %s/%s from what the WebUI sees", name, link.name)
                    link.unlink(missing_ok=True)

    def folder(self, kind: ModelKind) -> Path:
        return self._root / _FOLDERS[kind]

    def show(self, kind: ModelKind, path: Path) -> Path:
        """Let the WebUI see a model under its file name. Returns the link."""
        link = self.folder(kind) / path.name
        self._link(link, path)
        return link

    def show_vae(self, path: Path) -> None:
        self._link(self._root / _VAE / path.name, path)

    def hide(self, kind: ModelKind, path: Path) -> None:
        """Remove the link to this model, if there is one."""
        link = self.folder(kind) / path.name
        with contextlib.suppress(OSError):
            if link.readlink() == _target(path):
                link.unlink()

    def prune(self) -> None:
        """Remove the links to models that another worker has evicted."""
        for folder in (self._root / name for name in (*_FOLDERS.values(), _VAE)):
            for link in _children(folder):
                with contextlib.suppress(OSError):
                    if link.is_symlink() and _is_dangling(link):
                        link.unlink()

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

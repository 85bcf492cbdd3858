"""RunPod's cached models: a repository of Hugging Face that RunPod has put on the host before the worker starts.

/runpod-volume/huggingface-cache/hub/           in the layout of huggingface_hub (its guide "Understand caching")
└── models--OWNER--REPO/
    ├── refs/main                               the commit that a branch meant when the files came
    ├── snapshots/<commit>/path/file.safetensors  →  ../../../blobs/<sha256>
    └── blobs/<sha256>                          a large file is called by its SHA-256

Reading two names and a link is all that is needed. huggingface_hub does the same (`try_to_load_from_cache`), but brings
ten packages along, and joins any text to a path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from a1111_worker.domain import HubFile
from a1111_worker.errors import VolumeFailed
from a1111_worker.files import look, read_small


@dataclass(frozen=True)
class CachedHubFile:
    """A file in the cache. `file` has its commit. `sha256` is what the cache claims, None if it claims nothing."""

    file: HubFile
    path: Path
    sha256: str | None


def find_in_hub_cache(folder: Path, file: HubFile) -> CachedHubFile | None:
    """A file, if it is in the cache. Nothing is verified. A volume that cannot be read has none."""
    repo = folder / f"models--{file.repo.replace('/', '--')}"
    try:
        commit = file.revision if file.is_pinned else read_small(repo / "refs" / file.revision).decode("ascii").strip()
        exact = HubFile(file.repo, file.path, commit)
        path = repo / "snapshots" / commit / file.path
        if not exact.is_pinned or look(path) is None:
            return None
        target = path.resolve()
    except (OSError, ValueError, VolumeFailed):
        return None
    if not target.is_relative_to(folder.resolve()):
        return None
    return CachedHubFile(exact, path, target.name if re.fullmatch(r"[0-9a-f]{64}", target.name) else None)

"""Files on a disk that other processes use too: written whole or not at all, and what a full disk says."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from pathlib import Path

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""How a disk says that it is full. EDQUOT is a quota, as RunPod's network volumes have; `statvfs` may not show it."""


def write_atomically(path: Path, content: bytes) -> None:
    """Have `content` under `path`, whole or not at all. Raises OSError; no draft is left then."""
    draft = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def error_name(error: OSError) -> str:
    """An OSError in one word (`EIO`) that names no path."""
    return errno.errorcode.get(error.errno or 0, type(error).__name__)

"""Files on a disk that other processes use too: written whole or not at all. And the errors of a full disk."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from pathlib import Path

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""The errors of a full disk. EDQUOT is a quota, as RunPod's network volumes have; `statvfs` may not show it."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all. Raises OSError, and leaves no draft then."""
    draft = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def error_name(error: OSError) -> str:
    """The name of an OSError (`EIO`), without its path."""
    return errno.errorcode.get(error.errno or 0, type(error).__name__)

"""Files on a volume that other processes use too: what its errors mean, and how a small file is written and read.

Every OSError of the volume means one of three things, whatever the operation was (open, stat, listdir, statvfs, write,
ftruncate, fsync, close, rename, unlink):

    full      ENOSPC, EDQUOT            VolumeFull: only then models may be evicted
    gone      ENOENT, ENOTDIR, …        no such file: the model is not in the cache, and is fetched again
    broken    EIO, ESTALE, EROFS,       VolumeFailed: nothing is evicted, and nothing is deleted because it could not
              EACCES, ENOTCONN, …       be read

EFBIG is a file that the file system does not take: FileTooLong, a kind of VolumeFull after which nothing is evicted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path

from a1111_worker.errors import FileTooLong, ModelError, VolumeFailed, VolumeFull

SMALL = 1_000_000
"""Bytes of the largest file that `read_small` reads."""


class VolumeState(Enum):
    """What an OSError says about the volume."""

    FULL = "full"
    GONE = "gone"
    BROKEN = "broken"


_STATES = {
    errno.ENOSPC: VolumeState.FULL,
    errno.EDQUOT: VolumeState.FULL,  # a quota, as RunPod's network volumes have; statvfs may not show it
    errno.ENOENT: VolumeState.GONE,
    errno.ENOTDIR: VolumeState.GONE,
    errno.ENAMETOOLONG: VolumeState.GONE,  # no file can have this name
}


def volume_state(error: OSError) -> VolumeState:
    return _STATES.get(error.errno or 0, VolumeState.BROKEN)


def volume_error(error: OSError, doing: str) -> ModelError:
    """An OSError of the volume as one of ours. `doing` says what failed: "writing a model".

    If a file that is gone has a meaning of its own, the caller looks at `volume_state` first.
    """
    failed = f"{doing} failed ({error_name(error)})"
    if error.errno == errno.EFBIG:
        return FileTooLong(
            f"there is no room for it in one file: {failed}",
            hint="use a volume whose file system takes files of this size",
        )
    if volume_state(error) is VolumeState.FULL:
        return VolumeFull(
            f"there is no room on the volume: {failed}",
            hint="use a larger volume, or a smaller cache limit so that older models go",
        )
    return VolumeFailed(
        f"the volume cannot be used: {failed}",
        hint="try again; if it fails again, look whether the volume is mounted and can be read and written",
    )


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Raise an OSError of the block as `volume_error` has it."""
    try:
        yield
    except OSError as error:
        raise volume_error(error, doing) from error


def look(path: Path) -> os.stat_result | None:
    """What is under a path, or None if there is nothing. Raises VolumeFailed if that cannot be found out."""
    try:
        return os.stat(path)  # noqa: PTH116 - Path.stat costs twice as much
    except OSError as error:
        if volume_state(error) is VolumeState.GONE:
            return None
        raise volume_error(error, "looking at a file") from error


def names_in(folder: Path, listdir: Callable[[Path], list[str]] = os.listdir) -> list[str]:
    """The names in a folder; none if there is no such folder. Raises VolumeFailed if it cannot be listed."""
    try:
        return listdir(folder)  # names alone: a folder may have 30,000 files, and Path objects take longer
    except OSError as error:
        if volume_state(error) is VolumeState.GONE:
            return []
        raise volume_error(error, "listing a folder") from error


def create_empty(path: Path, *, exclusive: bool = False) -> None:
    """Make an empty file. If it is there already, that is FileExistsError if `exclusive`. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_EXCL if exclusive else 0), 0o644)
    with contextlib.suppress(OSError):  # it is there, and there is nothing in it that could be lost
        os.close(descriptor)


def read_small(path: Path) -> bytes:
    """The content of a small file. Raises OSError, or ValueError if it is no regular file or larger than 1 MB."""
    # Nonblocking: to open a FIFO would take until somebody writes to it. To a regular file it makes no difference.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is not a regular file")
        if found.st_size > SMALL:
            raise ValueError("it is larger than 1 MB")
        content = b""
        while len(content) <= SMALL and (chunk := os.read(descriptor, SMALL)):
            content += chunk
        return content
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all. Raises OSError, and leaves no draft then."""
    # The name is cut, so that the draft of a file with a long name can be made too.
    name = os.fsdecode(os.fsencode(path.name)[:200])
    draft = path.with_name(f".{name}.{os.getpid()}-{threading.get_ident()}")
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

"""A file that is being downloaded: its bytes on disk, and which of them are there.

    v1590699.w7.part            the bytes, each in its place
    v1590699.w7.part.ranges     {"version": 1, "size": 6938041234, "etag": "\\"5d41…\\"", "sha256": "9f86…",
                                 "boot": "0c1b…", "done": [[0, 4194304], [16777216, 33554432]]}

The `.ranges` file is written after the bytes that it names, and replaced as a whole: if a process dies at any moment,
the bytes that it names are there. Nothing is synced (that can stop everything for seconds on a busy volume), so this is
not certain after a crash of the machine. Then the hash decides. If no hash is known beforehand (`sha256` is null), only
what was written since this machine's start (`boot`) is believed.

Only one process ever writes to a partial file. A worker that is thought dead may have been only paused, perhaps in the
middle of a write. So another worker that goes on with its download moves the bytes into a file of its own.

Errors of the volume are raised as `files.volume_error` has them.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from a1111_worker.errors import PartialFileLost, VolumeFailed
from a1111_worker.files import (
    VolumeState,
    error_name,
    read_small,
    translated,
    volume_error,
    volume_state,
    write_atomically,
)
from a1111_worker.transfer.ranges import ByteRanges, MiB

log = logging.getLogger(__name__)

MOVED_AT_ONCE = 16 * MiB
"""Bytes that are copied, and then cut off from where they were, by `move_bytes`."""


@dataclass(frozen=True)
class PartialFileState:
    """What is known of the file that a partial file belongs to, and which of its bytes are there: (start, end)."""

    size: int
    etag: str | None = None
    sha256: str | None = None
    done: tuple[tuple[int, int], ...] = ()

    @property
    def present(self) -> int:
        """How many bytes are there."""
        return sum(end - start for start, end in self.done)

    def may_be_of(self, size: int | None, sha256: str | None) -> bool:
        """Whether nothing contradicts that it is of the file with this size and hash (None: unknown)."""
        return size in (None, self.size) and (sha256 is None or self.sha256 in (None, sha256))


class PartialFile:
    """An open partial file. `close` it when no thread uses it any more.

    A worker that was thought dead finds that its file is gone, or is another one: another worker goes on with the
    download. Every change looks at that first, and raises PartialFileLost then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with translated("opening a partial file"):
            # Nonblocking: whatever has this name, it is not waited for.
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
            is_regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
        if not is_regular:
            os.close(self._fd)
            raise VolumeFailed("something that is no regular file has the name of a partial file")

    def load_state(self) -> PartialFileState | None:
        """What an earlier download saved; None if there is nothing, or nothing that makes sense."""
        try:
            state, boot = _read_state(self.path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the saved state of a partial file is unreadable; it starts over (%s)", type(error).__name__)
            return None
        if state.sha256 is None and boot != _boot():
            log.info("a partial file without a known hash is from before this machine's start; it starts over")
            return None
        with translated("looking at a partial file"):
            length = os.fstat(self._fd).st_size
        if max((end for _, end in state.done), default=0) > length:
            log.warning("a partial file is shorter than its saved state; it starts over")
            return None
        return state if state.done else None

    def save_state(self, state: PartialFileState) -> None:
        """Save which bytes are there, for a later download. They must have been written."""
        try:
            _write_state(self.path, state)
        except OSError as error:
            # The download itself goes on. It would only start over after a crash.
            log.warning("the state of a partial file could not be saved (%s)", error_name(error))

    def clear(self) -> None:
        """Start over: no bytes, no saved state."""
        self._check_name()
        with translated("starting a partial file over"):
            ranges_file(self.path).unlink(missing_ok=True)
            os.ftruncate(self._fd, 0)

    def set_size(self, size: int) -> None:
        """Give it the size of the whole file. Raises FileTooLong if the file system takes none of that size.

        The bytes between take no room yet. It is reserved by the caller, and a lack of it shows while writing:
        fallocate(2) does not exist on network volumes, and where it exists it made no download faster.
        """
        self._check_name()
        with translated(f"making room for its {size / 1e6:,.0f} MB"):
            os.ftruncate(self._fd, size)

    def write(self, view: memoryview, at: int) -> None:
        self._check_name()
        try:
            while view:
                count = os.pwrite(self._fd, view, at)
                view, at = view[count:], at + count
        except OSError as error:
            raise volume_error(error, "writing the file") from error

    def read_into(self, view: memoryview, at: int) -> int:
        with translated("reading the file back"):
            return os.preadv(self._fd, [view], at)

    def close(self) -> None:
        """Close it. Some volumes say only now that they could not keep the bytes: then read them again."""
        try:
            os.close(self._fd)
        except OSError as error:
            drop_cached(self.path)
            raise volume_error(error, "closing a partial file") from error

    def _check_name(self) -> None:
        try:
            is_ours = os.path.samestat(os.fstat(self._fd), os.lstat(self.path))
        except OSError as error:
            if volume_state(error) is not VolumeState.GONE:
                raise volume_error(error, "looking at a partial file") from error
            is_ours = False
        if not is_ours:
            raise PartialFileLost("another worker goes on with its download", hint="try again")


def ranges_file(part: Path) -> Path:
    """The file in which the state of a partial file is saved."""
    return part.with_name(f"{part.name}.ranges")


def saved_state(part: Path) -> PartialFileState | None:
    """The state of a partial file, whoever it belongs to, as far as its bytes are there. None if it is unknown."""
    try:
        state, _ = _read_state(part)
        length = part.stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return replace(state, done=tuple((start, min(end, length)) for start, end in state.done if start < length))


def move_bytes(source: Path, target: Path, sha256: str, check: Callable[[], None]) -> None:
    """Move the bytes of another owner's partial file into `target`, this owner's, and save its state.

    Both are of the file with this hash. The bytes move from the end to the beginning, so that both files together take
    no more room than one, and whatever ends this (`check` may raise) costs next to nothing. Raises ModelError.
    """
    state = saved_state(source)
    if state is None:
        return
    own = saved_state(target) or PartialFileState(state.size, state.etag)
    with translated("moving a partial file"):
        old = os.open(source, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        new = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            os.ftruncate(new, state.size)
            for start, end in sorted(state.done, reverse=True):
                while start < end:
                    check()
                    begin = max(start, end - MOVED_AT_ONCE)
                    _copy(old, new, begin, end)
                    done = ByteRanges(state.size, [*own.done, (begin, end)]).done()
                    own = PartialFileState(state.size, state.etag, sha256, tuple(done))
                    _write_state(target, own)
                    os.ftruncate(old, begin)
                    end = begin
        finally:
            os.close(old)
            os.close(new)


def drop_cached(path: Path) -> None:
    """Have the next reader read a file from the volume, not from this machine's memory.

    After a write, fsync or close that failed, the memory may hold bytes that the volume never got.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _copy(source: int, target: int, begin: int, end: int) -> None:
    while begin < end:
        chunk = os.pread(source, end - begin, begin)
        if not chunk:
            raise OSError(errno.EIO, "a partial file is shorter than its state")
        begin += os.pwrite(target, chunk, begin)


def _read_state(part: Path) -> tuple[PartialFileState, object]:
    """The saved state, and the `boot` in which it was written. Raises OSError, or an error of a wrong content."""
    raw = json.loads(read_small(ranges_file(part)))
    state = PartialFileState(
        size=_natural(raw["size"]),
        etag=raw["etag"] if isinstance(raw["etag"], str) else None,
        sha256=raw["sha256"] if isinstance(raw["sha256"], str) else None,
        done=tuple((_natural(start), _natural(end)) for start, end in raw["done"]),
    )
    if raw["version"] != 1 or any(end > state.size or start > end for start, end in state.done):
        raise ValueError("ranges beyond the file")
    return state, raw["boot"]


def _write_state(part: Path, state: PartialFileState) -> None:
    """Save the state of a partial file. Raises OSError."""
    saved = {
        "version": 1,
        "size": state.size,
        "etag": state.etag,
        "sha256": state.sha256,
        "boot": _boot(),
        "done": [list(edges) for edges in state.done],
    }
    write_atomically(ranges_file(part), json.dumps(saved).encode())


@functools.cache
def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"unknown to process {os.getpid()}"


def _natural(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError("not a natural number")
    return value

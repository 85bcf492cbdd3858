"""A file that is being downloaded: its bytes on disk, which of them are there, and its SHA-256 while it grows.

    v1590699.w7.part            the bytes, each in its place
    v1590699.w7.part.ranges     {"version": 1, "size": 6938041234, "etag": "\\"5d41…\\"", "sha256": "9f86…",
                                 "boot": "0c1b…", "done": [[0, 4194304], [16777216, 33554432]]}

The `.ranges` file is written after the bytes that it names, and replaced as a whole: if a process dies at any moment,
the bytes that it names are there. Nothing is synced (that can stop everything for seconds on a busy volume), so this is
not certain after a crash of the machine. Then the hash decides. If no hash is known beforehand (`sha256` is null), only
what was written since this machine's start (`boot`) is believed.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from a1111_worker.errors import FileTooLong, PartialFileLost, VolumeFull
from a1111_worker.files import NO_ROOM, error_name, write_atomically
from a1111_worker.transfer.ranges import MiB

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PartialFileState:
    """What is known of the file that a partial file belongs to, and which of its bytes are there: (start, end)."""

    size: int
    etag: str | None = None
    sha256: str | None = None
    done: tuple[tuple[int, int], ...] = ()

    def may_be_of(self, size: int | None, sha256: str | None) -> bool:
        """Whether nothing contradicts that it is of the file with this size and hash (None: unknown)."""
        return size in (None, self.size) and (sha256 is None or self.sha256 in (None, sha256))


class PartialFile:
    """An open partial file. `close` it when no thread uses it any more.

    Another worker takes over, by rename, the partial file of a worker that it thinks dead. That worker may have been
    silent only for a while (paused, cut off), and the file that it has open may be a verified model by now. So every
    change checks first that the file still has its name; else it raises PartialFileLost.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise volume_error(error) from error

    def load_state(self) -> PartialFileState | None:
        """What an earlier download saved; None if there is nothing, or nothing that makes sense."""
        try:
            raw = json.loads(ranges_file(self.path).read_bytes())
            state = PartialFileState(
                size=_natural(raw["size"]),
                etag=raw["etag"] if isinstance(raw["etag"], str) else None,
                sha256=raw["sha256"] if isinstance(raw["sha256"], str) else None,
                done=tuple((_natural(start), _natural(end)) for start, end in raw["done"]),
            )
            if state.sha256 is None and raw["boot"] != _boot():
                log.info("a partial file without a known hash is from before this machine's start; it starts over")
                return None
            if raw["version"] != 1 or any(end > state.size or start > end for start, end in state.done):
                raise ValueError("ranges beyond the file")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the saved state of a partial file is unreadable; it starts over (%s)", type(error).__name__)
            return None
        if state.done and max(end for _, end in state.done) > os.fstat(self._fd).st_size:
            log.warning("a partial file is shorter than its saved state; it starts over")
            return None
        return state

    def save_state(self, state: PartialFileState) -> None:
        """Save which bytes are there, for a later download. They must have been written."""
        saved = {
            "version": 1,
            "size": state.size,
            "etag": state.etag,
            "sha256": state.sha256,
            "boot": _boot(),
            "done": [list(edges) for edges in state.done],
        }
        try:
            write_atomically(ranges_file(self.path), json.dumps(saved).encode())
        except OSError as error:
            # The download itself goes on. It would only start over after a crash.
            log.warning("the state of a partial file could not be saved (%s)", error_name(error))

    def clear(self) -> None:
        """Start over: no bytes, no saved state."""
        self._check_name()
        ranges_file(self.path).unlink(missing_ok=True)
        os.ftruncate(self._fd, 0)

    def allocate(self, size: int) -> None:
        """Reserve room for the whole file before its first byte. Raises VolumeFull if there is none.

        This is fallocate(2) itself: glibc's posix_fallocate writes every block if a file system (FUSE, most network
        volumes) does not support it. There the file only gets its length, and a lack of room shows while writing.
        """
        self._check_name()
        before = os.fstat(self._fd).st_size
        try:
            if before > size or not size or not _fallocate(self._fd, size):
                os.ftruncate(self._fd, size)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, min(before, size))  # gives back what was allocated before room ran out
            raise volume_error(error, size) from error

    def write(self, view: memoryview, at: int) -> None:
        self._check_name()
        try:
            while view:
                count = os.pwrite(self._fd, view, at)
                view, at = view[count:], at + count
        except OSError as error:
            raise volume_error(error) from error

    def read_into(self, view: memoryview, at: int) -> int:
        return os.preadv(self._fd, [view], at)

    def truncate(self, size: int) -> None:
        self._check_name()
        os.ftruncate(self._fd, size)

    def close(self) -> None:
        os.close(self._fd)

    def _check_name(self) -> None:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._fd), os.lstat(self.path)):
                return
        raise PartialFileLost("another worker took over its partial file", hint="try again")


class StreamingHasher:
    """The SHA-256 of a partial file while it grows, computed in a thread from what the page cache holds.

    `contiguous` returns how many bytes are there without a gap, and whether these are all. When `finished` is set,
    either `sha256` or `error` is too, unless it was stopped.
    """

    def __init__(self, part: PartialFile, contiguous: Callable[[], tuple[int, bool]]) -> None:
        self._part = part
        self._contiguous = contiguous
        self._wake = threading.Event()
        self._is_stopped = False
        self._busy_seconds = 0.0
        self.hashed_bytes = 0
        self.sha256: str | None = None
        self.error: OSError | None = None
        self.finished = threading.Event()
        self._thread = threading.Thread(target=self._run, name="download-sha256", daemon=True)
        self._thread.start()

    @property
    def speed(self) -> float:
        """Bytes a second while it has some to hash; 0 until that is known."""
        return self.hashed_bytes / self._busy_seconds if self._busy_seconds > 0.02 else 0.0

    def wake(self) -> None:
        """There is more to read, or everything is there. Without this it notices a moment later."""
        self._wake.set()

    def stop(self, timeout: float | None = None) -> bool:
        """End it. Returns whether its thread has ended."""
        self._is_stopped = True
        self._wake.set()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(MiB))
        try:
            while not self._is_stopped:
                there, is_all = self._contiguous()
                if self.hashed_bytes >= there:
                    if is_all:
                        self.sha256 = digest.hexdigest()
                        return
                    self._wake.wait(0.05)
                    self._wake.clear()
                    continue
                began = time.monotonic()
                count = self._part.read_into(buffer[: min(len(buffer), there - self.hashed_bytes)], self.hashed_bytes)
                if not count:
                    raise OSError(errno.EIO, "the partial file is shorter than what was written to it")
                digest.update(buffer[:count])
                self._busy_seconds += time.monotonic() - began
                self.hashed_bytes += count
        except OSError as error:
            self.error = error
        finally:
            self.finished.set()


def ranges_file(part: Path) -> Path:
    """The file in which the state of a partial file is saved."""
    return part.with_name(f"{part.name}.ranges")


def volume_error(error: OSError, needed: int | None = None) -> VolumeFull:
    """An error of the disk as one of ours. `needed`: the model's bytes, if room for all of them was asked for."""
    purpose = f" for the {needed / 1e6:,.0f} MB of this model" if needed else " to write the rest of this model"
    if error.errno == errno.EFBIG:
        return FileTooLong(
            f"there is no room{purpose} in one file", hint="use a volume whose file system takes files of this size"
        )
    if error.errno in NO_ROOM:
        return VolumeFull(
            f"there is no room{purpose}", hint="use a larger volume, or a smaller cache limit so that older models go"
        )
    return VolumeFull(f"the models folder cannot be written ({error_name(error)})")


@functools.cache
def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"unknown to process {os.getpid()}"


def _natural(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError("not a natural number")
    return value


def _fallocate(fd: int, size: int) -> bool:
    """Allocate with fallocate(2). False if the system or the file system does not have it."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "fallocate"):
        return False
    while libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True

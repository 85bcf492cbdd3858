"""A file that is being downloaded: its bytes on disk, what is remembered beside it, and its SHA-256 on the way.

    v1590699.w7.part            the bytes, each where it belongs
    v1590699.w7.part.ranges     {"version": 1, "size": 6938041234, "etag": "\\"5d41…\\"", "sha256": "9f86…",
                                 "boot": "0c1b…", "done": [[0, 4194304], [16777216, 33554432]]}

The `.ranges` file is written after the bytes it names, and replaced as a whole: whichever process dies at any moment,
what it says is there is there. Nothing is synced (that can stop everything for seconds on a busy volume), so after a
crash of the machine this is not certain. The hash decides then; where none is known beforehand (`sha256` is null),
only what was written since this machine's start (`boot`) is believed.
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
from a1111_worker.transfer.ranges import MiB

log = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class PartialFileState:
    """What is known of the file that a part belongs to, and which of its bytes are there."""

    size: int
    etag: str | None = None
    sha256: str | None = None
    done: tuple[tuple[int, int], ...] = ()

    @property
    def present(self) -> int:
        return sum(end - start for start, end in self.done)


class PartialFile:
    """An open part. `close` it when nobody writes any more.

    A worker that was silent for a while (paused, cut off) is thought dead, and its part taken over by rename: the open
    file may be a proven model by then. So whatever changes it looks first whether it still has its name, else PartialFileLost.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise _refused(error, None) from error

    def recall(self) -> PartialFileState | None:
        """What an earlier download left, or None where there is nothing, or nothing that makes sense."""
        try:
            raw = json.loads(ranges_file(self.path).read_bytes())
            memory = PartialFileState(
                size=_natural(raw["size"]),
                etag=raw["etag"] if isinstance(raw["etag"], str) else None,
                sha256=raw["sha256"] if isinstance(raw["sha256"], str) else None,
                done=tuple((_natural(start), _natural(end)) for start, end in raw["done"]),
            )
            if memory.sha256 is None and raw["boot"] != _boot():
                log.info("a part without a known hash is from before this machine's start, it starts over")
                return None
            if raw["version"] != 1 or any(end > memory.size or start > end for start, end in memory.done):
                raise ValueError("ranges beyond the file")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("what was remembered of a part is unreadable, it starts over (%s)", type(error).__name__)
            return None
        if memory.done and max(end for _, end in memory.done) > os.fstat(self._fd).st_size:
            log.warning("a part is shorter than what was remembered of it, it starts over")
            return None
        return memory

    def remember(self, memory: PartialFileState) -> None:
        text = json.dumps(
            {
                "version": 1,
                "size": memory.size,
                "etag": memory.etag,
                "sha256": memory.sha256,
                "boot": _boot(),
                "done": [list(range_) for range_ in memory.done],
            }
        )
        target = ranges_file(self.path)
        fresh = target.with_name(f"{target.name}.new")
        try:
            fresh.write_text(text)
            fresh.replace(target)
        except OSError as error:
            # The download itself goes on: it only would start over after a crash.
            log.warning("cannot remember how far a part is (%s)", errno.errorcode.get(error.errno or 0, "?"))

    def forget(self) -> None:
        """Start over: no bytes, nothing remembered."""
        self._require_own()
        ranges_file(self.path).unlink(missing_ok=True)
        os.ftruncate(self._fd, 0)

    def settle(self, size: int) -> None:
        """Have room for the whole file before its first byte; VolumeFull where there is none.

        fallocate(2) itself, since glibc's posix_fallocate writes every block where a file system (FUSE, most network
        volumes) does not know it; there the file only gets its length, and room is found out while writing.
        """
        self._require_own()
        before = os.fstat(self._fd).st_size
        try:
            if before > size or not size or not _allocate(self._fd, size):
                os.ftruncate(self._fd, size)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, min(before, size))  # gives back what was allocated before room ran out
            raise _refused(error, size) from error

    def write(self, view: memoryview, at: int) -> None:
        self._require_own()
        try:
            while view:
                count = os.pwrite(self._fd, view, at)
                view, at = view[count:], at + count
        except OSError as error:
            raise _refused(error, None) from error

    def read_into(self, view: memoryview, at: int) -> int:
        return os.preadv(self._fd, [view], at)

    def truncate(self, size: int) -> None:
        self._require_own()
        os.ftruncate(self._fd, size)

    def close(self) -> None:
        os.close(self._fd)

    def _require_own(self) -> None:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._fd), os.lstat(self.path)):
                return
        raise PartialFileLost("what had come of it was taken over by another worker", hint="try again")


class StreamingHasher:
    """The SHA-256 of a part while it grows, in a thread of its own: read back from the page cache at its front.

    `front` says up to where the file is there, and whether that is all of it.
    """

    def __init__(self, part: PartialFile, front: Callable[[], tuple[int, bool]]) -> None:
        self._part = part
        self._front = front
        self._wake = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="download-sha256", daemon=True)
        self._busy = 0.0
        self.at = 0  # up to here it is hashed
        self.sha256: str | None = None
        self.error: OSError | None = None
        self.done = threading.Event()
        self._thread.start()

    @property
    def speed(self) -> float:
        """Bytes a second, while there are some to hash; 0 as long as nobody knows."""
        return self.at / self._busy if self._busy > 0.02 else 0.0

    def wake(self) -> None:
        """There is more (or all) to read; without it that is noticed a moment later."""
        self._wake.set()

    def stop(self, timeout: float | None = None) -> bool:
        """End it, and say whether it has ended."""
        self._stopped = True
        self._wake.set()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(MiB))
        try:
            while not self._stopped:
                front, is_all = self._front()
                if self.at >= front:
                    if is_all:
                        self.sha256 = digest.hexdigest()
                        return
                    self._wake.wait(0.05)
                    self._wake.clear()
                    continue
                began = time.monotonic()
                count = self._part.read_into(buffer[: min(len(buffer), front - self.at)], self.at)
                if not count:
                    raise OSError(errno.EIO, "the part is shorter than what was written to it")
                digest.update(buffer[:count])
                self._busy += time.monotonic() - began
                self.at += count
        except OSError as error:
            self.error = error
        finally:
            self.done.set()


def ranges_file(part: Path) -> Path:
    """Where it is remembered which bytes of a part are there."""
    return part.with_name(f"{part.name}.ranges")


@functools.cache
def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"unknown to process {os.getpid()}"


def _natural(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError("not a natural number")
    return value


def _allocate(fd: int, size: int) -> bool:
    """Allocate with fallocate(2); False where the system or the file system does not have it."""
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


def _refused(error: OSError, needed: int | None) -> VolumeFull:
    wanted = f" for the {needed / 1e6:,.0f} MB of this model" if needed else " to write the rest of this model"
    if error.errno == errno.EFBIG:
        return FileTooLong(
            f"there is no room{wanted} in one file", hint="a volume whose file system takes files of this size"
        )
    if error.errno in _FULL:
        return VolumeFull(
            f"there is no room{wanted}", hint="a larger volume, or a smaller cache limit so that older models go"
        )
    name = errno.errorcode.get(error.errno or 0, type(error).__name__)
    return VolumeFull(f"the models folder cannot be written ({name})")

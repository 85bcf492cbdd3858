"""Files are read into the page cache, so that the WebUI loads them from memory.

A checkpoint has gigabytes, and a network volume delivers some hundred megabytes a second.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from a1111_worker.files import error_name

log = logging.getLogger(__name__)

_CHUNK = 8 * 1024 * 1024


@contextlib.contextmanager
def read_ahead(paths: Sequence[Path]) -> Iterator[None]:
    """Read files in a thread of their own while the block runs. It stops at the block's end."""
    if not paths:
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_read_all, args=(paths, stop), name="read-ahead", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()  # it is not waited for: one read of a slow volume may take long


def _read_all(paths: Sequence[Path], stop: threading.Event) -> None:
    buffer = bytearray(_CHUNK)
    for path in paths:
        try:
            read = _read(path, buffer, stop)
        except OSError as error:
            log.warning("%s could not be read ahead (%s)", path.name, error_name(error))
        else:
            log.info("%.1f MB of %s were read ahead", read / 1e6, path.name)


def _read(path: Path, buffer: bytearray, stop: threading.Event) -> int:
    """Bytes that were read before the end, or before `stop` was set."""
    total = 0
    # Nonblocking: to open a FIFO would take until somebody writes to it. To a regular file it makes no difference.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        while not stop.is_set() and (count := os.readv(descriptor, [buffer])):
            total += count
    finally:
        os.close(descriptor)
    return total

"""Memory that a large result left free goes back to the system.

glibc keeps what was freed between two blocks that are still in use; 50 results of 20 MB left the worker at twice the
size of the second one without this, and below it with (python -m benchmarks.memory).
"""

from __future__ import annotations

import contextlib
import ctypes


def release_free_memory() -> None:
    """Return free memory to the system; a few milliseconds, without the GIL. Does nothing where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)

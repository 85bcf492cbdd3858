"""Give memory that a large result has left free back to the system.

glibc keeps what was freed between two blocks that are still in use. Without this, 50 results of 20 MB left the worker
at twice its size after the second result; with it, below that size (python -m benchmarks.memory).
"""

from __future__ import annotations

import contextlib
import ctypes

_M_ARENA_MAX = -8  # glibc's malloc.h


def use_few_arenas() -> None:
    """Let all threads share two of malloc's arenas. Call it before threads start. Without glibc it does nothing.

    Else glibc makes up to eight for each core, and each keeps a part of what was freed there: after jobs with large
    pictures the idle worker had two to three times its size (python -m benchmarks.memory).
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


def release_free_memory() -> None:
    """Return free memory to the system. Takes a few milliseconds, without the GIL. Without glibc it does nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)

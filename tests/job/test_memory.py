"""Free memory goes back to the system."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LEAVE_HOLES = """
from a1111_worker.job.memory import release_free_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

blocks = [bytes(100_000) for _ in range(2000)]  # below glibc's threshold for a mapping of their own
kept = blocks[::50]
del blocks
before = resident()
release_free_memory()
print(before - resident(), len(kept))
"""


def test_free_memory_between_blocks_in_use_is_returned_to_the_system() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEAVE_HOLES],
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        check=True,
        env={"MALLOC_ARENA_MAX": "1"},
    )

    assert int(done.stdout.split()[0]) > 100_000_000

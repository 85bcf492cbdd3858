"""Free memory goes back to the system."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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


COUNT_ARENAS = """
import ctypes, sys, threading
from a1111_worker.job.memory import use_few_arenas

if sys.argv[1] == "few":
    use_few_arenas()
all_there = threading.Barrier(8)

def allocate():
    block = bytes(100_000)
    all_there.wait()

threads = [threading.Thread(target=allocate) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen(sys.argv[2].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.parametrize(("how", "is_few"), [("few", True), ("many", False)])
def test_all_threads_share_two_arenas(how: str, is_few: bool, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", COUNT_ARENAS, how, str(tmp_path / "info.xml")],
        cwd=Path(__file__).parent.parent.parent,
        check=True,
        env={},
    )

    arenas = (tmp_path / "info.xml").read_text().count("<heap nr=")
    assert (arenas <= 2) is is_few

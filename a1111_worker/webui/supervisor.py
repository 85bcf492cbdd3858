"""Who keeps the WebUI alive: start.sh, told through its state file. Only the pid in that file may ever be signalled.

The file holds the WebUI's pid, or `failed: WHY` when start.sh has given up. Without a file nobody of ours owns the
WebUI.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path


class Ownership(Enum):
    """What the state file says. RESTARTING: a pid that is gone, and start.sh has not given up."""

    NOBODY = "nobody"
    RUNNING = "running"
    RESTARTING = "restarting"
    FAILED = "failed"


def boot_time() -> float:
    """When this machine was booted, in seconds since the epoch; a clock that is set moves it."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


class Supervisor:
    """Reads `state_file` (None: nobody owns the WebUI) anew at every question."""

    def __init__(self, state_file: Path | None, boot_time: Callable[[], float] = boot_time) -> None:
        self._state_file = state_file
        self._boot_time = boot_time
        # What the file named when it was first seen: a pid, its own time, and when that process began, in clock ticks.
        self._named: tuple[int, int, int | None] = (0, 0, None)

    @property
    def ownership(self) -> Ownership:
        said = self._said()
        if said.startswith("failed"):
            return Ownership.FAILED
        pid = _pid(said)
        if pid is None:
            return Ownership.NOBODY
        return Ownership.RUNNING if self._is_alive(pid) else Ownership.RESTARTING

    @property
    def failure(self) -> str:
        """Why start.sh has given up; empty if it has not, or did not say."""
        said = self._said()
        return said.partition(": ")[2] if said.startswith("failed") else ""

    @property
    def life(self) -> str:
        """What tells one life of the WebUI from the next; always the same where nobody of ours owns it."""
        return self._said()

    def kill(self, *, wait: float) -> bool:
        """Kill the WebUI and what it started, and return when it is gone, or after `wait` seconds.

        False where there is none of ours; True where it is gone or being restarted. Its process group is killed where
        it leads one, as start.sh makes it.
        """
        pid = _pid(self._said())
        if pid is None:
            return False
        if self._is_alive(pid):
            with contextlib.suppress(ProcessLookupError):
                if os.getpgid(pid) == pid:
                    os.killpg(pid, signal.SIGKILL)
                else:
                    os.kill(pid, signal.SIGKILL)
        until = time.monotonic() + wait
        while self._is_alive(pid) and time.monotonic() < until:
            time.sleep(0.02)
        return True

    def _said(self) -> str:
        if self._state_file is None:
            return ""
        try:
            return self._state_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return ""

    def _is_alive(self, pid: int) -> bool:
        """Whether the WebUI of that pid lives: neither dead and unburied, nor another process that got its number."""
        try:
            # After the name in brackets: the state first, the start in clock ticks after boot as the 20th (man 5 proc).
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            written = self._state_file.stat().st_mtime_ns if self._state_file else 0
        except (OSError, ValueError):
            return False
        state, started = fields[0], int(fields[19])
        named = self._named
        if named[:2] != (pid, written):
            # Once, and never again: a worker that was frozen wakes up with a clock that has jumped.
            is_older = self._boot_time() + started / os.sysconf("SC_CLK_TCK") <= written / 1e9 + 2.0
            named = self._named = (pid, written, started if is_older else None)
        return state not in "ZX" and started == named[2]


def _pid(said: str) -> int | None:
    """The pid a state file names; never 0, 1 or a negative one, which would signal others."""
    return int(said) if said.isascii() and said.isdigit() and int(said) > 1 else None

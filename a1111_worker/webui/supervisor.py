"""Who keeps the WebUI alive: start.sh, through a state file. Only the process that the file names may be signalled.

The file holds one of these:

    1234          the WebUI's pid; start.sh starts another one when it ends
    failed: WHY   start.sh has given up, and why
    (no file)     start.sh does not own the WebUI
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path


class Ownership(Enum):
    """Who is responsible for the WebUI, by the state file. It does not tell whether the WebUI's process lives."""

    NOBODY = "nobody of ours"
    START_SH = "start.sh, which restarts it when it ends"
    GIVEN_UP = "start.sh, which has given up"


def boot_time() -> float:
    """When this machine was booted, in seconds since the epoch; setting the clock changes it."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


class Supervisor:
    """Reads `state_file` anew for every answer. None: start.sh does not own the WebUI."""

    def __init__(self, state_file: Path | None, boot_time: Callable[[], float] = boot_time) -> None:
        self._state_file = state_file
        self._boot_time = boot_time
        self._identified: _NamedProcess | None = None

    @property
    def ownership(self) -> Ownership:
        state, process = self._read()
        if state.startswith("failed"):
            return Ownership.GIVEN_UP
        return Ownership.NOBODY if process is None else Ownership.START_SH

    @property
    def instance_id(self) -> str:
        """A text that differs for each process of the WebUI; always the same if start.sh does not own it."""
        state, _ = self._read()
        return state

    @property
    def failure(self) -> str:
        """Why start.sh has given up; empty if it has not, or did not say."""
        state, _ = self._read()
        return state.partition(": ")[2] if state.startswith("failed") else ""

    def kill(self, *, wait: float) -> bool:
        """Kill the WebUI and the processes that it started. Returns when it is gone, or after `wait` seconds.

        False if start.sh does not own the WebUI; True if it is gone, or is being restarted. Its process group is killed
        if it leads one; start.sh makes it the leader of one.
        """
        _, process = self._read()
        if process is None:
            return False
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                if os.getpgid(process.pid) == process.pid:
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    os.kill(process.pid, signal.SIGKILL)
        end = time.monotonic() + wait
        while process.is_alive() and time.monotonic() < end:
            time.sleep(0.02)
        return True

    def _read(self) -> tuple[str, _NamedProcess | None]:
        """The state file's content, and the process that it names."""
        if self._state_file is None:
            return "", None
        try:
            state = self._state_file.read_text(encoding="ascii").strip()
            written = self._state_file.stat().st_mtime_ns
        except (OSError, UnicodeDecodeError):
            return "", None
        pid = _parse_pid(state)
        if pid is None:
            return state, None
        process = self._identified
        if process is None or (process.pid, process.written) != (pid, written):
            # Once for each pid, as soon as it is seen: a worker that was frozen wakes up with a clock that has jumped.
            process = self._identified = _identify(pid, written, self._boot_time())
        return state, process


@dataclass(frozen=True)
class _NamedProcess:
    """The process that a state file names. `written` is the file's time in nanoseconds since the epoch.

    `started` is when the process began, in clock ticks after boot. None: it had ended, or another process had got its
    pid, when the file was first read.
    """

    pid: int
    written: int
    started: int | None

    def is_alive(self) -> bool:
        """Whether it lives: it is no zombie, and no other process has got its pid."""
        state, started = _read_proc_stat(self.pid)
        return started is not None and started == self.started and state not in "ZX"


def _identify(pid: int, written: int, boot_time: float) -> _NamedProcess:
    """The process that a state file names. One that began after the file was written is another, with the same pid."""
    _, started = _read_proc_stat(pid)
    if started is not None and boot_time + started / os.sysconf("SC_CLK_TCK") > written / 1e9 + 2.0:
        started = None
    return _NamedProcess(pid, written, started)


def _read_proc_stat(pid: int) -> tuple[str, int | None]:
    """A process's state (one letter) and its start in clock ticks after boot. An ended process has no start."""
    try:
        # After the name in brackets: the state is the first field, the start the 20th (man 5 proc).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, ValueError, IndexError):
        return "X", None


def _parse_pid(state: str) -> int | None:
    """The pid in a state file; never 0, 1 or a negative one, which would signal other processes."""
    return int(state) if state.isascii() and state.isdigit() and int(state) > 1 else None

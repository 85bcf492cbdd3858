"""A whole worker whose WebUI lives and dies as under start.sh.

The WebUI is the sandbox's. A real process, whose pid is in the state file, lives and dies with it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from sandbox.server import Exchange
from tests.support import World, world


class FakeStartSh:
    """Restarts the sandbox's WebUI when its process ends, as start.sh does. `restarted` counts that."""

    def __init__(self, it: World, state_file: Path) -> None:
        self._it = it
        self._state_file = state_file
        self._stopped = False
        self.restarted = 0
        self._down = threading.Event()
        self.may_restart = threading.Event()
        self.may_restart.set()
        self._process = self._spawn()
        it.webui.before.append(self._reset_if_dead)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def kill(self) -> None:
        """Kill the WebUI, and return when it is down."""
        self._down.clear()
        self._process.kill()
        self._down.wait(20)

    def stop(self) -> None:
        self._stopped = True
        self.may_restart.set()
        self._process.kill()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped:
            self._process.wait()
            self._it.webui.crash()
            self._down.set()
            self.may_restart.wait(20)
            if not self._is_over():
                self._process = self._spawn()
                self.restarted += 1
                self._it.webui.restart()
        self._process.kill()  # it may have been started during `stop`
        self._process.wait()

    def _is_over(self) -> bool:
        return self._stopped

    def _reset_if_dead(self, exchange: Exchange) -> bool:
        """A dead process answers nothing, also in the moment before its server is down."""
        with contextlib.suppress(ChildProcessError):  # it was waited for already
            if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return False
        exchange.reset()
        return True

    def _spawn(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(["sleep", "600"], start_new_session=True)
        self._state_file.write_text(str(process.pid))
        return process


@contextlib.contextmanager
def supervised(folder: Path, *, boot: bool = True, **settings: str) -> Iterator[tuple[World, FakeStartSh]]:
    """A worker, booted if `boot`, whose WebUI a FakeStartSh restarts."""
    state_file = folder / "webui.state"
    with world(folder, boot=False, WEBUI_STATE_FILE=str(state_file), **settings) as it:
        start_sh = FakeStartSh(it, state_file)
        try:
            if boot:
                it.boot()
            yield it, start_sh
        finally:
            start_sh.stop()


class HeldRequest:
    """Holds the next request to `path` until the worker gives it up; `is_running` tells whether it is held now.

    `head` is the beginning of a body, sent before that.
    """

    def __init__(self, it: World, path: str, *, head: bytes | None = None) -> None:
        self._path = path
        self._head = head
        self.is_running = False
        self._once = threading.Lock()
        it.webui.before.append(self._hold)

    def _hold(self, exchange: Exchange) -> bool:
        if exchange.asked.path != self._path or not self._once.acquire(blocking=False):
            return False
        self.is_running = True
        if self._head is not None:
            exchange.begin(200, {"content-type": "application/json", "content-length": "100000"})
            exchange.write(self._head)
        exchange.hold()
        self.is_running = False
        return True


def when_asked(it: World, path: str, do: Callable[[], None]) -> None:
    """Call `do` once, at the next request to `path`, before the WebUI answers it."""
    once = threading.Lock()

    def watch(exchange: Exchange) -> bool:
        if exchange.asked.path == path and once.acquire(blocking=False):
            do()
        return False

    it.webui.before.append(watch)


def silence(it: World) -> None:
    """From now on, this process of the WebUI answers nothing."""
    process = it.webui.process

    def hold(exchange: Exchange) -> bool:
        if it.webui.process is not process:
            return False
        exchange.hold(20)
        return True

    it.webui.before.append(hold)


def runs(pid: int) -> bool:
    """Whether a process lives: it is no zombie."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False

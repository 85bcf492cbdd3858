"""Who owns the WebUI, as the state file says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from a1111_worker.webui.supervisor import Ownership, Supervisor, boot_time


def a_dead_pid() -> str:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return str(child.pid)


# what the file says, and what it means
ROWS = [
    ("failed\n", Ownership.FAILED),
    ("failed: it ended with status 137\n", Ownership.FAILED),
    ("", Ownership.NOBODY),  # caught in the middle of something
    ("-1", Ownership.NOBODY),  # would signal every process there is
    ("0", Ownership.NOBODY),  # would signal our own group
    ("1", Ownership.NOBODY),  # init is never the WebUI
    ("²", Ownership.NOBODY),
    ("1e3", Ownership.NOBODY),
]


@pytest.mark.parametrize(("said", "means"), ROWS)
def test_the_state_file_says_who_owns_the_webui(tmp_path: Path, said: str, means: Ownership) -> None:
    file = tmp_path / "webui.state"
    file.write_text(said, encoding="utf-8")

    assert Supervisor(file).ownership is means


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_live_pid_means_running(tmp_path: Path, end: str) -> None:
    file = tmp_path / "webui.state"
    file.write_text(f"{os.getpid()}{end}")

    assert Supervisor(file).ownership is Ownership.RUNNING


def test_a_pid_that_another_process_got_since_is_not_the_webui(tmp_path: Path) -> None:
    file = tmp_path / "webui.state"
    other = subprocess.Popen(["sleep", "60"])
    file.write_text(str(other.pid))
    os.utime(file, (1_000_000_000, 1_000_000_000))  # written long before that process began

    supervisor = Supervisor(file)

    assert supervisor.ownership is Ownership.RESTARTING
    assert supervisor.kill(wait=0.0)
    assert other.poll() is None
    other.kill()
    other.wait()


def test_a_clock_that_jumps_changes_nothing_about_who_runs(tmp_path: Path) -> None:
    file = tmp_path / "webui.state"
    webui = subprocess.Popen(["sleep", "60"], start_new_session=True)
    file.write_text(str(webui.pid))
    jumps = [0.0, 3600.0, -3600.0]
    supervisor = Supervisor(file, boot_time=lambda: boot_time() + jumps[0])

    before = supervisor.ownership
    after = []
    for _ in range(2):
        del jumps[0]
        after.append(supervisor.ownership)
    killed = supervisor.kill(wait=0.0)

    assert (before, after) == (Ownership.RUNNING, [Ownership.RUNNING, Ownership.RUNNING])
    assert killed and webui.wait() == -signal.SIGKILL


def test_a_process_that_took_the_webuis_number_stays_another_one_whatever_the_clock_says_later(tmp_path: Path) -> None:
    file = tmp_path / "webui.state"
    other = subprocess.Popen(["sleep", "60"])
    file.write_text(str(other.pid))
    os.utime(file, (1_000_000_000, 1_000_000_000))
    jumps = [0.0, -2e9]
    supervisor = Supervisor(file, boot_time=lambda: boot_time() + jumps[0])

    before = supervisor.ownership
    del jumps[0]

    assert (before, supervisor.ownership) == (Ownership.RESTARTING, Ownership.RESTARTING)
    assert supervisor.kill(wait=0.0)
    assert other.poll() is None
    other.kill()
    other.wait()


def test_a_killed_webui_takes_its_children_along(tmp_path: Path) -> None:
    file = tmp_path / "webui.state"
    leader = subprocess.Popen(
        ["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert leader.stdout is not None
    child = int(leader.stdout.readline())
    file.write_text(str(leader.pid))

    killed = Supervisor(file).kill(wait=10.0)
    leader.wait()
    leader.stdout.close()

    assert killed
    assert Supervisor(file).ownership is Ownership.RESTARTING
    while runs(child):  # it dies when the kernel gets to it; the test's own timeout ends one that does not
        threading.Event().wait(0.01)


def runs(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("said", ["failed", "failed: 4242", "", "1", "-1"])
def test_what_is_not_ours_is_never_killed(tmp_path: Path, said: str) -> None:
    file = tmp_path / "webui.state"
    file.write_text(said)

    assert Supervisor(file).kill(wait=0.0) is False
    assert Supervisor(None).kill(wait=0.0) is False


def test_a_pid_that_is_gone_means_being_restarted(tmp_path: Path) -> None:
    file = tmp_path / "webui.state"
    file.write_text(a_dead_pid())

    assert Supervisor(file).ownership is Ownership.RESTARTING


def test_without_a_file_nobody_of_ours_owns_it(tmp_path: Path) -> None:
    assert Supervisor(None).ownership is Ownership.NOBODY
    assert Supervisor(tmp_path / "none").ownership is Ownership.NOBODY

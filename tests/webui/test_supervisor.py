"""Who owns the WebUI, by its state file, and whether the process that the file names lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from a1111_worker.webui.supervisor import Ownership, Supervisor, boot_time
from tests.support import wait_until
from tests.webui.supervised import runs


def a_dead_pid() -> str:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return str(child.pid)


# what the file holds, and who is responsible for the WebUI then
STATES = [
    ("1234", Ownership.START_SH),
    ("1234\n", Ownership.START_SH),
    ("failed\n", Ownership.GIVEN_UP),
    ("failed: it ended with status 137\n", Ownership.GIVEN_UP),
    ("", Ownership.NOBODY),  # read while it is written
    ("-1", Ownership.NOBODY),  # would signal every process there is
    ("0", Ownership.NOBODY),  # would signal our own group
    ("1", Ownership.NOBODY),  # init is never the WebUI
    ("²", Ownership.NOBODY),
    ("1e3", Ownership.NOBODY),
]


@pytest.mark.parametrize(("state", "ownership"), STATES)
def test_the_state_file_tells_who_owns_the_webui(tmp_path: Path, state: str, ownership: Ownership) -> None:
    file = tmp_path / "webui.state"
    file.write_text(state, encoding="utf-8")

    assert Supervisor(file).ownership is ownership


@pytest.mark.parametrize("end", ["", "\n"])
def test_the_process_of_the_pid_is_killed(tmp_path: Path, end: str) -> None:
    file = tmp_path / "webui.state"
    webui = subprocess.Popen(["sleep", "60"], start_new_session=True)
    file.write_text(f"{webui.pid}{end}")

    assert Supervisor(file).kill(wait=0.0)
    assert webui.wait() == -signal.SIGKILL


def test_a_process_that_got_the_pid_later_is_not_the_webui(tmp_path: Path) -> None:
    file = tmp_path / "webui.state"
    other = subprocess.Popen(["sleep", "60"])
    file.write_text(str(other.pid))
    os.utime(file, (1_000_000_000, 1_000_000_000))  # written long before that process began

    supervisor = Supervisor(file)

    assert supervisor.kill(wait=0.0)
    assert other.poll() is None
    other.kill()
    other.wait()


def test_a_clock_that_jumps_does_not_change_which_process_is_the_webui(tmp_path: Path) -> None:
    file = tmp_path / "webui.state"
    webui = subprocess.Popen(["sleep", "60"], start_new_session=True)
    file.write_text(str(webui.pid))
    jumps = [0.0, 3600.0, -3600.0]
    supervisor = Supervisor(file, boot_time=lambda: boot_time() + jumps[0])

    owned = [supervisor.ownership]
    for _ in range(2):
        del jumps[0]
        owned.append(supervisor.ownership)
    killed = supervisor.kill(wait=0.0)

    assert owned == [Ownership.START_SH] * 3
    assert killed and webui.wait() == -signal.SIGKILL


def test_a_webui_whose_file_was_read_before_the_clock_jumped_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "webui.state"
    webui = subprocess.Popen(["sleep", "60"], start_new_session=True)
    file.write_text(str(webui.pid))
    jumps = [0.0, 3600.0]
    supervisor = Supervisor(file, boot_time=lambda: boot_time() + jumps[0])

    assert supervisor.instance_id == str(webui.pid)
    del jumps[0]

    assert supervisor.kill(wait=10.0)
    assert webui.wait() == -signal.SIGKILL


def test_a_process_that_got_the_pid_stays_another_one_whatever_the_clock_says_later(tmp_path: Path) -> None:
    file = tmp_path / "webui.state"
    other = subprocess.Popen(["sleep", "60"])
    file.write_text(str(other.pid))
    os.utime(file, (1_000_000_000, 1_000_000_000))
    jumps = [0.0, -2e9]
    supervisor = Supervisor(file, boot_time=lambda: boot_time() + jumps[0])

    assert supervisor.instance_id == str(other.pid)
    del jumps[0]

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
    wait_until(lambda: not runs(child), "the child's end")  # it dies when the kernel gets to it


@pytest.mark.parametrize("state", ["failed", "failed: 4242", "", "1", "-1"])
def test_a_webui_that_start_sh_does_not_own_is_never_killed(tmp_path: Path, state: str) -> None:
    file = tmp_path / "webui.state"
    file.write_text(state)

    assert Supervisor(file).kill(wait=0.0) is False
    assert Supervisor(None).kill(wait=0.0) is False


def test_a_webui_whose_process_has_ended_is_still_owned_by_start_sh(tmp_path: Path) -> None:
    file = tmp_path / "webui.state"
    file.write_text(a_dead_pid())

    supervisor = Supervisor(file)

    assert supervisor.ownership is Ownership.START_SH
    assert supervisor.kill(wait=0.0)  # start.sh is starting the next one


def test_every_process_of_the_webui_has_its_own_id(tmp_path: Path) -> None:
    file = tmp_path / "webui.state"
    supervisor = Supervisor(file)

    ids = [supervisor.instance_id]
    for state in ("1234", "1235", "failed"):
        file.write_text(state)
        ids.append(supervisor.instance_id)

    assert len(set(ids)) == 4
    assert Supervisor(None).instance_id == Supervisor(tmp_path / "none").instance_id


def test_without_a_state_file_start_sh_does_not_own_the_webui(tmp_path: Path) -> None:
    for supervisor in (Supervisor(None), Supervisor(tmp_path / "none")):
        assert supervisor.ownership is Ownership.NOBODY

"""Which files have a living owner, and which a dead one."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from a1111_worker.models.liveness import LivenessMonitor, new_owner
from tests.support import wait_until

STALE = 0.4


def test_a_file_that_changes_is_alive_and_one_that_does_not_is_dead_after_a_while(tmp_path: Path) -> None:
    monitor = LivenessMonitor(STALE)
    path = tmp_path / "lease"
    path.touch()
    began = time.monotonic()
    first = monitor.is_dead(path)

    wait_until(lambda: monitor.is_dead(path), "a dead file")

    assert not first
    assert time.monotonic() - began >= STALE
    path.write_text("a sign of life")
    assert not monitor.is_dead(path)


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_a_clock_that_jumps_makes_no_file_dead_and_none_alive(tmp_path: Path, jump: float) -> None:
    # What a lease's owner writes is its own clock's time. Here it is a million seconds off, in either direction.
    monitor = LivenessMonitor(STALE)
    alive, dead = tmp_path / "alive", tmp_path / "dead"
    for path in (alive, dead):
        path.touch()
        os.utime(path, (time.time() + jump, time.time() + jump))
    findings: list[bool] = []

    def dead_is_dead() -> bool:
        os.utime(alive, (time.time() + jump, time.time() + jump))
        findings.append(monitor.is_dead(alive))
        return monitor.is_dead(dead)

    wait_until(dead_is_dead, "a dead file")

    assert not any(findings)


def test_a_file_that_is_gone_is_not_dead_and_not_remembered(tmp_path: Path) -> None:
    monitor = LivenessMonitor(0.0)
    path = tmp_path / "lease"
    path.touch()
    monitor.is_dead(path)
    path.unlink()
    monitor.is_dead(path)
    path.touch()

    again = monitor.is_dead(path)

    assert not again  # with nothing to wait for it would be dead if the first look had been remembered


def test_files_that_a_folder_does_not_list_any_more_are_forgotten(tmp_path: Path) -> None:
    monitor = LivenessMonitor(0.0)
    kept, gone, elsewhere = tmp_path / "a/kept", tmp_path / "a/gone", tmp_path / "b/gone"
    for path in (kept, gone, elsewhere):
        path.parent.mkdir(exist_ok=True)
        path.touch()
        monitor.is_dead(path)

    monitor.forget_missing(tmp_path / "a", ["kept"])

    assert len(monitor) == 2
    assert [monitor.is_dead(path) for path in (kept, gone, elsewhere)] == [True, False, True]


def test_no_two_lives_have_one_name() -> None:
    names = {new_owner() for _ in range(100)}

    assert len(names) == 100
    assert not [name for name in names if "." in name or "/" in name]

"""Fixtures for the tests of models."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from a1111_worker.heartbeat import Heartbeat
from a1111_worker.models.holds import Holds
from a1111_worker.models.leases import Leases
from a1111_worker.models.liveness import LivenessMonitor
from tests.fleet import Fleet


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with Fleet(tmp_path) as fleet:
        yield fleet


class WorkerSigns:
    """A worker's leases and holds. With `is_alive=False` its heartbeat does not beat, like that of a killed worker."""

    def __init__(
        self, name: str, touch: Callable[[Path], None], *, is_alive: bool = True, stale_after: float = 0.4
    ) -> None:
        self.heartbeat = Heartbeat(0.02 if is_alive else 3600)
        self.liveness = LivenessMonitor(stale_after)
        self.leases = Leases(name, self.heartbeat, self.liveness, write_interval=0)
        self.holds = Holds(name, self.heartbeat, self.liveness, touch=touch)


StartWorker = Callable[..., WorkerSigns]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartWorker]:
    """Starts a worker of a name: `start("one")`. They all end with the test."""
    started: list[WorkerSigns] = []

    def start(
        name: str, touch: Callable[[Path], None] = os.utime, *, is_alive: bool = True, stale_after: float = 0.4
    ) -> WorkerSigns:
        started.append(WorkerSigns(name, touch, is_alive=is_alive, stale_after=stale_after))
        return started[-1]

    yield start
    for worker in started:
        worker.heartbeat.stop()

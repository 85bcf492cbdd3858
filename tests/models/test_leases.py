"""Leases: one worker of the fleet fetches a file."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from a1111_worker.models.leases import Lease, LeaseNote
from tests.models.conftest import StartWorker, WorkerSigns
from tests.support import wait_until


def granted(lease: Lease | None) -> Lease:
    assert lease is not None
    return lease


def test_one_worker_has_a_lease_and_the_others_see_how_far_it_is(tmp_path: Path, start: StartWorker) -> None:
    one, other = start("one"), start("other")
    path = tmp_path / "v1"

    with granted(one.leases.acquire(path)) as lease:
        refused = other.leases.acquire(path)
        lease.update(50, 200)
        note = other.leases.read(path)
    acquired = other.leases.acquire(path)

    assert refused is None
    assert note == LeaseNote("one", 50, 200)
    assert acquired is not None


def test_of_many_threads_one_gets_the_lease(tmp_path: Path, start: StartWorker) -> None:
    workers = [start(f"w{number}") for number in range(8)]
    barrier = threading.Barrier(8)
    acquired: list[Lease] = []

    def acquire(worker: WorkerSigns) -> None:
        barrier.wait()
        lease = worker.leases.acquire(tmp_path / "v1")
        if lease is not None:
            acquired.append(lease)

    run_all([threading.Thread(target=acquire, args=(worker,)) for worker in workers])

    assert len(acquired) == 1


def test_a_heartbeat_keeps_a_lease_and_a_dead_owner_loses_it(tmp_path: Path, start: StartWorker) -> None:
    living, dead, other = start("living"), start("dead", is_alive=False), start("other")
    kept, lost = granted(living.leases.acquire(tmp_path / "kept")), granted(dead.leases.acquire(tmp_path / "lost"))
    acquired: list[Lease | None] = []

    def lost_is_acquired() -> bool:
        acquired.append(other.leases.acquire(tmp_path / "kept"))
        return other.leases.acquire(tmp_path / "lost") is not None

    with kept, lost:
        wait_until(lost_is_acquired, "the dead worker's lease")

    assert set(acquired) == {None}
    assert (tmp_path / "lost").exists()  # the dead worker woke up and left: the lease is another's, and stays


def test_a_worker_that_seemed_dead_does_not_keep_the_lease_of_another_one_alive(
    tmp_path: Path, start: StartWorker
) -> None:
    woken, killed, third = start("woken"), start("killed", is_alive=False), start("third")
    path = tmp_path / "v1"

    with granted(woken.leases.acquire(path)):
        path.unlink()  # by a worker that had seen no sign of life while this one was paused
        killed.leases.acquire(path)

        wait_until(lambda: third.leases.acquire(path) is not None, "the killed worker's lease", seconds=20)


def test_a_lease_that_cannot_be_made_is_granted_to_its_owner(tmp_path: Path, start: StartWorker) -> None:
    (tmp_path / "file").touch()

    with granted(start("one").leases.acquire(tmp_path / "file" / "v1")) as lease:
        lease.update(1, 2)

    assert not lease.is_real
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_of_many_who_remove_a_dead_lease_one_gets_it(tmp_path: Path, start: StartWorker) -> None:
    workers = [start(f"w{number}", stale_after=0) for number in range(6)]
    paths = [tmp_path / f"v{number}" for number in range(300)]
    for path in paths:
        path.write_text('{"owner": "dead"}')
        for worker in workers:
            worker.liveness.is_dead(path)
    barrier = threading.Barrier(len(workers))
    acquired: dict[Path, list[Lease]] = {path: [] for path in paths}

    def acquire(worker: WorkerSigns) -> None:
        for path in paths:
            barrier.wait()
            lease = worker.leases.acquire(path)
            if lease is not None:
                acquired[path].append(lease)

    run_all([threading.Thread(target=acquire, args=(worker,)) for worker in workers])

    assert {len(leases) for leases in acquired.values()} == {1}
    assert set(tmp_path.iterdir()) == set(paths)


def test_a_new_lease_stays_though_a_late_worker_remembers_the_dead_one(tmp_path: Path, start: StartWorker) -> None:
    path = tmp_path / "v1"
    start("dead", is_alive=False).leases.acquire(path)
    one, late = start("one"), start("late")
    wait_until(lambda: late.liveness.is_dead(path), "a dead lease")
    dead = late.liveness.dead_state(path)
    assert dead is not None
    wait_until(lambda: one.liveness.is_dead(path), "a dead lease")

    with granted(one.leases.acquire(path)):
        late.liveness.remove(path, dead)

        note = late.leases.read(path)

    assert note is not None and note.owner == "one"


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', '{"done": "many"}', "\x00" * 200, '{"total": true}'])
def test_a_lease_with_an_unreadable_note_is_a_lease(tmp_path: Path, start: StartWorker, text: str) -> None:
    (tmp_path / "v1").write_text(text)
    one = start("one")

    note, acquired = one.leases.read(tmp_path / "v1"), one.leases.acquire(tmp_path / "v1")

    assert note is not None
    assert acquired is None


def test_leases_of_dead_workers_are_removed_by_those_who_watch(tmp_path: Path, start: StartWorker) -> None:
    start("dead", is_alive=False).leases.acquire(tmp_path / "v1")
    one = start("one")

    def is_gone() -> bool:
        one.leases.watch(tmp_path)
        return not (tmp_path / "v1").exists()

    wait_until(is_gone, "the removal")

    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone_is_watched_without_harm(tmp_path: Path, start: StartWorker) -> None:
    start("one").leases.watch(tmp_path / "missing")


def test_leases_that_are_gone_are_not_remembered(tmp_path: Path, start: StartWorker) -> None:
    one = start("one")
    paths = [tmp_path / f"v{number}" for number in range(100)]
    for path in paths:
        path.touch()
    one.leases.watch(tmp_path)
    remembered = len(one.liveness)

    for path in paths:
        path.unlink()
    one.leases.watch(tmp_path)

    assert remembered == 100
    assert len(one.liveness) == 0


def run_all(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

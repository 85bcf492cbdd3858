"""Who is at work on what, and who is dead."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from a1111_worker.context import Deadline
from a1111_worker.errors import JobTimeout
from a1111_worker.heartbeat import Heartbeat
from a1111_worker.models.leases import Holds, Lease, Leases, Watch, new_owner

STALE = 0.4


class Worker:
    """A worker's leases and holds. `alive=False`: its heartbeat does not beat, as that of a killed one."""

    def __init__(self, name: str, *, alive: bool = True, stale_after: float = STALE) -> None:
        self.heartbeat = Heartbeat(0.02 if alive else 3600)
        self.watch = Watch(stale_after)
        self.leases = Leases(name, self.heartbeat, self.watch)
        self.holds = Holds(name, self.heartbeat, self.watch)


@pytest.fixture
def worker() -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(name: str, **how: Any) -> Worker:
        made.append(Worker(name, **how))
        return made[-1]

    yield make
    for one in made:
        one.heartbeat.stop()


def until(true: Callable[[], bool]) -> None:
    deadline = Deadline(10)
    while not true():
        deadline.wait(0.005)


# -- telling the dead from the living


def test_a_file_that_changes_is_alive_and_one_that_does_not_is_dead_after_a_while(tmp_path: Path) -> None:
    watch = Watch(STALE)
    path = tmp_path / "lease"
    path.touch()
    began = time.monotonic()
    first = watch.is_dead(path)

    until(lambda: watch.is_dead(path))

    assert not first
    assert time.monotonic() - began >= STALE
    path.write_text("a sign of life")
    assert not watch.is_dead(path)


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_a_clock_that_jumps_neither_kills_nor_revives(tmp_path: Path, jump: float) -> None:
    # What a lease's owner writes is its own clock's time; here it is a million seconds off, in either direction.
    watch = Watch(STALE)
    alive, dead = tmp_path / "alive", tmp_path / "dead"
    for path in (alive, dead):
        path.touch()
        os.utime(path, (time.time() + jump, time.time() + jump))
    verdicts: list[bool] = []

    def dead_is_dead() -> bool:
        os.utime(alive, (time.time() + jump, time.time() + jump))
        verdicts.append(watch.is_dead(alive))
        return watch.is_dead(dead)

    until(dead_is_dead)

    assert not any(verdicts)


def test_a_file_that_went_is_not_dead_and_not_remembered(tmp_path: Path) -> None:
    watch = Watch(0.0)
    path = tmp_path / "lease"
    path.touch()
    watch.is_dead(path)
    path.unlink()
    watch.is_dead(path)
    path.touch()

    again = watch.is_dead(path)

    assert not again  # it would be, with nothing to wait for, had the first look been remembered


# -- leases


def granted(lease: Lease | None) -> Lease:
    assert lease is not None
    return lease


def test_one_has_a_lease_and_the_others_see_how_far_it_is(tmp_path: Path, worker: Callable[..., Worker]) -> None:
    one, other = worker("one"), worker("other")
    path = tmp_path / "v1"

    with granted(one.leases.take(path)) as lease:
        refused = other.leases.take(path)
        lease._pause = 0
        lease.tell(50, 200)
        note = other.leases.note(path)
    taken = other.leases.take(path)

    assert refused is None
    assert note is not None
    assert (note.owner, note.done, note.total) == ("one", 50, 200)
    assert taken is not None


def test_of_many_threads_one_gets_the_lease(tmp_path: Path, worker: Callable[..., Worker]) -> None:
    workers = [worker(f"w{number}") for number in range(8)]
    start = threading.Barrier(8)
    taken: list[object] = []

    def take(one: Worker) -> None:
        start.wait()
        lease = one.leases.take(tmp_path / "v1")
        if lease is not None:
            taken.append(lease)

    threads = [threading.Thread(target=take, args=(one,)) for one in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(taken) == 1


def test_a_beating_heart_keeps_a_lease_and_a_dead_owner_loses_it(tmp_path: Path, worker: Callable[..., Worker]) -> None:
    living, dead, other = worker("living"), worker("dead", alive=False), worker("other")
    kept, lost = granted(living.leases.take(tmp_path / "kept")), granted(dead.leases.take(tmp_path / "lost"))
    taken: list[object] = []

    def lost_is_taken() -> bool:
        taken.append(other.leases.take(tmp_path / "kept"))
        return other.leases.take(tmp_path / "lost") is not None

    with kept, lost:
        until(lost_is_taken)

    assert set(taken) == {None}
    assert (tmp_path / "lost").exists()  # the dead one woke up and left: the lease is another's, and stays


def test_a_lease_that_cannot_be_made_is_believed_by_its_owner(tmp_path: Path, worker: Callable[..., Worker]) -> None:
    (tmp_path / "file").touch()

    with granted(worker("one").leases.take(tmp_path / "file" / "v1")) as lease:
        lease.tell(1, 2)

    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_of_many_who_bury_a_dead_owner_one_gets_the_lease(tmp_path: Path, worker: Callable[..., Worker]) -> None:
    workers = [worker(f"w{number}", stale_after=0) for number in range(6)]
    paths = [tmp_path / f"v{number}" for number in range(300)]
    for path in paths:
        path.write_text('{"owner": "dead"}')
        for one in workers:
            one.watch.is_dead(path)
    start = threading.Barrier(len(workers))
    taken: dict[Path, list[Lease]] = {path: [] for path in paths}

    def take(one: Worker) -> None:
        for path in paths:
            start.wait()
            lease = one.leases.take(path)
            if lease is not None:
                taken[path].append(lease)

    threads = [threading.Thread(target=take, args=(one,)) for one in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert {len(leases) for leases in taken.values()} == {1}
    assert set(tmp_path.iterdir()) == set(paths)


def test_a_new_lease_survives_who_still_thinks_of_the_dead_one(tmp_path: Path, worker: Callable[..., Worker]) -> None:
    worker("dead", alive=False).leases.take(tmp_path / "v1")
    one, late = worker("one"), worker("late")
    until(lambda: late.watch.is_dead(tmp_path / "v1"))
    dead = late.watch.dead_state(tmp_path / "v1")
    assert dead is not None
    until(lambda: one.watch.is_dead(tmp_path / "v1"))

    with granted(one.leases.take(tmp_path / "v1")):
        late.leases._bury(tmp_path / "v1", dead)

        note = late.leases.note(tmp_path / "v1")

    assert note is not None and note.owner == "one"


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', '{"done": "many"}', "\x00" * 200, '{"total": true}'])
def test_a_lease_that_says_nothing_is_a_lease(tmp_path: Path, worker: Callable[..., Worker], text: str) -> None:
    (tmp_path / "v1").write_text(text)
    one = worker("one")

    note, taken = one.leases.note(tmp_path / "v1"), one.leases.take(tmp_path / "v1")

    assert note is not None
    assert taken is None


def test_the_leases_of_the_dead_are_dropped_by_whoever_watches(tmp_path: Path, worker: Callable[..., Worker]) -> None:
    worker("dead", alive=False).leases.take(tmp_path / "v1")
    one = worker("one")

    def gone() -> bool:
        one.leases.watch(tmp_path)
        return not (tmp_path / "v1").exists()

    until(gone)

    assert list(tmp_path.iterdir()) == []


# -- holds


def test_a_model_in_use_cannot_be_claimed(tmp_path: Path, worker: Callable[..., Worker]) -> None:
    one, other = worker("one"), worker("other")
    one.holds.hold(tmp_path, "a.safetensors", Deadline(1))
    one.holds.hold(tmp_path, "a.safetensors", Deadline(1))
    answers = []

    for _ in range(3):
        with other.holds.claim(tmp_path, "a.safetensors") as may_go:
            answers.append(may_go)
        with one.holds.claim(tmp_path, "a.safetensors") as may_go:  # nor by whoever holds it
            answers.append(may_go)
        one.holds.release(tmp_path, "a.safetensors")

    assert answers == [False, False, False, False, True, True]  # held twice: released twice
    assert list(tmp_path.iterdir()) == []


def test_one_claims_at_a_time(tmp_path: Path, worker: Callable[..., Worker]) -> None:
    one, other = worker("one"), worker("other")

    with (
        one.holds.claim(tmp_path, "a.safetensors") as first,
        other.holds.claim(tmp_path, "a.safetensors") as second,
        other.holds.claim(tmp_path, "b.safetensors") as another,
    ):
        answers = (first, second, another)

    assert answers == (True, False, True)


def test_who_holds_waits_for_a_claim_and_its_time(tmp_path: Path, worker: Callable[..., Worker]) -> None:
    one, other = worker("one", stale_after=60), worker("other")

    with other.holds.claim(tmp_path, "a.safetensors"), pytest.raises(JobTimeout):
        one.holds.hold(tmp_path, "a.safetensors", Deadline(0.05))

    assert list(tmp_path.iterdir()) == []  # and does not hold it


def test_the_hold_and_the_claim_of_a_dead_worker_end(tmp_path: Path, worker: Callable[..., Worker]) -> None:
    dead, one = worker("dead", alive=False), worker("one")
    dead.holds.hold(tmp_path, "a.safetensors", Deadline(1))
    (tmp_path / "b.safetensors.evicting").touch()
    held_first = one.holds.held(tmp_path)

    until(lambda: not one.holds.held(tmp_path))
    one.holds.hold(tmp_path, "b.safetensors", Deadline(5))
    with one.holds.claim(tmp_path, "a.safetensors") as may_go:
        answer = may_go

    assert held_first == {"a.safetensors"}
    assert answer


def test_a_living_worker_whose_hold_was_dropped_makes_it_again(tmp_path: Path, worker: Callable[..., Worker]) -> None:
    one = worker("one")
    one.holds.hold(tmp_path, "a.safetensors", Deadline(1))
    (hold,) = tmp_path.iterdir()

    hold.unlink()

    until(hold.exists)
    one.holds.release(tmp_path, "a.safetensors")
    assert not hold.exists()


def test_what_oneself_uses_is_in_use_though_its_hold_is_gone(tmp_path: Path, worker: Callable[..., Worker]) -> None:
    one = worker("one", alive=False)  # its heartbeat has not beaten since
    one.holds.hold(tmp_path, "a.safetensors", Deadline(1))
    for hold in tmp_path.iterdir():
        hold.unlink()

    with one.holds.claim(tmp_path, "a.safetensors") as may_go:
        answer = may_go

    assert not answer


def test_a_hold_that_cannot_be_made_is_no_failure(tmp_path: Path, worker: Callable[..., Worker]) -> None:
    (tmp_path / "file").touch()
    one = worker("one")

    one.holds.hold(tmp_path / "file", "a.safetensors", Deadline(1))
    one.holds.release(tmp_path / "file", "a.safetensors")

    assert one.holds.held(tmp_path / "file") == set()


def test_no_two_lives_have_one_name() -> None:
    names = {new_owner() for _ in range(100)}

    assert len(names) == 100
    assert not [name for name in names if "." in name or "/" in name]

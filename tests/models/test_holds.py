"""Holds: a model that any worker uses is not evicted."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from a1111_worker.context import Deadline
from a1111_worker.errors import JobTimeout
from tests.models.conftest import StartWorker, WorkerSigns
from tests.support import wait_until

A, B, SLOW = "a.safetensors", "b.safetensors", "slow.safetensors"


def test_a_model_in_use_cannot_be_claimed(tmp_path: Path, start: StartWorker) -> None:
    one, other = start("one"), start("other")
    one.holds.hold(tmp_path, A, Deadline(1))
    one.holds.hold(tmp_path, A, Deadline(1))
    answers = []

    for _ in range(3):
        with other.holds.claim(tmp_path, A) as may_evict:
            answers.append(may_evict)
        with one.holds.claim(tmp_path, A) as may_evict:  # the holder itself cannot claim it either
            answers.append(may_evict)
        one.holds.release(tmp_path, A)

    assert answers == [False, False, False, False, True, True]  # held twice: released twice
    assert list(tmp_path.iterdir()) == []


def test_one_worker_claims_at_a_time(tmp_path: Path, start: StartWorker) -> None:
    one, other = start("one"), start("other")

    with (
        one.holds.claim(tmp_path, A) as first,
        other.holds.claim(tmp_path, A) as second,
        other.holds.claim(tmp_path, B) as another,
    ):
        answers = (first, second, another)

    assert answers == (True, False, True)


def test_a_hold_waits_for_a_claim_as_long_as_its_job_has_time(tmp_path: Path, start: StartWorker) -> None:
    one, other = start("one", stale_after=60), start("other")

    with other.holds.claim(tmp_path, A), pytest.raises(JobTimeout):
        one.holds.hold(tmp_path, A, Deadline(0.05))

    assert list(tmp_path.iterdir()) == []  # and then it does not hold the model


def test_the_hold_and_the_claim_of_a_dead_worker_end(tmp_path: Path, start: StartWorker) -> None:
    dead, one = start("dead", is_alive=False), start("one")
    dead.holds.hold(tmp_path, A, Deadline(1))
    (tmp_path / f"{B}.evicting").touch()
    held_first = one.holds.held(tmp_path)

    wait_until(lambda: not one.holds.held(tmp_path), "the end of the dead worker's hold")
    one.holds.hold(tmp_path, B, Deadline(5))
    with one.holds.claim(tmp_path, A) as may_evict:
        answer = may_evict

    assert held_first == {A}
    assert answer


def test_of_many_who_find_a_dead_claim_one_evicts(tmp_path: Path, start: StartWorker) -> None:
    workers = [start(f"w{number}", stale_after=0) for number in range(6)]
    files = [f"{number}.safetensors" for number in range(200)]
    for file in files:
        (tmp_path / f"{file}.evicting").touch()
        for worker in workers:
            worker.liveness.is_dead(tmp_path / f"{file}.evicting")
    barrier = threading.Barrier(len(workers))
    at_once: list[int] = []

    def evict(worker: WorkerSigns) -> None:
        for file in files:
            barrier.wait()
            with worker.holds.claim(tmp_path, file) as may_evict:
                claims.append(may_evict)
                barrier.wait()
                if worker is workers[0]:
                    at_once.append(sum(claims))
                    claims.clear()
                barrier.wait()

    claims: list[bool] = []
    threads = [threading.Thread(target=evict, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert max(at_once) == 1
    assert sum(at_once) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_new_claim_stays_though_a_late_worker_remembers_the_dead_one(tmp_path: Path, start: StartWorker) -> None:
    claim = tmp_path / f"{A}.evicting"
    claim.touch()
    one, late = start("one"), start("late")
    wait_until(lambda: late.liveness.is_dead(claim) and one.liveness.is_dead(claim), "a dead claim")
    dead = late.liveness.dead_state(claim)
    assert dead is not None

    with one.holds.claim(tmp_path, A) as first:
        late.liveness.remove(claim, dead)
        with late.holds.claim(tmp_path, A) as second:
            answers = (first, second)

    assert answers == (True, False)


def test_a_model_with_the_longest_name_can_be_held_and_claimed(tmp_path: Path, start: StartWorker) -> None:
    one, other = start("one"), start("other")
    names = [f"{'é' * 121}{letter}.safetensors" for letter in "ab"]  # 255 bytes
    one.holds.hold(tmp_path, names[0], Deadline(1))

    answers = []
    for name in names:
        with other.holds.claim(tmp_path, name) as may_evict:
            answers.append(may_evict)
    one.holds.release(tmp_path, names[0])

    assert answers == [False, True]
    assert list(tmp_path.iterdir()) == []


def test_a_living_worker_whose_hold_was_removed_makes_it_again(tmp_path: Path, start: StartWorker) -> None:
    one = start("one")
    one.holds.hold(tmp_path, A, Deadline(1))
    (hold,) = tmp_path.iterdir()

    hold.unlink()

    wait_until(hold.exists, "the hold")
    one.holds.release(tmp_path, A)
    assert not hold.exists()


def test_what_a_worker_uses_itself_is_in_use_though_its_hold_is_gone(tmp_path: Path, start: StartWorker) -> None:
    one = start("one", is_alive=False)  # its heartbeat has not beaten since
    one.holds.hold(tmp_path, A, Deadline(1))
    for hold in tmp_path.iterdir():
        hold.unlink()

    with one.holds.claim(tmp_path, A) as may_evict:
        answer = may_evict

    assert not answer


def test_a_hold_that_cannot_be_made_is_no_failure(tmp_path: Path, start: StartWorker) -> None:
    (tmp_path / "file").touch()
    one = start("one")

    one.holds.hold(tmp_path / "file", A, Deadline(1))
    one.holds.release(tmp_path / "file", A)

    assert one.holds.held(tmp_path / "file") == set()


def test_close_releases_what_is_held_and_a_late_release_does_no_harm(tmp_path: Path, start: StartWorker) -> None:
    one = start("one")
    for file in (A, A, B):
        one.holds.hold(tmp_path, file, Deadline(1))

    one.holds.close()
    one.holds.release(tmp_path, A)

    assert list(tmp_path.iterdir()) == []
    assert one.holds.held(tmp_path) == set()


def test_many_threads_that_hold_and_release_one_model_leave_it_right(tmp_path: Path, start: StartWorker) -> None:
    one = start("one")
    hold = tmp_path / f"{A}.one"
    missing: list[int] = []

    def use(number: int) -> None:
        for _ in range(100):
            one.holds.hold(tmp_path, A, Deadline(10))
            if not hold.exists():
                missing.append(number)
            one.holds.release(tmp_path, A)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert missing == []
    assert list(tmp_path.iterdir()) == []
    assert one.holds.held(tmp_path) == set()


# -- a slow volume


def test_a_slow_touch_delays_no_hold_and_no_release(tmp_path: Path, start: StartWorker) -> None:
    is_touching, may_go_on, is_done = threading.Event(), threading.Event(), threading.Event()

    def touch(path: Path) -> None:
        if path.name.startswith(SLOW):
            is_touching.set()
            may_go_on.wait(30)
        os.utime(path)

    one = start("one", touch)
    for file in (SLOW, A):
        one.holds.hold(tmp_path, file, Deadline(1))

    def use() -> None:
        one.holds.release(tmp_path, A)
        one.holds.hold(tmp_path, B, Deadline(1))
        one.holds.release(tmp_path, SLOW)
        is_done.set()

    assert is_touching.wait(10)
    thread = threading.Thread(target=use)
    thread.start()
    is_in_time = is_done.wait(5)
    may_go_on.set()
    thread.join()

    assert is_in_time
    assert [path.name for path in tmp_path.iterdir()] == [f"{B}.one"]


def test_a_hold_that_is_slow_to_make_delays_no_other(tmp_path: Path, start: StartWorker) -> None:
    slow = tmp_path / f"{SLOW}.one"
    os.mkfifo(slow)  # to open it for writing takes until somebody reads
    one = start("one")
    one.holds.hold(tmp_path, A, Deadline(1))
    is_done = threading.Event()
    making = threading.Thread(target=one.holds.hold, args=(tmp_path, SLOW, Deadline(30)))
    making.start()

    def use() -> None:
        wait_until(lambda: len(one.holds.held(tmp_path)) == 2, "the slow hold")
        one.holds.release(tmp_path, A)
        one.holds.hold(tmp_path, B, Deadline(1))
        is_done.set()

    thread = threading.Thread(target=use)
    thread.start()
    is_in_time = is_done.wait(5)
    reader = os.open(slow, os.O_RDONLY)
    making.join()
    thread.join()
    os.close(reader)

    assert is_in_time


def test_a_model_that_is_released_while_its_hold_is_touched_stays_released(tmp_path: Path, start: StartWorker) -> None:
    is_touching, may_go_on, is_over = threading.Event(), threading.Event(), threading.Event()

    def touch(path: Path) -> None:
        if path.name.startswith(A):
            is_touching.set()
            may_go_on.wait(30)
        elif may_go_on.is_set():
            is_over.set()  # the next hold's turn
        os.utime(path)

    one = start("one", touch)
    one.holds.hold(tmp_path, A, Deadline(1))
    one.holds.hold(tmp_path, B, Deadline(1))

    assert is_touching.wait(10)
    one.holds.release(tmp_path, A)
    may_go_on.set()

    assert is_over.wait(10)
    assert [path.name for path in tmp_path.iterdir()] == [f"{B}.one"]


def test_holds_that_are_gone_are_not_remembered(tmp_path: Path, start: StartWorker) -> None:
    one = start("one")
    paths = [tmp_path / f"{number}.safetensors.other" for number in range(100)]
    for path in paths:
        path.touch()
    one.holds.watch(tmp_path)
    remembered = len(one.liveness)

    for path in paths:
        path.unlink()
    one.holds.watch(tmp_path)

    assert remembered == 100
    assert len(one.liveness) == 0

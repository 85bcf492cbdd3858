"""Which models are evicted when room is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a1111_worker.domain import ModelKind
from a1111_worker.models.eviction import (
    BEING_FETCHED,
    IN_USE,
    MARGIN,
    Entry,
    Eviction,
    Room,
    plan_eviction,
    plan_for_full_disk,
)

GB = 10**9


def entry(name: str, size: int, last_used: float, keep: str | None = None) -> Entry:
    return Entry(ModelKind.LORA, name, Path(name), size, last_used, keep)


OLD, MIDDLE, NEW = entry("old", 2 * GB, 1.0), entry("middle", GB, 2.0), entry("new", 3 * GB, 3.0)
HELD, FIXED = entry("held", 5 * GB, 0.0, "in use"), entry("fixed", 6 * GB, 0.0, "the checkpoint")


def test_what_is_still_to_come_counts_towards_the_limit_unless_it_is_needed_anyway() -> None:
    running = Entry(ModelKind.LORA, "running", Path("running"), GB, 9.0, BEING_FETCHED, to_come=GB)

    plans = [
        plan_eviction([OLD, running], Room(GB, 4 * GB, 99 * GB, margin=1, own=frozenset(own)))
        for own in ((), (running.path,))
    ]

    assert [plan.remove for plan in plans] == [(OLD,), ()]


def freed(plan: Eviction) -> int:
    return sum(entry.size for entry in plan.remove)


@pytest.mark.parametrize(
    ("needed", "limit", "free", "removed", "short"),
    [
        (GB, None, 2 * GB, [], 0),  # there is room
        (GB, None, GB, ["old"], 0),  # none, once the margin is kept
        (3 * GB, None, GB, ["old", "middle"], 0),  # least recently used first, and no more than needed
        (6 * GB, None, GB, ["old", "middle", "new"], 0),
        (8 * GB, None, GB, [], GB),  # nothing is evicted if that would not be enough
        (GB, 18 * GB, 99 * GB, [], 0),  # exactly at the limit
        (GB, 17 * GB, 99 * GB, ["old"], 0),
        (GB, 12 * GB, 99 * GB, ["old", "middle", "new"], 0),
        (GB, 11 * GB, 99 * GB, [], GB),  # the held one and the checkpoint alone are more than that
        (0, 12 * GB, 0, ["old", "middle", "new"], 0),  # the limit alone: what the disk has free does not matter
        (0, None, 0, [], 0),
    ],
)
def test_which_models_are_evicted(needed: int, limit: int | None, free: int, removed: list[str], short: int) -> None:
    plan = plan_eviction([NEW, HELD, OLD, FIXED, MIDDLE], Room(needed, limit, free, margin=1))

    assert [entry.file for entry in plan.remove] == removed
    assert plan.short == pytest.approx(short, abs=1)


@pytest.mark.parametrize(
    ("needed", "free", "removed", "short"),
    [
        (GB, 0, ["old"], 0),
        (3 * GB, GB, ["old"], 0),  # there is less than needed, and as much as the disk says
        (3 * GB, 99 * GB, ["old", "middle"], 0),  # what it says cannot be: a quota that does not show
        (6 * GB, 99 * GB, ["old", "middle", "new"], 0),
        (7 * GB, 99 * GB, [], GB),  # nothing is evicted if that would not be enough
        (7 * GB, GB, ["old", "middle", "new"], 0),
        (0, 99 * GB, ["old"], 0),  # unknown how much: a little
    ],
)
def test_which_models_are_evicted_from_a_full_disk(needed: int, free: int, removed: list[str], short: int) -> None:
    plan = plan_for_full_disk([NEW, HELD, OLD, FIXED, MIDDLE], needed, free=free)

    assert [entry.file for entry in plan.remove] == removed
    assert plan.short == short


def test_a_little_more_than_needed_is_evicted_from_a_full_disk_if_possible() -> None:
    small = [entry(name, 10 << 20, 1.0) for name in "abcdefgh"]

    plan = plan_for_full_disk(small, 1, free=0)
    rest = plan_for_full_disk(small[:3], 1, free=0)

    assert freed(plan) >= MARGIN
    assert len(rest.remove) == 3


@pytest.mark.parametrize(
    ("needed", "promised", "own", "is_in_use"),
    [
        (4 * GB, 0, [], True),  # with the held one there would be room
        (9 * GB, 0, [], True),
        (10 * GB, 0, [], False),  # even with both there would be none
        (9 * GB, 0, ["held"], False),  # the job itself holds it
        (10 * GB, 2 * GB, [], True),  # two of these are another job's, which will release them
    ],
)
def test_a_plan_says_whether_it_would_help_to_wait(needed: int, promised: int, own: list[str], is_in_use: bool) -> None:
    fetched = entry("fetched", 4 * GB, 0.0, BEING_FETCHED)
    held = entry("held", 5 * GB, 0.0, IN_USE)
    room = Room(needed, None, 0, promised, margin=0, own=frozenset(map(Path, own)))

    plan = plan_eviction([held, fetched, FIXED], room)

    assert plan.remove == ()
    assert plan.is_in_use is is_in_use


def test_what_the_job_itself_needs_is_not_evicted_for_it() -> None:
    plan = plan_eviction([OLD, NEW], Room(GB, None, 0, margin=0, own=frozenset([OLD.path])))

    assert plan.remove == (NEW,)


def test_a_plan_says_why() -> None:
    plan = plan_eviction([OLD, NEW], Room(GB, 5 * GB, 99 * GB))

    assert plan.why == "1.00 GB needed, over the limit of 5.00 GB"
    assert freed(plan) == 2 * GB


entries = st.lists(
    st.builds(
        entry,
        st.text("abc", min_size=1, max_size=4),
        st.integers(0, 100),
        st.floats(0, 100),
        st.sampled_from([None, None, "in use"]),
    ),
    max_size=12,
)


@given(entries, st.integers(0, 300), st.none() | st.integers(0, 300), st.integers(0, 300))
def test_a_plan_is_enough_or_empty_and_never_touches_what_must_stay(
    there: list[Entry], needed: int, limit: int | None, free: int
) -> None:
    plan = plan_eviction(there, Room(needed, limit, free, margin=0))

    total = sum(one.size for one in there)
    assert all(one.keep is None for one in plan.remove)
    if plan.short:
        assert plan.remove == ()
        freeable = sum(one.size for one in there if one.keep is None)
        assert needed - free > freeable or (limit is not None and total + needed - limit > freeable)
    else:
        assert needed <= free + freed(plan)
        assert limit is None or total - freed(plan) + needed <= limit
        survivors = [one for one in there if one.keep is None and one not in plan.remove]
        assert all(gone.last_used <= one.last_used for gone in plan.remove for one in survivors)

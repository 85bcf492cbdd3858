"""Which bytes of a file are missing, and how much a request asks for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from a1111_worker.transfer.ranges import ByteRange, ByteRanges, MiB, Pace, Tuning, plan_theft, range_size


@given(
    size=st.integers(1, 10_000),
    cuts=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 10_000)), max_size=8),
)
def test_the_done_and_the_missing_ranges_make_up_the_file(size: int, cuts: list[tuple[int, int]]) -> None:
    done = [(min(a, b, size), min(max(a, b), size)) for a, b in cuts]

    ranges = ByteRanges(size, done)

    covered = {byte for start, end in done for byte in range(start, end)}
    assert ranges.left == size - len(covered)
    assert {byte for start, end in ranges.done() for byte in range(start, end)} == covered
    assert ranges.contiguous == next((byte for byte in range(size) if byte not in covered), size)


class RangeMachine(RuleBasedStateMachine):
    """Connections that claim, steal, advance and release in any order: no byte is lost, and none has two owners."""

    SIZE = 5_000

    def __init__(self) -> None:
        super().__init__()
        self.ranges = ByteRanges(self.SIZE)
        self.claimed: list[ByteRange] = []
        self.written: set[int] = set()

    @rule(size=st.integers(1, 2_000))
    def claim(self, size: int) -> None:
        byte_range = self.ranges.claim(size)
        if byte_range is None:
            assert self.ranges.unclaimed == 0
        else:
            assert byte_range.left <= size + size // 4
            self.claimed.append(byte_range)

    @precondition(lambda self: self.claimed)
    @rule(data=st.data(), count=st.integers(1, 1_000))
    def steal(self, data: st.DataObject, count: int) -> None:
        victim = data.draw(st.sampled_from(self.claimed))
        left = victim.left

        stolen = self.ranges.steal(victim, count)

        assert stolen.left == min(count, left)
        assert victim.left == left - stolen.left
        self.claimed.append(stolen)

    @precondition(lambda self: self.claimed)
    @rule(data=st.data(), count=st.integers(1, 700))
    def advance(self, data: st.DataObject, count: int) -> None:
        byte_range = data.draw(st.sampled_from(self.claimed))
        fresh = range(byte_range.start, min(byte_range.start + count, byte_range.end))
        assert not self.written & set(fresh)

        byte_range.start += len(fresh)

        self.written |= set(fresh)

    @precondition(lambda self: self.claimed)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        byte_range = data.draw(st.sampled_from(self.claimed))
        self.claimed.remove(byte_range)

        self.ranges.release(byte_range)

    @invariant()
    def every_byte_is_there_or_missing_once(self) -> None:
        assert self.ranges.left == self.SIZE - len(self.written)
        assert {byte for start, end in self.ranges.done() for byte in range(start, end)} == self.written
        assert self.ranges.unclaimed == self.ranges.left - sum(byte_range.left for byte_range in self.claimed)
        assert self.ranges.contiguous == next(
            (byte for byte in range(self.SIZE) if byte not in self.written), self.SIZE
        )


TestRangeMachine = RangeMachine.TestCase
TestRangeMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_ranges_are_claimed_in_order_so_that_the_file_grows_without_gaps() -> None:
    ranges = ByteRanges(100)

    first, second = ranges.claim(30), ranges.claim(30)
    assert first and second
    first.start += 10
    ranges.release(first)
    again = ranges.claim(30)

    assert again and (again.start, again.end) == (10, 30)
    assert ranges.contiguous == 10


def test_bytes_that_were_on_their_way_when_their_range_was_stolen_count_once() -> None:
    ranges = ByteRanges(100)
    victim = ranges.claim(100)
    assert victim

    stolen = ranges.steal(victim, 60)
    victim.start += 50  # a write that had begun
    ranges.release(victim)

    assert (stolen.start, stolen.end) == (40, 100)
    assert ranges.done() == [(0, 40)]
    assert ranges.left == 60


@pytest.mark.parametrize(
    ("done", "unclaimed", "connections", "expected"),
    [
        (0, 6_900 * MiB, 16, 8 * MiB),  # the hash should get its bytes soon
        (0, 205 * MiB, 16, 6 * MiB),  # two requests for each connection
        (512 * MiB, 6_000 * MiB, 16, 24 * MiB),
        (3_000 * MiB, 3_900 * MiB, 16, 64 * MiB),  # few requests while much is missing
        (6_000 * MiB, 512 * MiB, 16, 16 * MiB),
        (6_900 * MiB, 60 * MiB, 16, 4 * MiB),  # and small ones at the end
        (6_900 * MiB, 1, 16, 4 * MiB),
        (3_000 * MiB, 1024 * MiB, 1, 64 * MiB),
    ],
)
def test_how_much_one_request_asks_for(done: int, unclaimed: int, connections: int, expected: int) -> None:
    assert range_size(done, unclaimed, connections, Tuning()) == expected


FAST, EQUAL, SLOW, STILL = ByteRange(0, 4000), ByteRange(4000, 8000), ByteRange(8000, 9000), ByteRange(9000, 9500)


@pytest.mark.parametrize(
    ("paces", "least", "expected"),
    [
        ([], 1, None),
        ([Pace(FAST, 1000.0, 0.1)], 1, (FAST, 2000)),  # half of it
        ([Pace(FAST, 1000.0, 0.1)], 2001, None),  # too little for a request
        ([Pace(FAST, 1000.0, 3.0)], 1, None),  # it would take longer than to wait
        ([Pace(FAST, 100_000.0, 0.01)], 1, None),
        ([Pace(FAST, 3000.0, 0.0)], 1, (FAST, 1000)),  # it ends a third of a second earlier
        ([Pace(FAST, 4000.0, 0.0)], 1, None),  # a fifth is not worth a request
        ([Pace(FAST, 1000.0, 0.1), Pace(SLOW, 200.0, 0.1)], 1, (SLOW, 833)),  # the last one to end; most of it
        ([Pace(FAST, 1000.0, 0.1), Pace(SLOW, 100.0, 0.1)], 2000, (SLOW, 1000)),  # far behind: all of it
        ([Pace(FAST, 1000.0, 0.1), Pace(EQUAL, 1000.0, 0.1), Pace(STILL, 0.0, 0.0)], 1, (STILL, 500)),
    ],
)
def test_what_an_idle_connection_takes_from_another(
    paces: list[Pace], least: int, expected: tuple[ByteRange, int] | None
) -> None:
    assert plan_theft(paces, 1000.0, Tuning(min_steal_bytes=least)) == expected


def test_while_other_bytes_are_missing_they_are_taken_only_of_a_range_that_is_far_behind() -> None:
    tuning = Tuning(min_steal_bytes=1, far_behind=8)

    assert plan_theft([Pace(SLOW, 130.0, 0.1)], 1000.0, tuning, only_far_behind=True) is None
    assert plan_theft([Pace(SLOW, 120.0, 0.1)], 1000.0, tuning, only_far_behind=True) == (SLOW, 1000)

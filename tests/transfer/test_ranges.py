"""Which bytes of a file are missing, and how much a request asks for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from a1111_worker.transfer.ranges import ByteRange, ByteRanges, MiB, longest_range, range_size


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

    @rule(least=st.integers(1, 500))
    def steal(self, least: int) -> None:
        largest = max((byte_range.left for byte_range in self.claimed), default=0)

        byte_range = self.ranges.steal(least)

        assert (byte_range is not None) is (largest >= 2 * least)
        if byte_range is not None:
            assert byte_range.left >= least
            self.claimed.append(byte_range)

    @precondition(lambda self: self.claimed)
    @rule(data=st.data(), count=st.integers(1, 700))
    def advance(self, data: st.DataObject, count: int) -> None:
        byte_range = data.draw(st.sampled_from(self.claimed))
        fresh = range(byte_range.start, min(byte_range.start + count, byte_range.end))
        assert not self.written & set(fresh)

        self.ranges.advance(byte_range, count)

        self.written |= set(fresh)
        if not byte_range.left:
            self.claimed.remove(byte_range)

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
    ranges.advance(first, 10)
    ranges.release(first)
    again = ranges.claim(30)

    assert again and (again.start, again.end) == (10, 30)
    assert ranges.contiguous == 10


@pytest.mark.parametrize(
    ("unclaimed", "connections", "expected"),
    [
        (6_900_000_000, 16, 64 * MiB),  # few requests while much is missing
        (512 * MiB, 16, 32 * MiB),
        (128 * MiB, 16, 8 * MiB),  # and small ones at the end
        (1, 16, 8 * MiB),
        (1024 * MiB, 0, 64 * MiB),
    ],
)
def test_how_much_one_request_asks_for(unclaimed: int, connections: int, expected: int) -> None:
    assert range_size(unclaimed, connections, 8 * MiB, 64 * MiB) == expected


@pytest.mark.parametrize(
    ("backlog", "hash_speed", "rate", "expected"),
    [
        (0, 0.0, 320e6, 8 * MiB),  # unknown yet: the hash should get its bytes soon
        (0, 1e9, 0.0, 8 * MiB),
        (0, 1e9, 320e6, 64 * MiB),  # the hash catches up whatever the ranges are
        (0, 300e6, 320e6, 8 * MiB),  # it has nothing to do: small ranges
        (320 * MiB, 320e6, 320e6, 20 * MiB),  # it has work for as long as a range takes
        (9000 * MiB, 300e6, 320e6, 64 * MiB),
    ],
)
def test_a_range_lasts_no_longer_than_the_hash_has_work(
    backlog: int, hash_speed: float, rate: float, expected: int
) -> None:
    longest = min(64 * MiB, longest_range(backlog, hash_speed, rate, 16))

    assert range_size(6_900_000_000, 16, 8 * MiB, longest) == expected

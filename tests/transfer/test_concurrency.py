"""How many connections there are, and which of them are too slow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a1111_worker.transfer.concurrency import (
    ConcurrencyTuner,
    ConnectionDemand,
    ConnectionLimit,
    share_connections,
    too_slow,
)
from a1111_worker.transfer.ranges import Tuning


@given(
    limit=st.integers(1, 32),
    demands=st.lists(st.builds(ConnectionDemand, st.integers(0, 20), st.booleans()), max_size=12),
)
def test_connections_are_shared_fairly_and_never_more_than_there_are(
    limit: int, demands: list[ConnectionDemand]
) -> None:
    given_ = share_connections(limit, demands)

    assert sum(given_) == min(limit, sum(demand.connections for demand in demands if demand.is_next)) + min(
        max(0, limit - sum(demand.connections for demand in demands if demand.is_next)),
        sum(demand.connections for demand in demands if not demand.is_next),
    )
    for mine, demand in zip(given_, demands, strict=True):
        assert 0 <= mine <= demand.connections
        for theirs, other in zip(given_, demands, strict=True):
            if demand.is_next is other.is_next and mine < demand.connections:
                assert theirs <= mine + 1
            if demand.is_next and not other.is_next and mine < demand.connections:
                assert theirs == 0


@pytest.mark.parametrize(
    ("limit", "demands", "expected"),
    [
        (16, [ConnectionDemand(8, True)], [8]),
        (16, [ConnectionDemand(8, True)] * 9, [2, 2, 2, 2, 2, 2, 2, 1, 1]),  # nine LoRAs
        (
            16,
            [ConnectionDemand(1, True), ConnectionDemand(16, True)],
            [1, 15],
        ),  # what one does not demand goes to the other
        (16, [ConnectionDemand(16, False), ConnectionDemand(8, True)], [8, 8]),
        (16, [ConnectionDemand(16, False), ConnectionDemand(16, True)], [0, 16]),
        (2, [ConnectionDemand(4, True)] * 3, [1, 1, 0]),
    ],
)
def test_how_many_connections_each_file_gets(limit: int, demands: list[ConnectionDemand], expected: list[int]) -> None:
    assert share_connections(limit, demands) == expected


def test_no_more_connections_are_acquired_than_the_limit() -> None:
    limit = ConnectionLimit(2)

    acquired = [limit.acquire() for _ in range(3)]
    limit.release()

    assert acquired == [True, True, False]
    assert limit.acquire()


def test_a_download_that_is_over_leaves_its_share_to_the_others() -> None:
    limit, first, second = ConnectionLimit(16), object(), object()

    alone = limit.share(first, ConnectionDemand(16, True))
    shared = limit.share(second, ConnectionDemand(16, True))
    limit.forget(first)

    assert (alone, shared) == (16, 8)
    assert limit.share(second, ConnectionDemand(16, True)) == 16


def tune(rates: dict[int, float], *, start: int = 8, most: int = 16) -> int:
    """How many connections a download ends up with, if `rates` are the bytes a second that each number reaches."""
    tuner = ConcurrencyTuner(start, most, Tuning(measure_seconds=1.0, retune_seconds=1000.0))
    received, now = 0.0, 0.0
    for _ in range(100):
        connections = tuner.observe(now, int(received), tuner.connections)
        now += 0.5
        received += 0.5 * rates[connections]
    return tuner.connections


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({8: 160e6, 16: 320e6}, 16),  # each connection is slow: more of them
        ({8: 160e6, 16: 170e6}, 8),  # the network is full
        ({8: 160e6, 16: 100e6}, 8),  # more make it worse
        ({8: 900e6, 16: 1800e6}, 8),  # fast enough already: more would only cost CPU
    ],
)
def test_connections_grow_only_while_that_helps(rates: dict[int, float], expected: int) -> None:
    assert tune(rates) == expected


def test_the_tuner_waits_until_all_connections_receive_bytes() -> None:
    tuner = ConcurrencyTuner(4, 16, Tuning(measure_seconds=1.0))

    for second in range(10):
        tuner.observe(float(second), second * 1000, flowing=3)

    assert tuner.connections == 4


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ([], []),
        ([50.0], [True]),  # a single connection must reach it alone
        ([150.0], [False]),
        ([60.0, 60.0], [False, False]),  # together they are fast enough
        ([0.0, 1e6], [True, False]),
        ([5e6, 5e6, 5e6, 4e5], [False, False, False, True]),  # far behind the others
        ([5e6, 5e6, 5e6, 6e5], [False, False, False, False]),
        ([10.0] * 16, [False] * 16),  # they are all slow: it is the network
    ],
)
def test_which_connections_are_replaced(speeds: list[float], expected: list[bool]) -> None:
    assert too_slow(speeds, least=100.0) == expected

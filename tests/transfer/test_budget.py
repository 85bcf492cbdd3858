"""How many connections each file may have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a1111_worker.transfer.budget import ConnectionBudget, Demand, share_connections


@given(
    limit=st.integers(1, 32),
    demands=st.lists(st.builds(Demand, st.integers(0, 20), st.booleans()), max_size=12),
)
def test_connections_are_shared_fairly_and_never_more_than_there_are(limit: int, demands: list[Demand]) -> None:
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
        (16, [Demand(8, True)], [8]),
        (16, [Demand(8, True)] * 9, [2, 2, 2, 2, 2, 2, 2, 1, 1]),  # nine LoRAs
        (
            16,
            [Demand(1, True), Demand(16, True)],
            [1, 15],
        ),  # what one does not demand goes to the other
        (16, [Demand(16, False), Demand(8, True)], [8, 8]),
        (16, [Demand(16, False), Demand(16, True)], [0, 16]),
        (2, [Demand(4, True)] * 3, [1, 1, 0]),
    ],
)
def test_how_many_connections_each_file_gets(limit: int, demands: list[Demand], expected: list[int]) -> None:
    assert share_connections(limit, demands) == expected


def test_no_more_connections_are_acquired_than_the_limit() -> None:
    budget = ConnectionBudget(2)

    acquired = [budget.acquire(download) for download in ("first", "second", "first")]
    budget.release("first")

    assert acquired == [True, True, False]
    assert budget.acquire("second")


def test_a_download_that_is_over_leaves_its_share_and_its_connections_to_the_others() -> None:
    budget = ConnectionBudget(16)

    alone = budget.share("first", Demand(16, True))
    shared = budget.share("second", Demand(16, True))
    acquired = [budget.acquire("first") for _ in range(17)]
    budget.forget("first")

    assert (alone, shared) == (16, 8)
    assert acquired == [True] * 16 + [False]
    assert budget.share("second", Demand(16, True)) == 16
    assert budget.acquire("second")

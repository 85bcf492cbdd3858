"""Pauses between tries."""

from __future__ import annotations

import itertools

import pytest

from a1111_worker.retry import Backoff, parse_retry_after


def test_pauses_grow_and_stay_within_their_limits() -> None:
    backoff = Backoff(shortest=0.5, longest=10.0)

    pauses = [backoff.next_pause() for _ in range(200)]

    assert all(0.5 <= pause <= 10.0 for pause in pauses)
    assert all(after <= 3 * before for before, after in itertools.pairwise(pauses))
    assert max(pauses) > 5.0  # so many pauses practically always grow that long


def test_the_first_pause_is_short() -> None:
    pauses = [Backoff(shortest=0.5, longest=10.0).next_pause() for _ in range(200)]

    assert all(0.5 <= pause <= 1.5 for pause in pauses)


def test_workers_that_fail_together_pause_differently() -> None:
    pauses = {Backoff(shortest=0.5, longest=10.0).next_pause() for _ in range(20)}

    assert len(pauses) == 20


def test_after_progress_pauses_are_short_again() -> None:
    backoff = Backoff(shortest=0.5, longest=10.0)

    for _ in range(50):
        backoff.next_pause()
    backoff.reset()

    assert 0.5 <= backoff.next_pause() <= 1.5


def test_no_pause_is_longer_than_the_longest_even_if_the_shortest_is() -> None:
    assert Backoff(shortest=30.0, longest=1.0).next_pause() == 1.0


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        ("7", 7.0, 7.0),
        (" 7 ", 7.0, 7.0),
        ("0", 0.0, 0.0),
        ("9" * 400, 1e8, 1e9),  # a number that no float holds
        ("9" * 5_000, 1e8, 1e9),  # more digits than Python converts
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0, 0.0),  # past
        ("Wed, 21 Oct 2099 07:28:00 GMT", 1e8, 1e11),
    ],
)
def test_a_servers_pause_is_a_number_or_a_date(text: str, least: float, most: float) -> None:
    seconds = parse_retry_after(text)

    assert seconds is not None
    assert least <= seconds <= most


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "soon",
        "-5",
        "1.5",
        "²",
        "٧",
        "Wed, 99 Oct 2015 07:28:00 GMT",
        f"Wed, 21 Oct {'9' * 5_000} 07:28:00 GMT",
    ],
)
def test_anything_else_is_no_pause(text: str | None) -> None:
    assert parse_retry_after(text) is None

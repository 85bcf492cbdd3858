"""What the tests share, where a mistake in it would hide mistakes elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import wait_until


def test_waiting_returns_what_the_condition_returned_at_last() -> None:
    results: Iterator[str] = iter(["", "", "ready", "later"])

    assert wait_until(lambda: next(results), "a word") == "ready"


def test_a_wait_that_is_too_long_fails_and_names_the_condition() -> None:
    with pytest.raises(AssertionError, match="waited 0 s for the impossible"):
        wait_until(lambda: False, "the impossible", seconds=0.01)


def test_a_condition_that_is_true_in_the_last_moment_is_no_failure() -> None:
    assert wait_until(lambda: True, "nothing", seconds=0.0)

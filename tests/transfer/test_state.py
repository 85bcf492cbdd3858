"""When a download that failed tries again, and when it gives up."""

from __future__ import annotations

from a1111_worker.transfer.ranges import Tuning
from a1111_worker.transfer.state import RetryState


def test_connections_that_fail_together_are_one_failure() -> None:
    retries = RetryState(Tuning(tries=3, pause=1.0, pause_most=10.0))

    together = [retries.count_failure(5.0) for _ in range(16)]

    assert together == [True] * 16
    assert retries.failures == 1
    assert 6.0 <= retries.retry_at <= 8.0


def test_it_gives_up_at_last_and_has_all_its_tries_again_after_progress() -> None:
    retries = RetryState(Tuning(tries=3, pause=1.0, pause_most=2.0))

    before = retries.count_failure(0.0), retries.count_failure(10.0)
    retries.count_progress()
    after = retries.count_failure(20.0), retries.count_failure(30.0), retries.count_failure(40.0)

    assert before == (True, True)
    assert after == (True, True, False)


def test_the_pause_that_a_server_asks_for_is_kept() -> None:
    retries = RetryState(Tuning(pause=0.1, pause_most=0.2))

    retries.count_failure(100.0, pause=30.0)

    assert retries.retry_at == 130.0

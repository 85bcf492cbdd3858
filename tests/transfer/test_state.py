"""When a download that failed tries again, and when it gives up."""

from __future__ import annotations

from a1111_worker.retry import Backoff
from a1111_worker.transfer.state import RetryBudget


def test_connections_that_fail_together_are_one_failure() -> None:
    budget = RetryBudget(3, Backoff(1.0, 10.0))

    together = [budget.spend(5.0) for _ in range(16)]

    assert together == [True] * 16
    assert budget.failures == 1
    assert 6.0 <= budget.retry_at <= 8.0


def test_a_budget_is_spent_at_last_and_full_again_after_progress() -> None:
    budget = RetryBudget(3, Backoff(1.0, 2.0))

    before = budget.spend(0.0), budget.spend(10.0)
    budget.reset()
    after = budget.spend(20.0), budget.spend(30.0), budget.spend(40.0)

    assert before == (True, True)
    assert after == (True, True, False)


def test_the_pause_that_a_server_asks_for_is_kept() -> None:
    budget = RetryBudget(3, Backoff(0.1, 0.2))

    budget.spend(100.0, at_least=30.0)

    assert budget.retry_at == 130.0

"""When a download that failed tries again, when it gives up, and which link it uses."""

from __future__ import annotations

import pytest

from a1111_worker.errors import DownloadFailed, ModelNotFound
from a1111_worker.transfer.connection import FileChanged, FileGone, LinkRefused
from a1111_worker.transfer.ranges import Tuning
from a1111_worker.transfer.retries import PROGRESS, Links, Retries


def test_connections_that_fail_together_are_one_failure() -> None:
    retries = Retries(Tuning(tries=2, pause=1.0, pause_most=10.0))

    together = [retries.count_failure(0.0, 5.0 + number / 100, done=0) for number in range(16)]

    assert together == [True] * 16
    assert 6.0 <= retries.retry_at <= 8.0
    assert not retries.count_failure(10.0, 21.0, done=0)


def test_it_gives_up_at_last_and_has_all_its_tries_again_after_progress() -> None:
    retries = Retries(Tuning(tries=3, pause=1.0, pause_most=2.0))

    before = [retries.count_failure(now, now, done=0) for now in (0.0, 10.0)]
    after = [retries.count_failure(now, now, done=PROGRESS) for now in (20.0, 30.0, 40.0, 50.0)]

    assert before == [True, True]
    assert after == [True, True, True, False]


def test_after_progress_it_tries_again_at_once() -> None:
    retries = Retries(Tuning(pause=1.0))

    retries.count_failure(0.0, 5.0, done=PROGRESS)
    retries.count_failure(4.0, 5.001, done=PROGRESS)  # broke at the same moment

    assert retries.retry_at <= 5.001


def test_the_pause_that_a_server_asks_for_is_kept() -> None:
    retries = Retries(Tuning(pause=0.1, pause_most=0.2))

    retries.count_failure(0.0, 100.0, done=0, pause=30.0)

    assert retries.retry_at == 130.0


def test_a_file_may_change_three_times() -> None:
    retries = Retries(Tuning(restarts=3))
    for _ in range(3):
        retries.count_restart("a model", FileChanged("it is another file"))

    with pytest.raises(DownloadFailed, match="a model changed while it was downloaded"):
        retries.count_restart("a model", FileChanged("it is another file"))


def test_a_refused_link_is_renewed_until_that_was_too_often() -> None:
    links = Links("a model", Tuning(link_renewals=1))
    links.renew("https://files.example/1", 0.0)
    first = links.current

    links.refuse(first, LinkRefused("403"))
    is_due = links.is_due(0.0)
    links.renew("https://files.example/2", 0.0)
    links.refuse(first, LinkRefused("403"))  # by another connection: the present one may be good

    assert is_due and not links.is_due(0.0)
    with pytest.raises(DownloadFailed, match="403, and every new one too"):
        links.refuse(links.current, LinkRefused("403"))


def test_a_file_that_is_gone_twice_is_not_there() -> None:
    links = Links("a model", Tuning())
    links.renew("https://files.example/1", 0.0)
    links.refuse(links.current, FileGone("404"))
    links.renew("https://files.example/2", 0.0)

    with pytest.raises(ModelNotFound):
        links.refuse(links.current, FileGone("404"))

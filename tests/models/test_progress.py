"""How far several files are, told as one."""

from __future__ import annotations

from a1111_worker.domain import Progress
from a1111_worker.models.progress import AggregateProgress, FileProgress


def test_files_are_added_up() -> None:
    looks: list[Progress] = []
    tallies = AggregateProgress(2, looks.append)

    tallies.of("a")(FileProgress("A", 10, 100))
    tallies.of("b")(FileProgress("B", 50, 300))
    tallies.ready()
    tallies.of("a")(FileProgress("A", 100, 100))

    assert [look.percent for look in looks] == [None, 15.0, 37.5]  # of all, once all are known
    assert looks[-1].facts["bytes"] == 150
    assert looks[-1].facts["total"] == 400
    assert looks[-1].detail == "1 of 2 ready, 0 of 0 MB"


def test_what_an_earlier_download_left_has_no_speed() -> None:
    looks: list[Progress] = []
    tell = AggregateProgress(1, looks.append).of("a")

    tell(FileProgress("A", 900, 1000))

    assert looks[0].facts["mb_per_s"] == 0.0
    assert looks[0].eta_s is None


def test_a_size_that_nobody_knows_has_no_percent() -> None:
    looks: list[Progress] = []

    AggregateProgress(1, looks.append).of("a")(FileProgress("A", 5_000_000))

    assert looks[0].percent is None
    assert looks[0].detail == "0 of 1 ready, 5 of 5 MB"


def test_waiting_is_told_only_where_nothing_else_is_done() -> None:
    looks: list[Progress] = []
    tallies = AggregateProgress(2, looks.append)

    tallies.of("a")(FileProgress("A", 1_000_000, 4_000_000, waiting="another worker"))
    tallies.of("b")(FileProgress("B", 1_000_000, 4_000_000))

    assert looks[0].detail == "another worker is fetching A, 25 %; 0 of 2 ready, 1 of 4 MB"
    assert looks[1].detail == "0 of 2 ready, 2 of 8 MB"


def test_all_bytes_are_not_100_percent_until_every_file_is_ready() -> None:
    looks: list[Progress] = []
    tallies = AggregateProgress(1, looks.append)

    tallies.of("a")(FileProgress("A", 6_000_000, 6_000_000))
    tallies.ready()

    assert [(look.percent, look.detail) for look in looks] == [
        (99.9, "0 of 1 ready, 6 of 6 MB, verifying"),
        (100.0, "1 of 1 ready, 6 of 6 MB"),
    ]


def test_a_file_that_was_waited_for_is_ready_in_the_end() -> None:
    looks: list[Progress] = []
    tallies = AggregateProgress(1, looks.append)

    tallies.of("a")(FileProgress("A", 6_000_000, 6_000_000, waiting="another worker"))
    tallies.ready()

    assert looks[-1].detail == "1 of 1 ready, 6 of 6 MB"


def test_one_file_of_two_is_not_verified_alone() -> None:
    looks: list[Progress] = []

    AggregateProgress(2, looks.append).of("a")(FileProgress("A", 6_000_000, 6_000_000))

    assert looks[-1].detail == "0 of 2 ready, 6 of 6 MB"

"""The progress of several files, reported as one."""

from __future__ import annotations

from a1111_worker.domain import Progress
from a1111_worker.models.progress import AggregateProgress, FileProgress


def test_files_are_added_up() -> None:
    seen: list[Progress] = []
    aggregate = AggregateProgress(2, seen.append)

    aggregate.of("a")(FileProgress("A", 10, 100))
    aggregate.of("b")(FileProgress("B", 50, 300))
    aggregate.count_ready()
    aggregate.of("a")(FileProgress("A", 100, 100))

    assert [progress.percent for progress in seen] == [None, 15.0, 37.5]  # of all, once all are known
    assert seen[-1].facts["bytes"] == 150
    assert seen[-1].facts["total"] == 400
    assert seen[-1].detail == "1 of 2 ready, 0 of 0 MB"


def test_what_an_earlier_download_left_has_no_speed() -> None:
    seen: list[Progress] = []
    report = AggregateProgress(1, seen.append).of("a")

    report(FileProgress("A", 900, 1000))

    assert seen[0].facts["mb_per_s"] == 0.0
    assert seen[0].eta_s is None


def test_a_file_of_unknown_size_has_no_percent() -> None:
    seen: list[Progress] = []

    AggregateProgress(1, seen.append).of("a")(FileProgress("A", 5_000_000))

    assert seen[0].percent is None
    assert seen[0].detail == "0 of 1 ready, 5 of 5 MB"


def test_waiting_is_reported_only_if_nothing_else_is_done() -> None:
    seen: list[Progress] = []
    aggregate = AggregateProgress(2, seen.append)

    aggregate.of("a")(FileProgress("A", 1_000_000, 4_000_000, fetched_by="another worker"))
    aggregate.of("b")(FileProgress("B", 1_000_000, 4_000_000))

    assert seen[0].detail == "another worker is fetching A, 25 %; 0 of 2 ready, 1 of 4 MB"
    assert seen[1].detail == "0 of 2 ready, 2 of 8 MB"


def test_all_bytes_are_not_100_percent_until_every_file_is_ready() -> None:
    seen: list[Progress] = []
    aggregate = AggregateProgress(1, seen.append)

    aggregate.of("a")(FileProgress("A", 6_000_000, 6_000_000))
    aggregate.count_ready()

    assert [(one.percent, one.detail) for one in seen] == [
        (99.9, "0 of 1 ready, 6 of 6 MB, verifying"),
        (100.0, "1 of 1 ready, 6 of 6 MB"),
    ]


def test_a_file_that_was_waited_for_is_ready_in_the_end() -> None:
    seen: list[Progress] = []
    aggregate = AggregateProgress(1, seen.append)

    aggregate.of("a")(FileProgress("A", 6_000_000, 6_000_000, fetched_by="another worker"))
    aggregate.count_ready()

    assert seen[-1].detail == "1 of 1 ready, 6 of 6 MB"


def test_one_file_of_two_is_not_verified_alone() -> None:
    seen: list[Progress] = []

    AggregateProgress(2, seen.append).of("a")(FileProgress("A", 6_000_000, 6_000_000))

    assert seen[-1].detail == "0 of 2 ready, 6 of 6 MB"

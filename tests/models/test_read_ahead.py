"""Files are read while a block runs, and not after it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from a1111_worker.models.read_ahead import read_ahead
from tests.support import wait_until


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def test_whole_files_are_read_in_their_order_and_one_that_is_gone_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(bytes(9_000_000))
    second.write_bytes(bytes(200_000))

    with caplog.at_level("INFO"), read_ahead([first, tmp_path / "gone", second]):
        wait_until(lambda: len(caplog.messages) == 3, "the end of the reading")

    assert caplog.messages == [
        "9.0 MB of first were read ahead",
        "gone could not be read ahead (ENOENT)",
        "0.2 MB of second were read ahead",
    ]


def test_the_end_of_the_block_stops_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    endless = Path("/dev/zero")

    with caplog.at_level("INFO"):
        with read_ahead([endless]):
            wait_until(threads, "the reading")
        wait_until(lambda: not threads(), "its end")

    assert endless.name in caplog.text

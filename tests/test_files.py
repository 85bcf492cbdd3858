"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from a1111_worker.files import error_name, write_atomically


def test_a_file_is_written_and_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.json"

    for content in (b"first", b"second, longer"):
        write_atomically(target, content)

        assert target.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_atomically(target, b"whole")
    target.unlink()
    target.mkdir()  # so that nothing can be renamed to it

    with pytest.raises(OSError, match=r".*"):
        write_atomically(target, b"other")

    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (OSError(errno.EIO, os.strerror(errno.EIO), "/some/path"), "EIO"),
        (FileNotFoundError(errno.ENOENT, "no such file", "/some/path"), "ENOENT"),
        (OSError("without a number"), "OSError"),
    ],
)
def test_an_error_is_named_in_one_word_without_its_path(error: OSError, name: str) -> None:
    assert error_name(error) == name

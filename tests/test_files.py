"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from a1111_worker.errors import FileTooLong, ModelError, VolumeFailed, VolumeFull
from a1111_worker.files import (
    VolumeState,
    error_name,
    look,
    names_in,
    read_small,
    volume_error,
    volume_state,
    write_atomically,
)


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


@pytest.mark.parametrize(
    ("number", "state", "error"),
    [
        (errno.ENOSPC, VolumeState.FULL, VolumeFull),
        (errno.EDQUOT, VolumeState.FULL, VolumeFull),
        (errno.EFBIG, VolumeState.BROKEN, FileTooLong),
        (errno.ENOENT, VolumeState.GONE, VolumeFailed),  # where nobody knows what it means that it is gone
        (errno.ENOTDIR, VolumeState.GONE, VolumeFailed),
        (errno.ENAMETOOLONG, VolumeState.GONE, VolumeFailed),
        (errno.EIO, VolumeState.BROKEN, VolumeFailed),
        (errno.ESTALE, VolumeState.BROKEN, VolumeFailed),
        (errno.EROFS, VolumeState.BROKEN, VolumeFailed),
        (errno.EACCES, VolumeState.BROKEN, VolumeFailed),
        (errno.EPERM, VolumeState.BROKEN, VolumeFailed),
        (errno.ENOTCONN, VolumeState.BROKEN, VolumeFailed),
        (errno.ETIMEDOUT, VolumeState.BROKEN, VolumeFailed),
        (errno.ELOOP, VolumeState.BROKEN, VolumeFailed),
        (12345, VolumeState.BROKEN, VolumeFailed),
        (None, VolumeState.BROKEN, VolumeFailed),
    ],
)
def test_every_error_of_a_volume_means_one_of_three_things(
    number: int | None, state: VolumeState, error: type[ModelError]
) -> None:
    raised = OSError(number, "as the system says it", "/a/path") if number else OSError("without a number")

    translated = volume_error(raised, "writing a model")

    assert volume_state(raised) is state
    assert type(translated) is error
    assert translated.retryable and not translated.refresh_worker
    assert f"writing a model failed ({error_name(raised)})" in translated.message
    assert "/a/path" not in translated.message


def test_what_is_there_and_what_is_not(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")

    found = look(tmp_path / "file")

    assert found is not None and found.st_size == 3
    for nothing in (tmp_path / "no", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        assert look(nothing) is None
        assert names_in(nothing) == []
    with pytest.raises(VolumeFailed):
        look(loop(tmp_path))
    with pytest.raises(VolumeFailed):
        names_in(loop(tmp_path))


def loop(folder: Path) -> Path:
    """A link to itself: a path that cannot be looked at."""
    link = folder / "loop"
    if not link.is_symlink():
        link.symlink_to(link)
    return link


def test_a_small_file_is_read_and_nothing_else_is(tmp_path: Path) -> None:
    small, large, fifo = tmp_path / "small", tmp_path / "large", tmp_path / "fifo"
    small.write_bytes(b"x" * 1_000_000)
    large.write_bytes(b"x" * 1_000_001)
    os.mkfifo(fifo)

    assert read_small(small) == b"x" * 1_000_000
    for other in (large, fifo, tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match="it is"):
            read_small(other)
    with pytest.raises(FileNotFoundError):
        read_small(tmp_path / "no")


def test_a_file_with_the_longest_name_is_written(tmp_path: Path) -> None:
    target = tmp_path / ("ä" * 127)

    write_atomically(target, b"content")

    assert [path.name for path in tmp_path.iterdir()] == [target.name]

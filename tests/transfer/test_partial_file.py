"""A partial file: whose it is, what is saved beside it, and what a disk refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from a1111_worker.errors import PartialFileLost
from a1111_worker.transfer.partial_file import PartialFile, PartialFileState, ranges_file


@pytest.mark.parametrize(
    "change",
    [
        lambda part: part.clear(),
        lambda part: part.set_size(1),
        lambda part: part.write(memoryview(b"wrong"), 0),
    ],
    ids=["clear", "set_size", "write"],
)
def test_a_partial_file_that_was_taken_over_is_not_changed(
    tmp_path: Path, change: Callable[[PartialFile], None]
) -> None:
    part, model = PartialFile(tmp_path / "model.part"), tmp_path / "model.safetensors"
    part.write(memoryview(b"a verified model"), 0)
    part.path.rename(model)

    with pytest.raises(PartialFileLost):
        change(part)

    assert model.read_bytes() == b"a verified model"
    part.close()


def test_the_saved_state_is_loaded_again(tmp_path: Path) -> None:
    part = PartialFile(tmp_path / "model.part")
    part.set_size(100)
    state = PartialFileState(100, '"an etag"', "ab" * 32, ((0, 10), (20, 100)))

    part.save_state(state)

    assert part.load_state() == state
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.part", "model.part.ranges"]
    part.close()


def test_a_state_that_cannot_be_saved_is_a_warning_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    part = PartialFile(tmp_path / "model.part")
    ranges_file(part.path).mkdir()

    part.save_state(PartialFileState(100))

    assert "could not be saved (EISDIR)" in caplog.text
    part.close()


@pytest.mark.parametrize(
    ("size", "sha256", "expected"),
    [
        (100, "ab", True),
        (None, None, True),  # nothing is known that could contradict
        (None, "ab", True),
        (100, None, True),
        (101, "ab", False),
        (100, "cd", False),
    ],
)
def test_a_saved_state_belongs_to_a_file_unless_its_size_or_hash_differ(
    size: int | None, sha256: str | None, expected: bool
) -> None:
    assert PartialFileState(100, sha256="ab").may_be_of(size, sha256) is expected
    assert PartialFileState(100).may_be_of(size, None) is (size != 101)

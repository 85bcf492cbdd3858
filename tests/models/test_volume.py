"""What lies where in the folders of models, and how a file gets there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from a1111_worker.domain import ModelKind
from a1111_worker.models.volume import CacheDirectory, can_write
from tests.disks import read_only


@pytest.fixture
def directory(tmp_path: Path) -> CacheDirectory:
    directory = CacheDirectory(tmp_path / "loras", ModelKind.LORA, is_writable=True)
    directory.prepare()
    return directory


def test_a_model_is_there_when_its_part_is_placed_and_not_before(directory: CacheDirectory) -> None:
    part = directory.partial_file("v1", "me")
    part.write_bytes(b"model")
    Path(f"{part}.ranges").write_text("{}")
    before = directory.index().files

    directory.place(part, "a_1.safetensors")

    assert before == set()
    assert directory.index().files == {"a_1.safetensors"}
    assert directory.path("a_1.safetensors").read_bytes() == b"model"
    assert list(directory.partial_files.iterdir()) == []


def test_an_adopted_part_keeps_what_is_known_of_it_and_older_ones_go(directory: CacheDirectory) -> None:
    for age, owner in enumerate(["newest", "older", "oldest"]):
        part = directory.partial_file("v7", owner)
        part.write_bytes(owner.encode())
        Path(f"{part}.ranges").write_text(owner)
        os.utime(part, (1_000_000 - age, 1_000_000 - age))
    directory.partial_file("v77", "other").write_bytes(b"another model's")

    directory.adopt_partial_file("v7", "me")

    assert directory.partial_file("v7", "me").read_text() == "newest"
    assert Path(f"{directory.partial_file('v7', 'me')}.ranges").read_text() == "newest"
    assert len(list(directory.partial_files.iterdir())) == 3  # mine with its ranges, and the other model's


def test_ones_own_part_is_kept_before_any_other(directory: CacheDirectory) -> None:
    directory.partial_file("v7", "me").write_bytes(b"mine")
    directory.partial_file("v7", "dead").write_bytes(b"other")

    directory.adopt_partial_file("v7", "me")

    assert [path.read_bytes() for path in directory.partial_files.iterdir()] == [b"mine"]


def test_a_listing_follows_what_others_do(directory: CacheDirectory) -> None:
    first = directory.index().files
    (directory.folder / "x.safetensors").write_bytes(b"1")
    os.utime(directory.folder, (1, 1))  # a volume whose times say nothing
    directory.index()
    (directory.folder / "y.safetensors").write_bytes(b"1")
    os.utime(directory.folder, (1, 1))

    stale, fresh = directory.index().files, directory.refresh().files

    assert [sorted(files) for files in (first, stale, fresh)] == [
        [],
        ["x.safetensors"],
        ["x.safetensors", "y.safetensors"],
    ]


def test_what_was_taken_away_can_be_put_back_but_never_over_a_new_one(directory: CacheDirectory) -> None:
    directory.path("a.safetensors").write_bytes(b"old")
    away = directory.move_to_trash("a.safetensors", "me")
    gone = directory.size("a.safetensors") is None

    directory.restore(away, "a.safetensors")
    back = directory.path("a.safetensors").read_bytes()
    away = directory.move_to_trash("a.safetensors", "me")
    directory.path("a.safetensors").write_bytes(b"new")
    directory.restore(away, "a.safetensors")

    assert gone
    assert back == b"old"
    assert directory.path("a.safetensors").read_bytes() == b"new"


def test_a_sweep_removes_what_nobody_comes_back_for(directory: CacheDirectory) -> None:
    now = directory.folder.stat().st_mtime
    old, young = directory.partial_file("v1", "dead"), directory.partial_file("v2", "alive")
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (now - 1000, now - 1000))
    directory.path("a.safetensors").write_bytes(b"model")
    for name in ("a.safetensors.json", "a.safetensors.uses", "gone.safetensors.json", "gone.safetensors.uses"):
        directory.path(name).write_text("{}")
    draft = directory.path(".a.safetensors.json.dead-1")
    draft.write_text("{")
    os.utime(draft, (now - 1000, now - 1000))
    directory.path("notes.txt").write_text("not ours")

    directory.sweep(older_than=500)

    left = {path.name for path in directory.folder.iterdir() if path.is_file()}
    assert left == {"a.safetensors", "a.safetensors.json", "a.safetensors.uses", "notes.txt"}
    assert [path.name for path in directory.partial_files.iterdir()] == [young.name]


def test_a_folder_that_cannot_be_written_says_so(directory: CacheDirectory) -> None:
    with read_only(directory.folder):
        during = can_write(directory.folder, "me")

    assert not during
    assert can_write(directory.folder, "me")
    assert not can_write(directory.folder / "missing", "me")
    assert not [path.name for path in directory.folder.iterdir() if path.name.startswith(".probe")]

"""What lies where in the folders of models, and how a file gets there."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from a1111_worker.domain import ModelKind
from a1111_worker.errors import JobCancelled, VolumeFailed
from a1111_worker.models.volume import CacheDirectories, CacheDirectory, can_write
from a1111_worker.transfer.partial_file import MOVED_AT_ONCE, PartialFileState, saved_state
from tests.disks import read_only


@pytest.fixture
def directory(tmp_path: Path) -> CacheDirectory:
    directory = CacheDirectory(tmp_path / "loras", ModelKind.LORA, is_writable=True)
    directory.prepare()
    return directory


def test_a_model_is_there_once_its_partial_file_is_placed_and_not_before(directory: CacheDirectory) -> None:
    partial_file = directory.partial_file("v1", "me")
    partial_file.write_bytes(b"model")
    Path(f"{partial_file}.ranges").write_text("{}")
    before = directory.index().files

    directory.place(partial_file, "a_1.safetensors")

    assert before == set()
    assert directory.index().files == {"a_1.safetensors"}
    assert directory.path("a_1.safetensors").read_bytes() == b"model"
    assert list(directory.partial_files.iterdir()) == []


SHA256 = "ab" * 32


def leave(directory: CacheDirectory, key: str, owner: str, content: bytes, *done: tuple[int, int]) -> Path:
    """What an owner left: a partial file of 10 bytes, with its state."""
    path = directory.partial_file(key, owner)
    path.write_bytes(content)
    state = {"version": 1, "size": 10, "etag": None, "sha256": SHA256, "boot": "?", "done": done}
    Path(f"{path}.ranges").write_text(json.dumps(state))
    return path


def adopt(directory: CacheDirectory) -> tuple[bytes, PartialFileState | None]:
    directory.adopt_partial_files("v7", "me", SHA256, lambda: None)
    own = directory.partial_file("v7", "me")
    return own.read_bytes() if own.exists() else b"", saved_state(own)


def test_the_bytes_of_adopted_partial_files_are_put_together_in_a_file_of_ones_own(directory: CacheDirectory) -> None:
    leave(directory, "v7", "dead", b"0123456789", (0, 2), (4, 6))
    leave(directory, "v7", "deader", b"xx23xxxx89", (2, 4), (8, 10))
    others = leave(directory, "v77", "other", b"another model's")

    content, state = adopt(directory)

    assert content == b"012345\0\x0089"
    assert state == PartialFileState(10, None, SHA256, ((0, 6), (8, 10)))
    assert {path.name.split(".")[0] for path in directory.partial_files.iterdir()} == {"v7", "v77"}
    assert len(list(directory.partial_files.iterdir())) == 4  # mine and the other model's, each with its state
    assert others.exists()


def test_a_writer_that_wakes_up_after_its_file_was_adopted_writes_to_nobodys_model(directory: CacheDirectory) -> None:
    path = leave(directory, "v7", "paused", b"0123456789", (0, 10))
    paused = os.open(path, os.O_RDWR)  # it was stopped between its last look at the name and its write

    adopt(directory)
    directory.place(directory.partial_file("v7", "me"), "a.safetensors")
    os.pwrite(paused, b"wrong", 0)
    os.ftruncate(paused, 3)
    os.close(paused)

    assert directory.path("a.safetensors").read_bytes() == b"0123456789"


def test_moving_takes_no_more_room_than_one_file_and_may_end_at_any_moment(
    directory: CacheDirectory,
) -> None:
    size = 3 * MOVED_AT_ONCE
    path = directory.partial_file("v7", "dead")
    path.write_bytes(os.urandom(size))
    content = path.read_bytes()
    state = {"version": 1, "size": size, "etag": None, "sha256": SHA256, "boot": "?", "done": [[0, size]]}
    Path(f"{path}.ranges").write_text(json.dumps(state))
    checks = iter([True, False, True, True])
    taken: list[int] = []

    def check() -> None:
        taken.append(sum(each.stat().st_blocks * 512 for each in directory.partial_files.iterdir()))
        if not next(checks):
            raise JobCancelled("in the middle")

    with pytest.raises(JobCancelled):
        directory.adopt_partial_files("v7", "me", SHA256, check)
    half = saved_state(directory.partial_file("v7", "me"))
    directory.adopt_partial_files("v7", "me", SHA256, check)

    own = directory.partial_file("v7", "me")
    assert half is not None and half.done == ((2 * MOVED_AT_ONCE, size),)
    assert own.read_bytes() == content
    assert not path.exists()
    assert max(taken) < size + MOVED_AT_ONCE + 100_000


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: Path(f"{path}.ranges").unlink(),
        lambda path: Path(f"{path}.ranges").write_text("{"),
        lambda path: Path(f"{path}.ranges").write_text(Path(f"{path}.ranges").read_text().replace("ab", "cd")),
        lambda path: path.write_bytes(b""),
    ],
    ids=["no state", "an unreadable state", "another hash", "no bytes"],
)
def test_a_partial_file_that_is_of_no_use_is_removed(directory: CacheDirectory, harm: Callable[[Path], object]) -> None:
    harm(leave(directory, "v7", "dead", b"0123456789", (0, 10)))

    _, state = adopt(directory)

    assert state is None or not state.present
    assert not directory.left_partial_files("v7", "me")


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


def test_a_model_in_the_trash_can_be_restored_but_never_over_a_new_one(directory: CacheDirectory) -> None:
    directory.path("a.safetensors").write_bytes(b"old")
    trashed = directory.move_to_trash("a.safetensors", "me")
    assert trashed is not None
    gone = directory.size("a.safetensors") is None

    directory.restore(trashed, "a.safetensors")
    back = directory.path("a.safetensors").read_bytes()
    trashed = directory.move_to_trash("a.safetensors", "me")
    assert trashed is not None
    directory.path("a.safetensors").write_bytes(b"new")
    directory.restore(trashed, "a.safetensors")

    assert gone
    assert back == b"old"
    assert directory.path("a.safetensors").read_bytes() == b"new"


def test_a_sweep_removes_what_nobody_needs_any_more(directory: CacheDirectory) -> None:
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


def test_a_slow_listing_delays_no_thread_that_may_use_the_last_one(tmp_path: Path) -> None:
    is_listing, may_go_on = threading.Event(), threading.Event()
    is_slow = False

    def listdir(folder: Path) -> list[str]:
        if is_slow:
            is_listing.set()
            may_go_on.wait(30)
        return [path.name for path in folder.iterdir()]

    directory = CacheDirectory(tmp_path, ModelKind.LORA, listdir=listdir)
    directory.path("a.safetensors").touch()
    directory.index()
    directory.path("b.safetensors").touch()
    is_slow = True
    refreshing = threading.Thread(target=directory.refresh)
    refreshing.start()
    assert is_listing.wait(10)
    seen: list[frozenset[str]] = []
    looking = threading.Thread(target=lambda: seen.append(directory.index(fresh=False).files))
    looking.start()

    looking.join(5)
    is_in_time = bool(seen)
    may_go_on.set()
    for thread in (looking, refreshing):
        thread.join()

    assert is_in_time and seen == [{"a.safetensors"}]
    assert directory.index(fresh=False).files == {"a.safetensors", "b.safetensors"}


# -- the directories of a worker


def test_new_models_go_to_the_cache_and_are_looked_for_there_first(tmp_path: Path) -> None:
    (tmp_path / "source/Lora").mkdir(parents=True)

    directories = CacheDirectories(tmp_path / "models", tmp_path / "local", [tmp_path / "source"], "me")

    cache, linked, *sources = directories.of(ModelKind.LORA)
    assert (cache.folder, cache.is_writable, cache.is_local) == (tmp_path / "models/loras", True, False)
    assert directories.for_new(ModelKind.LORA) is cache
    assert (linked.folder, linked.is_writable) == (tmp_path / "local/linked/loras", False)
    assert [source.folder for source in sources] == [tmp_path / "source/Lora", tmp_path / "source"]
    assert not any(source.is_writable for source in sources)


def test_without_a_writable_cache_new_models_go_to_the_local_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    directories = CacheDirectories(tmp_path / "file/models", tmp_path / "local", [], "me")

    local = directories.for_new(ModelKind.LORA)
    assert (local.folder, local.is_local) == (tmp_path / "local/loras", True)
    assert [directory.is_writable for directory in directories.of(ModelKind.LORA)] == [False, True, False]


def test_without_any_writable_folder_there_is_no_place_for_new_models(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    directories = CacheDirectories(tmp_path / "file/models", tmp_path / "file/local", [], "me")

    assert directories.writable() == []
    with pytest.raises(VolumeFailed):
        directories.for_new(ModelKind.LORA)


def test_a_source_that_is_the_cache_or_is_not_there_is_no_source(tmp_path: Path) -> None:
    sources = [tmp_path / "models", tmp_path / "missing", tmp_path / "link"]
    (tmp_path / "models").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "models")

    directories = CacheDirectories(tmp_path / "models", tmp_path / "local", sources, "me")

    assert directories.sources == ()

"""Names on disk, and how files get there."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a1111_worker.domain import ModelKind
from a1111_worker.files import write_atomically
from a1111_worker.models.volume import CacheDirectory, Names, WebUIFolder, can_write, digest_file, slug, version_file
from tests.disks import read_only

SHA = "0d9bd1b873a7863e128b4672e3e245838858f71469a3cec58123c16c06f83bd7"


@pytest.fixture
def shelf(tmp_path: Path) -> CacheDirectory:
    shelf = CacheDirectory(tmp_path / "loras", ModelKind.LORA, writable=True)
    shelf.prepare()
    return shelf


# -- names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Detail Tweaker XL", "Detail_Tweaker_XL"),
        ("add-detail-xl.safetensors", "add-detail-xl"),  # the ending is ours to write
        ("../../etc/passwd", "etc_passwd"),
        ("..", "model"),
        (".hidden", "hidden"),
        ("a\x00b", "a_b"),
        ("Fünny näme", "Funny_name"),
        ("🦊", "model"),
        ("名前", "model"),
        ("", "model"),
        ("x" * 300, "x" * 80),
        ("CON", "model-CON"),  # a device on Windows volumes
        ("con.safetensors", "model-con"),
        ("nul.v2", "model-nul.v2"),
        ("console", "console"),
        ("name_12", "name-12"),  # would read like an id
        ("v1_0_7", "v1_0-7"),
        ("<lora:x:1>", "lora_x_1".replace("_1", "-1")),  # nothing that a prompt would read as a tag
        ("trailing. ", "trailing"),
        ("a..b", "a.b"),
    ],
)
def test_a_slug_is_what_a_file_may_be_called(text: str, expected: str) -> None:
    assert slug(text) == expected


@given(st.text(max_size=400), st.integers(1, 2**53 - 1), st.none() | st.integers(1, 2**53 - 1))
def test_any_text_gives_a_name_that_is_safe_and_says_its_ids(text: str, version: int, file: int | None) -> None:
    name = version_file(text, version, file)

    assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*_[0-9_]+\.safetensors", name)
    assert len(slug(text)) <= 80
    assert len(name) <= 130
    assert Path(name).name == name
    assert name.split(".")[0].lower() not in {"con", "prn", "aux", "nul", "com1", "lpt1"}
    assert name in Names.of([name]).by_version[version]


@given(st.text(max_size=400))
def test_a_file_without_a_version_never_claims_one(text: str) -> None:
    name = digest_file(text, SHA)

    names = Names.of([name])

    assert names.by_digest == {SHA[:16]: (name,)}
    assert names.by_version == {}


def test_what_is_not_a_model_is_not_listed() -> None:
    names = Names.of(["a.safetensors", "a.safetensors.json", ".parts", ".b.safetensors", "c.ckpt", "c.txt"])

    assert names.files == {"a.safetensors"}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("foo", ("foo.safetensors",)),  # exactly
        ("Foo", ("Foo.safetensors",)),  # exactly, though there is one that differs by case
        ("FOO", ("Foo.safetensors", "foo.safetensors")),  # either: ambiguous
        ("BAR", ("bar.safetensors",)),  # in any case, if that is clear
        ("bar.safetensors", ("bar.safetensors",)),
        ("ba", ()),
        ("../bar", ()),
    ],
)
def test_a_bare_name_means_a_stem(name: str, meant: tuple[str, ...]) -> None:
    names = Names.of(["foo.safetensors", "Foo.safetensors", "bar.safetensors"])

    assert names.named(name) == meant


@pytest.mark.parametrize(
    ("file", "versions"),
    [
        ("detail_12.safetensors", {12}),
        ("detail_12_345.safetensors", {12, 345}),  # version 12's file 345, or somebody's `detail_12` of version 345
        ("detail12.safetensors", set()),
        ("detail_012.safetensors", set()),
        ("_12.safetensors", {12}),
        ("detail_12.SAFETENSORS", set()),  # A1111 would not see it
    ],
)
def test_names_claim_versions(file: str, versions: set[int]) -> None:
    assert set(Names.of([file]).by_version) == versions


# -- a shelf


def test_a_model_is_there_when_its_part_is_placed_and_not_before(shelf: CacheDirectory) -> None:
    part = shelf.part("v1", "me")
    part.write_bytes(b"model")
    Path(f"{part}.ranges").write_text("{}")
    before = shelf.names().files

    shelf.place(part, "a_1.safetensors")

    assert before == set()
    assert shelf.names().files == {"a_1.safetensors"}
    assert shelf.path("a_1.safetensors").read_bytes() == b"model"
    assert list(shelf.parts.iterdir()) == []


def test_an_adopted_part_keeps_what_is_known_of_it_and_older_ones_go(shelf: CacheDirectory) -> None:
    for age, owner in enumerate(["newest", "older", "oldest"]):
        part = shelf.part("v7", owner)
        part.write_bytes(owner.encode())
        Path(f"{part}.ranges").write_text(owner)
        os.utime(part, (1_000_000 - age, 1_000_000 - age))
    shelf.part("v77", "other").write_bytes(b"another model's")

    adopted = shelf.adopt_part("v7", "me")

    assert adopted
    assert shelf.part("v7", "me").read_text() == "newest"
    assert Path(f"{shelf.part('v7', 'me')}.ranges").read_text() == "newest"
    assert len(list(shelf.parts.iterdir())) == 3  # mine with its ranges, and the other model's


def test_ones_own_part_is_kept_before_any_other(shelf: CacheDirectory) -> None:
    shelf.part("v7", "me").write_bytes(b"mine")
    shelf.part("v7", "dead").write_bytes(b"other")

    shelf.adopt_part("v7", "me")

    assert [path.read_bytes() for path in shelf.parts.iterdir()] == [b"mine"]


def test_a_listing_follows_what_others_do(shelf: CacheDirectory) -> None:
    first = shelf.names().files
    (shelf.folder / "x.safetensors").write_bytes(b"1")
    os.utime(shelf.folder, (1, 1))  # a volume whose times say nothing
    shelf.names()
    (shelf.folder / "y.safetensors").write_bytes(b"1")
    os.utime(shelf.folder, (1, 1))

    stale, fresh = shelf.names().files, shelf.list_again().files

    assert [sorted(files) for files in (first, stale, fresh)] == [
        [],
        ["x.safetensors"],
        ["x.safetensors", "y.safetensors"],
    ]


def test_what_was_taken_away_can_be_put_back_but_never_over_a_new_one(shelf: CacheDirectory) -> None:
    shelf.path("a.safetensors").write_bytes(b"old")
    away = shelf.take_away("a.safetensors", "me")
    gone = shelf.size("a.safetensors") is None

    shelf.put_back(away, "a.safetensors")
    back = shelf.path("a.safetensors").read_bytes()
    away = shelf.take_away("a.safetensors", "me")
    shelf.path("a.safetensors").write_bytes(b"new")
    shelf.put_back(away, "a.safetensors")

    assert gone
    assert back == b"old"
    assert shelf.path("a.safetensors").read_bytes() == b"new"


def test_a_sweep_removes_what_nobody_comes_back_for(shelf: CacheDirectory) -> None:
    now = shelf.folder.stat().st_mtime
    old, young = shelf.part("v1", "dead"), shelf.part("v2", "alive")
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (now - 1000, now - 1000))
    shelf.path("a.safetensors").write_bytes(b"model")
    for name in ("a.safetensors.json", "a.safetensors.uses", "gone.safetensors.json", "gone.safetensors.uses"):
        shelf.path(name).write_text("{}")
    draft = shelf.path(".a.safetensors.json.dead-1")
    draft.write_text("{")
    os.utime(draft, (now - 1000, now - 1000))
    shelf.path("notes.txt").write_text("not ours")

    shelf.sweep(older_than=500)

    left = {path.name for path in shelf.folder.iterdir() if path.is_file()}
    assert left == {"a.safetensors", "a.safetensors.json", "a.safetensors.uses", "notes.txt"}
    assert [path.name for path in shelf.parts.iterdir()] == [young.name]


def test_a_folder_that_cannot_be_written_says_so(shelf: CacheDirectory) -> None:
    with read_only(shelf.folder):
        during = can_write(shelf.folder, "me")

    assert not during
    assert can_write(shelf.folder, "me")
    assert not can_write(shelf.folder / "missing", "me")
    assert not [path.name for path in shelf.folder.iterdir() if path.name.startswith(".probe")]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_atomically(target, b"whole")
    target.unlink()
    target.mkdir()  # so that nothing can be renamed to it

    with pytest.raises(OSError, match=r".*"):
        write_atomically(target, b"other")

    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


# -- what the WebUI sees


def test_the_webui_sees_links_to_models_under_their_names(tmp_path: Path, shelf: CacheDirectory) -> None:
    shelf.path("a.safetensors").write_bytes(b"1")
    webui = WebUIFolder(tmp_path / "webui", "me")
    webui.prepare([shelf.folder])

    link = webui.show(ModelKind.LORA, shelf.path("a.safetensors"))

    assert link == tmp_path / "webui/Lora/a.safetensors"
    assert link.is_symlink()
    assert link.read_bytes() == b"1"
    assert sorted(path.name for path in (tmp_path / "webui").iterdir()) == ["Lora", "Stable-diffusion", "VAE"]


def test_a_link_changes_at_once_and_is_hidden_only_by_its_own_model(tmp_path: Path, shelf: CacheDirectory) -> None:
    other = CacheDirectory(tmp_path / "source", ModelKind.LORA)
    other.folder.mkdir()
    for where in (shelf, other):
        where.path("a.safetensors").write_bytes(str(where.folder).encode())
    webui = WebUIFolder(tmp_path / "webui", "me")
    webui.prepare([shelf.folder, other.folder])
    webui.show(ModelKind.LORA, shelf.path("a.safetensors"))

    link = webui.show(ModelKind.LORA, other.path("a.safetensors"))
    webui.hide(ModelKind.LORA, shelf.path("a.safetensors"))

    assert link.read_bytes() == str(other.folder).encode()
    webui.hide(ModelKind.LORA, other.path("a.safetensors"))
    assert not link.is_symlink()


def test_the_start_removes_links_that_lead_nowhere_or_elsewhere(tmp_path: Path, shelf: CacheDirectory) -> None:
    webui = WebUIFolder(tmp_path / "webui", "me")
    webui.prepare([shelf.folder])
    shelf.path("good.safetensors").write_bytes(b"1")
    webui.show(ModelKind.LORA, shelf.path("good.safetensors"))
    folder = webui.folder(ModelKind.LORA)
    (tmp_path / "secret").write_text("not a model")
    (folder / "foreign.safetensors").symlink_to(tmp_path / "secret")
    (folder / "dangling.safetensors").symlink_to(shelf.path("gone.safetensors"))
    (folder / "Put models here.txt").write_text("the WebUI's own")

    webui.prepare([shelf.folder])

    assert sorted(path.name for path in folder.iterdir()) == ["Put models here.txt", "good.safetensors"]


def test_links_of_models_that_went_are_pruned(tmp_path: Path, shelf: CacheDirectory) -> None:
    webui = WebUIFolder(tmp_path / "webui", "me")
    webui.prepare([shelf.folder])
    for name in ("stays.safetensors", "goes.safetensors"):
        shelf.path(name).write_bytes(b"1")
        webui.show(ModelKind.LORA, shelf.path(name))
    shelf.path("goes.safetensors").unlink()

    webui.prune()

    assert [path.name for path in webui.folder(ModelKind.LORA).iterdir()] == ["stays.safetensors"]

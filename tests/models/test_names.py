"""What model files are called, and what their names say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a1111_worker.models.names import FileIndex, digest_file, short_name, slug, version_file

SHA = "0d9bd1b873a7863e128b4672e3e245838858f71469a3cec58123c16c06f83bd7"


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
    assert name in FileIndex.of([name]).by_version[version]


@given(st.text(max_size=400))
def test_a_file_without_a_version_never_claims_one(text: str) -> None:
    name = digest_file(text, SHA)

    index = FileIndex.of([name])

    assert index.by_digest == {SHA[:16]: (name,)}
    assert index.by_version == {}


def test_what_is_not_a_model_is_not_listed() -> None:
    index = FileIndex.of(["a.safetensors", "a.safetensors.json", ".parts", ".b.safetensors", "c.ckpt", "c.txt"])

    assert index.files == {"a.safetensors"}


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
    index = FileIndex.of(["foo.safetensors", "Foo.safetensors", "bar.safetensors"])

    assert index.files_named(name) == meant


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
    assert set(FileIndex.of([file]).by_version) == versions


@pytest.mark.parametrize("length", [1, 155, 156, 255])
@pytest.mark.parametrize("letter", ["a", "é"])
def test_an_owners_name_can_be_added_to_any_file_name(length: int, letter: str) -> None:
    file, other = letter * (length // len(letter.encode())), letter * (length // len(letter.encode()) - 1) + "b"

    short, others = short_name(file), short_name(other)

    assert len(short.encode(errors="surrogateescape")) <= 155
    assert (short == file) is (len(file.encode()) <= 155)
    assert short != others

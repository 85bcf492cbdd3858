"""A file is a model only if every byte of it is accounted for. Its tensors tell its architecture."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import socket
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from a1111_worker.errors import ModelRejected
from a1111_worker.models.safetensors import (
    HEADER_LIMIT,
    ChildLimits,
    Header,
    families_fit,
    family_of,
    family_of_base_model,
    lora_hash,
    parse_header,
    parse_in_child,
    read_header,
)
from a1111_worker.models.tensors import MAX_TENSORS, TensorTable, parse_table
from sandbox.models import sd15_checkpoint, sd15_lora, sdxl_checkpoint, sdxl_lora, tensor_hash

GOOD = {"a": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}}
TWO = GOOD | {"b": {"dtype": "U8", "shape": [4], "data_offsets": [12, 16]}}


def packed(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: Any = "F16", shape: Any = (2, 3), span: Any = (0, 12), **more: Any) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": span, **more}}


def table_of(content: bytes) -> TensorTable:
    (length,) = struct.unpack("<Q", content[:8])
    return parse_table(content[8 : 8 + length], len(content) - 8 - length)


def read_by_package(content: bytes) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape, as the `safetensors` package reads it."""
    found = safetensors.deserialize(content)  # type: ignore[no-untyped-call] # it brings no types
    return {name: tuple(tensor["shape"]) for name, tensor in found}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


# -- reading -----------------------------------------------------------------------------------------------------------


def test_a_header_is_read_without_its_tensors(file: Path) -> None:
    content = packed({"__metadata__": {"ss_output_name": "läuft"}, **TWO}, bytes(16))
    file.write_bytes(content)

    header = read_header(file)

    assert header.data_offset == len(content) - 16
    assert header.size == len(content)
    assert table_of(content).metadata == {"ss_output_name": "läuft"}
    assert table_of(content).tensors == {"a": ("F16", (2, 3)), "b": ("U8", (4,))}


WIDTHS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}


@pytest.mark.parametrize("dtype", WIDTHS)
def test_every_type_that_the_package_knows_has_its_width(dtype: str, file: Path) -> None:
    content = packed(entry(dtype, [4], [0, WIDTHS[dtype] // 2]), bytes(WIDTHS[dtype] // 2))
    file.write_bytes(content)

    read_header(file)

    assert table_of(content).tensors["a"] == (dtype, (4,))
    assert read_by_package(content) == {"a": (4,)}


GOOD_FILES = {
    "a plain one": packed(GOOD, bytes(12)),
    "metadata that is null": packed({"__metadata__": None, **GOOD}, bytes(12)),
    "blanks behind the header": packed(json.dumps(GOOD).encode() + b"   \n", bytes(12)),
    "tensors in another order than their bytes": packed(
        {"b": TWO["b"], "a": TWO["a"]},
        bytes(16),
    ),
    "a number without a shape": packed(entry("F32", [], [0, 4]), bytes(4)),
    "an empty tensor between two others": packed(
        TWO | {"none": {"dtype": "F16", "shape": [0, 5], "data_offsets": [12, 12]}}, bytes(16)
    ),
    "a header of 128 bytes, which makes the file begin like a pickle": packed(
        json.dumps(GOOD).encode().ljust(0x80), bytes(12)
    ),
    "a header of 60 bytes, which makes the file begin like a web page": packed(
        json.dumps(GOOD, separators=(",", ":")).encode().ljust(ord("<")), bytes(12)
    ),
    "escapes in a name": packed(b'{"\\u00e9\\ud83d\\ude00":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"),
    "minus zero in a text": packed({"__metadata__": {"note": "[1, -0]"}, **GOOD}, bytes(12)),
    "an output name in braces that is no JSON": packed(
        {"__metadata__": {"ss_output_name": "{style}"}, **GOOD}, bytes(12)
    ),
}


@pytest.mark.parametrize("content", GOOD_FILES.values(), ids=GOOD_FILES)
def test_a_good_file_is_read_and_the_package_agrees(content: bytes, file: Path) -> None:
    file.write_bytes(content)

    read_header(file)

    assert {name: shape for name, (_, shape) in table_of(content).tensors.items()} == read_by_package(content)


# What it is → its bytes, what the message must say.
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "the file is empty"),
    "too short for anything": (b"\x05\x00\x00", "not a safetensors file: it has only 3 bytes"),
    "a pickle": (b"\x80\x02}q\x00(X\x0a\x00\x00\x00state_dictq", "it is a pickle"),
    "a zipped pickle (torch.save)": (b"PK\x03\x04\x00\x00\x00\x00\x00\x00\x00archive/data.pkl", "it is a zip archive"),
    "a web page": (b"<!DOCTYPE html><html><title>Log in</title>", "it is a web page"),
    "a web page behind a byte order mark and blanks": (b"\xef\xbb\xbf\r\n <html></html>", "it is a web page"),
    "an error message": (b'{"error":"Unauthorized","message":"..."}', "it is a JSON text"),
    "GGUF": (b"GGUF\x03\x00\x00\x00\x00\x00\x00\x00", "it is a GGUF file"),
    "gzip around a model": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff", "compressed with gzip"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
    "noise": (bytes(range(7, 80)), "it does not begin with a header"),
    "zeros": (bytes(4096), "it does not begin with a header"),
    "a header longer than the limit": (struct.pack("<Q", 100_000_001) + b'{"a":', "the limit is 16,000,000"),
    "a header longer than the file": (struct.pack("<Q", 5_000) + b'{"a":{"dtype"', "cut off inside its header"),
    "a header that A1111 cannot read": (packed(b'{ "a":' + json.dumps(GOOD["a"]).encode() + b"}", bytes(12)), "blanks"),
    "no tensors": (packed({}), "no entries"),
    "metadata alone": (packed({"__metadata__": {"format": "pt"}}), "holds no tensors"),
    "half a header": (packed(b'{"a":{"dtype":"F16"', bytes(12)), "not valid JSON"),
    "two headers": (packed(b'{"a":1}{"b":2}'), "not valid JSON"),
    "a header that is not UTF-8": (packed(b'{"\xff":1}'), "not valid JSON"),
    "half a character": (packed(b'{"\\ud83d":' + json.dumps(GOOD["a"]).encode() + b"}", bytes(12)), "not valid JSON"),
    "a nest without end": (packed(b'{"a":' + b"[" * 200_000), "not valid JSON"),
    "a number of 5,000 digits": (packed(b'{"a":' + b"9" * 5_000 + b"}"), "header is damaged"),
    "a tensor twice": (packed(b'{"a":%b,"a":%b}' % ((json.dumps(GOOD["a"]).encode(),) * 2), bytes(12)), "twice"),
    "a field twice": (packed(b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"), "twice"),
    "metadata twice": (packed(b'{"__metadata__":{"k":"1","k":"2"},"a":1}'), "twice"),
    "metadata that is a number": (
        packed({"__metadata__": {"steps": 12}, **GOOD}, bytes(12)),
        "something other than text",
    ),
    "metadata that is a list": (packed({"__metadata__": [], **GOOD}, bytes(12)), "something other than text"),
    "an output name that A1111 would unpack": (
        packed({"__metadata__": {"ss_output_name": '{"a": 1}'}, **GOOD}, bytes(12)),
        "would break the WebUI: ss_output_name",
    ),
    "a hash that A1111 would unpack": (
        packed({"__metadata__": {"sshs_model_hash": "{}"}, **GOOD}, bytes(12)),
        "would break the WebUI: sshs_model_hash",
    ),
    "a tensor that is a list": (packed({"a": [1]}), "description of a tensor is not valid"),
    "a tensor without a type": (
        packed({"a": {"shape": [1], "data_offsets": [0, 1]}}, b"1"),
        "description of a tensor is not valid",
    ),
    "a tensor with a fourth field": (packed(entry(more=1), bytes(12)), "description of a tensor is not valid"),
    "three offsets": (packed(entry(span=[0, 6, 12]), bytes(12)), "description of a tensor is not valid"),
    "offsets of a bool": (packed(entry(span=[False, 12]), bytes(12)), "description of a tensor is not valid"),
    "offsets of a float": (packed(entry(span=[0, 12.0]), bytes(12)), "description of a tensor is not valid"),
    "an unknown type": (packed(entry("F13"), bytes(12)), "a type that safetensors does not know"),
    "a type in lower case": (packed(entry("f16"), bytes(12)), "a type that safetensors does not know"),
    "a type that is a list": (packed(entry([]), bytes(12)), "a type that safetensors does not know"),
    "a shape that is a number": (packed(entry(shape=6), bytes(12)), "shape is not valid"),
    "a shape with a bool": (packed(entry(shape=[True, 6]), bytes(12)), "shape is not valid"),
    "a shape with negative sides": (packed(entry(shape=[-2, -3]), bytes(12)), "shape is not valid"),
    "a shape of 65 sides": (packed(entry("U8", [1] * 65, [0, 1]), b"1"), "shape is not valid"),
    "minus zero": (packed(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[-0,1]}}', b"1"), "not valid JSON"),
    "not a number": (packed(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[NaN,1]}}', b"1"), "header is damaged"),
    "a shape too small for its span": (packed(entry(shape=[2, 2]), bytes(12)), "not that of its shape and type"),
    "a span the wrong way round": (packed(entry(span=[12, 0]), bytes(12)), "not that of its shape and type"),
    "half a byte": (packed(entry("F4", [3], [0, 1]), b"1"), "not that of its shape and type"),
    "an empty tensor of impossible size": (packed(entry("U8", [2**63, 4, 0], [0, 0])), "impossible shape"),
    "negative offsets": (packed(entry("U8", [2], [-2, 0])), "tensors overlap"),
    "a hole before the first tensor": (packed(entry(span=[4, 16]), bytes(16)), "a hole between tensors"),
    "a hole between two": (packed(GOOD | entry("U8", [1], [13, 14]) | {"z": GOOD["a"]}, bytes(14)), "a hole between"),
    "an overlap": (packed(GOOD | {"b": {"dtype": "U8", "shape": [4], "data_offsets": [8, 12]}}, bytes(12)), "overlap"),
    "offsets past the end": (packed(GOOD, bytes(11)), "cut off: its tensors need 12 bytes and it has 11"),
    "one byte too many": (packed(GOOD, bytes(13)), "has 1 bytes after its last tensor"),
}


@pytest.mark.parametrize(("content", "sentence"), BAD_FILES.values(), ids=BAD_FILES)
def test_any_other_file_is_refused_with_the_reason(content: bytes, sentence: str, file: Path) -> None:
    file.write_bytes(content)

    with pytest.raises(ModelRejected) as refused:
        read_header(file)

    assert sentence in refused.value.message
    assert str(file.parent) not in refused.value.message


STRICTER = {
    *("a header that A1111 cannot read", "an output name that A1111 would unpack", "a hash that A1111 would unpack"),
    *("a tensor twice", "metadata twice", "a tensor with a fourth field", "a shape of 65 sides"),
    *("no tensors", "metadata alone"),
}


@pytest.mark.parametrize("name", [name for name in BAD_FILES if name not in STRICTER])
def test_the_package_refuses_the_same_files(name: str) -> None:
    content, _ = BAD_FILES[name]

    with pytest.raises(safetensors.SafetensorError):
        read_by_package(content)


HEADERS = (
    json.dumps({"__metadata__": {"ss_tag": "a -0, b"}, **TWO}, separators=(",", ":")).encode(),
    json.dumps(TWO | {"c": {"dtype": "F4", "shape": [0, 3], "data_offsets": [16, 16]}}).encode(),
)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_we_accept_the_package_accepts(data: st.DataObject, file: Path) -> None:
    text = bytearray(data.draw(st.sampled_from(HEADERS)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        new = data.draw(
            st.one_of(st.binary(max_size=2), st.sampled_from([b"-", b"0", b"[", b"}", b"1e0", b" ", b"\\"]))
        )
        text[at : at + data.draw(st.integers(0, 2))] = new
    content = packed(bytes(text), bytes(data.draw(st.sampled_from([16, 16, 15, 17]))))
    file.write_bytes(content)

    try:
        read_header(file)
    except ModelRejected:
        return

    assert {name: shape for name, (_, shape) in table_of(content).tensors.items()} == read_by_package(content)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=st.lists(
        st.tuples(
            st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
            st.sampled_from(sorted(WIDTHS)),
            st.lists(st.integers(0, 4), max_size=4),
        ),
        min_size=1,
        unique_by=lambda tensor: tensor[0],
    ),
    metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=9).filter(lambda value: value[:1] != "{")),
)
def test_what_the_package_accepts_we_accept(
    tensors: list[tuple[str, str, list[int]]], metadata: dict[str, str], file: Path
) -> None:
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, dtype, shape in tensors:
        sides = shape if math.prod(shape) * WIDTHS[dtype] % 8 == 0 else [*shape, 4]
        begin, end = end, end + math.prod(sides) * WIDTHS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": sides, "data_offsets": [begin, end]}
    content = packed(header, bytes(end))
    file.write_bytes(content)

    read_header(file)

    assert {name: shape for name, (_, shape) in table_of(content).tensors.items()} == read_by_package(content)
    assert table_of(content).metadata == metadata


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_noise_is_refused_with_no_other_error(content: bytes, file: Path) -> None:
    file.write_bytes(content)

    with pytest.raises(ModelRejected):
        read_header(file)


# -- what is no file, and what is too large ----------------------------------------------------------------------------


def special_files(folder: Path) -> list[Path]:
    fifo, listening, link = folder / "fifo", folder / "socket", folder / "device"
    os.mkfifo(fifo)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(listening))
    link.symlink_to("/dev/zero")
    return [fifo, listening, link, folder]


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    header = header_of({})

    for path in special_files(tmp_path):
        with pytest.raises(ModelRejected, match="not a regular file"):
            read_header(path)
        with pytest.raises(ModelRejected, match="not a regular file"):
            lora_hash(path, header)


def test_a_file_that_is_not_there_is_an_error_of_the_disk_and_not_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "gone.safetensors")


def many_tensors(count: int) -> dict[str, Any]:
    return {
        f"lora_unet_input_blocks_{number}_1_transformer_blocks_0_attn2_to_k.lora_down.weight": {
            "dtype": "U8",
            "shape": [1, 2048],
            "data_offsets": [2048 * number, 2048 * number + 2048],
        }
        for number in range(count)
    }


def write_sparse(file: Path, header: dict[str, Any], data_size: int) -> Path:
    file.write_bytes(packed(header))
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size + data_size)
    return file


def test_a_header_above_the_limit_is_refused_unread(file: Path) -> None:
    write_sparse(file, {"__metadata__": {"": " " * (HEADER_LIMIT + 1)}, **GOOD}, 12)

    with pytest.raises(ModelRejected, match=r"header has 16,\d{3},\d{3} bytes, and the limit is 16,000,000"):
        read_header(file)


def test_more_tensors_than_the_limit_are_refused() -> None:
    empty = {str(number): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for number in range(MAX_TENSORS + 1)}

    with pytest.raises(ModelRejected, match="describes 100,001 tensors, and the limit is 100,000"):
        parse_table(json.dumps(empty).encode(), 0)
    del empty["0"]
    assert len(parse_table(json.dumps(empty).encode(), 0).tensors) == MAX_TENSORS


def test_a_large_header_says_the_same_in_a_child_process(file: Path) -> None:
    metadata = {"ss_base_model_version": "sdxl_base_v1-0", "sshs_model_hash": "ab" * 32, "ss_tag_frequency": "é" * 9}
    small = {"__metadata__": metadata, **many_tensors(3)}
    large = {"__metadata__": metadata | {"ss_tag_frequency": "é, " * 400_000}, **many_tensors(3)}
    write_sparse(file, large, 3 * 2048)

    header = read_header(file)

    here = parse_header(packed(small)[8:], 3 * 2048 + len(packed(small)))
    assert header.data_offset > 1_000_000
    assert header == replace(here, data_offset=header.data_offset, size=header.size)
    assert (header.families, header.declared_family, header.own_hash) == (
        ("sdxl", "kolors", "playground"),
        "sdxl",
        "ab" * 32,
    )


def test_a_header_of_10_mb_with_80000_tensors_is_legal(file: Path) -> None:
    write_sparse(file, many_tensors(80_000), 80_000 * 2048)

    header = read_header(file)

    assert header.data_offset > 10_000_000
    assert family_of(header) == "sdxl"


def test_what_a_child_refuses_is_refused_with_its_reason(file: Path) -> None:
    write_sparse(file, {"__metadata__": {"note": " " * 2_000_000}, **GOOD}, 11)

    with pytest.raises(ModelRejected, match="cut off: its tensors need 12 bytes and it has 11"):
        read_header(file)


LARGE = packed({"__metadata__": {str(number): "" for number in range(400_000)}, **GOOD})[8:]


def test_a_header_that_takes_too_much_memory_is_refused() -> None:
    with pytest.raises(ModelRejected, match="more than 60 MB of memory"):
        parse_in_child(LARGE, len(LARGE) + 20, ChildLimits(memory=60 << 20))


def test_a_child_that_fails_is_no_verdict_on_the_file() -> None:
    with pytest.raises(TimeoutError):
        parse_in_child(LARGE, len(LARGE) + 20, ChildLimits(seconds=0.0))
    with pytest.raises(OSError, match="ended with status"):
        parse_in_child(LARGE, len(LARGE) + 20, ChildLimits(memory=1 << 70))  # no such limit


def test_no_large_header_is_parsed_in_this_process(file: Path) -> None:
    write_sparse(file, many_tensors(8_000), 8_000 * 2048)
    called: list[str] = []

    sys.setprofile(lambda frame, event, argument: called.append(frame.f_code.co_name))
    try:
        read_header(file)
    finally:
        sys.setprofile(None)

    assert "parse_in_child" in called
    assert not {"parse_header", "parse_table"} & set(called)


# -- A1111's hash ------------------------------------------------------------------------------------------------------


def test_the_hash_that_a_trainer_wrote_is_used(file: Path) -> None:
    sdxl_lora(file, sshs_model_hash="1ABF2a60" * 8)

    found = lora_hash(file, read_header(file))

    assert found == "1ABF2a601ABF"


@pytest.mark.parametrize(
    "own_hash",
    [
        "0123, 4567, 89ab",  # A1111 would print it as three LoRAs
        "a, other: 1234567890ab",  # … or as the proof of another file
        "0x12345678901",
        "12345678901",
        "ab" * 33,
        "é" * 12,
        " " + "ab" * 32,
        "none",
    ],
)
def test_a_hash_of_the_trainer_that_is_none_is_refused(own_hash: str, file: Path) -> None:
    header = read_header(sdxl_lora(file, sshs_model_hash=own_hash))

    with pytest.raises(ModelRejected, match="sshs_model_hash is not a hash"):
        lora_hash(file, header)


def test_without_a_hash_of_the_trainer_the_tensors_are_hashed(file: Path) -> None:
    sdxl_lora(file, size_bytes=5_000_000, sshs_model_hash="")

    found = lora_hash(file, read_header(file))

    assert found == tensor_hash(file)[:12]
    assert found != hashlib.sha256(file.read_bytes()).hexdigest()[:12]


# -- architecture ------------------------------------------------------------------------------------------------------


Shapes = dict[str, tuple[int, ...]]


def header_of(shapes: Shapes, metadata: dict[str, str] | None = None) -> Header:
    """The header of a file with these tensors (or with one that says nothing) and this metadata."""
    entries: dict[str, Any] = {"__metadata__": metadata or {}}
    end = 0
    for name, shape in (shapes or {"nothing": (1,)}).items():
        begin, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    return parse_header(text, 8 + len(text) + end)


# CivitAI's name → the family.
BASE_MODELS = {
    **dict.fromkeys(("SD 1.4", "SD 1.5", "SD 1.5 LCM", "SD 1.5 Hyper"), "sd1"),
    **dict.fromkeys(("SD 2.0", "SD 2.0 768", "SD 2.1", "SD 2.1 768", "SD 2.1 Unclip"), "sd2"),
    **dict.fromkeys(("SDXL 0.9", "SDXL 1.0", "SDXL 1.0 LCM", "SDXL Distilled", "SDXL Turbo"), "sdxl"),
    **dict.fromkeys(("SDXL Lightning", "SDXL Hyper", "Pony", "Illustrious", "NoobAI", " sdxl  1.0 "), "sdxl"),
    **dict.fromkeys(("SD 3", "SD 3.5", "SD 3.5 Medium", "SD 3.5 Large", "SD 3.5 Large Turbo"), "sd3"),
    **dict.fromkeys(("Flux.1 S", "Flux.1 D", "Flux.1 Krea", "Flux.1 Kontext"), "flux"),
    **dict.fromkeys(("Flux.2 D", "Flux.2 Klein 9B-base"), "flux2"),
    **dict.fromkeys(("Wan Video", "Wan Video 2.2 I2V-A14B", "Wan Image 2.7"), "wan"),
    **{"Pony V7": "auraflow", "AuraFlow": "auraflow"},  # Pony V7 is AuraFlow's child, unlike Pony
    **{"SVD": "svd", "SVD XT": "svd", "Kolors": "kolors", "Playground v2": "playground", "Chroma": "chroma"},
    **{"PixArt a": "pixart", "PixArt E": "pixart", "Hunyuan 1": "hunyuan-dit", "Hunyuan Video": "hunyuan-video"},
    **{"LTXV 2.3": "ltxv", "ZImageTurbo": "zimage", "Qwen 2": "qwen", "HiDream-O1": "hidream"},
    **{"Stable Cascade": "stable-cascade", "Something New 7B": "something-new-7b"},  # not known: its own family
    **{"Other": None, "": None, "  ": None, "Upscaler": None, "…": None},  # says nothing
}


@pytest.mark.parametrize(("name", "family"), BASE_MODELS.items())
def test_a_base_model_of_civitai_belongs_to_a_family(name: str, family: str | None) -> None:
    assert family_of_base_model(name) == family


KOHYA = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
SGM = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_v"
DIFFUSERS = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2"

# The one tensor that decides, its shape → the family.
TENSORS: list[tuple[str, tuple[int, ...], str | None]] = [
    # kohya's LoRA, with the input's width in the second place of "down"
    (f"{KOHYA}.lora_down.weight", (8, 768), "sd1"),
    (f"{KOHYA}.lora_down.weight", (8, 1024), "sd2"),
    (f"{KOHYA}.lora_down.weight", (8, 2048), "sdxl"),
    (f"{SGM}.lora_down.weight", (8, 2048), "sdxl"),
    # "up" says nothing of the input: 1280 is SDXL's and SD 1's own width
    (f"{KOHYA}.lora_up.weight", (2048, 8), None),
    # diffusers and peft, old and new
    (f"{DIFFUSERS}.to_k.lora_A.weight", (4, 2048), "sdxl"),
    (f"{DIFFUSERS}.to_k.lora_A.default.weight", (4, 768), "sd1"),
    (f"base_model.model.{DIFFUSERS[5:]}.to_v.lora_A.weight", (4, 2048), "sdxl"),
    (f"{DIFFUSERS}.processor.to_k_lora.down.weight", (4, 768), "sd1"),
    # LoHa, a full difference
    (f"{KOHYA}.hada_w1_b", (4, 2048), "sdxl"),
    (f"{KOHYA}.hada_w1_a", (2048, 4), None),
    (f"{KOHYA}.diff", (640, 2048), "sdxl"),
    # sliders that leave cross attention alone
    ("lora_unet_down_blocks_2_attentions_0_transformer_blocks_7_attn1_to_q.lora_down.weight", (4, 1280), "sdxl"),
    ("lora_unet_down_blocks_0_attentions_1_proj_in.lora_down.weight", (4, 320, 1, 1), "sd1"),
    ("lora_unet_up_blocks_3_resnets_0_conv1.lora_down.weight", (4, 640, 3, 3), "sd1"),
    ("lora_unet_down_blocks_1_resnets_0_conv1.lora_down.weight", (4, 320, 3, 3), None),
    # text encoders alone
    ("lora_te_text_model_encoder_layers_3_self_attn_q_proj.lora_down.weight", (4, 768), "sd1"),
    ("lora_te_text_model_encoder_layers_3_mlp_fc1.lora_down.weight", (4, 1024), "sd2"),
    ("lora_te2_text_model_encoder_layers_3_self_attn_q_proj.lora_down.weight", (4, 1280), "sdxl"),
    ("text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight", (4, 1280), "sdxl"),
    ("lora_te1_text_model_encoder_layers_3_self_attn_q_proj.lora_down.weight", (4, 768), None),  # SDXL, SD 3 or FLUX
    ("lora_te3_encoder_block_0_layer_0_SelfAttention_k.lora_down.weight", (4, 4096), "sd3"),
    # transformers
    ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", (4, 3072), "flux"),
    ("lora_unet_single_blocks_37_linear1.lora_down.weight", (4, 3072), "flux"),
    ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", (4, 3072), "flux"),
    ("lora_unet_joint_blocks_0_context_block_attn_proj.lora_down.weight", (4, 1536), "sd3"),
    # LTX-Video's cross attention is as wide as SDXL's, and it is no UNet
    ("transformer.transformer_blocks.0.attn2.to_k.lora_A.weight", (4, 2048), None),
    # checkpoints
    ("model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight", (640, 2048), "sdxl"),
    ("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", (320, 768), "sd1"),
    ("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", (320, 1024), "sd2"),
    ("conditioner.embedders.1.model.ln_final.weight", (1280,), "sdxl"),
    ("cond_stage_model.transformer.text_model.final_layer_norm.weight", (768,), "sd1"),
    ("cond_stage_model.model.ln_final.weight", (1024,), "sd2"),
    ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", (4608, 1536), "sd3"),
    ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", (9216, 3072), "flux"),
    # nothing tells the family
    ("some.layer.weight", (2048, 768), None),
]


@pytest.mark.parametrize(("name", "shape", "family"), TENSORS)
def test_tensors_tell_the_family(name: str, shape: tuple[int, ...], family: str | None) -> None:
    assert family_of(header_of({name: shape})) == family


def test_the_two_factors_of_a_lokr_multiply() -> None:
    whole = header_of({f"{KOHYA}.lokr_w1": (16, 32), f"{KOHYA}.lokr_w2": (40, 64)})
    split = header_of({f"{KOHYA}.lokr_w1_b": (4, 8), f"{KOHYA}.lokr_w2_a": (9, 4), f"{KOHYA}.lokr_w2_b": (4, 96)})

    assert (family_of(whole), family_of(split)) == ("sdxl", "sd1")


# The trainer's metadata → the family.
DECLARED = [
    ({"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
    ({"ss_base_model_version": "sdxl_1.0"}, "sdxl"),
    ({"ss_base_model_version": "sd_v1"}, "sd1"),
    ({"ss_base_model_version": "sd_1.5"}, "sd1"),
    ({"ss_base_model_version": "sd_v2_v"}, "sd2"),
    ({"ss_base_model_version": "sd3_m"}, "sd3"),
    ({"ss_base_model_version": "flux1"}, "flux"),
    ({"ss_base_model_version": "flux2_klein"}, "flux2"),
    ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl"),
    ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "sd1"),
    ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "sd2"),
    ({"modelspec.architecture": "stable-diffusion-3-medium"}, "sd3"),
    ({"modelspec.architecture": "flux-1-dev/lora"}, "flux"),
    ({"ss_base_model_version": "", "modelspec.architecture": "Flux-1-dev"}, "flux"),
    # a title or a file name is no declaration
    ({"modelspec.title": "Hand Detail FLUX & XL", "ss_output_name": "sdxl_flux_sd15"}, None),
    ({"ss_sd_model_name": "sd_xl_base_1.0.safetensors"}, None),
]


@pytest.mark.parametrize(("metadata", "family"), DECLARED)
def test_metadata_tells_the_family_if_tensors_do_not(metadata: dict[str, str], family: str | None) -> None:
    assert family_of(header_of({}, metadata)) == family


SDXL: Shapes = {f"{KOHYA}.lora_down.weight": (8, 2048)}
SD1: Shapes = {f"{KOHYA}.lora_down.weight": (8, 768)}
SD1_OR_2: Shapes = {"lora_unet_down_blocks_0_attentions_1_proj_out.lora_down.weight": (4, 320)}
FLUX: Shapes = {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (4, 3072)}

# Tensors, CivitAI's name, metadata → the family.
CONFLICTS: list[tuple[Shapes, str | None, dict[str, str], str | None]] = [
    # a label that the weights contradict is wrong
    (SD1, "SDXL 1.0", {}, "sd1"),
    (SDXL, "SD 1.5", {}, "sdxl"),
    (FLUX, "Illustrious", {}, "flux"),
    (SDXL, "Flux.1 D", {"ss_base_model_version": "flux1"}, "sdxl"),
    (SDXL, "Something New 7B", {}, "sdxl"),
    # one of several families that look alike is chosen by its label
    (SDXL, "Kolors", {}, "kolors"),
    (FLUX, "Chroma", {}, "chroma"),
    (SD1_OR_2, "SD 2.1", {}, "sd2"),
    (SD1_OR_2, None, {"ss_base_model_version": "sd_v2"}, "sd2"),
    (SD1_OR_2, None, {}, "sd1"),
    # CivitAI's label goes before the trainer's, and "Other" is no label
    ({}, "Pony", {"ss_base_model_version": "sd_v1"}, "sdxl"),
    ({}, "Other", {"ss_base_model_version": "sd_v1"}, "sd1"),
    ({}, "Other", {}, None),
]


@pytest.mark.parametrize(("tensors", "base_model", "metadata", "family"), CONFLICTS)
def test_a_label_decides_among_what_the_tensors_allow(
    tensors: Shapes, base_model: str | None, metadata: dict[str, str], family: str | None
) -> None:
    assert family_of(header_of(tensors, metadata), base_model) == family


def test_the_sandbox_s_models_are_told_apart_by_their_tensors_alone(tmp_path: Path) -> None:
    makers = (sdxl_checkpoint, sdxl_lora, sd15_checkpoint, sd15_lora)
    headers = [read_header(make(tmp_path / f"{make.__name__}.safetensors")) for make in makers]

    families = [family_of(replace(header, declared_family=None)) for header in headers]

    assert families == ["sdxl", "sdxl", "sd1", "sd1"]


def test_a_family_fits_only_itself_and_an_unknown_family_is_unknown() -> None:
    known = ("sd1", "sd2", "sdxl", "sd3", "flux")

    assert all(
        families_fit(lora, checkpoint) is (lora == checkpoint) for lora, checkpoint in itertools.product(known, known)
    )
    assert families_fit(None, "sdxl") is None
    assert families_fit("sdxl", None) is None

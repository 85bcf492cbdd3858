"""The header of a safetensors file as a table: metadata, and each tensor's type and shape. Pure, and strict.

    header    JSON: {"__metadata__": {"key": "text", …},
                     "tensor": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}, …}

The rules are those of the `safetensors` package 0.8. Five more things are refused: a key that appears twice, a tensor
described by more than its three fields, a file without tensors or with more than 100,000, and what makes A1111's own
reader fail.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from a1111_worker.errors import ModelRejected

MAX_TENSORS = 100_000
"""A checkpoint of SDXL has 2,500 tensors, and a LoRA with three tensors for each of its layers 3,000."""

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Each tensor's type and shape by its name."""


@dataclass(frozen=True)
class TensorTable:
    metadata: Mapping[str, str]
    tensors: Tensors


def parse_table(text: bytes, data_size: int) -> TensorTable:
    """The table in a header's text. `data_size` is how many bytes follow the header.

    ModelRejected says what is wrong with the header, or that it does not describe exactly these bytes.
    """
    content = _parse(text)
    metadata = _metadata(content.pop("__metadata__", None))
    return TensorTable(metadata, _tensors(content, data_size))


# Bits of an element, as `safetensors` 0.8 knows them.
_BITS = {
    **{"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8},
    **{"F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32},
    **{"C64": 64, "F64": 64, "I64": 64, "U64": 64},
}
_INTEGERS = frozenset({int})
_MOST_DIMENSIONS = 64  # torch's own limit, and it keeps the product of a hostile shape small
_MOST_ELEMENTS = 2**58  # of a tensor; the package refuses a shape that overflows, even if another of its sides is 0


def _parse(text: bytes) -> dict[str, Any]:
    try:
        decoded = text.decode("utf-8")
        # To Python -0 is a natural number, to the package it is none. Parsing every number ourselves takes half as long
        # again, so it is done only if there may be a -0.
        parse_int = _natural if "-0" in decoded and _MINUS_ZERO.search(decoded) else None
        content = json.loads(decoded, object_pairs_hook=_without_duplicates, parse_int=parse_int)
        if "\\u" in decoded:
            json.dumps(content, ensure_ascii=False).encode()  # fails if an escape makes half a character
    except (ValueError, RecursionError) as error:
        raise _damaged("it is not valid JSON") from error
    return cast(dict[str, Any], content)  # it begins with {


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise _damaged("it names the same thing twice")
    return content


_MINUS_ZERO = re.compile(r"[\[,:]\s*-0\s*[\],]")


def _natural(digits: str) -> int:
    if digits.startswith("-"):
        raise ValueError("not a natural number")
    return int(digits)


def _metadata(content: Any) -> dict[str, str]:
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise _damaged("its metadata holds something other than text")
    for key in ("ss_output_name", "sshs_model_hash"):
        # A1111 parses JSON that it finds in a value, then uses these two values as texts: it would list no LoRA at all.
        if _is_json_object(content.get(key, "")):
            raise ModelRejected(f"the file's metadata would break the WebUI: {key} is not a plain text")
    return content


def _is_json_object(value: str) -> bool:
    if not value.startswith("{"):
        return False
    try:
        json.loads(value)
    except (ValueError, RecursionError):
        return False
    return True


def _tensors(content: dict[str, Any], data_size: int) -> Tensors:
    if not content:
        raise ModelRejected("the file holds no tensors")
    if len(content) > MAX_TENSORS:
        raise ModelRejected(f"the file describes {len(content):,} tensors, and the limit is {MAX_TENSORS:,}")
    tensors = {}
    byte_ranges = []
    for name, entry in content.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise _damaged("the description of a tensor is not valid") from error
        if type(begin) is not int or type(end) is not int or len(entry) != 3:
            raise _damaged("the description of a tensor is not valid")
        if type(dtype) is not str or dtype not in _BITS:
            raise _damaged("a tensor has a type that safetensors does not know")
        if type(shape) is not list or not _INTEGERS.issuperset(map(type, shape)) or len(shape) > _MOST_DIMENSIONS:
            raise _damaged("a tensor's shape is not valid")
        if shape and min(shape) < 0:
            raise _damaged("a tensor's shape is not valid")
        if math.prod(shape) * _BITS[dtype] != (end - begin) * 8:
            raise _damaged("a tensor's size is not that of its shape and type")
        if begin == end and math.prod(filter(None, shape)) >= _MOST_ELEMENTS:
            raise _damaged("an empty tensor has an impossible shape")
        byte_ranges.append((begin, end))
        tensors[name] = (dtype, tuple(shape))
    _check_cover(byte_ranges, data_size)
    return tensors


def _check_cover(byte_ranges: list[tuple[int, int]], data_size: int) -> None:
    """Check that every byte of the data belongs to exactly one tensor."""
    covered = 0
    for begin, end in sorted(byte_ranges):
        if begin != covered:
            raise _damaged("tensors overlap" if begin < covered else "there is a hole between tensors")
        covered = end
    if covered > data_size:
        raise ModelRejected(f"the file is cut off: its tensors need {covered} bytes and it has {data_size}")
    if covered < data_size:
        raise ModelRejected(f"the file has {data_size - covered} bytes after its last tensor")


def _damaged(reason: str) -> ModelRejected:
    return ModelRejected(f"the file's header is damaged: {reason}")

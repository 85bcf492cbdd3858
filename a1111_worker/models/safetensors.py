"""What a safetensors file says about itself: whether it is valid, its architecture, the hash that A1111 prints for it.

    8 bytes   length of the header, little endian, at most 100,000,000
    header    JSON: {"__metadata__": {"key": "text", …},
                     "tensor": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}, …}
    data      every tensor's bytes at its offsets: no hole, no overlap, nothing before, between or after

All this is known without reading a tensor. Nothing in such a file can run, so the WebUI is given no other kind of file.
The rules are those of the `safetensors` package 0.8. Four more things are refused: a key that appears twice, a tensor
described by more than its three fields, a file without tensors, and what makes A1111's own reader fail.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from a1111_worker.errors import ModelRejected

HEADER_LIMIT = 100_000_000
"""The package's own limit (MAX_HEADER_SIZE)."""


@dataclass(frozen=True)
class Header:
    """The header of a valid file. The tensors' bytes begin at `data_offset`; they and the file end at `size`."""

    metadata: Mapping[str, str] = field(repr=False)
    tensors: Mapping[str, tuple[str, tuple[int, ...]]] = field(repr=False)
    data_offset: int
    size: int


def read_header(path: Path) -> Header:
    """The header of a complete and valid safetensors file. Otherwise ModelRejected says what is wrong with the file."""
    with path.open("rb") as file:
        size = path.stat().st_size
        length = _header_length(file, size)
        text = file.read(length)
    if len(text) < length:  # it shrank while it was read
        raise ModelRejected("the file is cut off inside its header")
    content = _parse(text)
    metadata = _metadata(content.pop("__metadata__", None))
    tensors = _tensors(content, size - 8 - length)
    return Header(metadata, tensors, 8 + length, size)


def lora_hash(path: Path, header: Header) -> str:
    """The 12 digits that A1111 1.9.3 and 1.10.1 print for this LoRA in "Lora hashes" (network.py, hashes.py).

    They are the start of `sshs_model_hash` if the trainer wrote one (whatever it says: A1111 does not check it), else
    of the SHA-256 of everything after the header. They are not a part of the file's own SHA-256.
    """
    trainers_hash = header.metadata.get("sshs_model_hash")
    if trainers_hash:
        return trainers_hash[:12]
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        file.seek(header.data_offset)
        while chunk := file.read(2 * 1024 * 1024):
            digest.update(chunk)
    return digest.hexdigest()[:12]


# -- which architecture ------------------------------------------------------------------------------------------------


def family_of(header: Header, base_model: str | None = None) -> str | None:
    """The architecture that a model belongs to ("sd1", "sd2", "sdxl", "sd3", "flux", …), None if nothing tells.

    What people declare (CivitAI's base model, else the trainer's metadata) decides among the families whose tensors
    look alike. If it contradicts the tensors, the tensors win: a label is a claim, and a weight of the wrong width
    cannot be applied. Titles and file names are not used.
    """
    declared = family_of_base_model(base_model) or _family_by_metadata(header.metadata)
    possible = _families_by_tensors(header.tensors)
    if possible and declared not in possible:
        return possible[0]
    return declared


def families_fit(lora: str | None, checkpoint: str | None) -> bool | None:
    """Whether a LoRA of one family can be applied to a checkpoint of another. None if one of them is unknown."""
    if lora is None or checkpoint is None:
        return None
    return lora == checkpoint


# How CivitAI's own names (`basemodel.constants.ts`) begin, longer beginnings first. Its ecosystems Pony, Illustrious
# and NoobAI are children of SDXL; Pony V7 is a child of AuraFlow.
_BASE_MODELS = (
    ("pony v7", "auraflow"),
    ("pony", "sdxl"),
    ("illustrious", "sdxl"),
    ("noobai", "sdxl"),
    ("sdxl", "sdxl"),
    ("sd 1", "sd1"),
    ("sd 2", "sd2"),
    ("sd 3", "sd3"),
    ("svd", "svd"),
    ("flux.2", "flux2"),
    ("flux.1", "flux"),
    ("hunyuan 1", "hunyuan-dit"),
    ("hunyuan video", "hunyuan-video"),
    ("playground v2", "playground"),
    ("pixart", "pixart"),
    ("ltxv", "ltxv"),
    ("wan ", "wan"),
    ("qwen", "qwen"),
    ("zimage", "zimage"),
    ("hidream", "hidream"),
)
_NO_FAMILY = ("", "other", "unknown", "upscaler", "odor")


def family_of_base_model(base_model: str | None) -> str | None:
    """The family of a base model as CivitAI spells it. A base model that is not in the table is a family of its own."""
    name = " ".join((base_model or "").split()).casefold()
    if name in _NO_FAMILY:
        return None
    for beginning, family in _BASE_MODELS:
        if name.startswith(beginning):
            return family
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-") or None


# `ss_base_model_version` is written by kohya and ai-toolkit, `modelspec.architecture` is from Stability's model spec.
_DECLARED = (
    (re.compile(r"sdxl|stable-diffusion-xl"), "sdxl"),
    (re.compile(r"sd_?v?1|stable-diffusion-v1"), "sd1"),
    (re.compile(r"sd_?v?2|stable-diffusion-v2"), "sd2"),
    (re.compile(r"sd_?v?3|stable-diffusion-v?3"), "sd3"),
    (re.compile(r"flux[-_.]?2"), "flux2"),
    (re.compile(r"flux"), "flux"),
)


def _family_by_metadata(metadata: Mapping[str, str]) -> str | None:
    for key in ("ss_base_model_version", "modelspec.architecture"):
        value = metadata.get(key, "").strip().casefold()
        for pattern, family in _DECLARED:
            if pattern.match(value):
                return family
    return None


# Families whose tensors look alike share a line. The first is meant if nothing is declared.
_SD1 = ("sd1",)
_SD2 = ("sd2", "svd")
_SD1_OR_2 = ("sd1", "sd2", "svd")
_SDXL = ("sdxl", "kolors", "playground")
_SD3 = ("sd3",)
_FLUX = ("flux", "flux2", "chroma", "hunyuan-video")
_WIDTHS = {768: _SD1, 1024: _SD2, 2048: _SDXL}

# Blocks have the names of the original code (input_blocks) or of diffusers (down_blocks), joined by dots or, in kohya's
# files, by underscores. Only a UNet has them: LTX-Video's `transformer_blocks.0.attn2.to_k` is 2048 wide too.
_UNET = re.compile(r"(?:(?:down|up|input|output)_blocks|mid_block|middle_block)[._]")
_CROSS_ATTENTION = re.compile(r"attn2[._](?:processor\.)?to_[kv](?P<part>[._].*)$")
_DEEP_TRANSFORMER = re.compile(r"transformer_blocks[._][1-9]")  # SD 1 and 2 have only block 0 in each place
_CLIP_LAYER = re.compile(
    r"(?:lora_te(?P<number>[12]?)_|text_encoder(?P<second>_2)?\.)text_model[._]encoder[._]layers[._]\d+[._]"
    r"(?:self_attn[._]q_proj|mlp[._]fc1)(?P<part>[._].*)$"
)
# Each pattern begins with plain text. That makes the search through all names at once fast.
_MARKS = (
    (re.compile(r"conditioner\.embedders\.1\."), _SDXL),
    (re.compile(r"cond_stage_model\.transformer\."), _SD1),
    (re.compile(r"cond_stage_model\.model\."), _SD2),
    (re.compile(r"joint_blocks[._]\d"), _SD3),
    (re.compile(r"double_blocks[._]\d"), _FLUX),
    (re.compile(r"single_blocks[._]\d"), _FLUX),
    (re.compile(r"single_transformer_blocks[._]\d"), _FLUX),
)
# SDXL's UNet has three blocks in each direction, and no attention in the outermost ones.
_SMALL_UNET = (
    re.compile(r"down_blocks[._]3[._]"),
    re.compile(r"up_blocks[._]3[._]"),
    re.compile(r"down_blocks[._]0[._]attentions"),
    re.compile(r"up_blocks[._]2[._]attentions"),
)


def _families_by_tensors(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[str, ...]:
    """The families whose tensors look like these, by the strongest evidence there is. Empty if no family's do."""
    for name in tensors:
        if "attn2" in name and (found := _CROSS_ATTENTION.search(name)) and _UNET.search(name):
            width = _input_width(tensors, name, found["part"])
            if width in _WIDTHS:
                return _WIDTHS[width]
    names = "\n".join(tensors)
    for mark, families in _MARKS:
        if mark.search(names):
            return families
    # A slider may not change cross attention. Then the UNet's shape decides: SDXL's has fewer blocks, but deeper ones.
    if any(_DEEP_TRANSFORMER.search(name) and _UNET.search(name) for name in tensors):
        return _SDXL
    if any(mark.search(names) for mark in _SMALL_UNET):
        return _SD1_OR_2
    return _family_by_text_encoder(tensors)


def _family_by_text_encoder(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[str, ...]:
    """The family of a LoRA for text encoders only. SDXL has two encoders, the second is 1280 wide. SD 3 has three."""
    widths = set()
    for name in tensors:
        if name.startswith(("lora_te3_", "text_encoder_3.")):
            return _SD3
        if found := _CLIP_LAYER.search(name):
            second = found["number"] == "2" or bool(found["second"])
            widths.add((second, _input_width(tensors, name, found["part"])))
    if (True, 1280) in widths:
        return _SDXL
    if (False, 1024) in widths:
        return _SD2
    # 768 alone is CLIP-L. SD 1, SDXL, SD 3 and FLUX share it, but only kohya's SD 1 files call it `lora_te_`.
    if (False, 768) in widths and any(name.startswith("lora_te_") for name in tensors):
        return _SD1
    return ()


_RANK_BY_INPUT = ("down.weight", "lora_A.weight", "lora_A.default.weight", "hada_w1_b")


def _input_width(tensors: Mapping[str, tuple[str, tuple[int, ...]]], name: str, part: str) -> int:
    """The width of a layer's input, read from one of the layer's tensors. 0 if this tensor does not show it.

    A weight (or its difference) is [out, in]. LoRA's down (A) and LoHa's b are [rank, in]. LoKr's two factors multiply
    to [out, in].
    """
    shape = tensors[name][1]
    if len(shape) < 2:
        return 0
    if part in (".weight", ".diff") or part.endswith(_RANK_BY_INPUT):
        return shape[1]
    if part in (".lokr_w1", ".lokr_w1_b"):
        layer = name.removesuffix(part)
        for other in (".lokr_w2", ".lokr_w2_b"):
            if len(second := tensors.get(layer + other, ("", ()))[1]) >= 2:
                return shape[1] * second[1]
    return 0


# -- reading and checking ----------------------------------------------------------------------------------------------

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

# How files of other formats begin. This is compared only if it is certain that a file is not safetensors: a header of
# 128 bytes makes a valid file begin with \x80, a header of 60 bytes with <.
_OTHER_FORMATS = (
    (b"PK", "it is a zip archive or a zipped pickle (.ckpt, .pt), which may run code when it is loaded"),
    (b"\x80", "it is a pickle (.ckpt, .pt), which may run code when it is loaded"),
    (b"<", "it is a web page (HTML or XML), not a model"),
    (b"{", "it is a JSON text, not a model"),
    (b"GGUF", "it is a GGUF file"),
    (b"\x1f\x8b", "it is compressed with gzip"),
    (b"7z\xbc\xaf", "it is a 7z archive"),
    (b"Rar!", "it is a RAR archive"),
    (b"version https://git-lfs", "it is a Git LFS pointer, not the model it points to"),
)


def _header_length(file: BinaryIO, size: int) -> int:
    """The length of the header. `file` is then at the header's first byte. ModelRejected if this is no such file."""
    if size == 0:
        raise ModelRejected("the file is empty")
    head = file.read(64)
    length = int.from_bytes(head[:8], "little")
    # A1111 asserts that the header begins like this, outside of any try: with one file in its folder that does not, it
    # lists no LoRA at all (sd_models.read_metadata_from_safetensors, networks.list_available_networks).
    if len(head) >= 10 and head[8:10] == b'{"' and length <= HEADER_LIMIT:
        if length > size - 8:
            raise ModelRejected(f"the file is cut off inside its header ({size} bytes of at least {8 + length})")
        file.seek(8)
        return length
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for beginning, description in _OTHER_FORMATS:
        if head.startswith(beginning) or (beginning in (b"<", b"{") and text.startswith(beginning)):
            raise _not_safetensors(description)
    if size < 10:
        raise _not_safetensors(f"it has only {size} bytes")
    if head[8:9] == b"{" and length <= HEADER_LIMIT:
        raise _not_safetensors("its header has no entries, or blanks before the first entry")
    raise _not_safetensors("it does not begin with a header")


def _not_safetensors(reason: str) -> ModelRejected:
    return ModelRejected(f"the file is not a safetensors file: {reason}")


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


def _tensors(content: dict[str, Any], data_size: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    if not content:
        raise ModelRejected("the file holds no tensors")
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

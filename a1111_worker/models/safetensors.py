"""What a safetensors file says about itself: whether it is valid, its architecture, the hash that A1111 prints for it.

    8 bytes   length of the header, little endian, at most 16,000,000
    header    JSON: what each tensor is called, its type and shape, and where its bytes are (`tensors`)
    data      every tensor's bytes at its offsets: no hole, no overlap, nothing before, between or after

All this is known without reading a tensor. Nothing in such a file can run, so the WebUI is given no other kind of file.

Parsing a header takes 50 to 100 ms a megabyte, and most of that time nothing else in the process runs. A header above
1 MB is parsed in a child process, which has a limit of memory and time and returns the few facts of `Header`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import resource
import stat
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

from a1111_worker.domain import ModelKind
from a1111_worker.errors import ModelRejected
from a1111_worker.models.layers import Layers, checkpoint_layers, count_matches, is_inert, lora_layers
from a1111_worker.models.small_models import embedding_family, vae_channels
from a1111_worker.models.tensors import Tensors, parse_table

HEADER_LIMIT = 16_000_000
"""Bytes. A checkpoint of SDXL has 0.3 MB; a LoRA may have some MB if its trainer wrote down every tag."""

IN_PROCESS_LIMIT = 1_000_000  # bytes


@dataclass(frozen=True)
class ChildLimits:
    """What a child process may use to parse a header: bytes of address space, and seconds.

    No header below HEADER_LIMIT needs more than 3 s and 0.6 GB. The rest is for a machine that is busy.
    """

    memory: int = 1 << 30
    seconds: float = 120.0


_ROOT = Path(__file__).resolve().parents[2]
# Neither the environment nor installed packages change what the child imports: the standard library and this file.
_CHILD = f"import sys; sys.path.append({str(_ROOT)!r}); from a1111_worker.models.safetensors import main; main()"


@dataclass(frozen=True)
class Header:
    """What the header of a valid file says. The tensors' bytes begin at `data_offset`; they and the file end at `size`.

    `families` are those whose tensors look like these, and `declared_family` is what the trainer wrote. `own_hash` is
    the `sshs_model_hash` that A1111 prints unchecked, "" if there is none. `embedding_family` and `vae_channels` are of
    a file that A1111 loads as an embedding or a VAE, else None (`small_models`). `is_inert`, `lora_layers` and
    `checkpoint_layers`: see `layers`. `missing_parts` are those that the file lacks to be a whole checkpoint.
    """

    size: int
    data_offset: int
    families: tuple[str, ...] = ()
    declared_family: str | None = None
    own_hash: str = ""
    is_inert: bool = False
    embedding_family: str | None = None
    vae_channels: int | None = None
    lora_layers: Layers | None = field(default=None, repr=False)
    checkpoint_layers: Layers = field(default_factory=dict, repr=False)
    missing_parts: tuple[str, ...] = ()


def read_header(path: Path) -> Header:
    """The header of a complete and valid safetensors file. Otherwise ModelRejected says what is wrong with the file.

    OSError: it cannot be read, and nothing is known of it.
    """
    with open_model(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = _header_length(file, size)
        text = file.read(length)
    if len(text) < length:  # it shrank while it was read
        raise ModelRejected("the file is cut off inside its header")
    return parse_header(text, size) if length <= IN_PROCESS_LIMIT else parse_in_child(text, size)


def open_model(path: Path) -> BinaryIO:
    """Open a model for reading. ModelRejected if it is not a regular file: reading a FIFO or a device may never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV):  # a socket, a device that is not there
            raise ModelRejected("it is not a regular file") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ModelRejected("it is not a regular file")
    return os.fdopen(descriptor, "rb")


def lora_hash(path: Path, header: Header) -> str:
    """The 12 digits that A1111 1.9.3 and 1.10.1 print for this LoRA in "Lora hashes" (network.py, hashes.py).

    They are the start of `sshs_model_hash` if the trainer wrote one, else of the SHA-256 of everything after the
    header. They are not a part of the file's own SHA-256. ModelRejected: see `check_lora`.
    """
    check_lora(header)
    if header.own_hash:
        return header.own_hash[:12]
    digest = hashlib.sha256()
    with open_model(path) as file:
        file.seek(header.data_offset)
        while chunk := file.read(2 * 1024 * 1024):
            digest.update(chunk)
    return digest.hexdigest()[:12]


def check_lora(header: Header) -> None:
    """Raise ModelRejected if A1111 would apply nothing of a LoRA, whatever the checkpoint, or could not prove its use.

    A1111 prints whatever `sshs_model_hash` says: with ", " in it a file can speak for another one.
    """
    if header.own_hash and not _HASH.fullmatch(header.own_hash):
        raise ModelRejected("the file's metadata would break the proof of its use: sshs_model_hash is not a hash")
    if header.is_inert:
        raise ModelRejected(
            "the WebUI applies nothing of this LoRA: its tensors have diffusers' names (unet.…, text_encoder.…)",
            hint="convert it to kohya's form (lora_unet_…)",
        )


def check_kind(kind: ModelKind, header: Header) -> None:
    """Raise ModelRejected if A1111 would not load a file as an embedding or a VAE, whatever the checkpoint.

    A VAE that cannot be loaded leaves a model behind that misreads prompts (1.9.3 and 1.10.1, measured).
    """
    if kind is ModelKind.EMBEDDING and header.embedding_family is None:
        raise ModelRejected(
            "the file is no embedding: it must hold one tensor of width 768 (SD 1) or 1024 (SD 2), or clip_l and "
            "clip_g (SDXL)"
        )
    if kind is ModelKind.VAE and header.vae_channels is None:
        raise ModelRejected(
            "the file is no VAE as the WebUI reads it: its tensors are not exactly those of an AutoencoderKL",
            hint="files in diffusers' form (encoder.down_blocks.…) must be converted",
        )


_HASH = re.compile(r"[0-9A-Fa-f]{12,64}")


def matched_layers(lora: Header, checkpoint: Header) -> tuple[int, int] | None:
    """How many of a LoRA's layers the checkpoint has in the right size, of how many. None if that is unknown.

    ModelRejected: see `check_lora`.
    """
    check_lora(lora)
    return count_matches(lora.lora_layers, checkpoint.checkpoint_layers)


def parse_header(text: bytes, size: int) -> Header:
    """The header with this text of a file of `size` bytes. ModelRejected says what is wrong with it."""
    table = parse_table(text, size - 8 - len(text))
    channels = vae_channels(table.tensors)
    families = _VAE_FAMILIES.get(channels, ()) if channels else _families_by_tensors(table.tensors)
    return Header(
        size=size,
        data_offset=8 + len(text),
        families=families,
        declared_family=_family_by_metadata(table.metadata),
        own_hash=table.metadata.get("sshs_model_hash", "")[:65],  # one more than a hash may have
        is_inert=is_inert(table.tensors),
        embedding_family=embedding_family(table.tensors),
        vae_channels=channels,
        lora_layers=lora_layers(table.tensors),
        checkpoint_layers=checkpoint_layers(table.tensors),
        missing_parts=tuple(
            part
            for part, beginnings in _PARTS_OF_CHECKPOINT.items()
            if not any(name.startswith(beginnings) for name in table.tensors)
        ),
    )


_PARTS_OF_CHECKPOINT: Mapping[str, tuple[str, ...]] = {
    "UNet": ("model.diffusion_model.",),
    "VAE": ("first_stage_model.",),
    "text encoder": ("cond_stage_model.", "conditioner.embedders.", "text_encoders."),
}


# -- which architecture ------------------------------------------------------------------------------------------------


def family_of(header: Header, base_model: str | None = None, *, kind: ModelKind = ModelKind.LORA) -> str | None:
    """The architecture that a model belongs to ("sd1", "sd2", "sdxl", "sd3", "flux", …), None if nothing tells.

    What people declare (CivitAI's base model, else the trainer's metadata) decides among the families whose tensors
    look alike. If it contradicts the tensors, the tensors win: a label is a claim, and a weight of the wrong width
    cannot be applied. Titles and file names are not used. An embedding is for the one family that has its width.
    """
    if kind is ModelKind.EMBEDDING:
        return header.embedding_family
    declared = family_of_base_model(base_model) or header.declared_family
    if header.families and declared not in header.families:
        return header.families[0]
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
_VAE_FAMILIES = {16: (*_SD3, *_FLUX)}  # by the channels of its latents. Those of SD 1, SD 2 and SDXL all have 4

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


def _families_by_tensors(tensors: Tensors) -> tuple[str, ...]:
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


def _family_by_text_encoder(tensors: Tensors) -> tuple[str, ...]:
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


def _input_width(tensors: Tensors, name: str, part: str) -> int:
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


# -- reading -----------------------------------------------------------------------------------------------------------

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
    if len(head) >= 10 and head[8:10] == b'{"':
        if length > HEADER_LIMIT:
            raise ModelRejected(f"the file's header has {length:,} bytes, and the limit is {HEADER_LIMIT:,}")
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


def parse_in_child(text: bytes, size: int, limits: ChildLimits = ChildLimits()) -> Header:
    """`parse_header` in a process of its own. OSError if that process failed for a reason that is not the file's."""
    try:
        done = subprocess.run(  # noqa: S603 - our own code, and numbers
            [sys.executable, "-I", "-S", "-c", _CHILD, str(size), str(limits.memory)],
            input=text,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=limits.seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(errno.ETIMEDOUT, f"a header was not parsed within {limits.seconds:g} s") from error
    if done.returncode != 0:
        raise OSError(errno.EIO, f"the process that parses a header ended with status {done.returncode}")
    answer = json.loads(done.stdout)
    if "rejected" in answer:
        raise ModelRejected(answer["rejected"])
    return Header(**{**answer, **{name: tuple(answer[name]) for name in ("families", "missing_parts")}})


def main() -> None:
    """The child: the header comes on stdin, the file's size and the memory are arguments. The facts leave as JSON."""
    size, memory = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    try:
        answer: Mapping[str, object] = asdict(parse_header(sys.stdin.buffer.read(), size))
    except ModelRejected as error:
        answer = {"rejected": error.message}
    except MemoryError:
        answer = {"rejected": f"the file's header takes more than {memory >> 20} MB of memory to parse"}
    sys.stdout.write(json.dumps(answer))

"""Makes small models that are real safetensors files. Real tensor names and shapes show their architecture.

A seed decides the bytes. `size_bytes` brings a file to an exact size with one more tensor as padding; without it the
file is as small as its tensors allow. Writing two gigabytes takes seconds: the content is one random block, repeated
and numbered, so that no two places in a file are alike.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

Tensors = Mapping[str, tuple[str, Sequence[int]]]
"""Name → (dtype, shape)."""

PADDING = "sandbox.padding"
TENSOR_HASH = "0" * 64
"""As a value in the metadata: `write_safetensors` puts the file's `tensor_hash` in its place."""

_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1}
_BLOCK = 1_048_583  # a prime: then two pieces whose size is a power of two are never equal by chance

SDXL_CHECKPOINT: Tensors = {
    "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight": ("F16", (77, 768)),
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": ("F16", (768,)),
    "conditioner.embedders.1.model.ln_final.weight": ("F16", (1280,)),
    "conditioner.embedders.1.model.positional_embedding": ("F16", (77, 1280)),
    "first_stage_model.decoder.conv_in.bias": ("F16", (512,)),
    "model.diffusion_model.input_blocks.0.0.weight": ("F16", (320, 4, 3, 3)),
    "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": ("F8_E4M3", (768, 768)),
    "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": ("F8_E4M3", (640, 2048)),
    "model.diffusion_model.label_emb.0.0.bias": ("F16", (1280,)),
}

SD15_CHECKPOINT: Tensors = {
    "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": ("F16", (77, 768)),
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": ("F16", (768,)),
    "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": ("F8_E4M3", (768, 768)),
    "first_stage_model.decoder.conv_in.bias": ("F16", (512,)),
    "model.diffusion_model.input_blocks.0.0.weight": ("F16", (320, 4, 3, 3)),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": ("F16", (320, 768)),
}


def _lora(layers: Mapping[str, tuple[int, int]], rank: int = 4) -> Tensors:
    """kohya's three tensors per layer, from its (in, out) features."""
    tensors: dict[str, tuple[str, Sequence[int]]] = {}
    for layer, (features_in, features_out) in layers.items():
        tensors[f"{layer}.alpha"] = ("F16", ())
        tensors[f"{layer}.lora_down.weight"] = ("F16", (rank, features_in))
        tensors[f"{layer}.lora_up.weight"] = ("F16", (features_out, rank))
    return tensors


SDXL_LORA = _lora(
    {
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (768, 768),
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (2048, 640),
    }
)

SD15_LORA = _lora(
    {
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (768, 768),
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (768, 320),
    }
)


def sdxl_checkpoint(path: Path, seed: int = 0, size_bytes: int | None = None) -> Path:
    """2.3 MB at least. It has every layer of `sdxl_lora`."""
    metadata = {"modelspec.architecture": "stable-diffusion-xl-v1-base"}
    return write_safetensors(path, SDXL_CHECKPOINT, metadata, seed=seed, size_bytes=size_bytes)


def sd15_checkpoint(path: Path, seed: int = 0, size_bytes: int | None = None) -> Path:
    """1.3 MB at least. It has every layer of `sd15_lora`."""
    metadata = {"modelspec.architecture": "stable-diffusion-v1"}
    return write_safetensors(path, SD15_CHECKPOINT, metadata, seed=seed, size_bytes=size_bytes)


def sdxl_lora(
    path: Path, seed: int = 0, size_bytes: int | None = None, *, hashed: bool = False, **metadata: str
) -> Path:
    """35 kB at least. `hashed` writes `sshs_model_hash`, as newer kohya does; `metadata` adds and replaces."""
    about = _kohya(path, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", hashed) | metadata
    return write_safetensors(path, SDXL_LORA, about, seed=seed, size_bytes=size_bytes)


def sd15_lora(
    path: Path, seed: int = 0, size_bytes: int | None = None, *, hashed: bool = False, **metadata: str
) -> Path:
    """25 kB at least. Keywords as for `sdxl_lora`."""
    about = _kohya(path, "sd_v1-5", "stable-diffusion-v1/lora", hashed) | metadata
    return write_safetensors(path, SD15_LORA, about, seed=seed, size_bytes=size_bytes)


def sd15_embedding(path: Path, seed: int = 0) -> Path:
    """One vector."""
    return write_safetensors(path, {"emb_params": ("F32", (1, 768))}, seed=seed)


def sdxl_embedding(path: Path, seed: int = 0) -> Path:
    """Two vectors."""
    return write_safetensors(path, {"clip_g": ("F32", (2, 1280)), "clip_l": ("F32", (2, 768))}, seed=seed)


def vae(path: Path, seed: int = 0, *, channels: int = 4) -> Path:
    """A VAE as A1111 loads it, by its names; only the first tensor of its decoder has its real shape. 0.2 MB."""
    tensors: dict[str, tuple[str, Sequence[int]]] = dict.fromkeys(vae_names(), ("F16", (1,)))
    tensors["decoder.conv_in.weight"] = ("F16", (512, channels, 3, 3))
    return write_safetensors(path, tensors, seed=seed)


def vae_names() -> list[str]:
    """The tensors of an AutoencoderKL, as the real files of SD 1 and SDXL have them: 248."""
    coders = []
    for coder, way, between, blocks, wider, last in (
        ("encoder", "down", "downsample", 2, (1, 2), 3),
        ("decoder", "up", "upsample", 3, (0, 1), 0),
    ):
        coders += [f"{coder}.{part}" for part in ("conv_in", "norm_out", "conv_out")]
        coders += [f"{coder}.mid.attn_1.{part}" for part in ("k", "norm", "proj_out", "q", "v")]
        places = ["mid.block_1", "mid.block_2", *(f"{way}.{a}.block.{b}" for a in range(4) for b in range(blocks))]
        coders += [f"{coder}.{place}.{part}" for place in places for part in ("norm1", "conv1", "norm2", "conv2")]
        coders += [f"{coder}.{way}.{level}.block.0.nin_shortcut" for level in wider]
        coders += [f"{coder}.{way}.{level}.{between}.conv" for level in range(4) if level != last]
    return [f"{name}.{part}" for name in (*coders, "post_quant_conv", "quant_conv") for part in ("bias", "weight")]


def write_safetensors(
    path: Path,
    tensors: Tensors,
    metadata: Mapping[str, str] | None = None,
    *,
    seed: int = 0,
    size_bytes: int | None = None,
) -> Path:
    """Write a valid file of exactly `size_bytes`, or one as small as the tensors allow."""
    about = dict(metadata or {})
    header, length = _header(tensors, about, size_bytes)
    if TENSOR_HASH in about.values():
        digest = hashlib.sha256()
        for piece in _pieces(seed, length):
            digest.update(piece)
        header = header.replace(TENSOR_HASH.encode(), digest.hexdigest().encode())
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for piece in _pieces(seed, length):
            file.write(piece)
    return path


def sha256_of(path: Path) -> str:
    """64 lower-case digits."""
    return _sha256(path, 0)


def tensor_hash(path: Path) -> str:
    """SHA-256 of the tensors, without the header. A1111 1.10.1 prints its first 12 digits for a LoRA without
    `sshs_model_hash`."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
    return _sha256(path, 8 + length)


def _kohya(path: Path, base_model_version: str, architecture: str, hashed: bool) -> dict[str, str]:
    """The metadata that kohya's trainer writes into a LoRA. A1111 finds a LoRA by `ss_output_name` too."""
    return {
        "modelspec.architecture": architecture,
        "modelspec.sai_model_spec": "1.0.0",
        "ss_base_model_version": base_model_version,
        "ss_network_alpha": "4.0",
        "ss_network_dim": "4",
        "ss_network_module": "networks.lora",
        "ss_output_name": path.stem,
        **({"sshs_model_hash": TENSOR_HASH} if hashed else {}),
    }


def _header(tensors: Tensors, metadata: Mapping[str, str], size_bytes: int | None) -> tuple[bytes, int]:
    """The header as it is written, and the number of bytes after it."""
    bare, length = _layout(tensors, metadata)
    if size_bytes is None:
        return bare.ljust(-(-len(bare) // 8) * 8), length
    longest, _ = _layout(tensors, metadata, padding=size_bytes)
    room = -(-len(longest) // 8) * 8  # blanks at its end are allowed; they make its length independent of the padding
    padding = size_bytes - 8 - room - length
    if padding < 0:
        raise ValueError(f"{size_bytes} bytes are too few: the file needs {8 + room + length}")
    header, length = _layout(tensors, metadata, padding=padding)
    return header.ljust(room), length


def _layout(tensors: Tensors, metadata: Mapping[str, str], padding: int | None = None) -> tuple[bytes, int]:
    """The header's JSON, and the end of the last tensor."""
    offset = 0
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    extra: Tensors = {} if padding is None else {PADDING: ("U8", (padding,))}
    for name, (dtype, shape) in (*tensors.items(), *extra.items()):
        end = offset + _ITEM_BYTES[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    return json.dumps(entries, separators=(",", ":")).encode(), offset


def _pieces(seed: int, length: int) -> Iterator[memoryview]:
    block = bytearray(random.Random(seed).randbytes(min(_BLOCK, max(length, 8))))
    for number, start in enumerate(range(0, length, len(block))):
        struct.pack_into("<Q", block, 0, number)
        yield memoryview(block)[: length - start]


def _sha256(path: Path, start: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()

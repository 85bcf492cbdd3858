"""What an embedding and a VAE look like to A1111: by the names and shapes of their tensors.

Sources: A1111 1.9.3 and 1.10.1, modules/textual_inversion/textual_inversion.py (`create_embedding_from_data`),
modules/sd_vae.py (`load_vae`), and the AutoencoderKL of SD 1, SD 2 and SDXL, whose tensors are all called the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from a1111_worker.models.tensors import Tensors

_EMBEDDING_WIDTHS = {768: "sd1", 1024: "sd2"}


def embedding_family(tensors: Tensors) -> str | None:
    """The family of an embedding: by the width of its vectors. None if the file is none that A1111 loads."""
    if {"clip_g", "clip_l"} <= tensors.keys():
        widths = [shape[-1] if len(shape := tensors[name][1]) == 2 else 0 for name in ("clip_g", "clip_l")]
        return "sdxl" if widths == [1280, 768] else None
    if len(tensors) != 1:
        return None
    ((_, shape),) = tensors.values()
    return _EMBEDDING_WIDTHS.get(shape[-1]) if 1 <= len(shape) <= 2 else None


def vae_channels(tensors: Tensors) -> int | None:
    """The channels of a VAE's latents. None if A1111 could not load the file: no name may be missing or be one more."""
    if "decoder.conv_in.weight" not in tensors:
        return None
    names = {name for name in tensors if not name.startswith("loss") and name not in _IGNORED}
    shape = tensors["decoder.conv_in.weight"][1]
    if len(shape) != 4:
        return None
    with_quantisation = _autoencoder_names()
    if names == with_quantisation:
        return shape[1]
    is_without = names == {name for name in with_quantisation if "quant_conv." not in name}  # SD 3 and FLUX
    return shape[1] if is_without else None


_IGNORED = ("model_ema.decay", "model_ema.num_updates")


@cache
def _autoencoder_names() -> frozenset[str]:
    modules = [*_coder("encoder", 2), *_coder("decoder", 3), "quant_conv", "post_quant_conv"]
    return frozenset(f"{module}.{part}" for module in modules for part in ("weight", "bias"))


def _coder(coder: str, blocks: int) -> Iterator[str]:
    """The modules with weights of an encoder or decoder: four levels of two or three blocks each."""
    way, between = ("down", "downsample") if coder == "encoder" else ("up", "upsample")
    widened = {("encoder", 1), ("encoder", 2), ("decoder", 0), ("decoder", 1)}  # its first block has another width
    yield from (f"{coder}.{name}" for name in ("conv_in", "norm_out", "conv_out"))
    yield from (f"{coder}.mid.attn_1.{name}" for name in ("norm", "q", "k", "v", "proj_out"))
    for block in ("mid.block_1", "mid.block_2", *(f"{way}.{i}.block.{j}" for i in range(4) for j in range(blocks))):
        yield from (f"{coder}.{block}.{name}" for name in ("norm1", "conv1", "norm2", "conv2"))
    yield from (f"{coder}.{way}.{level}.block.0.nin_shortcut" for name, level in sorted(widened) if name == coder)
    last = 3 if coder == "encoder" else 0
    yield from (f"{coder}.{way}.{level}.{between}.conv" for level in range(4) if level != last)

"""Which layers of a checkpoint a LoRA changes, told by names and shapes alone, as A1111 would find them.

A1111 looks up each tensor of a LoRA by the part of its name before the first dot. If it finds no such layer, or a layer
of another size, it goes on without a word, and the answer's "Lora hashes" name the LoRA all the same (measured on 1.9.3
and 1.10.1; extensions-builtin/Lora/networks.py and network_lora.py).

    in the checkpoint   model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight
    to A1111            diffusion_model_input_blocks_4_1_transformer_blocks_0_attn1_to_q
    in a LoRA           lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight
                        lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight

A layer is a name and the number of its elements: A1111 reshapes a change that has as many elements as the layer, and
drops every other one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from a1111_worker.models.tensors import Tensors

Layers = Mapping[str, int]
"""Elements of each layer by its name."""

UNKNOWN = -1
"""The elements of a layer's change if its form is not plain LoRA (LoHa, LoKr, DoRA, IA3, OFT, a full difference)."""

_MOST_LAYERS = 5_000  # SDXL has 1,100; a longer table is not worth its transport

# -- of a LoRA ---------------------------------------------------------------------------------------------------------

_DIFFUSERS = ("unet.", "text_encoder.", "text_encoder_2.")
_PLAIN_PARTS = frozenset(
    {"lora_up.weight", "lora_down.weight", "lora_mid.weight", "lora_A.weight", "lora_B.weight", "alpha"}
)


def is_inert(tensors: Tensors) -> bool:
    """Whether A1111 finds no layer for any tensor: all have diffusers' names, whose first part is no layer's."""
    return all(name.startswith(_DIFFUSERS) for name in tensors)


def lora_layers(tensors: Tensors) -> Layers | None:
    """The layers that a LoRA names, under the LoRA's own names for them. None if there are too many.

    A change that cannot be computed, because a half of it is missing or its halves do not fit each other, has 0
    elements.
    """
    parts_of: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, (_, shape) in tensors.items():
        layer, _, part = name.partition(".")
        if part in _PLAIN_PARTS or layer.startswith("lora_"):
            parts_of.setdefault(layer, {})[part] = shape
    if len(parts_of) > _MOST_LAYERS:
        return None
    return {layer: _elements(parts) for layer, parts in parts_of.items()}


def _elements(parts: Mapping[str, tuple[int, ...]]) -> int:
    """The elements of up × down (or of up × mid × down), 0 if these cannot be multiplied."""
    if not _PLAIN_PARTS.issuperset(parts):
        return UNKNOWN
    up = parts.get("lora_up.weight", parts.get("lora_B.weight", ()))
    down = parts.get("lora_down.weight", parts.get("lora_A.weight", ()))
    mid = parts.get("lora_mid.weight")
    if len(up) < 2 or len(down) < 2 or (mid is not None and len(mid) < 2):
        return 0
    between = (down[0], down[0]) if mid is None else mid[:2]
    if (math.prod(up[1:]), down[0]) != between:
        return 0
    return up[0] * math.prod(down[1:]) * (1 if mid is None else math.prod(mid[2:]))


# -- of a checkpoint ---------------------------------------------------------------------------------------------------

# How names begin in a checkpoint, and to A1111. The first text encoder of SDXL is embedder 0, the second embedder 1.
_PREFIXES = (
    ("model.diffusion_model.", "diffusion_model."),
    ("conditioner.embedders.0.", "0."),
    ("conditioner.embedders.1.", "1."),
    ("cond_stage_model.transformer.encoder.", "transformer.text_model.encoder."),  # old SD 1 checkpoints
    ("cond_stage_model.", ""),
)
_CLIP = ("conditioner.embedders.0.transformer.", "cond_stage_model.transformer.")  # SDXL's, SD 1's


def checkpoint_layers(tensors: Tensors) -> Layers:
    """The layers of a checkpoint of SD 1 or SDXL that a LoRA can change, under A1111's names. Empty for all others."""
    if not any(name.startswith(_CLIP) for name in tensors):
        return {}
    layers: dict[str, int] = {}
    for name, (_, shape) in tensors.items():
        layer, _, part = name.rpartition(".")
        prefix = next((pair for pair in _PREFIXES if name.startswith(pair[0])), None)
        if prefix is None or len(shape) < 2:
            continue
        to_webui = (prefix[1] + layer.removeprefix(prefix[0])).replace(".", "_")
        if part == "weight":
            layers[to_webui] = math.prod(shape)
        elif part == "in_proj_weight":  # q, k and v of SDXL's second text encoder in one tensor
            layers |= {f"{to_webui}_{letter}_proj": math.prod(shape) // 3 for letter in "qkv"}
    return layers if len(layers) <= _MOST_LAYERS else {}


# -- both --------------------------------------------------------------------------------------------------------------


def count_matches(lora: Layers | None, checkpoint: Layers) -> tuple[int, int] | None:
    """How many of a LoRA's layers the checkpoint has in the right size, of how many. None if that is unknown.

    It is unknown if the checkpoint is neither SD 1 nor SDXL, if the LoRA has no layers, and if the checkpoint has one
    of its layers but the form of the change is not plain LoRA.
    """
    if not lora or not checkpoint:
        return None
    matched = 0
    for layer, elements in lora.items():
        found = next((checkpoint[name] for name in _names_to_webui(layer) if name in checkpoint), None)
        if found is not None and elements == UNKNOWN:
            return None
        matched += found is not None and found == elements
    return matched, len(lora)


def _names_to_webui(layer: str) -> Iterator[str]:
    """The names under which A1111 looks for a LoRA's layer, in its order."""
    yield _without_diffusers_names(layer)
    if "lora_unet" in layer:
        yield layer.replace("lora_unet", "diffusion_model")
    elif "lora_te1_text_model" in layer:
        yield layer.replace("lora_te1_text_model", "0_transformer_text_model")
        yield layer.replace("lora_te1_text_model", "transformer_text_model")


_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "norm1": "in_layers_0",
    "norm2": "out_layers_0",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
_SECOND_ENCODER = (("mlp_fc1", "mlp_c_fc"), ("mlp_fc2", "mlp_c_proj"), ("self_attn", "attn"))
_CONV_IN = re.compile(r"lora_unet_conv_in(.*)")
_CONV_OUT = re.compile(r"lora_unet_conv_out(.*)")
_TIME = re.compile(r"lora_unet_time_embedding_linear_(\d{1,9})(.*)")
_BLOCK = re.compile(r"lora_unet_(down|up)_blocks_(\d{1,9})_(attentions|resnets)_(\d{1,9})_(.+)")
_MIDDLE = re.compile(r"lora_unet_mid_block_(attentions|resnets)_(\d{1,9})_(.+)")
_DOWN = re.compile(r"lora_unet_down_blocks_(\d{1,9})_downsamplers_0_conv")
_UP = re.compile(r"lora_unet_up_blocks_(\d{1,9})_upsamplers_0_conv")
_TEXT = re.compile(r"lora_te(2?)_text_model_encoder_layers_(\d{1,9})_(.+)")


def _without_diffusers_names(layer: str) -> str:
    """A1111's `convert_diffusers_name_to_compvis`: diffusers' blocks become those of the original code."""
    if found := _CONV_IN.match(layer):
        return f"diffusion_model_input_blocks_0_0{found[1]}"
    if found := _CONV_OUT.match(layer):
        return f"diffusion_model_out_2{found[1]}"
    if found := _TIME.match(layer):
        return f"diffusion_model_time_embed_{int(found[1]) * 2 - 2}{found[2]}"
    if found := _BLOCK.match(layer):
        direction, block, kind, index, rest = found.groups()
        number = int(block) * 3 + int(index)
        place = f"input_blocks_{number + 1}" if direction == "down" else f"output_blocks_{number}"
        return f"diffusion_model_{place}_{_in_block(kind, rest)}"
    if found := _MIDDLE.match(layer):
        kind, index, rest = found.groups()
        part = 1 if kind == "attentions" else int(index) * 2
        return f"diffusion_model_middle_block_{part}_{_suffix(kind, rest)}"
    if found := _DOWN.match(layer):
        return f"diffusion_model_input_blocks_{int(found[1]) * 3 + 3}_0_op"
    if found := _UP.match(layer):
        return f"diffusion_model_output_blocks_{int(found[1]) * 3 + 2}_{2 if int(found[1]) else 1}_conv"
    if found := _TEXT.match(layer):
        second, number, rest = found[1], int(found[2]), found[3]
        if not second:
            return f"transformer_text_model_encoder_layers_{number}_{rest}"
        for diffusers, original in _SECOND_ENCODER:
            rest = rest.replace(diffusers, original)
        return f"1_model_transformer_resblocks_{number}_{rest}"
    return layer


def _in_block(kind: str, rest: str) -> str:
    return f"{1 if kind == 'attentions' else 0}_{_suffix(kind, rest)}"


def _suffix(kind: str, rest: str) -> str:
    return _RESNET.get(rest, rest) if kind == "resnets" else rest

"""Which layers a LoRA changes, by the names and shapes of SD 1 and SDXL."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import pytest

from a1111_worker.errors import ModelRejected
from a1111_worker.models.layers import checkpoint_layers, count_matches, lora_layers
from a1111_worker.models.safetensors import Header, check_lora, matched_layers, parse_header

Shapes = Mapping[str, tuple[int, ...]]

UNET = "model.diffusion_model."
SD1_TEXT = "cond_stage_model.transformer.text_model.encoder.layers."
TEXT_1 = "conditioner.embedders.0.transformer.text_model.encoder.layers."
TEXT_2 = "conditioner.embedders.1.model.transformer.resblocks."
SD1_CLIP: Shapes = {"cond_stage_model.transformer.text_model.final_layer_norm.weight": (768,)}
SDXL_CLIP: Shapes = {"conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (768,)}


def header_of(shapes: Shapes) -> Header:
    entries = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    return parse_header(text, 8 + len(text) + end)


def kohya(layer: str, shape: tuple[int, ...], rank: int = 4) -> Shapes:
    """A LoRA's three tensors for a layer of this shape: [out, in], or a convolution's [out, in, height, width]."""
    features_out, features_in, *kernel = shape
    return {
        f"{layer}.alpha": (),
        f"{layer}.lora_down.weight": (rank, features_in, *kernel),
        f"{layer}.lora_up.weight": (features_out, rank, *(1 for _ in kernel)),
    }


# A layer in a LoRA, the tensor of the checkpoint, its shape. Names and shapes are those of the real models.
SD1 = [
    ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", "input_blocks.1.1", (320, 320)),
    ("lora_unet_down_blocks_2_attentions_1_transformer_blocks_0_attn2_to_v", "input_blocks.8.1", (1280, 768)),
    ("lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj", "middle_block.1", (10240, 1280)),
    ("lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0", "output_blocks.3.1", (1280, 1280)),
    ("lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_k", "output_blocks.11.1", (320, 768)),
]
SD1_LAYERS = [
    *(
        (layer, f"{UNET}{block}.transformer_blocks.0.{module}.weight", shape)
        for (layer, block, shape), module in zip(
            SD1, ("attn1.to_q", "attn2.to_v", "ff.net.0.proj", "attn1.to_out.0", "attn2.to_k"), strict=True
        )
    ),
    ("lora_unet_down_blocks_1_attentions_1_proj_in", f"{UNET}input_blocks.5.1.proj_in.weight", (640, 640, 1, 1)),
    ("lora_te_text_model_encoder_layers_3_mlp_fc1", f"{SD1_TEXT}3.mlp.fc1.weight", (3072, 768)),
    ("lora_te_text_model_encoder_layers_11_self_attn_q_proj", f"{SD1_TEXT}11.self_attn.q_proj.weight", (768, 768)),
    # convolutions (LoCon)
    ("lora_unet_conv_in", f"{UNET}input_blocks.0.0.weight", (320, 4, 3, 3)),
    ("lora_unet_conv_out", f"{UNET}out.2.weight", (4, 320, 3, 3)),
    ("lora_unet_time_embedding_linear_1", f"{UNET}time_embed.0.weight", (1280, 320)),
    ("lora_unet_time_embedding_linear_2", f"{UNET}time_embed.2.weight", (1280, 1280)),
    ("lora_unet_down_blocks_2_resnets_1_conv1", f"{UNET}input_blocks.8.0.in_layers.2.weight", (1280, 1280, 3, 3)),
    ("lora_unet_down_blocks_1_resnets_0_time_emb_proj", f"{UNET}input_blocks.4.0.emb_layers.1.weight", (640, 1280)),
    (
        "lora_unet_up_blocks_3_resnets_0_conv_shortcut",
        f"{UNET}output_blocks.9.0.skip_connection.weight",
        (320, 960, 1, 1),
    ),
    ("lora_unet_mid_block_resnets_1_conv2", f"{UNET}middle_block.2.out_layers.3.weight", (1280, 1280, 3, 3)),
    ("lora_unet_down_blocks_0_downsamplers_0_conv", f"{UNET}input_blocks.3.0.op.weight", (320, 320, 3, 3)),
    ("lora_unet_up_blocks_0_upsamplers_0_conv", f"{UNET}output_blocks.2.1.conv.weight", (1280, 1280, 3, 3)),
    ("lora_unet_up_blocks_1_upsamplers_0_conv", f"{UNET}output_blocks.5.2.conv.weight", (1280, 1280, 3, 3)),
    # a checkpoint whose text encoder has the names of an old library
    (
        "lora_te_text_model_encoder_layers_0_mlp_fc2",
        "cond_stage_model.transformer.encoder.layers.0.mlp.fc2.weight",
        (768, 3072),
    ),
]
SDXL_UNET = "input_blocks.4.1.transformer_blocks.0"
SDXL_LAYERS = [
    # the original code's names, as kohya writes them for SDXL
    ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", f"{UNET}{SDXL_UNET}.attn1.to_q.weight", (640, 640)),
    ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", f"{UNET}{SDXL_UNET}.attn2.to_k.weight", (640, 2048)),
    (
        "lora_unet_middle_block_1_transformer_blocks_9_ff_net_2",
        f"{UNET}middle_block.1.transformer_blocks.9.ff.net.2.weight",
        (1280, 5120),
    ),
    ("lora_unet_output_blocks_0_1_proj_out", f"{UNET}output_blocks.0.1.proj_out.weight", (1280, 1280)),
    ("lora_unet_label_emb_0_0", f"{UNET}label_emb.0.0.weight", (1280, 2816)),
    ("lora_unet_out_2", f"{UNET}out.2.weight", (4, 320, 3, 3)),
    # diffusers' names, with underscores
    (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        f"{UNET}{SDXL_UNET}.attn1.to_q.weight",
        (640, 640),
    ),
    (
        "lora_unet_up_blocks_0_attentions_2_transformer_blocks_9_attn2_to_v",
        f"{UNET}output_blocks.2.1.transformer_blocks.9.attn2.to_v.weight",
        (1280, 2048),
    ),
    # both text encoders
    ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", f"{TEXT_1}0.self_attn.q_proj.weight", (768, 768)),
    ("lora_te2_text_model_encoder_layers_31_mlp_fc1", f"{TEXT_2}31.mlp.c_fc.weight", (5120, 1280)),
    ("lora_te2_text_model_encoder_layers_31_mlp_fc2", f"{TEXT_2}31.mlp.c_proj.weight", (1280, 5120)),
    ("lora_te2_text_model_encoder_layers_0_self_attn_out_proj", f"{TEXT_2}0.attn.out_proj.weight", (1280, 1280)),
]


@pytest.mark.parametrize(
    ("layer", "tensor", "shape", "clip"),
    [*((*row, SD1_CLIP) for row in SD1_LAYERS), *((*row, SDXL_CLIP) for row in SDXL_LAYERS)],
    ids=[layer for layer, _, _ in (*SD1_LAYERS, *SDXL_LAYERS)],
)
def test_a_layer_is_found_under_every_name_that_a1111_knows(
    layer: str, tensor: str, shape: tuple[int, ...], clip: Shapes
) -> None:
    checkpoint = header_of({**clip, tensor: shape, f"{tensor.removesuffix('weight')}bias": shape[:1]})
    of_other_width = (shape[0], shape[1] + 8, *shape[2:])

    assert matched_layers(header_of(kohya(layer, shape)), checkpoint) == (1, 1)
    assert matched_layers(header_of(kohya(layer, of_other_width)), checkpoint) == (0, 1)
    assert matched_layers(header_of(kohya(f"x{layer}", shape)), checkpoint) == (0, 1)


def test_q_k_and_v_of_the_second_text_encoder_are_one_tensor_of_the_checkpoint() -> None:
    checkpoint = header_of({**SDXL_CLIP, f"{TEXT_2}5.attn.in_proj_weight": (3840, 1280)})
    layers = [f"lora_te2_text_model_encoder_layers_5_self_attn_{letter}_proj" for letter in "qkv"]

    lora = header_of({name: shape for layer in layers for name, shape in kohya(layer, (1280, 1280)).items()})

    assert matched_layers(lora, checkpoint) == (3, 3)


LAYER, TENSOR, SHAPE = SDXL_LAYERS[0]
CHECKPOINT = header_of({**SDXL_CLIP, TENSOR: SHAPE})

# Tensors of a LoRA → how many layers match, of how many.
FORMS: dict[str, tuple[Shapes, tuple[int, int] | None]] = {
    "plain": (kohya(LAYER, SHAPE), (1, 1)),
    "without alpha": ({name: shape for name, shape in kohya(LAYER, SHAPE).items() if "alpha" not in name}, (1, 1)),
    "A and B": ({f"{LAYER}.lora_A.weight": (4, 640), f"{LAYER}.lora_B.weight": (640, 4)}, (1, 1)),
    "a part of it": ({**kohya(LAYER, SHAPE), **kohya("lora_unet_nowhere", (8, 8))}, (1, 2)),
    "nothing of it": (kohya("lora_unet_nowhere", (8, 8)), (0, 1)),
    "SD 1's width": (kohya(LAYER, (640, 768)), (0, 1)),
    "without a half": ({f"{LAYER}.lora_down.weight": (4, 640)}, (0, 1)),
    "halves of two ranks": ({f"{LAYER}.lora_down.weight": (4, 640), f"{LAYER}.lora_up.weight": (640, 8)}, (0, 1)),
    "three factors": (
        {
            f"{LAYER}.lora_down.weight": (4, 640, 1, 1),
            f"{LAYER}.lora_mid.weight": (6, 4, 1, 1),
            f"{LAYER}.lora_up.weight": (640, 6, 1, 1),
        },
        (1, 1),
    ),
    "other tensors beside it": ({**kohya(LAYER, SHAPE), "bundle_emb.x.string_to_param": (1, 8), "note": (1,)}, (1, 1)),
    # They act too, and their sizes are not computed here.
    "LoHa": ({f"{LAYER}.{part}": (4, 640) for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}, None),
    "LoKr": ({f"{LAYER}.lokr_w1": (8, 8), f"{LAYER}.lokr_w2": (80, 80)}, None),
    "DoRA": ({**kohya(LAYER, SHAPE), f"{LAYER}.dora_scale": (1, 640)}, None),
    "IA3": ({f"{LAYER}.weight": (640,), f"{LAYER}.on_input": ()}, None),
    "a full difference": ({f"{LAYER}.diff": SHAPE}, None),
    "OFT": ({f"{LAYER}.oft_diag": (8, 80, 80)}, None),
    # … but a layer that is not there is not there.
    "LoHa of other layers": ({"lora_unet_nowhere.hada_w1_a": (4, 640)}, (0, 1)),
    "no layers at all": ({"some.weight": (4, 640)}, None),
    "too many layers": ({f"lora_unet_x{number}.alpha": () for number in range(5_001)}, None),
}


@pytest.mark.parametrize(("tensors", "matched"), FORMS.values(), ids=FORMS)
def test_the_form_of_a_lora_decides_what_can_be_told(tensors: Shapes, matched: tuple[int, int] | None) -> None:
    assert matched_layers(header_of(tensors), CHECKPOINT) == matched


@pytest.mark.parametrize(
    "names",
    [
        ["unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"],
        ["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"],
        ["unet.mid_block.x.lora_B.weight", "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"],
    ],
)
def test_a_lora_in_diffusers_form_is_refused_whatever_the_checkpoint(names: list[str]) -> None:
    lora = header_of(dict.fromkeys(names, (4, 640)))

    with pytest.raises(ModelRejected, match=r"diffusers' names"):
        check_lora(lora)
    for checkpoint in (CHECKPOINT, header_of({"x": (1,)})):
        with pytest.raises(ModelRejected, match=r"diffusers' names") as refused:
            matched_layers(lora, checkpoint)
        assert refused.value.hint and "kohya" in refused.value.hint


def test_a_lora_of_both_forms_is_counted_by_what_acts() -> None:
    both = {**kohya(LAYER, SHAPE), "unet.down_blocks.0.x.lora_A.weight": (4, 640)}

    assert matched_layers(header_of(both), CHECKPOINT) == (1, 1)


@pytest.mark.parametrize(
    "tensors",
    [
        {"cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": (3072, 1024)},  # SD 2
        {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (9216, 3072)},  # FLUX
        {"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight": (640, 640)},  # a bare UNet of diffusers
        {**SDXL_CLIP, **{f"{UNET}x{number}.weight": (1, 1) for number in range(5_001)}},
    ],
)
def test_nothing_is_told_of_other_checkpoints(tensors: Shapes) -> None:
    assert matched_layers(header_of(kohya(LAYER, SHAPE)), header_of(tensors)) is None


def test_a_layer_table_is_small_and_plain() -> None:
    checkpoint = checkpoint_layers(
        {**{name: ("F16", shape) for name, shape in SDXL_CLIP.items()}, TENSOR: ("F16", SHAPE)}
    )
    lora = lora_layers({name: ("F16", shape) for name, shape in kohya(LAYER, SHAPE).items()})

    assert checkpoint == {"diffusion_model_input_blocks_4_1_transformer_blocks_0_attn1_to_q": 640 * 640}
    assert lora == {LAYER: 640 * 640}
    assert count_matches(lora, checkpoint) == (1, 1)


@pytest.mark.parametrize("number", ["0", "9" * 9, "9" * 5_000])
def test_any_number_in_a_name_is_only_another_name(number: str) -> None:
    names = (
        f"lora_unet_down_blocks_{number}_attentions_{number}_x",
        f"lora_unet_time_embedding_linear_{number}",
        f"lora_te2_text_model_encoder_layers_{number}_x",
    )

    assert count_matches(dict.fromkeys(names, 4), {"x": 4}) == (0, 3)

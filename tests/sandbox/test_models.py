"""The model files that the tests serve, read by the safetensors library itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from sandbox import models

MAKERS: list[tuple[Callable[..., Path], str, tuple[int, ...]]] = [
    # function, a tensor that shows the architecture, its shape
    (models.sdxl_checkpoint, "conditioner.embedders.1.model.ln_final.weight", (1280,)),
    (
        models.sdxl_checkpoint,
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
        (640, 2048),
    ),
    (models.sd15_checkpoint, "cond_stage_model.transformer.text_model.final_layer_norm.weight", (768,)),
    (
        models.sd15_checkpoint,
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        (320, 768),
    ),
    (models.sdxl_lora, "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight", (4, 2048)),
    (models.sdxl_lora, "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight", (768, 4)),
    (
        models.sd15_lora,
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight",
        (4, 768),
    ),
]


@pytest.mark.parametrize(("make", "tensor", "shape"), MAKERS)
@pytest.mark.parametrize("size", [None, 3_333_333])
def test_safetensors_itself_can_read_the_models(
    tmp_path: Path, make: Callable[..., Path], tensor: str, shape: tuple[int, ...], size: int | None
) -> None:
    path = make(tmp_path / "model.safetensors", 1, size)

    with safe_open(path, "np") as file:
        assert tuple(file.get_slice(tensor).get_shape()) == shape
        assert "modelspec.architecture" in file.metadata()
    assert size is None or path.stat().st_size == size


def test_a_seed_decides_every_byte_of_a_model(tmp_path: Path) -> None:
    one, same, other = (models.sdxl_lora(tmp_path / str(n) / "x.safetensors", seed) for n, seed in enumerate((1, 1, 2)))

    assert one.read_bytes() == same.read_bytes()
    assert models.tensor_hash(one) != models.tensor_hash(other)


def test_a_hash_in_the_metadata_is_the_tensors_own(tmp_path: Path) -> None:
    path = models.sdxl_lora(tmp_path / "x.safetensors", 1, 100_000, hashed=True, ss_output_name="other")

    with safe_open(path, "np") as file:
        assert file.metadata()["sshs_model_hash"] == models.tensor_hash(path)
        assert file.metadata()["ss_output_name"] == "other"


def test_a_size_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too few"):
        models.sdxl_lora(tmp_path / "x.safetensors", 1, 1000)

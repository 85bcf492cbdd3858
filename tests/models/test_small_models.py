"""What counts as an embedding and as a VAE, by the tensors of a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from a1111_worker.domain import ModelKind
from a1111_worker.errors import ModelRejected
from a1111_worker.models.safetensors import check_kind, family_of, read_header
from sandbox.models import (
    Tensors,
    sd15_embedding,
    sdxl_checkpoint,
    sdxl_embedding,
    sdxl_lora,
    vae,
    vae_names,
    write_safetensors,
)

EMBEDDINGS: list[tuple[Tensors, str | None]] = [
    ({"emb_params": ("F32", (8, 768))}, "sd1"),
    ({"any name": ("F16", (768,))}, "sd1"),  # one vector
    ({"emb_params": ("F32", (2, 1024))}, "sd2"),
    ({"clip_g": ("F32", (2, 1280)), "clip_l": ("F32", (2, 768))}, "sdxl"),
    ({"clip_g": ("F32", (2, 1280)), "clip_l": ("F32", (2, 768)), "more": ("F32", (1,))}, "sdxl"),
    ({"clip_g": ("F32", (2, 768)), "clip_l": ("F32", (2, 1280))}, None),
    ({"clip_g": ("F32", (2, 1280))}, None),  # A1111 would take it for one of 1280
    ({"emb_params": ("F32", (2, 2048))}, None),  # A1111 would take it for SDXL's, and fail when it is used
    ({"one": ("F32", (1, 768)), "two": ("F32", (1, 768))}, None),  # "multiple terms in it"
    ({"emb_params": ("F32", (1, 2, 768))}, None),
    ({"emb_params": ("F32", ())}, None),
]


@pytest.mark.parametrize(("tensors", "family"), EMBEDDINGS)
def test_an_embedding_is_known_by_its_width(tmp_path: Path, tensors: Tensors, family: str | None) -> None:
    header = read_header(write_safetensors(tmp_path / "x.safetensors", tensors))

    assert header.embedding_family == family
    if family is None:
        with pytest.raises(ModelRejected, match="no embedding"):
            check_kind(ModelKind.EMBEDDING, header)
    else:
        check_kind(ModelKind.EMBEDDING, header)
        assert family_of(header, kind=ModelKind.EMBEDDING) == family


@pytest.mark.parametrize(("channels", "family"), [(4, None), (16, "sd3")])
def test_a_vae_is_known_by_its_names_and_its_family_only_by_more_channels(
    tmp_path: Path, channels: int, family: str | None
) -> None:
    header = read_header(vae(tmp_path / "x.safetensors", channels=channels))

    check_kind(ModelKind.VAE, header)
    assert (header.vae_channels, family_of(header)) == (channels, family)
    assert family_of(header, "SDXL 1.0") == ("sdxl" if channels == 4 else "sd3")


@pytest.mark.parametrize("change", ["one is missing", "one more", "diffusers' form"])
def test_a_vae_that_a1111_could_not_load_is_rejected(tmp_path: Path, change: str) -> None:
    names: dict[str, tuple[str, Sequence[int]]] = dict.fromkeys(vae_names(), ("F16", (1,)))
    names["decoder.conv_in.weight"] = ("F16", (512, 4, 3, 3))
    if change == "one is missing":
        del names["decoder.norm_out.bias"]
    elif change == "one more":
        names["sandbox.more"] = ("F16", (1,))
    else:
        names = {"decoder.up_blocks.3.resnets.0.conv1.weight": ("F16", (1,)), "decoder.conv_in.weight": ("F16", (1,))}

    with pytest.raises(ModelRejected, match="no VAE"):
        check_kind(ModelKind.VAE, read_header(write_safetensors(tmp_path / "x.safetensors", names)))


def test_what_a1111_ignores_in_a_vae_does_no_harm(tmp_path: Path) -> None:
    names: dict[str, tuple[str, Sequence[int]]] = dict.fromkeys(vae_names(), ("F16", (1,)))
    names |= {"decoder.conv_in.weight": ("F16", (512, 4, 3, 3)), "loss.logvar": ("F16", (1,))}
    names |= {"model_ema.decay": ("F16", (1,))}

    check_kind(ModelKind.VAE, read_header(write_safetensors(tmp_path / "x.safetensors", names)))


@pytest.mark.parametrize("make", [sdxl_checkpoint, sdxl_lora, sd15_embedding, sdxl_embedding, vae])
def test_a_file_of_another_kind_is_no_embedding_and_no_vae(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    header = read_header(make(tmp_path / "x.safetensors"))

    kinds = [header.embedding_family is not None, header.vae_channels is not None]
    assert kinds == [make in (sd15_embedding, sdxl_embedding), make is vae]

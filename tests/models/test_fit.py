"""Whether a LoRA fits the checkpoint, as a job is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from a1111_worker.context import JobContext
from a1111_worker.domain import Model, ModelKind
from a1111_worker.errors import ModelRejected
from a1111_worker.models.fit import Fit
from sandbox.models import SDXL_LORA, Tensors, sd15_lora, sdxl_checkpoint, sdxl_lora, sha256_of, write_safetensors
from tests.fleet import Fleet, named, soon

TO_K = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
ELSEWHERE = {name.replace("blocks_4_1", "blocks_9_9").replace("te1", "te1_x"): t for name, t in SDXL_LORA.items()}
HALF = {name.replace("te1", "te1_x"): tensor for name, tensor in SDXL_LORA.items()}
OTHER_SHAPE: Tensors = {**SDXL_LORA, f"{TO_K}.lora_up.weight": ("F16", (320, 4))}
LOHA: Tensors = {f"{TO_K}.hada_w1_a": ("F16", (640, 4)), f"{TO_K}.hada_w1_b": ("F16", (4, 2048))}


def model(path: Path, kind: ModelKind = ModelKind.LORA, family: str | None = "sdxl") -> Model:
    return Model(kind, "Ink", path.name, path, sha256_of(path), path.stat().st_size, family=family)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Model:
    return model(sdxl_checkpoint(tmp_path / "checkpoint.safetensors", 1), ModelKind.CHECKPOINT)


# a LoRA's tensors, what is reported, and the warning
LORAS: list[tuple[Tensors, tuple[int, int] | None, str | None]] = [
    (SDXL_LORA, (2, 2), None),
    (ELSEWHERE, (0, 2), "Ink changes nothing: the checkpoint has none of its 2 layers in this form"),
    (HALF, (1, 2), "Ink acts only in part: the checkpoint has 1 of its 2 layers in this form"),
    (OTHER_SHAPE, (1, 2), "Ink acts only in part: the checkpoint has 1 of its 2 layers in this form"),
    (LOHA, None, None),  # it acts, and nothing tells how far
]


@pytest.mark.parametrize(("tensors", "matched", "warning"), LORAS)
def test_the_layers_that_a_lora_changes_are_counted(
    tmp_path: Path, checkpoint: Model, tensors: Tensors, matched: tuple[int, int] | None, warning: str | None
) -> None:
    lora = model(write_safetensors(tmp_path / "lora.safetensors", tensors))

    found = Fit().check(lora, checkpoint)

    assert (found.matched, found.warnings) == (matched, (warning,) if warning else ())


def test_a_lora_is_read_once_for_each_checkpoint(tmp_path: Path, checkpoint: Model) -> None:
    lora = model(sdxl_lora(tmp_path / "lora.safetensors"))
    fit = Fit()
    fit.check(lora, checkpoint)
    for read in (lora, checkpoint):
        read.path.unlink()

    assert fit.check(lora, checkpoint).matched == (2, 2)


def test_a_file_that_cannot_be_read_now_is_compared_the_next_time(tmp_path: Path, checkpoint: Model) -> None:
    lora = model(sdxl_lora(tmp_path / "lora.safetensors"))
    away = lora.path.rename(tmp_path / "away")
    fit = Fit()

    before = fit.check(lora, checkpoint)
    away.rename(lora.path)

    assert before.matched is None
    assert fit.check(lora, checkpoint).matched == (2, 2)


@pytest.mark.parametrize(
    ("make", "family"),
    [
        (sd15_lora, "sd1"),
        # a sidecar of an earlier version knows nothing of these names
        (lambda path: write_safetensors(path, {"unet.x.lora_A.weight": ("F16", (4, 8))}), "sdxl"),
    ],
)
def test_a_lora_that_cannot_act_is_refused(
    tmp_path: Path, checkpoint: Model, make: Callable[[Path], Path], family: str
) -> None:
    with pytest.raises(ModelRejected):
        Fit().check(model(make(tmp_path / "lora.safetensors"), family=family), checkpoint)


def test_a_job_holds_its_loras_with_the_layers_that_fit(fleet: Fleet) -> None:
    fleet.serve_checkpoint()
    fleet.put("half.safetensors", 1, lambda path, seed: write_safetensors(path, HALF, seed=seed))
    fleet.put("whole.safetensors", 2)
    worker = fleet.start()
    worker.prepare_checkpoint(JobContext(soon()))

    with worker.hold([named("half"), named("whole")], JobContext(soon())) as held:
        half, whole = held.models.values()

    assert (half.matched, whole.matched) == ((1, 2), (2, 2))
    assert any("acts only in part" in warning for warning in half.warnings)

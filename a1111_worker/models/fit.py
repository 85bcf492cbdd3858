"""Whether a model fits a checkpoint: by their families, and a LoRA by the names and shapes of its layers too."""

from __future__ import annotations

import logging
from dataclasses import replace

from a1111_worker.domain import Model, ModelKind
from a1111_worker.errors import ModelRejected
from a1111_worker.files import error_name
from a1111_worker.models.safetensors import Header, families_fit, matched_layers, read_header

log = logging.getLogger(__name__)

LOADABLE = ("sd1", "sd2", "sdxl", "sd3")
"""The families that A1111 1.10.1 has code for (modules/sd_models_config.py)."""


class Fit:
    """Checks LoRAs, embeddings and VAEs. Headers that were read are remembered by the files' content."""

    def __init__(self) -> None:
        self._checkpoints: dict[str, Header] = {}  # by SHA-256
        self._matched: dict[tuple[str, str], tuple[int, int] | None] = {}  # by the SHA-256 of LoRA and checkpoint

    def check(self, model: Model, checkpoint: Model) -> Model:
        """The model with a warning if its family is unknown; a LoRA also with the layers that it changes.

        Raises ModelRejected if it is made for another family, or is a LoRA of which A1111 applies nothing.
        """
        fits = families_fit(model.family, checkpoint.family)
        if fits is False:
            raise ModelRejected(
                f"{model.name} is made for {model.base_model or model.family}, "
                f"and the checkpoint is {checkpoint.base_model or checkpoint.family}",
                hint=f"use another {model.kind.label}, of the checkpoint's family",
            )
        matched = self._match(model, checkpoint) if model.kind is ModelKind.LORA else None
        warnings = model.warnings
        if fits is None:
            warnings = (*warnings, f"it is unknown whether {model.name} fits the checkpoint")
        if matched is not None and matched[0] < matched[1]:
            warnings = (*warnings, describe(model.name, *matched))
        return replace(model, matched=matched, warnings=warnings)

    def check_loadable(self, checkpoint: Model) -> None:
        """Raise ModelRejected if A1111 cannot load a checkpoint as a whole.

        Another family can break it for good. If a part is missing, it goes on with that of the checkpoint before, under
        the new one's name (1.9.3 and 1.10.1: `load_state_dict(strict=False)`).
        """
        if checkpoint.family not in (None, *LOADABLE):
            family = checkpoint.base_model or checkpoint.family
            raise ModelRejected(f"A1111 cannot load {checkpoint.name}: it is {family}")
        try:
            missing = self._header(checkpoint).missing_parts
        except OSError as error:
            log.warning("the parts of %s cannot be checked (%s)", checkpoint.file, error_name(error))
            return
        if missing:
            raise ModelRejected(f"{checkpoint.name} is no whole checkpoint: it has no {' and no '.join(missing)}")

    def _header(self, checkpoint: Model) -> Header:
        if checkpoint.sha256 not in self._checkpoints:
            self._checkpoints[checkpoint.sha256] = read_header(checkpoint.path)
        return self._checkpoints[checkpoint.sha256]

    def _match(self, lora: Model, checkpoint: Model) -> tuple[int, int] | None:
        """How many of the LoRA's layers fit, of how many. None if that is unknown, or a file cannot be read now."""
        key = lora.sha256, checkpoint.sha256
        if key not in self._matched:
            try:
                of_checkpoint = self._header(checkpoint)
                header = read_header(lora.path)
            except OSError as error:
                log.warning("the layers of %s cannot be compared (%s)", lora.file, error_name(error))
                return None
            self._matched[key] = matched_layers(header, of_checkpoint)
        return self._matched[key]


def describe(name: str, matched: int, total: int) -> str:
    """The sentence for the caller about a LoRA of which not all layers fit the checkpoint."""
    if not matched:
        return f"{name} changes nothing: the checkpoint has none of its {total} layers in this form"
    return f"{name} acts only in part: the checkpoint has {matched} of its {total} layers in this form"

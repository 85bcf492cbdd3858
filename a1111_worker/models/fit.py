"""Whether a model fits a checkpoint: by their families, and a LoRA by the names and shapes of its layers too."""

from __future__ import annotations

import logging
from dataclasses import replace

from a1111_worker.domain import Model, ModelKind
from a1111_worker.errors import ModelRejected
from a1111_worker.files import error_name
from a1111_worker.models.safetensors import Header, families_fit, matched_layers, read_header

log = logging.getLogger(__name__)


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

    def _match(self, lora: Model, checkpoint: Model) -> tuple[int, int] | None:
        """How many of the LoRA's layers fit, of how many. None if that is unknown, or a file cannot be read now."""
        key = lora.sha256, checkpoint.sha256
        if key not in self._matched:
            try:
                if checkpoint.sha256 not in self._checkpoints:
                    self._checkpoints[checkpoint.sha256] = read_header(checkpoint.path)
                header = read_header(lora.path)
            except OSError as error:
                log.warning("the layers of %s cannot be compared (%s)", lora.file, error_name(error))
                return None
            self._matched[key] = matched_layers(header, self._checkpoints[checkpoint.sha256])
        return self._matched[key]


def describe(name: str, matched: int, total: int) -> str:
    """The sentence for the caller about a LoRA of which not all layers fit the checkpoint."""
    if not matched:
        return f"{name} changes nothing: the checkpoint has none of its {total} layers in this form"
    return f"{name} acts only in part: the checkpoint has {matched} of its {total} layers in this form"

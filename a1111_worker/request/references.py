"""The type of a field that holds a reference to a model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from a1111_worker.domain import ModelKind, ModelRef
from a1111_worker.models.references import BadReference, parse_reference
from a1111_worker.request.fields import LORA_KEYS
from a1111_worker.request.unknown import unknown_lora_key
from a1111_worker.request.values import InvalidValue, ValueType, as_integer, mismatch, shown


def model_reference(kind: ModelKind, model_hosts: Collection[str]) -> ValueType:
    """A reference to a model, as an entry of a job's `loras` is one. Its `scale` means nothing here."""
    expected = "text or an object"

    def check(value: Any) -> ModelRef:
        if (version_id := as_integer(value)) is not None:
            value = {"version_id": version_id}
        if not isinstance(value, (str, dict)):
            raise mismatch(expected, value)
        if isinstance(value, dict):
            unknown = [(f".{shown(key)}", unknown_lora_key(key, LORA_KEYS)) for key in value if key not in LORA_KEYS]
            if unknown:
                raise InvalidValue(*unknown)
        try:
            return parse_reference(value, kind=kind, allowed_hosts=model_hosts)
        except BadReference as error:
            raise InvalidValue(*((f".{key}" if key else "", message) for key, message in error.problems)) from error

    return ValueType("any", expected, check)

"""Jobs as their callers write them, and what the parser makes of them."""

from __future__ import annotations

from typing import Any

import pytest

from a1111_worker.domain import GenerationRequest, ModelKind, ModelRef
from a1111_worker.errors import Complaint, InvalidRequest
from a1111_worker.request.fields import Limits
from a1111_worker.request.parse import parse_request
from tests.support import parse_generation

LIMITS = Limits(model_hosts=("https://cdn.example.com",))
URL = "https://civitai.com/api/download/models/135867?type=Model&format=SafeTensor"


def parse(**job: Any) -> GenerationRequest:
    """A job with a prompt and these fields."""
    return parse_generation({"prompt": "a lighthouse", **job}, LIMITS)


def complaints(job: object, limits: Limits = LIMITS) -> tuple[Complaint, ...]:
    with pytest.raises(InvalidRequest) as caught:
        parse_request(job, limits)
    return caught.value.complaints


def lora(**ref: Any) -> ModelRef:
    return ModelRef(kind=ModelKind.LORA, **ref)

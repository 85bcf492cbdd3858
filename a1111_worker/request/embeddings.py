"""The embeddings and the VAE that a job asks for, as its fields name them, and the words of embeddings in its texts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from a1111_worker.domain import EmbeddingRequest, GenerationRequest, ModelKind, ModelRef
from a1111_worker.errors import Complaint
from a1111_worker.models.references import BadReference, parse_reference
from a1111_worker.request.fields import LORA_KEYS, MAX_EMBEDDINGS
from a1111_worker.request.unknown import unknown_lora_key
from a1111_worker.request.values import describe_value, shown

PROMPT_FIELDS = ("prompt", "negative_prompt", "hr_prompt", "hr_negative_prompt")


def parse_embeddings(
    items: Sequence[Any], model_hosts: Collection[str]
) -> tuple[tuple[EmbeddingRequest, ...], list[Complaint]]:
    """Parse the field `embeddings`: references as in `loras`, without a scale."""
    if len(items) > MAX_EMBEDDINGS:
        message = f"must be at most {MAX_EMBEDDINGS} embeddings, not {len(items)}"
        return (), [Complaint("embeddings", message)]
    requests: list[EmbeddingRequest] = []
    complaints: list[Complaint] = []
    for index, item in enumerate(items):
        path = f"embeddings[{index}]"
        ref, problems = parse_model(path, item, ModelKind.EMBEDDING, model_hosts)
        complaints += problems
        same = next((earlier for earlier in requests if ref is not None and earlier.ref == ref), None)
        if same is not None:
            complaints.append(Complaint(path, f"is the same embedding as {same.path}"))
        if ref is not None:
            requests.append(EmbeddingRequest(ref, path))
    return tuple(requests), complaints


def parse_model(
    path: str, value: Any, kind: ModelKind, model_hosts: Collection[str]
) -> tuple[ModelRef | None, list[Complaint]]:
    """The model that a field names, None if it names none, and what is wrong with it."""
    if not isinstance(value, (str, Mapping)):
        return None, [Complaint(path, f"must be text or an object, not {describe_value(value)}")]
    unknown = [key for key in value if key not in LORA_KEYS] if isinstance(value, Mapping) else []
    if unknown:
        return None, [Complaint(f"{path}.{shown(key)}", unknown_lora_key(key, LORA_KEYS)) for key in unknown[:8]]
    try:
        return parse_reference(value, kind=kind, allowed_hosts=model_hosts), []
    except BadReference as error:
        return None, [Complaint(f"{path}.{key}" if key else path, message) for key, message in error.problems]


def texts_of(request: GenerationRequest) -> Iterator[str]:
    """Every text of a job that may become a prompt: its prompts, and all texts in its script's arguments."""
    yield from (str(request.body[field]) for field in PROMPT_FIELDS if request.body.get(field))
    yield from texts_in(request.body.get("script_args"))


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a list, and in the lists in it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from texts_in(item)

"""The tables of the tasks that generate nothing: each takes its name alone, or a few fields."""

from __future__ import annotations

from collections.abc import Mapping

from a1111_worker.domain import ModelKind, PictureSource, PngInfoRequest, PrefetchRequest
from a1111_worker.request.fields import TASK, Field, FieldClass, Limits
from a1111_worker.request.picture_fields import picture
from a1111_worker.request.reader import InputReader
from a1111_worker.request.references import model_reference
from a1111_worker.request.values import list_of

MAX_PREFETCH = 64  # models of one kind in one job

PREFETCHED: Mapping[str, ModelKind] = {
    kind.plural: kind
    for kind in (
        ModelKind.LORA,
        ModelKind.EMBEDDING,
        ModelKind.VAE,
        ModelKind.CHECKPOINT,
        ModelKind.CONTROLNET,
    )
}
"""What a `prefetch` job may list, under the names that a generating job has for it."""


def no_fields(_limits: Limits) -> Mapping[str, Field]:
    """The table of a task that takes nothing but its name."""
    return {"task": TASK}


def png_info_fields(limits: Limits) -> Mapping[str, Field]:
    """The table of png_info: a picture."""
    return {"task": TASK, "image": Field(FieldClass.OURS, picture(limits), is_required=True)}


def read_png_info(reader: InputReader) -> PngInfoRequest:
    """The picture of a png_info job. Without a valid one there is a complaint already."""
    return PngInfoRequest(reader.given.get("image", PictureSource()))


def prefetch_fields(limits: Limits) -> Mapping[str, Field]:
    """The table of prefetch: a list of references for each kind of model."""
    return {
        "task": TASK,
        **{
            name: Field(
                FieldClass.OURS,
                list_of(model_reference(kind, limits.model_hosts), MAX_PREFETCH, name),
                is_webui_field=False,
            )
            for name, kind in PREFETCHED.items()
        },
    }


def read_prefetch(reader: InputReader) -> PrefetchRequest:
    """The models that a prefetch job asks for, each once."""
    refs = {name: tuple(dict.fromkeys(reader.given[name])) for name in PREFETCHED if reader.given.get(name)}
    if not refs and not reader.complaints:
        reader.complain("input", f"names no model: give {' or '.join(PREFETCHED)}")
    return PrefetchRequest(refs)

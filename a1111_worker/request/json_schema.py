"""The JSON Schema of each task's input and of the answers: `python handler.py --schema`, docs/schema.json.

The inputs are made from the tables. Whatever the worker takes is valid, but not the other way round: a table also
checks what depends on other fields, on the WebUI and on the operator's settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from a1111_worker.domain import OWN_CHECKPOINT, Stage, Task
from a1111_worker.request.fields import DEFAULT_LIMITS, Field, FieldClass
from a1111_worker.request.generating import DEFAULTS
from a1111_worker.request.parse import FORMS
from a1111_worker.request.values import ValueType

Schema = dict[str, Any]

# Of an operator who allows what some do not.
_LIMITS = replace(DEFAULT_LIMITS, checkpoints=(("any", OWN_CHECKPOINT),), max_checkpoint_bytes=1)

_JSON_TYPES = ("array", "boolean", "integer", "number", "object", "string")
_TEXT, _WHOLE, _NUMBER, _FLAG = ({"type": name} for name in ("string", "integer", "number", "boolean"))


def job_schema() -> Schema:
    """What a job may be, by its task. The schemas of inputs and answers are under `$defs`, for use on their own."""
    inputs = {task.value: _input_schema(task) for task in Task}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A job of a1111-worker",
        "type": "object",
        "required": ["input"],
        "properties": {"input": {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in inputs]}},
        "$defs": {**inputs, **ANSWERS},
    }


def _input_schema(task: Task) -> Schema:
    fields = FORMS[task].fields(_LIMITS)
    required = [name for name, field in fields.items() if field.is_required]
    is_default = task is Task.TXT2IMG
    return {
        "type": "object",
        "required": required if is_default else ["task", *required],
        "properties": {
            **{name: _field_schema(name, field) for name, field in fields.items()},
            "task": {"enum": [task.value, None]} if is_default else {"const": task.value},
        },
        "additionalProperties": {"type": "null"},  # null means absent, whatever it is called
    }


def _field_schema(name: str, field: Field) -> Schema:
    if field.kind is FieldClass.REFUSED:
        schema: Schema = {"description": f"refused: {field.reason}"}
        return schema if field.only_with else {**schema, "enum": [*field.ignored_values, None]}
    schema = {"description": f"dropped: {field.reason}" if field.reason else field.value.expected}
    if name in DEFAULTS:
        schema["default"] = DEFAULTS[name]
    allowed = value_schema(field.value)
    if field.is_required or not allowed:
        return {**schema, **allowed}
    return {**schema, "anyOf": [allowed, {"type": "null"}]}


def value_schema(value: ValueType) -> Schema:
    """What a value may be. {} is anything."""
    return dict(value.schema) or ({"type": value.type} if value.type in _JSON_TYPES else {})


# -- the answers ------------------------------------------------------------------------------------------------------


def _object(**members: Schema) -> Schema:
    return {"type": "object", "required": list(members), "properties": members}


def _list(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _map(value: Schema) -> Schema:
    return {"type": "object", "additionalProperties": value}


_SHA256 = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_FINGERPRINT = {"type": "string", "pattern": "^[0-9a-f]{16}$"}
_VERSIONS = _object(worker=_TEXT, webui=_or_null(_TEXT))
_MODEL = _object(name=_TEXT, file=_TEXT, sha256=_SHA256)
_LORA = _object(
    name=_TEXT,
    file=_or_null(_TEXT),
    tag=_or_null(_TEXT),
    version_id=_or_null(_WHOLE),
    scale=_NUMBER,
    sha256=_or_null(_SHA256),
    loaded=_FLAG,
    pictures=_WHOLE,
    trigger_words=_list(_TEXT),
    downloaded=_FLAG,
)
_USED = _object(name=_TEXT, file=_TEXT, version_id=_or_null(_WHOLE), sha256=_SHA256, downloaded=_FLAG)
_EMBEDDING = _object(**_USED["properties"], word=_TEXT, loaded=_FLAG)
_DELIVERY = _object(
    mode={"enum": ["inline", "bucket"]},
    format={"enum": ["png", "jpeg", "webp"]},
    urls=_list(_TEXT),
    expires_at=_or_null(_TEXT),
)
_DELIVERED = {
    "seeds": _list(_or_null(_WHOLE)),
    "pictures": _list(_object(width=_WHOLE, height=_WHOLE, seed=_or_null(_WHOLE), steps=_or_null(_WHOLE))),
    "warnings": _list(_TEXT),
    "delivery": _DELIVERY,
    "timings": _object(**dict.fromkeys((*(stage.value for stage in Stage), "total"), _NUMBER)),
    "versions": _VERSIONS,
    "lists": _FINGERPRINT,
}
_WORKER = _object(
    checkpoint=_MODEL,
    refiner=_or_null(_MODEL),
    hires_checkpoint=_or_null(_MODEL),
    loras=_list(_LORA),
    embeddings=_list(_EMBEDDING),
    vae=_or_null(_USED),
    **_DELIVERED,
)
_QUERY_WORKER = _object(warnings=_list(_TEXT), timings=_object(total=_NUMBER), versions=_VERSIONS)
_CACHED = _object(
    name=_TEXT,
    file=_TEXT,
    size=_WHOLE,
    sha256=_or_null(_SHA256),
    family=_or_null(_TEXT),
    base_model=_or_null(_TEXT),
    version_id=_or_null(_WHOLE),
)
_MENUS = _object(
    fingerprint=_FINGERPRINT,
    versions=_VERSIONS,
    tasks=_list({"enum": [task.value for task in Task]}),
    checkpoints=_list(
        _object(
            name=_TEXT,
            file=_or_null(_TEXT),
            title=_or_null(_TEXT),
            sha256=_or_null(_SHA256),
            family=_or_null(_TEXT),
            default=_FLAG,
            loaded=_FLAG,
            cached=_FLAG,
        )
    ),
    cached=_map(_list(_CACHED)),
    catalog=_list(_object(name=_TEXT, version_id=_WHOLE, scale=_NUMBER, file=_TEXT)),
    webui=_map({"type": ["array", "object"]}),
    options=_map({"type": ["boolean", "number", "string"]}),
    limits=_map(_WHOLE),
)
_PREFETCHED = _object(name=_TEXT, file=_TEXT, tag=_TEXT, size=_WHOLE, seconds=_NUMBER, downloaded=_FLAG, sha256=_SHA256)
_HEALTH = _object(
    state=_TEXT,
    versions=_VERSIONS,
    gpu=_or_null(_object(name=_TEXT, memory_total=_WHOLE, memory_free=_WHOLE)),
    disk=_or_null(_object(free=_WHOLE)),
    cache=_or_null(_map(_or_null(_WHOLE))),
    uptime_s=_NUMBER,
    jobs=_map(_WHOLE),
    checkpoint_proven=_FLAG,
)

ANSWERS: Mapping[str, Schema] = {
    "generation_answer": _object(images=_list(_TEXT), parameters={"type": "object"}, info=_TEXT, worker=_WORKER),
    "upscale_answer": _object(images=_list(_TEXT), html_info=_TEXT, worker=_object(**_DELIVERED)),
    "png_info_answer": _object(
        info=_TEXT, items=_map(_TEXT), parameters=_map({"type": ["boolean", "number", "string"]}), worker=_QUERY_WORKER
    ),
    "models_answer": _object(models=_MENUS, worker=_QUERY_WORKER),
    "prefetch_answer": _object(
        prefetch=_map(_list({"anyOf": [_PREFETCHED, _object(name=_TEXT, code=_TEXT, message=_TEXT)]})),
        worker=_QUERY_WORKER,
    ),
    "health_answer": _object(health=_HEALTH, worker=_QUERY_WORKER),
    "error_answer": _object(error=_TEXT, code=_TEXT, message=_TEXT, retryable=_FLAG),
}
"""The answers. `generation_answer` is that of every task that generates pictures, without `output.raw`."""

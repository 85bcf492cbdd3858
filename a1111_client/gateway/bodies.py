"""Bodies of requests, read as A1111's own pydantic 1 reads them: "25" and 25.9 are the integer 25, 1 is true, and an
unknown field is dropped without a word. `fields.json` has the fields of A1111 1.10.1, from its OpenAPI document.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from typing import Any

from a1111_client.gateway.errors import InvalidFields

Place = tuple[str | int, ...]
Problem = tuple[Place, str, str]


@cache
def fields(path: str) -> Mapping[str, Mapping[str, Any]]:
    """The fields of an endpoint's body by their names: type, items, default, required, nullable.

    `items` is the type of a list's entries; for objects it is the table of their fields.
    """
    tables: dict[str, Any] = json.loads(
        resources.files(__package__).joinpath("fields.json").read_text(encoding="utf-8")
    )
    found: Mapping[str, Mapping[str, Any]] = tables[path]
    return found


def parse_json(body: bytes, content_type: str) -> Any:
    """The JSON of a body. Raises InvalidFields as FastAPI does."""
    if not body:
        raise InvalidFields([(("body",), "field required", "value_error.missing")])
    kind = content_type.partition(";")[0].strip().lower()
    if kind and kind != "application/json" and not kind.endswith("+json"):
        raise InvalidFields([(("body",), "value is not a valid dict", "type_error.dict")])
    try:
        return json.loads(body)
    except RecursionError:
        raise InvalidFields([(("body",), "nested too deeply", "value_error.jsondecode")]) from None
    except json.JSONDecodeError as error:
        raise InvalidFields([(("body", error.pos), str(error), "value_error.jsondecode")]) from None
    except ValueError as error:  # not UTF-8, or a number of thousands of digits
        raise InvalidFields([(("body", 0), str(error)[:200], "value_error.jsondecode")]) from None


def read(path: str, body: Any) -> dict[str, Any]:
    """The fields of a body that were given, each in its type. Raises InvalidFields with all problems at once."""
    problems: list[Problem] = []
    given = _read(fields(path), body, ("body",), problems)
    if problems:
        raise InvalidFields(problems)
    return given


def with_defaults(path: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every field, as A1111's `parameters` echoes them: what was given, else A1111's default."""
    return {name: given.get(name, field.get("default")) for name, field in fields(path).items()}


def _read(table: Mapping[str, Any], value: Any, where: Place, problems: list[Problem]) -> dict[str, Any]:
    """The fields of an object that were given. What is wrong is added to the problems."""
    if not isinstance(value, dict):
        problems.append((where, "value is not a valid dict", "type_error.dict"))
        return {}
    given: dict[str, Any] = {}
    for name, field in table.items():
        if name in value:
            given[name] = _convert(value[name], field, (*where, name), problems)
        elif field.get("required"):
            problems.append(((*where, name), "field required", "value_error.missing"))
    return given


def _convert(value: Any, field: Mapping[str, Any], where: Place, problems: list[Problem]) -> Any:
    """A value in the type of its field."""
    if value is None:
        if not field.get("nullable"):
            problems.append((where, "none is not an allowed value", "type_error.none.not_allowed"))
        return None
    try:
        converted = _CONVERTERS[field["type"]](value)
    except _Mismatch as mismatch:
        problems.append((where, mismatch.message, mismatch.kind))
        return None
    items = field.get("items")
    if isinstance(items, dict):
        return [_read(items, item, (*where, number), problems) for number, item in enumerate(converted)]
    if items:
        return [_convert(item, {"type": items}, (*where, number), problems) for number, item in enumerate(converted)]
    return converted


class _Mismatch(Exception):
    def __init__(self, message: str, kind: str) -> None:
        self.message = message
        self.kind = kind


def _integer(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise _Mismatch("value is not a valid integer", "type_error.integer") from None


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise _Mismatch("value is not a valid float", "type_error.float") from None
    if not math.isfinite(number):  # A1111 draws, and fails to answer: JSON has no such number
        raise _Mismatch("value is not a valid float", "type_error.float")
    return number


def _boolean(value: Any) -> bool:
    key = value.lower() if isinstance(value, str) else value
    if isinstance(key, (str, int, float)):
        if key in (1, "1", "on", "t", "true", "y", "yes"):
            return True
        if key in (0, "0", "off", "f", "false", "n", "no"):
            return False
    raise _Mismatch("value could not be parsed to a boolean", "type_error.bool")


def _text(value: Any) -> str:
    if isinstance(value, (str, int, float)):
        return str(value)
    raise _Mismatch("str type expected", "type_error.str")


def _list(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    raise _Mismatch("value is not a valid list", "type_error.list")


def _object(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise _Mismatch("value is not a valid dict", "type_error.dict")


_CONVERTERS: Mapping[str, Callable[[Any], Any]] = {
    "int": _integer,
    "float": _number,
    "bool": _boolean,
    "str": _text,
    "list": _list,
    "dict": _object,
}

"""Reads a request's body as FastAPI 0.94 and pydantic 1 do: the same coercions, the same refusals, the same texts."""

from __future__ import annotations

import email.message
import json
from collections.abc import Callable, Mapping
from typing import Any

from sandbox.webui_errors import InvalidFields

# The fields of txt2img that A1111 itself declares, and does not declare optional.
_NEVER_NULL = frozenset({"sampler_index", "script_args", "send_images", "save_images", "alwayson_scripts"})

_TRUE = {1, "1", "on", "t", "true", "y", "yes"}
_FALSE = {0, "0", "off", "f", "false", "n", "no"}


class _InvalidValue(Exception):
    """Message and type of pydantic's error for one value, and the path to it inside the field."""

    def __init__(self, message: str, kind: str, *inside: int | str) -> None:
        super().__init__(message)
        self.message, self.kind, self.inside = message, kind, inside


def json_object(body: bytes, content_type: str | None) -> dict[str, Any]:
    """The JSON object in the body of a POST; InvalidFields if the body is anything else."""
    if not body:
        raise InvalidFields([{"loc": ["body"], "msg": "field required", "type": "value_error.missing"}])
    value: Any = body
    if _is_json(content_type):
        try:
            value = json.loads(body)
        except json.JSONDecodeError as error:
            raise InvalidFields([_malformed(error)]) from None
        except UnicodeDecodeError:
            raise InvalidFields(
                [{"loc": ["body"], "msg": "There was an error parsing the body", "type": "json"}]
            ) from None
        if value is None:
            raise InvalidFields([{"loc": ["body"], "msg": "field required", "type": "value_error.missing"}])
    try:
        return _dict(value) if not isinstance(value, bytes) else _dict(None)
    except _InvalidValue as error:
        raise InvalidFields([_problem(["body"], error)]) from None


def read_fields(given: Mapping[str, Any], fields: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Every field with its coerced value or its default. Unknown fields are ignored."""
    values, problems = {}, []
    for name, about in fields.items():
        if name not in given:
            values[name] = about["default"]  # unchanged: pydantic does not coerce defaults (0 stays 0, not 0.0)
            continue
        try:
            values[name] = _read(name, about, given[name])
        except _InvalidValue as error:
            problems.append(_problem(["body", name], error))
    if problems:
        raise InvalidFields(problems)
    return values


def read_query_bool(query: Mapping[str, str], name: str) -> bool:
    try:
        return _bool(query.get(name, "false"))
    except _InvalidValue as error:
        raise InvalidFields([_problem(["query", name], error)]) from None


def as_option(default: Any, value: Any) -> Any:
    """An option as GET /options shows it: in its default's type, numbers as floats. ValueError has pydantic's text."""
    if not default or value is None or isinstance(default, (list, dict)):
        return value
    read = _bool if isinstance(default, bool) else _float if isinstance(default, (int, float)) else _str
    try:
        return read(value)
    except _InvalidValue as error:
        raise ValueError(f"{error.message} (type={error.kind})") from None


def _is_json(content_type: str | None) -> bool:
    if not content_type:
        return True
    message = email.message.Message()
    message["content-type"] = content_type
    subtype = message.get_content_subtype()
    return message.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))


def _malformed(error: json.JSONDecodeError) -> dict[str, Any]:
    about = {"msg": error.msg, "doc": error.doc, "pos": error.pos, "lineno": error.lineno, "colno": error.colno}
    return {"loc": ["body", error.pos], "msg": str(error), "type": "value_error.jsondecode", "ctx": about}


def _problem(location: list[str], error: _InvalidValue) -> dict[str, Any]:
    return {"loc": [*location, *error.inside], "msg": error.message, "type": error.kind}


def _read(name: str, about: Mapping[str, Any], value: Any) -> Any:
    if value is not None:
        return _READERS[about["type"]](value)
    if name in _NEVER_NULL or about.get("never_null"):
        raise _InvalidValue("none is not an allowed value", "type_error.none.not_allowed")
    return None


def _int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise _InvalidValue("value is not a valid integer", "type_error.integer") from None


def _float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise _InvalidValue("value is not a valid float", "type_error.float") from None


def _str(value: Any) -> str:
    if isinstance(value, (str, int, float)):
        return str(value)
    raise _InvalidValue("str type expected", "type_error.str")


def _bool(value: Any) -> bool:
    word = value.lower() if isinstance(value, str) else value
    if isinstance(word, (str, int, float)):
        if word in _TRUE:
            return True
        if word in _FALSE:
            return False
    raise _InvalidValue("value could not be parsed to a boolean", "type_error.bool")


def _dict(value: Any) -> dict[str, Any]:
    try:
        return dict(value)
    except (TypeError, ValueError):
        raise _InvalidValue("value is not a valid dict", "type_error.dict") from None


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _InvalidValue("value is not a valid list", "type_error.list")
    return value


def _list_of_str(value: Any) -> list[str]:
    words = []
    for index, word in enumerate(_list(value)):
        if not isinstance(word, (str, int, float)):
            raise _InvalidValue("str type expected", "type_error.str", index)
        words.append(str(word))
    return words


_READERS: Mapping[str, Callable[[Any], Any]] = {
    "int": _int,
    "float": _float,
    "str": _str,
    "bool": _bool,
    "dict": _dict,
    "list": _list,
    "list[str]": _list_of_str,
}

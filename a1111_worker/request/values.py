"""What a JSON value may be, described in words that a caller understands. Knows nothing of what the values are for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from a1111_worker.text import printable

MAX_DEPTH = 32
MAX_INTEGER = 2**63
MAX_PROBLEMS = 100

Problem = tuple[str, str]
"""A path below the value (`[3].args`, "" for the value itself) and a message."""


NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,18})(\.[0-9]{1,18})?([eE][+-]?[0-9]{1,3})?", re.ASCII)
"""A number as JSON writes it, and nothing around it."""


class InvalidValue(Exception):
    """A value that cannot be used."""

    def __init__(self, *problems: str | Problem) -> None:
        super().__init__(problems)
        self.problems = tuple(("", problem) if isinstance(problem, str) else problem for problem in problems)


@dataclass(frozen=True)
class ValueType:
    """What values a field takes.

    `type` is the JSON type, `expected` says in words what is accepted ("a whole number from 1 to 150"). `check`
    returns the value to go on with, or raises InvalidValue. `schema` is a JSON Schema that everything accepted is valid
    against; empty if the type says it all.
    """

    type: str
    expected: str
    check: Callable[[Any], Any]
    schema: Mapping[str, Any] = field(default_factory=dict)


def integer(low: int, high: int) -> ValueType:
    expected = f"a whole number from {low} to {high}"

    def check(value: object) -> int:
        whole = as_integer(as_number(value))
        if whole is None or not low <= whole <= high:
            raise mismatch(expected, value)
        return whole

    return ValueType("integer", expected, check, _or_text({"type": "integer", "minimum": low, "maximum": high}))


def multiple_of_8(low: int, high: int, *, or_else: tuple[int, ...] = ()) -> ValueType:
    expected = "".join(f"{other}, or " for other in or_else) + f"a multiple of 8 from {low} to {high}"

    def check(value: object) -> int:
        whole = as_integer(as_number(value))
        if whole is None or (whole not in or_else and (whole % 8 or not low <= whole <= high)):
            raise mismatch(expected, value)
        return whole

    multiple = {"type": "integer", "multipleOf": 8, "minimum": low, "maximum": high}
    return ValueType("integer", expected, check, _or_text(multiple, *or_else))


def number(low: float, high: float, *, or_else: tuple[float, ...] = ()) -> ValueType:
    expected = "".join(f"{other:g}, or " for other in or_else) + f"a number from {low:g} to {high:g}"

    def check(value: object) -> float:
        found = as_number(value)
        if found is None or not (low <= found <= high or found in or_else):
            raise mismatch(expected, value)
        return found

    schema = {"type": "number", "minimum": low, "maximum": high}
    return ValueType("number", expected, check, _or_text(schema, *or_else))


def _or_text(schema: Mapping[str, Any], *or_else: float) -> dict[str, Any]:
    """The schema of a number that may also be one of `or_else`, or a number in a string."""
    others = [{"enum": list(or_else)}] if or_else else []
    return {"anyOf": [schema, *others, {"type": "string", "pattern": f"^(?:{NUMBER.pattern})$"}]}


def text(longest: int, *, blank: bool = False) -> ValueType:
    expected = f"text of at most {longest:,} bytes{'' if blank else ', not blank'}"

    def check(value: object) -> str:
        if not isinstance(value, str):
            raise mismatch("text", value)
        if not blank and not value.strip():
            raise InvalidValue("must not be blank")
        size = len(value) if value.isascii() else len(value.encode())
        if size > longest:
            raise InvalidValue(f"must be at most {longest:,} bytes of UTF-8, not {size:,}")
        return value

    # In characters: none takes less than a byte.
    schema = {"type": "string", "maxLength": longest, **({} if blank else {"pattern": r"\S"})}
    return ValueType("string", expected, check, schema)


def boolean() -> ValueType:
    """true or false. Some of A1111's clients send 1 and 0 for them."""

    def check(value: object) -> bool:
        if not isinstance(value, (bool, int)) or value not in (0, 1):
            raise mismatch("true or false", value)
        return bool(value)

    return ValueType("boolean", "true or false", check, {"enum": [True, False, 1, 0]})


def always_true(reason: str) -> ValueType:
    """true alone. `reason` is why false is refused."""

    def check(value: object) -> bool:
        if not boolean().check(value):
            raise InvalidValue(f"is refused: {reason}")
        return True

    return ValueType("boolean", "true", check, {"enum": [True, 1]})


def anything() -> ValueType:
    """Any JSON value, for what nobody reads."""
    return ValueType("any", "anything", lambda value: value)


def one_of(*choices: str) -> ValueType:
    expected = f"one of {', '.join(choices)}"

    def check(value: object) -> str:
        if not isinstance(value, str) or value not in choices:
            raise InvalidValue(f"must be {expected}")
        return value

    return ValueType("string", expected, check, {"enum": list(choices)})


def any_object() -> ValueType:
    return object_of(lambda key, value: value, "an object")


def any_list() -> ValueType:
    def check(value: object) -> list[Any]:
        if not isinstance(value, (list, tuple)):
            raise mismatch("a list", value)
        return list(value)

    return ValueType("array", "a list", check)


def text_or_object(expected: str) -> ValueType:
    def check(value: object) -> Any:
        if not isinstance(value, (str, dict)):
            raise mismatch(expected, value)
        return value

    return ValueType("any", expected, check, {"type": ["string", "object"]})


def list_of(item_type: ValueType, most: int, plural: str) -> ValueType:
    """A list of at most `most` items. `plural` is what the items are called."""
    expected = f"a list of at most {most} {plural}"

    def check(value: object) -> list[Any]:
        if not isinstance(value, (list, tuple)) or len(value) > most:
            raise mismatch(expected, value)
        return _check_all(((f"[{index}]", item) for index, item in enumerate(value)), item_type.check)

    schema = {"type": "array", "maxItems": most}
    if item_type.schema:
        schema["items"] = dict(item_type.schema)
    return ValueType("array", expected, check, schema)


def object_of(check_member: Callable[[str, Any], Any], expected: str) -> ValueType:
    """An object whose members are each checked by `check_member(key, value)`."""

    def check(value: object) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise mismatch(expected, value)
        members = ((f".{shown(key)}", (key, member)) for key, member in value.items())
        return dict(zip(value, _check_all(members, lambda member: check_member(*member)), strict=True))

    return ValueType("object", expected, check)


def as_number(value: object) -> int | float | None:
    """The number that a JSON value is: also one in a string, as some clients send it. None for all else, true too."""
    if isinstance(value, str) and (match := NUMBER.fullmatch(value)):
        return int(value) if match[2] is match[3] is None else float(value)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def as_integer(value: object) -> int | None:
    """The whole number that a JSON number is: 25 and 25.0 are the same. None for all else, also for true and "25"."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    return int(value) if isinstance(value, float) and value.is_integer() else None


def mismatch(expected: str, value: object) -> InvalidValue:
    """The error about a value that is not what is expected."""
    return InvalidValue(f"must be {expected}, not {describe_value(value)}")


def describe_value(value: object) -> str:
    """What a caller wrote, in JSON's words: a number as it is, everything else by its type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value) if abs(value) < MAX_INTEGER else "a huge number"
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, str):
        return value if NUMBER.fullmatch(value) else "text"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    return "an object" if isinstance(value, dict) else "something that is not JSON"


def shown(key: object) -> str:
    """A name that the caller gave, as a path or a message shows it: printable, at most 60 characters, never empty."""
    return printable(key, 60) or '""'


def normalize_name(name: str) -> str:
    """A name without case and separators: negativePrompt, Negative-Prompt and negative_prompt become the same."""
    return re.sub(r"[\s_-]+", "", name).casefold()


def has_lone_surrogate(string: str) -> bool:
    """Whether text holds half of a surrogate pair, which UTF-8 cannot carry."""
    if string.isascii():
        return False
    try:
        string.encode()
    except UnicodeEncodeError:
        return True
    return False


class ValueBudget:
    """How many values a job may still hold, counted over all its fields."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._left = limit

    def spend(self) -> None:
        """Count one value."""
        self._left -= 1

    @property
    def is_exceeded(self) -> bool:
        return self._left < 0


def json_problems(value: object, budget: ValueBudget) -> list[Problem]:
    """What in a value, at any depth, is not strict JSON of a sane size. Every value in it is counted in `budget`."""
    problems: list[Problem] = []
    stack: list[tuple[str, object, int]] = [("", value, 1)]
    while stack and len(problems) < MAX_PROBLEMS:
        path, current, depth = stack.pop()
        budget.spend()
        if budget.is_exceeded:
            return [*problems, (path, f"is too much: a job may hold {budget.limit:,} values")]
        if not isinstance(current, (dict, list, tuple)):
            if message := _scalar_problem(current):
                problems.append((path, message))
        elif depth > MAX_DEPTH:
            problems.append((path, f"is nested deeper than {MAX_DEPTH} levels"))
        else:
            members = list(_members(current))
            unusable_keys = len(current) - len(members)
            problems.extend([(path, "must have keys of valid text")] * unusable_keys)
            stack.extend((path + step, member, depth + 1) for step, member in reversed(members))
    return problems


def _scalar_problem(value: object) -> str | None:
    if isinstance(value, str):
        return "must be valid text: it holds half of a surrogate pair" if has_lone_surrogate(value) else None
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, int):
        return "must be a smaller number: it takes more than 64 bits" if abs(value) >= MAX_INTEGER else None
    if isinstance(value, float):
        return None if math.isfinite(value) else "must be a finite number"
    return f"must be JSON, not {type(value).__name__}"


def _members(value: Sequence[Any] | dict[Any, Any]) -> Iterator[tuple[str, object]]:
    """What a list or an object holds: each member with its step in the path. One without a usable key is left out."""
    if not isinstance(value, dict):
        yield from ((f"[{index}]", member) for index, member in enumerate(value))
        return
    for key, member in value.items():
        if isinstance(key, str) and not has_lone_surrogate(key):
            yield f".{shown(key)}", member


def _check_all(items: Iterable[tuple[str, Any]], check: Callable[[Any], Any]) -> list[Any]:
    """Every item checked, or one InvalidValue with the problems of all of them."""
    checked: list[Any] = []
    problems: list[Problem] = []
    for path, item in items:
        try:
            checked.append(check(item))
        except InvalidValue as error:
            problems.extend((path + below, message) for below, message in error.problems)
            if len(problems) >= MAX_PROBLEMS:
                break
    if problems:
        raise InvalidValue(*problems)
    return checked

"""What a JSON value may be, said in words a caller understands. Knows nothing of what the values are for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

MAX_DEPTH = 32
MAX_WHOLE = 2**63
MAX_PROBLEMS = 100

Problem = tuple[str, str]
"""A path below the value (`[3].args`, "" for itself) and a sentence."""


class InvalidValue(Exception):
    """A value that cannot be used."""

    def __init__(self, *problems: str | Problem) -> None:
        super().__init__(problems)
        self.problems = tuple(("", problem) if isinstance(problem, str) else problem for problem in problems)


@dataclass(frozen=True)
class Value:
    """A JSON type, what it takes in words, and the check: the value to go on with, or `InvalidValue`."""

    type: str
    takes: str
    check: Callable[[Any], Any]


def whole(low: int, high: int) -> Value:
    takes = f"a whole number from {low} to {high}"

    def check(value: object) -> int:
        number = as_whole(value)
        if number is None or not low <= number <= high:
            raise unlike(takes, value)
        return number

    return Value("integer", takes, check)


def multiple_of_8(low: int, high: int, *, or_else: tuple[int, ...] = ()) -> Value:
    takes = "".join(f"{other}, or " for other in or_else) + f"a multiple of 8 from {low} to {high}"

    def check(value: object) -> int:
        number = as_whole(value)
        if number is None or (number not in or_else and (number % 8 or not low <= number <= high)):
            raise unlike(takes, value)
        return number

    return Value("integer", takes, check)


def number(low: float, high: float, *, or_else: tuple[float, ...] = ()) -> Value:
    takes = "".join(f"{other:g}, or " for other in or_else) + f"a number from {low:g} to {high:g}"

    def check(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise unlike(takes, value)
        if not (low <= value <= high or value in or_else):
            raise unlike(takes, value)
        return value

    return Value("number", takes, check)


def text(longest: int, *, blank: bool = False) -> Value:
    takes = f"text of at most {longest:,} bytes{'' if blank else ', not blank'}"

    def check(value: object) -> str:
        if not isinstance(value, str):
            raise unlike("text", value)
        if not blank and not value.strip():
            raise InvalidValue("must not be blank")
        size = len(value) if value.isascii() else len(value.encode())
        if size > longest:
            raise InvalidValue(f"must be at most {longest:,} bytes of UTF-8, not {size:,}")
        return value

    return Value("string", takes, check)


def flag() -> Value:
    def check(value: object) -> bool:
        if not isinstance(value, bool):
            raise unlike("true or false", value)
        return value

    return Value("boolean", "true or false", check)


def one_of(*choices: str) -> Value:
    takes = f"one of {', '.join(choices)}"

    def check(value: object) -> str:
        if not isinstance(value, str) or value not in choices:
            raise InvalidValue(f"must be {takes}")
        return value

    return Value("string", takes, check)


def any_object() -> Value:
    return object_of(lambda key, value: value, "an object")


def any_list() -> Value:
    def check(value: object) -> list[Any]:
        if not isinstance(value, (list, tuple)):
            raise unlike("a list", value)
        return list(value)

    return Value("array", "a list", check)


def list_of(item: Value, most: int, what: str) -> Value:
    takes = f"a list of at most {most} {what}"

    def check(value: object) -> list[Any]:
        if not isinstance(value, (list, tuple)) or len(value) > most:
            raise unlike(takes, value)
        return _each(((f"[{index}]", one) for index, one in enumerate(value)), item.check)

    return Value("array", takes, check)


def object_of(item: Callable[[str, Any], Any], takes: str) -> Value:
    """An object whose every member is checked by `item(key, value)`."""

    def check(value: object) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise unlike(takes, value)
        members = ((f".{shown(key)}", (key, one)) for key, one in value.items())
        return dict(zip(value, _each(members, lambda member: item(*member)), strict=True))

    return Value("object", takes, check)


def as_whole(value: object) -> int | None:
    """The whole number that a JSON number is: 25 and 25.0 are the same to JSON; true and "25" are none."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    return int(value) if isinstance(value, float) and value.is_integer() else None


def unlike(takes: str, value: object) -> InvalidValue:
    return InvalidValue(f"must be {takes}, not {said(value)}")


def said(value: object) -> str:
    """What a caller wrote, in JSON's words: numbers as they are, all else by its type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value) if abs(value) < MAX_WHOLE else "a huge number"
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, str):
        return "text"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    return "an object" if isinstance(value, dict) else "something that is not JSON"


def shown(key: object, longest: int = 60) -> str:
    """A name of the caller's as a part of a sentence or path: short and printable."""
    name = str(key) or '""'
    clipped = name if len(name) <= longest else f"{name[:longest]}…"
    return clipped if clipped.isprintable() else "".join(char if char.isprintable() else "?" for char in clipped)


def squashed(name: str) -> str:
    """A name without case and separators: negativePrompt, Negative-Prompt and negative_prompt are one."""
    return re.sub(r"[\s_-]+", "", name).casefold()


def is_broken(string: str) -> bool:
    """Whether text holds lone surrogates, which no UTF-8 can carry."""
    if string.isascii():
        return False
    try:
        string.encode()
    except UnicodeEncodeError:
        return True
    return False


class Budget:
    """How many values a job may hold, over all its fields."""

    def __init__(self, values: int) -> None:
        self.values = values
        self.left = values

    @property
    def is_spent(self) -> bool:
        return self.left < 0


def json_problems(value: object, budget: Budget) -> list[Problem]:
    """What of a value, however deep, is not strict JSON of a sane size."""
    problems: list[Problem] = []
    stack: list[tuple[str, object, int]] = [("", value, 1)]
    while stack and len(problems) < MAX_PROBLEMS:
        path, one, depth = stack.pop()
        budget.left -= 1
        if budget.is_spent:
            return [*problems, (path, f"is too much: a job may hold {budget.values:,} values")]
        if not isinstance(one, (dict, list, tuple)):
            if sentence := _scalar_problem(one):
                problems.append((path, sentence))
        elif depth > MAX_DEPTH:
            problems.append((path, f"is nested deeper than {MAX_DEPTH} levels"))
        else:
            below = [(path + step, inner, depth + 1) for step, inner in _members(one, path, problems)]
            stack.extend(reversed(below))
    return problems


def _scalar_problem(one: object) -> str | None:
    if isinstance(one, str):
        return "must be sound text: it holds half of a surrogate pair" if is_broken(one) else None
    if one is None or isinstance(one, bool):
        return None
    if isinstance(one, int):
        return "must be a smaller number: it takes more than 64 bits" if abs(one) >= MAX_WHOLE else None
    if isinstance(one, float):
        return None if math.isfinite(one) else "must be a finite number"
    return f"must be JSON, not {type(one).__name__}"


def _members(one: Sequence[Any] | dict[Any, Any], path: str, problems: list[Problem]) -> Iterator[tuple[str, object]]:
    if not isinstance(one, dict):
        yield from ((f"[{index}]", inner) for index, inner in enumerate(one))
        return
    for key, inner in one.items():
        if not isinstance(key, str) or is_broken(key):
            problems.append((path, "must have keys of sound text"))
        else:
            yield f".{shown(key)}", inner


def _each(items: Iterable[tuple[str, Any]], check: Callable[[Any], Any]) -> list[Any]:
    """Every item checked, or one `InvalidValue` with the problems of all of them."""
    checked: list[Any] = []
    problems: list[Problem] = []
    for path, item in items:
        try:
            checked.append(check(item))
        except InvalidValue as wrong:
            problems.extend((path + below, sentence) for below, sentence in wrong.problems)
            if len(problems) >= MAX_PROBLEMS:
                break
    if problems:
        raise InvalidValue(*problems)
    return checked

"""What a JSON value may be, and how a message describes it."""

from __future__ import annotations

from typing import Any

import pytest

from a1111_worker.request.values import (
    InvalidValue,
    ValueBudget,
    as_integer,
    describe_value,
    has_lone_surrogate,
    integer,
    json_problems,
    list_of,
    normalize_name,
    object_of,
    shown,
    text,
)


@pytest.mark.parametrize(
    ("value", "description"),
    [
        (None, "null"),
        (True, "true"),
        (5, "5"),
        (2**70, "a huge number"),
        (1e9, "1000000000"),
        ("the text itself is not repeated", "text"),
        ([1, 2], "a list of 2"),
        ({}, "an object"),
        (b"x", "something that is not JSON"),
    ],
)
def test_a_value_is_described_in_the_words_of_json(value: object, description: str) -> None:
    assert describe_value(value) == description


@pytest.mark.parametrize(
    ("value", "whole"), [(25, 25), (25.0, 25), (25.5, None), (True, None), ("25", None), (float("inf"), None)]
)
def test_a_whole_number_may_be_written_with_a_point(value: object, whole: int | None) -> None:
    assert as_integer(value) == whole


@pytest.mark.parametrize(("name", "expected"), [("", '""'), ("a\nb", "a b"), ("x" * 70, "x" * 59 + "…"), (5, "5")])
def test_a_name_in_a_path_is_short_printable_and_never_empty(name: object, expected: str) -> None:
    assert shown(name) == expected


def test_spellings_of_a_name_are_the_same() -> None:
    assert {normalize_name(name) for name in ("negativePrompt", "Negative-Prompt", "negative prompt")} == {
        "negativeprompt"
    }


def test_half_a_surrogate_pair_is_no_text() -> None:
    assert has_lone_surrogate("a\ud83d")
    assert not has_lone_surrogate("a\U0001f600")


def test_every_member_that_is_wrong_is_in_one_error_with_its_path() -> None:
    numbers = object_of(lambda key, value: list_of(integer(1, 5), 3, "numbers").check(value), "an object")

    with pytest.raises(InvalidValue) as refused:
        numbers.check({"a": [1, 9], "b": 2, "c": [0]})

    assert refused.value.problems == (
        (".a[1]", "must be a whole number from 1 to 5, not 9"),
        (".b", "must be a list of at most 3 numbers, not 2"),
        (".c[0]", "must be a whole number from 1 to 5, not 0"),
    )


def test_the_length_of_a_text_is_counted_in_bytes() -> None:
    assert text(4).check("éé") == "éé"

    with pytest.raises(InvalidValue):
        text(4).check("ééa")


@pytest.mark.parametrize(
    ("value", "problems"),
    [
        ({"a": [1, "x", None, {"b": 1.5}]}, []),
        ([float("nan"), {"a": "\udfff"}], [("[0]", "finite"), ("[1].a", "valid text")]),
        ({1: 1, "\udfff": 2, "a": 3}, [("", "keys"), ("", "keys")]),
        ({1: float("nan"), "a": float("inf")}, [("", "keys"), (".a", "finite")]),
        (2**63, [("", "64 bits")]),
        (b"x", [("", "not bytes")]),
    ],
)
def test_what_is_not_json_is_found_at_any_depth(value: Any, problems: list[tuple[str, str]]) -> None:
    found = json_problems(value, ValueBudget(100))

    assert [path for path, _ in found] == [path for path, _ in problems]
    assert all(words in message for (_, message), (_, words) in zip(found, problems, strict=True))


def test_a_budget_counts_the_values_of_several_fields() -> None:
    budget = ValueBudget(5)

    first, second = json_problems([1, 2], budget), json_problems([1, 2], budget)

    assert first == []
    assert second == [("[1]", "is too much: a job may hold 5 values")]
    assert budget.is_exceeded

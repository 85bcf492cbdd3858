"""Reading the environment: settings as fields, and all complaints at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from a1111_worker.environment import (
    Environment,
    Setting,
    flag,
    gigabytes,
    key_prefix,
    one_of,
    paths,
    seconds,
    secret,
    setting,
    settings_of,
    whole,
)
from a1111_worker.errors import ConfigError


@dataclass(frozen=True)
class Table:
    steps: int = setting("STEPS", whole(1, 10), 3, "steps")
    pause: float | None = setting("PAUSE", seconds, None, "seconds between them", default="as long as it takes")
    token: str | None = secret("TOKEN", "a key")
    derived: str = "made of others"


def test_settings_are_read_into_the_fields_of_their_dataclass() -> None:
    environment = Environment({"STEPS": " 5 ", "TOKEN": "abc", "OTHER": "x"})

    table = environment.read(Table)

    assert table == Table(steps=5, pause=None, token="abc", derived="made of others")
    assert environment.given == {"STEPS", "TOKEN"}
    environment.check()


def test_an_unset_an_empty_and_a_blank_variable_have_the_default() -> None:
    environment = Environment({"STEPS": "", "PAUSE": "  "})

    assert environment.read(Table) == Table()
    assert environment.given == set()


def test_all_complaints_come_at_once_and_show_no_secret() -> None:
    environment = Environment({"STEPS": "11", "PAUSE": "soon", "TOKEN": "two words"})

    environment.read(Table)

    with pytest.raises(ConfigError) as raised:
        environment.check()
    assert str(raised.value).splitlines() == [
        "STEPS='11': takes a whole number from 1 to 10",
        "PAUSE='soon': takes a number of seconds above 0, such as 8 or 0.5",
        "TOKEN=(not shown): takes a key: printable ASCII without spaces",
    ]


def test_a_long_bad_value_is_shown_only_in_part() -> None:
    environment = Environment({"STEPS": "9" * 1000})

    environment.read(Table)

    with pytest.raises(ConfigError) as raised:
        environment.check()
    assert len(str(raised.value)) < 300


def test_a_bad_value_counts_as_given() -> None:
    environment = Environment({"STEPS": "many"})

    environment.read(Table)

    assert environment.given == {"STEPS"}


def test_a_secret_is_not_in_the_repr() -> None:
    assert "abc" not in repr(Environment({"TOKEN": "abc"}).read(Table))


def test_a_default_is_shown_as_a_person_would_set_it_or_in_words() -> None:
    shown = {name: setting.default for name, setting in settings_of(Table).items()}

    assert shown == {"steps": "3", "pause": "as long as it takes", "token": "none"}


# a value, and how the documentation shows it
SHOWN: list[tuple[object, str]] = [
    (None, "none"),
    ((), "none"),
    ("", "none"),
    (True, "1"),
    (300.0, "300"),
    (0.5, "0.5"),
    (4_194_304, "4194304"),
    ((Path("/a"), Path("/b")), "/a:/b"),
    ("text", "text"),
]


@pytest.mark.parametrize(("unset", "shown"), SHOWN)
def test_each_kind_of_default_has_its_text(unset: object, shown: str) -> None:
    @dataclass(frozen=True)
    class One:
        value: object = setting("VALUE", str, unset, "a value")

    assert settings_of(One)["value"].default == shown


def test_a_setting_without_a_field_can_be_read_too() -> None:
    environment = Environment({"LIMIT": "7"})

    assert environment.value_of(Setting("LIMIT", "a limit", whole(1, 9), 1)) == 7


def test_what_parsers_make_of_a_text() -> None:
    assert seconds("8.5") == 8.5
    assert gigabytes("1.5") == 1_500_000_000
    assert (flag("YES"), flag("false")) == (True, False)
    assert one_of("DEBUG", "INFO")("info") == "INFO"
    assert paths("/a: :/b") == (Path("/a"), Path("/b"))
    assert key_prefix("/a1111/prod/") == "a1111/prod"

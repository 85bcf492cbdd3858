"""How the environment is read: settings are fields of a dataclass, and all complaints come at once.

    @dataclass(frozen=True)
    class Config:
        max_steps: int = setting("MAX_STEPS", whole(1, 10_000), 150, "steps of one job")

    environment = Environment({"MAX_STEPS": "200"})
    environment.read(Config).max_steps    # 200
    environment.check()                   # raises ConfigError, with one line for each bad value

Below them are the parsers. A parser gets a text without blanks around it. It raises ValueError with what it takes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

from a1111_worker.domain import CheckpointEntry
from a1111_worker.errors import ConfigError
from a1111_worker.origins import OriginRefused, parse_origin

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """A variable of the environment: how it is read, and how the documentation describes it.

    `unset` is its value if the variable is not set or empty. `default` is how the documentation shows that value. A
    `secret` value is never printed. `reader` is who reads the variable.
    """

    name: str
    what: str
    parse: Callable[[str], Any] = str
    unset: Any = None
    default: str = "none"
    secret: bool = False
    reader: str = "worker"


def setting(name: str, parse: Callable[[str], T], unset: T, what: str, *, default: str | None = None) -> T:
    """A field of a dataclass that a variable fills.

    `default` is how the documentation shows `unset`, if it is not that value's own text. For type checkers this is the
    value, so that they compare the parser and `unset` with the type of the field.
    """
    described = Setting(name, what, parse, unset, _text_of(unset) if default is None else default)
    return cast(T, _field(described))


def secret(name: str, what: str) -> str | None:
    """A field for a key: it is never printed, neither in a complaint nor with the object."""
    return cast("str | None", _field(Setting(name, what, key, secret=True)))


def settings_of(cls: type) -> dict[str, Setting]:
    """The settings of a dataclass by the names of its fields. Fields that are no settings are left out."""
    return {field.name: field.metadata["setting"] for field in dataclasses.fields(cls) if "setting" in field.metadata}


def _field(setting: Setting) -> Any:
    return dataclasses.field(default=setting.unset, repr=not setting.secret, metadata={"setting": setting})


def _text_of(value: object) -> str:
    """A value as the documentation shows it, and as a person would set it."""
    if value in (None, "", ()):
        return "none"
    if isinstance(value, tuple):
        return os.pathsep.join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(int(value) if isinstance(value, bool) else value)


class Environment:
    """Reads variables, and keeps every complaint. `given` holds the names of those that are set and not empty."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables
        self.given: set[str] = set()
        self._complaints: list[str] = []

    def read(self, cls: type[T]) -> T:
        """An object of a dataclass: the fields that are settings are read, the others have their defaults."""
        return cls(**{name: self.value_of(setting) for name, setting in settings_of(cls).items()})

    def value_of(self, setting: Setting) -> Any:
        """The parsed value. For a bad value it is that of an unset one, and there is one more complaint."""
        text = self._variables.get(setting.name, "").strip()
        if not text:
            return setting.unset
        self.given.add(setting.name)
        try:
            return setting.parse(text)
        except ValueError as takes:
            # An address with `@` may hold credentials, in a place that only its writer knows.
            shown = "(not shown)" if setting.secret or "@" in text else repr(text[:200])
            self.complain(f"{setting.name}={shown}: takes {takes}")
            return setting.unset

    def complain(self, complaint: str) -> None:
        """Keep a complaint of one line."""
        self._complaints.append(complaint)

    def check(self) -> None:
        """Raise ConfigError with all complaints, a line for each, if there are any."""
        if self._complaints:
            raise ConfigError("\n".join(self._complaints))


# Numbers and choices


def seconds(text: str) -> float:
    # Not everything that Python takes for a number: start.sh reads SHUTDOWN_GRACE too, and cannot read 1e1 or 1_0.
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) or not 0 < float(text) < 1e6:
        raise ValueError("a number of seconds above 0, such as 8 or 0.5")
    return float(text)


def gigabytes(text: str) -> int:
    """Bytes from a number of gigabytes (10⁹ bytes)."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < 1e6:
        raise ValueError("a number of gigabytes (10⁹ bytes) above 0")
    return int(number * 1e9)


def whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise ValueError(f"a whole number from {low} to {high}")
        return int(text)

    return parse


def flag(text: str) -> bool:
    if text.lower() not in ("0", "1", "true", "false", "yes", "no"):
        raise ValueError("1 or 0")
    return text.lower() in ("1", "true", "yes")


def one_of(*choices: str) -> Callable[[str], str]:
    """A parser that takes these words in any case, and returns them as they are written here."""

    def parse(text: str) -> str:
        for choice in choices:
            if text.casefold() == choice.casefold():
                return choice
        raise ValueError(f"one of {', '.join(choices)}")

    return parse


# Keys, hashes and files


def key(text: str) -> str:
    if not (text.isascii() and text.isprintable()) or " " in text:
        raise ValueError("a key: printable ASCII without spaces")
    return text


def sha256(text: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise ValueError("64 hex digits")
    return text.lower()


def model_file(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}\.safetensors", text):
        raise ValueError("a file name of letters, digits, `.`, `_` and `-` that ends with .safetensors")
    return text


def checkpoints(text: str) -> tuple[CheckpointEntry, ...]:
    """A JSON list of checkpoints, or the path of a file that holds one."""
    form = 'a JSON list of {"name": …, "reference": …, "sha256": …}, or the path of a file that holds one'
    try:
        entries = json.loads(text if text.lstrip().startswith("[") else Path(text).read_bytes())
        found = tuple(CheckpointEntry(**entry) for entry in entries)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(form) from error
    for entry in found:
        if not all(isinstance(value, str) and value.strip() for value in (entry.name, entry.reference)):
            raise ValueError(form)
        if entry.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", str(entry.sha256)):
            raise ValueError(f"{form}; a sha256 is 64 hex digits in lower case")
    if len({entry.name.casefold() for entry in found}) < len(found):
        raise ValueError(f"{form}; each with a name of its own")
    return found


def paths(text: str) -> tuple[Path, ...]:
    return tuple(Path(part) for part in text.split(os.pathsep) if part.strip())


# Addresses


def repositories(text: str) -> tuple[str, ...]:
    """Repositories of Hugging Face, separated by commas or spaces."""
    found = tuple(part for part in re.split(r"[,\s]+", text) if part)
    if not all(re.fullmatch(r"[\w.-]+/[\w.-]+", part, re.ASCII) for part in found):
        raise ValueError("repositories of Hugging Face (OWNER/REPO), separated by commas")
    return found


def url(text: str) -> str:
    with contextlib.suppress(ValueError):  # a bracket that is never closed, or a port that is no number
        parts = urlsplit(text)
        is_plain = not (parts.query or parts.fragment or "@" in parts.netloc)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and is_plain:
            return text.rstrip("/")
    raise ValueError("an http(s) URL without credentials and without a query")


def origin(text: str) -> str:
    if urlsplit(url(text)).path not in ("", "/"):
        raise ValueError("an origin: scheme, host and port, without a path")
    return text.rstrip("/")


def api_origin(text: str) -> str:
    if "*" in text:
        raise ValueError("one origin, not a family of them")
    return _reachable(origin(text))


def hosts(text: str) -> tuple[str, ...]:
    """Hosts or origins separated by commas or spaces; `cdn.example.com` means `https://cdn.example.com`."""
    found = tuple(host if "://" in host else f"https://{host}" for host in re.split(r"[,\s]+", text) if host)
    for host in found:
        parts = urlsplit(host)
        is_local = parts.hostname in ("127.0.0.1", "localhost")
        if parts.scheme != "https" and not (parts.scheme == "http" and is_local and parts.port):
            raise ValueError("https hosts, or exactly http://127.0.0.1:PORT or http://localhost:PORT")
        if not parts.hostname or parts.path not in ("", "/") or parts.query or "@" in parts.netloc:
            raise ValueError("hosts separated by commas, without credentials and without a path")
    return tuple(_reachable(host.rstrip("/")) for host in found)


def hosts_or_any(text: str) -> tuple[str, ...]:
    """The same; `*` among them stands for every public host."""
    names = re.split(r"[,\s]+", text)
    others = hosts(" ".join(name for name in names if name != "*"))
    return ("*", *others) if "*" in names else others


def _reachable(text: str) -> str:
    """An origin as it is, if the egress policy could let it through."""
    try:
        parse_origin(text)
    except OriginRefused as error:
        raise ValueError(f"hosts that can be reached: {error}") from error
    return text


# The bucket


def bucket_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{2,62}", text):
        raise ValueError("a bucket's name: 3 to 63 letters, digits, `.`, `_` and `-`")
    return text


def region_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9-]{1,63}", text):
        raise ValueError("a region such as eu-central-1: letters, digits and `-`")
    return text


def key_prefix(text: str) -> str:
    parts = text.strip("/").split("/")
    if len(text) > 200 or not all(re.fullmatch(r"(?!\.)[A-Za-z0-9._-]+", part) for part in parts):
        raise ValueError("names of letters, digits, `.`, `_` and `-`, none beginning with `.`, with / between them")
    return "/".join(parts)

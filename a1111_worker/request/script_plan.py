"""What a script of the WebUI will do: its pictures with their fields, and its texts. Readers of scripts make these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from a1111_worker.request.fields import MAX_PROMPT
from a1111_worker.request.values import InvalidValue, as_integer, describe_value, text

PROMPTS = ("prompt", "negative_prompt")
_MAX_TEXT = 5 * MAX_PROMPT  # bytes of a text argument


@dataclass(frozen=True)
class ScriptRun:
    """One or more pictures that a script makes with the same fields.

    `fields` are those of the txt2img body that differ from the job's, with the script's values. `origins` says for each
    of them where it comes from: a path below script_args, and what to call it there.
    """

    fields: Mapping[str, Any]
    pictures: int
    origins: Mapping[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class ScriptText:
    """A text of the arguments that becomes a prompt, or a part of one. `path` is its place, below script_args.

    `is_value`: it takes the place of another text in a prompt, so it may be the name of a LoRA inside a tag.
    """

    path: str
    text: str
    is_negative: bool = False
    is_value: bool = False


@dataclass(frozen=True)
class ScriptPlan:
    """What a script will do: its runs in the order of its pictures (grids are not counted), and its texts."""

    runs: tuple[ScriptRun, ...]
    texts: tuple[ScriptText, ...]
    _write: Callable[[Sequence[str]], list[Any]] = field(repr=False)

    @property
    def pictures(self) -> int:
        return sum(run.pictures for run in self.runs)

    def args_with(self, texts: Sequence[str]) -> list[Any]:
        """script_args with other texts in the places of `texts`, as many and in the same order."""
        return self._write(texts)


def too_many(count: int | str, most: int) -> str:
    return f"asks for {count} pictures, and the limit is {most}"


def check_margin(args: Sequence[Any], index: int) -> None:
    """The space between the pictures of a grid, in pixels: A1111's own slider ends at 500."""
    margin = as_integer(args[index])  # A1111 fails with "5"
    if margin is None or not 0 <= margin <= 500:
        raise InvalidValue((f"[{index}]", f"must be a whole number from 0 to 500, not {describe_value(args[index])}"))


def text_argument(args: Sequence[Any], index: int) -> str:
    try:
        return str(text(_MAX_TEXT, blank=True).check(args[index]))
    except InvalidValue as error:
        raise InvalidValue((f"[{index}]", error.problems[0][1])) from error

"""The arguments of "Prompts from file or textbox" and of "Prompt matrix".

    prompts from file or textbox   iterate seed, one random seed, "start" or "end", text
    prompt matrix                  at the start, different seeds, "positive" or "negative", "comma" or "space", margin

Read as A1111 1.9.3 and 1.10.1 do: scripts/prompts_from_file.py and prompt_matrix.py.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from a1111_worker.request.fields import CHECKPOINT_REASON, DISK_REASON
from a1111_worker.request.script_plan import (
    PROMPTS,
    ScriptPlan,
    ScriptRun,
    ScriptText,
    check_margin,
    text_argument,
    too_many,
)
from a1111_worker.request.values import InvalidValue

# -- prompts from file or textbox --------------------------------------------------------------------------------------

_LINES = 3  # the index of the text


def _boolean(value: str) -> bool:
    return value == "true"


# The options of a line, with what A1111 makes of their values. A line with another one is a prompt as a whole.
_OPTIONS: Mapping[str, Callable[[str], Any]] = {
    **dict.fromkeys(("sd_model", "outpath_samples", "outpath_grids", "prompt_for_display", "styles"), str),
    **dict.fromkeys(("prompt", "negative_prompt", "sampler_name"), str),
    **dict.fromkeys(("seed", "subseed", "seed_resize_from_h", "seed_resize_from_w", "sampler_index"), int),
    **dict.fromkeys(("batch_size", "n_iter", "steps", "width", "height"), int),
    **dict.fromkeys(("subseed_strength", "cfg_scale"), float),
    **dict.fromkeys(("restore_faces", "tiling", "do_not_save_samples", "do_not_save_grid"), _boolean),
}
_REFUSED_OPTIONS = {
    "sd_model": CHECKPOINT_REASON,
    "outpath_samples": DISK_REASON,
    "outpath_grids": DISK_REASON,
    "styles": "the WebUI takes each letter for a style; give them in the field styles",
}
# They change no picture. (No file is saved in any case: the worker has set A1111's own option.)
_WITHOUT_EFFECT = frozenset({"prompt_for_display", "sampler_index", "do_not_save_samples", "do_not_save_grid"})


@dataclass(frozen=True)
class _Line:
    """A line of the text: its options as they are written, or a prompt as a whole."""

    options: Mapping[str, str]
    is_plain: bool

    def __str__(self) -> str:
        if self.is_plain:
            return self.options["prompt"]
        return " ".join(f"--{option} {shlex.quote(value)}" for option, value in self.options.items())


def read_prompts_from_file(args: Sequence[Any], body: Mapping[str, Any], most: int) -> ScriptPlan:
    written = [line for line in map(str.strip, text_argument(args, _LINES).splitlines()) if line]
    if len(written) > most:  # each makes at least one picture
        raise InvalidValue((f"[{_LINES}]", too_many(f"at least {len(written)}", most)))
    if not written:
        raise InvalidValue((f"[{_LINES}]", "must have a line for each prompt"))
    lines = [_parse_line(line) for line in written]
    problems = [
        (f"[{_LINES}]", f"line {number}: --{option} is refused: {_REFUSED_OPTIONS[option]}")
        for number, line in enumerate(lines, 1)
        for option in line.options
        if option in _REFUSED_OPTIONS
    ]
    if problems:
        raise InvalidValue(*problems)
    places = [(index, option) for index, line in enumerate(lines) for option in PROMPTS if option in line.options]

    def write(texts: Sequence[str]) -> list[Any]:
        changed = [dict(line.options) for line in lines]
        for (index, option), new in zip(places, texts, strict=True):
            changed[index][option] = new
        new_lines = (str(_Line(options, line.is_plain)) for options, line in zip(changed, lines, strict=True))
        return [*args[:_LINES], "\n".join(new_lines)]

    return ScriptPlan(
        tuple(_run_of_line(number, line.options, args, body) for number, line in enumerate(lines, 1)),
        tuple(
            ScriptText(f"[{_LINES}]", lines[index].options[option], is_negative=option == "negative_prompt")
            for index, option in places
        ),
        write,
    )


def _parse_line(line: str) -> _Line:
    options = _parse_options(line) if "--" in line else None
    return _Line({"prompt": line}, is_plain=True) if options is None else _Line(options, is_plain=False)


def _parse_options(line: str) -> dict[str, str] | None:
    """`--steps 20 --prompt a red house --seed 5` as A1111 reads it. None if it fails, and takes it for a prompt."""
    options: dict[str, str] = {}
    try:
        words = shlex.split(line)
        position = 0
        while position < len(words):
            option, end = words[position][2:], position + 2
            if not words[position].startswith("--") or option not in _OPTIONS or end > len(words):
                return None
            while option in PROMPTS and end < len(words) and not words[end].startswith("--"):
                end += 1
            options[option] = " ".join(words[position + 1 : end])
            _OPTIONS[option](options[option])
            position = end
    except ValueError:
        return None
    return options


def _run_of_line(number: int, options: Mapping[str, str], args: Sequence[Any], body: Mapping[str, Any]) -> ScriptRun:
    values: dict[str, Any] = {
        option: _OPTIONS[option](value) for option, value in options.items() if option not in _WITHOUT_EFFECT
    }
    for option in PROMPTS:
        if values.get(option) and body.get(option):
            both = (values[option], body[option])
            values[option] = " ".join(both if args[2] == "start" else reversed(both))
    pictures = values.get("batch_size", body.get("batch_size", 1)) * values.get("n_iter", body.get("n_iter", 1))
    origins = {option: (f"[{_LINES}]", f"line {number}: --{option}") for option in values}
    return ScriptRun(values, max(pictures, 1), origins)


# -- prompt matrix -----------------------------------------------------------------------------------------------------


def read_prompt_matrix(args: Sequence[Any], body: Mapping[str, Any], most: int) -> ScriptPlan:
    at_start, _, prompt_type, delimiter, _ = args
    check_margin(args, 4)
    problems = [
        (f"[{index}]", f"must be {' or '.join(map(repr, choices))}")
        for index, choices in ((2, ("positive", "negative")), (3, ("comma", "space")))
        if args[index] not in choices
    ]
    if problems:
        raise InvalidValue(*problems)
    field_name = "prompt" if prompt_type == "positive" else "negative_prompt"
    first, *others = str(body.get(field_name, "")).split("|")
    if len(others) >= most.bit_length():  # 2 ** others, which may be a very long number
        raise InvalidValue(too_many(f"2 to the power of {len(others)}", most) + f": {field_name} has {len(others)} |")
    separator = ", " if delimiter == "comma" else " "
    runs = []
    for number in range(2 ** len(others)):
        chosen = [part.strip().strip(",") for index, part in enumerate(others) if number >> index & 1]
        prompt = separator.join([*chosen, first] if at_start else [first, *chosen])
        runs.append(ScriptRun({field_name: prompt}, 1))
    return ScriptPlan(tuple(runs), (), lambda texts: list(args))

"""The arguments of "X/Y/Z plot", read as A1111 1.9.3 and 1.10.1 do (scripts/xyz_grid.py).

    x type, x values, x list, y type, y values, y list, z type, z values, z list, legend, sub images, sub grids,
    keep -1, vary x, vary y, vary z, margin, text instead of lists

A type is the number of an axis in the WebUI's own list. Values are a line of CSV; numbers may be ranges (`1-5`,
`1-10 (+2)`, `1-10 [5]`). An axis that offers choices takes its list instead.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, permutations, product
from typing import Any

from a1111_worker.request.fields import CHECKPOINT_REASON, MAX_PROMPT
from a1111_worker.request.script_plan import (
    PROMPTS,
    ScriptPlan,
    ScriptRun,
    ScriptText,
    check_margin,
    text_argument,
    too_many,
)
from a1111_worker.request.values import InvalidValue, as_integer, describe_value
from a1111_worker.text import quoted


@dataclass(frozen=True)
class _Axis:
    """A kind of axis. `read` makes a value of a text. `apply` returns the fields of a body that a value changes.

    `has_choices`: its values are the axis's list, not its text, unless the job asks for text. `reason`: why the axis is
    refused.
    """

    read: Callable[[str], Any] = str
    apply: Callable[[Mapping[str, Any], Any, Sequence[Any]], Mapping[str, Any]] = lambda body, value, values: {}
    has_choices: bool = False
    reason: str = ""


def _read_order(value: str) -> str:
    """A value of "Prompt order": A1111 makes an axis of all permutations of these."""
    return value


def _sets(name: str, read: Callable[[str], Any], *, has_choices: bool = False) -> _Axis:
    """An axis that sets a field."""
    return _Axis(read, lambda body, value, values: {name: value}, has_choices)


def _overrides(name: str, read: Callable[[str], Any], *, has_choices: bool = False) -> _Axis:
    """An axis that overrides a setting which a job may override."""
    return _Axis(
        read,
        lambda body, value, values: {"override_settings": {**body.get("override_settings", {}), name: value}},
        has_choices,
    )


def _refused(reason: str) -> _Axis:
    return _Axis(has_choices=True, reason=reason)


def _replace_prompts(body: Mapping[str, Any], value: str, values: Sequence[str]) -> Mapping[str, Any]:
    """Prompt S/R: the first value is replaced by each of the values, in both prompts."""
    sought = values[0]
    prompts = {name: str(body.get(name, "")) for name in PROMPTS}
    if not any(sought in prompt for prompt in prompts.values()):
        raise InvalidValue(f"looks for {quoted(sought)}, which is in no prompt")
    for name, prompt in prompts.items():
        if len(prompt) + prompt.count(sought) * (len(value) - len(sought)) > MAX_PROMPT:
            raise InvalidValue(f"makes {name} longer than {MAX_PROMPT:,} bytes")
        prompts[name] = prompt.replace(sought, value)
    return {name: prompt for name, prompt in prompts.items() if prompt != body.get(name, "")}


def _order_prompt(body: Mapping[str, Any], value: Sequence[str], values: Sequence[Any]) -> Mapping[str, Any]:
    """Prompt order: these parts of the prompt change places."""
    rest = str(body.get("prompt", ""))
    ordered = []
    for part in sorted(value, key=rest.find):
        place = rest.find(part)  # -1 if it is not there, and A1111 goes on with that
        ordered.append(rest[:place])
        rest = rest[place + len(part) :]
    return {"prompt": "".join(chain.from_iterable(zip(ordered, value, strict=True))) + rest}


def _set_size(body: Mapping[str, Any], value: str, values: Sequence[Any]) -> Mapping[str, Any]:
    width, _, height = value.partition("x")
    try:
        return {"width": int(width), "height": int(height)}
    except ValueError as error:
        raise InvalidValue(f"must be sizes like 512x768, not {quoted(value)}") from error


def _add_styles(body: Mapping[str, Any], value: str, values: Sequence[Any]) -> Mapping[str, Any]:
    return {"styles": [*body.get("styles", ()), *value.split(",")]}


def _restore_faces(body: Mapping[str, Any], value: str, values: Sequence[Any]) -> Mapping[str, Any]:
    return {"restore_faces": value.lower() in ("codeformer", "gfpgan", "true", "yes", "y", "1")}


def _read_true(value: str) -> bool:
    return value.lower() == "true"


# The axes that 1.9.3 and 1.10.1 have for txt2img. Where they stand differs, and an extension may add to them: the
# WebUI's own list tells. Those that only set another of A1111's settings are taken as they are: the worker resets all
# settings after a script.
_AXES: Mapping[str, _Axis] = {
    "Nothing": _Axis(),
    "Seed": _sets("seed", int),
    "Var. seed": _sets("subseed", int),
    "Var. strength": _sets("subseed_strength", float),
    "Steps": _sets("steps", int),
    "Hires steps": _sets("hr_second_pass_steps", int),
    "CFG Scale": _sets("cfg_scale", float),
    "Prompt S/R": _Axis(apply=_replace_prompts),
    "Prompt order": _Axis(_read_order, _order_prompt),
    "Sampler": _sets("sampler_name", str, has_choices=True),
    "Hires sampler": _sets("hr_sampler_name", str, has_choices=True),
    "Checkpoint name": _refused(CHECKPOINT_REASON),
    "Negative Guidance minimum sigma": _sets("s_min_uncond", float),
    "Sigma Churn": _sets("s_churn", float),
    "Sigma min": _sets("s_tmin", float),
    "Sigma max": _sets("s_tmax", float),
    "Sigma noise": _sets("s_noise", float),
    "Schedule type": _sets("scheduler", str, has_choices=True),
    **dict.fromkeys(("Schedule min sigma", "Schedule max sigma", "Schedule rho", "Extra noise"), _Axis(float)),
    **dict.fromkeys(("Skip Early CFG", "Beta schedule alpha", "Beta schedule beta"), _Axis(float)),
    "Eta": _sets("eta", float),
    "Clip skip": _overrides("CLIP_stop_at_last_layers", int),
    "Denoising": _sets("denoising_strength", float),
    "Initial noise multiplier": _Axis(float),  # of img2img
    "Hires upscaler": _sets("hr_upscaler", str, has_choices=True),
    "VAE": _refused("give the VAE in the field vae: the WebUI would keep it for later jobs"),
    "Styles": _Axis(apply=_add_styles, has_choices=True),
    "UniPC Order": _Axis(int),
    "Face restore": _Axis(apply=_restore_faces),
    "Token merging ratio": _overrides("token_merging_ratio", float),
    "Token merging ratio high-res": _overrides("token_merging_ratio_hr", float),
    "Always discard next-to-last sigma": _overrides("always_discard_next_to_last_sigma", _read_true, has_choices=True),
    "SGM noise multiplier": _overrides("sgm_noise_multiplier", _read_true, has_choices=True),
    "Refiner checkpoint": _refused(CHECKPOINT_REASON),
    "Refiner switch at": _sets("refiner_switch_at", float),
    "RNG source": _overrides("randn_source", str, has_choices=True),
    "FP8 mode": _Axis(has_choices=True),
    "Size": _Axis(apply=_set_size),
}
_WITH_TEXTS = ("Prompt S/R", "Prompt order")


@dataclass(frozen=True)
class _PlotAxis:
    """One of the three axes of a plot: its name, its kind, the index of its text, its values as texts and as read."""

    name: str
    kind: _Axis
    index: int
    written: tuple[str, ...]
    values: tuple[Any, ...]


def read_plot(args: Sequence[Any], body: Mapping[str, Any], most: int, axes: Sequence[str]) -> ScriptPlan:
    check_margin(args, 16)
    plot: list[_PlotAxis] = []
    problems: list[tuple[str, str]] = []
    for index in (0, 3, 6):
        try:
            plot.append(_read_axis(args, index, most, axes))
        except InvalidValue as error:
            problems += error.problems
    if problems:
        raise InvalidValue(*problems)
    per_cell = body.get("batch_size", 1) * body.get("n_iter", 1)
    pictures = math.prod(len(axis.values) for axis in plot) * per_cell
    if pictures > most:
        raise InvalidValue(too_many(pictures, most))
    runs = [
        _run_of_cell(body, list(zip(plot, reversed(cell), strict=True)), per_cell)
        for cell in product(*(axis.values for axis in reversed(plot)))  # x changes first
    ]
    texts = [
        ScriptText(f"[{axis.index}]", value, is_value=True)
        for axis in plot
        if axis.name in _WITH_TEXTS
        for value in axis.written
    ]

    def write(new_texts: Sequence[str]) -> list[Any]:
        written = list(args)
        for axis in plot:
            mine = [new for old, new in zip(texts, new_texts, strict=True) if old.path == f"[{axis.index}]"]
            if mine:
                written[axis.index] = _csv_line(mine)
        return written

    return ScriptPlan(tuple(runs), tuple(texts), write)


def _run_of_cell(body: Mapping[str, Any], cell: Sequence[tuple[_PlotAxis, Any]], pictures: int) -> ScriptRun:
    """The pictures of one cell: A1111 applies x, then y, then z."""
    changed: dict[str, Any] = {}
    origins: dict[str, tuple[str, str]] = {}
    for axis, value in cell:
        try:
            new = axis.kind.apply({**body, **changed}, value, axis.values)
        except InvalidValue as error:
            raise InvalidValue((f"[{axis.index}]", f"{axis.name} {error.problems[0][1]}")) from error
        changed |= new
        origins |= dict.fromkeys(new, (f"[{axis.index}]", axis.name))
    return ScriptRun(changed, pictures, origins)


def _read_axis(args: Sequence[Any], index: int, most: int, axes: Sequence[str]) -> _PlotAxis:
    """The axis whose type is at `index`, its text behind it, and its list behind that."""
    number = as_integer(args[index])
    if number is None or not 0 <= number < len(axes):
        expected = f"must be the number of an axis, 0 to {len(axes) - 1}, not {describe_value(args[index])}"
        raise InvalidValue((f"[{index}]", expected))
    name = axes[number]
    kind = _AXES.get(name, _refused("this worker cannot check what it asks for"))
    if kind.reason:
        raise InvalidValue((f"[{index}]", f"is the axis {quoted(name)}, which is refused: {kind.reason}"))
    if name == "Nothing":
        return _PlotAxis(name, kind, index + 1, (), (0,))
    from_list = kind.has_choices and not args[17]
    place = index + 2 if from_list else index + 1
    try:
        written = _listed(args[place]) if from_list else _split_csv(text_argument(args, place))
        values = _read_values(written, kind.read, most)
    except InvalidValue as error:
        raise InvalidValue((f"[{place}]", f"{name} {error.problems[0][1]}")) from error
    except (ValueError, ArithmeticError, csv.Error) as error:
        raise InvalidValue((f"[{place}]", f"{name} has a value that cannot be read")) from error
    if not values:
        raise InvalidValue((f"[{place}]", f"{name} has no values"))
    return _PlotAxis(name, kind, place, tuple(written), tuple(values))


def _listed(values: Any) -> list[str]:
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, str) for value in values):
        raise InvalidValue("must have a list of texts")
    return list(values)


def _split_csv(line: str) -> list[str]:
    rows = csv.reader(io.StringIO(line), skipinitialspace=True)
    return [value.strip() for value in chain.from_iterable(rows)]


def _csv_line(values: Sequence[str]) -> str:
    written = io.StringIO()
    csv.writer(written).writerow(values)
    return written.getvalue().strip()


def _read_values(written: Sequence[str], read: Callable[[str], Any], most: int) -> list[Any]:
    """The values of an axis, ranges written out. InvalidValue if there are more than `most`."""
    if read is _read_order:
        count = math.factorial(min(len(written), 20))  # more than any limit
        if count > most:
            raise InvalidValue(too_many(f"the {len(written)}! orders of {len(written)} texts as", most))
        return list(permutations(written))
    values: list[Any] = []
    for value in written:
        if read not in (int, float):
            values.append(read(value))
        elif value:
            values += _read_numbers(value, read, most)
        if len(values) > most:
            raise InvalidValue(f"has more than {most} values, and that is the limit of pictures")
    return values


def _read_numbers(value: str, read: Callable[[str], Any], most: int) -> Sequence[Any]:
    """A number, or those of a range: `1-5`, `1-10 (+2)` with a step, `1-10 [5]` with a count. At most one more than
    `most` of them are made. ValueError, ArithmeticError: A1111 would fail."""
    if len(value) > _LONGEST_NUMBER:
        raise ValueError("too long for a number")
    stepped = (_RANGE if read is int else _FLOAT_RANGE).fullmatch(value)
    if stepped:
        start, end, step = read(stepped[1]), read(stepped[2]), read(stepped[3] or "1")
        if read is int:
            return range(start, end + 1, step)[: most + 1]
        count = math.ceil((end + step - start) / step)
        return [start + number * step for number in range(min(count, most + 1))]
    counted = (_COUNTED_RANGE if read is int else _COUNTED_FLOAT_RANGE).fullmatch(value)
    if counted:
        start, end, count = read(counted[1]), read(counted[2]), int(counted[3])
        step = (end - start) / max(count - 1, 1)
        last = [end] if count > 1 else []
        return [*(read(start + number * step) for number in range(min(count - len(last), most + 1))), *last]
    return [read(value)]


_LONGEST_NUMBER = 64  # characters of a range
_RANGE = re.compile(r"\s*([+-]?\s*\d+)\s*-\s*([+-]?\s*\d+)(?:\s*\(([+-]\d+)\s*\))?\s*")
_COUNTED_RANGE = re.compile(r"\s*([+-]?\s*\d+)\s*-\s*([+-]?\s*\d+)(?:\s*\[(\d+)\s*])?\s*")
_FLOAT_RANGE = re.compile(r"\s*([+-]?\s*\d+(?:.\d*)?)\s*-\s*([+-]?\s*\d+(?:.\d*)?)(?:\s*\(([+-]\d+(?:.\d*)?)\s*\))?\s*")
_COUNTED_FLOAT_RANGE = re.compile(
    r"\s*([+-]?\s*\d+(?:.\d*)?)\s*-\s*([+-]?\s*\d+(?:.\d*)?)(?:\s*\[(\d+(?:.\d*)?)\s*])?\s*"
)

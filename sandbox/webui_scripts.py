"""A1111's selectable scripts: Prompts from file, Prompt matrix, X/Y/Z plot (scripts/*.py of 1.9.3 and 1.10.1).

Each runs `process_images` a few times and puts its own answer together, with A1111's own inaccuracies: seeds that
belong to no picture, infotexts of pictures that are not sent, LoRA hashes of an earlier picture.
"""

from __future__ import annotations

import copy
import csv
import io
import itertools
import math
import random
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sandbox.webui_errors import HTTPException, WebUIError
from sandbox.webui_processing import (
    Picture,
    Processed,
    Txt2ImgJob,
    create_infotext,
    draw_grid,
    process_images,
    unprocessed_info,
)


@dataclass(frozen=True)
class Script:
    """A script: the names of its arguments, and its `run`."""

    arguments: tuple[str, ...]
    run: Callable[..., Processed]


# --- Prompts from file or textbox ---------------------------------------------------------------------------------

_LINE_OPTIONS: Mapping[str, Callable[[str], Any]] = {
    **dict.fromkeys(("sd_model", "prompt_for_display", "styles", "sampler_name"), str),
    **dict.fromkeys(("seed", "subseed", "batch_size", "n_iter", "steps", "width", "height"), int),
    **dict.fromkeys(("seed_resize_from_h", "seed_resize_from_w"), int),
    **dict.fromkeys(("subseed_strength", "cfg_scale"), float),
    **dict.fromkeys(
        ("restore_faces", "tiling", "do_not_save_samples", "do_not_save_grid"), lambda text: text == "true"
    ),
}


def _prompts_from_file(job: Txt2ImgJob, iterate: bool, same_random: bool, position: str, text: str) -> Processed:
    lines = [_read_line(line.strip()) for line in text.splitlines() if line.strip()]
    state = job.process.state
    state.job_count = sum(line.get("n_iter", job["n_iter"]) for line in lines)
    if (iterate or same_random) and job["seed"] == -1:
        job = job.changed({"seed": random.randrange(4294967294)})
    pictures: list[Picture] = []
    prompts: list[str] = []
    infotexts: list[str] = []
    seed = job["seed"]
    for line in lines:
        state.job = f"{state.job_no + 1} out of {state.job_count}"
        fields = {"seed": seed, **line}
        if model := fields.pop("sd_model", None):
            job.overrides["sd_model_checkpoint"] = model  # for the lines after it too
        for field in ("prompt", "negative_prompt"):
            if line.get(field) and job[field]:
                both = (line[field], job[field]) if position == "start" else (job[field], line[field])
                fields[field] = " ".join(both)
        processed = process_images(job.changed(fields, sampler=fields.pop("sampler_name", None)))
        if iterate:
            seed += job["batch_size"] * job["n_iter"]  # the body's, also after a line with its own
        pictures += processed.pictures
        prompts += processed.info["all_prompts"]
        infotexts += processed.info["infotexts"]
    # A1111 describes the request, which itself was never processed: no model, and the seed after the last line.
    info = unprocessed_info(job, seed)
    return Processed(pictures, {**info, "prompt": prompts[0], "all_prompts": prompts, "infotexts": infotexts})


def _read_line(line: str) -> dict[str, Any]:
    """`cmdargs`. A line that is not understood is a prompt as a whole."""
    if "--" not in line:
        return {"prompt": line}
    try:
        return _parse_options(shlex.split(line))
    except (ValueError, KeyError, IndexError):
        return {"prompt": line}


def _parse_options(words: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    at = 0
    while at < len(words):
        name, value = words[at].removeprefix("--"), words[at + 1]
        if name == words[at]:
            raise ValueError(f'must start with "--": {name}')
        at += 2
        if name in ("prompt", "negative_prompt"):
            while at < len(words) and not words[at].startswith("--"):
                value, at = f"{value} {words[at]}", at + 1
            options[name] = value
        else:
            options[name] = _LINE_OPTIONS[name](value)
    return options


# --- Prompt matrix ------------------------------------------------------------------------------------------------


def _prompt_matrix(
    job: Txt2ImgJob, at_start: bool, different_seeds: bool, kind: str, delimiter: str, margin: int
) -> Processed:
    if kind not in ("positive", "negative"):
        raise WebUIError("ValueError", f"Unknown prompt type {kind}")
    if delimiter not in ("comma", "space"):
        raise WebUIError("ValueError", f"Unknown variations delimiter {delimiter}")
    field = "prompt" if kind == "positive" else "negative_prompt"
    base, *parts = str(job[field]).split("|")
    prompts = []
    for number in range(2 ** len(parts)):
        chosen = [part.strip().strip(",") for index, part in enumerate(parts) if number & 1 << index]
        prompts.append((", " if delimiter == "comma" else " ").join([*chosen, base] if at_start else [base, *chosen]))
    seed = fixed_seed(job["seed"])
    seeds = [seed + (index if different_seeds else 0) for index in range(len(prompts))]
    fields = {field: prompts, "seed": seeds, "subseed": fixed_seed(job["subseed"])}
    processed = process_images(job.changed({**fields, "n_iter": math.ceil(len(prompts) / job["batch_size"])}))
    infotexts = processed.info["infotexts"]
    grid = Picture(draw_grid(processed.pictures, job.settings, rows=1 << len(parts) // 2))
    info = {**processed.info, "index_of_first_image": 1, "infotexts": [infotexts[0], *infotexts]}
    return Processed([grid, *processed.pictures], info)


# --- X/Y/Z plot ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ScriptAxis:
    """What the values of an axis are, and the job with one of them; `values` are all of the axis."""

    label: str
    type: type[int] | type[float] | type[str]
    apply: Callable[[Txt2ImgJob, Any, Sequence[Any]], Txt2ImgJob]


def _set_field(name: str) -> Callable[[Txt2ImgJob, Any, Sequence[Any]], Txt2ImgJob]:
    return lambda job, value, values: job.changed({name: value})


def _replace_in_prompt(job: Txt2ImgJob, value: Any, values: Sequence[Any]) -> Txt2ImgJob:
    searched = values[0]
    if searched not in job["prompt"] and searched not in job["negative_prompt"]:
        raise WebUIError("RuntimeError", f"Prompt S/R did not find {searched} in prompt or negative prompt.")
    return job.changed({name: job[name].replace(searched, value) for name in ("prompt", "negative_prompt")})


def _switch_checkpoint(job: Txt2ImgJob, value: Any, values: Sequence[Any]) -> Txt2ImgJob:
    found = job.process.files.checkpoints.find_closest(value)
    if found is None:
        raise WebUIError("RuntimeError", f"Unknown checkpoint: {value}")
    job.overrides["sd_model_checkpoint"] = found.name
    return job


_AXES: Mapping[int, _ScriptAxis] = {  # by their position in A1111's list; the others are not imitated
    0: _ScriptAxis("Nothing", int, lambda job, value, values: job),
    1: _ScriptAxis("Seed", int, _set_field("seed")),
    4: _ScriptAxis("Steps", int, _set_field("steps")),
    6: _ScriptAxis("CFG Scale", float, _set_field("cfg_scale")),
    7: _ScriptAxis("Prompt S/R", str, _replace_in_prompt),
    9: _ScriptAxis("Sampler", str, lambda job, value, values: job.changed({}, sampler=value)),
    11: _ScriptAxis("Checkpoint name", str, _switch_checkpoint),
}
_CHOICES = ("Sampler", "Checkpoint name")  # their values are those of the dropdown, unless `csv_mode`

_XYZ_ARGUMENTS = (
    *("x_type", "x_values", "x_values_dropdown", "y_type", "y_values", "y_values_dropdown", "z_type", "z_values"),
    *("z_values_dropdown", "draw_legend", "include_lone_images", "include_sub_grids", "no_fixed_seeds"),
    *("vary_seeds_x", "vary_seeds_y", "vary_seeds_z", "margin_size", "csv_mode"),
)


def _xyz_plot(job: Txt2ImgJob, *arguments: Any) -> Processed:
    given = dict(zip(_XYZ_ARGUMENTS, arguments, strict=True))
    if not given["no_fixed_seeds"]:
        job = job.changed({name: fixed_seed(job[name]) for name in ("seed", "subseed")})
    axes = {name: _axis(given[f"{name}_type"]) for name in "xyz"}
    texts = {name: _text_of_values(axes[name], given, name) for name in "xyz"}
    values = {name: _values(axes[name], texts[name]) for name in "xyz"}
    counts = [len(values[name]) for name in "xyz"]
    state = job.process.state
    state.job_count = math.prod(counts) * job["n_iter"] * (2 if job["enable_hr"] else 1)
    cells: dict[tuple[int, int, int], Processed] = {}
    grid_infotexts: dict[int, str] = {}
    for iz, iy, ix in itertools.product(*(range(len(values[name])) for name in "zyx")):
        state.job = f"{len(cells) + 1} out of {math.prod(counts)}"
        cell = copy.copy(job)
        for name, index in zip("xyz", (ix, iy, iz), strict=True):
            cell = axes[name].apply(cell, values[name][index], values[name])
        step = 1
        for name, index in zip("xyz", (ix, iy, iz), strict=True):
            if given[f"vary_seeds_{name}"]:
                cell, step = cell.changed({"seed": cell["seed"] + index * step}), step * len(values[name])
        cells[ix, iy, iz] = process_images(cell)
        if ix == iy == 0:
            grid_infotexts[1 + iz] = _grid_infotext(cell, axes, texts, values, given["no_fixed_seeds"], "xy")
            if iz == 0:
                grid_infotexts[0] = _grid_infotext(cell, axes, texts, values, given["no_fixed_seeds"], "xyz")
    return _assemble(job, cells, counts, [grid_infotexts[index] for index in range(1 + counts[2])], given)


def _assemble(
    job: Txt2ImgJob,
    cells: Mapping[tuple[int, int, int], Processed],
    counts: Sequence[int],
    grid_infotexts: list[str],
    given: Mapping[str, Any],
) -> Processed:
    """`draw_xyz_grid` and the end of `run`: grids before the cells, and lists that do not fit each other."""
    ordered = [cells[ix, iy, iz] for iz in range(counts[2]) for iy in range(counts[1]) for ix in range(counts[0])]
    per_grid = counts[0] * counts[1]
    cell_pictures = [cell.pictures[0] for cell in ordered]
    sub_grids = [
        Picture(draw_grid(cell_pictures[start : start + per_grid], job.settings, rows=counts[1]))
        for start in range(0, len(ordered), per_grid)
    ]
    grid = Picture(draw_grid(sub_grids, job.settings, rows=1))
    pictures = [grid, *sub_grids, *cell_pictures]
    prompts = [cell.info["prompt"] for cell in ordered]
    seeds = [cell.info["seed"] for cell in ordered]
    firsts = [index * per_grid for index in range(counts[2])]
    prompts, seeds = [prompts[at] for at in firsts] + prompts, [seeds[at] for at in firsts] + seeds
    infotexts = [*grid_infotexts, *(cell.info["infotexts"][0] for cell in ordered)]
    if not given["include_lone_images"]:
        del pictures[1 + counts[2] :]
    if not given["include_sub_grids"]:
        for entries in (pictures, prompts, seeds, infotexts):
            del entries[1 : 1 + counts[2]]
    of_first_cell = ordered[0].info  # A1111 takes the first cell's answer for the whole, and every cell shares its keys
    return Processed(
        pictures,
        {
            **of_first_cell,
            "all_prompts": prompts,
            "all_seeds": seeds,
            "extra_generation_params": job.extra_params,
            "index_of_first_image": 1,
            "infotexts": infotexts,
        },
    )


def _axis(position: int) -> _ScriptAxis:
    if position not in _AXES:
        raise HTTPException(501, f"A1111 has an X/Y/Z axis {position}, the sandbox does not")
    return _AXES[position]


def _text_of_values(axis: _ScriptAxis, given: Mapping[str, Any], name: str) -> str:
    """The values as one text, which a dropdown's are in the infotext too."""
    if axis.label not in _CHOICES or given["csv_mode"]:
        return str(given[f"{name}_values"])
    written = io.StringIO()
    csv.writer(written).writerow(given[f"{name}_values_dropdown"])
    return written.getvalue().strip()


def _values(axis: _ScriptAxis, text: str) -> list[Any]:
    if axis.label == "Nothing":
        return [0]
    words: list[Any] = []
    for word in itertools.chain.from_iterable(csv.reader(io.StringIO(text))):
        found = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", word) if axis.type is int else None
        words += range(int(found[1]), int(found[2]) + 1) if found else [word.strip()]
    values = [axis.type(word) for word in words]
    return [fixed_seed(value) for value in values] if axis.label == "Seed" else values


def _grid_infotext(
    cell: Txt2ImgJob,
    axes: Mapping[str, _ScriptAxis],
    texts: Mapping[str, str],
    values: Mapping[str, list[Any]],
    no_fixed_seeds: bool,
    shown: str,
) -> str:
    params = {**cell.extra_params, "Script": "X/Y/Z plot"}
    for name in shown:
        axis, letter = axes[name], name.upper()
        if axis.label == "Nothing":
            continue
        params |= {f"{letter} Type": axis.label, f"{letter} Values": texts[name]}
        if axis.label == "Seed" and not no_fixed_seeds:
            params[f"Fixed {letter} Values"] = ", ".join(str(value) for value in values[name])
    alone = copy.copy(cell)
    alone.extra_params = params
    model = cell.process.model.loaded
    assert model is not None  # it has drawn the cell
    return create_infotext(alone, model, 0)


def fixed_seed(seed: Any) -> int:
    """`fix_seed`."""
    return random.randrange(4294967294) if seed in (None, "", -1) else int(seed)


SCRIPTS: Mapping[str, Script] = {
    "prompts from file or textbox": Script(
        ("checkbox_iterate", "checkbox_iterate_batch", "prompt_position", "prompt_txt"), _prompts_from_file
    ),
    "prompt matrix": Script(
        ("put_at_start", "different_seeds", "prompt_type", "variations_delimiter", "margin_size"), _prompt_matrix
    ),
    "x/y/z plot": Script(_XYZ_ARGUMENTS, _xyz_plot),
}

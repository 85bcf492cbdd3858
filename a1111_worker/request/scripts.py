"""What the arguments of A1111's own selectable scripts ask for, and whether that is within the limits of a job.

The arguments of other scripts are not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from a1111_worker.domain import Task
from a1111_worker.errors import Complaint
from a1111_worker.request.fields import MAX_PROMPT, Field, Limits
from a1111_worker.request.img2img import img2img_fields
from a1111_worker.request.picture_scripts import LOOPBACK, SD_UPSCALE, read_loopback, read_sd_upscale
from a1111_worker.request.plot import read_plot
from a1111_worker.request.prompt_scripts import read_prompt_matrix, read_prompts_from_file
from a1111_worker.request.script_plan import PROMPTS, ScriptPlan, ScriptRun, too_many
from a1111_worker.request.size import final_size, size_problem
from a1111_worker.request.txt2img import txt2img_fields
from a1111_worker.request.values import InvalidValue, text

FROM_FILE = "prompts from file or textbox"
MATRIX = "prompt matrix"
PLOT = "x/y/z plot"
TAKE_ONE_PICTURE = (LOOPBACK, SD_UPSCALE)

_ARGUMENT_COUNTS = {FROM_FILE: 4, MATRIX: 5, PLOT: 18, LOOPBACK: 4, SD_UPSCALE: 4}
_REFUSED = ("img2img alternative test", "outpainting mk2", "poor man's outpainting")


def read_script(body: Mapping[str, Any], most: int, axes: Sequence[str] | None = None) -> ScriptPlan | None:
    """What the script of a body does, None if it has none, or one that is not A1111's own.

    `axes` are the names of the plot's axes in the WebUI's order; None: they are not known yet, and a plot's arguments
    are only counted. InvalidValue: the arguments cannot be read, or ask for more than `most` pictures. Its problems
    have paths below script_args.
    """
    name = str(body.get("script_name") or "").strip().lower()
    if name not in _ARGUMENT_COUNTS:
        return None
    args = body.get("script_args") or []
    if len(args) != _ARGUMENT_COUNTS[name]:
        # With fewer A1111 fails. What is too much would become arguments of other scripts.
        raise InvalidValue(f"must be the {_ARGUMENT_COUNTS[name]} arguments of {name}, not {len(args)}")
    if name == FROM_FILE:
        return read_prompts_from_file(args, body, most)
    if name == MATRIX:
        return read_prompt_matrix(args, body, most)
    if name == LOOPBACK:
        return read_loopback(args, body)
    if name == SD_UPSCALE:
        return read_sd_upscale(args, body)
    return None if axes is None else read_plot(args, body, most, axes)


def check_script(
    body: Mapping[str, Any], limits: Limits, axes: Sequence[str] | None = None, task: Task = Task.TXT2IMG
) -> list[Complaint]:
    """Everything that is wrong with the arguments of A1111's own scripts. `axes`: see `read_script`."""
    if str(body.get("script_name")).strip().lower() in _REFUSED:
        return [Complaint("script_name", "is refused: this worker cannot check what the script asks for")]
    table = img2img_fields(limits) if task is Task.IMG2IMG else txt2img_fields(limits)
    try:
        plan = read_script(body, limits.max_images, axes)
    except InvalidValue as error:
        return [Complaint(f"script_args{path}", message) for path, message in error.problems]
    if plan is None:
        return []
    complaints: dict[Complaint, None] = {}  # an ordered set: runs share values
    for run in plan.runs:
        for path, message in _problems_of(run, body, table, limits):
            complaints[Complaint(f"script_args{path}", message)] = None
    if plan.pictures > limits.max_images:
        complaints[Complaint("script_args", too_many(plan.pictures, limits.max_images))] = None
    return list(complaints)


def _problems_of(
    run: ScriptRun, body: Mapping[str, Any], table: Mapping[str, Field], limits: Limits
) -> Iterator[tuple[str, str]]:
    """What is wrong with the fields of a run, as paths below script_args and messages."""
    sound = True
    for name, value in run.fields.items():
        path, called = run.origins.get(name, ("", name))
        value_type = _ANY_PROMPT if name in PROMPTS else table[name].value
        try:
            value_type.check(value)
        except InvalidValue as error:
            sound = False
            yield from ((path, f"{called} {message}") for _, message in error.problems)
    changed = {**body, **run.fields}
    # An img2img may have no width and height yet; then it is checked once more when its pictures are there.
    if sound and not {"width", "height"}.isdisjoint(run.fields) and {"width", "height"} <= changed.keys():
        problem = size_problem(final_size(changed), limits.max_pixels)
        if problem is not None:
            path, called = next(run.origins[name] for name in ("width", "height") if name in run.origins)
            yield path, f"{called} {problem}"


_ANY_PROMPT = text(MAX_PROMPT, blank=True)  # of a picture of a script, which may leave a prompt empty

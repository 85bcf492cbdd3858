"""LoRA tags in the arguments of A1111's own scripts, under the WebUI's names for LoRAs.

A script makes the prompts of its pictures itself, from the job's prompt and its arguments. The WebUI gets both with its
own names for LoRAs. A script that replaces a part of a text may hit a part of such a name: then the picture would have
another LoRA, or none, and A1111 would tell nobody. So each prompt that A1111 will make of the new texts is compared
with the one that the caller's own texts give.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from a1111_worker.errors import Complaint, InvalidRequest
from a1111_worker.prompt import Placement, find_tags, rename, without_loras
from a1111_worker.request.script_plan import PROMPTS, ScriptPlan, ScriptRun, ScriptText
from a1111_worker.request.scripts import MATRIX, read_script
from a1111_worker.request.values import InvalidValue

_HITS_A_NAME = (
    "changes a part of a LoRA tag, and the WebUI has other names for LoRAs, with letters and digits that this would "
    "change too: let it replace whole tags (<lora:name:1>)"
)
_NO_LIMIT = 1_000_000  # pictures: the job's own limit was checked before


def separator_of(body: Mapping[str, Any]) -> str | None:
    """What separates the parts of a body's prompt that are each in some pictures alone. None: it has no such parts."""
    is_matrix = str(body.get("script_name") or "").lower() == MATRIX
    return "|" if is_matrix and list(body.get("script_args") or ())[2:3] == ["positive"] else None


@dataclass(frozen=True)
class RenamedScript:
    """script_args with the WebUI's names for LoRAs. `doubled` are the LoRAs that a picture's prompt names twice."""

    args: Sequence[Any]
    doubled: tuple[str, ...] = ()


def rename_in_script(
    body: Mapping[str, Any], weighed: str, placements: Sequence[Placement], axes: Sequence[str]
) -> RenamedScript:
    """The script_args of a body, rewritten for the WebUI.

    `body` has the WebUI's names in its prompt already, and the tags that were appended to it; `weighed` is the prompt
    with the caller's names, and without those. `axes`: see `read_script`. Raises InvalidRequest if A1111 would draw
    another prompt than the caller's texts mean.
    """
    args = list(body.get("script_args") or ())
    meant = _read({**body, "prompt": weighed}, axes)
    if meant is None or not placements:
        return RenamedScript(args)
    refused: InvalidRequest | None = None
    for texts in _rewritings(meant.texts, placements):
        new_args = args if texts == [text.text for text in meant.texts] else meant.args_with(texts)
        made = {**body, "script_args": new_args}
        try:
            plan = _read(made, axes)
            assert plan is not None
            _compare((meant, plan), made, weighed, placements)
        except InvalidRequest as error:
            refused = refused or error
            continue
        return RenamedScript(new_args, _doubled(plan, made))
    assert refused is not None
    raise refused


def _rewritings(texts: Sequence[ScriptText], placements: Sequence[Placement]) -> list[list[str]]:
    """The ways to write the texts for the WebUI. A value that is a LoRA's whole name may stand inside a tag, or not."""
    tags = [text.text if text.is_negative else rename(text.text, placements) for text in texts]
    names = [_name_of(text.text, placements) if text.is_value else None for text in texts]
    return [tags, [name or tag for name, tag in zip(names, tags, strict=True)]] if any(names) else [tags]


def _name_of(text: str, placements: Sequence[Placement]) -> str | None:
    return next((placement.name for placement in placements if placement.matches(text)), None)


def _read(body: Mapping[str, Any], axes: Sequence[str]) -> ScriptPlan | None:
    try:
        return read_script(body, _NO_LIMIT, axes)
    except InvalidValue as error:
        raise InvalidRequest([Complaint(f"script_args{path}", message) for path, message in error.problems]) from error


def _compare(
    plans: tuple[ScriptPlan, ScriptPlan], body: Mapping[str, Any], weighed: str, placements: Sequence[Placement]
) -> None:
    """Raise InvalidRequest if a picture's prompt is not what the caller's texts mean, but for names and added tags."""
    added = _tags(body["prompt"]) - _tags(rename(weighed, placements))
    for meant, made in zip(plans[0].runs, plans[1].runs, strict=True):
        for field in PROMPTS:
            expected = str(meant.fields.get(field, weighed if field == "prompt" else body.get(field, "")))
            found = str(made.fields.get(field, body.get(field, "")))
            if field == "prompt":
                expected = rename(expected, placements)
                tags, wanted = _tags(found), _tags(expected)
                is_same = not wanted - tags and not tags - wanted - added
                is_same = is_same and without_loras(found) == without_loras(expected)
            else:
                is_same = found == expected
            if not is_same:
                path, called = _origin(meant, field)
                raise InvalidRequest([Complaint(f"script_args{path}", f"{called} {_HITS_A_NAME}")])


def _origin(run: ScriptRun, field: str) -> tuple[str, str]:
    return run.origins.get(field, ("", "this script"))


def _tags(text: str) -> Counter[tuple[str, ...]]:
    return Counter((tag.type, *tag.arguments) for tag in find_tags(text) if tag.is_lora)


def _doubled(plan: ScriptPlan, body: Mapping[str, Any]) -> tuple[str, ...]:
    """What A1111 applies twice: LoRAs that one prompt names twice."""
    doubled: dict[str, None] = {}  # an ordered set
    for run in plan.runs:
        names = Counter(tag.name for tag in find_tags(str(run.fields.get("prompt", body["prompt"]))) if tag.is_lora)
        doubled |= dict.fromkeys(name for name, count in names.items() if count > 1)
    return tuple(doubled)

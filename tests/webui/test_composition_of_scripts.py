"""What the WebUI gets of A1111's own scripts: their LoRAs under the WebUI's names, and no name that does nothing."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest

from a1111_worker.domain import GenerationRequest, HeldModels, Model, Task
from a1111_worker.errors import InvalidRequest, ModelNotFound
from a1111_worker.webui.composition import compose
from a1111_worker.webui.resolution import WebUILists, resolve
from a1111_worker.webui.responses import Style, parse_script_axes
from a1111_worker.webui.verification import GenerationPlan
from tests.support import DATA
from tests.webui.test_composition import lists, parse
from tests.webui.test_composition import model as lora_model

AXES = parse_script_axes(json.loads((DATA / "webui-1.9.3" / "script_info.json").read_text())["response"]["body"])[
    Task.TXT2IMG
]


def model(name: str) -> Model:
    return replace(lora_model(name), sha256=hashlib.sha256(name.encode()).hexdigest())


ONE, TWO = model("one").shown, model("two").shown


def from_file(text: str, position: str = "start") -> dict[str, Any]:
    return {"script_name": "prompts from file or textbox", "script_args": [False, False, position, text]}


def matrix(kind: str = "positive", *, at_start: bool = False) -> dict[str, Any]:
    return {"script_name": "prompt matrix", "script_args": [at_start, False, kind, "comma", 0]}


def plot(axis: str, values: str | list[str]) -> dict[str, Any]:
    written = [values, []] if isinstance(values, str) else ["", values]
    rest = [0, "", [], 0, "", [], True, True, False, False, False, False, False, 0, False]
    return {"script_name": "x/y/z plot", "script_args": [AXES.index(axis), *written, *rest]}


def resolved(request: GenerationRequest, **changes: Any) -> GenerationRequest:
    return resolve(request, lists(script_axes=AXES, **changes))


def planned(raw: dict[str, Any], **changes: Any) -> GenerationPlan:
    """The plan of a job whose LoRAs are all there. `changes` are those of the WebUI's lists."""
    request = resolved(parse(**raw), **changes)
    return compose(request, HeldModels({lora.ref: model(lora.ref.name or "") for lora in request.loras}), AXES)


def complaint_of(raw: dict[str, Any], **changes: Any) -> tuple[str, str]:
    with pytest.raises(InvalidRequest) as refused:
        planned(raw, **changes)
    (complaint,) = refused.value.complaints
    return complaint.path, complaint.message


# the script, the prompt and what becomes of the script's text, with the LoRAs of the job
TEXTS: dict[str, tuple[dict[str, Any], str, str, list[str]]] = {
    "a line is a prompt": (from_file("red <lora:one:0.5>\nblue"), "a cat", f"red <lora:{ONE}:0.5>\nblue", ["one"]),
    "a line with options": (
        from_file("--prompt 'red <lora:one:0.5>' --steps 3"),
        "a cat",
        f"--prompt 'red <lora:{ONE}:0.5>' --steps 3",
        ["one"],
    ),
    "weights and repeated tags stay": (
        from_file("<lora:one:0.5:1> <lora:one:2> <lora:one>"),
        "a cat",
        f"<lora:{ONE}:0.5:1> <lora:{ONE}:2> <lora:{ONE}>",
        ["one"],
    ),
    "without a tag nothing changes": (
        from_file("  red \n\n--steps   3"),
        "<lora:one:1>",
        "  red \n\n--steps   3",
        ["one"],
    ),
    "a comment is no tag": (from_file("red # <lora:one:1>"), "<lora:two:1>", "red # <lora:one:1>", ["two"]),
    "whole tags": (
        plot("Prompt S/R", "<lora:one:1>,<lora:two:0.5>,dog"),
        "a cat <lora:one:1>",
        f"<lora:{ONE}:1>,<lora:{TWO}:0.5>,dog",
        ["one", "two"],
    ),
    "whole names": (plot("Prompt S/R", "one,two"), "a cat <lora:one:0.7>", f"{ONE},{TWO}", ["one", "two"]),
    "a word beside a tag": (plot("Prompt S/R", "cat,dog"), "a cat <lora:one:1>", "cat,dog", ["one"]),
    "a word that is a LoRA's name too": (plot("Prompt S/R", "cat,one"), "a cat <lora:one:1>", "cat,one", ["one"]),
    "a weight": (plot("Prompt S/R", ":0.7>,:0.9>"), "a cat <lora:one:0.7>", ":0.7>,:0.9>", ["one"]),
    "the order of tags": (
        plot("Prompt order", "<lora:one:1>,cat"),
        "a <lora:one:1> cat",
        f"<lora:{ONE}:1>,cat",
        ["one"],
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_texts_of_a_script_get_the_webuis_names_for_loras(name: str) -> None:
    script, prompt, text, loras = TEXTS[name]

    plan = planned({"prompt": prompt, **script})

    given = script["script_args"]
    place = 3 if script["script_name"].startswith("prompts") else 1
    assert plan.body["script_args"] == [*given[:place], text, *given[place + 1 :]]
    assert [lora.name for lora in plan.loras] == loras


def test_a_lora_of_a_script_alone_is_asked_for_at_its_place_with_its_own_weight() -> None:
    request = resolved(parse(**from_file("<lora:detail_tweaker_xl>\n--negative_prompt <lora:not_read:1>")))

    (lora,) = request.loras
    assert (lora.path, lora.scale, lora.ref.version_id, lora.in_prompt) == ("script_args[3]", 1.0, 135867, True)


def test_the_loras_of_the_list_are_in_every_picture_of_a_matrix() -> None:
    body = planned({"prompt": "a cat|red|<lora:two:0.5> blue", "loras": ["one"], **matrix()}).body

    assert body["prompt"] == f"a cat <lora:{ONE}:1>|red|<lora:{TWO}:0.5> blue"


def test_a_lora_may_be_in_several_parts_of_a_matrix_but_not_in_the_first_one_too() -> None:
    body = planned({"prompt": "a <lora:one:1>|red <lora:one:1>|<lora:two:1> x|<lora:two:1> y", **matrix()}).body

    assert body["prompt"] == f"a <lora:{ONE}:1>|red  |<lora:{TWO}:1> x|<lora:{TWO}:1> y"


def test_a_matrix_of_the_negative_prompt_leaves_the_prompt_in_one_piece() -> None:
    body = planned({"prompt": "a|cat", "negative_prompt": "x|y", "loras": ["one"], **matrix("negative")}).body

    assert body["prompt"] == f"a|cat <lora:{ONE}:1>"


@pytest.mark.parametrize(
    ("prompt", "values"),
    [
        ("a cat <lora:one:1>", "a,b"),  # hits letters of the hash
        ("a cat <lora:x-000001:1>", "000001,000002"),
        ("a cat <lora:cat:1>", "cat,dog"),  # the word and the name at once
    ],
)
def test_a_replacement_that_would_change_a_part_of_a_loras_name_is_refused(prompt: str, values: str) -> None:
    path, message = complaint_of({"prompt": prompt, **plot("Prompt S/R", values)})

    assert path == "script_args[1]"
    assert message.startswith("Prompt S/R changes a part of a LoRA tag")


def test_a_tag_that_the_list_gives_another_weight_is_not_found_by_a_replacement() -> None:
    script = plot("Prompt S/R", "<lora:one:1>,dog")

    path, message = complaint_of({"prompt": "a <lora:one:1>", "loras": [{"name": "one", "scale": 0.5}], **script})

    assert (path, message) == ("script_args[1]", "Prompt S/R looks for '<lora:one:1>', which is in no prompt")


def test_a_lora_that_a_line_names_beside_the_list_acts_twice_and_that_is_said() -> None:
    plan = planned({"loras": ["one"], **from_file("red <lora:one:0.5>\nblue")})

    assert plan.warnings == ("the prompt of a picture names the LoRA 'one' twice, so it acts twice there",)


def test_a_lora_that_could_not_be_had_is_left_out_of_a_script_too() -> None:
    request = resolved(parse(on_lora_error="warn", **from_file("red <lora:one:0.5>\nblue")))

    plan = compose(request, HeldModels(failures={request.loras[0].ref: ModelNotFound("nobody knows it")}), AXES)

    assert plan.body["script_args"][3] == "red  \nblue"


@pytest.mark.parametrize(
    ("script", "path", "message"),
    [
        (from_file("<lora:one:much>"), "script_args[3]", "holds <lora:one>: its weight must be a number"),
        (
            plot("Prompt S/R", "cat,<hypernet:x:1>"),
            "script_args[1]",
            "holds <hypernet:x>: this worker has no hypernetworks",
        ),
        (plot("Hires upscaler", ["LDSR"]), "script_args[2]", "the file of 'LDSR' is not there"),
        (plot("Hires upscaler", ["Lanczoss"]), "script_args[2]", "unknown upscaler 'Lanczoss'"),
        (plot("Hires upscaler", ["lanczos"]), "script_args[2]", "must be written 'Lanczos', not 'lanczos'"),
        (plot("Styles", ["plain,plian"]), "script_args[2]", "unknown style 'plian'; the nearest: 'plain'"),
        (
            plot("Styles", ["detailed"]),
            "script_args[2]",
            "the style 'detailed' has LoRA tags: give it in the field styles",
        ),
        (plot("Face restore", "true"), "script_args[1]", "is refused: the files for it are not there"),
        (plot("Face restore", "CodeFormer"), "script_args[1]", "is refused: the files for it are not there"),
        (from_file("--restore_faces true"), "script_args[3]", "is refused: the files for it are not there"),
    ],
)
def test_what_a_script_names_is_checked_like_the_fields_of_the_body(
    script: dict[str, Any], path: str, message: str
) -> None:
    styles = {"plain": Style("plain", "film grain"), "detailed": Style("detailed", "<lora:one:1>")}
    hires = {"enable_hr": True, "denoising_strength": 0.5, "hr_scale": 1.5}

    found = complaint_of(
        {"prompt": "a cat", **hires, **script},
        styles=styles,
        missing_upscalers=("LDSR",),
        face_restorers=(),
    )

    assert found[0] == path
    assert message in found[1]


def test_what_is_there_is_passed_on() -> None:
    styles = {"plain": Style("plain", "film grain")}
    there: WebUILists = lists(script_axes=AXES, styles=styles, face_restorers=("CodeFormer",))
    held = HeldModels()

    for script in (plot("Hires upscaler", ["Lanczos"]), plot("Styles", ["plain"]), plot("Face restore", "true,false")):
        body = compose(resolve(parse(**script), there), held, AXES).body
        assert body["script_args"] == script["script_args"]


def test_the_models_of_a_job_are_named_once_in_its_plan() -> None:
    one: Model = model("one")
    request = resolved(parse(prompt="<lora:one:1>", **from_file("red <lora:One:0.5>")))

    plan = compose(request, HeldModels(dict.fromkeys((lora.ref for lora in request.loras), one)), AXES)

    assert [lora.name for lora in plan.loras] == ["one"]
    assert plan.body["script_args"][3] == f"red <lora:{ONE}:0.5>"

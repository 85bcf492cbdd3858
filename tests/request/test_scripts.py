"""What A1111's own scripts make of their arguments, compared with what A1111 made, and the limits of a job."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1111_worker.domain import Task
from a1111_worker.request.fields import MAX_PROMPT, Limits
from a1111_worker.request.script_plan import ScriptPlan
from a1111_worker.request.scripts import FROM_FILE, MATRIX, PLOT, check_script, read_script
from a1111_worker.request.values import InvalidValue
from a1111_worker.webui.responses import parse_script_axes
from tests.request.helpers import complaints
from tests.support import DATA, parse_generation

VERSIONS = ("1.9.3", "1.10.1")
AXES = parse_script_axes(json.loads((DATA / "webui-1.9.3" / "script_info.json").read_text())["response"]["body"])[
    Task.TXT2IMG
]
LIMITS = Limits()
BODY = {"prompt": "a cat", "steps": 25, "width": 1024, "height": 1024}


def body_of(script: str, *args: Any, **fields: Any) -> dict[str, Any]:
    return {**BODY, "script_name": script, "script_args": list(args), **fields}


def from_file(text: Any, position: str = "start", **fields: Any) -> dict[str, Any]:
    return body_of(FROM_FILE, False, False, position, text, **fields)


def matrix(prompt: str, *, at_start: bool = False, joint: str = "comma", **fields: Any) -> dict[str, Any]:
    return body_of(MATRIX, at_start, False, "positive", joint, 0, prompt=prompt, **fields)


def plot(*axes: tuple[str, Any], csv_mode: bool = False, **fields: Any) -> dict[str, Any]:
    """A plot with up to three axes, each with its values as a text or as a list."""
    args: list[Any] = []
    for name, values in (*axes, *[("Nothing", "")] * 3)[:3]:
        args += [AXES.index(name), *(("", values) if isinstance(values, list) else (values, []))]
    return body_of(PLOT, *args, True, True, False, False, False, False, False, 0, csv_mode, **fields)


def planned(body: Mapping[str, Any], most: int = 16) -> ScriptPlan:
    plan = read_script(body, most, AXES)
    assert plan is not None
    return plan


def problems(body: Mapping[str, Any], most: int = 16) -> list[tuple[str, str]]:
    with pytest.raises(InvalidValue) as refused:
        read_script(body, most, AXES)
    return list(refused.value.problems)


# -- what A1111 made ---------------------------------------------------------------------------------------------------


def recorded(version: str) -> list[Any]:
    jobs: list[Any] = json.loads((DATA / f"webui-{version}" / "pictures_of_scripts.json").read_text())
    return jobs


RECORDED = [
    pytest.param(version, job, id=f"{version} {job['name']}") for version in VERSIONS for job in recorded(version)
]


def picture_texts(job: Mapping[str, Any]) -> list[str]:
    """The texts of the pictures that are no grids."""
    if any(job["png_infotexts"]):
        return [text for text in job["png_infotexts"] if text]
    return list(job["infotexts"][1:])  # the pictures are in the grid alone


@pytest.mark.parametrize(("version", "job"), RECORDED)
def test_a_plan_has_the_pictures_that_a1111_made_with_their_prompts_steps_and_sizes(
    version: str, job: Mapping[str, Any]
) -> None:
    body = job["body"]
    if "sd_model" in json.dumps(body["script_args"]):
        assert "--sd_model is refused" in problems(body)[0][1]
        return

    plan = planned(body)

    runs = [(run, number) for run in plan.runs for number in range(run.pictures)]
    texts = picture_texts(job)
    if body["script_name"] == PLOT:
        texts = texts[:: body.get("batch_size", 1)]  # a plot shows the first picture of each cell
    assert len(runs) == len(texts)
    for (run, number), text in zip(runs, texts, strict=True):
        fields = {**body, **run.fields}
        prompt, settings_line = text.rsplit("\n", 1)
        assert prompt.partition("\nNegative prompt: ")[0] == fields["prompt"]
        assert f"Steps: {fields['steps']}, " in settings_line
        assert f"Size: {fields['width']}x{fields['height']}, " in settings_line
        if "seed" in run.fields:
            assert f"Seed: {run.fields['seed'] + number}, " in settings_line


@pytest.mark.parametrize(("version", "job"), RECORDED)
def test_texts_that_are_written_back_as_they_were_change_nothing(version: str, job: Mapping[str, Any]) -> None:
    if "sd_model" in json.dumps(job["body"]["script_args"]):
        return
    plan = planned(job["body"])

    again = planned({**job["body"], "script_args": plan.args_with([text.text for text in plan.texts])})

    assert [run.fields for run in again.runs] == [run.fields for run in plan.runs]
    assert again.texts == plan.texts


# -- prompts from file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("red", {"prompt": "red a cat"}),
        ("  red  ", {"prompt": "red a cat"}),
        ("--prompt red house --steps 3", {"prompt": "red house a cat", "steps": 3}),
        ('--prompt "red  house"', {"prompt": "red  house a cat"}),
        ("--steps 3", {"steps": 3}),
        ("--negative_prompt dark -- --steps 3", None),  # `--` is an option that A1111 does not know
        ("--negative_prompt dark", {"negative_prompt": "dark"}),
        (
            "--cfg_scale 1e1 --tiling true --restore_faces yes",
            {"cfg_scale": 10.0, "tiling": True, "restore_faces": False},
        ),
        ("--steps 3 --steps 4", {"steps": 4}),
        ("--sampler_index 5 --do_not_save_grid false", {}),
        # A1111 fails to read these, and takes them for prompts
        ("red --steps 3", None),
        ("--steps three", None),
        ("--steps", None),
        ("--nope 3", None),
        ("--prompt it's --steps 3", None),
    ],
)
def test_a_line_is_read_as_a1111_reads_it(line: str, fields: dict[str, Any] | None) -> None:
    (run,) = planned(from_file(line)).runs

    assert run.fields == ({"prompt": f"{line} a cat"} if fields is None else fields)


def test_a_line_may_stand_behind_the_prompt_and_alone() -> None:
    assert planned(from_file("red", "end")).runs[0].fields == {"prompt": "a cat red"}
    assert planned(from_file("red", prompt="")).runs[0].fields == {"prompt": "red"}


def test_a_line_makes_as_many_pictures_as_it_says_or_the_job() -> None:
    plan = planned(from_file("red\n\n--n_iter 3 --prompt blue", batch_size=2))

    assert [run.pictures for run in plan.runs] == [2, 6]
    assert plan.pictures == 8


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--steps 151", "line 2: --steps must be a whole number from 1 to 150, not 151"),
        ("--width 4096", "line 2: --width must be a multiple of 8 from 64 to 2048, not 4096"),
        ("--width 2048 --height 2048", None),
        ("--cfg_scale nan", "line 2: --cfg_scale must be a number from 0 to 100, not nan"),
        ("--batch_size 0", "line 2: --batch_size must be a whole number from 1 to 16, not 0"),
        ("--seed 99999999999", "line 2: --seed must be a whole number from -1 to 4294967295, not 99999999999"),
        ("--sd_model other", "line 2: --sd_model is refused: the checkpoint is this worker's, not the job's"),
        ("--outpath_samples /x", "line 2: --outpath_samples is refused: nothing is kept on the worker's disk"),
        ("--styles photo", "line 2: --styles is refused: the WebUI takes each letter for a style"),
        ("--n_iter 16", "asks for 17 pictures, and the limit is 16"),
        ("red\n" * 16, "asks for at least 17 pictures, and the limit is 16"),
        ("x" * MAX_PROMPT, "line 2: --prompt must be at most 20,000 bytes of UTF-8, not 20,006"),
        ("x" * 5 * MAX_PROMPT, "must be at most 100,000 bytes of UTF-8"),
    ],
)
def test_a_line_is_held_to_the_limits_of_a_job(line: str, message: str | None) -> None:
    found = check_script(from_file(f"blue\n{line}"), LIMITS)

    assert len(found) == (message is not None)
    assert message is None or (found[0].path.startswith("script_args") and found[0].message.startswith(message))


def test_the_size_of_a_line_counts_with_the_jobs_hires() -> None:
    hires: dict[str, Any] = {"enable_hr": True, "denoising_strength": 0.5, "hr_scale": 2}

    (complaint,) = check_script(from_file("--width 2048 --prompt x", **hires), LIMITS)

    assert complaint.message == (
        "line 1: --width asks for a picture of 4096×2048: 8,388,608 pixels, and the limit is 4,194,304"
    )
    assert check_script(from_file("--width 512 --height 512 --prompt x", **hires), LIMITS) == []


def test_the_texts_of_lines_are_their_prompts_and_can_be_written_back() -> None:
    plan = planned(from_file("red <lora:a:1>\n--steps 3 --prompt it\\'s <lora:b:1> --negative_prompt 'dark \"x\"'"))

    assert [(text.text, text.is_negative) for text in plan.texts] == [
        ("red <lora:a:1>", False),
        ("it's <lora:b:1>", False),
        ('dark "x"', True),
    ]
    again = planned({**BODY, "script_name": FROM_FILE, "script_args": plan.args_with(["one", "it's two", 'three "3"'])})
    assert [run.fields for run in again.runs] == [
        {"prompt": "one a cat"},
        {"steps": 3, "prompt": "it's two a cat", "negative_prompt": 'three "3"'},
    ]


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet="-ps a'\"\\3<>\n#", max_size=30), st.text(alphabet="ab '\"\\", min_size=1, max_size=8))
def test_any_text_can_be_read_and_written_back(text: str, new: str) -> None:
    body = from_file(f"--prompt {text}\n--steps 3 --prompt {text}")
    try:
        plan = planned(body, 100)
    except InvalidValue:
        return

    again = planned({**body, "script_args": plan.args_with([one.text for one in plan.texts])}, 100)

    assert again.texts == plan.texts
    assert [run.fields for run in again.runs] == [run.fields for run in plan.runs]


# -- prompt matrix -----------------------------------------------------------------------------------------------------


def test_a_matrix_combines_the_parts_of_a_prompt() -> None:
    assert [run.fields["prompt"] for run in planned(matrix("a cat|red, |big")).runs] == [
        "a cat",
        "a cat, red",
        "a cat, big",
        "a cat, red, big",
    ]
    assert [run.fields["prompt"] for run in planned(matrix("a cat|red", at_start=True, joint="space")).runs] == [
        "a cat",
        "red a cat",
    ]
    assert planned(matrix("a cat|red", batch_size=2)).pictures == 2


@pytest.mark.parametrize("parts", [5, 20_000])
def test_a_matrix_of_too_many_parts_is_refused_before_it_is_computed(parts: int) -> None:
    (complaint,) = check_script(matrix("|" * parts), LIMITS)

    assert complaint.path == "script_args"
    assert complaint.message == (
        f"asks for 2 to the power of {parts} pictures, and the limit is 16: prompt has {parts} |"
    )
    assert check_script(matrix("a|b|c|d|e"), LIMITS) == []
    assert check_script(matrix("a|b|c|d|e"), Limits(max_images=15)) != []


@pytest.mark.parametrize(
    ("changed", "value", "message"),
    [
        (2, "both", "must be 'positive' or 'negative'"),
        (3, "dot", "must be 'comma' or 'space'"),
        (4, 1e9, "must be a whole number from 0 to 500"),
        (4, None, "must be a whole number from 0 to 500"),
    ],
)
def test_the_arguments_of_a_matrix_are_checked(changed: int, value: Any, message: str) -> None:
    body = matrix("a|b")
    body["script_args"][changed] = value

    (complaint,) = check_script(body, LIMITS)

    assert complaint.path == f"script_args[{changed}]"
    assert complaint.message.startswith(message)


# -- x/y/z plot --------------------------------------------------------------------------------------------------------


def test_the_axes_of_a_plot_are_numbered_by_the_webui() -> None:
    assert (AXES[1], AXES[4], AXES[7]) == ("Seed", "Steps", "Prompt S/R")


def test_a_plot_makes_each_combination_x_first() -> None:
    plan = planned(plot(("Steps", "5, 6"), ("Seed", "1-2"), ("CFG Scale", "7")))

    assert [dict(run.fields) for run in plan.runs] == [
        {"steps": steps, "seed": seed, "cfg_scale": 7.0} for seed in (1, 2) for steps in (5, 6)
    ]
    assert planned(plot(("Seed", "1,2"), n_iter=2, batch_size=3)).pictures == 12


@pytest.mark.parametrize(
    ("axis", "written", "values"),
    [
        ("Steps", "1-4", [1, 2, 3, 4]),
        ("Steps", "1 - 9 (+3), 20", [1, 4, 7, 20]),
        ("Steps", "10-5 (-2)", [10, 8]),  # A1111 adds 1 to the end, whatever the step
        ("Steps", "10 - 40 [4]", [10, 20, 30, 40]),
        ("Steps", "7-7 [1], , 8", [7, 8]),
        ("CFG Scale", "1-2 (+0.5)", [1.0, 1.5, 2.0]),
        ("CFG Scale", "1-2 [3], 7.5", [1.0, 1.5, 2.0, 7.5]),
        ("CFG Scale", " 7 ", [7.0]),
        ("Size", "512x768, 64 x 64", [(512, 768), (64, 64)]),
        ("Face restore", "GFPGAN,no", [True, False]),
        ("Clip skip", "2", [{"CLIP_stop_at_last_layers": 2}]),
        ("SGM noise multiplier", ["True", "False"], [{"sgm_noise_multiplier": True}, {"sgm_noise_multiplier": False}]),
        ("Sampler", ["Euler", "DPM++ 2M, a"], ["Euler", "DPM++ 2M, a"]),
        ("Styles", ["a", "b,c"], [["a"], ["b", "c"]]),
        ("Schedule rho", "1-3", [None, None, None]),
    ],
)
def test_the_values_of_an_axis_are_read_as_a1111_reads_them(axis: str, written: Any, values: list[Any]) -> None:
    runs = planned(plot((axis, written))).runs

    found = [tuple(run.fields.values()) for run in runs]
    assert [one if len(one) > 1 else (one or (None,))[0] for one in found] == values


def test_an_axis_with_choices_may_be_text_too() -> None:
    body = plot(("Sampler", 'Euler, "DPM++ 2M"'), csv_mode=True)

    assert [run.fields["sampler_name"] for run in planned(body).runs] == ["Euler", "DPM++ 2M"]


def test_search_and_replace_replaces_the_first_value_in_both_prompts() -> None:
    body = plot(("Prompt S/R", 'cat, dog, "red, big"'), ("Prompt S/R", "a,the"), negative_prompt="no cat")

    plan = planned(body)

    assert [(run.fields.get("prompt", "a cat"), run.fields.get("negative_prompt")) for run in plan.runs] == [
        ("a cat", None),
        ("a dog", "no dog"),
        ("a red, big", "no red, big"),
        ("the cthet", "no cthet"),
        ("the dog", "no dog"),
        ("the red, big", "no red, big"),
    ]
    assert [text.text for text in plan.texts] == ["cat", "dog", "red, big", "a", "the"]
    written = plan.args_with(["<lora:x_1a2b:1>", "dog, or so", 'say "x"', "a", "the"])
    assert (written[1], written[4]) == ('<lora:x_1a2b:1>,"dog, or so","say ""x"""', "a,the")
    assert written[2:4] == body["script_args"][2:4] and written[5:] == body["script_args"][5:]


def test_prompt_order_makes_all_orders_of_the_parts() -> None:
    plan = planned(plot(("Prompt order", "red, big, cat"), prompt="a red and big cat!"))

    assert [run.fields["prompt"] for run in plan.runs] == [
        "a red and big cat!",
        "a red and cat big!",
        "a big and red cat!",
        "a big and cat red!",
        "a cat and red big!",
        "a cat and big red!",
    ]


# The job, the path below script_args, how the complaint begins.
REFUSED_PLOTS: list[tuple[dict[str, Any], str, str]] = [
    # limits of the fields
    (plot(("Steps", "5,500")), "[1]", "Steps must be a whole number from 1 to 150, not 500"),
    (plot(("Hires steps", "151")), "[1]", "Hires steps must be a whole number from 0 to 150"),
    (plot(("Size", "2048x4096")), "[1]", "Size must be a multiple of 8 from 64 to 2048, not 4096"),
    (plot(("Size", "large")), "[1]", "Size must be sizes like 512x768, not 'large'"),
    (plot(("Denoising", "0.00001")), "[1]", "Denoising must be 0, or a number from 0.01 to 1"),
    (plot(("Clip skip", "13")), "[1]", "Clip skip must be a whole number from 1 to 12"),
    (plot(("Seed", "1"), ("RNG source", ["TPU"])), "[5]", "RNG source must be one of GPU, CPU, NV"),
    (
        plot(("Size", "2048x2048"), enable_hr=True, denoising_strength=0.5),
        "[1]",
        "Size asks for a picture of 4096×4096",
    ),
    # how many pictures
    (plot(("Seed", "1-17")), "[1]", "Seed has more than 16 values"),
    (plot(("Seed", "1-1000000000")), "[1]", "Seed has more than 16 values"),
    (plot(("Seed", "1-5 [1000000000000]")), "[1]", "Seed has more than 16 values"),
    (plot(("CFG Scale", "1-2 (+0.0000001)")), "[1]", "CFG Scale has more than 16 values"),
    (plot(("Seed", "1-5"), ("Steps", "1-4")), "", "asks for 20 pictures, and the limit is 16"),
    (plot(("Seed", "1-5"), batch_size=4), "", "asks for 20 pictures, and the limit is 16"),
    (plot(("Prompt order", "a,b,c,d")), "[1]", "Prompt order asks for the 4! orders"),
    (plot(("Prompt order", ",".join("x" * 5_000))), "[1]", "Prompt order asks for the 5000! orders"),
    # what A1111 would fail on
    (plot(("Steps", "a")), "[1]", "Steps has a value that cannot be read"),
    (plot(("Steps", "1-5 (+0)")), "[1]", "Steps has a value that cannot be read"),
    (plot(("CFG Scale", "1-5 (+0)")), "[1]", "CFG Scale has a value that cannot be read"),
    (plot(("Steps", "1" * 20_000)), "[1]", "Steps has a value that cannot be read"),
    (plot(("Steps", " , ")), "[1]", "Steps has no values"),
    (plot(("Sampler", "Euler")), "[2]", "Sampler has no values"),
    (plot(("Prompt S/R", "dog,bird")), "[1]", "Prompt S/R looks for 'dog', which is in no prompt"),
    (plot(("Prompt S/R", f"a,{'b' * 15_000}")), "[1]", "Prompt S/R makes prompt longer than 20,000 bytes"),
    # other models
    (plot(("Checkpoint name", ["x"])), "[0]", "is the axis 'Checkpoint name', which is refused: the checkpoint is"),
    (plot(("Refiner checkpoint", ["x"])), "[0]", "is the axis 'Refiner checkpoint', which is refused"),
    (plot(("Seed", "1"), ("VAE", ["x"])), "[3]", "is the axis 'VAE', which is refused: give the VAE in the field vae"),
]


@pytest.mark.parametrize(("body", "path", "message"), REFUSED_PLOTS, ids=[row[2][:40] for row in REFUSED_PLOTS])
def test_a_plot_is_held_to_the_limits_of_a_job(body: dict[str, Any], path: str, message: str) -> None:
    (complaint,) = check_script(body, LIMITS, AXES)

    assert complaint.path == f"script_args{path}"
    assert complaint.message.startswith(message)


@pytest.mark.parametrize(
    ("changed", "value", "path", "message"),
    [
        (0, 99, "[0]", "must be the number of an axis, 0 to 39, not 99"),
        (0, -1, "[0]", "must be the number of an axis, 0 to 39, not -1"),
        (0, "Steps", "[0]", "must be the number of an axis, 0 to 39, not text"),
        (1, 5, "[1]", "Seed must be text, not 5"),
        (16, 501, "[16]", "must be a whole number from 0 to 500, not 501"),
    ],
)
def test_the_arguments_of_a_plot_are_checked(changed: int, value: Any, path: str, message: str) -> None:
    body = plot(("Seed", "1"))
    body["script_args"][changed] = value

    (complaint,) = check_script(body, LIMITS, AXES)

    assert (complaint.path, complaint.message) == (f"script_args{path}", message)


def test_an_axis_of_an_extension_is_refused() -> None:
    body = plot(("Seed", "1"))
    body["script_args"][0] = len(AXES)

    (complaint,) = check_script(body, LIMITS, [*AXES, "[Other] Steps"])

    assert complaint.message == (
        "is the axis '[Other] Steps', which is refused: this worker cannot check what it asks for"
    )


def test_every_axis_of_the_webui_is_known() -> None:
    for number, name in enumerate(AXES):
        body = plot(("Seed", "1"))
        body["script_args"][0] = number

        assert not any("cannot check" in complaint.message for complaint in check_script(body, LIMITS, AXES)), name


# -- at the door -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "args", "count"), [(FROM_FILE, ["x"], 4), ("Prompt Matrix", [], 5), ("X/Y/Z plot", [1] * 19, 18)]
)
def test_a_script_takes_exactly_its_arguments(script: str, args: list[Any], count: int) -> None:
    (complaint,) = complaints({"prompt": "x", "script_name": script, "script_args": args})

    assert complaint.path == "script_args"
    assert complaint.message == f"must be the {count} arguments of {script.lower()}, not {len(args)}"


def test_what_a_script_asks_for_is_complained_about_with_everything_else() -> None:
    found = complaints({"prompt": "x", "cfg_scale": -1, **{**from_file("--steps 500"), "steps": 0}})

    assert {complaint.path for complaint in found} == {"cfg_scale", "steps", "script_args[3]"}


def test_the_arguments_of_other_scripts_are_passed_on_unread() -> None:
    args = [{"steps": 500}, "1-1000000000"]

    request = parse_generation({"prompt": "x", "script_name": "My extension", "script_args": args}, LIMITS)

    assert request.body["script_args"] == args


HOSTILE: dict[str, Callable[[], dict[str, Any]]] = {
    "quotes": lambda: from_file("--prompt " + "'" * 90_000),
    "options": lambda: from_file("--steps 1 " * 9_000),
    "axis of digits": lambda: plot(("CFG Scale", "1" * 90_000)),
    "axis of ranges": lambda: plot(("Steps", "1-9," * 20_000)),
    "replaced letters": lambda: plot(("Prompt S/R", "a," + "b" * 90_000), prompt="a" * 20_000),
    "replaced nothing": lambda: plot(("Prompt S/R", '"",' + "b" * 19_000), prompt="a" * 19_000),
    "many orders": lambda: plot(("Prompt order", "x," * 45_000)),
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_script_gets_a_short_answer(body: Callable[[], dict[str, Any]]) -> None:
    found = check_script(body(), LIMITS, AXES)

    assert all(len(str(complaint)) < 500 for complaint in found)


ANY = st.none() | st.booleans() | st.integers(-2, 50) | st.text(max_size=6) | st.lists(st.text(max_size=3), max_size=2)


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from([(FROM_FILE, 4), (MATRIX, 5), (PLOT, 18)]).flatmap(
        lambda script: st.tuples(st.just(script[0]), st.lists(ANY, min_size=script[1], max_size=script[1]))
    )
)
def test_any_arguments_give_complaints_or_a_plan_within_the_limits(script: tuple[str, list[Any]]) -> None:
    body = body_of(script[0], *script[1])

    if check_script(body, LIMITS, AXES) == []:
        assert 1 <= planned(body).pictures <= 16
        assert all(re.fullmatch(r"\[\d+\]", text.path) for text in planned(body).texts)

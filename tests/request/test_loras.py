"""The LoRAs of a job: those of its list, and those of the tags in its prompts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1111_worker import catalog
from a1111_worker.domain import LoraRequest, Model, ModelKind, OnLoraError
from a1111_worker.errors import Complaint
from a1111_worker.prompt import Placement, place
from a1111_worker.request.loras import name_means, parse_list, read_tags, scale_of
from tests.request.helpers import URL, complaints, lora, parse


def test_loras_keep_their_order_and_may_be_named_in_every_way() -> None:
    request = parse(
        loras=[
            {"url": URL, "name": "Detail Tweaker XL", "scale": 1.5},
            "civitai:7@8",
            {"name": "Real Skin Slider"},
            {"version_id": 5, "scale": -10, "hash": None},
            "my_own",
            {"url": "https://cdn.example.com/x.safetensors"},
        ],
        on_lora_error="warn",
    )

    assert request.loras == (
        LoraRequest(lora(version_id=135867, name="Detail Tweaker XL", format="SafeTensor"), 1.5, "loras[0]"),
        LoraRequest(lora(version_id=8), None, "loras[1]"),
        LoraRequest(lora(version_id=1681921, name="Real Skin Slider"), None, "loras[2]"),
        LoraRequest(lora(version_id=5), -10, "loras[3]"),
        LoraRequest(lora(name="my_own"), None, "loras[4]"),
        LoraRequest(lora(url="https://cdn.example.com/x.safetensors"), None, "loras[5]"),
    )
    assert request.on_lora_error is OnLoraError.WARN


def test_a_scale_comes_from_the_job_else_from_the_catalog_else_it_is_one() -> None:
    known = catalog.LORAS[0]

    assert scale_of(LoraRequest(lora(version_id=known.version_id), 0.0, "loras[0]")) == 0.0
    assert scale_of(LoraRequest(lora(version_id=known.version_id), None, "loras[0]")) == known.scale
    assert scale_of(LoraRequest(lora(version_id=1), None, "loras[0]")) == 1.0


def test_the_scale_of_a_page_without_a_version_is_that_of_the_version_that_it_shows() -> None:
    known = catalog.LORAS[0]
    page = LoraRequest(lora(model_id=122359), None, "loras[0]")
    shown = Model(ModelKind.LORA, "a", "a.safetensors", Path("a"), "ab" * 32, 1, version_id=known.version_id)

    assert scale_of(page, shown) == known.scale
    assert scale_of(page, replace(shown, version_id=1)) == 1.0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"version_id": 5}, "civitai:1@5"),
        ({"version_id": 135867}, {"name": "detail_tweaker_xl"}),
        ({"name": "Detail Tweaker XL"}, "detail_tweaker_xl.safetensors"),
        ("civitai:1@5+6", "civitai:1@5"),
        ("civitai:1", "https://civitai.com/models/1"),
        ("own", {"name": "own.safetensors"}),
        ("https://cdn.example.com/x", "https://CDN.example.com:443/x"),
        ({"version_id": 5, "hash": "a" * 64}, {"version_id": 6, "hash": "A" * 64}),
    ],
)
def test_the_same_lora_twice_is_a_complaint(one: Any, other: Any) -> None:
    found = complaints({"prompt": "x", "loras": [one, "something else", other]})

    assert found == (Complaint("loras[2]", "is the same LoRA as loras[0]"),)


@pytest.mark.parametrize(
    ("one", "other"), [("own", "Own"), ("civitai:1@5+6", "civitai:1@5+7"), ("own", {"version_id": 5})]
)
def test_different_loras_are_not_the_same(one: Any, other: Any) -> None:
    assert len(parse(loras=[one, other]).loras) == 2


def test_tags_in_prompts_are_loras_too_after_those_of_the_list() -> None:
    request = parse(
        prompt="<lora:own:0.5> a <lyco:detail_tweaker_xl> cat <lora:split:0.2:0.4>",
        hr_prompt="<lora:own:0.9> <lora:fine:1>",
        enable_hr=True,
        denoising_strength=0.5,
        loras=[{"version_id": 5}],
    )

    assert request.loras == (
        LoraRequest(lora(version_id=5), None, "loras[0]"),
        LoraRequest(lora(name="own"), 0.5, "prompt", in_prompt=True),
        LoraRequest(lora(version_id=135867, name="detail_tweaker_xl"), None, "prompt", in_prompt=True),
        LoraRequest(lora(name="split"), 0.4, "prompt", in_prompt=True),
        LoraRequest(lora(name="fine"), 1.0, "hr_prompt", in_prompt=True),
    )
    assert request.body["prompt"] == "<lora:own:0.5> a <lyco:detail_tweaker_xl> cat <lora:split:0.2:0.4>"
    assert request.warnings == ()


@pytest.mark.parametrize(
    ("job", "warning"),
    [
        # the list wins if it says something else
        ({"prompt": "<lora:own:0.5>", "loras": [{"name": "own", "scale": 1}]}, "1 counts"),
        ({"prompt": "<lora:own:1:0.5>", "loras": [{"name": "own", "scale": 1}]}, "1 counts"),
        # A1111 would apply it twice
        ({"prompt": "<lora:own:1> <lora:own:2>"}, "more than once"),
        ({"prompt": "<lora:Real Skin Slider:1> <lora:real_skin_slider:2>"}, "more than once"),
        # tags that do nothing
        ({"negative_prompt": "<lora:own:1>"}, "negative_prompt"),
        ({"hr_negative_prompt": "<lora:own:1>"}, "hr_negative_prompt"),
        ({"hr_prompt": "<lora:own:1>"}, "without enable_hr"),
        ({"prompt": "a <heart:3>"}, "does nothing"),
    ],
)
def test_a_tag_that_does_not_do_what_it_says_is_a_warning(job: dict[str, Any], warning: str) -> None:
    request = parse(**job)

    assert len(request.warnings) == 1
    assert warning in request.warnings[0]


def test_a_tag_of_a_listed_lora_gives_that_entry_its_scale() -> None:
    request = parse(
        prompt="<lora:own:0.5> <lora:some_style_7:0.6> <lora:detail_tweaker_xl:0.7>",
        loras=[{"url": "https://cdn.example.com/x", "name": "own"}, {"version_id": 7}, "civitai:1@135867"],
    )

    assert [(lora.path, lora.scale) for lora in request.loras] == [
        ("loras[0]", 0.5),
        ("loras[1]", 0.6),
        ("loras[2]", 0.7),
    ]
    assert request.warnings == ()


def test_a_name_of_the_catalog_always_means_the_version_of_the_catalog() -> None:
    stranger = lora(version_id=999, name="detail_tweaker_xl")

    assert not name_means("detail_tweaker_xl", stranger)
    assert name_means("detail_tweaker_xl", lora(version_id=135867))
    assert not name_means("some_style_7", lora(version_id=8, name="other"))


def test_a_job_may_have_16_loras_with_those_of_its_tags() -> None:
    tags = "".join(f"<lora:t{number}:1>" for number in range(8))

    assert len(parse(prompt=tags, loras=[{"version_id": one} for one in range(1, 9)]).loras) == 16
    assert complaints({"prompt": tags, "loras": [{"version_id": one} for one in range(1, 10)]})[0].path == "prompt"
    assert complaints({"prompt": "x", "loras": ["a"] * 17}) == (Complaint("loras", "must be at most 16 LoRAs, not 17"),)


def test_the_tags_of_a_style_join_the_loras_of_the_job() -> None:
    listed = parse(loras=["own"]).loras

    read, wrong = read_tags("<lora:own:1> <lora:fine:0.5>", "styles", listed), read_tags("<lora:x:much>", "styles", ())

    assert read.loras[len(listed) :] == (LoraRequest(lora(name="fine"), 0.5, "styles", in_prompt=True),)
    assert wrong.complaints == (Complaint("styles", "holds <lora:x>: its weight must be a number"),)


def test_an_entry_with_a_broken_scale_still_names_its_lora() -> None:
    items = [{"version_id": 5, "scale": float("nan")}, "civitai:1@5", {"version_id": 6, "name": "\ud800"}]

    parsed = parse_list(items, {"loras[0].scale", "loras[2].name"}, ())

    assert [(request.path, request.ref) for request in parsed.loras] == [
        ("loras[0]", lora(version_id=5)),
        ("loras[1]", lora(version_id=5)),
    ]
    assert parsed.complaints == (Complaint("loras[1]", "is the same LoRA as loras[0]"),)


def test_the_same_warning_is_given_once_and_foreign_tags_warn_16_times_at_most() -> None:
    parsed = read_tags("<x:1> <x:1> " + "".join(f"<t{number}:1>" for number in range(30)), "prompt", ())

    assert len(parsed.warnings) == len(set(parsed.warnings)) == 16
    assert (parsed.loras, parsed.complaints) == ((), ())


def test_a_prompt_full_of_half_tags_is_read_at_once() -> None:
    request = parse(prompt="<a:" * 6_600, negative_prompt="<" * 20_000, hr_prompt="<lora:" * 3_000 + "#>" * 500)

    assert request.loras == ()


def calls_of(work: Callable[[], object]) -> int:
    """How many functions are called, Python's own among them. Unlike time, it is the same on every machine."""
    count = 0

    def counted(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


LISTED = [{"version_id": number} for number in range(1, 16)]
# Prompts of many tags. Each is repeated to the length that is asked for.
MANY_TAGS: dict[str, Callable[[int], str]] = {
    "one name": lambda count: "<lora:a>" * count,
    "16 names, then the last of them": lambda count: (
        "".join(f"<lora:t{number}:1>" for number in range(16)) + "<lora:t15:0.5>" * count
    ),
    "many spellings of a listed LoRA": lambda count: "".join(f"<lora:s{number}_15:2>" for number in range(count)),
    "tags of no type": lambda count: "".join(f"<t{number}:1>" for number in range(count)),
    "weights that are no numbers": lambda count: "".join(f"<lora:t{number}:x>" for number in range(count)),
}


@pytest.mark.parametrize("loras", [[], LISTED], ids=["no list", "15 listed"])
@pytest.mark.parametrize("many", MANY_TAGS.values(), ids=MANY_TAGS)
def test_the_work_for_a_tag_does_not_grow_with_the_loras(many: Callable[[int], str], loras: list[Any]) -> None:
    listed = parse(loras=loras).loras
    few = calls_of(lambda: read_tags(many(100), "prompt", listed))
    more = calls_of(lambda: read_tags(many(1100), "prompt", listed))

    assert more - few <= 1000 * 200


@pytest.mark.parametrize("many", MANY_TAGS.values(), ids=MANY_TAGS)
def test_the_warnings_and_complaints_of_many_tags_are_few(many: Callable[[int], str]) -> None:
    parsed = read_tags(many(1100), "prompt", parse(loras=[*LISTED, {"version_id": 16, "scale": 1}]).loras)

    assert len(parsed.warnings) <= 16
    assert len(parsed.complaints) <= 101


def test_the_work_to_place_a_tag_does_not_grow_with_the_loras() -> None:
    placements = [
        Placement(partial(name_means, ref=lora(name=f"t{number}")), f"file{number}", None, 1.0, True)
        for number in range(16)
    ]
    few = calls_of(lambda: place("<lora:t15:1>" * 100, placements))
    more = calls_of(lambda: place("<lora:t15:1>" * 1100, placements))

    assert more - few <= 1000 * 40


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.sampled_from(["<lora:", "<hypernet:", "x", "detail_tweaker_xl", ":", "0.5", ">", "#", "\n", "=", "é"]))
)
def test_any_tags_become_requests_or_complaints(pieces: list[str]) -> None:
    parsed = read_tags("".join(pieces), "prompt", ())

    assert all(request.in_prompt and request.ref.name for request in parsed.loras)
    assert all(complaint.path == "prompt" for complaint in parsed.complaints)

"""A1111's tags as it reads them, and as they are written."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1111_worker.prompt import (
    Placement,
    Tag,
    Weights,
    append,
    find_tags,
    lora_tag,
    merge_style,
    place,
    plain_scale,
    renamed,
    rewrite,
)


def only_tag(text: str) -> Tag:
    (tag,) = find_tags(text)
    return tag


def meanings(text: str) -> list[tuple[str, tuple[str, ...]]]:
    return [(tag.type, tag.arguments) for tag in find_tags(text)]


def placement(
    name: str, *, scale: float | None = None, default: float = 1.0, stem: str | None = "", add: bool = True
) -> Placement:
    return Placement(lambda other: other == name, name if stem == "" else stem, scale, default, add)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no tag at all", []),
        ("a <lora:x:0.8> b", [("lora", ("x", "0.8"))]),
        ("<lora:x><lyco:y:1:te=0.5>", [("lora", ("x",)), ("lyco", ("y", "1", "te=0.5"))]),
        ("<hypernet:x:1> <foo:bar>", [("hypernet", ("x", "1")), ("foo", ("bar",))]),
        # names with what people put into them
        ("<lora:a b (c) & é.v1:1>", [("lora", ("a b (c) & é.v1", "1"))]),
        # over a line's end, as A1111's own expression does
        ("<lora:x\n:1>", [("lora", ("x\n", "1"))]),
        # one that was never closed swallows the next
        ("<lora:x <lora:y:1>", [("lora", ("x <lora", "y", "1"))]),
        ("<lora:x:1", []),
        ("<lora:>", []),
        ("< lora:x:1>", []),
        # comments, whole lines and ends of lines
        ("a # <lora:x:1>\n<lora:y:1>", [("lora", ("y", "1"))]),
        ("# <lora:x:1>", []),
        ("<lora:x#:1>\n", []),
    ],
)
def test_tags_are_what_a1111_sees(text: str, expected: list[tuple[str, tuple[str, ...]]]) -> None:
    assert meanings(text) == expected


@pytest.mark.parametrize(
    ("text", "weights", "plain", "weighted"),
    [
        ("<lora:x>", Weights(1.0, 1.0), None, False),
        ("<lora:x:0.8>", Weights(0.8, 0.8), 0.8, True),
        ("<lora:x: -1e0 >", Weights(-1.0, -1.0), -1.0, True),
        ("<lora:x:0.8:0.5>", Weights(0.8, 0.5), None, True),
        ("<lora:x:0.8:0.5:32>", Weights(0.8, 0.5, 32), None, True),
        ("<lora:x:te=0.8>", Weights(0.8, 0.8), None, True),
        ("<lora:x:unet=0.5>", Weights(1.0, 0.5), None, True),
        ("<lora:te=0.8:x:unet=0.5:dyn=8>", Weights(0.8, 0.5, 8), None, True),
        ("<lora:x:other=1>", Weights(1.0, 1.0), None, False),
    ],
)
def test_weights_are_those_a1111_uses(text: str, weights: Weights, plain: float | None, weighted: bool) -> None:
    tag = only_tag(text)

    assert (tag.name, tag.weights(), plain_scale(tag), tag.is_weighted) == ("x", weights, plain, weighted)


@pytest.mark.parametrize(
    "weight", ["much", "", "nan", "inf", "-inf", "te=x", "1:2:3.5", "a=b=c", "much:te=1", "1:2:x:dyn=3"]
)
def test_a_weight_that_is_no_number_is_an_error(weight: str) -> None:
    tag = only_tag(f"<lora:x:{weight}>")

    with pytest.raises(ValueError, match=r".+"):
        tag.weights()
    assert plain_scale(tag) is None


def test_a_tag_is_written_with_its_weight_and_nothing_more() -> None:
    assert lora_tag("x", 1.0) == "<lora:x:1>"
    assert lora_tag("x", -0.35) == "<lora:x:-0.35>"
    assert plain_scale(only_tag(lora_tag("x", 1 / 3))) == 1 / 3


def test_a_renamed_tag_keeps_its_weights_unless_it_gets_another() -> None:
    assert renamed(only_tag("<lyco:x:0.8:unet=0.5>"), "y") == "<lyco:y:0.8:unet=0.5>"
    assert renamed(only_tag("<lora:te=1:x>"), "y") == "<lora:te=1:y>"
    assert renamed(only_tag("<lora:x:0.8:unet=0.5>"), "y", 2) == "<lora:y:2>"


def test_what_is_taken_out_does_not_make_a_tag_of_its_neighbours() -> None:
    text = rewrite("<lo<lora:x:1>ra:y:1>", lambda tag: "")

    assert find_tags(text) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat", "a cat <lora:x:1> <lora:y:2>"),
        ("a cat ", "a cat <lora:x:1> <lora:y:2>"),
        ("", "<lora:x:1> <lora:y:2>"),
        # a comment would hide them
        ("a cat # mine", "a cat # mine\n<lora:x:1> <lora:y:2>"),
        ("# mine\na cat", "# mine\na cat <lora:x:1> <lora:y:2>"),
        # a tag that was never closed would swallow the first
        ("a <lora:z", "<lora:x:1> <lora:y:2> a <lora:z"),
    ],
)
def test_appended_tags_are_always_read(text: str, expected: str) -> None:
    assert append(text, ["<lora:x:1>", "<lora:y:2>"]) == expected
    assert append(text, []) == text


@pytest.mark.parametrize(
    ("text", "placements", "expected"),
    [
        # a list's LoRA that no tag names is appended, in order
        ("cat", [placement("x", scale=0.5), placement("y", scale=2)], "cat <lora:x:0.5> <lora:y:2>"),
        # a tag stays where it is, under the WebUI's name, with the list's scale
        ("<lora:x:0.1> cat", [placement("x", scale=0.5, stem="file")], "<lora:file:0.5> cat"),
        # without a scale of the list its own weights stay
        ("<lora:x:0.1:0.2>", [placement("x", stem="file")], "<lora:file:0.1:0.2>"),
        ("<lora:x>", [placement("x", default=1.5)], "<lora:x:1.5>"),
        # twice the same would be applied twice
        ("<lora:x:1> <lora:x:2>", [placement("x")], "<lora:x:1>  "),
        # what could not be had goes
        ("a <lora:x:1> cat", [placement("x", stem=None)], "a   cat"),
        # a prompt's own LoRA is not written where it was not asked for
        ("cat", [placement("x", add=False)], "cat"),
        # what nobody placed, and what is no LoRA, stays
        ("<lora:z:1> <hypernet:x:1>", [placement("x", add=False)], "<lora:z:1> <hypernet:x:1>"),
    ],
)
def test_every_lora_is_placed_once(text: str, placements: list[Placement], expected: str) -> None:
    assert place(text, placements) == expected


@pytest.mark.parametrize(
    ("prompt", "style", "expected"),
    [
        ("a cat", "photo of {prompt}, sharp", "photo of a cat, sharp"),
        ("a cat", "{prompt} and {prompt}", "a cat and a cat"),
        (" a cat ", " sharp ", "a cat, sharp"),
        ("a cat", "", "a cat"),
        ("", "sharp", "sharp"),
    ],
)
def test_a_style_is_merged_as_a1111_does(prompt: str, style: str, expected: str) -> None:
    assert merge_style(prompt, style) == expected


PIECES = st.sampled_from(
    ["<lora:", "<lyco:", "<foo:", "<", ">", ":", "#", "\n", "x", "y", "0.5", "te=1", "=", "a cat, ", " "]
)
TEXTS = st.one_of(st.text(max_size=50), st.lists(PIECES, max_size=25).map("".join))


def outside(text: str) -> str:
    """What of a text is in none of its LoRA tags."""
    kept, done = "", 0
    for tag in find_tags(text):
        if tag.is_lora and tag.name:
            kept, done = kept + text[done : tag.start], tag.end
    return kept + text[done:]


@settings(deadline=None, max_examples=300)
@given(TEXTS)
def test_rewriting_touches_tags_alone_and_is_done_after_once(text: str) -> None:
    once = rewrite(text, lambda tag: renamed(tag, "stem", 0.5))

    assert outside(once) == outside(text)
    assert rewrite(once, lambda tag: renamed(tag, "stem", 0.5)) == once
    assert [tag.name for tag in find_tags(once) if tag.is_lora and tag.name] == [
        "stem" for tag in find_tags(text) if tag.is_lora and tag.name
    ]


@settings(deadline=None, max_examples=300)
@given(TEXTS)
def test_taking_tags_out_brings_no_new_ones(text: str) -> None:
    bare = rewrite(text, lambda tag: "")

    assert [tag for tag in find_tags(bare) if tag.is_lora and tag.name] == []


@settings(deadline=None, max_examples=300)
@given(TEXTS)
def test_what_is_appended_is_found_and_disturbs_nothing(text: str) -> None:
    longer = append(text, ["<lora:ours:1>"])

    found = meanings(longer)
    assert text in longer
    assert ("lora", ("ours", "1")) in found
    found.remove(("lora", ("ours", "1")))
    assert found == [one for one in meanings(text) if one != ("lora", ("ours", "1"))]


@settings(deadline=None, max_examples=300)
@given(TEXTS)
def test_a_placed_lora_is_in_any_text_exactly_once(text: str) -> None:
    written = place(text, [placement("x", scale=0.5, stem="ours"), placement("y", stem=None)])

    names = [tag.name for tag in find_tags(written) if tag.is_lora]
    assert names.count("ours") == 1
    assert "y" not in names

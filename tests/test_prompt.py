"""Tags are read as A1111 reads them, and written so that it reads them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1111_worker.prompt import (
    Placement,
    Tag,
    Weights,
    append_tags,
    append_words,
    find_tags,
    lora_tag,
    mention_loras,
    merge_style,
    missing_words,
    place,
    plain_scale,
    rename_tag,
    rewrite,
    split_words,
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
def test_tags_are_found_as_a1111_finds_them(text: str, expected: list[tuple[str, tuple[str, ...]]]) -> None:
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
def test_weights_are_those_that_a1111_uses(text: str, weights: Weights, plain: float | None, weighted: bool) -> None:
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
    assert rename_tag(only_tag("<lyco:x:0.8:unet=0.5>"), "y") == "<lyco:y:0.8:unet=0.5>"
    assert rename_tag(only_tag("<lora:te=1:x>"), "y") == "<lora:te=1:y>"
    assert rename_tag(only_tag("<lora:x:0.8:unet=0.5>"), "y", 2) == "<lora:y:2>"


def test_removing_a_tag_makes_no_tag_of_its_neighbours() -> None:
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
    assert append_tags(text, ["<lora:x:1>", "<lora:y:2>"]) == expected
    assert append_tags(text, []) == text


@pytest.mark.parametrize(
    ("text", "placements", "expected"),
    [
        # LoRAs of the list that no tag names are appended, in order
        ("cat", [placement("x", scale=0.5), placement("y", scale=2)], "cat <lora:x:0.5> <lora:y:2>"),
        # a tag keeps its place, and gets the WebUI's name and the list's scale
        ("<lora:x:0.1> cat", [placement("x", scale=0.5, stem="file")], "<lora:file:0.5> cat"),
        # if the list gives no scale, its own weights stay
        ("<lora:x:0.1:0.2>", [placement("x", stem="file")], "<lora:file:0.1:0.2>"),
        ("<lora:x>", [placement("x", default=1.5)], "<lora:x:1.5>"),
        # twice the same would be applied twice
        ("<lora:x:1> <lora:x:2>", [placement("x")], "<lora:x:1>  "),
        # the tag of a LoRA that is not available goes
        ("a <lora:x:1> cat", [placement("x", stem=None)], "a   cat"),
        # a LoRA that only a prompt names is not appended to another
        ("cat", [placement("x", add=False)], "cat"),
        # other tags stay
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


@pytest.mark.parametrize(
    ("second_pass", "expected"),
    [
        ("sharp", "sharp"),
        ("", ""),
        ("sharp <lora:x:1>", "sharp <lora:x:1> <lora:y:0>"),
        ("<lora:y:1> <lora:z:1>", "<lora:y:1> <lora:z:1> <lora:x:0>"),
    ],
)
def test_a_second_pass_with_loras_names_those_of_the_first_too(second_pass: str, expected: str) -> None:
    assert mention_loras(second_pass, ["x", "y"]) == expected


PIECES = st.sampled_from(
    ["<lora:", "<lyco:", "<foo:", "<", ">", ":", "#", "\n", "x", "y", "0.5", "te=1", "=", "a cat, ", " "]
)
TEXTS = st.one_of(st.text(max_size=50), st.lists(PIECES, max_size=25).map("".join))


def outside(text: str) -> str:
    """The text without its LoRA tags."""
    kept, done = "", 0
    for tag in find_tags(text):
        if tag.is_lora and tag.name:
            kept, done = kept + text[done : tag.start], tag.end
    return kept + text[done:]


@settings(deadline=None, max_examples=300)
@given(TEXTS)
def test_rewriting_changes_only_tags_and_a_second_time_nothing(text: str) -> None:
    once = rewrite(text, lambda tag: rename_tag(tag, "stem", 0.5))

    assert outside(once) == outside(text)
    assert rewrite(once, lambda tag: rename_tag(tag, "stem", 0.5)) == once
    assert [tag.name for tag in find_tags(once) if tag.is_lora and tag.name] == [
        "stem" for tag in find_tags(text) if tag.is_lora and tag.name
    ]


@settings(deadline=None, max_examples=300)
@given(TEXTS)
def test_removing_all_tags_leaves_no_new_tag(text: str) -> None:
    bare = rewrite(text, lambda tag: "")

    assert [tag for tag in find_tags(bare) if tag.is_lora and tag.name] == []


@settings(deadline=None, max_examples=300)
@given(TEXTS)
def test_an_appended_tag_is_found_and_changes_no_other(text: str) -> None:
    longer = append_tags(text, ["<lora:ours:1>"])

    found = meanings(longer)
    assert text in longer
    assert ("lora", ("ours", "1")) in found
    found.remove(("lora", ("ours", "1")))
    assert found == [tag for tag in meanings(text) if tag != ("lora", ("ours", "1"))]


@settings(deadline=None, max_examples=300)
@given(TEXTS)
def test_a_placed_lora_is_in_any_text_exactly_once(text: str) -> None:
    written = place(text, [placement("x", scale=0.5, stem="ours"), placement("y", stem=None)])

    names = [tag.name for tag in find_tags(written) if tag.is_lora]
    assert names.count("ours") == 1
    assert "y" not in names


WORDS = [
    # the lists of a LoRA, the words in them
    (["ohwx", "1girl, red  dress ,"], ["ohwx", "1girl", "red dress"]),
    (["ohwx, ohwx", "Ohwx"], ["ohwx", "Ohwx"]),
    (["ohwx <lora:style:1>, a <b, c> d"], ["ohwx"]),  # some creators list a tag too
    (["a # b", "one AND two", "BREAK", "brand"], ["brand"]),
    (["", " , "], []),
]


@pytest.mark.parametrize(("entries", "words"), WORDS)
def test_the_words_of_a_lora_are_read_one_by_one_without_syntax(entries: list[str], words: list[str]) -> None:
    assert split_words(entries) == words


MISSING = [
    # a text, the words that it lacks of: ink wash, Ohwx
    ("", ["ink wash", "Ohwx"]),
    ("an INK  WASH of ohwx", []),
    ("pink washing, ohwxy", ["ink wash", "Ohwx"]),
    ("(ink wash:1.2), [ohwx]", []),
    ("a <lora:ink wash:1> # ohwx", ["ink wash", "Ohwx"]),
]


@pytest.mark.parametrize(("text", "missing"), MISSING)
def test_a_text_lacks_what_it_has_not_as_whole_words(text: str, missing: list[str]) -> None:
    assert missing_words(text, ["ink wash", "Ohwx"]) == missing


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("a dog", ["ink", "x"], "a dog, ink, x"),
        ("a dog, ", ["ink"], "a dog, ink"),
        ("", ["ink"], "ink"),
        ("a dog # no cat", ["ink"], "a dog # no cat\nink"),  # not inside the comment
        ("a <lora:x", ["ink"], "ink, a <lora:x"),  # not inside the open tag
        ("a dog, ", [], "a dog, "),
    ],
)
def test_words_are_appended_where_a1111_reads_them(text: str, words: list[str], expected: str) -> None:
    assert append_words(text, words) == expected


@given(st.text(max_size=60), st.lists(st.text(max_size=12), max_size=4))
def test_after_words_were_appended_none_is_missing(text: str, entries: list[str]) -> None:
    words = split_words(entries)

    appended = append_words(text, missing_words(text, words))

    assert missing_words(appended, words) == []

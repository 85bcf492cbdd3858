"""The text in a picture, as A1111 writes it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1111_worker.errors import WebUILost
from a1111_worker.webui.infotext import parse_infotext

SETTINGS = "Steps: 2, Sampler: Euler, CFG scale: 7.0, Seed: 5, Size: 64x64, Model hash: 92e79e2e23, Model: tiny_a"


def test_the_settings_are_read_from_the_last_line() -> None:
    found = parse_infotext(f'a cat\n{SETTINGS}, Lora hashes: "one: f210665ad516, two: abababababab", Version: 1.10.1')

    assert (found.seed, found.steps, found.model_hash) == (5, 2, "92e79e2e23")
    assert found.lora_hashes == {"one": "f210665ad516", "two": "abababababab"}
    assert not found.is_of_grid


# a text, and the LoRAs that its prompts name
PROMPTS = [
    ("a <lora:one:1> cat <lyco:two:0.5:0.7>", {"one", "two"}),
    ("line one <lora:one:1>\nline two <lora:two:1>", {"one", "two"}),
    ("a <lora:one:1>\nNegative prompt: <lora:two:1>", {"one"}),
    ("Negative prompt: <lora:two:1>", set()),  # the prompt is empty
    ("a\nNegative prompt: pasted <lora:one:1>\nNegative prompt: <lora:two:1>", {"one"}),
    ("a <hypernet:one:1>", set()),
]


@pytest.mark.parametrize(("prompts", "tags"), PROMPTS)
def test_the_loras_of_its_prompt_are_known(prompts: str, tags: set[str]) -> None:
    assert parse_infotext(f"{prompts}\n{SETTINGS}").lora_tags == tags


def test_the_loras_of_the_second_pass_are_known() -> None:
    text = f'a <lora:one:1>\n{SETTINGS}, Hires prompt: "b, \\"x\\" <lora:two:1>", Version: 1.10.1'

    assert parse_infotext(text).lora_tags == {"one", "two"}


def test_a_text_in_quotes_is_no_setting() -> None:
    quoted = r'"Seed: 9, Steps: 9, Model hash: 0123456789, Script: x, Lora hashes: \"a: 000000000000\""'

    found = parse_infotext(f"a cat\nHires prompt: {quoted}, {SETTINGS}")

    assert (found.seed, found.steps, found.model_hash, found.lora_hashes) == (5, 2, "92e79e2e23", {})
    assert not found.is_of_grid


def test_a_variation_has_a_seed_of_its_own_that_is_not_the_seed() -> None:
    assert parse_infotext(f"a\n{SETTINGS.replace('Seed: 5', 'Variation seed: 9, Seed: 5')}").seed == 5


def test_the_text_of_a_grid_is_known() -> None:
    assert parse_infotext(f'a\n{SETTINGS}, Script: X/Y/Z plot, X Type: Seed, X Values: "11,22"').is_of_grid


def test_quotes_that_a1111_did_not_write_are_a_lost_webui() -> None:
    with pytest.raises(WebUILost):
        parse_infotext('a\nSteps: 2, Lora hashes: "\\q: 1"')


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=200))
def test_any_text_is_read(text: str) -> None:
    try:
        parse_infotext(text)
    except WebUILost:
        assert '"' in text

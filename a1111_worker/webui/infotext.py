"""The text that A1111 writes into each picture, and into `infotexts` of its answer: the one truth about that picture.

    red house <lora:detail:1> a cat
    Negative prompt: blurry
    Steps: 20, Sampler: Euler, Seed: 5, Size: 512x512, Model hash: 92e79e2e23, Lora hashes: "detail: f210665ad516"

The last line is A1111's own. A value with a comma, a colon or a line break is in quotes there, as JSON writes it
(1.9.3 and 1.10.1, modules/infotext_utils.py, `quote`), so callers' texts never look like settings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from a1111_worker import prompt
from a1111_worker.errors import WebUILost

_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')


@dataclass(frozen=True)
class Infotext:
    """What a picture's text says. Numbers and hashes are None if it does not say them.

    `lora_hashes` are the LoRAs that A1111 read, name → 12 hex digits: of this picture's prompt, or of one before it, if
    a script made both. `lora_tags` are the names of the LoRA tags in its prompts. `is_of_grid`: it describes the grid
    of an X/Y/Z plot, which is no picture of its own. `refiner` and `hires_checkpoint` are `name [10 hex digits]`, the
    name alone if A1111 had never loaded the file before.
    """

    seed: int | None
    steps: int | None
    model_hash: str | None
    lora_hashes: Mapping[str, str]
    lora_tags: frozenset[str]
    is_of_grid: bool
    refiner: str | None = None
    hires_checkpoint: str | None = None


def parse_infotext(text: str) -> Infotext:
    """WebUILost if a value in quotes is not as A1111 writes it."""
    prompts, _, settings = text.rpartition("\n")
    plain = _QUOTED.sub('""', settings)
    before, found, _ = f"\n{prompts}".rpartition("\nNegative prompt: ")
    positive = before if found else prompts
    tags = prompt.find_tags(positive) + prompt.find_tags(_quoted(settings, "Hires prompt"))
    return Infotext(
        seed=_whole_number(plain, "Seed"),
        steps=_whole_number(plain, "Steps"),
        model_hash=_find(r"\bModel hash: ([0-9a-f]{10})\b", plain),
        lora_hashes=parse_lora_hashes(_quoted(settings, "Lora hashes")),
        lora_tags=frozenset(tag.name for tag in tags if tag.is_lora),
        is_of_grid=_find(r"(?:^|, )(Script): ", plain) is not None,
        refiner=_find(r"(?:^|, )Refiner: ([^,]+)", plain),
        hires_checkpoint=_find(r"(?:^|, )Hires checkpoint: ([^,]+)", plain),
    )


def parse_lora_hashes(text: object) -> dict[str, str]:
    """The pairs in `name: digits, name: digits`."""
    pairs = (pair.partition(": ") for pair in str(text).split(", ") if pair)
    return {name: digits for name, _, digits in pairs}


def _whole_number(settings: str, key: str) -> int | None:
    found = _find(rf"(?:^|, ){key}: (-?\d+)(?=,|$)", settings)
    return None if found is None else int(found)


def _find(pattern: str, settings: str) -> str | None:
    found = re.search(pattern, settings)
    return found[1] if found else None


def _quoted(settings: str, key: str) -> str:
    """The value of a key whose value is in quotes; empty if the key is not there."""
    # The key is searched outside of quotes: a caller's text may contain it.
    for entry in re.finditer(rf"(\w[\w /]*): ({_QUOTED.pattern})", settings):
        if entry[1] == key:
            try:
                return str(json.loads(entry[2]))
            except ValueError as error:
                raise WebUILost("the WebUI's answer has an infotext in another form than A1111's") from error
    return ""

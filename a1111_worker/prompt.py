"""A1111's extra networks as they are written into a prompt: `<lora:name:0.8>`, read and written as A1111 reads them.

    <lora:name>                     weight 1.0 for A1111
    <lora:name:0.8>                 one weight, for text encoder and U-Net alike: a plain tag
    <lora:name:0.8:0.5:32>          text encoder, U-Net, dynamic rank; also by name: te=0.8, unet=0.5, dyn=32
    <lyco:…>                        the same as lora; types are compared in their own case
    # to the end of the line        a comment (1.9.3 and 1.10.1, on by default): a tag in it is none

Sources: A1111 1.10.1, modules/extra_networks.py, extensions-builtin/Lora/extra_networks_lora.py, modules/styles.py,
modules/processing_scripts/comments.py. Everything here is pure and takes any text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

LORA_TYPES = frozenset({"lora", "lyco"})

_TAG = re.compile(r"<(\w+):([^>]+)>")  # A1111's re_extra_net
_OPEN_TAG = re.compile(r"<\w+:[^>]*\Z")
_COMMENT = re.compile(r"#[^\n]*")


@dataclass(frozen=True)
class Weights:
    """What a LoRA tag asks for, as A1111 understands it."""

    text_encoder: float
    unet: float
    rank: int | None = None


@dataclass(frozen=True)
class Tag:
    """One `<type:argument:argument…>` of a text, which holds it from `start` to `end`."""

    type: str
    name: str
    arguments: tuple[str, ...]
    start: int
    end: int

    @property
    def is_lora(self) -> bool:
        return self.type in LORA_TYPES

    @property
    def positional(self) -> tuple[str, ...]:
        return tuple(argument for argument in self.arguments if not _is_named(argument))

    @property
    def named(self) -> dict[str, str]:
        return dict(_split(argument) for argument in self.arguments if _is_named(argument))

    @property
    def is_weighted(self) -> bool:
        """Whether the tag itself says how much of the LoRA it wants."""
        return len(self.positional) > 1 or not self.named.keys().isdisjoint(("te", "unet", "dyn"))

    def weights(self) -> Weights:
        """The weights in effect; ValueError where A1111 would leave the LoRA out (`<lora:name:much>`)."""
        positional, named = self.positional, self.named
        # All that is positional is converted, also where a named one wins: so does A1111.
        text_encoder = _finite(positional[1]) if len(positional) > 1 else 1.0
        text_encoder = _finite(named.get("te", repr(text_encoder)))
        unet = _finite(positional[2]) if len(positional) > 2 else text_encoder
        unet = _finite(named.get("unet", repr(unet)))
        rank = int(positional[3]) if len(positional) > 3 else None
        return Weights(text_encoder, unet, int(named["dyn"]) if "dyn" in named else rank)


def find_tags(text: str) -> list[Tag]:
    """Every tag of a text that A1111 would see, of whatever type, in order."""
    tags = []
    seen = _without_comments(text)
    for match in _TAG.finditer(seen, 0, seen.rfind(">") + 1):  # past the last ">" it would look in vain, and for long
        arguments = tuple(match[2].split(":"))
        name = next((argument for argument in arguments if not _is_named(argument)), "")
        tags.append(Tag(match[1], name, arguments, match.start(), match.end()))
    return tags


def plain_scale(tag: Tag) -> float | None:
    """The one weight of a plain tag; None where it has none, several or one that is no number."""
    if len(tag.arguments) != 2 or len(tag.positional) != 2:
        return None
    try:
        return tag.weights().unet
    except ValueError:
        return None


def lora_tag(name: str, scale: float) -> str:
    return f"<lora:{name}:{_number(scale)}>"


def renamed(tag: Tag, name: str, scale: float | None = None) -> str:
    """The tag under another name, with `scale` in place of its weights; its own are kept where `scale` is None."""
    if scale is not None:
        return f"<{tag.type}:{name}:{_number(scale)}>"
    arguments = list(tag.arguments)
    arguments[next((i for i, argument in enumerate(arguments) if not _is_named(argument)), 0)] = name
    return f"<{tag.type}:{':'.join(arguments)}>"


def rewrite(text: str, decide: Callable[[Tag], str | None]) -> str:
    """The text with each LoRA tag replaced by what `decide` says, in order: None leaves it, "" takes it out.

    What is taken out leaves a space, so that no two halves around it become a tag.
    """
    parts, done = [], 0
    for tag in find_tags(text):
        replacement = decide(tag) if tag.is_lora and tag.name else None
        if replacement is not None:
            parts += [text[done : tag.start], replacement or " "]
            done = tag.end
    return "".join([*parts, text[done:]])


def append(text: str, tags: Iterable[str]) -> str:
    """The text with tags after it, where A1111 reads them: not inside a comment or a tag that was never closed."""
    addition = " ".join(tags)
    if not addition:
        return text
    seen = _without_comments(text)
    if _OPEN_TAG.search(seen, seen.rfind(">") + 1):
        return f"{addition} {text}"
    last_line = text.rpartition("\n")[2]
    if "#" in last_line:
        return f"{text}\n{addition}"
    return f"{text}{'' if not text or text[-1].isspace() else ' '}{addition}"


@dataclass(frozen=True)
class Placement:
    """A LoRA and how it gets into a text.

    `means` says of a tag's name whether it means this LoRA; `name` is what the WebUI calls it, None where it could
    not be had; `scale` replaces the weights of its tags (None: their own stay, and a tag without gets `default`).
    `append` is whether it is written at the end where no tag names it.
    """

    means: Callable[[str], bool]
    name: str | None
    scale: float | None
    default: float
    append: bool


def place(text: str, placements: Sequence[Placement]) -> str:
    """The text with every LoRA in it exactly once, under the WebUI's name for it, in the order of `placements`.

    A tag stays where its caller put it; a second one of the same LoRA goes, since A1111 would apply it twice.
    """
    placed: set[int] = set()

    def decide(tag: Tag) -> str | None:
        for index, placement in enumerate(placements):
            if not placement.means(tag.name):
                continue
            if placement.name is None or index in placed:
                return ""
            placed.add(index)
            scale = placement.scale
            return renamed(tag, placement.name, placement.default if scale is None and not tag.is_weighted else scale)
        return None

    written = rewrite(text, decide)
    return append(
        written,
        [
            lora_tag(placement.name, placement.default if placement.scale is None else placement.scale)
            for index, placement in enumerate(placements)
            if placement.append and placement.name is not None and index not in placed
        ],
    )


def mentioning(second_pass: str, names: Sequence[str]) -> str:
    """The prompt of the second pass, naming every LoRA of the first without effect where it has LoRAs of its own.

    What that pass reads takes the place of "Lora hashes" in 1.9.3's answer, and the first pass could not be proven.
    """
    there = {tag.name for tag in find_tags(second_pass) if tag.is_lora}
    return append(second_pass, [lora_tag(name, 0) for name in names if name not in there]) if there else second_pass


def merge_style(prompt: str, style: str) -> str:
    """A style put around a prompt as A1111 does: at `{prompt}`, else after a comma."""
    if "{prompt}" in style:
        return style.replace("{prompt}", prompt)
    return ", ".join(part for part in (prompt.strip(), style.strip()) if part)


def _without_comments(text: str) -> str:
    """The text with comments blanked out, every other character at its place."""
    if "#" not in text:
        return text
    return _COMMENT.sub(lambda match: "\n" * len(match[0]), text)


def _is_named(argument: str) -> bool:
    return argument.count("=") == 1  # A1111 splits at most twice: `a=b=c` is positional


def _split(argument: str) -> tuple[str, str]:
    key, _, value = argument.partition("=")
    return key, value


def _finite(text: str) -> float:
    value = float(text)  # as A1111 reads it: spaces and exponents pass
    if not math.isfinite(value):
        raise ValueError(f"{text.strip()} is no weight")
    return value


def _number(scale: float) -> str:
    return repr(float(scale)).removesuffix(".0")

"""A1111's extra networks as tags in a prompt (`<lora:name:0.8>`), read and written as A1111 reads them.

    <lora:name>                     weight 1.0 for A1111
    <lora:name:0.8>                 one weight, for text encoder and U-Net alike: a plain tag
    <lora:name:0.8:0.5:32>          text encoder, U-Net, dynamic rank; also by name: te=0.8, unet=0.5, dyn=32
    <lyco:…>                        the same as lora; types are case-sensitive
    # to the end of the line        a comment (1.9.3 and 1.10.1, on by default): a tag inside of it does not count

Sources: A1111 1.10.1, modules/extra_networks.py, extensions-builtin/Lora/extra_networks_lora.py, modules/styles.py,
modules/processing_scripts/comments.py. All functions here are pure and take any text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

LORA_TYPES = frozenset({"lora", "lyco"})

_TAG = re.compile(r"<(\w+):([^>]+)>")  # A1111's re_extra_net
_OPEN_TAG = re.compile(r"<\w+:[^>]*\Z")
_COMMENT = re.compile(r"#[^\n]*")
_SYNTAX = re.compile(r"[<>#]|\b(?:AND|BREAK)\b")  # tags, comments, several prompts in one, the end of a chunk


@dataclass(frozen=True)
class Weights:
    """The weights of a LoRA tag, as A1111 understands them. `rank` is the dynamic rank, None if there is none."""

    text_encoder: float
    unet: float
    rank: int | None = None


@dataclass(frozen=True)
class Tag:
    """One `<type:argument:argument…>` of a text. It stands there from `start` to `end`."""

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
        """Whether the tag itself says how strongly the LoRA is applied."""
        return len(self.positional) > 1 or not self.named.keys().isdisjoint(("te", "unet", "dyn"))

    def weights(self) -> Weights:
        """The weights in effect. Raises ValueError if A1111 would leave the LoRA out (`<lora:name:much>`)."""
        positional, named = self.positional, self.named
        # Like A1111: every positional weight is converted, even if a named one is used in its place.
        text_encoder = _parse_weight(positional[1]) if len(positional) > 1 else 1.0
        text_encoder = _parse_weight(named.get("te", repr(text_encoder)))
        unet = _parse_weight(positional[2]) if len(positional) > 2 else text_encoder
        unet = _parse_weight(named.get("unet", repr(unet)))
        rank = int(positional[3]) if len(positional) > 3 else None
        return Weights(text_encoder, unet, int(named["dyn"]) if "dyn" in named else rank)


def find_tags(text: str) -> list[Tag]:
    """Every tag of a text that A1111 would see, of any type, in order."""
    tags = []
    visible = _without_comments(text)
    for match in _TAG.finditer(visible, 0, visible.rfind(">") + 1):  # after the last ">" it would search long, in vain
        arguments = tuple(match[2].split(":"))
        name = next((argument for argument in arguments if not _is_named(argument)), "")
        tags.append(Tag(match[1], name, arguments, match.start(), match.end()))
    return tags


def plain_scale(tag: Tag) -> float | None:
    """The weight of a plain tag. None if the tag has no weight, several, or one that is no number."""
    if len(tag.arguments) != 2 or len(tag.positional) != 2:
        return None
    try:
        return tag.weights().unet
    except ValueError:
        return None


def lora_tag(name: str, scale: float) -> str:
    """The tag of a LoRA with one weight."""
    return f"<lora:{name}:{_format_scale(scale)}>"


def rename_tag(tag: Tag, name: str, scale: float | None = None) -> str:
    """The tag under another name, with `scale` in place of its weights. If `scale` is None, its weights stay."""
    if scale is not None:
        return f"<{tag.type}:{name}:{_format_scale(scale)}>"
    arguments = list(tag.arguments)
    arguments[next((i for i, argument in enumerate(arguments) if not _is_named(argument)), 0)] = name
    return f"<{tag.type}:{':'.join(arguments)}>"


def rewrite(text: str, decide: Callable[[Tag], str | None]) -> str:
    """The text with every LoRA tag replaced by what `decide` returns for it, in order. None keeps a tag, "" removes it.

    A removed tag leaves a space, so that the two halves around it do not become a tag.
    """
    parts, end = [], 0
    for tag in find_tags(text):
        replacement = decide(tag) if tag.is_lora and tag.name else None
        if replacement is not None:
            parts += [text[end : tag.start], replacement or " "]
            end = tag.end
    return "".join([*parts, text[end:]])


def append_tags(text: str, tags: Iterable[str]) -> str:
    """The text with tags at a place where A1111 reads them: not inside a comment or a tag that was never closed."""
    return _append(text, " ".join(tags), between=" ")


def append_words(text: str, words: Iterable[str]) -> str:
    """The text with words after a comma, at a place where A1111 reads them."""
    addition = ", ".join(words)
    return _append(text.rstrip().removesuffix(","), addition, between=", ") if addition else text


def _append(text: str, addition: str, *, between: str) -> str:
    if not addition:
        return text
    visible = _without_comments(text)
    if _OPEN_TAG.search(visible, visible.rfind(">") + 1):
        return f"{addition}{between}{text}"
    last_line = text.rpartition("\n")[2]
    if "#" in last_line:
        return f"{text}\n{addition}"
    is_apart = not text.strip() or (text[-1].isspace() and between == " ")
    return f"{text}{'' if is_apart else between}{addition}"


def replace_words(text: str, words: Mapping[str, str]) -> str:
    """The text with other words (or phrases) in the place of some: whole words, in any case, outside of `<…>`."""
    if not words:
        return text
    by_word = {word.casefold(): replacement for word, replacement in words.items()}
    longest_first = sorted(by_word, key=len, reverse=True)
    pattern = re.compile(rf"<[^<>]*>|(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)
    return pattern.sub(lambda found: by_word.get(found[0].casefold(), found[0]), text)


def has_word(text: str, word: str) -> bool:
    """Whether a text has a word (or a phrase): as a whole word, in any case, outside of `<…>`."""
    return replace_words(text, {word: "\0"}) != text


def split_words(entries: Iterable[str]) -> list[str]:
    """The words and phrases of lists that people separate by commas, each once, without what A1111 takes for syntax."""
    phrases = (" ".join(phrase.split()) for entry in entries for phrase in _TAG.sub(",", entry).split(","))
    return [phrase for phrase in dict.fromkeys(phrases) if phrase and not _SYNTAX.search(phrase)]


def missing_words(text: str, words: Iterable[str]) -> list[str]:
    """Those words (or phrases) that a text does not have: as whole words, in any case, outside of tags and comments."""
    visible = " ".join(_TAG.sub(" ", _without_comments(text)).casefold().split())
    return [word for word in words if not re.search(rf"(?<!\w){re.escape(word.casefold())}(?!\w)", visible)]


@dataclass(frozen=True)
class Placement:
    """A LoRA, and how it gets into a text.

    `matches` tells whether a tag's name means this LoRA. `name` is what the WebUI calls it, None if the LoRA is not
    available. `scale` replaces the weights of its tags; if it is None, they keep their weights, and a tag without any
    gets `default`. `append`: if no tag names the LoRA, a tag is appended.
    """

    matches: Callable[[str], bool]
    name: str | None
    scale: float | None
    default: float
    append: bool

    @property
    def tag(self) -> str:
        """Its tag where no text has one. The LoRA must be available."""
        assert self.name is not None
        return lora_tag(self.name, self.default if self.scale is None else self.scale)


def place(text: str, placements: Sequence[Placement], *, separator: str | None = None) -> str:
    """The text with every LoRA in it exactly once, under the WebUI's name for it.

    Tags are appended in the order of `placements`. `separator`: see `weigh`; then they are appended to the first part.
    """
    weighed = weigh(text, placements, separator=separator)
    find = _finder(placements)
    present = {find(tag.name) for part in _parts(weighed, separator) for tag in find_tags(part) if tag.is_lora}
    missing = [
        placement.tag
        for index, placement in enumerate(placements)
        if placement.append and placement.name is not None and index not in present
    ]
    first, *others = (rename(part, placements) for part in _parts(weighed, separator))
    return (separator or "").join([append_tags(first, missing), *others])


def weigh(text: str, placements: Sequence[Placement], *, separator: str | None = None) -> str:
    """The text with the weights that count, and every LoRA in it at most once. Names stay as the caller wrote them.

    A tag stays at its place. A second tag of the same LoRA is removed, because A1111 would apply the LoRA twice. With a
    `separator` the text has parts: the first one is in every picture, the others in some. A LoRA may be in several of
    the others, but not in the first one too.
    """
    find = _finder(placements)
    weighed = []
    of_first: frozenset[int] = frozenset()
    for part in _parts(text, separator):
        placed = set(of_first)  # indexes of `placements`

        def decide(tag: Tag, placed: set[int] = placed) -> str | None:
            index = find(tag.name)
            if index is None:
                return None
            placement = placements[index]
            if placement.name is None or index in placed:
                return ""
            placed.add(index)
            scale = placement.scale
            return rename_tag(tag, tag.name, placement.default if scale is None and not tag.is_weighted else scale)

        weighed.append(rewrite(part, decide))
        of_first = of_first if len(weighed) > 1 else frozenset(placed)
    return (separator or "").join(weighed)


def rename(text: str, placements: Sequence[Placement]) -> str:
    """The text with every LoRA under the WebUI's name for it. Weights stay. A LoRA that is not available is removed."""
    find = _finder(placements)

    def decide(tag: Tag) -> str | None:
        index = find(tag.name)
        if index is None:
            return None
        name = placements[index].name
        return "" if name is None else rename_tag(tag, name)

    return rewrite(text, decide)


def _parts(text: str, separator: str | None) -> list[str]:
    return [text] if separator is None else text.split(separator)


def _finder(placements: Sequence[Placement]) -> Callable[[str], int | None]:
    """A function that returns the index of the placement that a tag's name means."""

    @cache  # a text may have 2,500 tags
    def find(name: str) -> int | None:
        return next((index for index, placement in enumerate(placements) if placement.matches(name)), None)

    return find


def mention_loras(second_pass: str, names: Sequence[str]) -> str:
    """The prompt of the second pass. If it has LoRA tags, it also names the LoRAs of the first pass, with weight 0.

    In the answer of 1.9.3, the LoRAs that the second pass reads take the place of "Lora hashes". Without these names
    the LoRAs of the first pass could not be verified.
    """
    present = {tag.name for tag in find_tags(second_pass) if tag.is_lora}
    if not present:
        return second_pass
    return append_tags(second_pass, [lora_tag(name, 0) for name in names if name not in present])


def without_loras(text: str) -> str:
    """What a text says beside its LoRAs and comments. White space does not count."""
    return "".join(_COMMENT.sub("", rewrite(text, lambda tag: "")).split())


def merge_style(prompt: str, style: str) -> str:
    """A prompt with a style, as A1111 merges them: the prompt stands at `{prompt}`, else the style follows a comma."""
    if "{prompt}" in style:
        return style.replace("{prompt}", prompt)
    return ", ".join(part for part in (prompt.strip(), style.strip()) if part)


def _without_comments(text: str) -> str:
    """The text with its comments blanked out. Every other character keeps its place."""
    if "#" not in text:
        return text
    return _COMMENT.sub(lambda match: "\n" * len(match[0]), text)


def _is_named(argument: str) -> bool:
    return argument.count("=") == 1  # A1111 splits at most twice: `a=b=c` is positional


def _split(argument: str) -> tuple[str, str]:
    key, _, value = argument.partition("=")
    return key, value


def _parse_weight(text: str) -> float:
    value = float(text)  # as A1111 reads it: spaces and exponents pass
    if not math.isfinite(value):
        raise ValueError(f"{text.strip()} is no weight")
    return value


def _format_scale(scale: float) -> str:
    return repr(float(scale)).removesuffix(".0")

"""The LoRAs that a job asks for: those of its list, and those of the tags in its prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from a1111_worker import catalog
from a1111_worker.domain import LoraRequest, ModelKind, ModelRef
from a1111_worker.errors import Complaint
from a1111_worker.models.references import BadReference, parse_name
from a1111_worker.prompt import LORA_TYPES, Tag, find_tags, plain_scale
from a1111_worker.request.schema import MAX_LORAS
from a1111_worker.request.values import InvalidValue, shown


def scale_of(wish: LoraRequest) -> float:
    """How much of a LoRA a job gets: what it says, else the catalog's, else 1.0."""
    if wish.scale is not None:
        return wish.scale
    known = catalog.lora_of_version(wish.ref.version_id) if wish.ref.version_id is not None else None
    return known.scale if known else 1.0


def means(name: str, ref: ModelRef) -> bool:
    """Whether a tag's name means this model: by the catalog, by the name the job gave it, or by its file's stem."""
    name = _stem(name.strip())
    known = catalog.lora_named(name)
    if known is not None:
        return ref.version_id == known.version_id  # whatever else a job calls by that name
    if ref.name is not None and _stem(ref.name) == name:
        return True
    # A file of CivitAI's is <slug>_<version id>, and that name is never another version's.
    match = re.fullmatch(r".+_([1-9][0-9]{0,15})", name)
    return match is not None and ref.version_id == int(match[1])


@dataclass(frozen=True)
class TagReading:
    """What a text's tags ask for: all wishes so far with those of the text, and what is to be said of them."""

    loras: tuple[LoraRequest, ...]
    warnings: tuple[str, ...]
    complaints: tuple[Complaint, ...]


def read_tags(text: str, path: str, loras: Sequence[LoraRequest]) -> TagReading:
    """Take the tags of a prompt (or of a style's) into a job's LoRAs.

    A tag whose LoRA the list names already is that entry: its scale counts where the entry gives none, else the list
    wins with a warning. Every other tag becomes a wish of its own, once.
    """
    wishes = list(loras)
    warnings: dict[str, None] = {}  # a set in order
    complaints: dict[Complaint, None] = {}
    for tag in find_tags(text):
        if not tag.is_lora:
            _foreign_tag(tag, path, warnings, complaints)
            continue
        try:
            wish = _wish_of(tag, path)
        except InvalidValue as wrong:
            complaints[Complaint(path, f"holds {_written(tag)}: {wrong.problems[0][1]}")] = None
            continue
        index = next((index for index, other in enumerate(wishes) if means(tag.name, other.ref)), None)
        if index is None:
            wishes.append(wish)
            if len(wishes) > MAX_LORAS:
                complaints[Complaint(path, f"asks for more than {MAX_LORAS} LoRAs, the list's included")] = None
                break
            continue
        earlier = wishes[index]
        if not earlier.in_prompt and earlier.scale is None:
            wishes[index] = replace(earlier, scale=wish.scale, weighted_in_prompt=tag.is_weighted)
        elif not earlier.in_prompt and tag.is_weighted and plain_scale(tag) != earlier.scale:
            warnings[
                f"{_written(tag)} in {path} has another scale than {earlier.path}, whose {earlier.scale:g} counts"
            ] = None
        elif earlier.in_prompt and earlier.path == path:
            warnings[f"{_written(tag)} is in {path} more than once: the first one counts"] = None
    return TagReading(tuple(wishes), tuple(warnings), tuple(complaints))


def _foreign_tag(tag: Tag, path: str, warnings: dict[str, None], complaints: dict[Complaint, None]) -> None:
    if tag.type == "hypernet":
        complaints[Complaint(path, f"holds {_written(tag)}: this worker has no hypernetworks")] = None
    elif tag.type.casefold() in LORA_TYPES:
        complaints[Complaint(path, f"holds {_written(tag)}: the WebUI reads <{tag.type.casefold()}:…> alone")] = None
    elif len(warnings) < MAX_LORAS:
        warnings[f"{_written(tag)} in {path} does nothing: the WebUI drops what looks like a tag"] = None


def _wish_of(tag: Tag, path: str) -> LoraRequest:
    """The wish of a LoRA tag, or `InvalidValue`. Of several weights the U-Net's is the one that is reported."""
    try:
        name = parse_name(tag.name)
    except BadReference as error:
        raise InvalidValue(f"its name {error}") from error
    if "<" in name:
        raise InvalidValue("a tag before it is not closed")
    try:
        weights = tag.weights()
    except ValueError as error:
        raise InvalidValue("its weight must be a number") from error
    if not all(-10 <= weight <= 10 for weight in (weights.text_encoder, weights.unet)):
        raise InvalidValue("its weight must be from -10 to 10")
    ref = catalog.resolve(ModelRef(kind=ModelKind.LORA, name=name))
    return LoraRequest(ref, weights.unet if tag.is_weighted else None, path, in_prompt=True)


def has_lora_tag(text: str) -> bool:
    return any(tag.is_lora for tag in find_tags(text))


def _written(tag: Tag) -> str:
    return f"<{shown(tag.type)}:{shown(tag.name)}>"


def are_same(one: ModelRef, other: ModelRef) -> bool:
    """Whether two references mean one file, as far as that can be told before anything is fetched."""
    if one.sha256 is not None and one.sha256 == other.sha256:
        return True
    if one.version_id is not None or other.version_id is not None:
        another_file = None not in (one.file_id, other.file_id) and one.file_id != other.file_id
        return one.version_id == other.version_id and not another_file
    if one.model_id is not None or other.model_id is not None:
        return one.model_id == other.model_id
    if one.url is not None or other.url is not None:
        return one.url == other.url
    return one.name == other.name


def _stem(name: str) -> str:
    return name.removesuffix(".safetensors") or name

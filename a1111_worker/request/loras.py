"""The LoRAs that a job asks for: those of its list, and those of the tags in its prompts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from a1111_worker import catalog
from a1111_worker.domain import LoraRequest, Model, ModelKind, ModelRef
from a1111_worker.errors import Complaint
from a1111_worker.models.references import BadReference, parse_name, parse_reference
from a1111_worker.prompt import LORA_TYPES, Tag, find_tags, plain_scale
from a1111_worker.request.fields import LORA_KEYS, LORA_SCALE, MAX_LORAS
from a1111_worker.request.unknown import unknown_lora_key
from a1111_worker.request.values import MAX_PROBLEMS, InvalidValue, Problem, as_integer, describe_value, shown
from a1111_worker.webui_names import split_hash


@dataclass(frozen=True)
class ParsedLoras:
    """The LoRAs that a job asks for so far, and what its caller must know about them."""

    loras: tuple[LoraRequest, ...] = ()
    warnings: tuple[str, ...] = ()
    complaints: tuple[Complaint, ...] = ()


def scale_of(lora: LoraRequest, model: Model | None = None) -> float:
    """How strongly a LoRA is applied: the job's scale, else the catalog's, else 1.0.

    `model` is what the reference turned out to mean: of a page without a version, only that says which version it is.
    """
    if lora.scale is not None:
        return lora.scale
    version_id = model.version_id if model else lora.ref.version_id
    known = catalog.lora_of_version(version_id) if version_id is not None else None
    return known.scale if known else 1.0


def name_means(name: str, ref: ModelRef) -> bool:
    """Whether a tag's name means this model: by the catalog, by the name that the job gave it, or by its file name."""
    return not _keys_of_name(name).isdisjoint(_keys_of_ref(ref))


_Key = tuple[str, "str | int"]
"""What a model is known by: ("version", 135867) or ("name", "my_own"). A name means a model if they share a key."""


def _keys_of_name(name: str) -> set[_Key]:
    name = _stem(name.strip())
    known = catalog.lora_named(name)
    if known is not None:
        return {("version", known.version_id)}  # whatever else a job calls by that name
    # A file from CivitAI is called <slug>_<version id>, and that name never belongs to another version.
    stem, _ = split_hash(name) or (name, "")
    versions = {match[1] for match in map(_FILE_OF_VERSION.fullmatch, (name, stem)) if match}
    return {("name", name), *(("version", int(version)) for version in versions)}


def _keys_of_ref(ref: ModelRef) -> set[_Key]:
    keys: set[_Key] = set() if ref.version_id is None else {("version", ref.version_id)}
    return keys if ref.name is None else keys | {("name", _stem(ref.name))}


_FILE_OF_VERSION = re.compile(r".+_([1-9][0-9]{0,15})")


# -- the list ---------------------------------------------------------------------------------------------------------


def parse_list(items: Sequence[Any], bad_paths: Collection[str], model_hosts: Collection[str]) -> ParsedLoras:
    """Parse the field `loras`. `bad_paths` are the places that have a complaint already, because they are no JSON."""
    if len(items) > MAX_LORAS:
        return ParsedLoras(complaints=(Complaint("loras", f"must be at most {MAX_LORAS} LoRAs, not {len(items)}"),))
    loras: list[LoraRequest] = []
    complaints: list[Complaint] = []
    for index, item in enumerate(items):
        path = f"loras[{index}]"
        bad_keys = {bad.removeprefix(f"{path}.") for bad in bad_paths if _is_inside(bad, path)}
        if bad_keys - {"scale", "hash"}:
            continue
        if bad_keys:  # the rest of the object still says which LoRA is meant
            item = {key: value for key, value in item.items() if key not in bad_keys}
        lora, problems = _parse_item(path, item, model_hosts)
        complaints += [Complaint(path + below, message) for below, message in problems]
        if lora is None:
            continue
        same = next((earlier for earlier in loras if is_same_lora(earlier.ref, lora.ref)), None)
        if same is not None:
            complaints.append(Complaint(path, f"is the same LoRA as {same.path}"))
        loras.append(lora)
    return ParsedLoras(tuple(loras), complaints=tuple(complaints))


def _parse_item(path: str, item: Any, model_hosts: Collection[str]) -> tuple[LoraRequest | None, list[Problem]]:
    """One entry of the list, None if it names no usable model, and everything that is wrong with it."""
    if (version_id := as_integer(item)) is not None:
        item = {"version_id": version_id}
    if not isinstance(item, (str, dict)):
        return None, [("", f"must be text or an object, not {describe_value(item)}")]
    scale: float | None = None
    problems: list[Problem] = []
    if isinstance(item, dict):
        # One more than a job's complaints may be: then the parser says that there are more.
        unknown = islice((key for key in item if key not in LORA_KEYS), MAX_PROBLEMS + 1)
        problems += [(f".{shown(key)}", unknown_lora_key(key, LORA_KEYS)) for key in unknown]
        try:
            scale = None if item.get("scale") is None else float(LORA_SCALE.check(item["scale"]))
        except InvalidValue as error:
            problems += [(".scale", message) for _, message in error.problems]
    try:
        ref = parse_reference(item, kind=ModelKind.LORA, allowed_hosts=model_hosts)
    except BadReference as error:
        problems += [(f".{key}" if key else "", message) for key, message in error.problems]
        return None, problems
    return LoraRequest(ref, scale, path), problems


def is_same_lora(ref: ModelRef, other: ModelRef) -> bool:
    """Whether two references mean the same file, as far as that is known before anything is fetched."""
    if ref.sha256 is not None and ref.sha256 == other.sha256:
        return True
    if ref.version_id is not None or other.version_id is not None:
        is_other_file = None not in (ref.file_id, other.file_id) and ref.file_id != other.file_id
        return ref.version_id == other.version_id and not is_other_file
    if ref.model_id is not None or other.model_id is not None:
        return ref.model_id == other.model_id
    if (ref.url, ref.hub) != (None, None) or (other.url, other.hub) != (None, None):
        return (ref.url, ref.hub) == (other.url, other.hub)
    return ref.name == other.name


def _is_inside(path: str, place: str) -> bool:
    return path == place or path.startswith((f"{place}.", f"{place}["))


def _stem(name: str) -> str:
    return name.removesuffix(".safetensors") or name


# -- tags -------------------------------------------------------------------------------------------------------------


def has_lora_tag(text: str) -> bool:
    return any(tag.is_lora for tag in find_tags(text))


def read_tags(text: str, path: str, loras: Sequence[LoraRequest]) -> ParsedLoras:
    """Add the LoRA tags of a prompt (or of a style) to a job's LoRAs.

    If a tag names a LoRA of the list, it is that entry: the tag's scale counts if the entry has none, otherwise the
    list's scale counts, with a warning. Every other LoRA becomes a request of its own, once. A text has at most
    MAX_LORAS warnings. A text may have 2,500 tags: the work for a tag does not grow with the number of LoRAs.
    """
    reader = _TagReader(loras)
    times: Counter[tuple[str, ...]] = Counter()
    for tag in find_tags(text):
        if reader.is_full:
            break
        spelling = (tag.type, *tag.arguments)
        times[spelling] += 1
        if times[spelling] > 2:
            continue  # the first one asks for the LoRA, the second one is a warning, the third one says nothing new
        request = reader.read(tag, path)
        if request is None:
            continue
        index = reader.find(tag.name)
        if index is None:
            reader.add(request)
            continue
        earlier = reader.requests[index]
        if not earlier.in_prompt and earlier.scale is None:
            reader.requests[index] = replace(earlier, scale=request.scale, weighted_in_prompt=tag.is_weighted)
        else:
            reader.warn(_ignored_scale(tag, path, earlier))
    return reader.parsed()


def read_tags_of_script(prompts: Mapping[str, str], loras: Sequence[LoraRequest]) -> ParsedLoras:
    """Add the LoRA tags of the prompts that a script makes: prompt → the place in the job that it comes from.

    Every tag keeps its own weights, also one that names a LoRA of the list.
    """
    reader = _TagReader(loras)
    seen: set[tuple[str, ...]] = set()
    for prompt, path in prompts.items():
        for tag in find_tags(prompt):
            spelling = (tag.type, *tag.arguments)
            if reader.is_full or spelling in seen:
                continue
            seen.add(spelling)
            request = reader.read(tag, path)
            if request is not None and reader.find(tag.name) is None:
                reader.add(replace(request, scale=tag.weights().unet))
    return reader.parsed()


class _TagReader:
    """The LoRAs that a job asks for, while tags are added to them."""

    def __init__(self, loras: Sequence[LoraRequest]) -> None:
        self.requests = list(loras)
        self._index_of: dict[_Key, int] = {}
        for index, request in enumerate(loras):
            self._add_keys(request.ref, index)
        self._warnings: dict[str, None] = {}  # an ordered set
        self._complaints: dict[Complaint, None] = {}
        self.is_full = False

    def read(self, tag: Tag, path: str) -> LoraRequest | None:
        """What a tag asks for. None if it does nothing, with a warning, or cannot be used, with a complaint."""
        if _is_dropped_by_webui(tag):
            self.warn(f"{_label(tag)} in {path} does nothing: the WebUI drops what looks like a tag")
            return None
        try:
            return _request_of(tag, path)
        except InvalidValue as error:
            self._complaints[Complaint(path, f"holds {_label(tag)}: {error.problems[0][1]}")] = None
            self.is_full = len(self._complaints) > MAX_PROBLEMS
            return None

    def find(self, name: str) -> int | None:
        """The index of the request that a tag's name means."""
        return min((self._index_of[key] for key in _keys_of_name(name) if key in self._index_of), default=None)

    def add(self, request: LoraRequest) -> None:
        if len(self.requests) == MAX_LORAS:
            message = f"asks for more than {MAX_LORAS} LoRAs, the list's included"
            self._complaints[Complaint(request.path, message)] = None
            self.is_full = True
            return
        self.requests.append(request)
        self._add_keys(request.ref, len(self.requests) - 1)

    def warn(self, warning: str | None) -> None:
        if warning and len(self._warnings) < MAX_LORAS:
            self._warnings[warning] = None

    def parsed(self) -> ParsedLoras:
        return ParsedLoras(tuple(self.requests), tuple(self._warnings), tuple(self._complaints))

    def _add_keys(self, ref: ModelRef, index: int) -> None:
        """Note which request has a reference's keys: the first one that has them."""
        for key in _keys_of_ref(ref):
            self._index_of.setdefault(key, index)


def _is_dropped_by_webui(tag: Tag) -> bool:
    """Whether a tag is of no type that the WebUI knows, in any case. It removes such a tag from the prompt."""
    return tag.type.casefold() not in LORA_TYPES and tag.type != "hypernet"


def _request_of(tag: Tag, path: str) -> LoraRequest:
    """What a tag asks for; raises InvalidValue. Of several weights, the U-Net's is the scale that is reported."""
    if tag.type == "hypernet":
        raise InvalidValue("this worker has no hypernetworks")
    if not tag.is_lora:
        raise InvalidValue(f"the WebUI reads <{tag.type.casefold()}:…> alone")
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


def _ignored_scale(tag: Tag, path: str, earlier: LoraRequest) -> str | None:
    """The warning if a tag's scale is ignored, because an earlier request for the same LoRA has one."""
    if earlier.in_prompt:
        return f"{_label(tag)} is in {path} more than once: the first one counts" if earlier.path == path else None
    if tag.is_weighted and plain_scale(tag) != earlier.scale:
        return f"{_label(tag)} in {path} has another scale than {earlier.path}: the list's {earlier.scale:g} counts"
    return None


def _label(tag: Tag) -> str:
    return f"<{shown(tag.type)}:{shown(tag.name)}>"

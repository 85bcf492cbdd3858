"""The door: a job's raw input becomes a `GenerationRequest`, or everything that is wrong with it is said at once.

What a job may contain is the table in `fields`; here it is read as a whole: the LoRAs of the list and of the prompts,
what several fields say together, the size of the final picture. Below this module nobody sees the raw input again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from a1111_worker.domain import GenerationRequest, ImageFormat, LoraRequest, ModelKind, OnLoraError, OutputOptions
from a1111_worker.errors import Complaint, InvalidRequest
from a1111_worker.models.references import BadReference, parse_reference
from a1111_worker.request.loras import TagReading, are_same, has_lora_tag, read_tags
from a1111_worker.request.schema import (
    BLANK_IS_ABSENT,
    LORA_KEYS,
    LORA_SCALE,
    MAX_LORAS,
    MIN_SIDE,
    SAME_AS_FIRST_PASS,
    FieldClass,
    fields,
    unknown_field,
    unknown_lora_key,
)
from a1111_worker.request.schema import OVERRIDABLE_OPTIONS as OVERRIDABLE_OPTIONS
from a1111_worker.request.schema import Limits as Limits
from a1111_worker.request.values import Budget, InvalidValue, is_broken, json_problems, said, shown

DEFAULTS: Mapping[str, Any] = {"steps": 25, "cfg_scale": 7, "width": 1024, "height": 1024}
DEFAULT_SAMPLER = "DPM++ 2M Karras"
DEFAULT_SAMPLER_WITH_SCHEDULER = "DPM++ 2M"  # where the job names a scheduler and no sampler

MAX_VALUES = 100_000
MAX_COMPLAINTS = 100
UPSCALED = 4  # times the final picture may be upscaled before hires cuts it to another shape


def parse_request(raw: object, limits: Limits) -> GenerationRequest:
    """The job's input, checked as far as that is possible without a WebUI; InvalidRequest holds every complaint."""
    if raw is None:
        raise InvalidRequest([Complaint("input", 'is missing: a job is {"input": {"prompt": "…"}}')])
    if not isinstance(raw, dict):
        raise InvalidRequest([Complaint("input", f"must be an object, not {said(raw)}")])
    parser = _Parser(raw, limits)
    request = parser.parse()
    if parser.complaints:
        raise InvalidRequest(_in_order(parser.complaints, raw))
    return request


class _Parser:
    """One raw input on its way. Every step adds to `complaints` and goes on with what is sound."""

    def __init__(self, raw: dict[Any, Any], limits: Limits) -> None:
        self.complaints: list[Complaint] = []
        self._raw = raw
        self._limits = limits
        self._warnings: list[str] = []

    def parse(self) -> GenerationRequest:
        given = self._known_fields(self._json_fields())
        loras = self._tags_of_prompts(given, self._list_of_loras(given.pop("loras", ())))
        on_lora_error = OnLoraError(given.pop("on_lora_error", OnLoraError.FAIL))
        output: OutputOptions = given.pop("output", OutputOptions())
        if output.quality is not None and output.format is ImageFormat.PNG:
            self._warnings.append("output.quality does nothing for png, which loses nothing")
        allow_blank: bool = given.pop("allow_blank", False)
        self._fold_settings(given)
        self._fold_sampler(given)
        body = {**DEFAULTS, **given}
        self._check_size(body)
        self._check_images(body)
        return GenerationRequest(body, loras, on_lora_error, tuple(self._warnings), output, allow_blank)

    def _complain(self, path: str, message: str) -> None:
        if len(self.complaints) < MAX_COMPLAINTS:
            self.complaints.append(Complaint(path, message))
        elif not self._is_full:
            self.complaints.append(Complaint("input", "has more wrong with it than can be said here"))

    @property
    def _is_full(self) -> bool:
        return len(self.complaints) > MAX_COMPLAINTS

    def _has_complaint(self, *names: str) -> bool:
        return any(_top(complaint.path) in names for complaint in self.complaints)

    # one field after the other

    def _json_fields(self) -> dict[str, Any]:
        """The fields that are JSON through and through."""
        sound = {}
        budget = Budget(MAX_VALUES)
        for name, value in self._raw.items():
            if not isinstance(name, str) or is_broken(name):
                self._complain("input", "must have field names of sound text")
                continue
            problems = json_problems(value, budget)
            for path, message in problems:
                self._complain(shown(name) + path, message)
            if budget.is_spent or self._is_full:
                break
            if not problems or (name == "loras" and isinstance(value, list)):  # its sound items are looked at still
                sound[name] = value
        return sound

    def _known_fields(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that are there and fit the table. null means absent: A1111's own clients send it."""
        known = fields(self._limits)
        checked: dict[str, Any] = {}
        for name, value in given.items():
            if self._is_full:
                break
            field = known.get(name)
            if value is None and name != "prompt":
                continue
            if field is None:
                self._complain(shown(name), unknown_field(name, known))
            elif field.kind is FieldClass.REFUSED:
                if not any(value is one or (isinstance(one, str) and value == one) for one in field.harmless):
                    self._complain(name, f"is refused: {field.reason}")
            else:
                try:
                    checked[name] = field.value.check(value)
                except InvalidValue as wrong:
                    for path, message in wrong.problems:
                        self._complain(name + path, message)
        if "prompt" not in self._raw:
            self._complain("prompt", "is required")
        return {name: value for name, value in checked.items() if not _is_left_alone(name, value)}

    # LoRAs

    def _list_of_loras(self, items: Sequence[Any]) -> list[LoraRequest]:
        if len(items) > MAX_LORAS:
            self._complain("loras", f"must be at most {MAX_LORAS} LoRAs, not {len(items)}")
            return []
        wishes: list[LoraRequest] = []
        for index, item in enumerate(items):
            path = f"loras[{index}]"
            broken = {complaint.path for complaint in self.complaints if _is_at(complaint.path, path)}
            if broken and isinstance(item, dict) and broken <= {f"{path}.scale", f"{path}.hash"}:
                item = {key: value for key, value in item.items() if f"{path}.{key}" not in broken}
            elif broken:
                continue
            wish = self._lora(path, item)
            if wish is None:
                continue
            twin = next((other for other in wishes if are_same(other.ref, wish.ref)), None)
            if twin is not None:
                self._complain(wish.path, f"is the same LoRA as {twin.path}")
            wishes.append(wish)
        return wishes

    def _lora(self, path: str, item: object) -> LoraRequest | None:
        if not isinstance(item, (str, dict)):
            self._complain(path, f"must be text or an object, not {said(item)}")
            return None
        scale = self._keys_and_scale(path, item) if isinstance(item, dict) else None
        try:
            ref = parse_reference(item, kind=ModelKind.LORA, allowed_hosts=self._limits.model_hosts)
        except BadReference as error:
            for key, message in error.problems:
                self._complain(f"{path}.{key}" if key else path, message)
            return None
        return LoraRequest(ref, scale, path)

    def _keys_and_scale(self, path: str, item: dict[str, Any]) -> float | None:
        for key in item:
            if key not in LORA_KEYS and not self._is_full:
                self._complain(f"{path}.{shown(key)}", unknown_lora_key(key))
        if item.get("scale") is None:
            return None
        try:
            return float(LORA_SCALE.check(item["scale"]))
        except InvalidValue as wrong:
            self._complain(f"{path}.scale", wrong.problems[0][1])
            return None

    def _tags_of_prompts(self, given: Mapping[str, Any], loras: Sequence[LoraRequest]) -> tuple[LoraRequest, ...]:
        reading = read_tags(given.get("prompt", ""), "prompt", loras)
        self._take(reading)
        hr_prompt = given.get("hr_prompt", "")
        if given.get("enable_hr"):
            reading = read_tags(hr_prompt, "hr_prompt", reading.loras)
            self._take(reading)
        elif has_lora_tag(hr_prompt):
            self._warnings.append("hr_prompt and its LoRA tags do nothing without enable_hr")
        for path in ("negative_prompt", "hr_negative_prompt"):
            if has_lora_tag(given.get(path, "")):
                self._warnings.append(f"the WebUI takes no LoRA tags in {path}: they do nothing there")
        return reading.loras

    def _take(self, reading: TagReading) -> None:
        self._warnings.extend(reading.warnings)
        for complaint in reading.complaints:
            self._complain(complaint.path, complaint.message)

    # what several fields say together

    def _fold_settings(self, given: dict[str, Any]) -> None:
        """clip_skip and vae become the settings that do what their names say; A1111 ignores them at the top."""
        settings = given.pop("override_settings", {})
        for name, setting in (("clip_skip", "CLIP_stop_at_last_layers"), ("vae", "sd_vae")):
            if name in given:
                value = given.pop(name)
                if settings.setdefault(setting, value) != value:
                    self._complain(name, f"contradicts override_settings.{setting}: give one of them")
        if settings:
            given["override_settings"] = settings

    def _fold_sampler(self, given: dict[str, Any]) -> None:
        """sampler_index is what sampler_name was once called."""
        old = given.pop("sampler_index", None)
        sampler = given.get("sampler_name", old)
        if old is not None and old.strip().casefold() != sampler.strip().casefold():
            self._complain("sampler_index", "contradicts sampler_name, whose old name it is: give one of them")
        if sampler is None:
            sampler = DEFAULT_SAMPLER_WITH_SCHEDULER if "scheduler" in given else DEFAULT_SAMPLER
        given["sampler_name"] = sampler

    def _check_size(self, body: Mapping[str, Any]) -> None:
        if self._has_complaint(*_SIZES):
            return
        if bool(body.get("firstphase_width")) != bool(body.get("firstphase_height")):
            lone = "firstphase_width" if body.get("firstphase_width") else "firstphase_height"
            self._complain(lone, "must come with the other one: firstphase_width and firstphase_height")
            return
        hires = bool(body.get("enable_hr"))
        if hires and "denoising_strength" not in body and not self._has_complaint("denoising_strength"):
            self._complain("enable_hr", "must come with denoising_strength (0.4 to 0.7 is usual): the WebUI fails else")
        picture = final_size(body)
        decisive = ("hr_resize_x", "hr_resize_y", "hr_scale", "enable_hr") if hires else ("width", "height")
        path = next((name for name in decisive if self._raw.get(name)), decisive[-1])
        asks = f"asks for a picture of {picture.width}×{picture.height}"
        limit = self._limits.max_pixels
        if picture.pixels > limit:
            self._complain(path, f"{asks}: {picture.pixels:,} pixels, and {limit:,} are the limit")
        elif picture.upscaled_pixels > UPSCALED * limit:
            self._complain(path, f"{asks}, cut from {picture.upscaled_pixels:,} pixels: too much of another shape")
        elif min(picture.width, picture.height) < MIN_SIDE:
            self._complain(path, f"{asks}: no side may be below {MIN_SIDE}")

    def _check_images(self, body: Mapping[str, Any]) -> None:
        images = body.get("batch_size", 1) * body.get("n_iter", 1)
        if images > self._limits.max_images:
            self._complain(
                "batch_size", f"times n_iter is {images} pictures, and {self._limits.max_images} are the limit"
            )


_SIZES = (
    "width",
    "height",
    "enable_hr",
    "hr_scale",
    "hr_resize_x",
    "hr_resize_y",
    "firstphase_width",
    "firstphase_height",
)


@dataclass(frozen=True)
class Picture:
    """The sizes of a job's picture: of the first pass and of the end, and how much is upscaled before it is cut."""

    first: tuple[int, int]
    width: int
    height: int
    upscaled_pixels: int = 0

    @property
    def pixels(self) -> int:
        return max(self.width * self.height, self.first[0] * self.first[1])


def final_size(body: Mapping[str, Any]) -> Picture:
    """The final picture by A1111's own arithmetic (1.10.1, processing.py, calculate_target_resolution)."""
    width, height = body["width"], body["height"]
    if body.get("firstphase_width"):
        width, height = body["firstphase_width"], body["firstphase_height"]
    first = (width, height)
    if not body.get("enable_hr"):
        return Picture(first, width, height)
    x, y = body.get("hr_resize_x", 0), body.get("hr_resize_y", 0)
    if x and y:  # upscaled until it covers both, then cut
        covering = x * (x * height // width) if width * y < height * x else (y * width // height) * y
        return Picture(first, x, y, covering)
    if x:
        return Picture(first, x, x * height // width)
    if y:
        return Picture(first, y * width // height, y)
    scale = body.get("hr_scale", 2.0)
    return Picture(first, int(width * scale), int(height * scale))


def _is_left_alone(name: str, value: Any) -> bool:
    """Whether a field says in A1111's own words that it is not used."""
    if name in BLANK_IS_ABSENT:
        return not value.strip()
    return name in SAME_AS_FIRST_PASS and value.strip().casefold() in SAME_AS_FIRST_PASS[name]


# -- LoRA tags --------------------------------------------------------------------------------------------------------


def _in_order(complaints: Iterable[Complaint], raw: dict[Any, Any]) -> list[Complaint]:
    """The complaints in the order of the input's fields; what is missing there comes first, the whole last."""
    order = {shown(name): index for index, name in enumerate(raw)}

    def place(complaint: Complaint) -> int:
        if complaint.path == "input":
            return len(order)
        return order.get(complaint.path, order.get(_top(complaint.path), -1))

    return sorted(complaints, key=place)


def _is_at(path: str, place: str) -> bool:
    return path == place or path.startswith((f"{place}.", f"{place}["))


def _top(path: str) -> str:
    return re.split(r"[.\[]", path, maxsplit=1)[0]

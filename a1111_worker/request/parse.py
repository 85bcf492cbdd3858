"""Where a job enters: its raw input becomes a `GenerationRequest`, or a list of everything that is wrong with it.

`schema.fields` says what a job may contain, field by field. Here the input is read as a whole: the LoRAs of the list
and of the prompts, fields that must agree with each other, the size of the final image. No module after this one sees
the raw input.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from a1111_worker.domain import GenerationRequest, ImageFormat, LoraRequest, OnLoraError, OutputOptions
from a1111_worker.errors import Complaint, InvalidRequest
from a1111_worker.request.loras import ParsedLoras, has_lora_tag, parse_list, read_tags
from a1111_worker.request.schema import FieldClass, Limits, fields, is_unset, unknown_field
from a1111_worker.request.scripts import check_script
from a1111_worker.request.size import final_size, size_problem
from a1111_worker.request.values import (
    InvalidValue,
    ValueBudget,
    describe_value,
    has_lone_surrogate,
    json_problems,
    shown,
)

DEFAULTS: Mapping[str, Any] = {"steps": 25, "cfg_scale": 7, "width": 1024, "height": 1024}
DEFAULT_SAMPLER = "DPM++ 2M Karras"
DEFAULT_SAMPLER_WITH_SCHEDULER = "DPM++ 2M"  # if the job names a scheduler and no sampler

MAX_VALUES = 100_000
MAX_COMPLAINTS = 100

_SIZE_FIELDS = (
    "width",
    "height",
    "enable_hr",
    "hr_scale",
    "hr_resize_x",
    "hr_resize_y",
    "firstphase_width",
    "firstphase_height",
)


def parse_request(raw: object, limits: Limits) -> GenerationRequest:
    """The job's input, checked as far as that is possible without a WebUI. InvalidRequest holds every complaint."""
    if raw is None:
        raise InvalidRequest([Complaint("input", 'is missing: a job is {"input": {"prompt": "…"}}')])
    if not isinstance(raw, dict):
        raise InvalidRequest([Complaint("input", f"must be an object, not {describe_value(raw)}")])
    parser = _FieldParser(raw, limits)
    request = parser.parse()
    if parser.complaints:
        raise InvalidRequest(_in_input_order(parser.complaints, raw))
    return request


class _FieldParser:
    """Parses one raw input. Every step adds to `complaints`, and goes on with those values that are valid."""

    def __init__(self, raw: dict[Any, Any], limits: Limits) -> None:
        self.complaints: list[Complaint] = []
        self._raw = raw
        self._limits = limits
        self._fields = fields(limits)
        self._warnings: list[str] = []

    def parse(self) -> GenerationRequest:
        given = self._known_fields(self._json_fields())
        loras = self._loras(given)
        output: OutputOptions = given.get("output", OutputOptions())
        if output.quality is not None and output.format is ImageFormat.PNG:
            self._warnings.append("output.quality does nothing for png, which is lossless")
        body = self._body(given)
        self._check_size(body)
        self._check_image_count(body)
        self._check_script(body)
        return GenerationRequest(
            body=body,
            loras=loras,
            on_lora_error=OnLoraError(given.get("on_lora_error", OnLoraError.FAIL)),
            warnings=tuple(self._warnings),
            output=output,
            allow_blank=given.get("allow_blank", False),
        )

    def _complain(self, path: str, message: str) -> None:
        if len(self.complaints) < MAX_COMPLAINTS:
            self.complaints.append(Complaint(path, message))
        elif not self._is_full:
            self.complaints.append(Complaint("input", "has more problems than are listed here"))

    @property
    def _is_full(self) -> bool:
        return len(self.complaints) > MAX_COMPLAINTS

    def _has_complaint(self, *names: str) -> bool:
        return any(_field_of(complaint.path) in names for complaint in self.complaints)

    # one field after the other

    def _json_fields(self) -> dict[str, Any]:
        """The fields that are strict JSON at every depth."""
        valid = {}
        budget = ValueBudget(MAX_VALUES)
        for name, value in self._raw.items():
            if not isinstance(name, str) or has_lone_surrogate(name):
                self._complain("input", "must have field names of valid text")
                continue
            problems = json_problems(value, budget)
            for path, message in problems:
                self._complain(shown(name) + path, message)
            if budget.is_exceeded or self._is_full:
                break
            if not problems or (name == "loras" and isinstance(value, list)):  # its valid items are still checked
                valid[name] = value
        return valid

    def _known_fields(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that fit the table, as checked values. null means absent: A1111's own clients send it."""
        checked: dict[str, Any] = {}
        for name, value in given.items():
            if self._is_full:
                break
            field = self._fields.get(name)
            if value is None and name != "prompt":
                continue
            if field is None:
                self._complain(shown(name), unknown_field(name, self._fields))
            elif field.kind is FieldClass.REFUSED:
                if not field.ignores(value):
                    self._complain(name, f"is refused: {field.reason}")
            else:
                try:
                    checked[name] = field.value.check(value)
                except InvalidValue as error:
                    for path, message in error.problems:
                        self._complain(name + path, message)
        if "prompt" not in self._raw:
            self._complain("prompt", "is required")
        return {name: value for name, value in checked.items() if not is_unset(name, value)}

    # LoRAs

    def _loras(self, given: Mapping[str, Any]) -> tuple[LoraRequest, ...]:
        bad_paths = {complaint.path for complaint in self.complaints}
        loras = self._noted(parse_list(given.get("loras", ()), bad_paths, self._limits.model_hosts))
        loras = self._noted(read_tags(given.get("prompt", ""), "prompt", loras))
        hr_prompt = given.get("hr_prompt", "")
        if given.get("enable_hr"):
            loras = self._noted(read_tags(hr_prompt, "hr_prompt", loras))
        elif has_lora_tag(hr_prompt):
            self._warnings.append("hr_prompt and its LoRA tags do nothing without enable_hr")
        for path in ("negative_prompt", "hr_negative_prompt"):
            if has_lora_tag(given.get(path, "")):
                self._warnings.append(f"the WebUI ignores LoRA tags in {path}")
        return loras

    def _noted(self, parsed: ParsedLoras) -> tuple[LoraRequest, ...]:
        """The LoRAs of a step. Its warnings and complaints are kept."""
        self._warnings.extend(parsed.warnings)
        for complaint in parsed.complaints:
            self._complain(complaint.path, complaint.message)
        return parsed.loras

    # fields that belong together

    def _body(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A1111's txt2img body, with our defaults."""
        own = ("override_settings", "sampler_index", "sampler_name")  # below, each under A1111's own name
        body = {name: value for name, value in given.items() if self._fields[name].is_webui_field and name not in own}
        settings = self._override_settings(given)
        if settings:
            body["override_settings"] = settings
        return {**DEFAULTS, **body, "sampler_name": self._sampler_name(given)}

    def _override_settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that a job overrides. clip_skip and vae are among them: A1111 ignores these two as fields."""
        settings = dict(given.get("override_settings", {}))
        for name, setting in (("clip_skip", "CLIP_stop_at_last_layers"), ("vae", "sd_vae")):
            if name in given and settings.setdefault(setting, given[name]) != given[name]:
                self._complain(name, f"contradicts override_settings.{setting}: give one of them")
        return settings

    def _sampler_name(self, given: Mapping[str, Any]) -> str:
        """The sampler; `sampler_index` is the old name of `sampler_name`."""
        old: str | None = given.get("sampler_index")
        sampler: str | None = given.get("sampler_name", old)
        if sampler is None:
            return DEFAULT_SAMPLER_WITH_SCHEDULER if "scheduler" in given else DEFAULT_SAMPLER
        if old is not None and old.strip().casefold() != sampler.strip().casefold():
            self._complain("sampler_index", "contradicts sampler_name and is the old name of it: give one of them")
        return sampler

    def _check_size(self, body: Mapping[str, Any]) -> None:
        if self._has_complaint(*_SIZE_FIELDS):
            return
        for side, other in (("width", "height"), ("height", "width")):
            if body.get(f"firstphase_{side}") and not body.get(f"firstphase_{other}"):
                self._complain(f"firstphase_{side}", f"must come with firstphase_{other}")
                return
        hires = bool(body.get("enable_hr"))
        if hires and "denoising_strength" not in body and not self._has_complaint("denoising_strength"):
            self._complain(
                "enable_hr", "must come with denoising_strength (0.4 to 0.7 is usual): without it the WebUI fails"
            )
        decisive = ("hr_resize_x", "hr_resize_y", "hr_scale", "enable_hr") if hires else ("width", "height")
        path = next((name for name in decisive if self._raw.get(name)), decisive[-1])
        if problem := size_problem(final_size(body), self._limits.max_pixels):
            self._complain(path, problem)

    def _check_image_count(self, body: Mapping[str, Any]) -> None:
        count = body.get("batch_size", 1) * body.get("n_iter", 1)
        limit = self._limits.max_images
        if count > limit:
            self._complain("batch_size", f"times n_iter is {count} pictures, and the limit is {limit}")

    def _check_script(self, body: Mapping[str, Any]) -> None:
        """A plot's arguments are only counted here: the order of its axes is the WebUI's."""
        if not self._has_complaint("script_name", "script_args", "batch_size", "n_iter"):
            for complaint in check_script(body, self._limits):
                self._complain(complaint.path, complaint.message)


def _in_input_order(complaints: Iterable[Complaint], raw: dict[Any, Any]) -> list[Complaint]:
    """Complaints in the order of the input's fields: missing fields first, complaints about the whole input last."""
    order = {shown(name): index for index, name in enumerate(raw)}

    def position(complaint: Complaint) -> int:
        if complaint.path == "input":
            return len(order)
        return order.get(complaint.path, order.get(_field_of(complaint.path), -1))

    return sorted(complaints, key=position)


def _field_of(path: str) -> str:
    return re.split(r"[.\[]", path, maxsplit=1)[0]

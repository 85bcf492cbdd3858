"""From a request to the body the WebUI gets: names in the WebUI's own spelling, LoRAs as tags in the prompt. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from a1111_worker import prompt
from a1111_worker.domain import AppliedLora, GenerationRequest, HeldModels, LoraRequest, Model, ModelRef
from a1111_worker.errors import Complaint, InvalidRequest
from a1111_worker.request.loras import name_means, read_tags, scale_of
from a1111_worker.webui.samplers import resolve_one, resolve_sampler, resolve_scheduler
from a1111_worker.webui.verification import GenerationPlan

SAME_SAMPLER, SAME_SCHEDULER = "Use same sampler", "Use same scheduler"


@dataclass(frozen=True)
class WebUILists:
    """What the WebUI has: the live lists that a job's names are checked against."""

    samplers: Sequence[Mapping[str, Any]]
    schedulers: Sequence[Mapping[str, Any]]
    upscalers: tuple[str, ...]
    scripts: tuple[str, ...]
    styles: Mapping[str, Mapping[str, Any]]
    vaes: tuple[str, ...]


def resolve(request: GenerationRequest, lists: WebUILists) -> GenerationRequest:
    """The request with every name as the WebUI spells it. InvalidRequest holds all complaints, with the nearest names.

    Styles that bring LoRA tags are merged into the prompts here, so that their LoRAs are held and proven like others.
    """
    body = dict(request.body)
    complaints: list[Complaint] = []

    def check(decide: Callable[[], None]) -> None:
        try:
            decide()
        except InvalidRequest as error:
            complaints.extend(error.complaints)

    def one(key: str, known: Sequence[str], what: str) -> None:
        if body.get(key):
            body[key] = resolve_one(body[key], known, what, path=key)

    check(lambda: _resolve_sampler(body, lists, ""))
    check(lambda: _resolve_sampler(body, lists, "hr_"))
    check(lambda: one("hr_upscaler", lists.upscalers, "upscaler"))
    check(lambda: one("script_name", lists.scripts, "script"))
    check(lambda: _resolve_always_on(body, lists))
    check(lambda: _resolve_vae(body, lists))
    check(lambda: _resolve_styles(body, lists))
    if complaints:
        raise InvalidRequest(complaints)
    return _with_styles_merged(replace(request, body=body), lists)


def compose(request: GenerationRequest, held: HeldModels) -> GenerationPlan:
    """The body and what its answer must prove. A LoRA among `failures` is left out, with a warning."""
    warnings = list(request.warnings)
    wanted: dict[str, _PromptLora] = {}
    for wish in request.loras:
        model = held.models.get(wish.ref)
        if model is None:
            failure = held.failures[wish.ref]
            warnings.append(f"the LoRA {wish.ref.label} was left out: {failure.code}: {failure.message}")
        key = model.file if model else f"{wish.path} {wish.ref.label}"
        if key in wanted:
            wanted[key].refs.append(wish.ref)  # two names for one file
            continue
        wanted[key] = _PromptLora(wish, model, [wish.ref])
        warnings += model.warnings if model else ()
    body = dict(request.body)
    placements = [lora.placement() for lora in wanted.values()]
    for field in ("prompt", "hr_prompt"):
        if body.get(field):
            body[field] = prompt.place(body[field], placements)
    if body.get("enable_hr") and body.get("hr_prompt"):
        stems = [lora.model.stem for lora in wanted.values() if lora.model]
        body["hr_prompt"] = prompt.mention_loras(body["hr_prompt"], stems)
    loras = tuple(lora.applied() for lora in wanted.values())
    return GenerationPlan(body, loras, request.on_lora_error, tuple(warnings), request.allow_blank)


@dataclass(frozen=True)
class _PromptLora:
    """A LoRA of the job: the first wish for it, its file (None: could not be had), and every reference to it."""

    wish: LoraRequest
    model: Model | None
    refs: list[ModelRef]

    def is_meant_by(self, name: str) -> bool:
        """Whether a tag of this name means it."""
        stem = self.model.stem if self.model else None
        return name == stem or any(name_means(name, ref) for ref in self.refs)

    def placement(self) -> prompt.Placement:
        return prompt.Placement(
            matches=self.is_meant_by,
            name=self.model.stem if self.model else None,
            scale=None if self.wish.in_prompt or self.wish.weighted_in_prompt else scale_of(self.wish),
            default=scale_of(self.wish),
            append=not self.wish.in_prompt,
        )

    def applied(self) -> AppliedLora:
        return AppliedLora(
            name=self.model.name if self.model else self.wish.ref.name or self.wish.ref.label,
            scale=scale_of(self.wish),
            model=self.model,
            loaded=False,
        )


def _resolve_sampler(body: dict[str, Any], lists: WebUILists, prefix: str) -> None:
    sampler, scheduler = body.get(f"{prefix}sampler_name"), body.get(f"{prefix}scheduler")
    if sampler and sampler != SAME_SAMPLER:
        name, label = resolve_sampler(sampler, scheduler, lists.samplers, lists.schedulers, prefix=prefix)
        body[f"{prefix}sampler_name"] = name
        if label is not None:
            body[f"{prefix}scheduler"] = label
    elif scheduler and scheduler != SAME_SCHEDULER:
        body[f"{prefix}scheduler"] = resolve_scheduler(scheduler, lists.schedulers, path=f"{prefix}scheduler")


def _resolve_always_on(body: dict[str, Any], lists: WebUILists) -> None:
    scripts = body.get("alwayson_scripts")
    if scripts:
        body["alwayson_scripts"] = {
            resolve_one(name, lists.scripts, "script", path=f"alwayson_scripts.{name}"): arguments
            for name, arguments in scripts.items()
        }


def _resolve_vae(body: dict[str, Any], lists: WebUILists) -> None:
    settings = body.get("override_settings")
    if settings and "sd_vae" in settings:
        vae = resolve_one(settings["sd_vae"], lists.vaes, "VAE", path="vae")
        body["override_settings"] = {**settings, "sd_vae": vae}


def _resolve_styles(body: dict[str, Any], lists: WebUILists) -> None:
    if body.get("styles"):
        known = tuple(lists.styles)
        body["styles"] = [
            resolve_one(style, known, "style", path=f"styles[{n}]") for n, style in enumerate(body["styles"])
        ]


def _with_styles_merged(request: GenerationRequest, lists: WebUILists) -> GenerationRequest:
    styles = [lists.styles[name] for name in request.body.get("styles") or ()]
    if not any(tag.is_lora for style in styles for tag in prompt.find_tags(str(style.get("prompt") or ""))):
        return request
    body = dict(request.body)
    names = body.pop("styles")
    for field in ("prompt", "hr_prompt", "negative_prompt", "hr_negative_prompt"):
        if field.startswith("hr_") and not body.get(field):
            continue  # the second pass has what the first one has
        part = field.removeprefix("hr_")
        for style in styles:
            body[field] = prompt.merge_style(body.get(field, ""), str(style.get(part) or ""))
    read = read_tags(body["prompt"], "styles", request.loras)
    if read.complaints:
        raise InvalidRequest(read.complaints)
    said = f"the styles {', '.join(names)} bring LoRAs and were written into the prompt"
    return replace(request, body=body, loras=read.loras, warnings=(*request.warnings, *read.warnings, said))

"""From a request and its models to the body that the WebUI gets: models as tags and words in the prompts. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from a1111_worker import prompt
from a1111_worker.domain import (
    AppliedEmbedding,
    AppliedLora,
    GenerationRequest,
    HeldModels,
    LoraRequest,
    Model,
    ModelRef,
)
from a1111_worker.request.embeddings import PROMPT_FIELDS, texts_in
from a1111_worker.request.loras import name_means, scale_of
from a1111_worker.request.script_tags import rename_in_script, separator_of
from a1111_worker.request.scripts import read_script
from a1111_worker.text import quoted, quoted_list
from a1111_worker.webui.extensions import with_models
from a1111_worker.webui.verification import GenerationPlan

MAX_TRIGGER_WORDS = 30
"""Words of one LoRA. Its creator may have listed hundreds."""

_NO_LIMIT = 1_000_000  # pictures: the job's own limit was checked before

Body = Mapping[str, Any]  # of a request


def compose(request: GenerationRequest, held: HeldModels, script_axes: Sequence[str] = ()) -> GenerationPlan:
    """The body, and what its answer must show. A LoRA among `failures` is left out, with a warning.

    `script_axes` are those of WebUILists. Raises InvalidRequest for a script that would change a LoRA's name.
    """
    loras, warnings = _job_loras(request, held)
    embeddings = _job_embeddings(request, held)
    models = {index: held.get(ref) for index, ref in request.controlnet_models.items()}
    body = _with_embedding_words(with_models(request.body, models), embeddings, script_axes)
    vae = held.models[request.vae] if request.vae is not None else None
    if vae is not None:
        body["override_settings"] = {**body.get("override_settings", {}), "sd_vae": vae.shown_file}
        warnings += vae.warnings
    separator = separator_of(body)
    words = _append_trigger_words(body, loras, separator) if request.trigger_words else {}
    warnings += _place_loras(body, loras, separator, script_axes)
    applied = tuple(replace(lora.applied(), trigger_words=words.get(index, ())) for index, lora in enumerate(loras))
    used = _used_embeddings(body, [model for model, _ in embeddings])
    for (model, names), embedding in zip(embeddings, used, strict=True):
        warnings += model.warnings
        if not embedding.prompts:
            warnings.append(f"no prompt of the job names the embedding {quoted(model.name)} ({quoted_list(names)})")
    return GenerationPlan(
        body,
        applied,
        request.on_lora_error,
        tuple(warnings),
        allow_blank=request.allow_blank,
        preview=request.preview,
        task=request.task,
        controlnet_models=tuple(model.shown for model in models.values()),
        embeddings=used,
        vae=vae,
        refiner=held.refiner,
        hires_checkpoint=held.hires_checkpoint,
    )


def _job_embeddings(request: GenerationRequest, held: HeldModels) -> list[tuple[Model, tuple[str, ...]]]:
    """The embeddings of a job, each file once, with the words that mean it in this job."""
    found: dict[str, tuple[Model, tuple[str, ...]]] = {}
    for embedding in request.embeddings:
        model = held.models[embedding.ref]
        stem = model.file.removesuffix(".safetensors")
        names = (model.shown, embedding.ref.name, stem, model.source_stem)
        earlier = found.get(model.shown, (model, ()))[1]
        words = (name.removesuffix(".safetensors") for name in names if name)
        found[model.shown] = model, tuple(dict.fromkeys((*earlier, *words)))
    return list(found.values())


def _with_embedding_words(
    body: Body, embeddings: Sequence[tuple[Model, tuple[str, ...]]], script_axes: Sequence[str]
) -> dict[str, Any]:
    """The body with the WebUI's words for embeddings in its prompts, and in the texts of its script's arguments."""
    meant: dict[str, str] = {}
    for model, words in embeddings:
        for word in words:
            meant.setdefault(word.casefold(), model.shown)
    changed = dict(body)
    for field in PROMPT_FIELDS:
        if changed.get(field):
            changed[field] = prompt.replace_words(changed[field], meant)
    plan = read_script(body, _NO_LIMIT, script_axes) if meant and body.get("script_args") else None
    if plan is not None:
        changed["script_args"] = plan.args_with([prompt.replace_words(text.text, meant) for text in plan.texts])
    return changed


def _used_embeddings(body: Body, models: Sequence[Model]) -> tuple[AppliedEmbedding, ...]:
    """The embeddings, each with the texts of the final body that its word is in."""
    texts = [str(body[field]) for field in PROMPT_FIELDS if body.get(field)] + list(texts_in(body.get("script_args")))
    return tuple(
        AppliedEmbedding(model, tuple(dict.fromkeys(text for text in texts if prompt.has_word(text, model.shown))))
        for model in models
    )


def _job_loras(request: GenerationRequest, held: HeldModels) -> tuple[list[_JobLora], list[str]]:
    """The LoRAs of a job, each file once, and the warnings about them after those of the request."""
    warnings = list(request.warnings)
    loras: dict[str, _JobLora] = {}
    for lora_request in request.loras:
        ref = lora_request.ref
        model = held.models.get(ref)
        if model is None:
            failure = held.failures[ref]
            warnings.append(f"the LoRA {ref.label} was left out: {failure.code}: {failure.message}")
        key = model.shown if model else f"{lora_request.path} {ref.label}"
        if key in loras:
            loras[key] = loras[key].also(lora_request)
            continue
        loras[key] = _JobLora(lora_request, model, (ref,))
        warnings += model.warnings if model else ()
    return list(loras.values()), warnings


def _place_loras(
    body: dict[str, Any], loras: Sequence[_JobLora], separator: str | None, script_axes: Sequence[str]
) -> list[str]:
    """Write the tags of the LoRAs into the prompts and the script's arguments. Returns the warnings about them."""
    placements = [lora.placement() for lora in loras]
    given = str(body.get("prompt", ""))
    body["prompt"] = prompt.place(given, placements, separator=separator)
    if body.get("hr_prompt"):
        body["hr_prompt"] = prompt.place(body["hr_prompt"], placements)
        if body.get("enable_hr"):
            shown = [lora.model.shown for lora in loras if lora.model]
            body["hr_prompt"] = prompt.mention_loras(body["hr_prompt"], shown)
    if not body.get("script_args"):
        return []
    weighed = prompt.weigh(given, placements, separator=separator)
    script = rename_in_script(body, weighed, placements, script_axes)
    body["script_args"] = script.args
    return [
        f"the prompt of a picture names the LoRA {quoted(lora.model.name)} twice, so it acts twice there"
        for lora in loras
        if lora.model and lora.model.shown in script.doubled
    ]


def _append_trigger_words(
    body: dict[str, Any], loras: Sequence[_JobLora], separator: str | None
) -> dict[int, tuple[str, ...]]:
    """Append the trained words of LoRAs that the prompts lack. Returns what was appended to the prompt, by LoRA.

    Of a prompt with parts (`separator_of`), the first one gets them: it is in every picture.
    """
    appended: dict[int, tuple[str, ...]] = {}
    for index, lora in enumerate(loras):
        words = prompt.split_words(lora.model.trained_words)[:MAX_TRIGGER_WORDS] if lora.model else []
        for field in ("prompt", "hr_prompt"):
            if body.get(field):
                missing = prompt.missing_words(body[field], words)
                first, *others = body[field].split(separator) if field == "prompt" and separator else [body[field]]
                body[field] = (separator or "").join([prompt.append_words(first, missing), *others])
                appended.setdefault(index, tuple(missing))
    return appended


@dataclass(frozen=True)
class _JobLora:
    """A LoRA of the job: the first request for it, its file (None: it is not available), and every reference to it."""

    request: LoraRequest
    model: Model | None
    refs: tuple[ModelRef, ...]

    def also(self, request: LoraRequest) -> _JobLora:
        """The LoRA with a second request for it, under another name. If only a tag has a scale, that one counts."""
        first = self.request
        if not first.in_prompt and first.scale is None and request.in_prompt:
            first = replace(first, scale=request.scale, weighted_in_prompt=request.scale is not None)
        return _JobLora(first, self.model, (*self.refs, request.ref))

    def has_name(self, name: str) -> bool:
        """Whether a tag with this name means this LoRA: each tag of the caller has a request, so one of its names."""
        return any(name_means(name, ref) for ref in self.refs)

    def placement(self) -> prompt.Placement:
        has_own_weights = self.request.in_prompt or self.request.weighted_in_prompt
        return prompt.Placement(
            matches=self.has_name,
            name=self.model.shown if self.model else None,
            scale=None if has_own_weights else scale_of(self.request, self.model),
            default=scale_of(self.request, self.model),
            append=not self.request.in_prompt,
        )

    def applied(self) -> AppliedLora:
        """The LoRA as the answer reports it; `loaded` is decided by the verification."""
        return AppliedLora(
            name=self.model.name if self.model else self.request.ref.name or self.request.ref.label,
            scale=scale_of(self.request, self.model),
            model=self.model,
            loaded=False,
        )

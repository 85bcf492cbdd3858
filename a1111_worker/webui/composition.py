"""From a request to the body the WebUI gets: names in the WebUI's own spelling, LoRAs as tags in the prompt. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from a1111_worker import prompt
from a1111_worker.domain import (
    AppliedEmbedding,
    AppliedLora,
    EmbeddingRequest,
    GenerationRequest,
    HeldModels,
    LoraRequest,
    Model,
    ModelRef,
    Task,
)
from a1111_worker.errors import Complaint, InvalidRequest
from a1111_worker.request.embeddings import PROMPT_FIELDS, texts_in, texts_of
from a1111_worker.request.fields import (
    BUILT_IN_SCRIPTS,
    CHECKPOINT_OPTION,
    CHECKPOINT_REASON,
    DEFAULT_LIMITS,
    Limits,
)
from a1111_worker.request.loras import has_lora_tag, name_means, read_tags, read_tags_of_script, scale_of
from a1111_worker.request.picture_scripts import SD_UPSCALER, is_sd_upscale
from a1111_worker.request.script_plan import ScriptPlan, ScriptRun
from a1111_worker.request.script_tags import rename_in_script, separator_of
from a1111_worker.request.scripts import check_script, read_script
from a1111_worker.request.unknown import SURE
from a1111_worker.similar import nearest
from a1111_worker.text import printable, quoted, quoted_list
from a1111_worker.webui.extensions import NO_EXTENSIONS, ExtensionLists, models_to_hold, resolve_units, with_models
from a1111_worker.webui.responses import Sampler, Scheduler, Style
from a1111_worker.webui.samplers import resolve_name, resolve_sampler, resolve_scheduler
from a1111_worker.webui.verification import GenerationPlan

SAME_SAMPLER, SAME_SCHEDULER = "Use same sampler", "Use same scheduler"

MAX_TRIGGER_WORDS = 30
"""Words of one LoRA. Its creator may have listed hundreds."""

_NO_LIMIT = 1_000_000  # pictures: the job's own limit was checked before

Body = Mapping[str, Any]  # of a request


@dataclass(frozen=True)
class WebUILists:
    """What the WebUI has: the live lists that a job's names are checked against. Styles are found by their name.

    `checkpoint_names` are the texts that name the checkpoint that is there, in lower case, its title first.
    `script_axes` are the axes of "X/Y/Z plot": a job names them by their number. `latent_upscalers` enlarge in hires
    fix alone. `missing_upscalers` are listed by the WebUI too, and their files are not there or do not work.
    `can_restore_faces` is None if it is unknown, because somebody else runs the WebUI; so is `face_restorers`, the
    restorers whose files are there.
    """

    samplers: Sequence[Sampler]
    schedulers: Sequence[Scheduler]
    upscalers: Sequence[str]
    scripts: Sequence[str]
    styles: Mapping[str, Style]
    vaes: Sequence[str]
    checkpoint_names: Sequence[str] = ()
    script_axes: Sequence[str] = ()
    img2img_scripts: Sequence[str] = ()
    img2img_script_axes: Sequence[str] = ()
    latent_upscalers: Sequence[str] = ()
    missing_upscalers: Sequence[str] = ()
    can_restore_faces: bool | None = None
    face_restorers: Sequence[str] | None = None
    extensions: ExtensionLists = NO_EXTENSIONS

    def of_task(self, task: Task) -> WebUILists:
        """The same lists with the scripts of this task."""
        if task is not Task.IMG2IMG:
            return self
        return replace(self, scripts=self.img2img_scripts, script_axes=self.img2img_script_axes)


FindEmbeddings = Callable[[Sequence[str]], Sequence[ModelRef]]
"""Returns the embeddings of the cache that texts name by a word of everybody's."""


def resolve(
    request: GenerationRequest,
    lists: WebUILists,
    limits: Limits = DEFAULT_LIMITS,
    find_embeddings: FindEmbeddings = lambda texts: (),
) -> GenerationRequest:
    """The request with every name as the WebUI spells it. InvalidRequest holds all complaints, with the nearest names.

    A script is held to `limits` here: only the WebUI knows the axes of a plot, and its styles may be merged by now.
    Styles with LoRA tags, and those of a job with embeddings, are merged into the prompts here, so that their models
    are held and verified like others.
    """
    lists = lists.of_task(request.task)
    request = _with_webuis_vae(request, lists)
    body = dict(request.body)
    complaints: list[Complaint] = []
    for resolve_part in _RESOLVERS:
        try:
            body.update(resolve_part(body, lists))
        except InvalidRequest as error:
            complaints.extend(error.complaints)
    if complaints:
        raise InvalidRequest(complaints)
    if body.get("override_settings") == {}:
        del body["override_settings"]  # it held the checkpoint's name alone
    warnings = request.warnings
    dropped = list(request.dropped)
    if CHECKPOINT_OPTION in request.body.get("override_settings", ()):
        dropped.append(f"override_settings.{CHECKPOINT_OPTION}")
    if dropped:
        warnings = (*warnings, f"dropped, because it cannot change the pictures: {quoted_list(dropped, most=50)}")
    if body.get("restore_faces") and lists.can_restore_faces is None:
        warnings = (
            *warnings,
            "nothing shows whether restore_faces did anything: that needs files in the WebUI's folders",
        )
    models = models_to_hold(body, request.controlnet_models)
    resolved = replace(request, body=body, controlnet_models=models, warnings=warnings)
    styles = [lists.styles[name] for name in body.get("styles") or ()]
    style_texts = [text for style in styles for text in (style.prompt, style.negative_prompt)]
    found = find_embeddings([*texts_of(resolved), *style_texts])
    listed = {embedding.ref for embedding in resolved.embeddings}
    named = tuple(EmbeddingRequest(ref, "prompt") for ref in found if ref not in listed)
    resolved = _merge_styles(replace(resolved, embeddings=(*resolved.embeddings, *named)), lists)
    if complaints := check_script(resolved.body, limits, lists.script_axes, request.task):
        raise InvalidRequest(complaints)
    plan = read_script(resolved.body, limits.max_images, lists.script_axes)
    return resolved if plan is None else _resolve_runs(resolved, plan, lists)


def resolve_upscaler(name: str, lists: WebUILists, *, path: str, latent: bool = False) -> str:
    """An upscaler's name as the WebUI spells it; InvalidRequest if it has none of that name, or not its file.

    `latent`: those of hires fix count too.
    """
    known = (*lists.latent_upscalers, *lists.upscalers) if latent else lists.upscalers
    try:
        missing = resolve_name(name, lists.missing_upscalers, "upscaler")
    except InvalidRequest:
        return resolve_name(name, known, "upscaler", path=path)
    raise InvalidRequest([Complaint(path, missing_upscaler(missing, known))])


def missing_upscaler(name: str, there: Sequence[str]) -> str:
    """Why an upscaler that the WebUI lists is refused. `there` are those that would be taken."""
    return (
        f"the file of {quoted(name)} is not there or does not work, and A1111 would silently use Lanczos; "
        f"these are there: {quoted_list(there)}"
    )


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
    placements = [lora.placement() for lora in loras]
    separator = separator_of(body)
    words = _append_trigger_words(body, loras, separator) if request.trigger_words else {}
    given = str(body.get("prompt", ""))
    body["prompt"] = prompt.place(given, placements, separator=separator)
    if body.get("hr_prompt"):
        body["hr_prompt"] = prompt.place(body["hr_prompt"], placements)
        if body.get("enable_hr"):
            shown = [lora.model.shown for lora in loras if lora.model]
            body["hr_prompt"] = prompt.mention_loras(body["hr_prompt"], shown)
    if body.get("script_args"):
        weighed = prompt.weigh(given, placements, separator=separator)
        script = rename_in_script(body, weighed, placements, script_axes)
        body["script_args"] = script.args
        warnings += [
            f"the prompt of a picture names the LoRA {quoted(lora.model.name)} twice, so it acts twice there"
            for lora in loras
            if lora.model and lora.model.shown in script.doubled
        ]
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


def _with_webuis_vae(request: GenerationRequest, lists: WebUILists) -> GenerationRequest:
    """The request with a VAE that the WebUI has itself as a setting. Somebody else's WebUI has VAEs of its own."""
    ref = request.vae
    if ref is None or not ref.is_bare_name or ref.name is None:
        return request
    wanted = ref.name.removesuffix(".safetensors").casefold()
    own = next((vae for vae in lists.vaes if wanted in (vae.casefold(), vae.casefold().rpartition(".")[0])), None)
    if own is None or own.startswith("~"):  # `~`: a link of this worker, which the job must hold
        return request
    settings = {**request.body.get("override_settings", {}), "sd_vae": own}
    return replace(request, vae=None, body={**request.body, "override_settings": settings})


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
    """A LoRA of the job: the first request for it, its file (None: it could not be had), and every reference to it."""

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


# -- one function for each kind of name: it returns the fields that change


def _resolve_first_pass(body: Body, lists: WebUILists) -> Body:
    return _resolve_sampler(body, lists, prefix="")


def _resolve_second_pass(body: Body, lists: WebUILists) -> Body:
    return _resolve_sampler(body, lists, prefix="hr_")


def _resolve_sampler(body: Body, lists: WebUILists, prefix: str) -> Body:
    sampler_field, scheduler_field = f"{prefix}sampler_name", f"{prefix}scheduler"
    sampler, scheduler = body.get(sampler_field), body.get(scheduler_field)
    if sampler and sampler != SAME_SAMPLER:
        name, label = resolve_sampler(sampler, scheduler, lists.samplers, lists.schedulers, prefix=prefix)
        return {sampler_field: name} if label is None else {sampler_field: name, scheduler_field: label}
    if scheduler and scheduler != SAME_SCHEDULER:
        return {scheduler_field: resolve_scheduler(scheduler, lists.schedulers, path=scheduler_field)}
    return {}


def _resolve_upscaler(body: Body, lists: WebUILists) -> Body:
    name = body.get("hr_upscaler")
    return {"hr_upscaler": resolve_upscaler(name, lists, path="hr_upscaler", latent=True)} if name else {}


def _resolve_script_upscaler(body: Body, lists: WebUILists) -> Body:
    if not is_sd_upscale(body):
        return {}
    arguments = list(body["script_args"])
    arguments[SD_UPSCALER] = resolve_upscaler(arguments[SD_UPSCALER], lists, path=f"script_args[{SD_UPSCALER}]")
    return {"script_args": arguments}


def _check_faces(body: Body, lists: WebUILists) -> Body:
    if body.get("restore_faces") and lists.can_restore_faces is False:
        reason = "the files for it are not there, and A1111 would silently leave every face as it is"
        raise InvalidRequest([Complaint("restore_faces", f"is refused: {reason}")])
    return {}


def _resolve_script(body: Body, lists: WebUILists) -> Body:
    name = body.get("script_name")
    return {"script_name": _resolve_script_name(name, lists, path="script_name")} if name else {}


def _resolve_always_on_scripts(body: Body, lists: WebUILists) -> Body:
    scripts = body.get("alwayson_scripts")
    if not scripts:
        return {}
    resolved = {}
    for name, arguments in scripts.items():
        script = _resolve_script_name(name, lists, path=f"alwayson_scripts.{printable(name, 60)}")
        resolved[script] = resolve_units(
            script, arguments, lists.extensions, given=name, has_init_image="init_images" in body
        )
    return {"alwayson_scripts": resolved}


def _resolve_script_name(name: str, lists: WebUILists, *, path: str) -> str:
    """A script's name as the WebUI spells it. Scripts that no job may use are never suggested."""
    try:
        return resolve_name(name, lists.scripts, "script", path=path)
    except InvalidRequest:
        usable = [script for script in lists.scripts if script.casefold() not in BUILT_IN_SCRIPTS]
        near = nearest(name, usable, cutoff=SURE)
        hint = f"; the nearest: {quoted_list(near)}" if near else ""
        raise InvalidRequest([Complaint(path, f"the script {quoted(name)} is not in this image{hint}")]) from None


def _resolve_checkpoint(body: Body, lists: WebUILists) -> Body:
    """A job may name the checkpoint that is there. The name is not sent: a switch to it is not needed."""
    settings = dict(body.get("override_settings", {}))
    name = settings.pop(CHECKPOINT_OPTION, "").strip()
    if name and name.casefold() not in lists.checkpoint_names:
        message = f"is refused: {CHECKPOINT_REASON}; it is {quoted(lists.checkpoint_names[0])}"
        raise InvalidRequest([Complaint(f"override_settings.{CHECKPOINT_OPTION}", message)])
    return {"override_settings": settings} if settings != body.get("override_settings", {}) else {}


def _resolve_vae(body: Body, lists: WebUILists) -> Body:
    settings = body.get("override_settings")
    if not settings or "sd_vae" not in settings:
        return {}
    return {
        "override_settings": {**settings, "sd_vae": resolve_name(settings["sd_vae"], lists.vaes, "VAE", path="vae")}
    }


def _resolve_styles(body: Body, lists: WebUILists) -> Body:
    styles = body.get("styles")
    if not styles:
        return {}
    known = tuple(lists.styles)
    return {"styles": [resolve_name(style, known, "style", path=f"styles[{n}]") for n, style in enumerate(styles)]}


_RESOLVERS: Sequence[Callable[[Body, WebUILists], Body]] = (
    _resolve_first_pass,
    _resolve_second_pass,
    _resolve_upscaler,
    _resolve_script_upscaler,
    _check_faces,
    _resolve_script,
    _resolve_always_on_scripts,
    _resolve_checkpoint,
    _resolve_vae,
    _resolve_styles,
)


def _resolve_runs(request: GenerationRequest, plan: ScriptPlan, lists: WebUILists) -> GenerationRequest:
    """The request with the LoRAs that its script's pictures name. Other names of the script are checked here."""
    prompts: dict[str, str] = {}
    complaints: dict[Complaint, None] = {}  # an ordered set
    for run in plan.runs:
        if "prompt" in run.fields:
            prompts.setdefault(str(run.fields["prompt"]), _place_of(run, "prompt"))
        complaints |= dict.fromkeys(_complaints_of_run(run, request.body, lists))
    read = read_tags_of_script(prompts, request.loras)
    if complaints or read.complaints:
        raise InvalidRequest([*complaints, *read.complaints])
    return replace(request, loras=read.loras, warnings=tuple(dict.fromkeys((*request.warnings, *read.warnings))))


def _complaints_of_run(run: ScriptRun, body: Body, lists: WebUILists) -> Iterator[Complaint]:
    """What is wrong with a script's own values for upscaler, styles and faces. A1111 would silently go without them."""
    for field, check in _CHECKS_OF_RUN.items():
        if run.fields.get(field, body.get(field)) != body.get(field):
            try:
                check(run.fields, body, lists)
            except InvalidRequest as error:
                for complaint in error.complaints:
                    yield Complaint(_place_of(run, field), complaint.message)


def _place_of(run: ScriptRun, field: str) -> str:
    return f"script_args{run.origins.get(field, ('', ''))[0]}"


def _check_upscaler_of_run(changed: Body, body: Body, lists: WebUILists) -> None:
    _check_spelling(changed["hr_upscaler"], resolve_upscaler(changed["hr_upscaler"], lists, path=""))


def _check_styles_of_run(changed: Body, body: Body, lists: WebUILists) -> None:
    for name in changed["styles"][len(body.get("styles") or ()) :]:
        _check_spelling(name, resolve_name(name, tuple(lists.styles), "style", path=""))
        if has_lora_tag(lists.styles[name].prompt):
            message = f"the style {quoted(name)} has LoRA tags: give it in the field styles"
            raise InvalidRequest([Complaint("", message)])


def _check_faces_of_run(changed: Body, body: Body, lists: WebUILists) -> None:
    _check_faces(changed, lists)


def _check_spelling(name: str, known: str) -> None:
    if name != known:
        raise InvalidRequest([Complaint("", f"must be written {quoted(known)}, not {quoted(name)}")])


_CHECKS_OF_RUN: Mapping[str, Callable[[Body, Body, WebUILists], None]] = {
    "hr_upscaler": _check_upscaler_of_run,
    "styles": _check_styles_of_run,
    "restore_faces": _check_faces_of_run,
}


def _merge_styles(request: GenerationRequest, lists: WebUILists) -> GenerationRequest:
    """The request with its styles written into the prompts, if one of them has a LoRA tag or the job has embeddings.

    Else the WebUI does that.
    """
    styles = [lists.styles[name] for name in request.body.get("styles") or ()]
    has_lora = any(tag.is_lora for style in styles for tag in prompt.find_tags(style.prompt))
    if not has_lora and not (styles and request.embeddings):
        return request
    body = dict(request.body)
    names = body.pop("styles")
    for field in ("prompt", "hr_prompt", "negative_prompt", "hr_negative_prompt"):
        if field.startswith("hr_") and not body.get(field):
            continue  # the second pass gets the text of the first one
        for style in styles:
            text = style.negative_prompt if field.endswith("negative_prompt") else style.prompt
            body[field] = prompt.merge_style(body.get(field, ""), text)
    read = read_tags(body["prompt"], "styles", request.loras)
    if read.complaints:
        raise InvalidRequest(read.complaints)
    why = "bring LoRAs and" if has_lora else "may name embeddings, so they"
    merged = f"the styles {quoted_list(names)} {why} were written into the prompt"
    return replace(request, body=body, loras=read.loras, warnings=(*request.warnings, *read.warnings, merged))

"""The names of a job, each as the WebUI spells it and only if it is there, or every complaint about them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from a1111_worker import prompt
from a1111_worker.domain import EmbeddingRequest, GenerationRequest, ModelRef, Task
from a1111_worker.errors import Complaint, InvalidRequest
from a1111_worker.request.embeddings import texts_of
from a1111_worker.request.fields import BUILT_IN_SCRIPTS, CHECKPOINT_OPTION, CHECKPOINT_REASON, DEFAULT_LIMITS, Limits
from a1111_worker.request.loras import has_lora_tag, read_tags, read_tags_of_script
from a1111_worker.request.picture_scripts import SD_UPSCALER, is_sd_upscale
from a1111_worker.request.script_plan import ScriptPlan, ScriptRun
from a1111_worker.request.scripts import check_script, read_script
from a1111_worker.request.unknown import SURE
from a1111_worker.similar import nearest
from a1111_worker.text import printable, quoted, quoted_list
from a1111_worker.webui.extensions import NO_EXTENSIONS, ExtensionLists, models_to_hold, resolve_units
from a1111_worker.webui.responses import Sampler, Scheduler, Style
from a1111_worker.webui.samplers import resolve_name, resolve_sampler, resolve_scheduler

SAME_SAMPLER, SAME_SCHEDULER = "Use same sampler", "Use same scheduler"

Body = Mapping[str, Any]  # of a request


@dataclass(frozen=True)
class WebUILists:
    """What the WebUI has: the live lists that a job's names are checked against. Styles are found by their name.

    `checkpoint_names` are the texts that name the checkpoint that is there, in lower case, its title first.
    `script_axes` are the axes of "X/Y/Z plot": a job names them by their number. `latent_upscalers` enlarge in hires
    fix alone. `missing_upscalers` are listed by the WebUI too, and their files are not there or do not work.
    `face_restorers` are those whose files are there; None if that is unknown, because somebody else runs the WebUI.
    `restorer` is the one of a job that names none.
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
    face_restorers: Sequence[str] | None = None
    restorer: str = ""
    extensions: ExtensionLists = NO_EXTENSIONS

    def of_task(self, task: Task) -> WebUILists:
        """The same lists with the scripts of this task."""
        if task is not Task.IMG2IMG:
            return self
        return replace(self, scripts=self.img2img_scripts, script_axes=self.img2img_script_axes)


FindEmbeddings = Callable[[Sequence[str]], Sequence[ModelRef]]
"""Returns the embeddings of the cache that texts name by a word which means them in every job."""


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
    body = _resolve_names(request.body, lists)
    resolved = replace(
        request,
        body=body,
        controlnet_models=models_to_hold(body, request.controlnet_models),
        warnings=(*request.warnings, *_warnings(request, body, lists)),
    )
    resolved = _merge_styles(_with_named_embeddings(resolved, lists, find_embeddings), lists)
    if complaints := check_script(resolved.body, limits, lists.script_axes, request.task):
        raise InvalidRequest(complaints)
    plan = read_script(resolved.body, limits.max_images, lists.script_axes)
    return resolved if plan is None else _resolve_runs(resolved, plan, lists)


def _resolve_names(given: Body, lists: WebUILists) -> dict[str, Any]:
    """The body with every name as the WebUI spells it, or every complaint about them at once."""
    body = dict(given)
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
    return body


def _warnings(request: GenerationRequest, body: Body, lists: WebUILists) -> Iterator[str]:
    dropped = list(request.dropped)
    if CHECKPOINT_OPTION in request.body.get("override_settings", ()):
        dropped.append(f"override_settings.{CHECKPOINT_OPTION}")
    if dropped:
        yield f"dropped, because it cannot change the pictures: {quoted_list(dropped, most=50)}"
    if body.get("restore_faces") and lists.face_restorers is None:
        yield "nothing shows whether restore_faces did anything: that needs files in the WebUI's folders"


def _with_named_embeddings(
    request: GenerationRequest, lists: WebUILists, find_embeddings: FindEmbeddings
) -> GenerationRequest:
    """The request with those embeddings of the cache too that its texts and its styles name."""
    styles = [lists.styles[name] for name in request.body.get("styles") or ()]
    style_texts = [text for style in styles for text in (style.prompt, style.negative_prompt)]
    found = find_embeddings([*texts_of(request), *style_texts])
    listed = {embedding.ref for embedding in request.embeddings}
    named = tuple(EmbeddingRequest(ref, "prompt") for ref in found if ref not in listed)
    return replace(request, embeddings=(*request.embeddings, *named))


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
    if not body.get("restore_faces") or lists.face_restorers is None:
        return {}
    silently = "and A1111 would silently leave every face as it is"
    if not lists.face_restorers:
        raise InvalidRequest([Complaint("restore_faces", f"is refused: the files for it are not there, {silently}")])
    named = body.get("override_settings", {}).get("face_restoration_model", lists.face_restorers[0])
    if named not in lists.face_restorers:
        reason = f"the files of {named} are not there, {silently}; there is {quoted_list(lists.face_restorers)}"
        raise InvalidRequest([Complaint("override_settings.face_restoration_model", f"is refused: {reason}")])
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

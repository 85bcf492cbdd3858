"""The request of a task that generates pictures: the checked fields of its table, read as a whole.

The LoRAs of the list and of the prompts, fields that must agree with each other, the size of the final image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from a1111_worker.domain import (
    OWN_CHECKPOINT,
    Checkpoints,
    EmbeddingRequest,
    GenerationRequest,
    ImageFormat,
    LoraRequest,
    ModelKind,
    ModelRef,
    OnLoraError,
    OutputOptions,
    PictureSource,
    Task,
)
from a1111_worker.request.embeddings import parse_embeddings, parse_model
from a1111_worker.request.extensions import is_idle, read_units
from a1111_worker.request.fields import INERT_OPTIONS, unknown_checkpoint
from a1111_worker.request.img2img import FIRST
from a1111_worker.request.loras import ParsedLoras, has_lora_tag, parse_list, read_tags
from a1111_worker.request.picture_scripts import is_sd_upscale
from a1111_worker.request.reader import InputReader
from a1111_worker.request.scripts import TAKE_ONE_PICTURE, check_script
from a1111_worker.request.size import final_size, size_problem
from a1111_worker.request.values import InvalidValue, shown

DEFAULTS: Mapping[str, Any] = {"steps": 25, "cfg_scale": 7}
DEFAULT_SIZE: Mapping[str, Any] = {"width": 1024, "height": 1024}
DEFAULT_SAMPLER = "DPM++ 2M Karras"
DEFAULT_SAMPLER_WITH_SCHEDULER = "DPM++ 2M"  # if the job names a scheduler and no sampler

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


def read_txt2img(reader: InputReader) -> GenerationRequest:
    """The request that the fields of a txt2img job mean. What does not fit together is added to its complaints."""
    loras = _loras(reader)
    body = {**DEFAULT_SIZE, **_body(reader)}
    pictures = _pictures(reader)
    _check_size(reader, body)
    _check_image_count(reader, body)
    _check_script(reader, body, Task.TXT2IMG)
    return replace(_request(reader, body, loras, Task.TXT2IMG), pictures=pictures)


def read_img2img(reader: InputReader) -> GenerationRequest:
    """The request that the fields of an img2img job mean. Width and height may still be missing in its body."""
    loras = _loras(reader)
    body = {"prompt": "", **_body(reader)}
    pictures = _pictures(reader)
    body = {name: value for name, value in body.items() if name not in ("init_images", "mask")}
    if {"width", "height"} <= body.keys():
        _check_size(reader, body)
    _check_image_count(reader, body)
    _check_init_images(reader, body)
    _check_script(reader, body, Task.IMG2IMG)
    return replace(_request(reader, body, loras, Task.IMG2IMG), pictures=pictures)


def _request(
    reader: InputReader, body: Mapping[str, Any], loras: tuple[LoraRequest, ...], task: Task
) -> GenerationRequest:
    given = reader.given
    output: OutputOptions = given.get("output", OutputOptions())
    if output.quality is not None and output.format is ImageFormat.PNG:
        reader.warnings.append("output.quality does nothing for png, which is lossless")
    checkpoints = _checkpoints(reader)
    if checkpoints.refiner is not None:
        body = {**body, "refiner_switch_at": given.get("refiner_switch_at")}
    return GenerationRequest(
        body=body,
        task=task,
        controlnet_models=reader.controlnet_models,
        loras=loras,
        on_lora_error=OnLoraError(given.get("on_lora_error", OnLoraError.FAIL)),
        warnings=tuple(reader.warnings),
        dropped=tuple(reader.dropped),
        output=output,
        include_models="models" in given.get("include", ()),
        allow_blank=given.get("allow_blank", False),
        preview=given.get("preview", False),
        trigger_words=given.get("trigger_words", False),
        checkpoints=checkpoints,
        embeddings=_embeddings(reader),
        vae=_vae(reader),
    )


# -- checkpoints

_OF_CHECKPOINTS = ("refiner_checkpoint", "refiner_switch_at", "hr_checkpoint_name")


def _main_checkpoint(reader: InputReader) -> ModelRef | None:
    """The checkpoint of the field `checkpoint`; None if the job leaves it out, or there is a complaint."""
    limits, value = reader.limits, reader.given.get("checkpoint")
    listed = limits.checkpoint(value) if isinstance(value, str) else None
    if value is None or listed is not None:
        return listed
    ref, problems = parse_model("checkpoint", value, ModelKind.CHECKPOINT, limits.model_hosts)
    for problem in problems:
        reader.complain(problem.path, problem.message)
    if ref is None:
        return None
    if ref.is_bare_name:
        reader.complain("checkpoint", f"{unknown_checkpoint(limits)}; or give a URL, an AIR, a version id or hf:…")
    return limits.checkpoint(ref) or replace(ref, max_size=limits.max_checkpoint_bytes)


def _checkpoints(reader: InputReader) -> Checkpoints:
    """The checkpoints that a job names. One that would draw in any case is dropped."""

    def named(field: str) -> ModelRef | None:
        return reader.limits.checkpoint(reader.given[field]) if field in reader.given else None

    main = _main_checkpoint(reader) or OWN_CHECKPOINT
    refiner, hires = named("refiner_checkpoint"), named("hr_checkpoint_name")
    if hires == main:
        hires = None
        reader.dropped.append("hr_checkpoint_name")
    if refiner is None:
        if "refiner_switch_at" in reader.given:
            reader.dropped.append("refiner_switch_at")
    elif "refiner_switch_at" not in reader.given:
        if not reader.has_complaint("refiner_switch_at"):
            reader.complain("refiner_checkpoint", "must come with refiner_switch_at (0.8 is usual)")
    elif refiner == (hires or main):  # with hires the refiner takes part in the second pass alone
        refiner = None
        reader.dropped += ["refiner_checkpoint", "refiner_switch_at"]
    return Checkpoints(main, refiner, hires)


# -- LoRAs


def _loras(reader: InputReader) -> tuple[LoraRequest, ...]:
    given = reader.given
    bad_paths = {complaint.path for complaint in reader.complaints}
    loras = _noted(reader, parse_list(given.get("loras", ()), bad_paths, reader.limits.model_hosts))
    loras = _noted(reader, read_tags(given.get("prompt", ""), "prompt", loras))
    hr_prompt = given.get("hr_prompt", "")
    if given.get("enable_hr"):
        loras = _noted(reader, read_tags(hr_prompt, "hr_prompt", loras))
    elif has_lora_tag(hr_prompt):
        reader.warnings.append("hr_prompt and its LoRA tags do nothing without enable_hr")
    for path in ("negative_prompt", "hr_negative_prompt"):
        if has_lora_tag(given.get(path, "")):
            reader.warnings.append(f"the WebUI ignores LoRA tags in {path}")
    return loras


def _noted(reader: InputReader, parsed: ParsedLoras) -> tuple[LoraRequest, ...]:
    """The LoRAs of a step. Its warnings and complaints are kept."""
    reader.warnings.extend(parsed.warnings)
    for complaint in parsed.complaints:
        reader.complain(complaint.path, complaint.message)
    return parsed.loras


# -- fields that belong together


def _body(reader: InputReader) -> dict[str, Any]:
    """A1111's body, with our defaults."""
    own = ("sampler_index", "sampler_name", *_OF_CHECKPOINTS, *_PARTLY_DROPPED)
    body = {
        name: value for name, value in reader.given.items() if reader.table[name].is_webui_field and name not in own
    }
    for name, read in _PARTLY_DROPPED.items():
        if value := read(reader):
            body[name] = value
    return {**DEFAULTS, **body, "sampler_name": _sampler_name(reader)}


def _override_settings(reader: InputReader) -> dict[str, Any]:
    """The settings that a job overrides. clip_skip and vae are among them: A1111 ignores these two as fields."""
    given = reader.given
    settings = {}
    for name, value in given.get("override_settings", {}).items():
        if name in INERT_OPTIONS:
            reader.dropped.append(f"override_settings.{name}")
        else:
            settings[name] = value
    for name, setting in (("clip_skip", "CLIP_stop_at_last_layers"), ("vae", "sd_vae")):
        if name in given and settings.setdefault(setting, given[name]) != given[name]:
            reader.complain(name, f"contradicts override_settings.{setting}: give one of them")
    if not _is_webui_vae(settings.get("sd_vae")):
        del settings["sd_vae"]  # a file: `_vae`
    return settings


def _is_webui_vae(value: Any) -> bool:
    """Whether a value of `vae` is a word of the WebUI for no file of its own, or there is none."""
    return value is None or (isinstance(value, str) and value.strip().casefold() in ("automatic", "none"))


def _vae(reader: InputReader) -> ModelRef | None:
    """The file of a VAE that the job names, in `vae` or in override_settings."""
    given = reader.given
    path = "vae" if "vae" in given else "override_settings.sd_vae"
    value = given.get("vae", given.get("override_settings", {}).get("sd_vae"))
    if _is_webui_vae(value):
        return None
    ref, problems = parse_model(path, value, ModelKind.VAE, reader.limits.model_hosts)
    for problem in problems:
        reader.complain(problem.path, problem.message)
    return ref


def _embeddings(reader: InputReader) -> tuple[EmbeddingRequest, ...]:
    requests, complaints = parse_embeddings(reader.given.get("embeddings", ()), reader.limits.model_hosts)
    for complaint in complaints:
        reader.complain(complaint.path, complaint.message)
    return requests


def _styles(reader: InputReader) -> list[str]:
    """The styles without those that stand for none."""
    styles = []
    for index, style in enumerate(reader.given.get("styles", ())):
        if style.strip() in ("", "None"):
            reader.dropped.append(f"styles[{index}]")
        else:
            styles.append(style)
    return styles


def _always_on_scripts(reader: InputReader) -> dict[str, Any]:
    """The always-on scripts that are asked for anything, the units of known extensions read key by key."""
    scripts = {}
    for name, script in reader.given.get("alwayson_scripts", {}).items():
        path, args = f"alwayson_scripts.{shown(name)}", script.get("args", ())
        if is_idle(name, args):
            reader.dropped.append(path)
            continue
        scripts[name] = script
        try:
            units = read_units(name, args, reader.limits)
        except InvalidValue as error:
            for below, message in error.problems:
                reader.complain(f"{path}.args{below}", message)
            continue
        if units is not None:
            scripts[name] = {"args": units.args}
            reader.controlnet_models |= units.models
            reader.pictures |= _unit_pictures(f"{path}.args", units.pictures)
    return scripts


def _unit_pictures(path: str, pictures: Mapping[str, PictureSource]) -> dict[str, PictureSource]:
    """The pictures of units under their paths in the job. A mask is made as large as the picture beside it."""
    found = {}
    for below, source in pictures.items():
        of = f"{path}{below.removesuffix('.mask')}.image" if below.endswith(".mask") else None
        found[path + below] = replace(source, mask_of=of)
    return found


_PARTLY_DROPPED: Mapping[str, Callable[[InputReader], Any]] = {
    "override_settings": _override_settings,
    "styles": _styles,
    "alwayson_scripts": _always_on_scripts,
}
"""Fields of which a part may be dropped, and what is left of each."""


def _sampler_name(reader: InputReader) -> str:
    """The sampler. `sampler_index` is the old name of `sampler_name`, and as in A1111 the new name wins."""
    old: str | None = reader.given.get("sampler_index")
    sampler: str | None = reader.given.get("sampler_name", old)
    if sampler is None:
        if "sampler" in reader.dropped:
            reader.complain("sampler", "is unknown; did you mean 'sampler_name'?")
        return DEFAULT_SAMPLER_WITH_SCHEDULER if "scheduler" in reader.given else DEFAULT_SAMPLER
    if old is not None and old.strip().casefold() != sampler.strip().casefold():
        reader.dropped.append("sampler_index")
    return sampler


def _check_size(reader: InputReader, body: Mapping[str, Any]) -> None:
    if reader.has_complaint(*_SIZE_FIELDS):
        return
    for side, other in (("width", "height"), ("height", "width")):
        if body.get(f"firstphase_{side}") and not body.get(f"firstphase_{other}"):
            reader.complain(f"firstphase_{side}", f"must come with firstphase_{other}")
            return
    hires = bool(body.get("enable_hr"))
    if hires and "denoising_strength" not in body and not reader.has_complaint("denoising_strength"):
        reader.complain(
            "enable_hr", "must come with denoising_strength (0.4 to 0.7 is usual): without it the WebUI fails"
        )
    decisive = ("hr_resize_x", "hr_resize_y", "hr_scale", "enable_hr") if hires else ("width", "height")
    path = next((name for name in decisive if reader.raw.get(name)), decisive[-1])
    if problem := size_problem(final_size(body), reader.limits.max_pixels):
        reader.complain(path, problem)


def _check_image_count(reader: InputReader, body: Mapping[str, Any]) -> None:
    count = body.get("batch_size", 1) * body.get("n_iter", 1)
    limit = reader.limits.max_images
    if count > limit:
        reader.complain("batch_size", f"times n_iter is {count} pictures, and the limit is {limit}")


def _check_script(reader: InputReader, body: Mapping[str, Any], task: Task) -> None:
    """A plot's arguments are only counted here: the order of its axes is the WebUI's."""
    if not reader.has_complaint("script_name", "script_args", "batch_size", "n_iter"):
        for complaint in check_script(body, reader.limits, task=task):
            reader.complain(complaint.path, complaint.message)


# -- pictures of the job


def _pictures(reader: InputReader) -> dict[str, PictureSource]:
    """The pictures under their paths in the job."""
    given, most = reader.given, reader.limits.max_input_images
    found = {f"init_images[{index}]": source for index, source in enumerate(given.get("init_images", ()))}
    if "mask" in given:
        found["mask"] = replace(given["mask"], mask_of=FIRST, is_rounded=given.get("mask_round", True))
    found |= reader.pictures
    if len(found) > most:
        reader.complain(list(found)[most], f"is one picture more than the {most} that a job may bring")
    return found


def _check_init_images(reader: InputReader, body: Mapping[str, Any]) -> None:
    """Several pictures: A1111 takes one for each picture of a batch, and a script of its own takes one in all."""
    count, batch_size = len(reader.given.get("init_images", ())), body.get("batch_size", 1)
    if "mask" in reader.given and is_sd_upscale(body):
        reader.complain("mask", "cannot be used with sd upscale: the WebUI would lay it over each tile")
    if count <= 1:
        return
    script = str(body.get("script_name") or "").strip().lower()
    if script in TAKE_ONE_PICTURE:
        reader.complain("init_images", f"must be one picture: {script} takes no more")
    elif count > batch_size:
        reader.complain("init_images", f"has {count} pictures, and batch_size is {batch_size}: it takes one for each")
    elif count < batch_size:
        reader.warnings.append(f"batch_size {batch_size} with {count} init_images makes {count} pictures at a time")

"""A txt2img job. The steps and their order are those of `text2imgapi`, `process_images`, `process_images_inner`."""

from __future__ import annotations

import base64
import functools
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from sandbox import draw
from sandbox.webui_errors import HTTPException, WebUIError
from sandbox.webui_files import ActiveLora
from sandbox.webui_model import LoadedModel, lowvram
from sandbox.webui_process import Process
from sandbox.webui_samplers import TIMESTEPS, resolve, schedule_type

_TAG = re.compile(r"<(\w+):([^>]+)>")

# The selectable scripts, with the names of the arguments of their `run`.
_SCRIPT_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "prompt matrix": ("put_at_start", "different_seeds", "prompt_type", "variations_delimiter", "margin_size"),
    "prompts from file or textbox": ("checkbox_iterate", "checkbox_iterate_batch", "prompt_position", "prompt_txt"),
    "x/y/z plot": (
        *("x_type", "x_values", "x_values_dropdown", "y_type", "y_values", "y_values_dropdown", "z_type", "z_values"),
        *("z_values_dropdown", "draw_legend", "include_lone_images", "include_sub_grids", "no_fixed_seeds"),
        *("vary_seeds_x", "vary_seeds_y", "vary_seeds_z", "margin_size", "csv_mode"),
    ),
}

_MOST_PIXELS = 64_000_000  # more fits on no GPU, and no test should have to draw it


@dataclass
class Txt2ImgAnswer:
    """The answer of txt2img: pictures in base64, the fields as received, and `info` before it becomes a string."""

    images: list[str]
    parameters: Mapping[str, Any]
    info: dict[str, Any]

    def body(self) -> bytes:
        """As JSON. The pictures are inserted unchanged: base64 needs no escaping."""
        images = ",".join(f'"{image}"' for image in self.images)
        parameters, info = _plain_json(self.parameters), _plain_json(json.dumps(self.info))
        return f'{{"images":[{images}],"parameters":{parameters},"info":{info}}}'.encode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class PictureSettings:
    """What the sandbox changes in the pictures of a job."""

    black: bool = False
    min_bytes: int = 0  # of each PNG


@dataclass(frozen=True)
class Scene:
    """Everything that a picture depends on. The text of this object decides its pixels."""

    prompt: str
    negative_prompt: str
    seed: int
    subseed: int | None
    width: int
    height: int
    weights: str
    loras: tuple[tuple[str, float, float], ...]
    sampler: str
    scheduler: str | None
    steps: int
    cfg_scale: float
    clip_skip: int
    vae: str | None
    more: tuple[Any, ...] = ()


@dataclass
class Txt2ImgJob:
    """`StableDiffusionProcessingTxt2Img`: a request while it is processed."""

    process: Process
    fields: Mapping[str, Any]
    sampler: str
    scheduler: str | None
    settings: PictureSettings
    seed: int = 0
    subseed: int = 0
    prompt: str = ""
    negative_prompt: str = ""
    hr_prompt: str = ""
    hr_negative_prompt: str = ""
    extra_params: dict[str, Any] = field(default_factory=dict)  # extra_generation_params
    hr_size: tuple[int, int] | None = None

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    @property
    def count(self) -> int:
        return int(self["batch_size"] * self["n_iter"])


def check_fields(process: Process, fields: Mapping[str, Any]) -> tuple[str, str | None]:
    """The refusals that come before the job waits for the queue lock. Returns the sampler and scheduler."""
    scripts = [name.lower() for name in process.tables["scripts"]["txt2img"]]
    if fields["script_name"]:
        _script(fields["script_name"], [name for name in scripts if name in _SCRIPT_ARGUMENTS])
    sampler = fields["sampler_name"] or fields["sampler_index"]
    resolved = resolve(
        process.version, sampler, fields["scheduler"], process.tables["samplers"], process.tables["schedulers"]
    )
    for name in fields["alwayson_scripts"]:
        if _script(name, scripts) in _SCRIPT_ARGUMENTS:
            raise HTTPException(422, "Cannot have a selectable script in the always on scripts params")
    return resolved


def run(
    process: Process, fields: Mapping[str, Any], sampler: tuple[str, str | None], settings: PictureSettings
) -> Txt2ImgAnswer:
    """Generate. `sampler` comes from `check_fields`. The caller holds the queue lock and has begun the job."""
    job = Txt2ImgJob(process, fields, *sampler, settings)
    if fields["script_name"]:
        _missing_arguments(fields["script_name"].lower(), fields["script_args"])
    overrides = dict(fields["override_settings"] or {})
    before = {
        key: process.data[key] for key in overrides if key in process.data
    }  # every other override stays set: A1111's leak
    try:
        if process.files.checkpoints.find(overrides.get("sd_model_checkpoint")) is None:
            overrides.pop("sd_model_checkpoint", None)
            process.model.reload_weights()
        for key, value in overrides.items():
            process.options.set(key, value)
            if key == "sd_model_checkpoint":
                process.model.reload_weights()
            elif key == "sd_vae":
                process.model.reload_vae()
        return _generate(job)
    finally:
        if fields["override_settings_restore_afterwards"]:
            process.data.update(before)  # only the values: the loaded weights stay
            if "sd_vae" in before and process.model.loaded:
                process.model.reload_vae()


def _generate(job: Txt2ImgJob) -> Txt2ImgAnswer:
    process, state = job.process, job.process.state
    model = process.model.loaded
    if model is None:
        raise lowvram()
    if job["prompt"] is None:
        raise WebUIError("AssertionError", "")
    _prepare(job)
    infotexts: list[str] = []
    images: list[str] = []
    pictures: list[Scene] = []
    state.size = job["width"], job["height"]
    if state.job_count == -1:
        state.job_count = job["n_iter"] * (2 if job["enable_hr"] else 1)
    for number in range(job["n_iter"]):
        if not state.next_batch():
            break
        # A1111's race: if the option has changed meanwhile, this loads another model; names and hashes stay `model`'s.
        process.model.reload_weights()
        first = number * job["batch_size"]
        if not first < job.count:
            break
        if not job["disable_extra_networks"]:
            _activate(job, job.prompt, hires=False)
        if job["n_iter"] > 1:
            state.job = f"Batch {number + 1} out of {job['n_iter']}"
        scenes = _sample(job, process.model.loaded or model, range(first, first + job["batch_size"]))
        for index, scene in enumerate(scenes, first):
            infotexts.append(_infotext(job, model, index))
            pictures.append(scene)
            images.append(_encoded(job, scene, infotexts[-1]))
        state.next_job()
    if not infotexts:
        raise WebUIError("IndexError", "list index out of range")
    grid = bool(job["save_images"]) and len(images) > 1 and not job["do_not_save_grid"]
    if grid:
        infotexts.insert(0, _infotext(job, model, 0))
        images.insert(0, _grid(job, pictures, infotexts[0]))
    return Txt2ImgAnswer(images if job["send_images"] else [], job.fields, _info(job, model, infotexts, int(grid)))


def _prepare(job: Txt2ImgJob) -> None:
    """Set prompts, seeds and hires; raise what A1111 raises on the way, with its texts."""
    process = job.process
    _refuse_nulls(job)
    job.seed = random.randrange(4294967294) if job["seed"] in (None, -1) else job["seed"]
    job.subseed = random.randrange(4294967294) if job["subseed"] in (None, -1) else job["subseed"]
    styles = [style for name in job["styles"] or () for style in process.knobs.styles if style["name"] == name]
    job.prompt = _styled(job["prompt"], [style.get("prompt") or "" for style in styles])
    job.negative_prompt = _styled(job["negative_prompt"] or "", [s.get("negative_prompt") or "" for s in styles])
    job.hr_prompt, job.hr_negative_prompt = job.prompt, job.negative_prompt
    if job["hr_prompt"]:
        job.hr_prompt = _styled(job["hr_prompt"], [style.get("prompt") or "" for style in styles])
    if job["hr_negative_prompt"]:
        job.hr_negative_prompt = _styled(job["hr_negative_prompt"], [s.get("negative_prompt") or "" for s in styles])
    if process.option("enable_prompt_comments"):
        job.prompt, job.negative_prompt = _uncommented(job.prompt), _uncommented(job.negative_prompt)
        job.hr_prompt, job.hr_negative_prompt = _uncommented(job.hr_prompt), _uncommented(job.hr_negative_prompt)
    if job["refiner_checkpoint"] not in (None, "", "None", "none"):
        _known_checkpoint(job, job["refiner_checkpoint"])
    if job["enable_hr"]:
        _prepare_hires(job)
    if job.count > 0:
        _refuse_impossible(job)


def _prepare_hires(job: Txt2ImgJob) -> None:
    params, tables = job.extra_params, job.process.tables
    params["Denoising strength"] = job["denoising_strength"]
    if job["hr_checkpoint_name"] and job["hr_checkpoint_name"] != "Use same checkpoint":
        params["Hires checkpoint"] = _known_checkpoint(job, job["hr_checkpoint_name"])
    if job["hr_sampler_name"] is not None and job["hr_sampler_name"] != job.sampler:
        params["Hires sampler"] = job["hr_sampler_name"]
    params |= {"Hires prompt": None, "Hires negative prompt": None, "Hires schedule type": None}
    upscaler = job["hr_upscaler"]
    known = [each["name"] for table in ("latent-upscale-modes", "upscalers") for each in tables[table]]
    if upscaler is not None and upscaler not in known:
        raise WebUIError("Exception", f"could not find upscaler named {upscaler}")
    width, height, x, y = job["width"], job["height"], job["hr_resize_x"], job["hr_resize_y"]
    if x == 0 and y == 0:
        params["Hires upscale"] = job["hr_scale"]
        job.hr_size = int(width * job["hr_scale"]), int(height * job["hr_scale"])
    else:
        params["Hires resize"] = f"{x}x{y}"
        job.hr_size = x or y * width // height, y or x * height // width
    if job["hr_second_pass_steps"]:
        params["Hires steps"] = job["hr_second_pass_steps"]
    if upscaler is not None:
        params["Hires upscaler"] = upscaler
    names = [each["name"] for each in tables["samplers"]]
    if job["hr_sampler_name"] is not None and job["hr_sampler_name"] not in names:
        raise WebUIError("AssertionError", f"bad sampler name: {job['hr_sampler_name']}")


def _refuse_nulls(job: Txt2ImgJob) -> None:
    if job["steps"] is None:
        raise WebUIError("TypeError", "unsupported operand type(s) for //: 'NoneType' and 'NoneType'")
    for name in ("width", "height", "batch_size", "n_iter", "cfg_scale", "subseed_strength"):
        if job[name] is None:
            raise WebUIError("TypeError", "unsupported operand type(s) for //: 'NoneType' and 'int'")


def _refuse_impossible(job: Txt2ImgJob) -> None:
    clip_skip = job.process.option("CLIP_stop_at_last_layers")
    if not isinstance(clip_skip, (int, float)):
        raise WebUIError("TypeError", f"bad operand type for unary -: '{type(clip_skip).__name__}'")
    if job["steps"] == 0:
        raise WebUIError("ZeroDivisionError", "integer division or modulo by zero")
    wide, high = job["width"] // 8, job["height"] // 8
    if wide < 0 or high < 0:
        negative = min(wide, high)
        message = f"Trying to create tensor with negative dimension {negative}: [4, {high}, {wide}]"
        raise WebUIError("RuntimeError", message)
    if not -(2**63) <= job.seed < 2**64:
        raise WebUIError("RuntimeError", "Overflow when unpacking long")
    if job["steps"] < 0:
        raise WebUIError("RuntimeError", "number of steps must be non-negative")
    if wide == 0 or high == 0:
        size = f"({high + 2} x {wide + 2})"
        message = f"Calculated padded input size per channel: {size}. Kernel size: (3 x 3). "
        raise WebUIError("RuntimeError", message + "Kernel size can't be greater than actual input size")
    final = job.hr_size or (job["width"], job["height"])
    if final[0] * final[1] * job["batch_size"] > _MOST_PIXELS:
        raise out_of_memory()


def _activate(job: Txt2ImgJob, prompt: str, *, hires: bool) -> None:
    """`extra_networks.activate`: only the tags of this prompt. If one weight is not a number, no LoRA is used."""
    tags = []
    try:
        for kind, arguments in _TAG.findall(prompt):
            if kind in ("lora", "lyco"):
                tags.append(_lora_tag(arguments.split(":")))
    except ValueError:
        tags = []
    job.process.active_loras = active = job.process.files.loras.activate(tags)
    if not job.process.option("lora_add_hashes_to_infotext"):
        return
    hashes = {lora.name_in_tag.replace(",", ""): lora.digest for lora in active if lora.digest}
    if hires and job.process.version != "1.9.3":  # 1.9.3 drops those of the first pass if the second pass has any
        first_pass = [entry.split(": ", 1) for entry in job.extra_params.get("Lora hashes", "").split(", ") if entry]
        hashes = {**dict(first_pass), **hashes}
    if hashes:
        job.extra_params["Lora hashes"] = ", ".join(f"{name}: {digest}" for name, digest in hashes.items())


def _lora_tag(items: list[str]) -> tuple[str, float, float]:
    """The items of `<lora:name:te:unet>`; `te=` and `unet=` may also be given by name."""
    named = dict(item.split("=", 1) for item in items if item.count("=") == 1)
    positional = [item for item in items if item.count("=") != 1]
    if not positional:
        raise ValueError
    te = float(positional[1]) if len(positional) > 1 else 1.0
    te = float(named.get("te", te))
    unet = float(positional[2]) if len(positional) > 2 else te
    return positional[0], te, float(named.get("unet", unet))


def _sample(job: Txt2ImgJob, model: LoadedModel, indices: range) -> list[Scene]:
    """One batch: takes its time and moves the progress. Its pictures, unfinished if it was interrupted or skipped."""
    process, tables = job.process, job.process.tables
    scheduled = schedule_type(job.sampler, job.scheduler, tables["samplers"], tables["schedulers"])
    scene = Scene(
        prompt=_TAG.sub("", job.prompt),
        negative_prompt=_TAG.sub("", job.negative_prompt),
        seed=0,
        subseed=None,
        width=job["width"] // 8 * 8,
        height=job["height"] // 8 * 8,
        weights=model.weights,
        loras=_effective(process.active_loras, model),
        sampler=job.sampler,
        scheduler=scheduled,
        steps=job["steps"],
        cfg_scale=job["cfg_scale"],
        clip_skip=int(process.option("CLIP_stop_at_last_layers")),
        vae=process.model.vae,
        more=_further(job),
    )
    done = process.sample(job["steps"])
    if scheduled:
        job.extra_params["Schedule type"] = scheduled
    if job["enable_hr"]:
        process.state.next_job()
    if job["enable_hr"] and not process.state.interrupted:
        scene = _second_pass(job, model, scene)
    elif done < job["steps"]:
        scene = replace(scene, more=(*scene.more, "cut short", done))
    if model.weights == "nan" and process.knobs.nan_check:
        raise nans()
    strength = job["subseed_strength"]
    return [
        replace(
            scene,
            seed=job.seed if strength else job.seed + index,
            subseed=job.subseed + index if strength else None,
        )
        for index in indices
    ]


def _second_pass(job: Txt2ImgJob, model: LoadedModel, scene: Scene) -> Scene:
    tables = job.process.tables
    strength = job["denoising_strength"]
    if strength is None:
        raise WebUIError("TypeError", "'>' not supported between instances of 'NoneType' and 'int'")
    if not job["disable_extra_networks"]:
        _activate(job, job.hr_prompt, hires=True)
    sampler = job["hr_sampler_name"] or job.sampler
    scheduled = schedule_type(sampler, job["hr_scheduler"] or job.scheduler, tables["samplers"], tables["schedulers"])
    if scheduled and scheduled != job.extra_params.get("Schedule type"):
        job.extra_params["Hires schedule type"] = scheduled
    steps = job["hr_second_pass_steps"] or job["steps"]
    job.process.sample(steps)
    width, height = job.hr_size or (scene.width, scene.height)
    passes = (job.hr_prompt, job.hr_negative_prompt, sampler, scheduled, steps, strength, job["hr_upscaler"])
    loras = _effective(job.process.active_loras, model)
    return replace(scene, width=width // 8 * 8, height=height // 8 * 8, more=(*scene.more, *passes, loras))


def _effective(loras: Sequence[ActiveLora], model: LoadedModel) -> tuple[tuple[str, float, float], ...]:
    """The LoRAs that change the picture. One of another architecture is loaded and named, and has no effect."""
    return tuple(
        (lora.digest or lora.name_in_tag, lora.te, lora.unet)
        for lora in loras
        if lora.header.lora_architecture in (None, model.architecture)
    )


def _further(job: Txt2ImgJob) -> tuple[Any, ...]:
    """What else changes a picture. After a failed switch A1111 reads only plain, short prompts correctly."""
    names = ("tiling", "eta", "s_churn", "s_tmin", "s_tmax", "s_noise", "s_min_uncond", "refiner_switch_at")
    given = tuple(job[name] for name in (*names, "restore_faces", "seed_resize_from_w", "seed_resize_from_h"))
    plain = not re.search(r"[(\[]", job.prompt + job.negative_prompt) and len(re.findall(r"\w+|,", job.prompt)) <= 75
    return (*given, job["subseed_strength"]) + (() if plain or job.process.model.is_hijacked else ("misread",))


def _encoded(job: Txt2ImgJob, scene: Scene, infotext: str) -> str:
    file_format = job.process.option("samples_format")
    if not isinstance(file_format, str):
        raise WebUIError("AttributeError", f"'{type(file_format).__name__}' object has no attribute 'lower'")
    if file_format.lower() not in ("png", "jpg", "jpeg", "webp"):
        raise HTTPException(500, "Invalid image format")
    black = job.settings.black or scene.weights == "nan"
    return encoded_scene(scene, infotext, file_format.lower(), job.settings.min_bytes, black)


@functools.lru_cache(maxsize=32)
def encoded_scene(scene: Scene, infotext: str, file_format: str, min_bytes: int, black: bool) -> str:
    """A picture in base64. It is drawn only once."""
    return base64.b64encode(draw.encode(_drawn(scene, black), infotext, file_format, min_bytes)).decode()


def _drawn(scene: Scene, black: bool = False) -> Image.Image:
    if black:
        return draw.black(scene.width, scene.height)
    return draw.picture(repr(scene), scene.width, scene.height)


def _grid(job: Txt2ImgJob, scenes: Sequence[Scene], infotext: str) -> str:
    rows = round(math.sqrt(len(scenes)))
    columns = math.ceil(len(scenes) / rows)
    width, height = scenes[0].width, scenes[0].height
    grid = Image.new("RGB", (columns * width, rows * height))
    for index, scene in enumerate(scenes):
        grid.paste(_drawn(scene, job.settings.black), (index % columns * width, index // columns * height))
    return base64.b64encode(draw.encode(grid, infotext, "png")).decode()


def _infotext(job: Txt2ImgJob, model: LoadedModel, index: int) -> str:
    """`create_infotext`."""
    process = job.process
    strength, clip_skip = job["subseed_strength"], int(process.option("CLIP_stop_at_last_layers"))
    delta = process.option("eta_noise_seed_delta")
    resized = job["seed_resize_from_w"], job["seed_resize_from_h"]
    params = dict(job.extra_params)
    if job["enable_hr"]:
        params["Hires prompt"] = job.hr_prompt if job.hr_prompt != job.prompt else None
        params["Hires negative prompt"] = (
            job.hr_negative_prompt if job.hr_negative_prompt != job.negative_prompt else None
        )
    entries: dict[str, Any] = {
        "Steps": job["steps"],
        "Sampler": job.sampler,
        "Schedule type": job.scheduler,
        "CFG scale": job["cfg_scale"],
        "Seed": job.seed if strength else job.seed + index,
        "Face restoration": process.option("face_restoration_model") if job["restore_faces"] else None,
        "Size": f"{job['width']}x{job['height']}",
        "Model hash": model.sha256[:10] if model.sha256 else None,
        "Model": model.checkpoint.bare_name,
        "VAE hash": process.files.vaes.hash(process.model.vae) if process.model.vae else None,
        "VAE": process.model.vae,
        "Variation seed": job.subseed + index if strength else None,
        "Variation seed strength": strength or None,
        "Seed resize from": None if min(resized) <= 0 else f"{resized[0]}x{resized[1]}",
        "Denoising strength": None,
        "Clip skip": clip_skip if clip_skip > 1 else None,
        "ENSD": delta if delta and _uses_ensd(job) else None,
        "Tiling": True if job["tiling"] else None,
        **params,
        "Version": process.version,
    }
    settings = ", ".join(f"{key}: {_quoted(value)}" for key, value in entries.items() if value is not None)
    negative = f"\nNegative prompt: {job.negative_prompt}" if job.negative_prompt else ""
    return f"{job.prompt}{negative}\n{settings}".strip()


def _uses_ensd(job: Txt2ImgJob) -> bool:
    options = next(each["options"] for each in job.process.tables["samplers"] if each["name"] == job.sampler)
    return job.sampler not in TIMESTEPS and "uses_ensd" in options


def _info(job: Txt2ImgJob, model: LoadedModel, infotexts: list[str], first_image: int) -> dict[str, Any]:
    """`Processed.js`, with the same keys in the same order."""
    process = job.process
    prompts = range(job.count)
    return {
        "prompt": job.prompt,
        "all_prompts": [job.prompt for _ in prompts],
        "negative_prompt": job.negative_prompt,
        "all_negative_prompts": [job.negative_prompt for _ in prompts],
        "seed": job.seed,
        "all_seeds": [job.seed if job["subseed_strength"] else job.seed + index for index in prompts],
        "subseed": job.subseed,
        "all_subseeds": [job.subseed + index for index in prompts],
        "subseed_strength": job["subseed_strength"],
        "width": job["width"],
        "height": job["height"],
        "sampler_name": job.sampler,
        "cfg_scale": job["cfg_scale"],
        "steps": job["steps"],
        "batch_size": job["batch_size"],
        "restore_faces": bool(job["restore_faces"]),
        "face_restoration_model": process.option("face_restoration_model") if job["restore_faces"] else None,
        "sd_model_name": model.checkpoint.bare_name,
        "sd_model_hash": model.sha256[:10] if model.sha256 else None,
        "sd_vae_name": process.model.vae,
        "sd_vae_hash": process.files.vaes.hash(process.model.vae) if process.model.vae else None,
        "seed_resize_from_w": job["seed_resize_from_w"],
        "seed_resize_from_h": job["seed_resize_from_h"],
        "denoising_strength": job["denoising_strength"],
        "extra_generation_params": job.extra_params,
        "index_of_first_image": first_image,
        "infotexts": infotexts,
        "styles": job["styles"] or [],
        "job_timestamp": process.state.job_timestamp,
        "clip_skip": process.option("CLIP_stop_at_last_layers"),
        "is_using_inpainting_conditioning": False,
        "version": process.version,
    }


def out_of_memory() -> WebUIError:
    """A1111's answer if CUDA is out of memory; `errors` has torch's text."""
    return WebUIError(
        "OutOfMemoryError",
        "CUDA out of memory. Tried to allocate 4.50 GiB. GPU 0 has a total capacity of 23.64 GiB "
        "of which 1.02 GiB is free.",
    )


def nans() -> WebUIError:
    return WebUIError(
        "NansException",
        "A tensor with all NaNs was produced in Unet. "
        "Use --disable-nan-check commandline argument to disable this check.",
    )


def _script(name: str, known: Sequence[str]) -> str:
    if name.lower() not in known:
        raise HTTPException(422, f"Script '{name}' not found")
    return name.lower()


def _missing_arguments(script: str, arguments: Sequence[Any]) -> None:
    missing = [f"'{name}'" for name in _SCRIPT_ARGUMENTS[script][len(arguments) :]]
    if missing:
        listed = ", ".join(missing[:-1]) + (", and " if len(missing) > 2 else " and " if len(missing) == 2 else "")
        plural = "s" if len(missing) > 1 else ""
        message = f"Script.run() missing {len(missing)} required positional argument{plural}: {listed}{missing[-1]}"
        raise WebUIError("TypeError", message)


def _known_checkpoint(job: Txt2ImgJob, name: str) -> str:
    found = job.process.files.checkpoints.find_closest(name)
    if found is None:
        raise WebUIError("Exception", f"Could not find checkpoint with name {name}")
    return f"{found.bare_name} [{found.short_hash}]" if found.short_hash else found.bare_name


def _styled(prompt: str, styles: Sequence[str]) -> str:
    """`apply_styles_to_prompt`: a style takes the prompt at `{prompt}`; otherwise it follows after a comma."""
    for style in styles:
        if "{prompt}" in style:
            prompt = style.replace("{prompt}", prompt)
        else:
            prompt = ", ".join(part for part in (prompt.strip(), style.strip()) if part)
    return prompt


def _uncommented(prompt: str) -> str:
    """`strip_comments`: removes everything after a # on its line, LoRA tags too."""
    return re.sub("#[^\n]*(\n|$)", "\n", re.sub("(^|\n)#[^\n]*(\n|$)", "\n", prompt))


def _quoted(value: Any) -> Any:
    text = str(value)
    return json.dumps(value, ensure_ascii=False) if any(mark in text for mark in ",\n:") else value


def _plain_json(value: Any) -> str:
    """As starlette writes JSON. WebUIError `ValueError` if JSON cannot express the value (NaN)."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise WebUIError("ValueError", str(error).split(":")[0]) from None

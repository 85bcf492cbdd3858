"""One run of `process_images`: the steps and their order are those of `process_images` and `process_images_inner`."""

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

from sandbox import draw, webui_img2img
from sandbox.webui_errors import HTTPException, WebUIError
from sandbox.webui_files import ActiveLora, CheckpointInfo
from sandbox.webui_img2img import InitPictures
from sandbox.webui_model import LoadedModel, lowvram
from sandbox.webui_process import Process
from sandbox.webui_samplers import TIMESTEPS, schedule_type

_TAG = re.compile(r"<(\w+):([^>]+)>")

_MOST_PIXELS = 64_000_000  # more fits on no GPU, and no test should have to draw it


@dataclass(frozen=True)
class PictureSettings:
    """What the sandbox changes in the pictures of a job."""

    black: bool = False
    min_bytes: int = 0  # of each PNG

    def is_black(self, scene: Scene) -> bool:
        return self.black or scene.weights == "nan"


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


@dataclass(frozen=True)
class Picture:
    """A picture of an answer: drawn from a scene, or a grid of such. `infotext` is inside its file; a grid has none."""

    content: Scene | Image.Image
    infotext: str | None = None


@dataclass
class Processed:
    """A1111's `Processed`: the pictures, and `info` as `Processed.js` writes it."""

    pictures: list[Picture]
    info: dict[str, Any]


@dataclass
class Txt2ImgJob:
    """`StableDiffusionProcessingTxt2Img`, or with `init_images` among its fields `StableDiffusionProcessingImg2Img`.

    `extra_params` is `extra_generation_params`. `changed` makes a copy as a script does (`copy.copy`): both share
    `extra_params` and `overrides`, so that what one picture leaves there is found by the next.
    """

    process: Process
    fields: Mapping[str, Any]
    sampler: str
    scheduler: str | None
    settings: PictureSettings
    overrides: dict[str, Any] = field(default_factory=dict)
    extra_params: dict[str, Any] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)  # all_prompts, and so on
    negative_prompts: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    subseeds: list[int] = field(default_factory=list)
    hr_prompt: str = ""
    hr_negative_prompt: str = ""
    lora_hashes: dict[str, str] = field(default_factory=dict)
    hr_size: tuple[int, int] | None = None
    conditions: tuple[str, ...] = ()  # of extensions
    init: InitPictures | None = None
    refiner: CheckpointInfo | None = None
    hires_checkpoint: CheckpointInfo | None = None

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    def changed(self, fields: Mapping[str, Any], *, sampler: str | None = None) -> Txt2ImgJob:
        return replace(self, fields={**self.fields, **fields}, sampler=sampler or self.sampler)

    @property
    def count(self) -> int:
        return int(self["batch_size"] * self["n_iter"])

    @property
    def batch_size(self) -> int:
        """Of an img2img with fewer pictures it becomes smaller, after the seeds were counted."""
        return self.init.batch_size if self.init else int(self["batch_size"])


def process_images(job: Txt2ImgJob) -> Processed:
    """Generate with the job's overrides. The caller holds the queue lock and has begun the job."""
    process, overrides = job.process, job.overrides
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
        return _process_images_inner(job)
    finally:
        if job["override_settings_restore_afterwards"]:
            process.data.update(before)  # only the values: the loaded weights stay
            if "sd_vae" in before and process.model.loaded:
                process.model.reload_vae()


def _process_images_inner(job: Txt2ImgJob) -> Processed:
    process, state = job.process, job.process.state
    model = process.model.loaded
    if model is None:
        raise lowvram()
    if job["prompt"] is None:
        raise WebUIError("AssertionError", "")
    _prepare(job)
    infotexts: list[str] = []
    pictures: list[Picture] = []
    state.size = job["width"], job["height"]
    if state.job_count == -1:
        state.job_count = job["n_iter"] * (2 if job["enable_hr"] else 1)
    for number in range(job["n_iter"]):
        if not state.next_batch():
            break
        # A1111's race: if the option has changed meanwhile, this loads another model; names and hashes stay `model`'s.
        process.model.reload_weights()
        first = number * job.batch_size
        if not first < len(job.prompts):
            break
        if not job["disable_extra_networks"]:
            _activate(job, job.prompts[first], hires=False)
        if job["n_iter"] > 1:
            state.job = f"Batch {number + 1} out of {job['n_iter']}"
        last = min(first + job.batch_size, len(job.prompts))
        scenes = _sample(job, process.model.loaded or model, range(first, last))
        for index, scene in enumerate(scenes, first):
            infotexts.append(create_infotext(job, model, index))
            content = _painted(job, scene, index - first) if job.init else scene
            pictures.append(Picture(content, infotexts[-1] if process.option("enable_pnginfo") else None))
        process.last_seed = job.seeds[last - 1]
        state.next_job()
    if not infotexts:
        raise WebUIError("IndexError", "list index out of range")
    grid = bool(job["save_images"]) and len(pictures) > 1 and not job["do_not_save_grid"]
    if grid:
        infotexts.insert(0, create_infotext(job, model, 0))
        pictures.insert(0, Picture(draw_grid(pictures, job.settings), infotexts[0]))
    return Processed(pictures, _info(job, model, infotexts, int(grid)))


def _painted(job: Txt2ImgJob, scene: Scene, index: int) -> Image.Image:
    """A picture that was painted over the one at `index` of a batch.

    It depends on the request before: the VAE draws from the global random numbers that this one has left.
    """
    assert job.init is not None
    begins_with = webui_img2img.digest(job.init.images[index % len(job.init.images)])
    text = repr(replace(scene, more=(*scene.more, begins_with, job.process.last_seed, *job.init.params.values())))
    painted = job.init.paint(text, index, job["denoising_strength"])
    return draw.black(*painted.size) if job.settings.is_black(scene) else painted


def _prepare(job: Txt2ImgJob) -> None:
    """Set prompts, seeds and hires; raise what A1111 raises on the way, with its texts."""
    process = job.process
    _refuse_nulls(job)
    styles = [style for name in job["styles"] or () for style in process.knobs.styles if style["name"] == name]
    given = next((texts for texts in (job["prompt"], job["negative_prompt"]) if isinstance(texts, list)), None)
    count = job.count if given is None else len(given)
    job.prompts = [
        _styled(text, [style.get("prompt") or "" for style in styles]) for text in _all(job["prompt"], count)
    ]
    job.negative_prompts = [
        _styled(text, [s.get("negative_prompt") or "" for s in styles])
        for text in _all(job["negative_prompt"] or "", count)
    ]
    job.seeds = _all_seeds(job, job["seed"], count)
    job.subseeds = _all_seeds(job, job["subseed"], count, always_counted=True)
    first_prompt, first_negative = (texts[0] if texts else "" for texts in (job.prompts, job.negative_prompts))
    job.hr_prompt, job.hr_negative_prompt = first_prompt, first_negative
    if job["hr_prompt"]:
        job.hr_prompt = _styled(job["hr_prompt"], [style.get("prompt") or "" for style in styles])
    if job["hr_negative_prompt"]:
        job.hr_negative_prompt = _styled(job["hr_negative_prompt"], [s.get("negative_prompt") or "" for s in styles])
    if process.option("enable_prompt_comments"):
        job.prompts = [_uncommented(text) for text in job.prompts]
        job.negative_prompts = [_uncommented(text) for text in job.negative_prompts]
        job.hr_prompt, job.hr_negative_prompt = _uncommented(job.hr_prompt), _uncommented(job.hr_negative_prompt)
    if job["refiner_checkpoint"] not in (None, "", "None", "none"):
        job.refiner = _known_checkpoint(job, job["refiner_checkpoint"])
    if job["enable_hr"]:
        _prepare_hires(job)
    if "init_images" in job.fields:
        job.init = webui_img2img.read_init(job.fields)
        job.extra_params |= job.init.params
        if (noise := job["initial_noise_multiplier"]) not in (None, 1.0):
            job.extra_params["Noise multiplier"] = noise
    if job.count > 0:
        _refuse_impossible(job)


def _all(text: str | list[str], count: int) -> list[str]:
    """A prompt for each picture: the same one, or those of a script that made them itself (Prompt matrix)."""
    return list(text) if isinstance(text, list) else [text] * count


def _all_seeds(job: Txt2ImgJob, seed: Any, count: int, *, always_counted: bool = False) -> list[int]:
    """A seed for each picture. With a variation only the subseeds are counted on."""
    if isinstance(seed, list):
        return list(seed)
    first = random.randrange(4294967294) if seed in (None, -1) else seed
    return [first + (index if always_counted or job["subseed_strength"] == 0 else 0) for index in range(count)]


def _prepare_hires(job: Txt2ImgJob) -> None:
    params, tables = job.extra_params, job.process.tables
    params["Denoising strength"] = job["denoising_strength"]
    if job["hr_checkpoint_name"] and job["hr_checkpoint_name"] != "Use same checkpoint":
        job.hires_checkpoint = _known_checkpoint(job, job["hr_checkpoint_name"])
        params["Hires checkpoint"] = job.hires_checkpoint.short_title
    if job["hr_sampler_name"] is not None and job["hr_sampler_name"] != job.sampler:
        params["Hires sampler"] = job["hr_sampler_name"]
    params |= {"Hires prompt": None, "Hires negative prompt": None, "Hires schedule type": None}
    upscaler = job["hr_upscaler"]
    known = [each["name"] for each in (*tables["latent-upscale-modes"], *job.process.files.upscalers)]
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
    if not all(-(2**63) <= seed < 2**64 for seed in job.seeds):
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
    process = job.process
    tags = []
    try:
        for kind, arguments in _TAG.findall(prompt):
            if kind in ("lora", "lyco"):
                tags.append(_lora_tag(arguments.split(":")))
    except ValueError:
        tags = []
    additional = process.option("sd_lora")
    if additional in process.files.loras.files and additional not in (name for name, _, _ in tags):
        weight = process.option("extra_networks_default_multiplier")
        job.prompts = [f"{text}<lora:{additional}:{weight}>" for text in job.prompts]
        tags.append((additional, float(weight), float(weight)))
    process.active_loras = active = process.files.loras.activate(tags)
    if not process.option("lora_add_hashes_to_infotext"):
        return
    hashes = [(lora.name_in_tag.replace(",", ""), lora.digest) for lora in active if lora.digest]
    if process.version != "1.9.3":  # which names a LoRA twice, and drops those of the first pass
        job.lora_hashes = {**(job.lora_hashes if hires else {}), **dict(hashes)}
        hashes = list(job.lora_hashes.items())
    if hashes:  # else those of an earlier picture stay
        job.extra_params["Lora hashes"] = ", ".join(f"{name}: {digest}" for name, digest in hashes)


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
    loras = _effective(process.active_loras, model)
    embeddings = _encode(job, model, indices)
    process.pause(process.knobs.encode_seconds)
    steps = webui_img2img.sampling_steps(job["steps"], job["denoising_strength"]) if job.init else job["steps"]
    done = process.sample(steps, is_adaptive=job.sampler == "DPM adaptive")
    if scheduled:
        job.extra_params["Schedule type"] = scheduled
    if job["enable_hr"]:
        process.state.next_job()
    second_pass: tuple[Any, ...] = ()
    size = job["width"], job["height"]
    if job["enable_hr"] and not process.state.interrupted:
        second_pass, size = _second_pass(job), job.hr_size or size
    elif done < steps:
        second_pass = "cut short", done
    else:
        second_pass = _refine(job, steps)
    if model.weights == "nan" and process.knobs.nan_check:
        raise nans()
    return [
        Scene(
            prompt=_TAG.sub("", job.prompts[index]).strip(),
            negative_prompt=_TAG.sub("", job.negative_prompts[index]).strip(),
            seed=job.seeds[index],
            subseed=job.subseeds[index] if job["subseed_strength"] else None,
            width=size[0] // 8 * 8,
            height=size[1] // 8 * 8,
            weights=model.weights,
            loras=loras,
            sampler=job.sampler,
            scheduler=scheduled,
            steps=job["steps"],
            cfg_scale=job["cfg_scale"],
            clip_skip=int(process.option("CLIP_stop_at_last_layers")),
            vae=process.model.vae,
            more=(*_further(job, job.prompts[index] + job.negative_prompts[index]), *embeddings, *second_pass),
        )
        for index in indices
    ]


def _encode(job: Txt2ImgJob, model: LoadedModel, indices: range) -> tuple[str, ...]:
    """Read the prompts, and note the embeddings in them. Returns those that act.

    A prompt that equals the request's before is not read again: its embeddings act, and "TI hashes" does not name them.
    """
    process, acting = job.process, list[str]()
    process.files.embeddings.refresh_if_changed()
    for side, prompts in (("negative", job.negative_prompts), ("positive", job.prompts)):
        texts = tuple(_TAG.sub("", prompts[index]) for index in indices)
        used = process.files.embeddings.used("\n".join(texts), model.architecture)
        acting += [f"{side} {each}" for each in used]
        read = (*texts, job["steps"], model.sha256)
        if used and process.last_prompts.get(side) != read:
            earlier = job.extra_params.get("TI hashes")
            job.extra_params["TI hashes"] = ", ".join([*used, *([earlier] if earlier else [])])
        process.last_prompts[side] = read
    return tuple(acting)


def _refine(job: Txt2ImgJob, steps: int) -> tuple[Any, ...]:
    """`apply_refiner`: from a share of the noise schedule on, another checkpoint draws. It stays loaded.

    It notes the name before it loads, so there is no hash in it if the file was never loaded. With hires it does so in
    the second pass alone (the option `hires_fix_refiner_pass`).
    """
    model, switch_at = job.process.model, job["refiner_switch_at"]
    last = 0.0 if steps == 1 else 0.999  # where in the schedule the last step is
    if job.refiner is None or (switch_at is not None and last < switch_at):
        return ()
    if model.loaded is not None and model.loaded.checkpoint.path == job.refiner.path:
        return ()
    job.extra_params |= {"Refiner": job.refiner.short_title, "Refiner switch at": switch_at}
    model.reload_weights(job.refiner)
    return "refined", model.loaded.weights if model.loaded else None


def _second_pass(job: Txt2ImgJob) -> tuple[Any, ...]:
    """Run it. What the picture depends on beside the first pass."""
    process, tables = job.process, job.process.tables
    strength = job["denoising_strength"]
    if strength is None:
        raise WebUIError("TypeError", "'>' not supported between instances of 'NoneType' and 'int'")
    process.model.reload_weights(job.hires_checkpoint)
    model = process.model.loaded
    if model is None:
        raise lowvram()
    if not job["disable_extra_networks"]:
        _activate(job, job.hr_prompt, hires=True)
    sampler = job["hr_sampler_name"] or job.sampler
    scheduled = schedule_type(sampler, job["hr_scheduler"] or job.scheduler, tables["samplers"], tables["schedulers"])
    if scheduled and scheduled != job.extra_params.get("Schedule type"):
        job.extra_params["Hires schedule type"] = scheduled
    steps = job["hr_second_pass_steps"] or job["steps"]
    process.pause(process.knobs.encode_seconds)
    process.sample(steps)
    upscaler = process.files.effective_upscaler(job["hr_upscaler"])
    passes = (job.hr_prompt, job.hr_negative_prompt, sampler, scheduled, steps, strength, upscaler)
    return (*passes, model.weights, _effective(process.active_loras, model), *_refine(job, steps))


def _effective(loras: Sequence[ActiveLora], model: LoadedModel) -> tuple[tuple[str, float, float], ...]:
    """The LoRAs that change the picture. One of another architecture is loaded and named, and has no effect."""
    return tuple(
        (lora.header.content, lora.te, lora.unet)
        for lora in loras
        if lora.header.lora_architecture in (None, model.architecture)
    )


def _further(job: Txt2ImgJob, prompts: str) -> tuple[Any, ...]:
    """What else changes a picture. After a failed switch A1111 reads only plain, short prompts correctly."""
    names = ("tiling", "eta", "s_churn", "s_tmin", "s_tmax", "s_noise", "s_min_uncond", "refiner_switch_at")
    given = tuple(job[name] for name in (*names, "seed_resize_from_w", "seed_resize_from_h"))
    restorer = job.process.option("face_restoration_model")
    faces = bool(job["restore_faces"]) and job.process.files.has_face_restorer(restorer) and restorer
    plain = not re.search(r"[(\[]", prompts) and len(re.findall(r"\w+|,", prompts)) <= 75
    more = (*given, faces, job["subseed_strength"], *job.conditions)
    return more if plain or job.process.model.is_hijacked else (*more, "misread")


def encode(process: Process, settings: PictureSettings, picture: Picture) -> str:
    """The picture as a file in base64, in the format that the option names now."""
    file_format = process.option("samples_format")
    if not isinstance(file_format, str):
        raise WebUIError("AttributeError", f"'{type(file_format).__name__}' object has no attribute 'lower'")
    if file_format.lower() not in ("png", "jpg", "jpeg", "webp"):
        raise HTTPException(500, "Invalid image format")
    content, infotext = picture.content, picture.infotext
    if isinstance(content, Scene):
        return encoded_scene(content, infotext, file_format.lower(), settings.min_bytes, settings.is_black(content))
    return base64.b64encode(draw.encode(content, infotext, file_format.lower(), settings.min_bytes)).decode()


@functools.lru_cache(maxsize=32)
def encoded_scene(scene: Scene, infotext: str | None, file_format: str, min_bytes: int, black: bool) -> str:
    """A picture in base64. It is drawn only once."""
    return base64.b64encode(draw.encode(_drawn(scene, black), infotext, file_format, min_bytes)).decode()


def _drawn(scene: Scene, black: bool = False) -> Image.Image:
    if black:
        return draw.black(scene.width, scene.height)
    return draw.picture(repr(scene), scene.width, scene.height)


def draw_grid(pictures: Sequence[Picture], settings: PictureSettings, *, rows: int | None = None) -> Image.Image:
    """The pictures side by side, without A1111's legend."""
    images = [
        _drawn(picture.content, settings.is_black(picture.content))
        if isinstance(picture.content, Scene)
        else picture.content
        for picture in pictures
    ]
    rows = rows or round(math.sqrt(len(images)))
    columns = math.ceil(len(images) / rows)
    width, height = images[0].size
    grid = Image.new("RGB", (columns * width, rows * height))
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * width, index // columns * height))
    return grid


def create_infotext(job: Txt2ImgJob, model: LoadedModel, index: int) -> str:
    """`create_infotext`."""
    process = job.process
    strength, clip_skip = job["subseed_strength"], int(process.option("CLIP_stop_at_last_layers"))
    delta = process.option("eta_noise_seed_delta")
    resized = job["seed_resize_from_w"], job["seed_resize_from_h"]
    params = dict(job.extra_params)
    if job["enable_hr"]:
        params["Hires prompt"] = job.hr_prompt if job.hr_prompt != job.prompts[index] else None
        params["Hires negative prompt"] = (
            job.hr_negative_prompt if job.hr_negative_prompt != job.negative_prompts[index] else None
        )
    entries: dict[str, Any] = {
        "Steps": job["steps"],
        "Sampler": job.sampler,
        "Schedule type": job.scheduler,
        "CFG scale": job["cfg_scale"],
        "Seed": job.seeds[index],
        "Face restoration": process.option("face_restoration_model") if job["restore_faces"] else None,
        "Size": f"{job['width']}x{job['height']}",
        "Model hash": model.sha256[:10] if model.sha256 else None,
        "Model": model.checkpoint.bare_name,
        "VAE hash": process.files.vaes.hash(process.model.vae) if process.model.vae else None,
        "VAE": process.model.vae,
        "Variation seed": job.subseeds[index] if strength else None,
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
    negative = f"\nNegative prompt: {job.negative_prompts[index]}" if job.negative_prompts[index] else ""
    return f"{job.prompts[index]}{negative}\n{settings}".strip()


def _uses_ensd(job: Txt2ImgJob) -> bool:
    options = next(each["options"] for each in job.process.tables["samplers"] if each["name"] == job.sampler)
    return job.sampler not in TIMESTEPS and "uses_ensd" in options


def unprocessed_info(job: Txt2ImgJob, seed: int) -> dict[str, Any]:
    """`Processed.js` of a request that was itself never processed: it knows no model."""
    negatives = [job["negative_prompt"] or ""]
    described = replace(
        job, prompts=[job["prompt"]], negative_prompts=negatives, seeds=[seed], subseeds=[job["subseed"]]
    )
    return _info(described, None, [], 0)


def _info(job: Txt2ImgJob, model: LoadedModel | None, infotexts: list[str], first_image: int) -> dict[str, Any]:
    """`Processed.js`, with the same keys in the same order. `model` is None if nothing was processed."""
    process = job.process
    vae = process.model.vae if model else None
    faces = bool(job["restore_faces"]) if model else job["restore_faces"]
    return {
        "prompt": job.prompts[0],
        "all_prompts": job.prompts,
        "negative_prompt": job.negative_prompts[0],
        "all_negative_prompts": job.negative_prompts,
        "seed": job.seeds[0],
        "all_seeds": job.seeds,
        "subseed": job.subseeds[0],
        "all_subseeds": job.subseeds,
        "subseed_strength": job["subseed_strength"],
        "width": job["width"],
        "height": job["height"],
        "sampler_name": job.sampler,
        "cfg_scale": job["cfg_scale"],
        "steps": job["steps"],
        "batch_size": job.batch_size,
        "restore_faces": faces,
        "face_restoration_model": process.option("face_restoration_model") if faces and model else None,
        "sd_model_name": model.checkpoint.bare_name if model else None,
        "sd_model_hash": model.sha256[:10] if model and model.sha256 else None,
        "sd_vae_name": vae,
        "sd_vae_hash": process.files.vaes.hash(vae) if vae else None,
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


def _known_checkpoint(job: Txt2ImgJob, name: str) -> CheckpointInfo:
    found = job.process.files.checkpoints.find_closest(name)
    if found is None:
        raise WebUIError("Exception", f"Could not find checkpoint with name {name}")
    return found


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

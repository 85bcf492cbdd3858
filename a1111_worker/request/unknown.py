"""The complaint about a name that no job knows, with the known name that was probably meant."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from a1111_worker.request.values import normalize_name
from a1111_worker.similar import nearest

SURE = 0.8
"""How much a known name must resemble an unknown one to be suggested: no suggestion is better than a wrong one."""


def unknown_field(name: str, usable: Collection[str]) -> str:
    """The complaint about a field that a task does not have. `usable` are the fields that it takes."""
    if normalize_name(name) in _IMAGE_INPUTS and "init_images" not in usable:
        return 'is not a field of this task; "task": "img2img" takes pictures'
    return unknown_name(name, usable, {alias: field for alias, field in _ALIASES.items() if field in usable})


def unknown_lora_key(key: object, known: Collection[str]) -> str:
    """The complaint about a key that no LoRA has."""
    return unknown_name(key, known, _LORA_ALIASES)


def unknown_output_option(name: str, known: Collection[str]) -> str:
    """The complaint about a key that `output` does not have."""
    return unknown_name(name, known, _OUTPUT_ALIASES)


def unknown_name(name: object, known: Collection[str], aliases: Mapping[str, str] | None = None) -> str:
    """The complaint about an unknown name. It suggests the known name that was probably meant."""
    written = str(name)[:60]
    meant = _same_name(written, known, aliases or {}) or next(iter(nearest(written, known, 1, cutoff=SURE)), None)
    if meant is not None:
        return f"is unknown; did you mean {meant!r}?"
    return f"is unknown; known here: {', '.join(known)}" if len(known) < 8 else "is unknown"


def _same_name(name: str, known: Collection[str], aliases: Mapping[str, str]) -> str | None:
    """The known name that `name` is an alias or another spelling of."""
    normalized = normalize_name(name)
    return aliases.get(normalized) or next((other for other in known if normalize_name(other) == normalized), None)


_ALIASES = {  # names of other APIs, without case and separators
    "image": "init_images",
    "images": "init_images",
    "initimage": "init_images",
    "inputimage": "init_images",
    "maskimage": "mask",
    "inpaintmask": "mask",
    "numinferencesteps": "steps",
    "inferencesteps": "steps",
    "samplingsteps": "steps",
    "guidancescale": "cfg_scale",
    "guidance": "cfg_scale",
    "cfg": "cfg_scale",
    "numimages": "batch_size",
    "numimagesperprompt": "batch_size",
    "numoutputs": "batch_size",
    "samples": "batch_size",
    "n": "n_iter",
    "batchcount": "n_iter",
    "iterations": "n_iter",
    "sampler": "sampler_name",
    "samplingmethod": "sampler_name",
    "scheduletype": "scheduler",
    "hires": "enable_hr",
    "hiresfix": "enable_hr",
    "enablehires": "enable_hr",
    "upscaler": "hr_upscaler",
    "hiresupscaler": "hr_upscaler",
    "hiresscale": "hr_scale",
    "upscaleby": "hr_scale",
    "hiressteps": "hr_second_pass_steps",
    "hrsteps": "hr_second_pass_steps",
    "strength": "denoising_strength",
    "denoise": "denoising_strength",
    "lora": "loras",
    "loraweights": "loras",
    "clipstopatlastlayers": "clip_skip",
    "sdvae": "vae",
    "style": "styles",
    "stylepreset": "styles",
    "text": "prompt",
    "uc": "negative_prompt",
    "negative": "negative_prompt",
    "imagewidth": "width",
    "imageheight": "height",
    "script": "script_name",
    "scripts": "alwayson_scripts",
    "controlnet": "alwayson_scripts",
    "settings": "override_settings",
    "options": "override_settings",
    "outputformat": "output",
    "outputquality": "output",
    "imageformat": "output",
}
_OUTPUT_ALIASES = {
    "type": "format",
    "mode": "delivery",
    "infotext": "metadata",
}
_LORA_ALIASES = {
    "weight": "scale",
    "strength": "scale",
    "multiplier": "scale",
    "sha256": "hash",
    "id": "version_id",
    "modelversionid": "version_id",
    "air": "url",
    "urn": "url",
    "path": "url",
    "model": "url",
    "title": "name",
}
_IMAGE_INPUTS = frozenset({"initimages", "initimage", "image", "images", "mask", "inpaintimage", "controlimage"})

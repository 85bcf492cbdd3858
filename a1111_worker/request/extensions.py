"""Units of the extensions that everybody has: the arguments of the always-on scripts of ControlNet and ADetailer.

A unit that A1111 1.10.1 cannot use does nothing, and the answer is a 200 that has all the unit's keys (measured with
ControlNet 1.1.455 and ADetailer 25.3.0). Worse, ControlNet opens a picture that is a path, and unpickles another of its
fields. So a unit is read here key by key, and only what this module knows is passed on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from a1111_worker.domain import GenerationRequest, ModelKind, ModelRef, PictureSource
from a1111_worker.pictures.decode import PreparedPicture
from a1111_worker.prompt import find_tags
from a1111_worker.request.fields import CHECKPOINT_REASON, MAX_CFG, MAX_NAME, MAX_PROMPT, MAX_SIDE, MIN_SIDE, Limits
from a1111_worker.request.picture_fields import picture
from a1111_worker.request.references import model_reference
from a1111_worker.request.unknown import unknown_name
from a1111_worker.request.values import (
    InvalidValue,
    Problem,
    ValueType,
    boolean,
    integer,
    mismatch,
    multiple_of_8,
    number,
    one_of,
    shown,
    text,
)

CONTROLNET, ADETAILER = "controlnet", "adetailer"
NONE = "None"  # no model, and no detector
DISABLED = {"enabled": False}  # a unit of ControlNet
MAX_UNITS = 10  # the WebUI's own number, 3 or 4 by default, is checked later

RESIZE_MODES = ("Just Resize", "Crop and Resize", "Resize and Fill")
CONTROL_MODES = ("Balanced", "My prompt is more important", "ControlNet is more important")

_PICTURES = ("image", "mask")
_OTHER_NAMES = {  # of ControlNet's keys, as it knows them too
    "input_image": "image",
    "mask_image": "mask",
    "lowvram": "low_vram",
    "guidance": "guidance_end",
}


@dataclass
class Units:
    """The arguments of one script as A1111 gets them, and the pictures of its units.

    A picture is under its path below `args`. It is missing in its unit until it is prepared: see `fill_units`.
    A model of ControlNet is under its unit's place; the unit has the job's name for it, or "" if that is no name.
    """

    args: list[Any] = field(default_factory=list)
    models: dict[int, ModelRef] = field(default_factory=dict)
    pictures: dict[str, PictureSource] = field(default_factory=dict)


def is_idle(script: str, args: Sequence[Any]) -> bool:
    """Whether a script with these arguments does nothing. False for a script that is not known here."""
    name = script.strip().casefold()
    if name == CONTROLNET:
        return not any(isinstance(unit, dict) and unit.get("enabled") for unit in args)
    if name == ADETAILER:
        return _is_idle_adetailer(args)
    return False


def read_units(script: str, args: Sequence[Any], limits: Limits) -> Units | None:
    """The units in the arguments of a script; None for a script that is not known here.

    Raises InvalidValue with paths below `args`.
    """
    name = script.strip().casefold()
    if len(args) > MAX_UNITS:
        raise InvalidValue(f"has more than {MAX_UNITS} arguments")
    if name == CONTROLNET:
        return _read_controlnet(args, limits)
    return _read_adetailer(args, limits) if name == ADETAILER else None


def fill_units(request: GenerationRequest, prepared: Mapping[str, PreparedPicture]) -> GenerationRequest:
    """The request with the pictures of its units in its body."""
    scripts = {}
    for name, script in (request.body.get("alwayson_scripts") or {}).items():
        args = [
            {**unit, **_pictures_of(unit_path(name, index), prepared)} if isinstance(unit, dict) else unit
            for index, unit in enumerate(script.get("args", ()))
        ]
        scripts[name] = {**script, "args": args}
    return replace(request, body={**request.body, "alwayson_scripts": scripts}, pictures={}) if scripts else request


def unit_path(script: str, index: int) -> str:
    """A unit's path in the job."""
    return f"alwayson_scripts.{shown(script)}.args[{index}]"


def without_pictures(parameters: Any) -> Any:
    """The `parameters` of an answer, which repeat the body, without the pictures of units."""
    scripts = parameters.get("alwayson_scripts") if isinstance(parameters, dict) else None
    if not isinstance(scripts, dict) or CONTROLNET not in scripts:
        return parameters
    args = [
        {key: None if key in _PICTURES else value for key, value in unit.items()} if isinstance(unit, dict) else unit
        for unit in scripts[CONTROLNET].get("args", ())
    ]
    return {**parameters, "alwayson_scripts": {**scripts, CONTROLNET: {"args": args}}}


def detected_maps(body: Mapping[str, Any]) -> int:
    """How many pictures ControlNet may add to the answer of a body: the maps of its annotators."""
    scripts = body.get("alwayson_scripts") or {}
    args = scripts.get(CONTROLNET, {}).get("args", ())
    return sum(1 for unit in args if unit.get("enabled") and unit.get("save_detected_map"))


def _pictures_of(path: str, prepared: Mapping[str, PreparedPicture]) -> dict[str, str]:
    return {key: prepared[f"{path}.{key}"].png for key in _PICTURES if f"{path}.{key}" in prepared}


# -- ControlNet


@lru_cache(maxsize=8)
def controlnet_keys(limits: Limits) -> Mapping[str, ValueType]:
    """What a unit of ControlNet may hold."""
    share, threshold = number(0, 1), number(-1, 2048)
    return {
        "enabled": boolean(),
        "module": text(MAX_NAME),
        "model": _controlnet_model(limits),
        "weight": number(0, 2),
        "image": picture(limits),
        "mask": picture(limits),
        "resize_mode": _choice(*RESIZE_MODES),
        "low_vram": boolean(),
        "processor_res": integer(-1, 2048),
        "threshold_a": threshold,
        "threshold_b": threshold,
        "guidance_start": share,
        "guidance_end": share,
        "pixel_perfect": boolean(),
        "control_mode": _choice(*CONTROL_MODES),
        "hr_option": one_of("Both", "Low res only", "High res only"),
        "inpaint_crop_input_image": boolean(),
        "save_detected_map": boolean(),
    }


def _read_controlnet(args: Sequence[Any], limits: Limits) -> Units:
    units, problems = Units(), []
    for index, given in enumerate(args):
        if isinstance(given, dict) and not given.get("enabled"):
            units.args.append(dict(DISABLED))
            continue
        try:
            unit = _checked(_with_usual_names(given), controlnet_keys(limits))
        except InvalidValue as error:
            problems += [(f"[{index}]{path}", message) for path, message in error.problems]
            continue
        problems += [(f"[{index}]{path}", message) for path, message in _contradictions(unit)]
        units.pictures |= {f"[{index}].{key}": unit.pop(key) for key in _PICTURES if key in unit}
        if ref := unit.get("model"):
            units.models[index] = ref
            unit["model"] = ref.name if ref.is_bare_name else ""
        units.args.append({"module": "none", "model": NONE, "save_detected_map": False, **unit})
    if problems:
        raise InvalidValue(*problems)
    return units


def _with_usual_names(given: Any) -> dict[str, Any]:
    """A unit under the names of `controlnet_keys`. `{"image": {"image": …, "mask": …}}` is taken apart."""
    if not isinstance(given, dict):
        raise mismatch("a unit, an object", given)
    unit: dict[str, Any] = {}
    for key, value in given.items():
        name = _OTHER_NAMES.get(str(key), str(key))
        if value is None:
            continue
        if name in unit:
            raise InvalidValue((f".{shown(key)}", f"is another name of {name}: give one of them"))
        unit[name] = value
    image = unit.get("image")
    if isinstance(image, dict):
        if unknown := [key for key in image if key not in ("image", "mask")]:
            raise InvalidValue((f".image.{shown(unknown[0])}", "is unknown: image and mask are known"))
        parts = {key: value for key, value in image.items() if value is not None}
        unit = {**{key: value for key, value in unit.items() if key != "image"}, **parts}
    return unit


def _contradictions(unit: Mapping[str, Any]) -> list[Problem]:
    problems = []
    if "mask" in unit and "image" not in unit:
        problems.append((".mask", "must come with image"))
    if unit.get("guidance_start", 0) > unit.get("guidance_end", 1):
        problems.append((".guidance_start", "must not be above guidance_end"))
    return problems


# -- ADetailer


@lru_cache(maxsize=8)
def adetailer_keys(limits: Limits) -> Mapping[str, ValueType]:
    """What a unit of ADetailer may hold."""
    share, side = number(0, 1), multiple_of_8(MIN_SIDE, MAX_SIDE)
    prompt = _prompt_without_loras()
    no_controlnet = _only(NONE, "use a unit of ControlNet")
    return {
        "ad_model": text(MAX_NAME),
        "ad_model_classes": text(MAX_NAME, blank=True),
        "ad_tab_enable": boolean(),
        "ad_prompt": prompt,
        "ad_negative_prompt": prompt,
        "ad_confidence": share,
        "ad_mask_filter_method": one_of("Area", "Confidence"),
        "ad_mask_k": integer(0, 100),
        "ad_mask_min_ratio": share,
        "ad_mask_max_ratio": share,
        "ad_dilate_erode": integer(-128, 128),
        "ad_x_offset": integer(-200, 200),
        "ad_y_offset": integer(-200, 200),
        "ad_mask_merge_invert": one_of(NONE, "Merge", "Merge and Invert"),
        "ad_mask_blur": integer(0, 64),
        "ad_denoising_strength": share,
        "ad_inpaint_only_masked": boolean(),
        "ad_inpaint_only_masked_padding": integer(0, 256),
        "ad_use_inpaint_width_height": boolean(),
        "ad_inpaint_width": side,
        "ad_inpaint_height": side,
        "ad_use_steps": boolean(),
        "ad_steps": integer(1, limits.max_steps),
        "ad_use_cfg_scale": boolean(),
        "ad_cfg_scale": number(0, MAX_CFG),
        "ad_use_checkpoint": _only(False, CHECKPOINT_REASON),
        "ad_checkpoint": text(MAX_NAME, blank=True),
        "ad_use_vae": _only(False, "the VAE is the job's"),
        "ad_vae": text(MAX_NAME, blank=True),
        "ad_use_sampler": _only(False, "a unit samples as its job does"),
        "ad_sampler": text(MAX_NAME, blank=True),
        "ad_scheduler": text(MAX_NAME, blank=True),
        "ad_use_noise_multiplier": boolean(),
        "ad_noise_multiplier": number(0.5, 1.5),
        "ad_use_clip_skip": boolean(),
        "ad_clip_skip": integer(1, 12),
        "ad_restore_face": _only(False, "use restore_faces"),
        "ad_controlnet_model": no_controlnet,
        "ad_controlnet_module": no_controlnet,
        "ad_controlnet_weight": share,
        "ad_controlnet_guidance_start": share,
        "ad_controlnet_guidance_end": share,
        "is_api": boolean(),
    }


def _read_adetailer(args: Sequence[Any], limits: Limits) -> Units:
    """`[enable, skip img2img, {unit}, …]`, as A1111's page has them; the first two may be left out."""
    flags = [arg for arg in args if isinstance(arg, bool)]
    problems: list[Problem] = []
    units = []
    for index, given in enumerate(args):
        if isinstance(given, bool) and index < 2:
            continue
        try:
            if not isinstance(given, dict):
                raise mismatch("a unit, an object", given)
            unit = _checked(given, adetailer_keys(limits))
        except InvalidValue as error:
            problems += [(f"[{index}]{path}", message) for path, message in error.problems]
            continue
        if _asks_for_something(unit):
            units.append(unit)
    if problems:
        raise InvalidValue(*problems)
    return Units([True, flags[1] if len(flags) > 1 else False, *units])


def _is_idle_adetailer(args: Sequence[Any]) -> bool:
    """Without any unit A1111 runs its default one, and without arguments none."""
    if not args or args[0] is False:
        return True
    units = [arg for arg in args if isinstance(arg, dict)]
    return bool(units) and not any(map(_asks_for_something, units))


def _asks_for_something(unit: Mapping[str, Any]) -> bool:
    return unit.get("ad_model", NONE) != NONE and unit.get("ad_tab_enable") is not False


# -- values


def _checked(given: Mapping[str, Any], keys: Mapping[str, ValueType]) -> dict[str, Any]:
    """The members of a unit as checked values; null means absent. InvalidValue holds all problems."""
    checked: dict[str, Any] = {}
    problems: list[Problem] = []
    for key, value in given.items():
        if key == "model" and value in ("", NONE):
            continue
        if key not in keys:
            problems.append((f".{shown(key)}", unknown_name(key, keys)))
        elif value is not None:
            try:
                checked[key] = keys[key].check(value)
            except InvalidValue as error:
                problems += [(f".{key}{path}", message) for path, message in error.problems]
    if problems:
        raise InvalidValue(*problems)
    return checked


def _controlnet_model(limits: Limits) -> ValueType:
    """A reference to a model, or its name as ControlNet lists it. The checked value is a ModelRef."""
    reference = model_reference(ModelKind.CONTROLNET, limits.model_hosts)

    def check(value: object) -> ModelRef:
        plain = _CONTROLNETS_HASH.sub("", value) if isinstance(value, str) else value
        checked: ModelRef = reference.check(plain)
        return checked

    return replace(reference, check=check)


_CONTROLNETS_HASH = re.compile(r" \[[0-9a-f]{8}\]$")


def _choice(*choices: str) -> ValueType:
    """One of these texts, or its number: A1111's clients send both."""
    by_name = one_of(*choices)

    def check(value: object) -> str:
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
            return choices[value]
        checked: str = by_name.check(value)
        return checked

    return replace(by_name, check=check)


def _only(allowed: bool | str, reason: str) -> ValueType:
    """One value alone: another one is refused, with the reason."""
    types: Mapping[type, Callable[..., ValueType]] = {bool: boolean, str: lambda: text(MAX_NAME, blank=True)}
    plain = types[type(allowed)]()

    def check(value: object) -> Any:
        if plain.check(value) != allowed:
            raise InvalidValue(f"is refused: {reason}")
        return allowed

    return replace(plain, expected=str(allowed).lower() if isinstance(allowed, bool) else allowed, check=check)


def _prompt_without_loras() -> ValueType:
    plain = text(MAX_PROMPT, blank=True)

    def check(value: object) -> str:
        prompt: str = plain.check(value)
        if any(tag.is_lora for tag in find_tags(prompt)):
            raise InvalidValue("must have no LoRA tags: a unit without a prompt uses the job's, LoRAs included")
        return prompt

    return replace(plain, check=check)

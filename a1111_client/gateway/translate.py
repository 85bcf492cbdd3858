"""A1111's body becomes a job's input.

Dropped is what cannot change the picture: what A1111 itself ignores, what is at its default, names in fields that are
not used, where files would be saved. Refused is only what would change the picture and cannot be done here; whatever
may be possible is left to the worker to check. Pure: nothing is asked, nothing is sent.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from a1111_client.gateway.bodies import fields
from a1111_client.gateway.errors import Refused
from a1111_client.gateway.options import CHANGES_THE_PICTURE, CHECKPOINT, OptionsStore, webui_defaults
from a1111_client.snapshot import Checkpoint, Snapshot

log = logging.getLogger(__name__)

Input = dict[str, Any]

_SEEDS = 2**32
_EMPTY_PROMPT = "()"  # a job needs a prompt; A1111 reads this one as an empty one (parse_prompt_attention)
_SIZES = ("width", "height", "hr_resize_x", "hr_resize_y", "firstphase_width", "firstphase_height")
_HIRES = ("hr_", "firstphase_")
_FORMATS = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}
_BUILT_IN_SCRIPTS = ("refiner", "sampler", "seed", "extra options")  # by API their arguments do nothing

# These do nothing to a picture, or only repeat what is the case here.
_DROPPED = frozenset(
    [
        *("save_images", "do_not_save_samples", "do_not_save_grid", "override_settings_restore_afterwards"),
        *("force_task_id", "include_init_images", "latent_mask", "sampler_index", "comments", "send_images"),
    ]
)
# They have a meaning for the worker only at another value than this, and it says what it thinks of that.
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "disable_extra_networks": (False,),
    "infotext": ("",),
    "firstpass_image": ("",),
    "restore_faces": (False,),
    "tiling": (False,),
    "seed_resize_from_h": (-1, 0),
    "seed_resize_from_w": (-1, 0),
    "subseed_strength": (0.0,),
    "negative_prompt": ("",),
    "batch_size": (1,),
    "n_iter": (1,),
    "hr_resize_x": (0,),
    "hr_resize_y": (0,),
    "firstphase_width": (0,),
    "firstphase_height": (0,),
    "hr_prompt": ("",),
    "hr_negative_prompt": ("",),
    "hr_second_pass_steps": (0,),
    "hr_sampler_name": ("", "Use same sampler"),
    "hr_scheduler": ("", "Use same scheduler"),
    "hr_checkpoint_name": ("", "None", "Use same checkpoint"),
    "refiner_checkpoint": ("", "None", "none"),
    "script_name": ("", "None"),
    "enable_hr": (False,),
    "mask": ("",),
}


def generation_input(path: str, given: Mapping[str, Any], snapshot: Snapshot, options: OptionsStore) -> Input:
    """The input of a txt2img or img2img job. `given` are the fields of the body, in their types. Raises Refused."""
    body: Input = {name: value for name, value in given.items() if value is not None and name not in _DROPPED}
    for name in ("steps", "cfg_scale", "width", "height"):  # the worker's own defaults are others than A1111's
        body.setdefault(name, fields(path)[name]["default"])
    _check_init_images(path, body)
    if not body.get("prompt", "").strip():
        body["prompt"] = _EMPTY_PROMPT
    if not body.get("enable_hr"):
        for name in [name for name in body if name.startswith(_HIRES)]:
            del body[name]
        if path == "txt2img":
            body.pop("denoising_strength", None)
    for name in _SIZES:
        if isinstance(body.get(name), int) and body[name] > 0:
            body[name] = body[name] // 8 * 8 or body[name]  # as A1111 does, after it has noted the other size
    for name in ("seed", "subseed"):
        if body.get(name, -1) != -1:
            body[name] %= _SEEDS  # others have 64 bits: the worker's seeds are A1111's own, of its page
    body.pop("scheduler", None)
    body |= _sampler(given, snapshot)
    _choose_styles(body, snapshot)
    checkpoint = _settings(body, snapshot, options)
    _check_other_checkpoints(body, checkpoint)
    _check_scripts(path, body, snapshot)
    for name, harmless in _HARMLESS.items():
        if name in body and body[name] in harmless:
            del body[name]
    if "script_name" not in body:
        body.pop("script_args", None)
    if path != "txt2img":
        body["task"] = path
    return body


def _check_init_images(path: str, body: Input) -> None:
    if path == "img2img" and not body.get("init_images"):
        raise Refused(404, "Init image not found")


def _sampler(given: Mapping[str, Any], snapshot: Snapshot) -> Input:
    """Sampler and scheduler as A1111 1.10.1 understands them: a scheduler in the sampler's name wins."""
    name = str(given.get("sampler_name") or given.get("sampler_index") or "Euler")
    chosen = {"sampler_name": name}
    scheduler = str(given.get("scheduler") or "")
    labels = {spelling for entry in snapshot.webui("schedulers") for spelling in _spellings(entry)}
    if scheduler and not any(name.casefold().endswith(f" {label}") for label in labels):
        if _key(scheduler) in {_key(label) for label in labels}:
            chosen["scheduler"] = scheduler
        else:
            log.info("there is no scheduler %.80r; the sampler's own is used, as A1111 does", scheduler)
    return chosen


def _spellings(entry: Mapping[str, Any]) -> list[str]:
    return [
        str(text).casefold() for text in (entry.get("name"), entry.get("label"), *(entry.get("aliases") or ())) if text
    ]


def _key(spelling: str) -> str:
    return "".join(spelling.casefold().split()).replace("_", "").replace("-", "")


def _choose_styles(body: Input, snapshot: Snapshot) -> None:
    known = {entry.get("name") for entry in snapshot.webui("prompt-styles")}
    styles = [style for style in body.pop("styles", ()) if style in known]
    if styles:
        body["styles"] = styles


def _settings(body: Input, snapshot: Snapshot, options: OptionsStore) -> Checkpoint:
    """Reduce override_settings to what the job has to say, posted settings included. The checkpoint of the job."""
    given = {name: value for name, value in (body.pop("override_settings", None) or {}).items() if value is not None}
    checkpoint = _find_checkpoint(given.pop(CHECKPOINT, ""), "override_settings.sd_model_checkpoint", snapshot)
    checkpoint = checkpoint or options.checkpoint(snapshot)
    if checkpoint != snapshot.default_checkpoint:
        body["checkpoint"] = checkpoint.name
    _choose_format(body, given.pop("samples_format", None) or options.samples_format())
    settings = options.settings(snapshot)
    defaults = webui_defaults()["options"]
    refused = []
    for name, value in given.items():
        if name in snapshot.options:
            settings[name] = _like(snapshot.options[name], value)
        elif name in CHANGES_THE_PICTURE and value != defaults.get(name) and _is_used(name, body):
            refused.append(name)
    if refused:
        raise Refused(
            422,
            f"override_settings: {', '.join(sorted(refused))}: cannot be changed on this endpoint; "
            f"a job may change {', '.join(sorted(snapshot.options))}",
        )
    settings = {
        name: value for name, value in settings.items() if value != snapshot.options[name] and _is_used(name, body)
    }
    if settings:
        body["override_settings"] = settings
    return checkpoint


def _is_used(setting: str, body: Input) -> bool:
    """Whether a setting matters to this job."""
    if setting in ("face_restoration_model", "code_former_weight"):
        return bool(body.get("restore_faces"))
    if setting.startswith(("img2img_", "inpainting_", "initial_noise", "overlay_inpaint", "upscaler_for_img2img")):
        return "init_images" in body
    return True


def _like(default: Any, value: Any) -> Any:
    """A number that came as text, or with a fraction of nothing, in the type of the setting. Else as it is."""
    try:
        if isinstance(default, bool):
            return bool(value) if isinstance(value, int) else value
        if isinstance(default, int):
            return int(float(value))
        if isinstance(default, float):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    return value


def _find_checkpoint(name: Any, path: str, snapshot: Snapshot) -> Checkpoint | None:
    """The checkpoint that a job names; None if it names none. Raises Refused if it is not there."""
    if not name:
        return None
    found = snapshot.find_checkpoint(str(name))
    if found is not None:
        return found
    if snapshot.is_default:  # which may be another one than this endpoint's: the worker knows
        return Checkpoint(str(name), str(name), str(name))
    there = ", ".join(checkpoint.title for checkpoint in snapshot.checkpoints[:8])
    raise Refused(404, f"{path}: there is no checkpoint {str(name)[:200]!r}; this endpoint has {there}")


def _check_other_checkpoints(body: Input, checkpoint: Checkpoint) -> None:
    """A second pass or a refiner with the job's own checkpoint is none."""
    for name in ("hr_checkpoint_name", "refiner_checkpoint"):
        if name in body and checkpoint.is_named(body[name]):
            del body[name]
    if body.get("refiner_checkpoint", "") in _HARMLESS["refiner_checkpoint"]:
        body.pop("refiner_switch_at", None)


def _choose_format(body: Input, samples_format: Any) -> None:
    wanted = _FORMATS.get(str(samples_format or "png").lower())
    if wanted is None:
        raise Refused(422, f"samples_format: must be one of {', '.join(_FORMATS)}")
    if wanted != "png":
        body["output"] = {"format": wanted}


def _check_scripts(path: str, body: Input, snapshot: Snapshot) -> None:
    """Leave the scripts that do something and are there. Raises Refused, with A1111's own words, for others."""
    scripts = snapshot.webui("scripts")
    known = {str(name).casefold() for name in scripts.get(path, ())} if isinstance(scripts, dict) else set()
    name = body.get("script_name", "")
    if name not in _HARMLESS["script_name"]:
        _check_script(name, known, snapshot)
    always = {
        name: value
        for name, value in (body.pop("alwayson_scripts", None) or {}).items()
        if name.casefold() not in _BUILT_IN_SCRIPTS and _does_something(name, value)
    }
    for name in always:
        _check_script(name, known, snapshot)
    if always:
        body["alwayson_scripts"] = always


def _check_script(name: str, known: Collection[str], snapshot: Snapshot) -> None:
    if name.casefold() not in known and not snapshot.is_default:
        raise Refused(422, f"Script {name[:200]!r} not found")


def _does_something(name: str, value: Any) -> bool:
    """Whether an always-on script is asked for anything. ControlNet and ADetailer come along switched off."""
    arguments = value.get("args") if isinstance(value, dict) else None
    if isinstance(arguments, dict):
        arguments = list(arguments.values())
    if not isinstance(arguments, list) or not arguments:
        return False
    if name.casefold() == "controlnet":
        return any(not isinstance(unit, dict) or unit.get("enabled", True) is not False for unit in arguments)
    if name.casefold() == "adetailer":
        return arguments[0] is not False and any(_detects(unit) for unit in arguments if isinstance(unit, dict))
    return True


def _detects(unit: Mapping[str, Any]) -> bool:
    return unit.get("ad_model", "None") != "None" and unit.get("ad_tab_enable", True) is not False


def named_in(value: Any) -> Iterable[str]:
    """Every text in a part of a job's input, in lower case."""
    if isinstance(value, str):
        yield value.casefold()
    elif isinstance(value, Mapping):
        for key, member in value.items():
            yield key.casefold()
            yield from named_in(member)
    elif isinstance(value, list):
        for member in value:
            yield from named_in(member)


def changes_pictures(given: Mapping[str, Any]) -> bool:
    """Whether an extra-…-image body asks for anything. If not, A1111 answers each picture as it came, in its size."""
    restores = given.get("gfpgan_visibility") or given.get("codeformer_visibility")
    has_pictures = given.get("imageList", True) != []
    return has_pictures and bool(restores or given.get("upscaler_1", "None") not in ("", "None"))


def upscale_input(given: Mapping[str, Any]) -> Input:
    """The input of an upscale job. `given` are the fields of an extra-…-image body, in their types."""
    body: Input = {name: value for name, value in given.items() if name != "show_extras_results"}
    return {"task": "upscale", **body}

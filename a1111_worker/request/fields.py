"""What a field of a job is, and the fields and limits that several tasks share.

Every field of A1111's own bodies (1.9.3 and 1.10.1) is in one of five classes: the worker's own, passed on as it is,
checked later against the WebUI's live lists, taken and dropped because it cannot change the picture, or refused with a
reason. What A1111 answers with a 500 is out of range.
The table of a task is in the module of that task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import islice
from typing import Any

from a1111_worker.domain import OWN_CHECKPOINT, DeliveryMode, ImageFormat, ModelRef, OnLoraError, OutputOptions, Task
from a1111_worker.request.unknown import SURE, unknown_name, unknown_output_option
from a1111_worker.request.values import (
    MAX_PROBLEMS,
    InvalidValue,
    ValueType,
    always_true,
    any_list,
    any_object,
    anything,
    as_integer,
    boolean,
    describe_value,
    integer,
    list_of,
    mismatch,
    multiple_of_8,
    number,
    object_of,
    one_of,
    shown,
    text,
    text_or_object,
)
from a1111_worker.similar import nearest
from a1111_worker.text import quoted_list

MAX_LORAS = 16
MAX_EMBEDDINGS = 16
MAX_PROMPT = 20_000  # bytes of UTF-8
MAX_NAME = 200
MAX_STYLES = 32
MAX_SEED = 2**32 - 1
MIN_SIDE = 64
MAX_SIDE = 2048
MAX_CFG = 100
MAX_SAMPLING_PARAMETER = 1000  # eta and the s_ parameters: A1111's own sliders end at 999

LORA_SCALE = number(-10, 10)
LORA_KEYS = ("url", "version_id", "name", "hash", "scale")
LORAS_SCHEMA: Mapping[str, Any] = {
    "type": "array",
    "maxItems": MAX_LORAS,
    "items": {
        "anyOf": [
            {"type": "string"},
            {"type": "integer", "minimum": 1},
            {"type": "object", "properties": {key: {} for key in LORA_KEYS}, "additionalProperties": False},
        ]
    },
}


@dataclass(frozen=True)
class Limits:
    """What the operator allows. `has_bucket`: a bucket is set up.

    `model_hosts` and `image_hosts` are the origins of MODEL_HOSTS and IMAGE_HOSTS; the latter may be `*`. `checkpoints`
    are those that a job may name, the worker's own one first. Empty: a job may name none. `max_checkpoint_bytes` is
    the limit for a checkpoint that a job brings; None: a job may bring none.
    """

    max_steps: int = 150
    max_pixels: int = 4_194_304
    max_images: int = 16
    model_hosts: tuple[str, ...] = ()
    has_bucket: bool = False
    image_hosts: tuple[str, ...] = ()
    max_input_images: int = 8
    max_upscale_pixels: int = 67_108_864
    checkpoints: tuple[tuple[str, ModelRef], ...] = ()
    max_checkpoint_bytes: int | None = None

    def checkpoint(self, wanted: str | ModelRef) -> ModelRef | None:
        """The checkpoint of the list that has this name, in any case, or that a reference means; None if none does."""
        for index, (name, ref) in enumerate(self.checkpoints):
            is_meant = wanted.may_mean(ref) if isinstance(wanted, ModelRef) else wanted.casefold() == name.casefold()
            if is_meant:
                return ref if index else OWN_CHECKPOINT
        return None


DEFAULT_LIMITS = Limits()


class FieldClass(str, Enum):
    """What the worker does with a field."""

    OURS = "ours"
    PASSED = "passed"
    CHECKED = "checked"
    DROPPED = "dropped"
    REFUSED = "refused"


@dataclass(frozen=True)
class Field:
    """A field of a job's input.

    `reason` is why a field is refused or dropped. `ignored_values` are the values of a refused field that say, in
    A1111's own words, that it is not used. `is_webui_field` is False for a field that A1111 does not know.
    `is_required`: it must be there, and null is no value for it. `only_with` is the field without which this one cannot
    change the picture: then it is dropped, whatever it says.
    """

    kind: FieldClass
    value: ValueType
    reason: str = ""
    ignored_values: tuple[bool | str, ...] = ()
    is_webui_field: bool = True
    is_required: bool = False
    only_with: str | None = None

    def ignores(self, value: object) -> bool:
        """Whether a value of this refused field changes nothing."""
        # To Python 1 == True, and a job may say true, not 1.
        return any(value is other or (isinstance(other, str) and value == other) for other in self.ignored_values)


TASK = Field(FieldClass.OURS, one_of(*(task.value for task in Task)), is_webui_field=False)
"""The field that chooses the table."""


def refused_text(reason: str, *ignored_values: str, is_webui_field: bool = True) -> Field:
    return Field(FieldClass.REFUSED, text(MAX_NAME), reason, ignored_values, is_webui_field)


def refused_boolean(ignored_value: bool, reason: str) -> Field:
    return Field(FieldClass.REFUSED, boolean(), reason, (ignored_value,))


CHECKPOINT_REASON = "the checkpoint is this worker's, not the job's"
DISK_REASON = "nothing is kept on the worker's disk"


def generation_fields(limits: Limits) -> dict[str, Field]:
    """What every task takes that generates pictures."""
    return {
        "task": TASK,
        **_webuis_own_fields(limits),
        **_workers_own_fields(limits),
        **_dropped_in_generations(),
        **_refused_in_generations(),
        "refiner_checkpoint": checkpoint_field(limits, "", "None", "none"),
        "checkpoint": _main_checkpoint(limits),
    }


def _webuis_own_fields(limits: Limits) -> dict[str, Field]:
    """The fields of A1111's own body that change the pictures."""
    ours, passed, checked = FieldClass.OURS, FieldClass.PASSED, FieldClass.CHECKED
    side = multiple_of_8(MIN_SIDE, MAX_SIDE)
    noise_side = multiple_of_8(MIN_SIDE, MAX_SIDE, or_else=(-1, 0))
    seed = integer(-1, MAX_SEED)
    images = integer(1, limits.max_images)
    sampling = number(0, MAX_SAMPLING_PARAMETER)
    share = number(0, 1)
    name = text(MAX_NAME, blank=True)
    return {
        "prompt": Field(ours, text(MAX_PROMPT), is_required=True),
        "negative_prompt": Field(ours, text(MAX_PROMPT, blank=True)),
        "steps": Field(ours, integer(1, limits.max_steps)),
        "cfg_scale": Field(ours, number(0, MAX_CFG)),
        "width": Field(ours, side),
        "height": Field(ours, side),
        "seed": Field(ours, seed),
        "override_settings": Field(ours, override_settings()),
        "sampler_name": Field(checked, name),
        "scheduler": Field(checked, name),
        "sampler_index": Field(checked, name),
        "batch_size": Field(passed, images),
        "n_iter": Field(passed, images),
        "styles": Field(checked, list_of(name, MAX_STYLES, "names of styles")),
        "subseed": Field(passed, seed),
        "subseed_strength": Field(passed, share),
        "seed_resize_from_h": Field(passed, noise_side),
        "seed_resize_from_w": Field(passed, noise_side),
        "restore_faces": Field(passed, boolean()),
        "tiling": Field(passed, boolean()),
        "eta": Field(passed, sampling),
        "s_min_uncond": Field(passed, sampling),
        "s_churn": Field(passed, sampling),
        "s_tmax": Field(passed, sampling),
        "s_tmin": Field(passed, sampling),
        "s_noise": Field(passed, sampling),
        # Below 0.01 A1111 plans (steps / strength) steps: 2.5 million of them for 0.00001.
        "denoising_strength": Field(passed, number(0.01, 1, or_else=(0,))),
        "refiner_switch_at": Field(passed, share),
        "comments": Field(passed, any_object()),
        "script_name": Field(checked, name),
        "script_args": Field(passed, any_list()),
        "alwayson_scripts": Field(
            checked, object_of(check_always_on_script, 'an object like {"a script\'s name": {"args": […]}}')
        ),
    }


def _workers_own_fields(limits: Limits) -> dict[str, Field]:
    """The fields that A1111 does not know."""
    loras = replace(any_list(), expected=f"a list of at most {MAX_LORAS} LoRAs", schema=LORAS_SCHEMA)
    values = {
        "loras": loras,
        "on_lora_error": one_of(*(choice.value for choice in OnLoraError)),
        "clip_skip": OVERRIDABLE_OPTIONS["CLIP_stop_at_last_layers"].value,
        "vae": text_or_object("a name, or a reference as in loras"),
        "embeddings": replace(any_list(), expected=f"a list of at most {MAX_EMBEDDINGS} embeddings"),
        "include": list_of(one_of("models"), 1, "key of the answer: models"),
        "output": output_options(has_bucket=limits.has_bucket),
        "allow_blank": boolean(),
        "preview": boolean(),
        "trigger_words": boolean(),
    }
    return {name: Field(FieldClass.OURS, value, is_webui_field=False) for name, value in values.items()}


def checkpoint_field(limits: Limits, *unset: str, is_webui_field: bool = True, only_with: str | None = None) -> Field:
    """A checkpoint of a job: a name of the operator's list, in any case. The texts in `unset` stand for none."""
    names = [name for name, _ in limits.checkpoints]
    if not names:
        return replace(refused_text(CHECKPOINT_REASON, *unset, is_webui_field=is_webui_field), only_with=only_with)

    def check(value: object) -> str | None:
        if value in unset:
            return None
        name = text(MAX_NAME).check(value)
        if limits.checkpoint(name) is None:
            raise InvalidValue(unknown_checkpoint(limits))
        return str(name)

    value_type = ValueType("string", "a checkpoint's name", check)
    return Field(FieldClass.OURS, value_type, is_webui_field=is_webui_field, only_with=only_with)


def _main_checkpoint(limits: Limits) -> Field:
    """The checkpoint that draws, or begins: a name of the list, or a reference if the operator allows that."""
    field = checkpoint_field(limits, is_webui_field=False)
    if limits.max_checkpoint_bytes is None:
        return field

    def check(value: object) -> Any:
        version_id = as_integer(value)
        return reference.check(value if version_id is None else str(version_id))

    reference = text_or_object("a checkpoint's name, or a reference as in loras")
    schema = {"type": ["string", "integer", "object"]}
    return replace(field, value=replace(reference, check=check, schema=schema))


def unknown_checkpoint(limits: Limits) -> str:
    """The complaint about a name that is not in the list."""
    return f"is unknown to this worker, which has {quoted_list([name for name, _ in limits.checkpoints])}"


def _dropped_in_generations() -> dict[str, Field]:
    def dropped(value: ValueType, reason: str, *, is_webui_field: bool = True) -> Field:
        return Field(FieldClass.DROPPED, value, reason, is_webui_field=is_webui_field)

    return {
        "save_images": dropped(boolean(), DISK_REASON),
        "do_not_save_samples": dropped(boolean(), DISK_REASON),
        "do_not_save_grid": dropped(boolean(), DISK_REASON),
        "send_images": dropped(always_true("the pictures are the answer"), "the pictures are the answer"),
        "override_settings_restore_afterwards": dropped(boolean(), "a job's settings end with the job"),
        "samples_format": dropped(anything(), "the format is `output.format`", is_webui_field=False),
        "return_grid": dropped(anything(), "the WebUI's API sends no grid of a job's pictures", is_webui_field=False),
        **{
            name: dropped(anything(), f"{client} sends it, and A1111 does not know it", is_webui_field=False)
            for client, names in FIELDS_OF_CLIENTS.items()
            for name in names
        },
    }


FIELDS_OF_CLIENTS: Mapping[str, Sequence[str]] = {
    "SillyTavern": ("url", "auth", "hr_additional_modules"),
    "Auto-Photoshop-StableDiffusion-Plugin": (
        "selection_info",
        "original_prompt",
        "original_negative_prompt",
        "use_sharp_mask",
        "use_prompt_shortcut",
        "prompt_shortcut_ui_dict",
        "uniqueDocumentId",
        "mode",
        "session_id",
        "expanded_mask",
        "mask_expansion",
    ),
    "AI Render for Blender": ("image_similarity", "sampler"),
}
"""Fields of their own that clients of A1111's API send to it. A1111 drops them without a word."""


def _refused_in_generations() -> dict[str, Field]:
    return {
        "model": refused_text(CHECKPOINT_REASON, is_webui_field=False),
        "sd_model": refused_text(CHECKPOINT_REASON, is_webui_field=False),
        "sd_model_checkpoint": refused_text(CHECKPOINT_REASON, is_webui_field=False),
        "infotext": refused_text("it sets other fields unseen; give each of them by its name", ""),
        "disable_extra_networks": refused_boolean(False, "the WebUI would keep the LoRAs of the job before"),
        # 1.9.3 and 1.10.1 pass the text on as it is, and fail when they use it as an image.
        "firstpass_image": refused_text("the WebUI's API does not decode it, and fails", ""),
        "force_task_id": refused_text("the worker names its own tasks", ""),
    }


# Fields in which A1111's clients send "" for what they leave alone.
_BLANK_IS_UNSET = ("sampler_name", "scheduler", "sampler_index", "hr_upscaler", "script_name", "vae")

# What A1111's own page sends for "as in the first pass". Its API would take that for a name and fail.
_SAME_AS_FIRST_PASS = {"hr_sampler_name": ("", "use same sampler"), "hr_scheduler": ("", "use same scheduler")}


def is_unset(name: str, value: Any) -> bool:
    """Whether the checked value of a field says, in A1111's own words, that the field is not used."""
    if name in _BLANK_IS_UNSET:
        return isinstance(value, str) and not value.strip()
    if value is None:
        return True
    return name in _SAME_AS_FIRST_PASS and value.strip().casefold() in _SAME_AS_FIRST_PASS[name]


@dataclass(frozen=True)
class Option:
    """A setting of the WebUI that a job may override. `default` is A1111's own, set once when the worker starts.

    After a job the WebUI restores only the settings that were set before it. Without that default, a job's settings
    would leak into the next job.
    """

    default: bool | float | str
    value: ValueType


OVERRIDABLE_OPTIONS: Mapping[str, Option] = {
    "CLIP_stop_at_last_layers": Option(1, integer(1, 12)),
    "sd_vae": Option("Automatic", text(MAX_NAME)),
    "emphasis": Option("Original", one_of("None", "Ignore", "Original", "No norm")),
    "comma_padding_backtrack": Option(20, integer(0, 74)),
    "randn_source": Option("GPU", one_of("GPU", "CPU", "NV")),
    "eta_noise_seed_delta": Option(0, integer(0, MAX_SEED)),
    "eta_ancestral": Option(1.0, number(0, 1)),
    "eta_ddim": Option(0.0, number(0, 1)),
    "s_churn": Option(0.0, number(0, 100)),
    "s_tmin": Option(0.0, number(0, 10)),
    "s_tmax": Option(0.0, number(0, 999)),
    "s_noise": Option(1.0, number(0, 1.1)),
    "s_min_uncond": Option(0.0, number(0, 15)),
    "token_merging_ratio": Option(0.0, number(0, 0.9)),
    "token_merging_ratio_hr": Option(0.0, number(0, 0.9)),
    "sgm_noise_multiplier": Option(False, boolean()),
    "always_discard_next_to_last_sigma": Option(False, boolean()),
    "upcast_attn": Option(False, boolean()),
    "face_restoration_model": Option("CodeFormer", one_of("CodeFormer", "GFPGAN")),
    "code_former_weight": Option(0.5, number(0, 1)),
    "inpainting_mask_weight": Option(1.0, number(0, 1)),
    "initial_noise_multiplier": Option(1.0, number(0, 1.5)),
    "img2img_color_correction": Option(False, boolean()),
}


INERT_OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "samples_format": (),
    "return_grid": (),
    "ddim_discretize": ("uniform",),
    "img2img_fix_steps": (False,),
    "sd_hypernetwork": ("None",),
}
"""Options that clients send, and the values that change nothing: A1111's defaults. None are listed if no value does."""

CHECKPOINT_OPTION = "sd_model_checkpoint"


def override_settings() -> ValueType:
    """The settings that a job overrides; those that change nothing, and the checkpoint's name, are still among them."""

    def check_option(name: str, value: object) -> object:
        if value is None:
            return None
        if name == CHECKPOINT_OPTION:
            return text(MAX_NAME, blank=True).check(value)
        if name in INERT_OPTIONS and (not INERT_OPTIONS[name] or value in INERT_OPTIONS[name]):
            return value
        if name not in OVERRIDABLE_OPTIONS:
            near = nearest(name, OVERRIDABLE_OPTIONS, 1, cutoff=SURE)
            hint = f"did you mean {near[0]!r}?" if near else f"these are: {', '.join(OVERRIDABLE_OPTIONS)}"
            raise InvalidValue(f"is not a setting that a job may override; {hint}")
        return OVERRIDABLE_OPTIONS[name].value.check(value)

    options = object_of(check_option, "an object of settings a job may override")
    # null means absent here too: A1111 would set the option to it, and fail.
    taken = {name: option.value.schema for name, option in OVERRIDABLE_OPTIONS.items()}
    schema = {"type": "object", "properties": {name: _or_null(member) for name, member in taken.items()}}
    return replace(options, check=lambda value: _without_nulls(options.check(value)), schema=schema)


OUTPUT: Mapping[str, ValueType] = {
    "format": one_of(*(choice.value for choice in ImageFormat)),
    "quality": integer(1, 100),
    "delivery": one_of(*(choice.value for choice in DeliveryMode)),
    "metadata": boolean(),
    "raw": boolean(),
}


def output_options(*, has_bucket: bool) -> ValueType:
    """How a job wants its images. The checked value is an OutputOptions."""

    def check_option(name: str, value: object) -> object:
        if name not in OUTPUT:
            raise InvalidValue(unknown_output_option(name, OUTPUT))
        return None if value is None else OUTPUT[name].check(value)

    options = object_of(check_option, 'an object like {"format": "webp", "quality": 90}')

    def check(value: object) -> OutputOptions:
        given = _without_nulls(options.check(value))
        delivery = DeliveryMode(given.pop("delivery", DeliveryMode.AUTO))
        if delivery is DeliveryMode.BUCKET and not has_bucket:
            raise InvalidValue((".delivery", "is refused: this worker has no bucket"))
        if delivery is DeliveryMode.BUCKET and given.get("raw"):
            raise InvalidValue((".raw", "must be false with delivery bucket: the links are in the worker block"))
        return OutputOptions(ImageFormat(given.pop("format", ImageFormat.PNG)), delivery=delivery, **given)

    schema = {
        "type": "object",
        "properties": {name: _or_null(value.schema) for name, value in OUTPUT.items()},
        "additionalProperties": False,
    }
    return replace(options, check=check, schema=schema)


def _or_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _without_nulls(members: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in members.items() if value is not None}


BUILT_IN_SCRIPTS = {  # always-on scripts of A1111 itself: they would set fields and bypass the checks
    "refiner": "use refiner_checkpoint and refiner_switch_at",
    "sampler": "use steps, sampler_name and scheduler",
    "seed": "use seed, subseed and subseed_strength",
    "extra options": "use override_settings",
}


def check_always_on_script(name: str, value: object) -> dict[str, Any]:
    if reason := BUILT_IN_SCRIPTS.get(name.strip().casefold()):
        raise InvalidValue(f"is refused: {reason}")
    if not isinstance(value, dict):
        raise mismatch('an object like {"args": […]}', value)
    unknown = islice((key for key in value if key != "args"), MAX_PROBLEMS)
    problems = [(f".{shown(key)}", unknown_name(key, ("args",))) for key in unknown]
    if "args" in value and not isinstance(value["args"], (list, tuple)):
        problems.append((".args", f"must be a list, not {describe_value(value['args'])}"))
    if problems:
        raise InvalidValue(*problems)
    return dict(value)

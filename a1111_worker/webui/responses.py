"""What the WebUI's endpoints answer, as checked values, so that nobody below reads raw JSON.

    GET /sd-models              [{"title": "x.safetensors [0123456789]", "sha256": "<64 digits>" or null}]
    GET /samplers               [{"name": "Euler a", "aliases": ["k_euler_a"]}]
    GET /schedulers             [{"name": "karras", "label": "Karras", "aliases": null}]
    GET /upscalers              [{"name": "R-ESRGAN 4x+", "model_path": "<path>", "https://<address>" or null}]
    POST /extra-single-image    {"html_info": "<p>…</p>", "image": "<base64>"}
    GET /latent-upscale-modes   [{"name": "Latent"}]
    GET /sd-vae                 [{"model_name": "x.safetensors"}]
    GET /prompt-styles          [{"name": "film", "prompt": "{prompt}, grain", "negative_prompt": null}]
    GET /scripts                {"txt2img": ["x/y/z plot"], "img2img": ["loopback"]}
    GET /script-info            [{"name": "x/y/z plot", "is_img2img": false, "args": [{"choices": ["Seed"]}]}]
    GET /controlnet/model_list  {"model_list": ["STEM [0123abcd]"]}
    GET /controlnet/module_list {"module_list": ["canny"], "module_detail": {"canny": {"model_free": false, …}}}
    GET /controlnet/settings    {"control_net_unit_count": 3}
    GET /adetailer/v1/ad_model  {"ad_model": ["face_yolov8n.pt"]}
    GET /options                {"sd_model_checkpoint": "x.safetensors", "sd_checkpoint_hash": "<64 digits>"}
    GET /cmd-flags              {"no_hashing": false, "codeformer_models_path": "<folder>", "gfpgan_models_path": …}
    GET /progress               {"progress": 0.2, "eta_relative": 1.5, "state": {"job_no": 0, "job_count": 1, …},
                                 "current_image": "<base64>" or null}

Each holds more than is shown here (A1111 1.9.3 and 1.10.1: tests/data). A parse function takes an answer's JSON and
raises UnexpectedForm if what this worker reads is missing or has another type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from a1111_worker.domain import Task

MENUS = (
    "samplers",
    "schedulers",
    "upscalers",
    "latent-upscale-modes",
    "face-restorers",
    "prompt-styles",
    "sd-models",
    "loras",
    "embeddings",
    "sd-vae",
    "scripts",
    "script-info",
)
"""The endpoints with which A1111's clients fill their menus."""


class UnexpectedForm(ValueError):
    """An answer whose JSON has another form than A1111's. The message says what is wrong with it."""


@dataclass(frozen=True)
class ListedCheckpoint:
    """A checkpoint file that the WebUI lists. `title` is `file` or `file [hash]`. `sha256` is None if it is unknown."""

    title: str
    sha256: str | None

    @property
    def file(self) -> str:
        return file_of_title(self.title)

    @property
    def names(self) -> tuple[str, ...]:
        """Texts by which the option `sd_model_checkpoint` means this file."""
        return self.title, self.file, PurePosixPath(self.file).stem


@dataclass(frozen=True)
class Sampler:
    name: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scheduler:
    """A scheduler. A request names it by its `label`."""

    name: str
    label: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Upscaler:
    """An upscaler. `is_there`: it needs no file, or its file is there; if not, A1111 silently uses Lanczos.

    `has_file`: its file is there.
    """

    name: str
    is_there: bool
    has_file: bool = False


@dataclass(frozen=True)
class WebUIFlags:
    """How the WebUI was started: whether with `--no-hashing`, and its folders for what restores faces.

    `annotators_folder` is ControlNet's, if start.sh has named one.
    """

    no_hashing: bool
    codeformer_folder: str | None = None
    gfpgan_folder: str | None = None
    annotators_folder: str | None = None


@dataclass(frozen=True)
class Style:
    """A text that the WebUI puts around a prompt, and one for the negative prompt. Either may be empty."""

    name: str
    prompt: str = ""
    negative_prompt: str = ""


@dataclass(frozen=True)
class WebUIOptions:
    """All options as they are now.

    `checkpoint` names the checkpoint that is loaded, or is being loaded: it is a title, or a file name without its
    suffix. `checkpoint_sha256` is what A1111 keeps as "SHA256 hash of the current checkpoint".
    """

    checkpoint: str | None
    checkpoint_sha256: str | None
    values: Mapping[str, Any]


@dataclass(frozen=True)
class WebUIProgress:
    """How far the running generation is. It does not say whose generation that is.

    `progress` is 0 to 1. `image` counts from 1. `images` is -1 while a checkpoint is loaded inside a generation, and 0
    if nothing runs. `interrupted_job` is the `job_timestamp` of the job that runs, or ran last, if somebody has
    interrupted it; it is also in the `info` of that job's answer. `preview` is the picture so far, in base64, if it was
    asked for and there is one.
    """

    progress: float
    eta_seconds: float
    image: int
    images: int
    step: int
    steps: int
    interrupted_job: str | None = None
    preview: str | None = None


def file_of_title(title: str) -> str:
    """The file name in a checkpoint's title, which is `file` or `file [hash]`."""
    return title.partition(" [")[0]


def parse_checkpoints(answer: Any) -> tuple[ListedCheckpoint, ...]:
    return tuple(ListedCheckpoint(_text(entry, "title"), _text_or_none(entry, "sha256")) for entry in _entries(answer))


def parse_samplers(answer: Any) -> tuple[Sampler, ...]:
    return tuple(Sampler(_text(entry, "name"), _aliases(entry)) for entry in _entries(answer))


def parse_schedulers(answer: Any) -> tuple[Scheduler, ...]:
    return tuple(Scheduler(_text(entry, "name"), _text(entry, "label"), _aliases(entry)) for entry in _entries(answer))


def parse_upscalers(answer: Any) -> tuple[Upscaler, ...]:
    """The upscalers. The path of one whose file is not there is the address from which A1111 would download it.

    LDSR has no path in either case, and loads its files itself: it never counts as there (1.9.3 and 1.10.1).
    """
    found = []
    for entry in _entries(answer):
        name, path = _text(entry, "name"), entry.get("model_path")
        is_there = not str(path).startswith("http") and name != "LDSR"
        found.append(Upscaler(name, is_there, has_file=is_there and path is not None))
    return tuple(found)


def parse_extra_image(answer: Any) -> str:
    """The picture of an answer of Extras, in base64."""
    return _text(_object(answer), "image")


def parse_names(answer: Any) -> tuple[str, ...]:
    """The names of the latent upscale modes."""
    return tuple(_text(entry, "name") for entry in _entries(answer))


def parse_vaes(answer: Any) -> tuple[str, ...]:
    """The file names of the VAEs."""
    return tuple(_text(entry, "model_name") for entry in _entries(answer))


def parse_styles(answer: Any) -> tuple[Style, ...]:
    return tuple(
        Style(
            _text(entry, "name"),
            _text(entry, "prompt") if entry.get("prompt") is not None else "",
            _text(entry, "negative_prompt") if entry.get("negative_prompt") is not None else "",
        )
        for entry in _entries(answer)
    )


def parse_scripts(answer: Any) -> Mapping[Task, tuple[str, ...]]:
    """The names of the scripts for txt2img, and those for img2img."""
    return {task: _texts(_object(answer), task.value) for task in (Task.TXT2IMG, Task.IMG2IMG)}


def parse_script_axes(answer: Any) -> Mapping[Task, tuple[str, ...]]:
    """The axes of "X/Y/Z plot" of both tasks, in the order of their numbers. Empty if there is no such script."""
    found: dict[Task, tuple[str, ...]] = {Task.TXT2IMG: (), Task.IMG2IMG: ()}
    for entry in _entries(answer):
        if _text(entry, "name") == "x/y/z plot":
            arguments = _entries(entry.get("args"))
            task = Task.IMG2IMG if entry.get("is_img2img") else Task.TXT2IMG
            found[task] = _texts(arguments[0] if arguments else {}, "choices")
    return found


def parse_argument_count(answer: Any, script: str) -> int:
    """How many arguments a script takes in txt2img; 0 if there is no such script."""
    for entry in _entries(answer):
        if _text(entry, "name") == script and entry.get("is_img2img") is False:
            return len(_entries(entry.get("args")))
    return 0


def parse_controlnet_models(answer: Any) -> tuple[str, ...]:
    return tuple(name for name in _texts(_object(answer), "model_list") if name != "None")


def parse_controlnet_modules(answer: Any) -> Mapping[str, bool]:
    """The modules, and whether each works without a model."""
    details = _object(_object(answer).get("module_detail"))
    return {name: _object(detail).get("model_free") is True for name, detail in details.items()}


def parse_controlnet_units(answer: Any) -> int:
    return int(_number(_object(answer), "control_net_unit_count"))


def parse_adetailer_models(answer: Any) -> tuple[str, ...]:
    return _texts(_object(answer), "ad_model")


def parse_options(answer: Any) -> WebUIOptions:
    options = _object(answer)
    return WebUIOptions(
        checkpoint=_text_or_none(options, "sd_model_checkpoint"),
        checkpoint_sha256=_text_or_none(options, "sd_checkpoint_hash"),
        values=options,
    )


def parse_menu(answer: Any) -> Any:
    """One of MENUS as it is, if it has the form that its readers expect."""
    return _entries(answer) if isinstance(answer, list) else _object(answer)


def parse_flags(answer: Any) -> WebUIFlags:
    flags = _object(answer)
    no_hashing = flags.get("no_hashing", False)
    if not isinstance(no_hashing, bool):
        raise UnexpectedForm("no_hashing is neither true nor false")
    names = ("codeformer_models_path", "gfpgan_models_path", "controlnet_annotator_models_path")
    folders = [flags[name] if isinstance(flags.get(name), str) else None for name in names]
    return WebUIFlags(no_hashing, *folders)


def parse_progress(answer: Any) -> WebUIProgress:
    found = _object(answer)
    state = _object(found.get("state"))
    return WebUIProgress(
        progress=_number(found, "progress"),
        eta_seconds=_number(found, "eta_relative"),
        image=int(_number(state, "job_no")) + 1,
        images=int(_number(state, "job_count")),
        step=int(_number(state, "sampling_step")),
        steps=int(_number(state, "sampling_steps")),
        interrupted_job=_text(state, "job_timestamp") if state.get("interrupted") is True else None,
        preview=_text(found, "current_image") if found.get("current_image") else None,
    )


def _object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UnexpectedForm("an object is missing")
    return value


def _entries(answer: Any) -> list[Mapping[str, Any]]:
    if not isinstance(answer, list):
        raise UnexpectedForm("it is no list")
    return [_object(entry) for entry in answer]


def _text(entry: Mapping[str, Any], key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str):
        raise UnexpectedForm(f"{key} is no text")
    return value


def _text_or_none(entry: Mapping[str, Any], key: str) -> str | None:
    if key not in entry:
        raise UnexpectedForm(f"{key} is missing")
    return None if entry[key] is None else _text(entry, key)


def _texts(entry: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = entry.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UnexpectedForm(f"{key} is no list of texts")
    return tuple(values)


def _aliases(entry: Mapping[str, Any]) -> tuple[str, ...]:
    return () if entry.get("aliases") is None else _texts(entry, "aliases")


def _number(entry: Mapping[str, Any], key: str) -> float:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UnexpectedForm(f"{key} is no number")
    try:
        number = float(value)
    except OverflowError as error:
        raise UnexpectedForm(f"{key} is too large") from error
    if not math.isfinite(number):
        raise UnexpectedForm(f"{key} is no finite number")
    return number

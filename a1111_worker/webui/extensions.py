"""What ControlNet and ADetailer have in this WebUI, and whether a job's units can be used there.

Both answer 200 with all keys of a unit that did nothing (ControlNet 1.1.455, ADetailer 25.3.0, measured). So everything
that a unit names is looked up before A1111 sees it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from a1111_worker.domain import Model, ModelRef
from a1111_worker.errors import Complaint, GenerationFailed, InvalidRequest, RouteMissing
from a1111_worker.request.extensions import ADETAILER, CONTROLNET, DISABLED, NONE, unit_path
from a1111_worker.request.values import shown
from a1111_worker.text import quoted, quoted_list
from a1111_worker.webui.client import WebUI
from a1111_worker.webui.responses import WebUIFlags
from a1111_worker.webui.samplers import resolve_name

NEEDS_NO_FILE = (
    *("none", "canny", "invert", "threshold", "blur_gaussian", "scribble_xdog", "color", "shuffle", "lineart_standard"),
    *("tile_resample", "tile_colorfix", "tile_colorfix+sharp", "inpaint", "inpaint_only"),
    *("recolor_luminance", "recolor_intensity", "reference_only", "reference_adain", "reference_adain+attn"),
)
"""Modules of ControlNet that compute what they need (1.1.455, scripts/preprocessor and annotator). Any other one would
download files when it is used first."""

_OPENPOSE = ("openpose/body_pose_model.pth", "openpose/hand_pose_model.pth", "openpose/facenet.pth")
_MIDAS = ("midas/dpt_hybrid-midas-501f0c75.pt",)
_HED = ("hed/ControlNetHED.pth",)
ANNOTATOR_FILES: Mapping[str, Sequence[str]] = {
    "hed": _HED,
    "hed_safe": _HED,
    "scribble_hed": _HED,
    "lineart": ("lineart/sk_model.pth",),
    "lineart_coarse": ("lineart/sk_model2.pth",),
    "depth": _MIDAS,
    "normal_map": _MIDAS,
    **dict.fromkeys(("openpose", "openpose_face", "openpose_faceonly", "openpose_hand", "openpose_full"), _OPENPOSE),
}
"""The files of other modules, below ControlNet's folder of annotators. image/pins.toml brings them."""

_LABELS = {  # what A1111's page calls a module; ControlNet takes both
    "depth_midas": "depth",
    "normal_midas": "normal_map",
    "lineart_realistic": "lineart",
    "softedge_hed": "hed",
    "softedge_hedsafe": "hed_safe",
    "inpaint_global_harmonious": "inpaint",
    "invert (from white bg & black line)": "invert",
    "lineart_standard (from white bg & black line)": "lineart_standard",
}


@dataclass(frozen=True)
class ControlNetLists:
    """`models` as ControlNet lists them, `STEM [hash]`. `modules`: whether each works without a model.

    `annotators` are the modules that can be used: they need no file, or their files are there. `units` is how many
    ControlNet runs.
    """

    models: Sequence[str]
    modules: Mapping[str, bool]
    units: int
    annotators: Sequence[str]


@dataclass(frozen=True)
class ADetailerLists:
    """`detectors` are the models for `ad_model`. `arguments`: how many its script takes."""

    detectors: Sequence[str]
    arguments: int


@dataclass(frozen=True)
class ExtensionLists:
    """None: the extension is not in this WebUI."""

    controlnet: ControlNetLists | None = None
    adetailer: ADetailerLists | None = None


NO_EXTENSIONS = ExtensionLists()


@dataclass
class _Complaints:
    """Everything that is wrong with the units of a job."""

    found: list[Complaint] = field(default_factory=list)

    def resolve(self, name: str, known: Sequence[str], what: str, path: str) -> str | None:
        try:
            return resolve_name(name, known, what, path=path)
        except InvalidRequest as error:
            self.found += error.complaints
            return None

    def add(self, path: str, message: str) -> None:
        self.found.append(Complaint(path, message))


def read_lists(webui: WebUI, scripts: Sequence[str], flags: WebUIFlags) -> ExtensionLists:
    """What the extensions have, if the WebUI lists their scripts."""
    return ExtensionLists(
        _read_controlnet(webui, flags) if CONTROLNET in scripts else None,
        _read_adetailer(webui) if ADETAILER in scripts else None,
    )


def resolve_units(
    script: str, arguments: Mapping[str, Any], lists: ExtensionLists, *, given: str, has_init_image: bool
) -> Mapping[str, Any]:
    """The arguments of a script under the extensions' own names, as many as it takes; others as they are.

    `given` is the script's name as the job has it. `has_init_image`: a unit of ControlNet may do without a picture.
    Raises InvalidRequest with all complaints.
    """
    complaints = _Complaints()
    args = list(arguments.get("args", ()))
    if script == CONTROLNET and lists.controlnet:
        for index, unit in enumerate(args):
            if unit.get("enabled") and "image" not in unit and not has_init_image:
                reason = "is required: without it ControlNet does nothing"
                complaints.add(f"{unit_path(given, index)}.image", reason)
        args = _resolve_controlnet(args, lists.controlnet, given, complaints)
    elif script == ADETAILER and lists.adetailer:
        args = _resolve_adetailer(args, lists.adetailer, given, complaints)
    elif script in (CONTROLNET, ADETAILER):
        reason = "this WebUI does not list what the extension has, so nothing could be checked"
        complaints.add(f"alwayson_scripts.{shown(given)}", f"is refused: {reason}")
    else:
        return arguments
    if complaints.found:
        raise InvalidRequest(complaints.found)
    return {"args": args}


def _read_controlnet(webui: WebUI, flags: WebUIFlags) -> ControlNetLists | None:
    """None for a WebUI of somebody else with another extension of that name."""
    with contextlib.suppress(RouteMissing):
        modules, folder = webui.controlnet_modules(), flags.annotators_folder
        usable = [name for name in modules if name in NEEDS_NO_FILE or (folder and _has_files(name, Path(folder)))]
        return ControlNetLists(webui.controlnet_models(), modules, webui.controlnet_units(), usable)
    return None


def _read_adetailer(webui: WebUI) -> ADetailerLists | None:
    with contextlib.suppress(RouteMissing):
        return ADetailerLists(webui.adetailer_models(), webui.script_argument_count(ADETAILER))
    return None


def _has_files(module: str, folder: Path) -> bool:
    files = ANNOTATOR_FILES.get(module, ())
    return bool(files) and all((folder / file).is_file() for file in files)


def _resolve_controlnet(
    args: Sequence[dict[str, Any]], lists: ControlNetLists, given: str, complaints: _Complaints
) -> list[Any]:
    resolved = []
    for index, unit in enumerate(args):
        path = unit_path(given, index)
        if not unit.get("enabled"):
            resolved.append(unit)
            continue
        if index >= lists.units:
            complaints.add(path, f"is one unit too many: this WebUI runs {lists.units}")
            continue
        module = _resolve_module(unit["module"], lists, f"{path}.module", complaints)
        needs_model = module is not None and not lists.modules[module]
        model = _resolve_model(unit["model"], lists, f"{path}.model", complaints) if needs_model else NONE
        resolved.append({**unit, "module": module, "model": model})
    return [*resolved, *(dict(DISABLED) for _ in range(lists.units - len(resolved)))]


def _resolve_module(name: str, lists: ControlNetLists, path: str, complaints: _Complaints) -> str | None:
    module = complaints.resolve(_LABELS.get(name.strip().casefold(), name), tuple(lists.modules), "module", path)
    if module is not None and module not in lists.annotators:
        reason = "needs files that are not in this image, and ControlNet would silently do nothing"
        complaints.add(path, f"{quoted(module)} {reason}; these can be used: {quoted_list(lists.annotators, most=40)}")
        return None
    return module


def _resolve_model(name: str, lists: ControlNetLists, path: str, complaints: _Complaints) -> str:
    """A model as ControlNet lists it; "" for one that is yet to be held."""
    if name.strip().casefold() == NONE.casefold():
        there = f"these are there: {quoted_list(lists.models)}" if lists.models else "none is there"
        complaints.add(path, f"is required; {there}")
    return find_model(name, lists.models) or ""


def find_model(stem: str, models: Sequence[str]) -> str | None:
    """The entry of ControlNet's list for a model: its stem with a hash."""
    return next((model for model in models if stem_of_model(model).casefold() == stem.strip().casefold()), None)


def models_to_hold(body: Mapping[str, Any], refs: Mapping[int, ModelRef]) -> dict[int, ModelRef]:
    """Those models of ControlNet's units that the WebUI does not list yet, of a body whose units are resolved."""
    args = (body.get("alwayson_scripts") or {}).get(CONTROLNET, {}).get("args", ())
    return {index: ref for index, ref in refs.items() if index < len(args) and args[index].get("model") == ""}


def with_models(body: Mapping[str, Any], models: Mapping[int, Model]) -> dict[str, Any]:
    """The body with the names under which held models are shown in the units that want them."""
    if not models:
        return dict(body)
    scripts = body["alwayson_scripts"]
    args = [
        {**unit, "model": models[index].shown} if index in models else unit
        for index, unit in enumerate(scripts[CONTROLNET]["args"])
    ]
    return {**body, "alwayson_scripts": {**scripts, CONTROLNET: {"args": args}}}


def listed_models(body: Mapping[str, Any], stems: Collection[str], webui: WebUI) -> dict[str, Any]:
    """The body with ControlNet's own names for models that have just been shown, by their stems.

    Raises GenerationFailed if it does not list one.
    """
    models = webui.controlnet_models()
    args = []
    for unit in body["alwayson_scripts"][CONTROLNET]["args"]:
        if unit.get("model") in stems:
            listed = find_model(unit["model"], models)
            if listed is None:
                raise GenerationFailed(f"ControlNet does not list the model {quoted(unit['model'])}")
            unit = {**unit, "model": listed}
        args.append(unit)
    return {**body, "alwayson_scripts": {**body["alwayson_scripts"], CONTROLNET: {"args": args}}}


def stem_of_model(model: str) -> str:
    """`STEM [hash]` without its hash."""
    return model.rpartition(" [")[0] or model


def _resolve_adetailer(args: Sequence[Any], lists: ADetailerLists, given: str, complaints: _Complaints) -> list[Any]:
    path = f"alwayson_scripts.{shown(given)}.args"  # of all: the job may have left out the first two arguments
    resolved: list[Any] = list(args[:2])
    for unit in args[2:]:
        detector = complaints.resolve(unit["ad_model"], lists.detectors, "detector", path)
        resolved.append({**unit, "ad_model": detector})
    if len(resolved) <= 2:
        complaints.add(path, f"must have a unit with ad_model; there are {quoted_list(lists.detectors)}")
    if len(resolved) > lists.arguments:
        complaints.add(path, f"has {len(resolved) - 2} units, and this WebUI runs {lists.arguments - 2}")
    return [*resolved, *({"ad_model": NONE} for _ in range(lists.arguments - len(resolved)))]

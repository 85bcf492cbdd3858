"""The extensions ControlNet (1.1.455) and ADetailer (25.3.0), as far as callers of the API see them.

Both print their keys into `info` before they do anything, and answer 200 if they do nothing: with a model that is not
there, without a picture, with an annotator whose file would have to be downloaded. Their answers are compared with
recorded ones (tests/sandbox/test_webui_extensions.py).
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from sandbox.webui_errors import WebUIError

SCRIPTS: Mapping[str, tuple[str, ...]] = {"adetailer": ("adetailer",), "controlnet": ("controlnet", "controlnet m2m")}
"""The scripts of each extension, in A1111's order: that of the extensions' folders."""

UNIT_COUNT = 3  # of ControlNet: a fourth one is dropped
MEDIAPIPE = ("mediapipe_face_full", "mediapipe_face_short", "mediapipe_face_mesh", "mediapipe_face_mesh_eyes_only")
ORDINALS = ("", " 2nd", " 3rd", " 4th")

_NEEDS_NO_FILE = (
    *("none", "canny", "invert", "threshold", "blur_gaussian", "scribble_xdog", "color", "shuffle", "lineart_standard"),
    *("tile_resample", "tile_colorfix", "tile_colorfix+sharp", "inpaint", "inpaint_only"),
    *("recolor_luminance", "recolor_intensity", "reference_only", "reference_adain", "reference_adain+attn"),
)
_NEEDS_FILE = {
    "hed": ("hed/ControlNetHED.pth",),
    "depth": ("midas/dpt_hybrid-midas-501f0c75.pt",),
    "lineart": ("lineart/sk_model.pth",),
    "openpose": ("openpose/body_pose_model.pth", "openpose/hand_pose_model.pth", "openpose/facenet.pth"),
}


def add_to_tables(tables: Mapping[str, Any], extensions: Collection[str]) -> Mapping[str, Any]:
    """The tables of a version, with what the extensions add."""
    if not extensions:
        return tables
    info = [entry for entry in _data("script-info") if entry["name"] in extensions]
    return {
        **tables,
        "scripts": _add_scripts(tables["scripts"], extensions),
        "script-info": [*tables["script-info"], *info],
    }


def _add_scripts(scripts: Mapping[str, list[str]], extensions: Collection[str]) -> dict[str, list[str]]:
    """The answer of /scripts with those of the extensions, which stand before A1111's own `refiner`."""
    added = [title for name, titles in SCRIPTS.items() if name in extensions for title in titles]
    return {tab: [*names[:-3], *added, *names[-3:]] for tab, names in scripts.items()}


@functools.cache
def _data(name: str) -> Any:
    return json.loads((Path(__file__).parent / "data" / "extensions" / f"{name}.json").read_bytes())


@dataclass(frozen=True)
class ExtensionFiles:
    """Where the extensions look: ControlNet's models in `models_dir` too, all else in A1111's own folder `models`."""

    models_dir: Path
    own_models_dir: Path

    @property
    def annotators(self) -> Path:
        return self.own_models_dir / "ControlNetAnnotators"

    def flags(self, extensions: Collection[str]) -> dict[str, Any]:
        """What the extensions add to /cmd-flags."""
        flags: dict[str, Any] = {}
        if "controlnet" in extensions:
            flags |= {"controlnet_dir": str(self.models_dir / "ControlNet")}
            flags |= {"controlnet_annotator_models_path": str(self.annotators)}
        if "adetailer" in extensions:
            flags["ad_no_huggingface"] = True
        return flags

    def controlnet_models(self) -> list[str]:
        """`STEM [hash]` of each file; the hash is A1111's old one, of 64 KiB in the middle."""
        names = []
        for folder in dict.fromkeys((self.own_models_dir / "ControlNet", self.models_dir / "ControlNet")):
            for path in sorted(folder.rglob("*")):
                if path.suffix in (".pt", ".pth", ".ckpt", ".safetensors", ".bin") and path.exists():
                    with path.open("rb") as file:
                        file.seek(0x100000)
                        names.append(f"{path.stem} [{hashlib.sha256(file.read(0x10000)).hexdigest()[:8]}]")
        return names

    def detectors(self) -> list[str]:
        own = sorted(path.name for path in (self.own_models_dir / "adetailer").glob("*.pt"))
        return [*own, *MEDIAPIPE]


@dataclass
class Effects:
    """What the units of a job do: keys in `info`, what changes the picture, pictures that are added to the answer."""

    params: dict[str, Any] = field(default_factory=dict)
    conditions: list[str] = field(default_factory=list)
    pictures: list[Image.Image] = field(default_factory=list)


def controlnet_modules() -> dict[str, Any]:
    """The answer of /controlnet/module_list."""
    details = _data("controlnet-modules")
    return {"module_list": list(details), "module_detail": details}


def adetailer_schema() -> Any:
    return _data("adetailer-schema")


def run_units(scripts: Mapping[str, Any], files: ExtensionFiles, extensions: Collection[str], init: Any) -> Effects:
    """Run the units of a request. `init` is the first init picture of img2img: ControlNet's, if a unit has none."""
    effects = Effects()
    given = {name.lower(): (script or {}).get("args") or [] for name, script in scripts.items()}
    if "controlnet" in given and "controlnet" in extensions:
        _run_controlnet(given["controlnet"], files, init, effects)
    if given.get("adetailer") and "adetailer" in extensions:
        _run_adetailer(given["adetailer"], files, effects)
    return effects


# -- ControlNet


def _run_controlnet(args: Sequence[Any], files: ExtensionFiles, init: Any, effects: Effects) -> None:
    units = [unit for unit in args[:UNIT_COUNT] if isinstance(unit, dict)]
    for number, given in enumerate(unit for unit in units if unit.get("enabled")):
        unit = {"module": "none", "model": "None", "weight": 1.0, "image": None, "save_detected_map": True, **given}
        unit["image"] = given.get("input_image", unit["image"])
        details = _data("controlnet-modules").get(unit["module"])
        if details is None:
            reason = f"module({unit['module']}) not found in supported modules. (type=value_error)"
            raise WebUIError("ValidationError", f"1 validation error for ControlNetUnit\nmodule\n  {reason}")
        effects.params[f"ControlNet {number}"] = _controlnet_infotext(unit, details)
        image = _unit_image(unit["image"], init)
        if image is not None and _works(unit, details, files):
            effects.conditions.append(repr((unit["module"], unit["model"], unit["weight"], image.tobytes()[:64])))
            if unit["save_detected_map"]:
                effects.pictures.append(image)


def _works(unit: Mapping[str, Any], details: Mapping[str, Any], files: ExtensionFiles) -> bool:
    """Whether its model and its annotator are there. Else the log has a traceback, and the picture is a plain one."""
    needed = _NEEDS_FILE.get(unit["module"])
    has_annotator = unit["module"] in _NEEDS_NO_FILE or (
        needed is not None and all((files.annotators / path).exists() for path in needed)
    )
    return has_annotator and (details["model_free"] or unit["model"] in files.controlnet_models())


def _unit_image(given: Any, init: Any) -> Image.Image | None:
    """The picture of a unit. A string that is a path is opened: anybody's file comes back in the answer."""
    if isinstance(given, dict):
        given = given.get("image")
    if given is None:
        return init if isinstance(init, Image.Image) else None
    try:
        if len(str(given)) < 4096 and Path(str(given)).exists():
            return Image.open(str(given)).convert("RGB")
        return Image.open(io.BytesIO(base64.b64decode(str(given)))).convert("RGB")
    except (OSError, ValueError):
        return None


def _controlnet_infotext(unit: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    sliders = [slider["value"] for slider in details["sliders"] if slider]
    defaults = [*sliders, *(512, 0.5, 0.5)[len(sliders) :]]
    values = [
        unit[name] if unit.get(name, -1) != -1 else default
        for name, default in zip(("processor_res", "threshold_a", "threshold_b"), defaults, strict=False)
    ]
    parts = {
        "Module": unit["module"],
        "Model": unit["model"],
        "Weight": float(unit["weight"]),
        "Resize Mode": unit.get("resize_mode", "Crop and Resize"),
        "Processor Res": values[0],
        "Threshold A": values[1],
        "Threshold B": values[2],
        "Guidance Start": unit.get("guidance_start", 0.0),
        "Guidance End": unit.get("guidance_end", 1.0),
        "Pixel Perfect": unit.get("pixel_perfect", False),
        "Control Mode": unit.get("control_mode", "Balanced"),
    }
    return ", ".join(f"{key}: {value}" for key, value in parts.items())


# -- ADetailer


def _run_adetailer(args: Sequence[Any], files: ExtensionFiles, effects: Effects) -> None:
    """A short list is filled with the page's own values: its first unit is not an idle one."""
    (entry, *_) = (entry for entry in _data("script-info") if entry["name"] == "adetailer")
    filled = [*args, *(argument["value"] for argument in entry["args"][len(args) :])]
    if filled[0] is False:
        return
    units = [unit for unit in filled if isinstance(unit, dict)]
    if isinstance(args[0], dict):  # then the filled list is as long as before, and begins with the page's own unit
        units = [*(unit for unit in args if isinstance(unit, dict)), *_page_units(entry)]
    elif len(args) > 1 and isinstance(args[1], dict):
        units = [args[1], *_page_units(entry)]
    shown = list(_usable(units))
    for ordinal, unit in zip(ORDINALS, shown, strict=False):
        if unit is None:
            continue
        effects.params |= {f"{key}{ordinal}": value for key, value in _adetailer_infotext(unit).items()}
        if unit["ad_model"] in files.detectors():
            effects.conditions.append(repr(sorted(unit.items(), key=repr)))
    if any(shown):
        effects.params["ADetailer version"] = "25.3.0"


def _page_units(entry: Mapping[str, Any]) -> list[Any]:
    return [argument["value"] for argument in entry["args"] if isinstance(argument["value"], dict)]


def _usable(units: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any] | None]:
    """Each unit with its defaults; None keeps the place of an idle one. One with an unknown key is dropped."""
    properties = adetailer_schema()["properties"]
    for unit in units:
        if set(unit) <= set(properties):
            filled = {**{key: about.get("default") for key, about in properties.items()}, **unit}
            yield None if filled["ad_model"] == "None" or not filled["ad_tab_enable"] else filled


def _adetailer_infotext(unit: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "ADetailer model": str(unit["ad_model"]),
        "ADetailer confidence": unit["ad_confidence"],
        "ADetailer dilate erode": unit["ad_dilate_erode"],
        "ADetailer mask blur": unit["ad_mask_blur"],
        "ADetailer denoising strength": unit["ad_denoising_strength"],
        "ADetailer inpaint only masked": unit["ad_inpaint_only_masked"],
        "ADetailer inpaint padding": unit["ad_inpaint_only_masked_padding"],
    }

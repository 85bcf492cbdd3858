"""The Extras tab by API: /extra-single-image and /extra-batch-images (modules/postprocessing.py, upscaler.py).

Whatever goes wrong with an upscaler's model, the answer is a 200 with the Lanczos picture under the model's name. What
comes out, also of an interrupted run, is kept in memory and answered again.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, PngImagePlugin

from sandbox import draw
from sandbox.webui_errors import InvalidFields, WebUIError
from sandbox.webui_fields import read_fields
from sandbox.webui_img2img import decode, digest
from sandbox.webui_process import Process

_TABLE: Mapping[str, Mapping[str, Any]] = {
    "resize_mode": {"type": "int", "default": 0, "enum": [0, 1]},
    "show_extras_results": {"type": "bool", "default": True},
    "gfpgan_visibility": {"type": "float", "default": 0, "ge": 0.0, "le": 1.0},
    "codeformer_visibility": {"type": "float", "default": 0, "ge": 0.0, "le": 1.0},
    "codeformer_weight": {"type": "float", "default": 0, "ge": 0.0, "le": 1.0},
    "upscaling_resize": {"type": "float", "default": 2, "gt": 0.0},
    "upscaling_resize_w": {"type": "int", "default": 512, "ge": 1.0},
    "upscaling_resize_h": {"type": "int", "default": 512, "ge": 1.0},
    "upscaling_crop": {"type": "bool", "default": True},
    "upscaler_1": {"type": "str", "default": "None"},
    "upscaler_2": {"type": "str", "default": "None"},
    "extras_upscaler_2_visibility": {"type": "float", "default": 0, "ge": 0.0, "le": 1.0},
    "upscale_first": {"type": "bool", "default": False},
}
_SINGLE = {**_TABLE, "image": {"type": "str", "default": ""}}
_BATCH = {**_TABLE, "imageList": {"type": "list", "default": None}}


def read_single(given: Mapping[str, Any]) -> dict[str, Any]:
    return _checked(read_fields({k: _no_null(k, v) for k, v in given.items()}, _SINGLE))


def read_batch(given: Mapping[str, Any]) -> dict[str, Any]:
    if "imageList" not in given:
        raise InvalidFields([{"loc": ["body", "imageList"], "msg": "field required", "type": "value_error.missing"}])
    fields = _checked(read_fields({k: _no_null(k, v) for k, v in given.items()}, _BATCH))
    problems = []
    for index, entry in enumerate(fields["imageList"]):
        if not isinstance(entry, dict):
            message = {"msg": "value is not a valid dict", "type": "type_error.dict"}
            problems.append({"loc": ["body", "imageList", index], **message})
            continue
        problems += [
            {"loc": ["body", "imageList", index, key], "msg": "field required", "type": "value_error.missing"}
            for key in ("data", "name")
            if key not in entry
        ]
    if problems:
        raise InvalidFields(problems)
    return fields


def run_single(process: Process, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of one picture. The caller holds the queue lock."""
    original = decode(fields["image"])
    picture, info = _process(process, original, fields)
    texts = {str(key): value for key, value in original.info.items() if isinstance(value, str)}
    return {"html_info": f"<p>{info}</p>", "image": _encoded(picture, info, texts)}


def run_batch(process: Process, fields: Mapping[str, Any]) -> dict[str, Any]:
    originals = [decode(entry["data"]) for entry in fields["imageList"]]
    made = [_process(process, original, fields) for original in originals]
    info = made[-1][1] if made else ""
    return {"html_info": f"<p>{info}</p>", "images": [_encoded(picture, about, {}) for picture, about in made]}


def _process(process: Process, image: Image.Image, fields: Mapping[str, Any]) -> tuple[Image.Image, str]:
    image.load()
    image = image if image.mode in ("RGB", "RGBA") else image.convert("RGB")
    about: dict[str, Any] = {}
    with process.job("Upscale"):
        process.state.job_count = 1
        for step in (_upscale, _restore_faces) if fields["upscale_first"] else (_restore_faces, _upscale):
            image = step(process, image, fields, about)
    return image, ", ".join(f"{key}: {value}" for key, value in about.items())


def _restore_faces(
    process: Process, image: Image.Image, fields: Mapping[str, Any], about: dict[str, Any]
) -> Image.Image:
    """The faces of our pictures stay as they are: A1111 leaves them so too, without the files."""
    if fields["gfpgan_visibility"]:
        about["GFPGAN visibility"] = round(fields["gfpgan_visibility"], 3)
    if fields["codeformer_visibility"]:
        about["CodeFormer visibility"] = round(fields["codeformer_visibility"], 3)
        about["CodeFormer weight"] = round(fields["codeformer_weight"], 3)
    return image


def _upscale(process: Process, image: Image.Image, fields: Mapping[str, Any], about: dict[str, Any]) -> Image.Image:
    first, second = fields["upscaler_1"], fields["upscaler_2"]
    names = {upscaler["name"] for upscaler in process.files.upscalers}
    if first == "None":
        return image
    for name in (first, second):
        if name not in names:
            raise WebUIError("AssertionError", f"could not find upscaler named {name}")
    width, height = fields["upscaling_resize_w"], fields["upscaling_resize_h"]
    if fields["resize_mode"] == 1:
        factor = max(width / image.width, height / image.height)
        about["Postprocess upscale to"] = f"{width}x{height}"
        if fields["upscaling_crop"]:
            about["Postprocess crop to"] = f"{width}x{height}"
    else:
        factor = fields["upscaling_resize"]
        about["Postprocess upscale by"] = factor
    about["Postprocess upscaler"] = first
    picture = _upscaled(process, image, first, factor)
    if second != "None" and fields["extras_upscaler_2_visibility"] > 0:
        about["Postprocess upscaler 2"] = second
        other = _upscaled(process, image, second, factor)
        picture = Image.blend(picture, other.convert(picture.mode), fields["extras_upscaler_2_visibility"])
    if fields["resize_mode"] == 1 and fields["upscaling_crop"]:
        cropped = Image.new("RGB", (width, height))
        cropped.paste(picture, (width // 2 - picture.width // 2, height // 2 - picture.height // 2))
        return cropped
    return picture


def _upscaled(process: Process, image: Image.Image, name: str, factor: float) -> Image.Image:
    size = int(image.width * factor // 8 * 8), int(image.height * factor // 8 * 8)
    if min(size) <= 0:
        raise WebUIError("ValueError", "height and width must be > 0")
    key = digest(image), name, size
    if (made := process.extras_cache.get(key)) is not None:
        return made
    used = process.files.effective_upscaler(name)
    if name.startswith("R-ESRGAN") and process.files.is_refused(name):  # its class does not hide it
        raise WebUIError("RuntimeError", "PytorchStreamReader failed reading zip archive: not a ZIP archive")
    how = Image.Resampling.NEAREST if used == "Nearest" else Image.Resampling.LANCZOS
    picture = image.resize(size, how)
    if used not in ("Lanczos", "Nearest"):  # a model: what it draws is not the picture that Lanczos makes
        process.sample(process.knobs.upscale_steps)
        scene = draw.picture(f"{name} {key}", *size).convert(picture.mode)
        picture = draw.signed(Image.blend(picture, scene, 0.2))
        if process.state.interrupted:
            picture.paste(image.resize(size, how).crop((0, 0, size[0], size[1] // 2)), (0, 0))
    process.extras_cache.keep(key, picture, process.option("upscaling_max_images_in_cache"))
    return picture


def _encoded(image: Image.Image, info: str, texts: Mapping[str, str]) -> str:
    about = PngImagePlugin.PngInfo()
    for key, text in {**texts, "postprocessing": info}.items():
        about.add_text(key, text)
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=about)
    return base64.b64encode(file.getvalue()).decode()


def _no_null(name: str, value: Any) -> Any:
    if value is None:
        problem = {"msg": "none is not an allowed value", "type": "type_error.none.not_allowed"}
        raise InvalidFields([{"loc": ["body", name], **problem}])
    return value


def _checked(fields: dict[str, Any]) -> dict[str, Any]:
    """Pydantic's ranges."""
    problems: list[dict[str, Any]] = []
    for name, about in _TABLE.items():
        value = fields[name]
        problems += [
            {
                "loc": ["body", name],
                "msg": f"ensure this value is {words} {_plain(about[bound])}",
                "type": f"value_error.number.{kind}",
                "ctx": {"limit_value": _plain(about[bound])},
            }
            for bound, kind, words in _BOUNDS
            if bound in about and _breaks(bound, value, about[bound])
        ]
        if "enum" in about and value not in about["enum"]:
            permitted: Sequence[int] = about["enum"]
            message = f"unexpected value; permitted: {', '.join(map(str, permitted))}"
            context = {"given": value, "permitted": permitted}
            problems.append({"loc": ["body", name], "msg": message, "type": "value_error.const", "ctx": context})
    if problems:
        raise InvalidFields(problems)
    return fields


_BOUNDS = (
    ("gt", "not_gt", "greater than"),
    ("ge", "not_ge", "greater than or equal to"),
    ("le", "not_le", "less than or equal to"),
)


def _breaks(bound: str, value: float, limit: float) -> bool:
    return {"gt": value <= limit, "ge": value < limit, "le": value > limit}[bound]


def _plain(limit: float) -> float:
    return int(limit) if limit == int(limit) else limit

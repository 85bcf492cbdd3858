"""A request to txt2img or img2img: what is refused at once, its script, its answer (modules/api/api.py)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sandbox.webui_errors import HTTPException, WebUIError
from sandbox.webui_extensions import run_units
from sandbox.webui_img2img import decode_fields
from sandbox.webui_img2img_scripts import IMG2IMG_SCRIPTS
from sandbox.webui_process import Process
from sandbox.webui_processing import Picture, PictureSettings, Processed, Txt2ImgJob, encode, process_images
from sandbox.webui_samplers import resolve
from sandbox.webui_scripts import SCRIPTS


@dataclass
class GenerationAnswer:
    """The answer: pictures in base64, the fields as received, and `info` before it becomes a string."""

    images: list[str]
    parameters: Mapping[str, Any]
    info: dict[str, Any]

    def body(self) -> bytes:
        """As JSON. The pictures are inserted unchanged: base64 needs no escaping."""
        images = ",".join(f'"{image}"' for image in self.images)
        parameters, info = _plain_json(self.parameters), _plain_json(json.dumps(self.info))
        return f'{{"images":[{images}],"parameters":{parameters},"info":{info}}}'.encode("utf-8", "surrogatepass")


def check_fields(process: Process, fields: Mapping[str, Any]) -> tuple[str, str | None]:
    """The refusals that come before the job waits for the queue lock. Returns the sampler and scheduler."""
    is_img2img = "init_images" in fields
    scripts = [name.lower() for name in process.tables["scripts"]["img2img" if is_img2img else "txt2img"]]
    selectable = [*SCRIPTS, *IMG2IMG_SCRIPTS] if is_img2img else [*SCRIPTS]
    if is_img2img and fields["init_images"] is None:
        raise HTTPException(404, "Init image not found")
    if fields["script_name"]:
        _script(fields["script_name"], [name for name in scripts if name in selectable])
    sampler = fields["sampler_name"] or fields["sampler_index"]
    resolved = resolve(
        process.version, sampler, fields["scheduler"], process.tables["samplers"], process.tables["schedulers"]
    )
    for name in fields["alwayson_scripts"]:
        if _script(name, scripts) in selectable:
            raise HTTPException(422, "Cannot have a selectable script in the always on scripts params")
    return resolved


def run(
    process: Process, fields: Mapping[str, Any], sampler: tuple[str, str | None], settings: PictureSettings
) -> Processed:
    """Generate. `sampler` comes from `check_fields`. The caller holds the queue lock and has begun the job."""
    overrides = dict(fields["override_settings"] or {})
    if "init_images" in fields:
        fields = decode_fields(fields)
    job = Txt2ImgJob(process, fields, *sampler, settings, overrides=overrides)
    init = (fields.get("init_images") or [None])[0]
    units = run_units(fields["alwayson_scripts"], process.extension_files, process.knobs.extensions, init)
    job.extra_params |= units.params
    job.conditions = tuple(units.conditions)
    processed = _run_script(job)
    processed.pictures += [Picture(picture) for picture in units.pictures]
    return processed


def _run_script(job: Txt2ImgJob) -> Processed:
    fields = job.fields
    if not fields["script_name"]:
        return process_images(job)
    script = {**SCRIPTS, **IMG2IMG_SCRIPTS}[fields["script_name"].lower()]
    _missing_arguments(script.arguments, fields["script_args"])
    return script.run(job, *fields["script_args"][: len(script.arguments)])


def answer(
    process: Process, fields: Mapping[str, Any], processed: Processed, settings: PictureSettings
) -> GenerationAnswer:
    """The pictures are encoded when the job is over, and the next one may run: with the options as they are then."""
    images = [encode(process, settings, picture) for picture in processed.pictures] if fields["send_images"] else []
    if "init_images" in fields and not fields["include_init_images"]:
        fields = {**fields, "init_images": None, "mask": None}
    return GenerationAnswer(images, fields, processed.info)


def _script(name: str, known: Sequence[str]) -> str:
    if name.lower() not in known:
        raise HTTPException(422, f"Script '{name}' not found")
    return name.lower()


def _missing_arguments(names: Sequence[str], arguments: Sequence[Any]) -> None:
    if not arguments and names[0] == "loops":  # Loopback takes what its page shows, which is text
        raise WebUIError("TypeError", "'str' object cannot be interpreted as an integer")
    missing = [f"'{name}'" for name in names[len(arguments) :]]
    if missing:
        listed = ", ".join(missing[:-1]) + (", and " if len(missing) > 2 else " and " if len(missing) == 2 else "")
        plural = "s" if len(missing) > 1 else ""
        message = f"Script.run() missing {len(missing)} required positional argument{plural}: {listed}{missing[-1]}"
        raise WebUIError("TypeError", message)


def _plain_json(value: Any) -> str:
    """As starlette writes JSON. WebUIError `ValueError` if JSON cannot express the value (NaN)."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise WebUIError("ValueError", str(error).split(":")[0]) from None

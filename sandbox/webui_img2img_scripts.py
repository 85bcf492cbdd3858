"""A1111's selectable scripts of img2img alone: Loopback and SD upscale (scripts/*.py of 1.9.3 and 1.10.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from PIL import Image

from sandbox import draw
from sandbox.webui_errors import WebUIError
from sandbox.webui_processing import Picture, Processed, Txt2ImgJob, draw_grid, process_images
from sandbox.webui_scripts import Script, fixed_seed


def _loopback(job: Txt2ImgJob, loops: int, final: float, curve: str, interrogation: str) -> Processed:
    """One picture after the other, each painted over the one before. Only the first one's infotext is kept for all."""
    state, batches, first = job.process.state, job["n_iter"], job["denoising_strength"]
    state.job_count = loops * batches
    params: dict[str, Any] = {"Final denoising strength": final, "Denoising curve": curve}
    start = job.changed({"n_iter": 1, "batch_size": 1, "seed": fixed_seed(job["seed"]), "do_not_save_grid": True})
    step, processed, initial = start, None, None
    history: list[Picture] = []
    for batch in range(batches):
        step = step.changed({name: start[name] for name in ("init_images", "inpainting_fill", "denoising_strength")})
        for loop in range(loops):
            state.job = f"Iteration {loop + 1}/{loops}, batch {batch + 1}/{batches}"
            step = replace(step, extra_params=params)
            processed = process_images(step)
            if state.interrupted:
                break
            initial = initial or processed
            strength = first if loops == 1 else first + (final - first) * _progress((loop + 1) / (loops - 1), curve)
            picture = processed.pictures[0]
            assert isinstance(picture.content, Image.Image)
            following = {"seed": processed.info["seed"] + 1, "denoising_strength": strength, "inpainting_fill": 1}
            step = step.changed({**following, "init_images": [picture.content]})
            if batches == 1 or loop == loops - 1:
                history.append(picture)
        if state.interrupted:
            break
    assert processed is not None
    grids = [Picture(draw_grid(history, job.settings, rows=1))] if len(history) > 1 else []
    pictures = [*grids, *history]
    info = (initial or processed).info
    last = {"denoising_strength": step["denoising_strength"], **_of_first(info, job, len(pictures))}
    return Processed(pictures, {**processed.info, **last})


def _of_first(info: Mapping[str, Any], job: Txt2ImgJob, pictures: int) -> dict[str, Any]:
    """What `Processed` takes from the first run; all else is what the last one has left."""
    texts = info["infotexts"][:1] * (1 if job.process.version == "1.9.3" else pictures)
    return {"seed": info["seed"], "subseed": -1, "infotexts": texts}


def _progress(part: float, curve: str) -> float:
    if curve == "Aggressive":
        return math.sin(part * math.pi * 0.5)
    return 1 - math.cos(part * math.pi * 0.5) if curve == "Lazy" else part


def _sd_upscale(job: Txt2ImgJob, _: Any, overlap: int, upscaler: Any, factor: float) -> Processed:
    """The picture is enlarged and painted over tile by tile. What is put together has no infotext in its file."""
    process, state = job.process, job.process.state
    names = [each["name"] for each in process.files.upscalers]
    if isinstance(upscaler, str):
        if upscaler.lower() not in [name.lower() for name in names]:
            raise WebUIError("ValueError", f"{upscaler.lower()!r} is not in list")
        upscaler = [name.lower() for name in names].index(upscaler.lower())
    params: dict[str, Any] = {"SD upscale overlap": overlap, "SD upscale upscaler": names[upscaler]}
    picture: Image.Image = job["init_images"][0].convert("RGB")
    if names[upscaler] != "None":
        size = tuple(int(side * factor // 8 * 8) for side in picture.size)
        picture = picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    boxes = _tiles(picture.size, (job["width"], job["height"]), overlap)
    batches = math.ceil(len(boxes) / job["batch_size"])
    state.job_count = batches * job["n_iter"]
    seed = fixed_seed(job["seed"])
    combined: list[Picture] = []
    processed, initial = None, None
    for number in range(job["n_iter"]):
        result, next_seed = picture.copy(), seed + number
        for batch in range(batches):
            state.job = f"Batch {batch + 1 + number * batches} out of {state.job_count}"
            part = boxes[batch * job["batch_size"] : (batch + 1) * job["batch_size"]]
            fields = {"init_images": [picture.crop(box) for box in part], "seed": next_seed, "n_iter": 1}
            if not state.interrupted:
                processed = process_images(replace(job.changed(fields), extra_params=params))
                initial = initial or processed
                next_seed = processed.info["seed"] + 1
                for box, tile in zip(part, processed.pictures, strict=False):
                    assert isinstance(tile.content, Image.Image)
                    result.paste(tile.content.resize((box[2] - box[0], box[3] - box[1])), box[:2])
        combined.append(Picture(draw.signed(result)))
    assert processed is not None and initial is not None
    return Processed(combined, {**processed.info, **_of_first(initial.info, job, len(combined))})


def _tiles(size: tuple[int, int], tile: tuple[int, int], overlap: int) -> list[tuple[int, int, int, int]]:
    """`split_grid`: boxes of tiles that overlap, row by row."""
    columns, rows = (
        max(1, math.ceil((whole - overlap) / (part - overlap))) for whole, part in zip(size, tile, strict=True)
    )
    step_x = (size[0] - tile[0]) / (columns - 1) if columns > 1 else 0
    step_y = (size[1] - tile[1]) / (rows - 1) if rows > 1 else 0
    places = [(int(column * step_x), int(row * step_y)) for row in range(rows) for column in range(columns)]
    return [(x, y, x + tile[0], y + tile[1]) for x, y in places]


IMG2IMG_SCRIPTS: Mapping[str, Script] = {
    "loopback": Script(("loops", "final_denoising_strength", "denoising_curve", "append_interrogation"), _loopback),
    "sd upscale": Script(("_", "overlap", "upscaler_index", "scale_factor"), _sd_upscale),
}

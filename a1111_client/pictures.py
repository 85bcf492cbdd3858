"""The pictures of an answer as files, and files as pictures of a job."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from a1111_client.endpoint import Endpoint
from a1111_client.errors import EndpointError
from a1111_client.infotext import NotAPicture, open_picture

_SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
_TILE = 384  # pixels, the longer side of a picture on a contact sheet
_GAP = 8


async def fetch_all(endpoint: Endpoint, answer: Mapping[str, Any]) -> list[bytes]:
    """The bytes of an answer's pictures, those behind links too. Raises EndpointError."""
    inline = answer.get("images")
    if isinstance(inline, list) and inline:
        try:
            return [base64.b64decode(str(text)) for text in inline]
        except binascii.Error:
            raise EndpointError("JOB_LOST", "the answer's pictures are no base64") from None
    return list(await asyncio.gather(*(endpoint.fetch(url) for url in _urls(answer))))


def _urls(answer: Mapping[str, Any]) -> list[str]:
    worker = answer.get("worker")
    delivery = worker.get("delivery") if isinstance(worker, dict) else None
    urls = delivery.get("urls") if isinstance(delivery, dict) else None
    return [str(url) for url in urls] if isinstance(urls, list) else []


def seeds_of(answer: Mapping[str, Any]) -> list[int | None]:
    """The seed of each picture; None for a grid."""
    worker = answer.get("worker")
    seeds = worker.get("seeds") if isinstance(worker, dict) else None
    return [seed if isinstance(seed, int) else None for seed in seeds] if isinstance(seeds, list) else []


def save(folder: Path, pictures: Sequence[bytes], stems: Sequence[str]) -> list[Path]:
    """Write each picture under its stem, and never over another file: `42.png`, `42-2.png`. Raises EndpointError."""
    try:
        return [_write_new(folder, stem, _suffix(data), data) for stem, data in zip(stems, pictures, strict=True)]
    except OSError as error:
        raise EndpointError("NOT_SAVED", f"{folder}: {error.strerror}") from None


def make_folder(folder: Path) -> None:
    """Have a folder for pictures before anything is drawn. Raises EndpointError if none can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise EndpointError("BAD_OPTION", f"--out {folder}: {error.strerror}") from None


def stems(answer: Mapping[str, Any], count: int) -> list[str]:
    """The names of an answer's pictures: their seeds, or `grid`."""
    seeds = seeds_of(answer)
    return [
        str(seeds[number]) if number < len(seeds) and seeds[number] is not None else "grid" for number in range(count)
    ]


def _suffix(data: bytes) -> str:
    try:
        return _SUFFIXES.get(open_picture(data).format or "", ".bin")
    except NotAPicture:
        return ".bin"


def _write_new(folder: Path, stem: str, suffix: str, data: bytes) -> Path:
    number = 1
    while True:
        path = folder / (f"{stem}{suffix}" if number == 1 else f"{stem}-{number}{suffix}")
        try:
            with path.open("xb") as file:
                file.write(data)
        except FileExistsError:
            number += 1
        else:
            return path


def read_base64(path: Path) -> str:
    """A picture's file as a job takes it. Raises EndpointError if it is none."""
    try:
        data = path.read_bytes()
        open_picture(data)
    except OSError as error:
        raise EndpointError("BAD_OPTION", f"{path}: {error.strerror}") from None
    except NotAPicture as error:
        raise EndpointError("BAD_OPTION", f"{path}: {error}") from None
    return base64.b64encode(data).decode()


def contact_sheet(pictures: Sequence[bytes]) -> bytes:
    """All pictures on one, small, as a PNG. At least one is given."""
    images = [open_picture(data).convert("RGB") for data in pictures]
    for image in images:
        image.thumbnail((_TILE, _TILE))
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = max(image.width for image in images), max(image.height for image in images)
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP), "white")
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        sheet.paste(image, (_GAP + column * (width + _GAP), _GAP + row * (height + _GAP)))
    file = io.BytesIO()
    sheet.save(file, "png")
    return file.getvalue()

"""What a picture's file says about how it was made, as A1111's `POST /png-info` answers it. A1111 is not asked.

{"info": "a cat\nNegative prompt: blurry\nSteps: 20, Sampler: Euler, Seed: 5, Size: 512x768",
 "items": {"Software": "…"},
 "parameters": {"Steps": "20", "Sampler": "Euler", "Seed": "5", "Size-1": "512", "Size-2": "768", …}}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from a1111_worker.context import JobContext
from a1111_worker.domain import PngInfoRequest
from a1111_worker.errors import Complaint, InvalidRequest
from a1111_worker.pictures.prepare import PicturePreparer
from a1111_worker.pictures.source import BadPicture
from a1111_worker.pictures.texts import novelai_infotext, read_texts
from a1111_worker.queries.answer import check_size, worker_block
from a1111_worker.queries.models import ModelsQuery
from a1111_worker.webui.responses import Sampler

_SETTING = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_SIZE = re.compile(r"(\d+)x(\d+)")
_EMPHASIS = re.compile(r"(?<!\\)[(\[]")
_MIN_SETTINGS = 3  # with fewer, the last line belongs to the prompt
_NEGATIVE = "Negative prompt:"


class PngInfoQuery:
    """Answers `png_info` jobs."""

    def __init__(self, pictures: PicturePreparer, menus: ModelsQuery) -> None:
        self._pictures = pictures
        self._menus = menus

    def answer(self, request: PngInfoRequest, context: JobContext) -> dict[str, Any]:
        """The texts in the picture of a job. Raises InvalidRequest, DownloadFailed, ResultTooLarge."""
        data = self._pictures.read("image", request.image, context)
        try:
            texts = read_texts(data)
        except BadPicture as error:
            raise InvalidRequest([Complaint("image", str(error))]) from error
        if translated := novelai_infotext(texts, _by_alias(self._menus.samplers)):
            texts = replace(texts, infotext=translated)
        answer = {
            "info": texts.infotext,
            "items": dict(texts.items),
            "parameters": parse_parameters(texts.infotext),
            "worker": self._menus.add_fingerprint(worker_block(self._menus.webui_version, context)),
        }
        check_size(answer, context)
        return answer


def _by_alias(samplers: Iterable[Sampler]) -> dict[str, str]:
    return {alias: sampler.name for sampler in samplers for alias in (sampler.name, *sampler.aliases)}


def parse_parameters(infotext: str) -> dict[str, Any]:
    """An infotext's parts by A1111's names, and what its page would show for the others (1.10.1, infotext_utils.py).

    The last line holds the settings, if there are at least three in it. What the text says is always a string.
    """
    *lines, last = infotext.strip().split("\n")
    settings = _SETTING.findall(last)
    if len(settings) < _MIN_SETTINGS:
        lines, settings = [*lines, last], []
    texts: tuple[list[str], list[str]] = ([], [])
    is_negative = False
    for line in map(str.strip, lines):
        if line.startswith(_NEGATIVE):
            is_negative, line = True, line.removeprefix(_NEGATIVE).strip()
        texts[is_negative].append(line)
    found: dict[str, Any] = {}
    for name, quoted in settings:
        value = _unquoted(quoted)
        size = _SIZE.fullmatch(value)
        found |= {f"{name}-1": size[1], f"{name}-2": size[2]} if size else {name: value}
    found |= {"Prompt": "\n".join(texts[False]), "Negative prompt": "\n".join(texts[True])}
    emphasis = {"Emphasis": "Original"} if _EMPHASIS.search(found["Prompt"] + found["Negative prompt"]) else {}
    return {**_SHOWN_WITHOUT, **emphasis, **found}


def _unquoted(value: str) -> str:
    if not (value.startswith('"') and value.endswith('"')):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value


_SHOWN_WITHOUT: Mapping[str, Any] = {
    "Clip skip": "1",
    "Hires resize-1": 0,
    "Hires resize-2": 0,
    "Hires sampler": "Use same sampler",
    "Hires schedule type": "Use same scheduler",
    "Hires checkpoint": "Use same checkpoint",
    "Hires prompt": "",
    "Hires negative prompt": "",
    "Mask mode": "Inpaint masked",
    "Masked content": "original",
    "Inpaint area": "Whole picture",
    "Masked area padding": 32,
    "RNG": "GPU",
    "Schedule type": "Automatic",
    "Schedule max sigma": 0,
    "Schedule min sigma": 0,
    "Schedule rho": 0,
    "VAE Encoder": "Full",
    "VAE Decoder": "Full",
    "FP8 weight": "Disable",
    "Refiner switch by sampling steps": False,
}

"""The arguments of "Loopback" and of "SD upscale", which img2img alone has.

    loopback     loops, final denoising strength, "Linear", "Aggressive" or "Lazy", "None"
    sd upscale   null, overlap, upscaler, factor

Read as A1111 1.9.3 and 1.10.1 do: scripts/loopback.py and sd_upscale.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from a1111_worker.request.script_plan import ScriptPlan, ScriptRun
from a1111_worker.request.values import InvalidValue, ValueType, integer, number, one_of, text

LOOPBACK = "loopback"
SD_UPSCALE = "sd upscale"

MAX_LOOPS = 1000
MAX_OVERLAP = 256  # pixels: A1111's own slider ends there
MAX_FACTOR = 8
SD_UPSCALER = 2  # the index of the upscaler's name

_LOOPBACK = (integer(1, MAX_LOOPS), number(0, 1), one_of("Linear", "Aggressive", "Lazy"), one_of("None"))


def is_sd_upscale(body: Mapping[str, Any]) -> bool:
    return str(body.get("script_name") or "").strip().lower() == SD_UPSCALE


def read_loopback(args: Sequence[Any], body: Mapping[str, Any]) -> ScriptPlan:
    """Each loop is a generation. (The last argument can add a text made from the picture, but that downloads files.)"""
    _check(args, _LOOPBACK)
    return _plan(args, args[0] * body.get("n_iter", 1))


def read_sd_upscale(args: Sequence[Any], body: Mapping[str, Any]) -> ScriptPlan:
    """One picture for each of `n_iter`, painted tile by tile. The overlap must be smaller than a tile."""
    sides = [body[side] for side in ("width", "height") if side in body]
    overlap = integer(0, min(MAX_OVERLAP, *(side - 8 for side in sides)) if sides else MAX_OVERLAP)
    _check(args, (None, overlap, text(200), number(1, MAX_FACTOR)))
    return _plan(args, body.get("n_iter", 1))


def _plan(args: Sequence[Any], pictures: int) -> ScriptPlan:
    return ScriptPlan((ScriptRun({}, pictures),), (), lambda texts: list(args))


def _check(args: Sequence[Any], types: Sequence[ValueType | None]) -> None:
    problems = []
    for index, value_type in enumerate(types):
        try:
            if value_type is not None:
                value_type.check(args[index])
        except InvalidValue as error:
            problems += [(f"[{index}]", message) for _, message in error.problems]
    if problems:
        raise InvalidValue(*problems)

"""Units of the extensions that everybody has: whether the arguments of their always-on scripts ask for anything.

ControlNet 1.1.455 and ADetailer 25.3.0. A program that can use them sends their units with every job.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTROLNET, ADETAILER = "controlnet", "adetailer"


def is_idle(script: str, args: Sequence[Any]) -> bool:
    """Whether a script with these arguments does nothing. False for a script that is not known here."""
    name = script.strip().casefold()
    if name == CONTROLNET:
        return not any(isinstance(unit, dict) and unit.get("enabled") for unit in args)
    if name == ADETAILER:
        return _is_idle_adetailer(args)
    return False


def _is_idle_adetailer(args: Sequence[Any]) -> bool:
    """`[enable, skip img2img, {unit}, …]`; without any unit A1111 runs its default one, and without arguments none."""
    if not args or args[0] is False:
        return True
    units = [arg for arg in args if isinstance(arg, dict)]
    return bool(units) and all(
        unit.get("ad_model", "None") == "None" or unit.get("ad_tab_enable") is False for unit in units
    )

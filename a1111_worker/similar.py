"""Known names that resemble an unknown name: what a complaint suggests."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names that resemble `name` most, whatever their case, the likeliest first."""
    by_key = {candidate.casefold(): candidate for candidate in known}
    return [by_key[key] for key in difflib.get_close_matches(name[:60].strip().casefold(), by_key, n=count, cutoff=0.6)]

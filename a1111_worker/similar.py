"""Known names that resemble an unknown name: what a complaint suggests."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], count: int = 3, *, cutoff: float = 0.6) -> list[str]:
    """The known names that resemble `name` most, whatever their case, the likeliest first.

    `cutoff` is the least resemblance, as difflib measures it: 0 is none, 1 is the same name.
    """
    by_key = {candidate.casefold(): candidate for candidate in known}
    key = name[:60].strip().casefold()
    return [by_key[near] for near in difflib.get_close_matches(key, by_key, n=count, cutoff=cutoff)]

"""Text that other people wrote, made fit to be shown in a message, an answer or a log line.

Names come from callers, from CivitAI, from the headers of files, from file names and from the WebUI. Any of them may
be megabytes long, or hold line breaks and terminal escapes.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice


def printable(text: object, limit: int = 120) -> str:
    """One line of at most `limit` characters, all of them printable.

    White space of any kind becomes one space. What has no glyph (control characters, marks that reverse the direction
    of text, half of a surrogate pair) becomes "?". A text that was cut ends with "…".
    """
    whole = text if isinstance(text, str) else str(text)
    # It is cut first: the work must not grow with the text.
    line = " ".join(whole[: limit + 1].split())
    if not line.isprintable():
        line = "".join(character if character.isprintable() else "?" for character in line)
    return line if len(whole) <= limit else f"{line[: limit - 1]}…"


def quoted(name: object, limit: int = 60) -> str:
    """A name in quotes, printable and of at most `limit` characters."""
    return f"'{printable(name, limit)}'"


def quoted_list(names: Iterable[object], most: int = 12) -> str:
    """Names in quotes, separated by commas. After `most` of them the list ends with "…"."""
    shown = [quoted(name) for name in islice(names, most + 1)]
    return ", ".join(shown) if len(shown) <= most else f"{', '.join(shown[:most])}, …"

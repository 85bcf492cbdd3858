"""How to try again: pauses that grow and differ from worker to worker, and the pause that a server asks for."""

from __future__ import annotations

import email.utils
import random
import time


class Backoff:
    """Pauses with decorrelated jitter, so that workers that failed together do not come back together.

    Each pause is between `shortest` and three times the one before it, and never above `longest`. Seconds.
    """

    def __init__(self, shortest: float, longest: float) -> None:
        self._shortest = shortest
        self._longest = longest
        self._pause = shortest

    def next_pause(self) -> float:
        """Seconds to wait before the next try."""
        self._pause = min(self._longest, random.uniform(self._shortest, max(self._shortest, self._pause) * 3))
        return self._pause

    def reset(self) -> None:
        """Begin again with short pauses: there was progress."""
        self._pause = self._shortest


def parse_retry_after(text: str | None) -> float | None:
    """The seconds that a Retry-After header asks for, a number or a date (RFC 9110, 10.2.3); None if it is neither."""
    text = (text or "").strip()
    if text.isascii() and text.isdecimal():
        return float(text[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None

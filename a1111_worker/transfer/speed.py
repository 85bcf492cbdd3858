"""How fast a request is, and whether a file comes too slowly."""

from __future__ import annotations

_YOUNG_SECONDS = 0.5


def judged_speed(received: int, seconds: float, answer_seconds: float, usual: float) -> float | None:
    """The speed of a request that was sent so many `seconds` ago, in bytes a second; None if it is unknown.

    Its first half second says nothing: a busy machine makes the fastest connection look slow. Nor does a time in which
    answers are still expected. Then it counts as `usual` (0: unknown).
    """
    if seconds < max(_YOUNG_SECONDS, 4 * answer_seconds):
        return usual or None
    return received / seconds


class SpeedCheck:
    """Finds out every `period` seconds whether bytes came too slowly.

    Only seconds in which this process ran count. Nothing is received while it is stopped (a paused container, a frozen
    machine), however fast the storage is. So the time between two questions, of which there are many a second, counts
    up to `longest_step` seconds, and no more.
    """

    def __init__(self, period: float, longest_step: float, now: float) -> None:
        self._period = period
        self._longest_step = longest_step
        self._now = now
        self._seconds = 0.0  # of this period
        self._received = 0  # when it began

    def is_too_slow(self, now: float, received: int, least: float) -> bool:
        """Whether a period is over in which fewer than `least` bytes a second came. `now` is on the monotonic clock.

        `received` bytes have come in all. If `least` is 0, none are expected now: a new period begins.
        """
        self._seconds += min(now - self._now, self._longest_step)
        self._now = now
        if least and self._seconds < self._period:
            return False
        is_too_slow = received - self._received < least * self._seconds
        self._seconds, self._received = 0.0, received
        return is_too_slow

"""Whether something is too slow, and by which clock."""

from __future__ import annotations


class RunningTime:
    """The seconds for which this process ran. Who was slow is judged by them.

    Nothing is received while the process is stopped (a paused container, a frozen machine), however fast the storage
    is. So the time between two calls of `advance` counts up to `longest_step` seconds, and no more. Whoever calls it
    does so many times a second.
    """

    def __init__(self, now: float, longest_step: float) -> None:
        self.seconds = 0.0
        self._now = now
        self._longest_step = longest_step

    def advance(self, now: float) -> float:
        """The seconds so far. `now` is on the monotonic clock."""
        self.seconds += min(now - self._now, self._longest_step)
        self._now = now
        return self.seconds


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
    """Finds out every `period` seconds whether bytes came too slowly. Seconds are a RunningTime's."""

    def __init__(self, period: float, now: float, received: int = 0) -> None:
        self._period = period
        self.restart(now, received)

    def restart(self, now: float, received: int) -> None:
        """Begin a new period: `received` bytes have come in all."""
        self._began, self._received = now, received

    def is_too_slow(self, now: float, received: int, least: float) -> bool:
        """Whether a period is over in which fewer than `least` bytes a second came."""
        seconds, count = now - self._began, received - self._received
        if seconds < self._period:
            return False
        self.restart(now, received)
        return count < least * seconds

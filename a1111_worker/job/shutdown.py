"""The time that a worker has to shut down, and the time that a job has."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

from a1111_worker.context import Deadline

log = logging.getLogger(__name__)

ANSWER_SECONDS = 2.0
"""What a job with a short policy keeps for sending its answer: a last look at the WebUI's progress (0.8 s at most), the
SDK's pause of 0.1 s (runpod 1.12, rp_scale.py), and a request to RunPod."""


class Shutdown:
    """On TERM, running jobs may finish. A little before `grace` seconds are over, the jobs that still run are
    cancelled, in time to answer.

    The SDK sets its own signal handler when its loop starts. Ours is set inside that loop and calls the SDK's first.
    """

    def __init__(self, grace: float) -> None:
        self._delay = cancel_delay(grace)
        self._running: set[Deadline] = set()
        self._is_over = False
        self._is_listening = False

    def listen(self) -> None:
        """Handle TERM from now on. Call it in the loop, in the main thread. Idempotent."""
        if self._is_listening or threading.current_thread() is not threading.main_thread():
            return
        self._is_listening = True
        loop = asyncio.get_running_loop()
        previous = signal.getsignal(signal.SIGTERM)

        def on_term(number: int, frame: FrameType | None) -> None:
            if callable(previous):
                previous(number, frame)
            loop.call_soon_threadsafe(loop.call_later, self._delay, self._cancel_all)

        signal.signal(signal.SIGTERM, on_term)

    @contextlib.contextmanager
    def may_cancel(self, deadline: Deadline) -> Iterator[None]:
        """Inside the block, the shutdown may cancel the job that has this deadline. A late job is cancelled at once."""
        self._running.add(deadline)
        if self._is_over:
            deadline.cancel()
        try:
            yield
        finally:
            self._running.discard(deadline)

    def _cancel_all(self) -> None:
        self._is_over = True
        if self._running:
            log.warning("the shutdown's grace is nearly over: running jobs are cancelled")
        for deadline in list(self._running):
            deadline.cancel()


def cancel_delay(grace: float) -> float:
    """Seconds from TERM until running jobs are cancelled: 3 s, or half of a short grace, are left for their answers."""
    return max(grace / 2, grace - 3.0)


def job_seconds(job: Mapping[str, Any], job_timeout: float, *, interrupt_patience: float) -> float:
    """The seconds that a job has: `job_timeout`, or a little less than the execution timeout of its own policy.

    RunPod ends a job without an answer when its `policy.executionTimeout` (milliseconds) is over. A tenth of it, at
    most 30 s, is kept back for the answer to arrive. It is never less than the time in which a job without time left
    is over: `interrupt_patience` seconds for its generation, and the answer's way. RunPod takes no policy below 5 s. A
    shorter one, from elsewhere, leaves the job a quarter.
    """
    policy = job.get("policy")
    allowed = policy.get("executionTimeout") if isinstance(policy, Mapping) else None
    if isinstance(allowed, bool) or not isinstance(allowed, int | float) or not allowed > 0:
        return job_timeout
    seconds = min(allowed, 1e12) / 1000
    kept_back = max(min(30.0, seconds / 10), interrupt_patience + ANSWER_SECONDS)
    return min(job_timeout, max(seconds - kept_back, seconds / 4))

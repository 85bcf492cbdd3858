"""One job on its way through the worker: its time, its status, its timings, and its clean end when it is cancelled.

The handler is async at the rim so that RunPod's cancellation reaches it (runpod ≥ 1.10 cancels the job's task); the
work itself blocks, in threads. A cancelled job's thread is told through the job's `Deadline` and then awaited, however
often the task is cancelled meanwhile: nothing of a job runs on when its task has ended, so the next one may begin.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import logging
import signal
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, TypeVar

from a1111_worker import logs
from a1111_worker.domain import Deadline, Progress, Report, Run, Stage, in_words
from a1111_worker.errors import JobTimeout
from a1111_worker.job.status import StatusPage

T = TypeVar("T")

log = logging.getLogger(__name__)


class Story(Run):
    """A job's run as the async rim sees it."""

    def __init__(self, job_id: str, deadline: Deadline, report: Report, threads: Executor) -> None:
        super().__init__(deadline, report)
        self.job_id = job_id
        self._threads = threads

    async def blocking(
        self, function: Callable[..., T], *arguments: Any, undo: Callable[[T], object] | None = None
    ) -> T:
        """Run what blocks in a thread. When the job is cancelled, it is told, awaited, and the cancellation goes on;
        `undo` gets what came of it all the same."""
        call = functools.partial(contextvars.copy_context().run, function, *arguments)
        running = asyncio.get_running_loop().run_in_executor(self._threads, call)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            self.deadline.cancel()
            try:
                await settled(running)
            finally:
                if undo is not None and not running.cancelled() and running.exception() is None:
                    undo(running.result())
            raise

    @contextlib.asynccontextmanager
    async def holding(self, stage: Stage, resource: AbstractContextManager[T]) -> AsyncIterator[T]:
        """Enter what blocks to be entered, as this stage; it is left again even where the job ended meanwhile."""
        with contextlib.ExitStack() as left_at_the_end:
            with self.stage(stage):
                entered = await self.blocking(left_at_the_end.enter_context, resource)
            yield entered


@contextlib.asynccontextmanager
async def telling(job_id: str, deadline: Deadline, threads: Executor, page: StatusPage) -> AsyncIterator[Story]:
    """Tell a job's story: its log lines carry its id, and no look at it leaves after the block."""
    status = page.of(job_id)
    # RunPod has forgotten a cancelled job: a look that arrives while its end is awaited would bring it back.
    with logs.of_job(job_id), deadline.on_cancel(status.hush):
        story = Story(job_id, deadline, status.report, threads)
        try:
            yield story
        except BaseException:
            log.info("ended early: %s", in_words(story.timings()))
            raise
        finally:
            if status.is_sending:
                await settled(asyncio.get_running_loop().run_in_executor(threads, status.close))


async def settled(future: asyncio.Future[Any]) -> None:
    """Return when it is done, whatever comes of it, and however often the waiting task is cancelled."""
    cancelled = False
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError:
            cancelled = True
    if not future.cancelled():
        future.exception()
    if cancelled:
        raise asyncio.CancelledError


class Turns:
    """The GPU: one generation at a time, first come first served. Belongs to one event loop."""

    def __init__(self) -> None:
        self._busy = False
        self._waiting: deque[tuple[asyncio.Future[bool], Story]] = deque()

    @property
    def is_free(self) -> bool:
        return not self._busy

    @contextlib.asynccontextmanager
    async def next(self, story: Story) -> AsyncIterator[None]:
        """Wait for the GPU and have it until the block ends. Raises JobTimeout or JobCancelled if that comes first."""
        with story.stage(Stage.QUEUE):
            await self._acquire(story)
        try:
            yield
        finally:
            self._release()

    async def _acquire(self, story: Story) -> None:
        if not self._busy:
            self._busy = True
            return
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[bool] = loop.create_future()
        self._waiting.append((turn, story))
        self._tell_places()

        def give_up() -> None:
            if not turn.done():
                turn.set_result(False)

        def unblock() -> None:  # from any thread
            loop.call_soon_threadsafe(give_up)

        timer = loop.call_later(story.deadline.left(), give_up)
        try:
            with story.deadline.on_cancel(unblock):
                is_ours = await turn
        except asyncio.CancelledError:
            if not turn.cancelled() and turn.result():
                self._release()  # it was handed over while we were being cancelled
            raise
        finally:
            timer.cancel()
            with contextlib.suppress(ValueError):
                self._waiting.remove((turn, story))
                self._tell_places()
        if not is_ours:
            story.deadline.check()
            raise JobTimeout("the time of the job was up before the GPU was free")

    def _release(self) -> None:
        """Hand the GPU to whoever has waited longest."""
        while self._waiting:
            turn, _ = self._waiting.popleft()
            if not turn.done():
                turn.set_result(True)
                self._tell_places()
                return
        self._busy = False

    def _tell_places(self) -> None:
        for place, (_, story) in enumerate(self._waiting, 1):
            story.report(Progress(Stage.QUEUE, detail=f"waits for the GPU, place {place} in the queue"))


class Shutdown:
    """TERM: what runs may finish until a little before the grace is over, and is cancelled then, in time to answer.

    The SDK sets its own handler when its loop starts, so ours is set inside that loop and calls the SDK's first.
    """

    def __init__(self, grace: float) -> None:
        self._patience = max(grace / 2, grace - 3.0)
        self._running: set[Deadline] = set()
        self._over = False
        self._listening = False

    def listen(self) -> None:
        """Hear TERM from now on; to be called in the loop, in the main thread. Idempotent."""
        if self._listening or threading.current_thread() is not threading.main_thread():
            return
        self._listening = True
        loop = asyncio.get_running_loop()
        previous = signal.getsignal(signal.SIGTERM)

        def on_term(number: int, frame: FrameType | None) -> None:
            if callable(previous):
                previous(number, frame)
            loop.call_soon_threadsafe(loop.call_later, self._patience, self._end)

        signal.signal(signal.SIGTERM, on_term)

    @contextlib.contextmanager
    def may_end(self, deadline: Deadline) -> Iterator[None]:
        """Inside the block, the shutdown cancels what has this deadline."""
        self._running.add(deadline)
        if self._over:
            deadline.cancel()
        try:
            yield
        finally:
            self._running.discard(deadline)

    def _end(self) -> None:
        self._over = True
        if self._running:
            log.warning("the shutdown's grace is nearly over: what runs is cancelled")
        for deadline in list(self._running):
            deadline.cancel()


def seconds_for(job: Mapping[str, Any], job_timeout: float) -> float:
    """The time a job has: `job_timeout`, or a little less than the execution timeout of its own policy.

    RunPod ends a job without an answer when its `policy.executionTimeout` (milliseconds) is over; the tenth that is
    kept back, at most 30 s, is for the answer to arrive.
    """
    policy = job.get("policy")
    allowed = policy.get("executionTimeout") if isinstance(policy, Mapping) else None
    if isinstance(allowed, bool) or not isinstance(allowed, int | float) or not allowed > 0:
        return job_timeout
    seconds = min(allowed, 1e12) / 1000
    return min(job_timeout, seconds - min(30.0, seconds / 10))

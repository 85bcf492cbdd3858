"""A job in the event loop: blocking work in threads, and a clean end if the job is cancelled.

The outermost layer is async, so that RunPod's cancellation reaches it (runpod ≥ 1.10 cancels the job's task). The work
itself blocks, in threads. If the job's task is cancelled, the job's `Deadline` is cancelled too, and the thread that
works for the job is awaited, however often the task is cancelled meanwhile. Nothing of a job runs on when its task has
ended, so the next job may begin.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from a1111_worker.context import Deadline, JobContext, format_times
from a1111_worker.domain import Stage
from a1111_worker.job.status import StatusPage

T = TypeVar("T")

log = logging.getLogger(__name__)


class JobRunner:
    """Runs the blocking stages of jobs in `threads` threads, and shows their progress on `status`.

    A job uses one thread at a time. Log lines of a thread carry the id of the job that it works for.
    """

    def __init__(self, threads: int, status: StatusPage) -> None:
        self._threads = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="job")
        self._status = status

    def close(self) -> None:
        """End the threads. No job may be running."""
        self._threads.shutdown()
        self._status.close()

    @contextlib.asynccontextmanager
    async def open(self, job_id: str, deadline: Deadline) -> AsyncIterator[JobContext]:
        """A job's context. No progress is sent after the block, nor after the job is cancelled."""
        status = self._status.job_status(job_id)
        # RunPod has forgotten a cancelled job. Progress that arrives after that would bring it back.
        with deadline.on_cancel(status.stop):
            context = JobContext(deadline, status.report, job_id)
            try:
                yield context
            except BaseException:
                log.info("ended early: %s", format_times(context.times.seconds()))
                raise
            finally:
                if status.is_sending:
                    await _wait_until_done(self._submit(status.close))

    async def run(
        self,
        context: JobContext,
        function: Callable[..., T],
        *arguments: Any,
        undo: Callable[[T], object] | None = None,
    ) -> T:
        """Call `function(*arguments, context)`, which blocks, in a thread.

        If the job is cancelled meanwhile, its deadline is cancelled and the thread awaited. `undo` then gets what the
        function returned, if it did not raise.
        """
        return await self._call(context, functools.partial(function, *arguments, context), undo)

    @contextlib.asynccontextmanager
    async def enter(self, context: JobContext, stage: Stage, resource: AbstractContextManager[T]) -> AsyncIterator[T]:
        """Enter a context manager that blocks, as this stage of the job, and leave it, both in a thread.

        It is left again even if the job is cancelled while it is entered. It does not see the block's exception.
        """
        stack = contextlib.ExitStack()
        try:
            with context.times.measure(stage):
                entered = await self._call(context, functools.partial(stack.enter_context, resource))
            yield entered
        except asyncio.CancelledError:
            context.deadline.cancel()  # before the resource is left, which may take long: no progress is sent meanwhile
            raise
        finally:
            await self._call(context, stack.close)

    def submit_later(self, function: Callable[[], object], delay: float) -> None:
        """Call `function` in a thread, `delay` seconds from now, unless the worker ends before."""

        def submit() -> None:
            with contextlib.suppress(RuntimeError):  # the worker is ending
                self._threads.submit(function)

        asyncio.get_running_loop().call_later(delay, submit)

    async def _call(
        self, context: JobContext, function: Callable[[], T], undo: Callable[[T], object] | None = None
    ) -> T:
        """Call it in a thread, and return or raise only when the thread is done with it."""
        running = self._submit(function)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            context.deadline.cancel()
            try:
                await _wait_until_done(running)
            finally:
                if undo is not None and not running.cancelled() and running.exception() is None:
                    undo(running.result())
            raise

    def _submit(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Start a call in a thread, with the log context of the job."""
        call = functools.partial(contextvars.copy_context().run, function)
        return asyncio.get_running_loop().run_in_executor(self._threads, call)


async def _wait_until_done(future: asyncio.Future[Any]) -> None:
    """Return when it is done, with whatever outcome. A cancellation that comes meanwhile is raised only then."""
    was_cancelled = False
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError:
            was_cancelled = True
    if not future.cancelled():
        future.exception()  # counts as seen: asyncio would log it otherwise
    if was_cancelled:
        raise asyncio.CancelledError

"""A job as the event loop sees it: blocking work in threads, and a clean end if the job is cancelled.

The handler is async at the rim so that RunPod's cancellation reaches it (runpod ≥ 1.10 cancels the job's task). The work
itself blocks, in threads. A cancelled job's thread is told through the job's `Deadline` and then awaited, however often
the task is cancelled meanwhile: nothing of a job runs on when its task has ended, so the next job may begin.
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

from a1111_worker import logs
from a1111_worker.context import Deadline, JobContext, format_timings
from a1111_worker.domain import Stage
from a1111_worker.job.status import StatusPage

T = TypeVar("T")

log = logging.getLogger(__name__)


class JobRunner:
    """Runs the blocking stages of jobs in `threads` threads, and shows their progress on `status`."""

    def __init__(self, threads: int, status: StatusPage) -> None:
        self._threads = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="job")
        self._status = status

    def close(self) -> None:
        """End the threads. Nothing may be under way."""
        self._threads.shutdown()
        self._status.close()

    @contextlib.asynccontextmanager
    async def open(self, job_id: str, deadline: Deadline) -> AsyncIterator[JobContext]:
        """A job's context. Log lines inside carry the job's id, and no progress leaves after the block."""
        status = self._status.of(job_id)
        # RunPod has forgotten a cancelled job. Progress that arrives after that would bring it back.
        with logs.of_job(job_id), deadline.on_cancel(status.stop):
            context = JobContext(deadline, status.report, job_id)
            try:
                yield context
            except BaseException:
                log.info("ended early: %s", format_timings(context.timings.seconds()))
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
        """Call what blocks in a thread: `function(*arguments)`.

        If the job is cancelled meanwhile, the thread is told and awaited. Then `undo` gets what the function returned
        all the same, and the cancellation goes on.
        """
        running = self._submit(function, *arguments)
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

    @contextlib.asynccontextmanager
    async def enter(self, context: JobContext, stage: Stage, resource: AbstractContextManager[T]) -> AsyncIterator[T]:
        """Enter a context manager that blocks, as this stage of the job, and leave it, both in a thread.

        It is left again even if the job is cancelled while it is entered.
        """
        stack = contextlib.ExitStack()
        try:
            with context.timings.measure(stage):
                entered = await self.run(context, stack.enter_context, resource)
            yield entered
        finally:
            leaving = self._submit(stack.close)
            await _wait_until_done(leaving)
            leaving.result()

    def submit_later(self, function: Callable[[], object], delay: float) -> None:
        """Call `function` in a thread, `delay` seconds from now, unless the worker ends before."""

        def submit() -> None:
            with contextlib.suppress(RuntimeError):  # the worker is ending
                self._threads.submit(function)

        asyncio.get_running_loop().call_later(delay, submit)

    def _submit(self, function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        call = functools.partial(contextvars.copy_context().run, function, *arguments)
        return asyncio.get_running_loop().run_in_executor(self._threads, call)


async def _wait_until_done(future: asyncio.Future[Any]) -> None:
    """Return when it is done, with whatever outcome, and however often the waiting task is cancelled."""
    was_cancelled = False
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError:
            was_cancelled = True
    if not future.cancelled():
        future.exception()
    if was_cancelled:
        raise asyncio.CancelledError

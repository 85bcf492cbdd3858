"""The order of the jobs: at the GPU, one generation at a time; on the network, the job that the GPU waits for first."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Iterator

from a1111_worker.context import JobContext
from a1111_worker.domain import Progress, Stage
from a1111_worker.errors import JobTimeout


class GpuQueue:
    """The GPU as a FIFO lock: one job has it, the others wait in the order in which they came. For one event loop."""

    def __init__(self) -> None:
        self._is_busy = False
        self._waiting: deque[tuple[asyncio.Future[bool], JobContext]] = deque()

    @property
    def is_free(self) -> bool:
        return not self._is_busy

    @contextlib.asynccontextmanager
    async def turn(self, context: JobContext) -> AsyncIterator[None]:
        """Wait for the GPU, and keep it until the block ends. Raises JobTimeout or JobCancelled if that comes first."""
        with context.times.measure(Stage.QUEUE):
            await self._acquire(context)
        try:
            yield
        finally:
            self._release()

    async def _acquire(self, context: JobContext) -> None:
        if not self._is_busy:
            self._is_busy = True
            return
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[bool] = loop.create_future()
        self._waiting.append((turn, context))
        self._report_places()

        def give_up() -> None:
            if not turn.done():
                turn.set_result(False)

        def unblock() -> None:  # from any thread
            loop.call_soon_threadsafe(give_up)

        timer = loop.call_later(context.deadline.remaining(), give_up)
        try:
            with context.deadline.on_cancel(unblock):
                is_ours = await turn
        except asyncio.CancelledError:
            if not turn.cancelled() and turn.result():
                self._release()  # the GPU was handed to this job while it was being cancelled
            raise
        finally:
            timer.cancel()
            with contextlib.suppress(ValueError):
                self._waiting.remove((turn, context))
                self._report_places()
        if not is_ours:
            context.deadline.check()
            raise JobTimeout("the time of the job was up before the GPU was free")

    def _release(self) -> None:
        """Hand the GPU to the job that has waited longest."""
        while self._waiting:
            turn, _ = self._waiting.popleft()
            if not turn.done():
                turn.set_result(True)
                self._report_places()
                return
        self._is_busy = False

    def _report_places(self) -> None:
        for place, (_, context) in enumerate(self._waiting, 1):
            context.report(Progress(Stage.QUEUE, detail=f"waits for the GPU, place {place} in the queue"))


class PreparationOrder:
    """The jobs that are preparing, the oldest first. The GPU waits for that one, or will wait for it next."""

    def __init__(self) -> None:
        self._places: list[PreparationPlace] = []  # changed from several threads: each operation of a list is atomic

    @contextlib.contextmanager
    def join(self) -> Iterator[PreparationPlace]:
        """The place of a job that prepares while the block runs, or until `leave`."""
        place = PreparationPlace(self._places)
        self._places.append(place)
        try:
            yield place
        finally:
            place.leave()


class PreparationPlace:
    """A job's place among those that are preparing."""

    def __init__(self, places: list[PreparationPlace]) -> None:
        self._places = places

    def is_first(self) -> bool:
        return self._places[:1] == [self]

    def leave(self) -> None:
        """The job is prepared. Idempotent."""
        with contextlib.suppress(ValueError):
            self._places.remove(self)

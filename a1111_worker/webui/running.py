"""A long request to the WebUI while it runs: a generation, or the switch to a checkpoint."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from a1111_worker.background import BackgroundCall
from a1111_worker.context import Deadline
from a1111_worker.errors import WebUISilent, WorkerError
from a1111_worker.webui.client import WebUI
from a1111_worker.webui.responses import WebUIProgress
from a1111_worker.webui.timings import WebUITimings

T = TypeVar("T")


class RunningRequest(Generic[T]):
    """`send` runs at once, in a thread of its own. Meanwhile /progress shows whether the WebUI is alive.

    `activity` is what the WebUI does ("generates"); error messages contain it.
    """

    def __init__(self, webui: WebUI, send: Callable[[], T], *, activity: str, timings: WebUITimings) -> None:
        self._webui = webui
        self._activity = activity
        self._timings = timings
        self._call = BackgroundCall(send, name="webui-call")

    def wait(
        self,
        deadline: Deadline,
        on_progress: Callable[[WebUIProgress], None] | None = None,
        *,
        previews: bool = False,
    ) -> bool:
        """Wait until it has ended, or the deadline is over. Returns whether it has ended.

        `on_progress` is called with every progress that the WebUI reports; with `previews`, some have a picture. Raises
        WebUISilent if the WebUI hangs: it answers no request for `silence` seconds.
        """
        answered = previewed = time.monotonic()
        while not self._call.wait(self._timings.progress_interval, deadline):
            if deadline.is_cancelled or deadline.remaining() == 0.0:
                return False
            wants_preview = previews and time.monotonic() - previewed >= self._timings.preview_interval
            try:
                if wants_preview:
                    previewed = time.monotonic()
                    progress = self._webui.progress(timeout=self._timings.preview_timeout, preview=True)
                else:
                    progress = self._webui.progress()
            except WorkerError:
                # A single failure means nothing: the timeout is short, and loading a checkpoint delays other requests
                # for seconds.
                if time.monotonic() - answered > self._timings.silence:
                    raise WebUISilent(f"the WebUI hangs: it answers nothing while it {self._activity}") from None
            else:
                answered = time.monotonic()
                if on_progress is not None:
                    on_progress(progress)
        return True

    def interrupt(self) -> None:
        """Interrupt a generation, and return when it has ended. Raises WebUISilent if the WebUI does not end it."""
        grace = Deadline(self._timings.interrupt_grace)
        while not self._call.is_done():
            if grace.remaining() == 0.0:
                raise WebUISilent("the WebUI hangs: it did not end an interrupted generation")
            with contextlib.suppress(WorkerError):
                self._webui.interrupt()  # repeatedly: an interrupt that arrives before the generation begins is lost
            self._call.wait(self._timings.interrupt_interval, grace)

    def result(self) -> T:
        """What `send` returned or raised. Only after it has ended."""
        return self._call.result()

    def abandon(self, dispose: Callable[[T], None]) -> None:
        """Wait no longer. `dispose` gets what `send` returns, now or later."""
        self._call.abandon(dispose)

"""A blocking call in a thread of its own. The caller can do other things while it waits, or abandon the call."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Generic, TypeVar, cast

from a1111_worker.context import Deadline

T = TypeVar("T")


class BackgroundCall(Generic[T]):
    """Runs `function` at once, in a daemon thread called `name`. Its log lines carry the id of the caller's job."""

    def __init__(self, function: Callable[[], T], *, name: str) -> None:
        self._function = function
        self._outcome: tuple[T | None, BaseException | None] | None = None
        self._dispose: Callable[[T], None] | None = None
        self._changed = threading.Condition()
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(self._run,), daemon=True, name=name).start()

    def is_done(self) -> bool:
        return self._outcome is not None

    def wait(self, seconds: float, deadline: Deadline) -> bool:
        """Wait for the end of the call, at most `seconds`, at most until the deadline. Returns whether it is done."""
        with deadline.on_cancel(self._wake), self._changed:
            self._changed.wait_for(lambda: self.is_done() or deadline.is_cancelled, min(seconds, deadline.remaining()))
        return self.is_done()

    def result(self) -> T:
        """What the function returned or raised. Only after the call is done."""
        assert self._outcome is not None, "it is not done"
        value, error = self._outcome
        if error is not None:
            raise error
        return cast(T, value)

    def abandon(self, dispose: Callable[[T], None]) -> None:
        """Wait no longer for the call. `dispose` gets what the function returns, now or later."""
        with self._changed:
            self._dispose = dispose
            outcome = self._outcome
        if outcome is not None and outcome[1] is None:
            dispose(cast(T, outcome[0]))

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        value, error = None, None
        try:
            value = self._function()
        except BaseException as raised:  # `result` raises it again, in the thread that asks
            error = raised
        with self._changed:
            self._outcome = (value, error)
            dispose = self._dispose
            self._changed.notify_all()
        if dispose is not None and error is None:
            dispose(cast(T, value))

"""The switch to a checkpoint, verified.

What A1111 reports is believed only if it was checked (measured on 1.9.3 and 1.10.1): a switch is verified when POST
/options has returned and `sd_checkpoint_hash` equals the SHA-256 of our file, which a fresh /sd-models lists under its
name. `200 null` verifies nothing, and neither does a name in /options.
"""

from __future__ import annotations

import logging
import time

from a1111_worker.context import Deadline
from a1111_worker.domain import Model
from a1111_worker.errors import CheckpointNotLoaded, GenerationFailed, InvalidRequest
from a1111_worker.webui.client import WebUI
from a1111_worker.webui.responses import ListedCheckpoint, file_of_title
from a1111_worker.webui.running import RunningRequest
from a1111_worker.webui.timings import WebUITimings

log = logging.getLogger(__name__)


class CheckpointSwitch:
    """Loads `checkpoint` into the WebUI. `timeout` is seconds: for loading it, and again for its verification."""

    def __init__(self, webui: WebUI, checkpoint: Model, *, timeout: float, timings: WebUITimings) -> None:
        self._webui = webui
        self._checkpoint = checkpoint
        self._timeout = timeout
        self._timings = timings

    def find(self) -> ListedCheckpoint:
        """The checkpoint as the WebUI lists it; CheckpointNotLoaded if the WebUI does not see the file."""
        listed = self._find_listed()
        if listed is None:
            self._webui.refresh_checkpoints()
            listed = self._find_listed()
        if listed is None:
            raise CheckpointNotLoaded(
                f"the WebUI does not list {self._checkpoint.file}",
                hint="the WebUI must be started on WEBUI_MODELS_DIR, as start.sh does",
            )
        return listed

    def is_loaded(self, listed: ListedCheckpoint | None) -> bool:
        """Whether the hashes verify that the checkpoint is loaded. `listed` is how a fresh /sd-models lists it."""
        if listed is None or listed.sha256 != self._checkpoint.sha256:
            return False
        return self._webui.options().checkpoint_sha256 == self._checkpoint.sha256

    def run(self, listed: ListedCheckpoint, deadline: Deadline) -> None:
        """Load the checkpoint, and return when it is verified.

        Raises CheckpointNotLoaded if it is not; WebUIBroken if the switch has broken the WebUI; WebUISilent if the
        WebUI hangs.
        """
        began = time.monotonic()
        self._load(listed.title, deadline)
        limit = deadline.within(self._timeout)
        name = self._checkpoint.name
        while not self.is_loaded(self._find_listed()):
            # A WebUI that is loading it already answers the switch at once. One that failed has its old name again.
            if not self._is_named():
                raise CheckpointNotLoaded(f"the WebUI reported {name} as loaded, but its hash shows that it is not")
            if limit.remaining() == 0.0:
                raise CheckpointNotLoaded(f"the WebUI did not load {name} in {self._timeout:.0f} s")
            deadline.wait(self._timings.interrupt_interval)
        log.info("switched to %s in %.1f s, proven by its hash", name, time.monotonic() - began)

    def _load(self, title: str, deadline: Deadline) -> None:
        request = RunningRequest(
            self._webui,
            lambda: self._webui.set_options({"sd_model_checkpoint": title}, timeout=self._timeout),
            activity="switches",
            timings=self._timings,
        )
        if not request.wait(deadline):
            deadline.check()
        try:
            request.result()
        except InvalidRequest as error:
            raise CheckpointNotLoaded(f"the WebUI refused to load {self._checkpoint.name}") from error
        except GenerationFailed as error:
            raise CheckpointNotLoaded(f"the WebUI could not load {self._checkpoint.name}: {error.message}") from error

    def _find_listed(self) -> ListedCheckpoint | None:
        return next((found for found in self._webui.checkpoints() if found.file == self._checkpoint.file), None)

    def _is_named(self) -> bool:
        """Whether the options name the checkpoint: it is loaded, or being loaded."""
        name = file_of_title(self._webui.options().checkpoint or "")
        return name in (self._checkpoint.file, self._checkpoint.stem)

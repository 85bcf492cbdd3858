"""How far a generation is, without what A1111 shows wrongly. Pure: answers of /progress go in, reports come out.

What A1111 shows is partly of another job or of no use (measured on 1.9.3 and 1.10.1): before the first step the number
of steps is that of the job or the pass before, and the seconds left are a hundred times those so far. An adaptive
sampler counts past its steps ("19 of 4"), at 100 % and with a negative number of seconds left. Each pass of hires fix
counts as an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from a1111_worker.domain import Progress, Stage
from a1111_worker.images import make_preview
from a1111_worker.webui.responses import WebUIProgress

ALMOST_ALL = 99.0  # percent: the rest is there with the answer
PREVIEW_BYTES = 64_000  # of a preview's JPEG


class GenerationProgress:
    """The progress of one generation with this body. It never goes back.

    A report replaces the one before it in `/status`. So each one carries the newest preview.
    """

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._passes = 2 if body.get("enable_hr") else 1
        self._noun = "image" if body.get("batch_size", 1) == 1 else "batch"
        self._percent = 0.0
        self._facts: dict[str, str] = {}

    def report(self, look: WebUIProgress) -> Progress | None:
        """What a look at /progress means; None if it does not show a generation (-1 while a checkpoint is loaded)."""
        if look.images <= 0:
            return None
        if look.preview and (preview := make_preview(look.preview, PREVIEW_BYTES)):
            self._facts = {"preview": preview}
        if look.step == 0 and look.image == 1:
            return Progress(Stage.GENERATE, percent=self._percent, detail="before the first step", facts=self._facts)
        self._percent = max(self._percent, min(look.progress * 100, ALMOST_ALL))
        is_countable = 0 < look.step <= look.steps
        steps = f"step {look.step} of {look.steps}" if is_countable else f"step {look.step}" if look.step else ""
        details = [steps, *self._describe_image(look)]
        eta = look.eta_seconds if look.eta_seconds > 0 and (is_countable or not look.step) else None
        return Progress(Stage.GENERATE, self._percent, ", ".join(filter(None, details)), eta, self._facts)

    def _describe_image(self, look: WebUIProgress) -> list[str]:
        passes = self._passes if look.images % self._passes == 0 else 1
        done = min(look.image, look.images) - 1
        image = f"{self._noun} {done // passes + 1} of {look.images // passes}"
        return ["second pass", image] if done % passes else [image]

"""Whether an upscaler's model works.

A1111 does not tell: if it cannot read the file, it answers 200 with the picture that Lanczos makes, under the model's
name (measured on 1.9.3 and 1.10.1).

So at its first use in a WebUI's life each model enlarges a tiny picture, and the result is compared with Lanczos's.
"""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from a1111_worker.errors import GenerationFailed
from a1111_worker.images import open_image
from a1111_worker.request.picture_scripts import SD_UPSCALER, is_sd_upscale
from a1111_worker.request.scripts import read_script
from a1111_worker.webui.client import WebUI

log = logging.getLogger(__name__)

TINY = 16  # pixels of a side
LANCZOS = "Lanczos"


class UpscalerProofs:
    """Which models have worked, and which have not, in this life of the WebUI. `timeout` is seconds for one picture."""

    def __init__(self, webui: WebUI, *, timeout: float) -> None:
        self._webui = webui
        self._timeout = timeout
        self._instance: str | None = None
        self._models: frozenset[str] = frozenset()
        self._works: dict[str, bool] = {}

    def begin(self, instance: str, models: Sequence[str]) -> None:
        """`models` are the upscalers with a file. A new instance of the WebUI has proven nothing yet."""
        if instance != self._instance:
            self._works.clear()
        self._instance, self._models = instance, frozenset(models)

    @property
    def broken(self) -> frozenset[str]:
        """The models that have not worked."""
        return frozenset(name for name, works in self._works.items() if not works)

    def check(self, name: str) -> bool:
        """Whether an upscaler works. What has no file always does."""
        if name not in self._models:
            return True
        if name not in self._works:
            self._works[name] = self._draws_something_else_than_lanczos(name)
            log.info("the upscaler %s %s", name, "works" if self._works[name] else "draws what Lanczos draws")
        return self._works[name]

    def _draws_something_else_than_lanczos(self, name: str) -> bool:
        picture = _noise()
        try:
            return self._enlarge(picture, name) != self._enlarge(picture, LANCZOS)
        except GenerationFailed as error:  # R-ESRGAN's class raises what ESRGAN's hides
            log.warning("the upscaler %s failed: %s", name, error.message)
            return False

    def _enlarge(self, picture: str, upscaler: str) -> bytes:
        body = {"image": picture, "upscaler_1": upscaler, "upscaling_resize": 2}
        enlarged = self._webui.extra_single_image(body, timeout=self._timeout)
        with open_image(base64.b64decode(enlarged)) as image:
            return image.convert("RGB").tobytes()


def used_upscalers(body: Mapping[str, Any], most: int, axes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The upscalers that a checked body names, each with its path. `most` and `axes`: see `read_script`."""
    if body.get("enable_hr") and body.get("hr_upscaler"):
        yield "hr_upscaler", body["hr_upscaler"]
    if is_sd_upscale(body):
        yield f"script_args[{SD_UPSCALER}]", body["script_args"][SD_UPSCALER]
    script = read_script(body, most, axes)
    for run in script.runs if script else ():
        if name := run.fields.get("hr_upscaler"):
            path, _ = run.origins.get("hr_upscaler", ("", ""))
            yield f"script_args{path}", name


def _noise() -> str:
    """A tiny picture that no model enlarges as Lanczos does. Another one each time: A1111 keeps what it has made."""
    from PIL import Image

    file = io.BytesIO()
    Image.effect_noise((TINY, TINY), 100).convert("RGB").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")

"""The WebUI's options: reset before jobs run, so that no job leaves a setting to the next one.

`override_settings` leak into later jobs unless every option that a job may override was set once: A1111 restores only
those (measured on 1.9.3 and 1.10.1). A script may change further options: an axis of an X/Y/Z plot overrides settings
that no job may.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from a1111_worker.request.schema import OVERRIDABLE_OPTIONS
from a1111_worker.webui.client import WebUI

SAVE_NO_FILES = {"samples_save": False, "grid_save": False}
"""A script can ask for files behind the fields that are refused (`Prompts from file`, X/Y/Z plot). A1111's own settings
have the last word (1.10.1, modules/processing.py and scripts/xyz_grid.py)."""

RESET_OPTIONS = {**{key: option.default for key, option in OVERRIDABLE_OPTIONS.items()}, **SAVE_NO_FILES}

CHECKPOINT_OPTIONS = ("sd_model_checkpoint", "sd_checkpoint_hash")  # set by a switch, never reset


class OptionsReset:
    """Resets the options of a WebUI, and remembers what they were when its process began."""

    def __init__(self, webui: WebUI) -> None:
        self._webui = webui
        self._instance_id: str | None = None
        self._originals: Mapping[str, Any] = {}

    def run(self, instance_id: str, *, timeout: float) -> None:
        """Set what jobs may override to its default, and everything else to what it was at this process's first reset.

        `instance_id` names the WebUI's process. `timeout` is seconds: setting `sd_vae` can make the WebUI load weights.
        """
        options = self._webui.options().values
        if instance_id == self._instance_id:
            changed = {key: value for key, value in self._originals.items() if options.get(key) != value}
            self._webui.set_options({**RESET_OPTIONS, **changed}, timeout=timeout)
            return
        self._webui.set_options(RESET_OPTIONS, timeout=timeout)
        not_ours = options.keys() - RESET_OPTIONS.keys() - set(CHECKPOINT_OPTIONS)
        self._originals = {key: options[key] for key in not_ours}
        self._instance_id = instance_id

"""The WebUI's options: reset before jobs run, so that no job leaves a setting to the next one.

`override_settings` leak into later jobs unless every option that a job may override was set once: A1111 restores only
those (measured on 1.9.3 and 1.10.1). A script may change further options: an axis of an X/Y/Z plot overrides settings
that no job may.

If somebody else runs the WebUI, what its options were is kept, and put back when the worker stops (`owner`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from a1111_worker.domain import Model
from a1111_worker.errors import GenerationFailed, WebUINotReady, WebUISilent
from a1111_worker.request.fields import OVERRIDABLE_OPTIONS
from a1111_worker.webui.client import WebUI
from a1111_worker.webui.owner import OwnersOptions, as_number, is_same
from a1111_worker.webui.responses import WebUIOptions

log = logging.getLogger(__name__)

SAVE_NO_FILES = {"samples_save": False, "grid_save": False}
"""A script can ask for files behind the fields that are refused (`Prompts from file`, X/Y/Z plot). A1111's own settings
have the last word (1.10.1, modules/processing.py and scripts/xyz_grid.py)."""

SHOW_PROOFS = {
    "enable_pnginfo": True,
    "add_model_hash_to_info": True,
    "add_model_name_to_info": True,
    "lora_add_hashes_to_infotext": True,
    "textual_inversion_add_hashes_to_infotext": True,
}
"""What a picture's own text must say, for `verification` to read it."""

NOTHING_UNASKED = {"sd_lora": "None", "sd_checkpoints_limit": 1, "lora_in_memory_limit": 0}
"""No LoRA in every prompt, and no model in memory that is older than its file (A1111's own defaults)."""

KEEP_NO_PICTURES = {"upscaling_max_images_in_cache": 0}
"""Extras keep what they have made, also if they were interrupted or failed, and answer with it again."""

RESET_OPTIONS: Mapping[str, Any] = {
    **{key: option.default for key, option in OVERRIDABLE_OPTIONS.items()},
    **SAVE_NO_FILES,
    **SHOW_PROOFS,
    **NOTHING_UNASKED,
    **KEEP_NO_PICTURES,
}

CHECKPOINT_OPTIONS = ("sd_model_checkpoint", "sd_checkpoint_hash")  # set by a switch, never reset

SLOW_OPTIONS = ("sd_vae", "sd_model_checkpoint")  # setting one waits for the running job, and loads weights

PATIENCE = 2.0  # seconds for a request when the worker stops


class OptionsReset:
    """Resets the options of a WebUI, and what a script has changed beside them.

    `owner` keeps the options of a WebUI that somebody else runs; None if the WebUI is ours.
    """

    def __init__(self, webui: WebUI, owner: OwnersOptions | None = None) -> None:
        self._webui = webui
        self._owner = owner
        self._checkpoint: Model | None = None
        self._restorer = ""  # of faces; "": A1111's own default
        self._instance_id: str | None = None
        self._others: Mapping[str, Any] = {}  # the options that are not reset, before a script
        self._script_ran = False

    def begin(self, checkpoint: Model, restorer: str) -> None:
        """Look at the options before anything is set. WebUINotReady if the WebUI does not answer with PNGs.

        `restorer` restores the faces of jobs that name none.
        """
        options = self._webui.options()
        if not _sends_png(options):
            raise WebUINotReady(
                f"the WebUI's setting samples_format is {str(options.values['samples_format'])[:20]!r}, "
                "and this worker reads PNG",
                hint="set samples_format to png, on the WebUI's page or in its config.json, and start the worker again",
            )
        self._checkpoint, self._restorer = checkpoint, restorer
        if self._owner:
            self._owner.remember(options.values, {**self._defaults(), "sd_model_checkpoint": checkpoint.shown_file})

    def expect_changes(self) -> None:
        """A script runs now. The next reset sets back what it leaves behind."""
        self._script_ran = True

    def run(self, instance_id: str, *, timeout: float) -> None:
        """Set what jobs may override to its default, and what a script has changed beside that to what it was.

        `instance_id` names the WebUI's process. `timeout` is seconds: setting `sd_vae` can make the WebUI load weights.
        """
        options = self._webui.options()
        values = {key: value for key, value in self._defaults().items() if key in options.values}
        if instance_id != self._instance_id or not self._script_ran:
            self._note_others(options)
        else:
            others = self._others.items()
            values |= {key: as_number(value) for key, value in others if options.values.get(key) != value}
        self._webui.set_options(values, timeout=timeout)
        self._instance_id, self._script_ran = instance_id, False

    def are_unchanged(self) -> bool:
        """Whether nobody has changed what this worker set, and the checkpoint, since it did that."""
        options = self._webui.options()
        self._note_others(options)  # what the owner changes there stays
        if self._checkpoint is None or options.checkpoint_sha256 != self._checkpoint.sha256:
            return False
        ours = {**self._defaults(), "sd_model_checkpoint": self._checkpoint.shown_file}
        return _sends_png(options) and all(
            is_same(key, options.values.get(key, value), value) for key, value in ours.items()
        )

    def put_back(self) -> None:
        """Set what the worker has set to what it was, if the WebUI is somebody else's."""
        if self._owner is None or self._checkpoint is None:
            return
        changed = self._owner.to_put_back(self._webui.options(timeout=PATIENCE).values)
        if quick := {key: value for key, value in changed.items() if key not in SLOW_OPTIONS}:
            self._webui.set_options(quick, timeout=PATIENCE)
        for key in SLOW_OPTIONS:
            if key in changed:
                self._set_slowly(key, changed[key])
        self._owner.forget()
        log.info("the WebUI has its owner's settings again: %s", ", ".join(changed) or "none was different")

    def _defaults(self) -> Mapping[str, Any]:
        return {**RESET_OPTIONS, "face_restoration_model": self._restorer} if self._restorer else RESET_OPTIONS

    def _set_slowly(self, key: str, value: Any) -> None:
        try:
            self._webui.set_options({key: value}, timeout=PATIENCE)
        except WebUISilent:
            pass  # it does so when its running job has ended
        except GenerationFailed:
            log.warning("the WebUI's setting %s could not be put back: it does not know its old value any more", key)

    def _note_others(self, options: WebUIOptions) -> None:
        others = options.values.keys() - RESET_OPTIONS.keys() - set(CHECKPOINT_OPTIONS)
        self._others = {key: options.values[key] for key in others}


def _sends_png(options: WebUIOptions) -> bool:
    return str(options.values.get("samples_format", "png")).lower() == "png"

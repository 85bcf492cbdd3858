"""The one model that A1111 has in memory, and the options that choose it.

The order of events in a switch, and what a failed one leaves behind, follow `modules/sd_models.py` of A1111 1.9.3 and
1.10.1 (`reload_model_weights`, `load_model`). Names in backquotes that this sandbox does not define are its functions.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sandbox.webui_errors import WebUIError
from sandbox.webui_fields import as_option
from sandbox.webui_files import CheckpointInfo, ModelFiles, SafetensorsHeader, open_model
from sandbox.webui_knobs import WebUIKnobs

# Options that the API does not set (`restrict_api`). It ignores them without an error.
_RESTRICTED = frozenset({"api_enable_requests", "api_forbid_local_requests", "api_useragent"})


class OptionStore:
    """A1111's `opts`. `data` holds only the options that were ever set."""

    def __init__(self, defaults: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
        self.defaults = defaults
        self.data: dict[str, Any] = dict(saved)

    def get(self, key: str) -> Any:
        return self.data.get(key, self.defaults[key]) if key in self.defaults else self.data[key]

    def shown(self) -> dict[str, Any]:
        """Every option, as GET /options shows it. An option that was never set has its default."""
        shown = {}
        for key, default in self.defaults.items():
            try:
                shown[key] = as_option(default, self.data[key]) if key in self.data else default
            except ValueError as error:
                problem = f"1 validation error for OptionsModel\nresponse -> {key}\n  {error}"
                raise WebUIError("ValidationError", problem) from None
        return shown

    def set(self, key: str, value: Any) -> bool:
        """Set the value only: no type is checked and nothing is loaded. False if nothing changed."""
        if self.data.get(key) == value:
            return False
        if key not in self.defaults:
            raise WebUIError("KeyError", repr(key))
        if key in _RESTRICTED:
            return False
        self.data[key] = value
        return True


@dataclass(frozen=True)
class LoadedModel:
    """The model in memory. `weights` says whose weights these really are. Pictures follow them, not the name."""

    checkpoint: CheckpointInfo
    sha256: str | None
    config: str
    architecture: str
    weights: str


class ModelSlot:
    """`shared.sd_model` and `shared.sd_vae`, and what failed switches leave behind.

    `is_broken`: there is no model any more, and no switch helps. `is_hijacked`: prompts are read correctly. `pause`
    waits, and raises if the process ends. `loads` gets the name of every file that is loaded, and of every failure.
    `loses_first_switch`: as long as nothing is loaded, a switch fails without a look at its file (1.9.3).
    """

    def __init__(
        self,
        files: ModelFiles,
        options: OptionStore,
        knobs: WebUIKnobs,
        pause: Callable[[float], None],
        *,
        loses_first_switch: bool,
        loads: list[str],
    ) -> None:
        self._files = files
        self._options = options
        self._knobs = knobs
        self._pause = pause
        self._loses_first_switch = loses_first_switch
        self._loads = loads
        self.loaded: LoadedModel | None = None
        self.vae: str | None = None
        self.is_hijacked = True
        self.is_broken = False
        self._was_loaded = False
        self._loading = threading.Lock()
        self._misfits_in_a_row = 0

    def get(self) -> LoadedModel | None:
        """`shared.sd_model`: loads the model on first access. If that fails, nothing is raised here."""
        with self._loading:
            if self.loaded is None and not self._was_loaded and not self.is_broken:
                with contextlib.suppress(WebUIError):
                    self._reload()
            return self.loaded

    def reload_weights(self, info: CheckpointInfo | None = None) -> None:
        """`reload_model_weights`: load a checkpoint, without one that of the option. The caller holds the queue lock.

        With one the option keeps its text (`SkipWritingToConfig`), and the hash beside it becomes that of the file.
        """
        if self.is_broken or (self.loaded is None and self._loses_first_switch):
            raise lowvram()
        named = self._options.data.get("sd_model_checkpoint")
        self._reload(info)
        if info is not None:
            self._options.data["sd_model_checkpoint"] = named

    def _reload(self, info: CheckpointInfo | None = None) -> None:
        target, current = info or self._selected(), self.loaded
        if current and current.checkpoint.path == target.path:
            return
        if current:
            self.is_hijacked = False  # `undo_hijack`; only a load that succeeds makes it good again
        header = self._open(target)
        config = str(target.config) if target.config else header.architecture
        if current is None or config != current.config:
            # `send_model_to_trash`: from here on the old model cannot come back.
            try:
                self._load(target, header, config, previous=None)
            except WebUIError:
                self.is_broken = current is not None
                raise
            return
        try:
            self._load(target, header, config, previous=current)
        except WebUIError:
            self._misfits_in_a_row += 1
            self.is_broken = self._misfits_in_a_row > 1
            self._options.data["sd_checkpoint_hash"] = current.sha256
            self.is_hijacked = True
            raise

    def reload_vae(self) -> None:
        """Load the VAE that the option names. An unknown name means no VAE."""
        if self.get() is None:
            raise lowvram()
        selected = self._selected_vae()
        if selected is not None:
            try:
                header = open_model(self._files.vaes.listed[selected])
                if "decoder.conv_in.weight" not in header.shapes:
                    problem = "Error(s) in loading state_dict for AutoencoderKL:\n\tMissing key(s) in state_dict"
                    raise WebUIError("RuntimeError", problem)
            except WebUIError:
                self.is_hijacked = False
                raise
        self.vae = selected
        self.is_hijacked = True

    def _selected(self) -> CheckpointInfo:
        """`select_checkpoint`: the checkpoint of the option, else the first of the list."""
        if checkpoint := self._files.checkpoints.find(self._options.get("sd_model_checkpoint")):
            return checkpoint
        if not self._files.checkpoints.listed:
            folder = self._files.checkpoint_folder
            raise WebUIError(
                "FileNotFoundError",
                "No checkpoints found. When searching for checkpoints, looked at:\n"
                f" - file {folder.parent / 'model.ckpt'}\n - directory {folder}"
                "Can't run without a checkpoint. "
                "Find and place a .ckpt or .safetensors file into any of those locations.",
            )
        return self._files.checkpoints.listed[0]

    def _open(self, target: CheckpointInfo) -> SafetensorsHeader:
        """Hash the file, then open it."""
        hashes = self._files.hashes
        self._loads.append(target.path.name)
        try:
            if hashes.enabled and hashes.cached(f"checkpoint/{target.name}", target.path) is None:
                self._pause(self._knobs.hash_seconds)
            self._files.checkpoints.hash(target)
            return open_model(target.path)
        except OSError as error:
            raise WebUIError(type(error).__name__, str(error)) from None

    def _load(
        self, target: CheckpointInfo, header: SafetensorsHeader, config: str, previous: LoadedModel | None
    ) -> None:
        """`load_model_weights`: sets the title at once, and the hash only when the weights are loaded."""
        self._options.data["sd_model_checkpoint"] = target.title
        self._pause(self._knobs.switch_seconds * 0.85)
        misfit = header.misshapen() or (
            "model.diffusion_model.out.2.weight" if target.model_name in self._knobs.misshapen_models else None
        )
        if misfit:
            model = "DiffusionEngine" if header.architecture == "sdxl" else "LatentDiffusion"
            problem = f"Error(s) in loading state_dict for {model}:\n\tsize mismatch for {misfit}"
            raise WebUIError("RuntimeError", problem)
        if header.has_unet:
            weights = "nan" if target.model_name in self._knobs.nan_models else header.content
        else:  # `load_state_dict(strict=False)`: missing weights keep their old values, or were never set
            weights = previous.weights if previous else "nan"
        self._options.data["sd_checkpoint_hash"] = target.sha256
        self.loaded = LoadedModel(target, target.sha256, config, header.architecture, weights)
        self._was_loaded, self._misfits_in_a_row, self.is_hijacked = True, 0, True
        self.vae = self._selected_vae()
        self._pause(self._knobs.switch_seconds * 0.15)

    def _selected_vae(self) -> str | None:
        name, listed = self._options.get("sd_vae"), self._files.vaes.listed
        if name == "Automatic" and self.loaded is not None:  # `find_vae_near_checkpoint`
            stem = self.loaded.checkpoint.path.stem
            return next((vae for vae in listed if vae.startswith(stem)), None)
        return name if isinstance(name, str) and name in listed else None


def lowvram() -> WebUIError:
    """A1111's error if there is no model where it expects one."""
    return WebUIError("AttributeError", "'NoneType' object has no attribute 'lowvram'")

"""What dies with the WebUI's process: its options, its lists of files, the loaded model, the running job.

The order of events in a switch, and what a failed one leaves behind, follow `modules/sd_models.py` of A1111 1.9.3 and
1.10.1 (`reload_model_weights`, `load_model`): the words in quotes are its functions.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import functools
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from sandbox import draw
from sandbox.webui_errors import WebUIError
from sandbox.webui_fields import as_option
from sandbox.webui_files import ActiveLora, Checkpoint, Checkpoints, Contents, Hashes, Loras, Vaes, open_model

VERSIONS = ("1.9.3", "1.10.1")

# Options that the API does not set (`restrict_api`): silently left as they are.
_RESTRICTED = frozenset({"api_enable_requests", "api_forbid_local_requests", "api_useragent"})


class Killed(BaseException):
    """The process ended while this request was in it: its connection just goes."""


class Knobs(Protocol):
    """What may be turned while it runs: `sandbox.webui.WebUI`, which says what each is."""

    step_seconds: float
    switch_seconds: float
    hash_seconds: float
    nan_check: bool
    nan_models: set[str]
    misshapen_models: set[str]
    styles: Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Loaded:
    """The model in memory. `weights` says whose weights really are in it: pictures follow them, not the name."""

    checkpoint: Checkpoint
    sha256: str | None
    config: str
    architecture: str
    weights: str


class FifoLock:
    """A1111's `queue_lock`: first come, first served."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._held = False
        self._closed = False
        self._waiting: collections.deque[threading.Event] = collections.deque()

    def __enter__(self) -> None:
        with self._mutex:
            if not self._held and not self._closed:
                self._held = True
                return
            turn = threading.Event()
            self._waiting.append(turn)
            if self._closed:
                turn.set()
        turn.wait()
        if self._closed:
            raise Killed

    def __exit__(self, *_: object) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._held = False

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def close(self) -> None:
        """Nobody gets it any more; whoever waits is sent away with Killed."""
        with self._mutex:
            self._closed = True
            for turn in self._waiting:
                turn.set()


class Progress:
    """A1111's `shared.state`: one for all requests, and it never says whose job it is."""

    def __init__(self) -> None:
        self.skipped = self.interrupted = False
        self.job, self.job_count, self.job_no = "", 0, 0
        self.job_timestamp = "0"
        self.sampling_step = self.sampling_steps = 0
        self.size = (0, 0)
        self._preview_step = 0
        self._preview: str | None = None
        self._began = 0.0
        self.changed = threading.Event()  # interrupted, skipped or killed

    def begin(self) -> None:
        self.skipped = self.interrupted = False
        self.changed.clear()
        self.job, self.job_count, self.job_no = "scripts_txt2img", -1, 0
        self.job_timestamp = datetime.now().astimezone().strftime("%Y%m%d%H%M%S")
        self.sampling_step = 0
        self._preview_step, self._preview = 0, None
        self._began = time.monotonic()

    def next_batch(self) -> bool:
        """Whether there is one: an interrupted job has none."""
        self.skipped = False
        if not self.interrupted:
            self.changed.clear()
        return not self.interrupted

    def next_job(self) -> None:
        self.job_no += 1
        self.sampling_step = self._preview_step = 0

    def end(self) -> None:
        self.job, self.job_count = "", 0

    def interrupt(self) -> None:
        self.interrupted = True
        self.changed.set()

    def skip(self) -> None:
        self.skipped = True
        self.changed.set()

    def answer(self, *, preview: bool, preview_every: int = 10) -> dict[str, Any]:
        done, left = 0.0, 0.0
        if self.job_count != 0:
            done = 0.01
            if self.job_count > 0:
                done += self.job_no / self.job_count
            if self.sampling_steps > 0:
                done += 1 / self.job_count * self.sampling_step / self.sampling_steps
            spent = time.monotonic() - self._began
            left = spent / done - spent
            if self.sampling_step - self._preview_step >= preview_every:
                self._preview_step = self.sampling_step
                self._preview = _preview(self.size, self.sampling_step)
        state = {
            "skipped": self.skipped,
            "interrupted": self.interrupted,
            "stopping_generation": False,
            "job": self.job,
            "job_count": self.job_count,
            "job_timestamp": self.job_timestamp,
            "job_no": self.job_no,
            "sampling_step": self.sampling_step,
            "sampling_steps": self.sampling_steps,
        }
        return {
            "progress": min(done, 1),
            "eta_relative": left,
            "state": state,
            "current_image": self._preview if preview and self.job_count != 0 else None,
            "textinfo": None,
        }


class Process:
    """One life of the WebUI. Whatever needs the lock says so; the rest never waits."""

    def __init__(
        self, models_dir: Path, version: str, knobs: Knobs, hashes: Hashes, initial: str | None = None
    ) -> None:
        self.version = version
        self.knobs = knobs
        self.hashes = hashes
        self.tables = _tables(version)
        self._initial = initial
        self.defaults: Mapping[str, Any] = self.tables["options"]
        self.folder = models_dir / "Stable-diffusion"
        self.checkpoints = Checkpoints(self.folder, hashes)
        self.loras = Loras(models_dir / "Lora", hashes)
        self.vaes = Vaes(models_dir / "VAE", hashes)
        self.lock = FifoLock()
        self.progress = Progress()
        self.data: dict[str, Any] = {}  # opts.data: only what was ever set
        self.loaded: Loaded | None = None
        self.vae: str | None = None
        self.hijacked = True
        self.broken = False
        self.active_loras: list[ActiveLora] = []
        self._released = threading.Event()
        self.dead = threading.Event()
        self._loaded_once = False
        self._loading = threading.Lock()
        self._misfits_in_a_row = 0

    def kill(self) -> None:
        self.dead.set()
        self._released.set()
        self.progress.changed.set()
        self.lock.close()

    def pause(self, seconds: float) -> None:
        if self.dead.wait(seconds) if seconds > 0 else self.dead.is_set():
            raise Killed

    def hang(self) -> None:
        """Stay here, whatever is asked, until `release` or the end; an interrupt meanwhile is forgotten."""
        self._released.wait()
        self._released.clear()
        self.pause(0)
        self.progress.interrupted = False

    def release(self) -> None:
        self._released.set()

    # Options

    def option(self, key: str) -> Any:
        return self.data.get(key, self.defaults[key]) if key in self.defaults else self.data[key]

    def options(self) -> dict[str, Any]:
        """All of them: what was never set shows its default."""
        shown = {}
        for key, default in self.defaults.items():
            try:
                shown[key] = as_option(default, self.data[key]) if key in self.data else default
            except ValueError as error:
                problem = f"1 validation error for OptionsModel\nresponse -> {key}\n  {error}"
                raise WebUIError("ValidationError", problem) from None
        return shown

    def set_options(self, given: Mapping[str, Any]) -> None:
        """`set_config`: one after the other, each visible at once; a wrong key stops it where it stands."""
        name = given.get("sd_model_checkpoint")
        if name is not None and self._called(name) is None:
            raise WebUIError("RuntimeError", f"model {name!r} not found")
        for key, value in given.items():
            before = self.data.get(key)
            if not self.set_option(key, value):
                continue
            try:
                if key == "sd_model_checkpoint":
                    with self.lock:
                        self.reload_weights()
                elif key == "sd_vae":
                    with self.lock:
                        self.reload_vae()
            except WebUIError:  # printed on A1111's console, and the caller gets 200
                self.data[key] = before

    def set_option(self, key: str, value: Any) -> bool:
        """The text alone. No type is checked, and nothing happens where it already says so."""
        if self.data.get(key) == value:
            return False
        if key not in self.defaults:
            raise WebUIError("KeyError", repr(key))
        if key in _RESTRICTED:
            return False
        self.data[key] = value
        return True

    # The model

    def model(self) -> Loaded | None:
        """`shared.sd_model`: loads the first time it is asked for; that this failed shows only later."""
        with self._loading:
            if self.loaded is None and not self._loaded_once and not self.broken:
                with contextlib.suppress(WebUIError):
                    self.reload_weights()
            return self.loaded

    def reload_weights(self) -> None:
        """Bring in what the option names; the caller holds the lock."""
        if self.broken:
            raise lowvram()
        target, current = self._selected(), self.loaded
        if current and current.checkpoint.path == target.path:
            return
        if current:
            self.hijacked = False  # `undo_hijack`, made good only by a load that comes through
        contents = self._read(target)
        config = str(target.config) if target.config else contents.architecture
        if current is None or config != current.config:
            # `send_model_to_trash`: from here on there is no way back to the old one.
            try:
                self._load(target, contents, config, previous=None)
            except WebUIError:
                self.broken = current is not None
                raise
            return
        try:
            self._load(target, contents, config, previous=current)
        except WebUIError:
            self._misfits_in_a_row += 1
            self.broken = self._misfits_in_a_row > 1
            self.data["sd_checkpoint_hash"] = current.sha256
            self.hijacked = True
            raise

    def reload_vae(self) -> None:
        """The one the option names; a name nobody has means none."""
        if self.model() is None:
            raise lowvram()
        self.vae = self._selected_vae()

    def _called(self, name: Any) -> Checkpoint | None:
        try:
            hash(name)
        except TypeError as error:
            raise WebUIError("TypeError", str(error)) from None
        return self.checkpoints.called(name)

    def _selected(self) -> Checkpoint:
        """`select_checkpoint`: the option's, else the initial one (`--ckpt`), else the first."""
        for name in (self.option("sd_model_checkpoint"), self._initial):
            if checkpoint := self.checkpoints.called(name):
                return checkpoint
        if not self.checkpoints.listed:
            raise WebUIError(
                "FileNotFoundError",
                "No checkpoints found. When searching for checkpoints, looked at:\n"
                f" - file {self.folder.parent / 'model.ckpt'}\n - directory {self.folder}"
                "Can't run without a checkpoint. "
                "Find and place a .ckpt or .safetensors file into any of those locations.",
            )
        return self.checkpoints.listed[0]

    def _read(self, target: Checkpoint) -> Contents:
        """Hash, then open."""
        try:
            if self.hashes.enabled and self.hashes.known(f"checkpoint/{target.name}", target.path) is None:
                self.pause(self.knobs.hash_seconds)
            self.checkpoints.hash(target)
            return open_model(target.path)
        except OSError as error:
            raise WebUIError(type(error).__name__, str(error)) from None

    def _load(self, target: Checkpoint, contents: Contents, config: str, previous: Loaded | None) -> None:
        """`load_model_weights`: the title at once, the hash only when the weights are in."""
        self.data["sd_model_checkpoint"] = target.title
        self.pause(self.knobs.switch_seconds * 0.85)
        misfit = contents.misshapen() or ("model.diffusion_model.out.2.weight" if self._misshapen(target) else None)
        if misfit:
            model = "DiffusionEngine" if contents.architecture == "sdxl" else "LatentDiffusion"
            problem = f"Error(s) in loading state_dict for {model}:\n\tsize mismatch for {misfit}"
            raise WebUIError("RuntimeError", problem)
        if contents.has_unet:
            weights = "nan" if target.model_name in self.knobs.nan_models else target.sha256 or target.name
        else:  # `load_state_dict(strict=False)`: what is missing stays what it was, or was never set
            weights = previous.weights if previous else "nan"
        self.data["sd_checkpoint_hash"] = target.sha256
        self.loaded = Loaded(target, target.sha256, config, contents.architecture, weights)
        self._loaded_once, self._misfits_in_a_row, self.hijacked = True, 0, True
        self.vae = self._selected_vae()
        self.pause(self.knobs.switch_seconds * 0.15)

    def _selected_vae(self) -> str | None:
        name = self.option("sd_vae")
        return name if isinstance(name, str) and name in self.vaes.listed else None

    def _misshapen(self, target: Checkpoint) -> bool:
        return target.model_name in self.knobs.misshapen_models

    # Jobs

    @contextlib.contextmanager
    def job(self) -> Iterator[None]:
        """From here on /progress moves, and /interrupt is heard."""
        self.progress.begin()
        try:
            yield
        finally:
            self.progress.end()

    def sample(self, steps: int) -> int:
        """Spend the time of a batch; the steps done, fewer when it was interrupted or skipped."""
        progress = self.progress
        progress.sampling_steps = steps
        for step in range(steps):
            progress.sampling_step = step
            if self.knobs.step_seconds:
                progress.changed.wait(self.knobs.step_seconds)
            if self.dead.is_set():
                raise Killed
            if progress.interrupted or progress.skipped:
                return step
        return steps


def lowvram() -> WebUIError:
    """What A1111 says when there is no model where one should be."""
    return WebUIError("AttributeError", "'NoneType' object has no attribute 'lowvram'")


def _preview(size: tuple[int, int], step: int) -> str:
    picture = draw.picture(f"step {step}", max(16, size[0] // 4), max(16, size[1] // 4))
    return base64.b64encode(draw.encode(picture, "", "png")).decode()


@functools.cache
def _tables(version: str) -> Mapping[str, Any]:
    """What a version lists and takes, as recorded: samplers, options with their defaults, fields of txt2img …"""
    folder = Path(__file__).parent / "data" / version
    return {path.stem: json.loads(path.read_bytes()) for path in folder.glob("*.json")}

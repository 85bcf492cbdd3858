"""What ends with the WebUI's process: its options, its lists of files, the loaded model, the running job."""

from __future__ import annotations

import base64
import collections
import contextlib
import functools
import json
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image

from sandbox import draw
from sandbox.webui_errors import WebUIError
from sandbox.webui_extensions import ExtensionFiles, add_to_tables
from sandbox.webui_files import ActiveLora, CheckpointInfo, HashCache, ModelFiles
from sandbox.webui_knobs import WebUIKnobs
from sandbox.webui_model import ModelSlot, OptionStore

VERSIONS = ("1.9.3", "1.10.1")


class Killed(BaseException):
    """The process ended during this request. The connection closes without an answer."""


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
            granted = threading.Event()
            self._waiting.append(granted)
            if self._closed:
                granted.set()
        granted.wait()
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
        """Nobody gets the lock any more. Every thread that waits for it gets Killed."""
        with self._mutex:
            self._closed = True
            for granted in self._waiting:
                granted.set()


class ExtrasCache:
    """What upscalers have made lately, by picture, name and size, whether or not they were interrupted."""

    def __init__(self) -> None:
        self._pictures: dict[tuple[Any, ...], Image.Image] = {}

    def get(self, key: tuple[Any, ...]) -> Image.Image | None:
        return self._pictures.get(key)

    def keep(self, key: tuple[Any, ...], picture: Image.Image, most: int) -> None:
        self._pictures[key] = picture
        while len(self._pictures) > most:
            self._pictures.pop(next(iter(self._pictures)))


class SharedState:
    """A1111's `shared.state`: one object for all requests. It does not show whose job is running."""

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

    def begin(self, job: str = "scripts_txt2img") -> None:
        self.skipped = self.interrupted = False
        self.changed.clear()
        self.job, self.job_count, self.job_no = job, -1, 0
        self.job_timestamp = datetime.now().astimezone().strftime("%Y%m%d%H%M%S")
        self.sampling_step = 0
        self._preview_step, self._preview = 0, None
        self._began = time.monotonic()

    def next_batch(self) -> bool:
        """Whether there is a next batch. An interrupted job has none."""
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
        """The answer of /progress."""
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


class ProcessOwner(WebUIKnobs):
    """What outlives a process: its files on disk (cache.json, config.json), and the loads of all processes."""

    hashes: HashCache
    config_json: Mapping[str, Any] | None
    own_models_dir: Path | None
    loads: list[str]


class Process:
    """One run of the WebUI's process, from its start to its end."""

    def __init__(self, models_dir: Path, version: str, server: ProcessOwner, initial: str | None = None) -> None:
        self.version = version
        self.knobs = server
        self._server = server
        self.tables = add_to_tables(_tables(version), server.extensions)
        self.files = ModelFiles(models_dir, server.hashes, self.tables["upscalers"], server.own_models_dir)
        self.extension_files = ExtensionFiles(models_dir, self.files.own_models_dir)
        self.options = OptionStore(self.tables["options"], server.config_json or {})
        if initial and (checkpoint := self.files.checkpoints.find(initial)):
            self.options.data["sd_model_checkpoint"] = checkpoint.title  # `--ckpt`
        self.model = ModelSlot(
            self.files, self.options, server, self.pause, loses_first_switch=version == "1.9.3", loads=server.loads
        )
        self.active_loras: list[ActiveLora] = []
        self.last_prompts: dict[str, tuple[object, ...]] = {}  # `cached_c` and `cached_uc`: what was encoded last
        self.extras_cache = ExtrasCache()
        self.last_seed = 0  # what the last picture has left in the global random numbers
        self.lock = FifoLock()
        self.state = SharedState()
        self._released = threading.Event()
        self._dead = threading.Event()

    def kill(self) -> None:
        self._dead.set()
        self._released.set()
        self.state.changed.set()
        self.lock.close()

    def pause(self, seconds: float) -> None:
        """Wait; Killed if the process ends meanwhile."""
        if self._dead.wait(seconds) if seconds > 0 else self._dead.is_set():
            raise Killed

    def hang(self) -> None:
        """Wait for `release` or the end of the process. An interrupt has no effect meanwhile, nor later."""
        self._released.wait()
        self._released.clear()
        self.pause(0)
        self.state.interrupted = False

    def release(self) -> None:
        self._released.set()

    @property
    def data(self) -> dict[str, Any]:
        """The options that were ever set."""
        return self.options.data

    def option(self, key: str) -> Any:
        return self.options.get(key)

    def set_options(self, given: Mapping[str, Any]) -> None:
        """`set_config`: sets one after the other, each with immediate effect. An unknown key stops it midway."""
        name = given.get("sd_model_checkpoint")
        if name is not None and self._find_checkpoint(name) is None:
            raise WebUIError("RuntimeError", f"model {name!r} not found")
        for key, value in given.items():
            before = self.data.get(key)
            if not self.options.set(key, value):
                continue
            try:
                if key == "sd_model_checkpoint":
                    with self.lock:
                        self.model.reload_weights()
                elif key == "sd_vae":
                    with self.lock:
                        self.model.reload_vae()
            except WebUIError:  # A1111 prints it on its console, and the caller gets 200
                self.data[key] = before
        self._server.config_json = dict(self.data)

    def _find_checkpoint(self, name: Any) -> CheckpointInfo | None:
        try:
            hash(name)
        except TypeError as error:
            raise WebUIError("TypeError", str(error)) from None
        return self.files.checkpoints.find(name)

    @contextlib.contextmanager
    def job(self, name: str = "scripts_txt2img") -> Iterator[None]:
        """Inside this block /progress shows a job, and /interrupt has an effect."""
        self.state.begin(name)
        try:
            yield
        finally:
            self.state.end()

    def sample(self, steps: int, *, is_adaptive: bool = False) -> int:
        """Take the time of one batch; the number of steps done. An interrupt or a skip makes it smaller.

        An adaptive sampler takes as many steps as it needs, and counts them past those that were asked for.
        """
        state = self.state
        state.sampling_steps, state.sampling_step = steps, 0
        for step in range(5 * steps if is_adaptive else steps):
            state.sampling_step = step
            if self.knobs.step_seconds:
                state.changed.wait(self.knobs.step_seconds)
            if self._dead.is_set():
                raise Killed
            if state.interrupted or state.skipped:
                return step
        return steps


def _preview(size: tuple[int, int], step: int) -> str:
    picture = draw.picture(f"step {step}", max(16, size[0] // 4), max(16, size[1] // 4))
    return base64.b64encode(draw.encode(picture, "", "png")).decode()


@functools.cache
def _tables(version: str) -> Mapping[str, Any]:
    """The recorded tables of a version: samplers, options with their defaults, fields of txt2img …"""
    folder = Path(__file__).parent / "data" / version
    return {path.stem: json.loads(path.read_bytes()) for path in folder.glob("*.json")}

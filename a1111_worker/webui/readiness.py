"""How the WebUI is made ready, and made ready again: it answers, has the defaults set, and the checkpoint is proven.

What A1111 reports is believed only where it was checked (measured on 1.9.3 and 1.10.1):

- A switch is true when POST /options has returned and `sd_checkpoint_hash` equals the SHA-256 of our file, which a
  fresh /sd-models lists under its name. `200 null` proves nothing, a name in /options proves nothing.
- A switch that failed can break the WebUI for good while every GET looks healthy; then only a restart helps, which is
  start.sh's to do: a WebUI that start.sh does not own is never killed.
- override_settings leak into later jobs unless every option a job may override has been set once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from a1111_worker.background import BackgroundCall
from a1111_worker.context import Deadline, JobContext
from a1111_worker.domain import Model, Progress, Stage
from a1111_worker.errors import (
    CheckpointNotLoaded,
    GenerationFailed,
    InvalidRequest,
    JobTimeout,
    RouteMissing,
    WebUIBroken,
    WebUILost,
    WebUINotReady,
    WebUIRefused,
    WebUISilent,
    WorkerError,
)
from a1111_worker.request.schema import OVERRIDABLE_OPTIONS
from a1111_worker.webui.client import WebUI
from a1111_worker.webui.composition import WebUILists
from a1111_worker.webui.supervisor import Ownership, Supervisor

log = logging.getLogger(__name__)

NOBODY_STARTS_IT = (
    "`make demo` runs a job against the sandbox; set WEBUI_URL to a running WebUI, or start both with start.sh"
)


TRIES = 3  # of making a WebUI ready that dies, or has to be restarted, meanwhile

NOTHING_ON_DISK = {"samples_save": False, "grid_save": False}
"""What a script may ask for behind the fields that are refused (`Prompts from file`, X/Y/Z plot): A1111's own settings
have the last word (1.10.1, modules/processing.py and scripts/xyz_grid.py)."""


@dataclass(frozen=True)
class WebUITimings:
    """Every period of the policy, in seconds.

    `unowned_grace`: how long a refused connection is waited for where nobody of ours starts a WebUI. `recovery_pause`:
    between the tries after a bare 404. `interrupt_grace`: how long an interrupted generation may take to answer before
    the WebUI counts as hung; `interrupt_patience`: how long a job that has no time left timings for that. `silence`: how
    long the WebUI may answer nothing at all. `death`: how long a killed one may take to be gone.
    """

    unowned_grace: float = 10.0
    look_every: float = 1.0
    interrupt_every: float = 0.25
    interrupt_grace: float = 30.0
    interrupt_patience: float = 1.0
    recovery_pause: float = 5.0
    silence: float = 30.0
    death: float = 10.0


class Readiness:
    """One WebUI, and whether it may be given a job. `ready_timeout` is seconds for its start, and for a switch.

    What makes it ready runs in a thread of its own: a job that ends meanwhile leaves that under way, and the next one
    timings for the same.
    """

    def __init__(self, webui: WebUI, supervisor: Supervisor, *, ready_timeout: float, timings: WebUITimings) -> None:
        self._webui = webui
        self._supervisor = supervisor
        self._ready_timeout = ready_timeout
        self.timings = timings
        self._ended = Deadline()  # cancelled when the worker ends
        self._preparing: BackgroundCall[None] | None = None
        self._doing = ("waiting for the WebUI", 0.0)  # what the preparation does, and since when
        self._checkpoint: Model | None = None
        self._lists: WebUILists | None = None
        self._proven_life: str | None = None
        self._settings: tuple[str, Mapping[str, Any]] | None = None  # of one life of the WebUI, no job's among them

    @property
    def lists(self) -> WebUILists:
        """What the WebUI has, as of the last time it was made ready."""
        if self._lists is None:
            raise WebUINotReady("the WebUI is not ready yet")
        return self._lists

    @property
    def checkpoint(self) -> Model:
        assert self._checkpoint is not None, "prepare comes first"
        return self._checkpoint

    @property
    def is_started_by_us(self) -> bool:
        """Whether somebody of ours is starting a WebUI, so that waiting for it makes sense."""
        return self._supervisor.ownership in (Ownership.RUNNING, Ownership.RESTARTING)

    @property
    def is_proven(self) -> bool:
        """Whether this very process has the checkpoint and the settings that were proven, as far as anyone knows."""
        return self._proven_life == self._supervisor.life

    @property
    def is_preparing(self) -> bool:
        """Whether it is being made ready, by a job or for the next one."""
        return self._preparing is not None and not self._preparing.is_done()

    @property
    def is_given_up(self) -> bool:
        """Whether start.sh has given up on the WebUI."""
        return self._supervisor.ownership is Ownership.FAILED

    def close(self) -> None:
        """End what is still under way, as soon as it looks."""
        self._ended.cancel()

    def invalidate(self) -> None:
        """Whoever comes next makes it ready again."""
        self._proven_life = None

    def wait_until_up(self, deadline: Deadline) -> None:
        """Return when the API answers; WebUINotReady when it does not in time, or nobody will ever start it.

        One of ours that takes a request and says nothing is restarted.
        """
        limit = deadline.within(self._ready_timeout, what="the WebUI's start")
        began = said = time.monotonic()
        pause = 0.1
        while True:
            try:
                self._webui.progress(timeout=self.timings.silence)
                return
            except WebUISilent as error:
                self.restart(error.message)
            except WebUILost as error:
                self._give_up_where_hopeless(error, waited=time.monotonic() - began)
            except RouteMissing:
                pass  # the port is open before the routes are there
            if time.monotonic() - said >= 20.0:
                said = time.monotonic()
                log.info("still waiting for the WebUI, %.0f s", said - began)
            try:
                limit.wait(pause)
            except JobTimeout as error:
                deadline.check()
                raise WebUINotReady(
                    f"the WebUI did not answer within {self._ready_timeout:.0f} s", hint=NOBODY_STARTS_IT
                ) from error
            pause = min(0.25, pause * 1.5)

    def _give_up_where_hopeless(self, error: WebUILost, *, waited: float) -> None:
        ownership = self._supervisor.ownership
        if ownership is Ownership.FAILED:
            why = self._supervisor.failure
            raise WebUINotReady(
                f"the WebUI could not be started{why and f': {why}'}", hint="its log says why"
            ) from error
        if ownership is Ownership.NOBODY and isinstance(error, WebUIRefused) and waited >= self.timings.unowned_grace:
            raise WebUINotReady(
                f"no WebUI listens at {self._webui.url} and nothing is starting one", hint=NOBODY_STARTS_IT
            ) from error

    def prepare(self, checkpoint: Model, context: JobContext) -> None:
        """Bring the WebUI to the point of generating with this checkpoint."""
        self._checkpoint = checkpoint
        self.invalidate()
        self.ensure_ready(context)

    def ensure_ready(self, context: JobContext) -> None:
        """A proven WebUI: at once where nothing has happened to it, else when it was made ready again."""
        if self.is_proven:
            return
        with context.timings.measure(Stage.SWITCH):
            call = self._preparing
            if call is None or call.is_done():
                call = self._preparing = BackgroundCall(self._make_ready, name="webui-call")
            while not call.wait(self.timings.look_every, context.deadline):
                context.deadline.check()
                what, since = self._doing
                context.report(Progress(Stage.SWITCH, detail=f"{what}, {time.monotonic() - since:.0f} s so far"))
            call.result()

    def check_idle(self) -> bool:
        """Whether an idle WebUI answers. A silent one is restarted, one that is gone is made ready by the next job."""
        if self.is_preparing:
            return False
        try:
            self._webui.progress(timeout=self.timings.silence)
        except WebUISilent as error:
            self.restart(f"idle: {error.message}")
            return False
        except WebUILost:
            self.invalidate()
            return False
        except WorkerError:
            return False
        return True

    def restart(self, why: str) -> bool:
        """Kill a WebUI of ours, so that start.sh starts another; False where it is not ours to kill."""
        self.invalidate()
        if not self._supervisor.kill(wait=self.timings.death):
            return False
        log.warning("the WebUI was killed to be restarted: %s", why)
        return True

    def free_memory(self) -> None:
        """Put the weights out of the GPU's memory and back, which also frees what an out-of-memory left behind."""
        try:
            self._webui.unload_checkpoint()
            self._webui.reload_checkpoint()
            log.info("the checkpoint was unloaded and loaded again to free the GPU's memory")
        except WorkerError as error:
            # Its weights may be anywhere by now, while every GET looks healthy.
            self.restart(f"the GPU's memory could not be freed: {error.message}")

    # -- in the thread that makes it ready

    def _make_ready(self) -> None:
        """One that dies meanwhile is waited for again; one of ours that hangs, or cannot prove its checkpoint, is
        restarted."""
        for is_last in (*(False,) * (TRIES - 1), True):
            try:
                self._now("waiting for the WebUI")
                self.wait_until_up(self._ended)
                life = self._supervisor.life
                self._prepare(self.checkpoint, life)
                self._proven_life = life
                if not self.is_proven:
                    raise WebUILost("the WebUI was restarted while it was made ready")
                return
            except WebUISilent as error:
                error.refresh_worker = not self.restart(error.message)
                if is_last or error.refresh_worker:
                    raise
            except WebUILost as error:
                if is_last or self.is_given_up:
                    raise
                log.warning("the WebUI was lost while it was made ready: %s", error.message)
            except CheckpointNotLoaded as error:
                if is_last or not self.restart(error.message):
                    raise

    def _now(self, what: str) -> None:
        self._doing = (what, time.monotonic())

    def _prepare(self, checkpoint: Model, life: str) -> None:
        if self._webui.flags().get("no_hashing"):
            raise CheckpointNotLoaded(
                "the WebUI computes no hashes, so nothing can be proven", hint="leave --no-hashing out of WEBUI_ARGS"
            )
        self._lists = self._read_lists()
        self._load(checkpoint)
        # After the switch: setting `sd_vae` makes a WebUI without a checkpoint load the first one of its list.
        self._settle_settings(life)

    def _settle_settings(self, life: str) -> None:
        """What jobs may override is set to its default, or A1111 would not restore it; what a script left behind (an
        axis of an X/Y/Z plot overrides settings that no job may) is what it was when this life began."""
        wanted: dict[str, Any] = {
            key: setting.default for key, setting in OVERRIDABLE_OPTIONS.items()
        } | NOTHING_ON_DISK
        now = self._webui.options()
        if self._settings is not None and self._settings[0] == life:
            wanted |= {key: value for key, value in self._settings[1].items() if now.get(key) != value}
        self._webui.set_options(wanted, timeout=self._ready_timeout)
        if self._settings is None or self._settings[0] != life:
            ours = ("sd_model_checkpoint", "sd_checkpoint_hash")
            self._settings = (life, {key: value for key, value in now.items() if key not in wanted and key not in ours})

    def _read_lists(self) -> WebUILists:
        upscalers = [*self._webui.latent_upscale_modes(), *self._webui.upscalers()]
        return WebUILists(
            samplers=self._webui.samplers(),
            schedulers=self._webui.schedulers(),
            upscalers=tuple(str(upscaler["name"]) for upscaler in upscalers),
            scripts=tuple(self._webui.scripts().get("txt2img", ())),
            styles={str(style["name"]): style for style in self._webui.styles()},
            vaes=("Automatic", "None", *(str(vae["model_name"]) for vae in self._webui.vaes())),
        )

    def _load(self, checkpoint: Model) -> None:
        entry = self._listed(checkpoint)
        if entry is None:
            self._webui.refresh_checkpoints()
            entry = self._listed(checkpoint)
        if entry is None:
            raise CheckpointNotLoaded(
                f"the WebUI does not list {checkpoint.file}",
                hint="the WebUI must be started on WEBUI_MODELS_DIR, as start.sh does",
            )
        if self._is_loaded(checkpoint, entry):
            log.info("the checkpoint %s is loaded already", checkpoint.name)
            return
        began = time.monotonic()
        self._now(f"loading {checkpoint.name}")
        self._switch(checkpoint, str(entry["title"]))
        limit = self._ended.within(self._ready_timeout)
        while not self._is_loaded(checkpoint, self._listed(checkpoint)):
            # One that is loading it already answers the switch at once; one that failed has its old name again.
            if not self._is_named(checkpoint):
                raise CheckpointNotLoaded(
                    f"the WebUI said it loaded {checkpoint.name}, and its hash says that it did not"
                )
            if limit.remaining() == 0.0:
                raise CheckpointNotLoaded(f"the WebUI did not load {checkpoint.name} in {self._ready_timeout:.0f} s")
            self._ended.wait(self.timings.interrupt_every)
        log.info("switched to %s in %.1f s, proven by its hash", checkpoint.name, time.monotonic() - began)

    def _switch(self, checkpoint: Model, title: str) -> None:
        call = BackgroundCall(
            lambda: self._webui.set_options({"sd_model_checkpoint": title}, timeout=self._ready_timeout),
            name="webui-call",
        )
        heard = time.monotonic()
        while not call.wait(self.timings.look_every, self._ended):
            self._ended.check()
            try:
                self._webui.progress()
                heard = time.monotonic()
            except WorkerError:  # a look is short, and loading holds up others for seconds
                if time.monotonic() - heard > self.timings.silence:
                    raise WebUISilent("the WebUI hangs: it answers nothing while it switches") from None
        try:
            call.result()
        except WebUIBroken:
            raise
        except InvalidRequest as error:
            raise CheckpointNotLoaded(f"the WebUI refused to load {checkpoint.name}") from error
        except GenerationFailed as error:
            raise CheckpointNotLoaded(f"the WebUI could not load {checkpoint.name}: {error.message}") from error

    def _listed(self, checkpoint: Model) -> Mapping[str, Any] | None:
        """Our checkpoint in a fresh /sd-models, whose titles are `file` or `file [hash]`."""
        for entry in self._webui.checkpoints():
            if str(entry["title"]).partition(" [")[0] == checkpoint.file:
                return entry
        return None

    def _is_named(self, checkpoint: Model) -> bool:
        """Whether the options name our checkpoint: it is loaded, or being loaded."""
        name = str(self._webui.options().get("sd_model_checkpoint")).partition(" [")[0]
        return name in (checkpoint.file, checkpoint.stem)

    def _is_loaded(self, checkpoint: Model, listed: Mapping[str, Any] | None) -> bool:
        if listed is None or listed["sha256"] != checkpoint.sha256:
            return False
        return bool(self._webui.options().get("sd_checkpoint_hash") == checkpoint.sha256)

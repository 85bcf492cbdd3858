"""Whether the WebUI may get a job, and its preparation: it answers, its checkpoint is verified, its options are reset.

A switch that failed can break the WebUI for good while every GET looks healthy (measured on 1.9.3 and 1.10.1). Then
only a restart helps, which is start.sh's task: a WebUI that start.sh does not own is never killed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from a1111_worker.background import BackgroundCall
from a1111_worker.context import Deadline, JobContext
from a1111_worker.domain import Model, Progress, Stage, Task
from a1111_worker.errors import (
    CheckpointNotLoaded,
    Complaint,
    InvalidRequest,
    JobTimeout,
    RouteMissing,
    WebUILost,
    WebUINotReady,
    WebUIRefused,
    WebUISilent,
    WorkerError,
)
from a1111_worker.webui.checkpoint import CheckpointSwitch, checkpoint_names, title_of
from a1111_worker.webui.client import WebUI
from a1111_worker.webui.extensions import read_lists
from a1111_worker.webui.faces import usable_restorers
from a1111_worker.webui.options import OptionsReset
from a1111_worker.webui.owner import OwnersOptions
from a1111_worker.webui.resolution import WebUILists, missing_upscaler
from a1111_worker.webui.responses import WebUIFlags
from a1111_worker.webui.supervisor import Ownership, Supervisor
from a1111_worker.webui.timings import WebUITimings
from a1111_worker.webui.upscalers import UpscalerProofs

log = logging.getLogger(__name__)

HOW_TO_START = (
    "`make demo` runs a job against the sandbox; set WEBUI_URL to a running WebUI, or start both with start.sh"
)

MAX_ATTEMPTS = 3  # to prepare a WebUI that dies, or has to be restarted, meanwhile


class Readiness:
    """One WebUI, and whether it may get a job. `ready_timeout` is seconds for its start, and for a switch.

    `owner` keeps the options of a WebUI that somebody else runs, and may use meanwhile; None if the WebUI is ours.

    The preparation runs in a thread of its own. If a job ends meanwhile, the preparation goes on, and the next job
    waits for it.
    """

    def __init__(
        self,
        webui: WebUI,
        supervisor: Supervisor,
        *,
        ready_timeout: float,
        timings: WebUITimings,
        owner: OwnersOptions | None = None,
    ) -> None:
        self._webui = webui
        self._supervisor = supervisor
        self._ready_timeout = ready_timeout
        self.timings = timings
        self._worker_end = Deadline()  # cancelled when the worker ends
        self._preparation: BackgroundCall[None] | None = None
        self._step = _Step("waiting for the WebUI")
        self._checkpoint: Model | None = None  # that the next generation needs
        self._own_checkpoint: Model | None = None
        self._preparing = ""  # the title of the one that a preparation loads
        self._lists: WebUILists | None = None
        self._is_ours = owner is None
        self._options = OptionsReset(webui, owner)
        self._upscaler_proofs = UpscalerProofs(webui, timeout=timings.silence)
        # The WebUI's process that is ready, and the title of its checkpoint: two files may have the same content.
        self._ready: tuple[str, str] | None = None

    @property
    def lists(self) -> WebUILists:
        """What the WebUI has, as of its last preparation."""
        if self._lists is None:
            raise WebUINotReady("the WebUI is not ready yet")
        return self._lists

    @property
    def checkpoint(self) -> Model:
        """The checkpoint that the WebUI has loaded, or is loading."""
        assert self._checkpoint is not None, "prepare comes first"
        return self._checkpoint

    @property
    def own_checkpoint(self) -> Model:
        """The worker's own checkpoint, which a job uses if it names none."""
        assert self._own_checkpoint is not None, "prepare comes first"
        return self._own_checkpoint

    @property
    def is_started_by_us(self) -> bool:
        """Whether start.sh starts the WebUI, so that waiting for it makes sense."""
        return self._supervisor.ownership is Ownership.START_SH

    @property
    def is_ready(self) -> bool:
        """Whether this process of the WebUI has the verified checkpoint and the reset options, as far as is known."""
        wanted = self._checkpoint
        return wanted is not None and self._ready == (self._supervisor.instance_id, title_of(wanted))

    @property
    def instance_id(self) -> str:
        """Names this process of the WebUI."""
        return self._supervisor.instance_id

    @property
    def is_preparing(self) -> bool:
        """Whether a preparation runs, for a job that waits or for the next one."""
        return self._preparation is not None and not self._preparation.is_done()

    @property
    def is_given_up(self) -> bool:
        """Whether start.sh has given up on the WebUI."""
        return self._supervisor.ownership is Ownership.GIVEN_UP

    def close(self) -> None:
        """End a preparation that still runs, as soon as it checks for this. Give the WebUI back to its owner."""
        self._worker_end.cancel()
        if self._is_ours:
            return
        if self._preparation is not None and not self._preparation.wait(self.timings.interrupt_patience, Deadline()):
            log.warning("the WebUI keeps this worker's settings until its next start: it is being prepared")
            return
        try:
            self._options.put_back()
        except WorkerError as error:
            log.warning("the WebUI keeps this worker's settings until its next start: %s", error.message)

    def invalidate(self) -> None:
        """Have the next job prepare the WebUI again."""
        self._ready = None

    def expect_script(self) -> None:
        """A script runs now: it may leave settings behind that no job may override, so the next job prepares again."""
        self._options.expect_changes()
        self.invalidate()

    def wait_until_up(self, deadline: Deadline) -> None:
        """Return when the API answers. Raises WebUINotReady if it does not in time, or nobody will ever start it.

        If start.sh owns the WebUI, and it takes a request and does not answer, it is restarted.
        """
        limit = deadline.within(self._ready_timeout, what="the WebUI's start")
        began = logged = time.monotonic()
        pause = 0.1
        while not self._is_up(waited=time.monotonic() - began):
            if time.monotonic() - logged >= 20.0:
                logged = time.monotonic()
                log.info("still waiting for the WebUI, %.0f s", logged - began)
            try:
                limit.wait(pause)
            except JobTimeout as error:
                deadline.check()
                raise WebUINotReady(
                    f"the WebUI did not answer within {self._ready_timeout:.0f} s", hint=HOW_TO_START
                ) from error
            pause = min(0.25, pause * 1.5)

    def prepare(self, checkpoint: Model, context: JobContext) -> None:
        """Prepare the WebUI for generating with this checkpoint."""
        self._checkpoint = self._own_checkpoint = checkpoint
        self.invalidate()
        self.ensure_ready(context)

    def ensure_ready(self, context: JobContext, checkpoint: Model | None = None) -> None:
        """Return when the WebUI is ready with a checkpoint: at once if nothing has happened to it and it has this one.

        Else after another preparation. Without a checkpoint the one that is loaded stays. If somebody else runs the
        WebUI, it may have been changed at any time: so its options are looked at.
        """
        self._checkpoint = checkpoint or self.checkpoint
        if self.is_ready and self._is_ours:
            return
        with context.times.measure(Stage.SWITCH):
            preparation = self._preparation
            if preparation is not None and self._preparing != title_of(self.checkpoint):
                self._wait_for(preparation, context)  # it is of a job that was cancelled, and its errors are that job's
                preparation = None
            if preparation is None or preparation.is_done():
                prepare = self._prepare_if_changed if self.is_ready else self._prepare
                self._preparing = title_of(self.checkpoint)
                preparation = self._preparation = BackgroundCall(prepare, name="webui-call")
            self._wait_for(preparation, context)
            preparation.result()

    def _wait_for(self, preparation: BackgroundCall[None], context: JobContext) -> None:
        while not preparation.wait(self.timings.progress_interval, context.deadline):
            context.deadline.check()
            context.report(Progress(Stage.SWITCH, detail=str(self._step)))

    def prove_upscalers(self, wanted: Iterable[tuple[str, str]]) -> None:
        """Return if all of them work, each as (path in the job, name). Only while the WebUI is ready and idle.

        InvalidRequest names those that do not. They are not listed any more.
        """
        try:
            failed = [(path, name) for path, name in wanted if not self._upscaler_proofs.check(name)]
        except WebUISilent as error:
            raise WebUILost(error.message, refresh_worker=not self.restart(error.message)) from error
        if failed:
            broken = self._upscaler_proofs.broken
            lists = self.lists
            self._lists = replace(
                lists,
                upscalers=tuple(name for name in lists.upscalers if name not in broken),
                missing_upscalers=tuple(sorted({*lists.missing_upscalers, *broken})),
            )
            raise InvalidRequest(
                [Complaint(path, missing_upscaler(name, self.lists.upscalers)) for path, name in failed]
            )

    def check_idle(self) -> bool:
        """Whether an idle WebUI answers. If it is silent, it is restarted; if it is gone, the next job prepares it."""
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

    def find_interrupted_job(self) -> str | None:
        """The job that somebody has interrupted, if it was the last one; None if the WebUI is ours.

        A single picture that was interrupted looks finished. A1111 tells of it until its next job begins.
        """
        if self._is_ours:
            return None
        try:
            return self._webui.progress().interrupted_job
        except WorkerError:
            return None

    def restart(self, reason: str) -> bool:
        """Kill the WebUI, so that start.sh starts another one. False if start.sh does not own the WebUI."""
        self.invalidate()
        if not self._supervisor.kill(wait=self.timings.death):
            return False
        log.warning("the WebUI was killed to be restarted: %s", reason)
        return True

    def free_memory(self) -> None:
        """Move the weights out of the GPU's memory and back, which also frees what an out-of-memory left behind."""
        try:
            self._webui.unload_checkpoint()
            self._webui.reload_checkpoint()
            log.info("the checkpoint was unloaded and loaded again to free the GPU's memory")
        except WorkerError as error:
            # Its weights may be anywhere by now, while every GET looks healthy.
            self.restart(f"the GPU's memory could not be freed: {error.message}")

    def _is_up(self, *, waited: float) -> bool:
        """Whether the API answers. Raises WebUINotReady if it never will; `waited` is the seconds so far."""
        try:
            self._webui.progress(timeout=self.timings.silence)
            return True
        except WebUISilent as error:
            self.restart(error.message)
        except WebUILost as error:
            self._raise_if_hopeless(error, waited)
        except RouteMissing:
            pass  # the port is open before the routes are there
        return False

    def _raise_if_hopeless(self, error: WebUILost, waited: float) -> None:
        ownership = self._supervisor.ownership
        if ownership is Ownership.GIVEN_UP:
            why = self._supervisor.failure
            reason = f": {why}" if why else ""
            raise WebUINotReady(f"the WebUI could not be started{reason}", hint="its log says why") from error
        if ownership is Ownership.NOBODY and isinstance(error, WebUIRefused) and waited >= self.timings.unowned_grace:
            raise WebUINotReady(
                f"no WebUI listens at {self._webui.url} and nothing is starting one", hint=HOW_TO_START
            ) from error

    # -- the preparation, in its own thread

    def _prepare_if_changed(self) -> None:
        try:
            if self._options.are_unchanged():
                return
            log.info("somebody has changed the WebUI's checkpoint or settings; it is prepared again")
        except WorkerError as error:
            log.warning("the WebUI's settings cannot be read: %s; it is prepared again", error.message)
        self.invalidate()
        self._prepare()

    def _prepare(self) -> None:
        """Prepare the WebUI, in a few attempts.

        A WebUI that dies meanwhile is waited for again. One that hangs, or does not have the verified checkpoint at the
        end, is restarted if start.sh owns it.
        """
        for attempt in range(1, MAX_ATTEMPTS + 1):
            is_last = attempt == MAX_ATTEMPTS
            try:
                self._prepare_once()
                return
            except WebUISilent as error:
                error.refresh_worker = not self.restart(error.message)
                if is_last or error.refresh_worker:
                    raise
            except WebUILost as error:
                if is_last or self.is_given_up:
                    raise
                log.warning("the WebUI was lost during its preparation: %s", error.message)
            except CheckpointNotLoaded as error:
                if is_last or not self.restart(error.message):
                    raise

    def _prepare_once(self) -> None:
        self._step = _Step("waiting for the WebUI")
        self.wait_until_up(self._worker_end)
        instance = self._supervisor.instance_id
        flags = self._webui.flags()
        if flags.no_hashing:
            raise CheckpointNotLoaded(
                "the WebUI computes no hashes, so nothing can be proven", hint="leave --no-hashing out of WEBUI_ARGS"
            )
        checkpoint = self.checkpoint  # the next job may want another one meanwhile, if this one's is cancelled
        self._lists = self._read_lists(flags, instance)
        self._options.begin(checkpoint, self._lists.restorer)
        self._step = _Step(f"loading {checkpoint.name}")
        self._ready = None
        switch = CheckpointSwitch(self._webui, checkpoint, timeout=self._ready_timeout, timings=self.timings)
        switch.run(self._worker_end)
        # After the switch: setting `sd_vae` makes a WebUI without a checkpoint load the first one of its list.
        self._options.run(instance, timeout=self._ready_timeout)
        self._ready = instance, title_of(checkpoint)
        if instance != self._supervisor.instance_id:
            raise WebUILost("the WebUI was restarted during its preparation")

    def _choose_restorer(self, usable: Sequence[str]) -> str:
        """The restorer of faces for jobs that name none: A1111's setting, unless only another one has its files."""
        restorer = str(self._webui.options().values.get("face_restoration_model") or "")
        return usable[0] if usable and restorer not in usable else restorer

    def _read_lists(self, flags: WebUIFlags, instance: str) -> WebUILists:
        upscalers, scripts, axes = self._webui.upscalers(), self._webui.scripts(), self._webui.script_axes()
        self._upscaler_proofs.begin(instance, [upscaler.name for upscaler in upscalers if upscaler.has_file])
        broken = self._upscaler_proofs.broken
        usable = {upscaler.name for upscaler in upscalers if upscaler.is_there and upscaler.name not in broken}
        restorers = usable_restorers(flags) if self._is_ours else None
        return WebUILists(
            samplers=self._webui.samplers(),
            schedulers=self._webui.schedulers(),
            latent_upscalers=self._webui.latent_upscale_modes(),
            upscalers=tuple(upscaler.name for upscaler in upscalers if upscaler.name in usable),
            missing_upscalers=tuple(upscaler.name for upscaler in upscalers if upscaler.name not in usable),
            scripts=scripts[Task.TXT2IMG],
            script_axes=axes[Task.TXT2IMG],
            img2img_scripts=scripts[Task.IMG2IMG],
            img2img_script_axes=axes[Task.IMG2IMG],
            styles={style.name: style for style in self._webui.styles()},
            vaes=("Automatic", "None", *self._webui.vaes()),
            checkpoint_names=checkpoint_names(self.own_checkpoint),
            restorer=self._choose_restorer(restorers or ()),
            face_restorers=restorers,
            extensions=read_lists(self._webui, scripts[Task.TXT2IMG], flags),
        )


@dataclass(frozen=True)
class _Step:
    """What the preparation does, and since when."""

    what: str
    began: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return f"{self.what}, {time.monotonic() - self.began:.0f} s so far"

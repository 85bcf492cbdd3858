"""Loads the checkpoint: once if A1111 allows that, and checked by its hash.

After a start, nothing in /options shows that a model is loaded: title and hash may come from config.json. POST /options
does nothing if the option has that very text already. And as long as nothing is loaded, 1.9.3 loses a switch: 200 null,
and the option has its old value again. POST /reload-checkpoint works on both versions: it loads the checkpoint that the
option names (else the first of the list), waits if that is being loaded, and does nothing if one is loaded (measured on
1.9.3 and 1.10.1; modules/sd_models.py, `get_sd_model`).

The hash shows what A1111 believes. The proof is a picture: its `info` names the checkpoint that made it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from a1111_worker.context import Deadline
from a1111_worker.domain import Model
from a1111_worker.errors import CheckpointNotLoaded, GenerationFailed, InvalidRequest
from a1111_worker.webui.client import WebUI
from a1111_worker.webui.responses import ListedCheckpoint
from a1111_worker.webui.running import RunningRequest
from a1111_worker.webui.timings import WebUITimings

log = logging.getLogger(__name__)


def file_loaded_from_cold(named: str | None, listed: Sequence[ListedCheckpoint]) -> str | None:
    """The file that A1111 loads first, if its option holds the text `named`; None if it lists no checkpoint.

    A text that names no listed file means the first of the list (`select_checkpoint`): for example a title with
    a hash that A1111 does not know any more.
    """
    chosen = next((entry for entry in listed if named in entry.names), next(iter(listed), None))
    return chosen.file if chosen else None


def title_of(model: Model) -> str:
    """The title under which A1111 lists a checkpoint whose hash it knows."""
    return f"{model.shown_file} [{model.sha256[:10]}]"


def checkpoint_names(model: Model) -> tuple[str, ...]:
    """The texts by which A1111's clients name a checkpoint, in lower case: its title first, with a hash as A1111 shows.

    A client may keep any of them: the whole title, the title without its hash, the file, its stem, a hash.
    """
    short_hash = model.sha256[:10]
    files = dict.fromkeys((model.shown_file, model.file))
    stems = [file.removesuffix(".safetensors") for file in files]
    titles = [f"{name} [{short_hash}]" for name in (*files, *stems)]
    return tuple(form.casefold() for form in (*titles, *files, *stems, model.name, short_hash, model.sha256))


def listed_title(model: Model, listed: Sequence[ListedCheckpoint]) -> str:
    """The title under which A1111 lists a checkpoint now: without a hash as long as it has not loaded it.

    Any other text may mean another file: A1111 takes the shortest title that the text is a part of (1.9.3 and 1.10.1).
    Raises CheckpointNotLoaded if the file is not listed, or has another hash.
    """
    entry = next((entry for entry in listed if entry.file == model.shown_file), None)
    if entry is None:
        raise _not_listed(model)
    if entry.sha256 not in (None, model.sha256):
        raise CheckpointNotLoaded(f"the WebUI has another file than {model.name} under its name")
    return entry.title


def _not_listed(model: Model) -> CheckpointNotLoaded:
    return CheckpointNotLoaded(
        f"the WebUI does not list {model.shown_file}",
        hint="the WebUI must be started on WEBUI_MODELS_DIR, as start.sh does",
    )


class CheckpointSwitch:
    """Loads `checkpoint` into the WebUI. `timeout` is seconds for one load."""

    def __init__(self, webui: WebUI, checkpoint: Model, *, timeout: float, timings: WebUITimings) -> None:
        self._webui = webui
        self._checkpoint = checkpoint
        self._timeout = timeout
        self._timings = timings

    def run(self, deadline: Deadline) -> None:
        """Load the checkpoint, and return when its hash says that it is loaded.

        Raises CheckpointNotLoaded if the WebUI does not list the file, or does not load it; WebUIBroken if the switch
        has broken the WebUI; WebUISilent if the WebUI hangs.
        """
        began = time.monotonic()
        self._webui.refresh_checkpoints()
        named = self._webui.options().checkpoint  # before the list: a title that gets its hash now is found there
        listed = self._webui.checkpoints()
        ours = self._find(listed)
        if ours is None:
            raise _not_listed(self._checkpoint)
        steps: tuple[Callable[[Deadline], None], ...] = (self._reload, self._switch)
        if file_loaded_from_cold(named, listed) != ours.file:
            # The switch first: 1.10.1 loads nothing else then. 1.9.3 may lose it, and has to load another one before.
            steps = (self._switch, *steps)
        for step in steps:
            step(deadline)
            if self._is_loaded():
                log.info("%s is loaded after %.1f s", self._checkpoint.name, time.monotonic() - began)
                return
        raise CheckpointNotLoaded(
            f"the WebUI reported {self._checkpoint.name} as loaded, but its hash shows that it is not"
        )

    def _reload(self, deadline: Deadline) -> None:
        self._run(lambda: self._webui.reload_checkpoint(timeout=self._timeout), deadline)

    def _switch(self, deadline: Deadline) -> None:
        # By the name that the option does not hold now: if the option does not change, nothing is loaded.
        names = (self._checkpoint.shown_file, self._checkpoint.shown)
        name = names[self._webui.options().checkpoint == names[0]]
        self._run(lambda: self._webui.set_options({"sd_model_checkpoint": name}, timeout=self._timeout), deadline)

    def _run(self, load: Callable[[], None], deadline: Deadline) -> None:
        request = RunningRequest(self._webui, load, activity="loads a checkpoint", timings=self._timings)
        if not request.wait(deadline):
            deadline.check()
        try:
            request.result()
        except InvalidRequest as error:
            raise CheckpointNotLoaded(f"the WebUI refused to load {self._checkpoint.name}") from error
        except GenerationFailed as error:
            raise CheckpointNotLoaded(f"the WebUI could not load {self._checkpoint.name}: {error.message}") from error

    def _is_loaded(self) -> bool:
        """Whether A1111 reports our file's hash as that of the loaded checkpoint, and of the file under our name."""
        ours = self._find(self._webui.checkpoints())
        if ours is None or ours.sha256 != self._checkpoint.sha256:
            return False
        return self._webui.options().checkpoint_sha256 == self._checkpoint.sha256

    def _find(self, listed: Sequence[ListedCheckpoint]) -> ListedCheckpoint | None:
        return next((entry for entry in listed if entry.file == self._checkpoint.shown_file), None)

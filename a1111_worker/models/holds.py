"""Holds: a model that any worker uses is not evicted.

    .holds/x.safetensors.<owner>      hold: the owner uses the model
    .holds/x.safetensors.evicting     claim: a worker is evicting the model

A worker that holds writes its hold first, and then looks for a claim. A worker that evicts writes its claim first, and
then looks for holds. So at least one of the two sees the other, and the evicting one gives way. How a dead owner is
known: liveness.py.

A volume that is full may refuse new files. Then models are evicted without a claim, because nothing else makes room.
That a holder finds its model is certain without a claim too: the evicting worker looks for holds again after it has
taken the model's name away (cache.py), and the holder looks for the model after it has written its hold. If a hold
cannot be written either, the model may be evicted. So a job looks at its models again before it generates (manager.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from a1111_worker.context import Deadline
from a1111_worker.files import VolumeState, create_empty, error_name, names_in, volume_error, volume_state
from a1111_worker.heartbeat import Heartbeat
from a1111_worker.models.liveness import LivenessMonitor
from a1111_worker.models.names import short_name

log = logging.getLogger(__name__)

EVICTING = "evicting"


class Holds:
    """The models that one owner uses, and a look at those that others use.

    A call to the volume may take long. None is made while a lock is held that another model needs. `poll` is the
    seconds between two looks at a claim. `touch` gives a hold a new time.
    """

    def __init__(
        self,
        owner: str,
        heartbeat: Heartbeat,
        liveness: LivenessMonitor,
        *,
        poll: float = 0.01,
        touch: Callable[[Path], None] = os.utime,
    ) -> None:
        self.owner = owner
        self._heartbeat = heartbeat
        self._liveness = liveness
        self._poll = poll
        self._touch_file = touch
        self._own: dict[Path, _OwnHold] = {}
        self._lock = threading.Lock()  # guards the dict alone, never a call to the volume
        heartbeat.add_listener(self._touch)

    def close(self) -> None:
        """Release everything."""
        self._heartbeat.remove_listener(self._touch)
        with self._lock:
            own = list(self._own.items())
        for path, hold in own:
            with hold.lock:
                hold.users = 1
                self._drop_user(path, hold)

    def hold(self, folder: Path, file: str, deadline: Deadline) -> None:
        """Keep a model from being evicted. Only after this, look whether it is (still) there."""
        path = self._path(folder, file)
        while not self._add_user(path):
            pass  # another thread has just released it for the last time
        claim = _claim_path(folder, file)
        try:
            while self._liveness.is_alive(claim):
                deadline.wait(self._poll)
        except BaseException:
            self.release(folder, file)
            raise

    def release(self, folder: Path, file: str) -> None:
        """End one `hold` of a model. Other jobs of this owner may still hold it."""
        path = self._path(folder, file)
        with self._lock:
            hold = self._own.get(path)
        if hold is not None:
            with hold.lock:
                self._drop_user(path, hold)

    def held(self, folder: Path) -> set[str]:
        """The files of a folder that anybody alive uses, as `short_name` has them.

        The owner's own are known without a look at the folder. Raises VolumeFailed if it cannot be listed: then any
        model may be in use.
        """
        with self._lock:
            own = {path.name.removesuffix(f".{self.owner}") for path in self._own if path.parent == folder}
        return own | {file for file, owner in self._living(folder, names_in(folder)) if owner != EVICTING}

    def is_held(self, folder: Path, file: str) -> bool:
        """Whether anybody alive uses a model. Raises VolumeFailed if that cannot be found out."""
        return short_name(file) in self.held(folder)

    @contextlib.contextmanager
    def claim(self, folder: Path, file: str) -> Iterator[bool]:
        """The right to evict a model while the block lasts. False if anybody uses it, or is evicting it too.

        Raises VolumeFailed if that cannot be found out.
        """
        claim = _claim_path(folder, file)
        self._liveness.remove_if_dead(claim)
        is_written = True
        try:
            folder.mkdir(exist_ok=True)  # somebody may have removed it
            create_empty(claim, exclusive=True)
        except FileExistsError:
            yield False
            return
        except OSError as error:
            if volume_state(error) is not VolumeState.FULL:
                raise volume_error(error, "claiming a model") from error
            log.warning("evicting %s without a claim: the volume takes no new file (%s)", file, error_name(error))
            is_written = False
        try:
            yield not self.is_held(folder, file)
        finally:
            if is_written:
                with contextlib.suppress(OSError):
                    claim.unlink()

    def others(self, folder: Path) -> list[Path]:
        """The holds and claims of other owners that are not known to be dead."""
        names = names_in(folder)
        return [folder / f"{file}.{owner}" for file, owner in self._living(folder, names) if owner != self.owner]

    def watch(self, folder: Path) -> None:
        """Look at everybody's holds, and remove those of dead owners, so that they are known when room is needed."""
        names = names_in(folder)
        self._liveness.forget_missing(folder, set(names))
        for _ in self._living(folder, names):
            pass

    def _path(self, folder: Path, file: str) -> Path:
        return folder / f"{short_name(file)}.{self.owner}"

    def _living(self, folder: Path, names: list[str]) -> Iterator[tuple[str, str]]:
        """Every hold and claim of the living among `names` as (file, owner). Those of the dead are removed."""
        for name in names:
            file, _, owner = name.rpartition(".")
            if owner != self.owner and self._liveness.is_dead(folder / name):
                self._liveness.remove_if_dead(folder / name)
            else:
                yield file, owner

    # -- this owner's holds

    def _add_user(self, path: Path) -> bool:
        """Have the hold on disk, with one user more. False if it ended in the meantime."""
        with self._lock:
            hold = self._own.setdefault(path, _OwnHold())
        with hold.lock:
            if hold.is_over:
                return False
            # Also if it has users already: another worker may have thought this one dead, and removed its hold.
            _make(path)
            hold.users += 1
            return True

    def _drop_user(self, path: Path, hold: _OwnHold) -> None:
        """End one use; with the last one the hold goes. The caller has the hold's lock."""
        if hold.is_over:
            return
        hold.users -= 1
        if not hold.users:
            with contextlib.suppress(OSError):
                path.unlink()
            hold.is_over = True
            with self._lock:
                del self._own[path]

    def _touch(self) -> None:
        with self._lock:
            own = list(self._own.items())
        for path, hold in own:
            try:
                self._touch_file(path)
            except OSError:
                # Another worker thought this one dead, or the model was released meanwhile. If the lock is taken, a
                # thread is making or removing the hold at this moment.
                if hold.lock.acquire(blocking=False):
                    try:
                        if hold.users:
                            _make(path)
                    finally:
                        hold.lock.release()


class _OwnHold:
    """How many users of this process a hold has. `lock` is held while the hold is made or removed on the volume."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.is_over = False


def _claim_path(folder: Path, file: str) -> Path:
    return folder / f"{short_name(file)}.{EVICTING}"


def _make(path: Path) -> None:
    try:
        try:
            create_empty(path)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            create_empty(path)
    except OSError as error:
        log.warning("a hold cannot be made (%s): another worker may evict what this one uses", error_name(error))

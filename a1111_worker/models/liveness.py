"""Which workers are alive, if workers share nothing but a folder: each one keeps its own files there fresh.

    lease   .leases/v135867                   its owner fetches a file, the others wait (leases.py)
    hold    .holds/x.safetensors.<owner>      its owner uses a model (holds.py)
    claim   .holds/x.safetensors.evicting     a worker is evicting a model (holds.py)
    ticket  .leases/v135867.42.dead           a worker is removing a dead owner's file, the one with the inode 42

An owner touches its files with every heartbeat. Each worker judges the others by its own monotonic clock: if it sees a
file unchanged for `stale_after` seconds, the file's owner is dead. Two clocks are never compared, so a clock that jumps
does no harm. All of this saves bandwidth, and keeps models from being evicted while a job uses them. That a model is
the right file does not depend on it (volume.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Collection
from pathlib import Path

from a1111_worker.errors import VolumeFailed
from a1111_worker.files import VolumeState, create_empty, look, volume_state

log = logging.getLogger(__name__)

FileState = tuple[int, int, int]
"""Changes with every touch of a file, and with every new file of the same name: time, size, inode."""


def new_owner() -> str:
    """A name for one worker's life: readable, and never used twice."""
    host = "".join(c for c in socket.gethostname().lower() if c.isalnum() or c == "-")[:24]
    return f"{host or 'worker'}-{os.getpid()}-{secrets.token_hex(4)}"


def state_of(path: Path) -> FileState | None:
    """A file's state now, or None if there is no such file. Raises VolumeFailed if that cannot be found out."""
    found = look(path)
    return None if found is None else (found.st_mtime_ns, found.st_size, found.st_ino)


class LivenessMonitor:
    """Tells the files of dead owners from those of living ones, by looking at them more than once."""

    def __init__(self, stale_after: float) -> None:
        self.stale_after = stale_after
        self._seen: dict[Path, tuple[FileState, float]] = {}  # the last state, and since when
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """The number of files that are remembered."""
        return len(self._seen)

    def is_dead(self, path: Path) -> bool:
        """Whether a file was seen unchanged for `stale_after` seconds. That takes two looks at least."""
        return self.dead_state(path) is not None

    def dead_state(self, path: Path) -> FileState | None:
        """The state in which a dead file was seen all the time, or None if the file is not (known to be) dead."""
        try:
            state = state_of(path)
        except VolumeFailed:
            return None  # a look that failed shows nothing about the owner
        now = time.monotonic()
        with self._lock:
            if state is None:
                self._seen.pop(path, None)
                return None
            last_state, since = self._seen.get(path, (None, now))
            if last_state != state:
                self._seen[path] = (state, now)
                return None
            return state if now - since >= self.stale_after else None

    def is_alive(self, path: Path) -> bool:
        """Whether there is such a file, and its owner is not known to be dead. Raises VolumeFailed."""
        return look(path) is not None and not self.is_dead(path)

    def remove_if_dead(self, path: Path) -> None:
        """Remove a file whose owner is dead."""
        dead = self.dead_state(path)
        if dead is not None:
            self.remove(path, dead)

    def remove(self, path: Path, dead: FileState) -> None:
        """Remove a dead owner's file, if it is still the one that was seen in this state.

        By now another worker may have removed it, and made one of its own under the same name. So only the worker that
        makes the ticket for this very file may remove it: no new file can appear between the look and the removal. The
        ticket of a worker that was killed meanwhile becomes a dead owner's file itself.
        """
        ticket = path.with_name(f"{path.name}.{dead[2]}.dead")
        try:
            create_empty(ticket, exclusive=True)
        except OSError as error:
            # A full volume takes no ticket, and must not stay full because of that. Without tickets two workers may
            # both have a lease or a claim: then a file is downloaded twice, or one of them finds the model gone.
            if volume_state(error) is not VolumeState.FULL:
                return
        with contextlib.suppress(OSError, VolumeFailed):
            if state_of(path) == dead:
                path.unlink()
                log.info("removed %s: no sign of life for %g s", path.name, self.stale_after)
        with contextlib.suppress(OSError):
            ticket.unlink()

    def forget_missing(self, folder: Path, names: Collection[str]) -> None:
        """Forget the files of a folder that are not among `names`, its listing of now."""
        with self._lock:
            for path in [path for path in self._seen if path.parent == folder and path.name not in names]:
                del self._seen[path]

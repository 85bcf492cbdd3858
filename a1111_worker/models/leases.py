"""Leases: one worker of the fleet fetches a file. The others wait, and see how far it is.

    .leases/v135867         {"owner": "…", "done": 1048576, "total": 228452352}

How a dead owner is known, and how its lease is removed: liveness.py.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from a1111_worker.files import error_name, look, names_in, read_small
from a1111_worker.heartbeat import Heartbeat
from a1111_worker.models.liveness import LivenessMonitor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LeaseNote:
    """What the owner of a lease writes into it: how many bytes it has, of how many (None: unknown)."""

    owner: str
    done: int = 0
    total: int | None = None

    @property
    def is_almost_done(self) -> bool:
        return self.total is not None and self.done > 0.9 * self.total


class Leases:
    """The leases of one owner. Their notes are written at most every `write_interval` seconds."""

    def __init__(
        self, owner: str, heartbeat: Heartbeat, liveness: LivenessMonitor, *, write_interval: float = 1.0
    ) -> None:
        self.owner = owner
        self._heartbeat = heartbeat
        self._liveness = liveness
        self._write_interval = write_interval

    def acquire(self, path: Path) -> Lease | None:
        """The lease, or None if another worker has it.

        A lease that cannot be made is granted all the same, but it is not real: other workers do not see it, and may
        fetch the same file. So its owner touches nothing that another worker may be using.
        """
        self._liveness.remove_if_dead(path)
        descriptor = None
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return None
        except OSError as error:
            log.warning("a lease cannot be made (%s): another worker may fetch the same file", error_name(error))
        lease = Lease(path, self.owner, descriptor, self._heartbeat, self._write_interval)
        lease.update(0, None)
        return lease

    def is_alive(self, path: Path) -> bool:
        """Whether somebody alive has this lease (or another sign of life), as far as is known."""
        return self._liveness.is_alive(path)

    def read(self, path: Path) -> LeaseNote | None:
        """The note of a lease, whoever has it, or None if there is no such lease."""
        try:
            note = json.loads(read_small(path) or b"{}")
            total = note.get("total")
            return LeaseNote(
                str(note.get("owner", "?")), int(note.get("done", 0)), total if isinstance(total, int) else None
            )
        except (OSError, ValueError, AttributeError, TypeError):
            return None if look(path) is None else LeaseNote("?")

    def watch(self, folder: Path) -> None:
        """Look at everybody's leases, and remove those of the dead, so that they are known when a lease is needed.

        The same serves for the trash: a worker that lives empties it at once.
        """
        names = names_in(folder)
        self._liveness.forget_missing(folder, names)
        for name in names:
            self._liveness.remove_if_dead(folder / name)

    def watch_partial_files(self, folder: Path) -> None:
        """Look at everybody's partial files, so that those of dead owners without a lease are known."""
        names = names_in(folder)
        self._liveness.forget_missing(folder, names)
        for name in names:
            self._liveness.is_dead(folder / name)


class Lease:
    """A lease that this worker has, and keeps fresh inside a `with`.

    Without a descriptor it could not be made on the disk, and only its owner knows of it: it is not `is_real`.
    """

    def __init__(
        self, path: Path, owner: str, descriptor: int | None, heartbeat: Heartbeat, write_interval: float
    ) -> None:
        self._path = path
        self._owner = owner
        self._descriptor = descriptor
        self.is_real = descriptor is not None
        self._heartbeat = heartbeat
        self._write_interval = write_interval
        self._written_at = float("-inf")
        self._lock = threading.Lock()  # keeps the descriptor open while it is used

    def __enter__(self) -> Lease:
        if self._descriptor is not None:
            self._heartbeat.add_listener(self._touch)
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        self._heartbeat.remove_listener(self._touch)
        with contextlib.suppress(OSError):
            # If the file is another one, this worker seemed dead, and another worker has the lease.
            if os.path.samestat(os.fstat(descriptor), self._path.stat()):
                self._path.unlink()
        with contextlib.suppress(OSError):
            os.close(descriptor)

    def update(self, done: int, total: int | None) -> None:
        """Write how far the fetch is, for those who wait."""
        now = time.monotonic()
        if now - self._written_at < self._write_interval:
            return
        self._written_at = now
        text = json.dumps(asdict(LeaseNote(self._owner, done, total)))
        with self._lock, contextlib.suppress(OSError):
            if self._descriptor is not None:
                os.pwrite(self._descriptor, text.ljust(200).encode(), 0)

    def _touch(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            if self._descriptor is not None:
                os.utime(self._descriptor)  # by descriptor: the name may be another worker's lease by now

"""Who is at work on what, among workers that share nothing but a folder: files that their owners keep fresh.

    lease   .leases/v135867   {"owner": "…", "done": 1048576, "total": 228452352}   one owner fetches, the others wait
    hold    .holds/x.safetensors.<owner>                                            a model is in use
    claim   .holds/x.safetensors.evicting                                           a model is being taken away

An owner touches its files every `interval` seconds. Whether it still does is judged by whoever looks, on the looker's
own monotonic clock: a file that was seen not to change for `stale_after` seconds has a dead owner. No two clocks are
ever compared, so a clock that jumps does nothing. All of this saves bandwidth and keeps models from being taken away
under a job; that a model is never a wrong file hangs on none of it (volume.py).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from a1111_worker.context import Deadline
from a1111_worker.heartbeat import Heartbeat

log = logging.getLogger(__name__)

EVICTING = "evicting"

State = tuple[int, int, int]
"""What changes whenever a file's owner gives a sign of life, and with every new file of the name."""


def new_owner() -> str:
    """A name for one worker's life: readable, and never used twice."""
    host = "".join(c for c in socket.gethostname().lower() if c.isalnum() or c == "-")[:24]
    return f"{host or 'worker'}-{os.getpid()}-{secrets.token_hex(4)}"


class Watch:
    """Tells dead files from live ones by looking at them more than once."""

    def __init__(self, stale_after: float) -> None:
        self.stale_after = stale_after
        self._looks: dict[Path, tuple[State, float]] = {}
        self._lock = threading.Lock()

    def is_dead(self, path: Path) -> bool:
        """Whether a file has not changed for `stale_after` seconds of watching. The first look never says so."""
        return self.dead_state(path) is not None

    def dead_state(self, path: Path) -> State | None:
        """The state in which a dead file was seen all the time; None for one that is not dead."""
        state = state_of(path)
        now = time.monotonic()
        with self._lock:
            if state is None:
                self._looks.pop(path, None)
                return None
            before, since = self._looks.get(path, (None, now))
            if before != state:
                self._looks[path] = (state, now)
                return None
            return state if now - since >= self.stale_after else None

    def forget_the_gone(self) -> None:
        """Drop what is remembered of files that are no more."""
        with self._lock:
            paths = list(self._looks)
        for path in paths:
            self.is_dead(path)


def state_of(path: Path) -> State | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


# -- leases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Note:
    """What an owner says of its work."""

    owner: str
    done: int = 0
    total: int | None = None


class Lease:
    """A lease that one has. Without a descriptor: it could not be made, and only the owner believes in it."""

    def __init__(
        self, path: Path, owner: str, descriptor: int | None, heartbeat: Heartbeat, *, pause: float = 1.0
    ) -> None:
        self._path = path
        self._owner = owner
        self._descriptor = descriptor
        self._heartbeat = heartbeat
        self._pause = pause
        self._told = 0.0
        self._lock = threading.Lock()

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
            if os.path.samestat(os.fstat(descriptor), self._path.stat()):  # else it was thought dead and taken over
                self._path.unlink()
        os.close(descriptor)

    def tell(self, done: int, total: int | None) -> None:
        """Let those who wait see how far it is; at most once a second."""
        now = time.monotonic()
        if now - self._told >= self._pause:
            self._told = now
            self._write(Note(self._owner, done, total))

    def _write(self, note: Note) -> None:
        text = json.dumps({"owner": note.owner, "done": note.done, "total": note.total})
        with self._lock, contextlib.suppress(OSError):
            if self._descriptor is not None:
                os.pwrite(self._descriptor, text.ljust(200).encode(), 0)

    def _touch(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            if self._descriptor is not None:
                os.utime(self._descriptor)  # the file itself: another's lease may have this name by now


class Leases:
    """The leases of one owner."""

    def __init__(self, owner: str, heartbeat: Heartbeat, watch: Watch) -> None:
        self._owner = owner
        self._heartbeat = heartbeat
        self._watch = watch

    def take(self, path: Path) -> Lease | None:
        """The lease, or None where another worker has it. One that cannot be made costs a second download, no more."""
        self._bury_if_dead(path)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return None
        except OSError as error:
            log.warning("no lease can be made (%s): another worker may fetch the same file", error.strerror)
            return Lease(path, self._owner, None, self._heartbeat)
        lease = Lease(path, self._owner, descriptor, self._heartbeat)
        lease.tell(0, None)
        return lease

    def is_alive(self, path: Path) -> bool:
        """Whether somebody has this lease, as far as can be told."""
        return path.exists() and not self._watch.is_dead(path)

    def watch(self, folder: Path) -> None:
        """Look at everybody's leases, so that the dead are known when one of them is wanted."""
        for name in os.listdir(folder) if folder.is_dir() else ():  # noqa: PTH208 - names are all that is needed
            self._bury_if_dead(folder / name)

    def note(self, path: Path) -> Note | None:
        """What the owner of a lease says, if there is one."""
        try:
            said = json.loads(path.read_bytes() or b"{}")
            return Note(str(said.get("owner", "?")), int(said.get("done", 0)), _whole(said.get("total")))
        except (OSError, ValueError, AttributeError, TypeError):
            return Note("?") if path.exists() else None

    def _bury_if_dead(self, path: Path) -> None:
        dead = self._watch.dead_state(path)
        if dead is not None:
            self._bury(path, dead)

    def _bury(self, path: Path, dead: State) -> None:
        """Take a lease away, if it is still the dead one: by then another worker may have buried it and have its own.

        One at a time may, whoever makes the ticket for this very file: so nobody comes between the look and the end.
        """
        ticket = path.with_name(f"{path.name}.{dead[2]}.dead")
        try:
            os.close(os.open(ticket, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        except OSError:
            return
        with contextlib.suppress(OSError):
            if state_of(path) == dead:
                owner = (self.note(path) or Note("somebody")).owner
                path.unlink()
                log.info("dropped the lease of %s, not heard of for %g s", owner, self._watch.stale_after)
        with contextlib.suppress(OSError):
            ticket.unlink()


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None


# -- holds -------------------------------------------------------------------------------------------------------------


class Holds:
    """The models that one owner uses, and a look at those that others use.

    Whoever holds writes its hold and then looks for a claim; whoever evicts writes its claim and then looks for holds:
    at least one of the two sees the other, and the evicting one gives way.
    """

    def __init__(self, owner: str, heartbeat: Heartbeat, watch: Watch, *, poll: float = 0.01) -> None:
        self._owner = owner
        self._heartbeat = heartbeat
        self._watch = watch
        self._poll = poll
        self._mine: dict[Path, int] = {}
        self._lock = threading.Lock()
        heartbeat.add_listener(self._touch)

    def close(self) -> None:
        """Let everything go."""
        self._heartbeat.remove_listener(self._touch)
        with self._lock:
            for hold in self._mine:
                with contextlib.suppress(OSError):
                    hold.unlink()
            self._mine.clear()

    def hold(self, folder: Path, file: str, deadline: Deadline) -> None:
        """Keep a model from being taken away. Whether it is (still) there is to be looked at after this."""
        hold = folder / f"{file}.{self._owner}"
        with self._lock:
            users = self._mine.get(hold, 0)
            if not users:
                self._make(hold)
            self._mine[hold] = users + 1
        claim = folder / f"{file}.{EVICTING}"
        try:
            while claim.exists() and not self._watch.is_dead(claim):
                deadline.wait(self._poll)
        except BaseException:
            self.release(folder, file)
            raise

    def release(self, folder: Path, file: str) -> None:
        hold = folder / f"{file}.{self._owner}"
        with self._lock:
            users = self._mine.get(hold, 0) - 1
            if users > 0:
                self._mine[hold] = users
            elif users == 0:
                del self._mine[hold]
                with contextlib.suppress(OSError):
                    hold.unlink()

    def held(self, folder: Path) -> set[str]:
        """The files of a folder that anybody alive uses; what oneself uses is known without a look."""
        with self._lock:
            mine = {hold.name.removesuffix(f".{self._owner}") for hold in self._mine if hold.parent == folder}
        return mine | {file for file, owner in self._all(folder) if owner != EVICTING}

    @contextlib.contextmanager
    def claim(self, folder: Path, file: str) -> Iterator[bool]:
        """The right to take a model away, while the block lasts: False where anybody uses it or takes it away too."""
        claim = folder / f"{file}.{EVICTING}"
        try:
            if self._watch.is_dead(claim):
                claim.unlink()
            os.close(os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        except OSError:
            yield False
            return
        try:
            yield file not in self.held(folder)
        finally:
            with contextlib.suppress(OSError):
                claim.unlink()

    def _all(self, folder: Path) -> Iterator[tuple[str, str]]:
        """Every live hold and claim as (file, owner); those of the dead are removed."""
        try:
            names = os.listdir(folder)  # noqa: PTH208 - every name is looked at, once
        except OSError:
            return
        for name in names:
            file, _, owner = name.rpartition(".")
            path = folder / name
            if owner != self._owner and self._watch.is_dead(path):
                log.info("dropping a hold of %s, which has not been heard of", owner)
                with contextlib.suppress(OSError):
                    path.unlink()
            else:
                yield file, owner

    def others(self, folder: Path) -> list[Path]:
        """The holds and claims of other owners who are not known to be dead."""
        return [folder / f"{file}.{owner}" for file, owner in self._all(folder) if owner != self._owner]

    def watch(self, folder: Path) -> None:
        """Look at everybody's holds, so that the dead are known when room is needed."""
        for _ in self._all(folder):
            pass

    def _make(self, hold: Path) -> None:
        try:
            os.close(os.open(hold, os.O_WRONLY | os.O_CREAT, 0o644))
        except FileNotFoundError:
            with contextlib.suppress(OSError):
                hold.parent.mkdir(parents=True, exist_ok=True)
                hold.touch()
        except OSError as error:
            log.warning("no hold can be made (%s): another worker may evict what this one uses", error.strerror)

    def _touch(self) -> None:
        with self._lock:
            holds = list(self._mine)
        for hold in holds:
            with self._lock:
                if hold in self._mine:
                    try:
                        os.utime(hold)
                    except OSError:  # somebody thought this worker dead
                        self._make(hold)

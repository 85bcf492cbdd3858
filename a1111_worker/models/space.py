"""Room for what is downloaded: reserved before the first byte, made by evicting what eviction.py chose."""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from a1111_worker.context import JobContext
from a1111_worker.domain import Progress, Stage
from a1111_worker.errors import RoomInUse, VolumeFull
from a1111_worker.models.cache import ModelCache
from a1111_worker.models.eviction import MARGIN, Entry, Eviction, Room, plan_eviction, plan_for_full_disk
from a1111_worker.models.volume import CacheDirectory

log = logging.getLogger(__name__)

_PLANS = 8  # what a plan removes may be in use by the time it is to go: then another plan is made


@dataclass(frozen=True)
class RoomRequest:
    """A download into a directory, and the room that it needs.

    `key` is the same for all jobs that need the file. `size` is bytes that the file will not exceed (None: unknown).
    The download goes on with the bytes of `resumes`. Messages name it by its `label`.
    """

    key: str
    label: str
    directory: CacheDirectory
    size: int | None
    resumes: tuple[Path, ...] = ()

    def missing(self, sizes: Mapping[Path, int]) -> int:
        """Bytes that it will still take from the disk, if partial files take `sizes` now."""
        return max(0, (self.size or 0) - sum(sizes.get(path, 0) for path in self.resumes))


class CacheSpace:
    """The room of one worker's cache. `limit` is what the cache may take, in bytes; None: whatever the disk has."""

    def __init__(self, cache: ModelCache) -> None:
        self._cache = cache
        self._reserved: dict[str, RoomRequest] = {}
        self._users: collections.Counter[str] = collections.Counter()  # of each reservation
        self._lock = threading.Lock()  # one decision at a time: each counts what the others have reserved

    @contextlib.contextmanager
    def reserve(
        self, requests: Sequence[RoomRequest], limit: int | None, own: frozenset[Path] = frozenset()
    ) -> Iterator[None]:
        """Have room for these downloads, beside the room that this worker's other downloads need.

        It is settled for all of them at once: if they do not fit together, nothing is evicted. What is reserved already
        needs no more room. It stays reserved until the block ends. `own` are files that must stay for the same job.
        Raises VolumeFull; RoomInUse if it would help that others release models; VolumeFailed.
        """
        with self._lock:
            new = {request.key: request for request in requests if request.key not in self._reserved}
            for directory in dict.fromkeys(request.directory for request in new.values()):
                self._settle([each for each in new.values() if each.directory is directory], directory, limit, own)
            self._reserved |= new
            self._users.update(request.key for request in requests)
        try:
            yield
        finally:
            with self._lock:
                self._users.subtract(request.key for request in requests)
                for key in [key for key in self._reserved if not self._users[key]]:
                    del self._reserved[key], self._users[key]

    def make_room_on_full_disk(self, request: RoomRequest) -> None:
        """Have room for what is missing of a download on a disk that turned out to be full. Raises as `reserve` does.

        If nothing is missing, the volume has not kept what it took before; how much of it is unknown.
        """
        entries = self._cache.list_entries()
        needed = request.missing({entry.path: entry.size for entry in entries})
        plan = plan_for_full_disk(
            entries,
            needed,
            free=request.directory.free(),
            wish=MARGIN if needed else max(MARGIN, request.size or 0),
            own=frozenset(request.resumes),
        )
        if plan.short:
            raise _no_room(request.label, plan)
        if not [entry for entry in plan.remove if self._cache.evict(entry, plan.why)]:
            raise RoomInUse(f"there is no room for {request.label}: everything that could be freed is in use")

    def shrink(self, limit: int) -> None:
        """Evict until everything takes no more than `limit`. Raises VolumeFull if what must stay takes more."""
        self._evict("nothing more", lambda entries: Room(0, limit, 0))

    def _settle(
        self, requests: Sequence[RoomRequest], directory: CacheDirectory, limit: int | None, own: frozenset[Path]
    ) -> None:
        others = list(self._reserved.values())
        of_other_jobs = [other for other in others if own.isdisjoint(other.resumes)]
        at_most = sum(request.size or 0 for request in (*requests, *others))
        if limit is None and directory.free() >= at_most + MARGIN:
            return
        own = own.union(*(request.resumes for request in (*requests, *others)))

        def room(entries: Iterable[Entry]) -> Room:
            sizes = {entry.path: entry.size for entry in entries}
            needed = sum(request.missing(sizes) for request in (*requests, *others))
            promised = sum(request.size or 0 for request in of_other_jobs)
            return Room(needed, limit, directory.free(), promised, own=own)

        self._evict(", ".join(request.label for request in requests), room)

    def _evict(self, what: str, room: Callable[[Sequence[Entry]], Room]) -> None:
        """Evict what keeps `room` from being there. `what` is named in the error."""
        for _ in range(_PLANS):
            entries = self._cache.list_entries()
            plan = plan_eviction(entries, room(entries))
            if plan.short:
                raise _no_room(what, plan)
            if all(self._cache.evict(entry, plan.why) for entry in plan.remove):
                return
        raise RoomInUse(f"there is no room for {what}: everything that could be freed is in use")


class RoomWait:
    """A job's wait until other jobs release models that take its room: `seconds` at most, a look every `poll` seconds.

    The limit begins with the first pause. If it `is_over`, the next try is the last.
    """

    def __init__(self, context: JobContext, seconds: float, poll: float) -> None:
        self._context = context
        self._seconds = seconds
        self._poll = poll
        self._until: float | None = None
        self.is_over = False

    def pause(self, error: RoomInUse) -> None:
        """Wait before the next try. Raises the error if that try was the last."""
        if self.is_over:
            raise error
        self._until = self._until or time.monotonic() + self._seconds
        left = max(0.0, self._until - time.monotonic())
        log.info("waiting for room, %.0f s at most: %s", left, error.message)
        detail = f"waiting for room until other jobs release their models, {left:.0f} s at most"
        self._context.report(Progress(Stage.MODELS, detail=detail))
        self._context.deadline.wait(min(self._poll, left))
        self.is_over = time.monotonic() >= self._until


def _no_room(what: str, plan: Eviction) -> VolumeFull:
    message = (
        f"there is no room for {what}: {plan.why}; evicting all that may go leaves {plan.short / 1e9:.2f} GB too few"
    )
    if plan.is_in_use:
        return RoomInUse(f"{message} while other jobs use their models", hint="try again, or enlarge the volume")
    return VolumeFull(message, hint="enlarge the volume or MODEL_CACHE_LIMIT_GB, or ask for fewer models at once")

"""Room for what is downloaded: reserved before the first byte, made by evicting what eviction.py chose."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from a1111_worker.errors import VolumeFull
from a1111_worker.models.cache import ModelCache
from a1111_worker.models.eviction import MARGIN, plan_eviction, plan_for_full_disk
from a1111_worker.models.volume import CacheDirectory

_PLANS = 8  # what a plan removes may be in use by the time it is to go: then another plan is made


class CacheSpace:
    """The room of one worker's cache."""

    def __init__(self, cache: ModelCache) -> None:
        self._cache = cache
        self._reserved: dict[Path, int | None] = {}  # partial files, and the sizes that they will have
        self._lock = threading.Lock()  # one decision at a time: each counts what the others have reserved

    @contextlib.contextmanager
    def reserve(
        self, partial_file: Path, size: int | None, what: str, directory: CacheDirectory, limit: int | None
    ) -> Iterator[None]:
        """Have room for all that a partial file will be, besides what this worker's other downloads will be.

        The room stays reserved until the block ends. Raises as `make_room` does.
        """
        with self._lock:
            needed = missing_bytes(partial_file, size) + sum(missing_bytes(*other) for other in self._reserved.items())
            self.make_room(needed, what, directory, limit)
            self._reserved[partial_file] = size
        try:
            yield
        finally:
            with self._lock:
                self._reserved.pop(partial_file, None)

    def make_room(self, needed: int, what: str, directory: CacheDirectory, limit: int | None) -> None:
        """Have room for `needed` bytes more in a directory, by evicting. Raises VolumeFull if that is not possible.

        `limit` is what the cache may take, in bytes. `what` is named in the error.
        """
        for _ in range(_PLANS):
            free = directory.free()
            if limit is None and free >= needed + MARGIN:
                return
            plan = plan_eviction(self._cache.list_entries(), needed, limit=limit, free=free)
            if plan.short:
                raise VolumeFull(
                    f"there is no room for {what}: {plan.why}, and {plan.short / 1e9:.2f} GB too little can be freed",
                    hint="enlarge the volume or MODEL_CACHE_LIMIT_GB, or ask for fewer models at once",
                )
            if all(self._cache.evict(entry, plan.why) for entry in plan.remove):
                return
        raise VolumeFull(f"there is no room for {what}: everything that could be freed is in use")

    def make_room_on_full_disk(self, needed: int, what: str, directory: CacheDirectory) -> None:
        """Have room for `needed` bytes more on a disk that turned out to be full. Raises VolumeFull if that is not
        possible."""
        plan = plan_for_full_disk(self._cache.list_entries(), needed, free=directory.free())
        if plan.short or not [entry for entry in plan.remove if self._cache.evict(entry, plan.why)]:
            raise VolumeFull(
                f"the disk is full, and not enough may go to make room for {what}",
                hint="enlarge the volume, or ask for fewer models at once",
            )


def missing_bytes(partial_file: Path, size: int | None) -> int:
    """Bytes that a download will still take from the disk."""
    if size is None:
        return 0
    try:
        return max(0, size - partial_file.stat().st_blocks * 512)
    except OSError:
        return size

"""Which models are evicted when room is needed: the decision, without a disk. space.py carries it out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from a1111_worker.domain import ModelKind

MARGIN = 64 << 20
"""Bytes that stay free for the sidecars, the WebUI's own files, and what another worker writes meanwhile."""

IN_USE, BEING_FETCHED = "in use", "being fetched"
"""Reasons to keep a file that end by themselves, with the job that uses it."""


@dataclass(frozen=True)
class Entry:
    """A file that takes room. `last_used` is by the volume's clock. `keep` is why it must stay, or None.

    `to_come` is bytes that another worker is still adding to it.
    """

    kind: ModelKind
    file: str
    path: Path
    size: int
    last_used: float
    keep: str | None = None
    to_come: int = 0


@dataclass(frozen=True)
class Room:
    """The room that is needed.

    `needed` bytes more than there are now, and at most `limit` bytes in all (None: any number). `free` bytes are free
    on the disk, an upper bound; `margin` of them stay free. `promised` bytes are, or will be, other jobs' downloads.
    `own` are files that are not evicted, and that others cannot release. What is still to come of them is `needed`.
    """

    needed: int
    limit: int | None
    free: int
    promised: int = 0
    margin: int = MARGIN
    own: frozenset[Path] = frozenset()


@dataclass(frozen=True)
class Eviction:
    """What is removed, in this order, and why.

    `short` is how many bytes would still be missing: then nothing is removed at all. `is_in_use`: there would be enough
    room if others released what they use.
    """

    remove: tuple[Entry, ...]
    short: int
    why: str
    is_in_use: bool = False


def plan_eviction(entries: Iterable[Entry], room: Room) -> Eviction:
    """Make room: the least recently used first, nothing that must stay, nothing without need."""
    by_age = sorted(entries, key=lambda entry: (entry.last_used, entry.file))
    to_come = sum(entry.to_come for entry in by_age if entry.path not in room.own)
    total = sum(entry.size for entry in by_age) + to_come + room.needed
    over_limit = 0 if room.limit is None else total - room.limit
    over_disk = room.needed + (room.margin if room.needed else 0) - room.free
    missing = max(over_limit, over_disk)
    if missing <= 0:
        return Eviction((), 0, "there is room")
    why = (
        f"over the limit of {_gb(room.limit or 0)}" if over_limit >= over_disk else f"{_gb(room.free)} free on the disk"
    )
    if room.needed:
        why = f"{_gb(room.needed)} needed, {why}"
    others = [entry for entry in by_age if entry.path not in room.own]
    chosen: list[Entry] = []
    for entry in others:
        if missing <= 0:
            break
        if entry.keep is None:
            chosen.append(entry)
            missing -= entry.size
    if missing <= 0:
        return Eviction(tuple(chosen), 0, why)
    in_use = room.promised + to_come + sum(entry.size for entry in others if entry.keep in (IN_USE, BEING_FETCHED))
    return Eviction((), missing, why, is_in_use=missing <= in_use)


def plan_for_full_disk(
    entries: Iterable[Entry], needed: int, *, free: int, wish: int = MARGIN, own: frozenset[Path] = frozenset()
) -> Eviction:
    """Make room for `needed` bytes on a disk that refused them, and for up to `wish` if that much may be removed.

    A disk that is full although it reports enough free space has a quota that it does not show. Then it counts as
    having nothing free.
    """
    entries = list(entries)
    free = free if free < needed else 0
    removable = sum(entry.size for entry in entries if entry.keep is None and entry.path not in own)
    least = max(needed, min(wish, removable + free), 1)
    return plan_eviction(entries, Room(least, None, free, margin=0, own=own))


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"

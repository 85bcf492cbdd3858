"""Which models are evicted when room is needed: the decision, without a disk. space.py carries it out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from a1111_worker.domain import ModelKind

MARGIN = 64 << 20
"""Bytes that stay free for the sidecars, the WebUI's own files, and what another worker writes meanwhile."""


@dataclass(frozen=True)
class Entry:
    """A file that takes room. `last_used` is by the volume's clock. `keep` is why it must stay, or None."""

    kind: ModelKind
    file: str
    path: Path
    size: int
    last_used: float
    keep: str | None = None


@dataclass(frozen=True)
class Eviction:
    """What is removed, in this order, and why. `short` is the bytes that would still be missing: then nothing is
    removed at all."""

    remove: tuple[Entry, ...]
    short: int
    why: str


def plan_eviction(
    entries: Iterable[Entry], needed: int, *, limit: int | None, free: int, margin: int = MARGIN
) -> Eviction:
    """Make room for `needed` bytes: the least recently used first, nothing that must stay, nothing without need.

    `limit` is what all entries together may take. `free` is what the disk still has, an upper bound.
    """
    by_age = sorted(entries, key=lambda entry: (entry.last_used, entry.file))
    over_limit = 0 if limit is None else sum(entry.size for entry in by_age) + needed - limit
    over_disk = needed + (margin if needed else 0) - free
    missing = max(over_limit, over_disk)
    if missing <= 0:
        return Eviction((), 0, "there is room")
    why = f"over the limit of {_gb(limit or 0)}" if over_limit >= over_disk else f"{_gb(free)} free on the disk"
    if needed:
        why = f"{_gb(needed)} needed, {why}"
    chosen: list[Entry] = []
    for entry in by_age:
        if missing <= 0:
            break
        if entry.keep is None:
            chosen.append(entry)
            missing -= entry.size
    if missing > 0:
        return Eviction((), missing, why)
    return Eviction(tuple(chosen), 0, why)


def plan_for_full_disk(entries: Iterable[Entry], needed: int, *, free: int) -> Eviction:
    """Make room for `needed` bytes on a disk that refused them, and for a little more if that much may be removed.

    A disk that is full although it reports enough free space has a quota that it does not show. Then it counts as
    having nothing free.
    """
    entries = list(entries)
    free = free if free < needed else 0
    removable = sum(entry.size for entry in entries if entry.keep is None)
    return plan_eviction(entries, max(needed, min(MARGIN, removable + free)), limit=None, free=free, margin=0)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"

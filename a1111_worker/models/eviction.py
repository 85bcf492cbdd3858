"""Which models go when room is needed: a decision, without a disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from a1111_worker.domain import ModelKind

MARGIN = 64 << 20
"""Bytes that stay free: the sidecars, the WebUI's own files, and what another worker writes meanwhile."""


@dataclass(frozen=True)
class Entry:
    """A file that takes room. `last_used` is the volume's time; `keep` says why it may never go."""

    kind: ModelKind
    file: str
    path: Path
    size: int
    last_used: float
    keep: str | None = None


@dataclass(frozen=True)
class Eviction:
    """What goes, in this order, and why. `short` is what would still be missing; then nothing goes at all."""

    remove: tuple[Entry, ...]
    short: int
    why: str

    @property
    def freed(self) -> int:
        return sum(entry.size for entry in self.remove)


def plan_eviction(
    entries: Iterable[Entry], needed: int, *, limit: int | None, free: int, margin: int = MARGIN
) -> Eviction:
    """Make room for `needed` bytes: least recently used first, nothing that must stay, nothing without need.

    `limit` is what all entries together may take, `free` what the disk still has (an upper bound).
    """
    everything = sorted(entries, key=lambda entry: (entry.last_used, entry.file))
    over_limit = 0 if limit is None else sum(entry.size for entry in everything) + needed - limit
    over_disk = needed + (margin if needed else 0) - free
    missing = max(over_limit, over_disk)
    if missing <= 0:
        return Eviction((), 0, "there is room")
    why = f"over the limit of {_gb(limit or 0)}" if over_limit >= over_disk else f"{_gb(free)} free on the disk"
    if needed:
        why = f"{_gb(needed)} needed, {why}"
    chosen: list[Entry] = []
    for entry in everything:
        if missing <= 0:
            break
        if entry.keep is None:
            chosen.append(entry)
            missing -= entry.size
    if missing > 0:
        return Eviction((), missing, why)
    return Eviction(tuple(chosen), 0, why)


def plan_for_a_full_disk(entries: Iterable[Entry], needed: int, *, free: int) -> Eviction:
    """Make room for `needed` bytes on a disk that refused them: for a little more, where that much may go.

    A disk that says that there is enough, and is full, has a quota that it does not show: then nothing is free.
    """
    everything = list(entries)
    free = free if free < needed else 0
    freeable = sum(entry.size for entry in everything if entry.keep is None)
    return plan_eviction(everything, max(needed, min(MARGIN, freeable + free)), limit=None, free=free, margin=0)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"

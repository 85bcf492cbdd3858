"""What the command line does with the cache: it finds and replaces damaged models, and removes models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from a1111_worker.context import Deadline, JobContext
from a1111_worker.domain import ModelRef
from a1111_worker.errors import DownloadFailed, InvalidRequest, ModelError, ModelNotFound, VolumeFailed
from a1111_worker.models.cache import ModelCache
from a1111_worker.models.eviction import Entry
from a1111_worker.models.hub_files import hub_file_of
from a1111_worker.models.manager import ModelManager
from a1111_worker.models.names import SUFFIX
from a1111_worker.models.sidecars import ModelRecord
from a1111_worker.models.space import CacheSpace
from a1111_worker.models.volume import CacheDirectory

REPLACED = "; replaced"


@dataclass(frozen=True)
class VerifyResult:
    """What `verify` found out about one model."""

    entry: Entry
    sha256: str | None
    finding: str
    ok: bool


def verify(manager: ModelManager, deadline: Deadline, *, repair: bool = False) -> Iterator[VerifyResult]:
    """Read every model of the cache and compare it with what is known. `repair` replaces what is damaged."""
    for directory, entry in manager.cache.list_models():
        if directory.is_writable:
            yield _verify(manager, directory, entry, deadline, repair=repair)


def _verify(
    manager: ModelManager, directory: CacheDirectory, entry: Entry, deadline: Deadline, *, repair: bool
) -> VerifyResult:
    sidecars = manager.cache.sidecars
    spec = manager.checkpoint_spec if manager.cache.is_checkpoint(entry.kind, entry.file) else None
    known: ModelRecord | None = None
    is_damaged = True
    try:
        known = sidecars.find(directory, entry.file) or sidecars.find_for_changed_file(directory, entry.file)
        found = sidecars.rebuild(directory, entry.file, deadline, keep=known is None)
    except (VolumeFailed, ModelNotFound) as error:  # nothing was read, so nothing is known to be wrong
        return VerifyResult(entry, None, f"unknown: {error.message}", ok=False)
    except ModelError as error:
        problem = f"damaged: {error.message}"
    else:
        if known is not None and known.sha256 != found.sha256:
            problem = f"damaged: its SHA-256 is {found.sha256[:12]}…, and was {known.sha256[:12]}…"
        elif spec is not None and not spec.accepts(found):
            is_damaged = False
            problem = f"another model: its SHA-256 is {found.sha256[:12]}…, not {(spec.sha256 or '')[:12]}…"
        else:
            return VerifyResult(entry, found.sha256, "proven" if known else "read for the first time", ok=True)
    outcome = ""
    if repair:
        try:
            is_free = not is_damaged or _evict_damaged(manager.cache, entry, deadline)
            outcome = _fetch_again(manager, entry, known, deadline) if is_free else "; in use, and left alone"
        except VolumeFailed as error:
            outcome = f"; left alone: {error.message}"
    return VerifyResult(entry, None, f"{problem}{outcome}", ok=outcome == REPLACED)


def _evict_damaged(cache: ModelCache, entry: Entry, deadline: Deadline) -> bool:
    """Remove a damaged model. If it seems in use, find out first whether its user is alive."""
    why = "it is damaged"
    return cache.evict(entry, why, even_checkpoint=True) or (
        cache.observe_other_workers(deadline) and cache.evict(entry, why, even_checkpoint=True)
    )


def _fetch_again(manager: ModelManager, entry: Entry, known: ModelRecord | None, deadline: Deadline) -> str:
    """Replace a model that was removed, if its source is known. Returns the end of the finding."""
    ref = None if known is None else _source_of(known)
    try:
        if manager.cache.is_checkpoint(entry.kind, entry.file):
            manager.prepare_checkpoint(JobContext(deadline))
        elif ref is not None:
            with manager.hold([ref], JobContext(deadline)):
                pass
        else:
            return "; removed"
    except (ModelError, InvalidRequest) as error:
        removed = "" if entry.path.exists() else "removed, and "
        return f"; {removed}it cannot be fetched again: {error.message}"
    return REPLACED


def remove(cache: ModelCache, name: str) -> list[Entry]:
    """Remove models of any kind by their file name or stem. Raises ModelNotFound, or ModelError if in use."""
    stem = name.removesuffix(SUFFIX)
    chosen = [entry for entry in cache.list_entries() if entry.file == f"{stem}{SUFFIX}"]
    if not chosen:
        raise ModelNotFound(f"there is no {stem}{SUFFIX} in the cache")
    for entry in chosen:
        if not cache.evict(entry, "asked for", even_checkpoint=True):
            raise DownloadFailed(f"{entry.file} is in use")
    return chosen


def shrink(cache: ModelCache, to_bytes: int) -> tuple[Entry, ...]:
    """Evict until the cache takes no more than `to_bytes`. Raises VolumeFull if what must stay takes more."""
    before = cache.list_entries()
    CacheSpace(cache).shrink(to_bytes)
    after = {entry.path for entry in cache.list_entries()}
    return tuple(entry for entry in before if entry.path not in after)


def _source_of(known: ModelRecord) -> ModelRef | None:
    """Where a model's file can be fetched again, if it was not put there by hand."""
    if known.version_id is not None:
        return ModelRef(known.kind, known.version_id, None if known.primary else known.file_id)
    if (hub := hub_file_of(known.url)) is not None:
        return ModelRef(known.kind, hub=hub, name=known.name, sha256=known.sha256)
    if known.url is not None:
        return ModelRef(known.kind, url=known.url, name=known.name, sha256=known.sha256)
    return None

"""How a missing model gets into the cache: fetched once in this process, once in the fleet, and verified.

    describe → [a job of this process fetches it: wait] → [another worker fetches it: wait] → already here, under a name
    that claims it? → room → download → length, SHA-256, safetensors → its final name → its sidecar

Each step looks first whether the model has appeared in the meantime. If the job or worker that fetches gives up, one of
those that wait takes over, and goes on with its partial file.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from a1111_worker.context import Deadline, JobContext
from a1111_worker.domain import ModelRef
from a1111_worker.errors import DownloadFailed, FileTooLong, ModelError, ModelRejected, PartialFileLost, VolumeFull
from a1111_worker.models.cache import CacheHit, CheckpointSpec, ModelCache
from a1111_worker.models.civitai import CivitAI
from a1111_worker.models.leases import Lease, Leases
from a1111_worker.models.progress import FileProgress, ReportFile, report_bytes
from a1111_worker.models.single_flight import SingleFlight
from a1111_worker.models.space import CacheSpace, missing_bytes
from a1111_worker.models.targets import FetchTarget
from a1111_worker.models.volume import CacheDirectory, can_write
from a1111_worker.transfer.download import Downloader, OnBytes, Source

log = logging.getLogger(__name__)

_LOG_INTERVAL = 20.0  # seconds between two log lines about one wait


class Fetcher:
    """Gets missing models into the cache. `poll` is the seconds between two looks while another worker fetches."""

    def __init__(
        self, cache: ModelCache, civitai: CivitAI, downloader: Downloader, leases: Leases, *, poll: float
    ) -> None:
        self._cache = cache
        self._space = CacheSpace(cache)
        self._civitai = civitai
        self._downloader = downloader
        self._leases = leases
        self._owner = leases.owner
        self._poll = poll
        self._single_flight = SingleFlight()

    def fetch(
        self, ref: ModelRef, context: JobContext, report: ReportFile, *, checkpoint: CheckpointSpec | None = None
    ) -> CacheHit:
        """The model that a reference with an id or a URL means, in the cache and verified.

        With `checkpoint` it is the fixed checkpoint, and is kept under the checkpoint's name.
        """
        try:
            remote = self._civitai.describe(ref, context.deadline)
        except ModelError as error:
            hit = self._find_unverified(ref, context.deadline, report, error) if checkpoint is None else None
            if hit is None:
                raise
            return hit
        target = FetchTarget(ref, remote, checkpoint)
        hit = None
        while hit is None:
            with self._single_flight.join(target.flight_key, context.is_next) as (shared, is_first):
                if is_first:
                    own = replace(context, is_next=shared.is_next)
                    hit = shared.hit = self._fetch_with_lease(target, own, shared.reporting(report))
                elif (shared_hit := shared.wait(context.deadline, report)) is not None:
                    hit = replace(shared_hit, downloaded=False)
        return replace(hit, warnings=(*remote.warnings, *hit.warnings))

    def _find_unverified(
        self, ref: ModelRef, deadline: Deadline, report: ReportFile, error: ModelError
    ) -> CacheHit | None:
        """A file whose name claims to be the model, if CivitAI cannot tell whether it is. `error` is CivitAI's."""
        for directory, file in self._cache.list_unverified(ref):
            with contextlib.suppress(ModelError):
                record = self._cache.identify(directory, file, deadline, report_bytes(report, ref.label))
                if ref.sha256 is not None and record.sha256 != ref.sha256:
                    continue
                warning = f"{file} is used, but it could not be verified that it is {ref.label}: {error.message}"
                log.warning("%s", warning)
                return CacheHit(directory, record, warnings=() if ref.sha256 else (warning,))
        return None

    # -- one worker of the fleet

    def _fetch_with_lease(self, target: FetchTarget, context: JobContext, report: ReportFile) -> CacheHit:
        """The model, downloaded by this worker while it has the lease, or by another one."""
        directory = self._cache.directories.for_new(target.ref.kind)
        with contextlib.suppress(OSError):
            directory.prepare()  # somebody may have removed the folders
        while True:
            lease = self._wait_for_lease(target, directory, context.deadline, report)
            if isinstance(lease, CacheHit):
                return lease
            with lease:
                self._cache.refresh(target.ref.kind)
                hit = self._find(target) or self._verify_present(target, context.deadline, report)
                if hit is not None:
                    return hit
                partial_file = self._prepare_partial_file(target, directory)
                on_bytes = _reporting_both(target, lease, report)
                # The worker is nothing without its checkpoint: no limit of ours keeps it out.
                limit = self._cache.limit if target.checkpoint is None else None
                room = self._space.reserve(partial_file, target.size, target.label, directory, limit)
                try:
                    with room, _kept_if_useful(directory, partial_file):
                        sha256 = self._download(target, partial_file, context, on_bytes)
                    with _kept_if_useful(directory, partial_file):  # a complete file needs no more room
                        return self._place(target, directory, partial_file, sha256, context.deadline)
                except PartialFileLost:
                    log.warning(
                        "%s: another worker took the partial file over, because this one seemed dead", target.label
                    )
            context.deadline.wait(self._poll)

    def _wait_for_lease(
        self, target: FetchTarget, directory: CacheDirectory, deadline: Deadline, report: ReportFile
    ) -> Lease | CacheHit:
        """Wait until the model is there, or until this worker has the lease to fetch it."""
        path = directory.leases / target.key
        began, next_log = time.monotonic(), 0.0
        while True:
            deadline.check()
            found = self._find(target) or self._leases.acquire(path)
            if found is not None:
                return found
            note = self._leases.read(path)
            if note is not None:
                waited = time.monotonic() - began
                if waited >= next_log:
                    next_log = waited + _LOG_INTERVAL
                    log.info("waiting for %s, which is fetching %s, %.0f s", note.owner, target.label, waited)
                who = "another job" if note.owner == self._owner else "another worker"
                report(FileProgress(target.label, note.done, note.total or target.remote.size, fetched_by=who))
            is_almost_done = note is not None and note.is_almost_done
            deadline.wait(self._poll / 5 if is_almost_done else self._poll)

    def _find(self, target: FetchTarget) -> CacheHit | None:
        """The model, if it is there and verified by now."""
        if target.checkpoint is not None:
            return self._cache.find_checkpoint(target.checkpoint)
        hit = self._cache.find(target.exact_ref, fresh=True)
        if hit is None:
            return None
        record = target.with_variant_filter(hit.record)
        if record is not hit.record:  # next time CivitAI need not be asked which file the filter selects
            record = self._cache.sidecars.write(hit.directory, record)
        return replace(hit, record=record)

    def _verify_present(self, target: FetchTarget, deadline: Deadline, report: ReportFile) -> CacheHit | None:
        """A file that is there under a name that claims to be the model: used if its bytes verify that."""
        if target.checkpoint is not None:  # the caller has looked at files of that name, and does not accept them
            return None
        for directory, file in self._cache.list_unverified(target.exact_ref):
            if target.remote.size is not None and directory.size(file) != target.remote.size:
                continue
            try:
                record = self._cache.identify(directory, file, deadline, report_bytes(report, target.label))
            except ModelError:
                continue
            if target.sha256 is None:
                warning = f"{file} was there already, and no hash is known to verify that it is {target.label}"
                return CacheHit(directory, record, warnings=(warning,))
            if record.sha256 == target.sha256:
                log.info("%s was here already, verified by its SHA-256 %s", file, record.sha256[:12])
                return CacheHit(directory, self._cache.sidecars.write(directory, target.verified_record(record)))
            log.warning("%s is not used: its SHA-256 is %s, not %s", file, record.sha256[:12], target.sha256[:12])
        return None

    # -- one file

    def _prepare_partial_file(self, target: FetchTarget, directory: CacheDirectory) -> Path:
        """Where the file is downloaded to, with what an earlier download of any worker left there."""
        if target.sha256 is not None:
            # Not without a hash: the owner of the partial file may only seem dead, and might still write to it.
            directory.adopt_partial_file(target.key, self._owner)
        if target.reserved_file is not None and self._cache.is_in_use(directory, target.reserved_file):
            raise DownloadFailed(
                f"another worker uses a different file under the name {target.reserved_file}", hint="try again later"
            )
        return directory.partial_file(target.key, self._owner)

    def _download(self, target: FetchTarget, partial_file: Path, context: JobContext, on_bytes: OnBytes) -> str:
        """Have every byte of the file in the partial file. Returns its SHA-256, which is the right one if one is known.

        A file with a wrong hash is downloaded once more, with a new link. If the disk turns out to be full (a quota
        does not show sooner), models are evicted, once for each of the two downloads.
        """
        directory = self._cache.directories.for_new(target.ref.kind)
        link = functools.partial(self._civitai.link, target.remote, context.deadline)
        source = Source(target.label, link, size=target.remote.size, sha256=target.sha256)
        is_second, may_evict = False, True
        while True:
            try:
                sha256 = self._downloader.fetch(source, partial_file, context, on_bytes).sha256
            except FileTooLong:
                raise
            except VolumeFull:
                if not may_evict or not can_write(partial_file.parent, self._owner):
                    raise
                may_evict = False
                log.warning("the disk was full before %s was complete: evicting once", target.label)
                missing = missing_bytes(partial_file, target.size)
                self._space.make_room_on_full_disk(missing, target.label, directory)
                continue
            if target.sha256 in (None, sha256):
                return sha256
            if is_second:
                raise ModelRejected(
                    f"{target.label} was downloaded twice, and its SHA-256 is {sha256[:12]}…, "
                    f"not {(target.sha256 or '')[:12]}…"
                )
            is_second, may_evict = True, True
            log.warning("%s has a wrong SHA-256, %s: downloading it again, with a new link", target.label, sha256[:12])
            directory.remove_partial_file(partial_file)

    def _place(
        self, target: FetchTarget, directory: CacheDirectory, partial_file: Path, sha256: str, deadline: Deadline
    ) -> CacheHit:
        """Make a complete partial file a model: the last verification, its name, its sidecar."""
        file = target.file(sha256)
        if target.remote.version_id is None and (same := self._cache.find_same_bytes(directory, sha256)) is not None:
            file = same.file
        try:
            record = target.record(partial_file, file, sha256)
            if self._cache.make_name_free(directory, file, sha256, deadline):
                directory.place(partial_file, file)
            else:  # another worker was as fast, and the WebUI may have that file open
                directory.remove_partial_file(partial_file)
        except FileNotFoundError as error:
            raise PartialFileLost(f"the partial file of {target.label} is gone", hint="try again") from error
        except OSError as error:
            raise VolumeFull(f"{target.label} could not be written ({error.strerror or 'I/O error'})") from error
        record = self._cache.sidecars.write(directory, record)
        if target.ref.url is not None:
            self._cache.sidecars.remember_url(directory, target.ref.url, file)
        log.info("%s is here: %s, %.1f MB, sha256 %s", target.label, file, record.size / 1e6, sha256[:12])
        return CacheHit(directory, record, downloaded=True)


def _reporting_both(target: FetchTarget, lease: Lease, report: ReportFile) -> OnBytes:
    """What counts the bytes of a download: it reports them to the job, and to the workers that wait."""

    def on_bytes(done: int, total: int | None) -> None:
        lease.update(done, total)
        report(FileProgress(target.label, done, total))

    return on_bytes


@contextlib.contextmanager
def _kept_if_useful(directory: CacheDirectory, partial_file: Path) -> Iterator[None]:
    """Keep the partial file after a failure only if a later download may go on with it."""
    try:
        yield
    except ModelError as error:
        if not isinstance(error, DownloadFailed) or _is_empty(partial_file):
            directory.remove_partial_file(partial_file)
        raise


def _is_empty(path: Path) -> bool:
    try:
        return path.stat().st_size == 0
    except OSError:
        return True

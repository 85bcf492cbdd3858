"""How a missing model gets into the cache: fetched once in this process, once in the fleet, and verified.

    describe → room → [a job of this process fetches it: wait] → [another worker fetches it: wait] → already here, under
    a name that claims it? → download → length, SHA-256, safetensors → its final name → its sidecar

Each step looks first whether the model has appeared in the meantime. If the job or worker that fetches gives up, one of
those that wait takes over, and goes on with its partial file.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from a1111_worker.context import Deadline, JobContext
from a1111_worker.domain import ModelRef, RemoteFile
from a1111_worker.errors import (
    DownloadFailed,
    FileTooLong,
    ModelError,
    ModelRejected,
    PartialFileLost,
    VolumeFailed,
    VolumeFull,
)
from a1111_worker.files import VolumeState, look, translated, volume_error, volume_state
from a1111_worker.models.cache import CacheHit, CheckpointSpec, ModelCache
from a1111_worker.models.hub_cache import CachedHubFile
from a1111_worker.models.leases import Lease, Leases
from a1111_worker.models.progress import FileProgress, ReportFile, report_bytes
from a1111_worker.models.single_flight import SingleFlight
from a1111_worker.models.sites import ModelSite
from a1111_worker.models.space import CacheSpace, RoomRequest
from a1111_worker.models.targets import FetchTarget
from a1111_worker.models.volume import CacheDirectory
from a1111_worker.text import printable
from a1111_worker.transfer.download import Downloader, OnBytes, Source
from a1111_worker.transfer.partial_file import saved_state

log = logging.getLogger(__name__)

_LOG_INTERVAL = 20.0  # seconds between two log lines about one wait


class Fetcher:
    """Gets missing models into the cache. `poll` is the seconds between two looks while another worker fetches."""

    def __init__(
        self, cache: ModelCache, site: ModelSite, downloader: Downloader, leases: Leases, *, poll: float
    ) -> None:
        self._cache = cache
        self._space = CacheSpace(cache)
        self._site = site
        self._downloader = downloader
        self._leases = leases
        self._owner = leases.owner
        self._poll = poll
        self._single_flight = SingleFlight()

    def describe(
        self, ref: ModelRef, context: JobContext, report: ReportFile, *, checkpoint: CheckpointSpec | None = None
    ) -> FetchTarget | CacheHit:
        """What a reference with an id or a URL means; if its site cannot tell, a file that claims to be it.

        With `checkpoint` it is the fixed checkpoint, and will be kept under the checkpoint's name. A file that RunPod
        has put on the host is looked for first, and used from there.
        """
        copy = self._cache.find_hub_copy(ref)
        if copy is not None and self._cache.may_use_copy(copy):
            name = ref.name or copy.file.name
            remote = RemoteFile(
                copy.file.url,
                name,
                sha256=copy.sha256,
                hub=copy.file,
                restricted=True,
                file_name=printable(copy.file.path.rpartition("/")[2]),
            )
            hit = self._use_copy(FetchTarget(ref, remote, checkpoint), copy, context.deadline, report)
            if hit is not None:
                return hit
        try:
            target = FetchTarget(ref, self._site.describe(ref, context.deadline), checkpoint)
        except ModelError as error:
            hit = self._find_unverified(ref, context.deadline, report, error) if checkpoint is None else None
            if hit is None:
                raise
            return hit
        hit = None if copy is None else self._use_copy(target, copy, context.deadline, report)
        if hit is None and ref.max_size is not None and (target.size or 0) > ref.max_size:
            most = f"{ref.max_size / 1e9:g} GB"
            raise ModelRejected(f"{target.label} has {(target.size or 0) / 1e9:.2f} GB, and a job may bring {most}")
        return hit or target

    @contextlib.contextmanager
    def reserve(self, targets: Sequence[FetchTarget], own: frozenset[Path]) -> Iterator[frozenset[Path]]:
        """Have room for all that one job must download, until the block ends. It is settled for all of it at once.

        A model that is there by now, or that another worker fetches, needs no room; if it turns out that this worker
        must download it after all, `fetch` has room made for it alone. `own` are the files that the job holds. Returns
        them with those that it will write to. Raises as CacheSpace.reserve does.
        """
        requests = [self._room_request(target) for target in targets if not self._is_on_its_way(target)]
        with self._space.reserve(requests, self._cache.limit, own):
            yield own.union(*(request.resumes for request in requests))

    def fetch(self, target: FetchTarget, context: JobContext, report: ReportFile) -> CacheHit:
        """The model, in the cache and verified."""
        hit = None
        while hit is None:
            with self._single_flight.join(target.flight_key, context.is_next) as (shared, is_first):
                if is_first:
                    own = replace(context, is_next=shared.is_next)
                    hit = shared.hit = self._fetch_with_lease(target, own, shared.reporting(report))
                elif (shared_hit := shared.wait(context.deadline, report)) is not None:
                    hit = replace(shared_hit, downloaded=False)
        return replace(hit, warnings=(*target.remote.warnings, *hit.warnings))

    def _is_on_its_way(self, target: FetchTarget) -> bool:
        """Whether nothing has to be downloaded by this worker, as far as is known."""
        directory = self._cache.directories.for_new(target.ref.kind)
        return (
            self._look_up(target) is not None
            or any(True for _ in self._cache.list_unverified(target.exact_ref))
            or self._leases.is_alive(directory.leases / target.key)
        )

    def _room_request(self, target: FetchTarget, partial_file: Path | None = None) -> RoomRequest:
        """The room for a download, to `partial_file` or to where the owner of the lease downloads to."""
        directory = self._cache.directories.for_new(target.ref.kind)
        resumes = [partial_file or directory.partial_file(target.key, self._owner)]
        if partial_file is None and target.sha256 is not None:
            resumes += directory.left_partial_files(target.key, self._owner)
        return RoomRequest(target.flight_key, target.label, directory, target.size, tuple(resumes))

    def _find_unverified(
        self, ref: ModelRef, deadline: Deadline, report: ReportFile, error: ModelError
    ) -> CacheHit | None:
        """A file whose name claims to be the model, if its site cannot tell whether it is. `error` is the site's."""
        if ref.hub is not None:
            hit = self._cache.find_last_known(ref) if isinstance(error, DownloadFailed) else None
            warning = f"{ref.label} may have changed since it was fetched: {error.message}"
            return None if hit is None else replace(hit, warnings=(warning,))
        for directory, file in self._cache.list_unverified(ref):
            with contextlib.suppress(ModelError):
                record = self._cache.identify(directory, file, deadline, report_bytes(report, ref.label))
                if ref.sha256 is not None and record.sha256 != ref.sha256:
                    continue
                warning = f"{file} is used, but it could not be verified that it is {ref.label}: {error.message}"
                log.warning("%s", warning)
                return CacheHit(directory, record, warnings=() if ref.sha256 else (warning,))
        return None

    def _use_copy(
        self, target: FetchTarget, copy: CachedHubFile, deadline: Deadline, report: ReportFile
    ) -> CacheHit | None:
        """RunPod's copy of a file, linked and not copied, if its bytes are verified to be the file's."""
        sha256 = target.remote.sha256
        if sha256 is None or copy.sha256 not in (None, sha256) or target.ref.sha256 not in (None, sha256):
            return None
        try:
            file = target.file(sha256)
            directory = self._cache.link(target.ref.kind, copy.path, file)
            record = self._cache.identify(directory, file, deadline, report_bytes(report, target.label))
        except ModelError as error:
            log.warning("RunPod's copy of %s is not used: %s", copy.file, error.message)
            return None
        if record.sha256 != sha256:
            log.warning("RunPod's copy of %s is not used: its SHA-256 is %s", copy.file, record.sha256[:12])
            return None
        verified = target.verified_record(record)
        return CacheHit(directory, record if verified == record else self._cache.sidecars.write(directory, verified))

    # -- one worker of the fleet

    def _fetch_with_lease(self, target: FetchTarget, context: JobContext, report: ReportFile) -> CacheHit:
        """The model, downloaded by this worker while it has the lease, or by another one."""
        directory = self._cache.directories.for_new(target.ref.kind)
        while True:
            with contextlib.suppress(OSError):
                directory.prepare()  # somebody may have removed the folders
            lease = self._wait_for_lease(target, directory, context.deadline, report)
            if isinstance(lease, CacheHit):
                return lease
            with lease:
                self._cache.refresh(target.ref.kind)
                hit = self._find(target) or self._verify_present(target, context.deadline, report)
                if hit is not None:
                    return hit
                if target.reserved_file is not None and self._cache.is_in_use(directory, target.reserved_file):
                    raise DownloadFailed(
                        f"another worker uses a different file under the name {target.reserved_file}",
                        hint="try again later",
                    )
                try:
                    return self._fetch_file(target, lease, context, _reporting_both(target, lease, report))
                except PartialFileLost as error:
                    log.warning("%s: %s (this worker seemed dead)", target.label, error.message)
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
        hit = self._look_up(target)
        if hit is None:
            return None
        record = target.with_variant_filter(hit.record)
        if record.restricted and not target.remote.restricted:  # the site shows the same bytes to everybody
            record = replace(record, restricted=False, url=target.remote.url)
        if record is not hit.record:  # next time the site need not be asked about it
            record = self._cache.sidecars.write(hit.directory, record)
        return replace(hit, record=record)

    def _look_up(self, target: FetchTarget) -> CacheHit | None:
        return self._cache.find(target.exact_ref, fresh=True, is_shown=target.remote.hub is not None)

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

    def _fetch_file(self, target: FetchTarget, lease: Lease, context: JobContext, on_bytes: OnBytes) -> CacheHit:
        """Download the file, verify it, and make it a model. The lease, if it is a real one, is this worker's.

        If the volume turns out to be full (a quota does not show sooner), models are evicted, and the download goes on,
        as long as that brings it further.
        """
        directory = self._cache.directories.for_new(target.ref.kind)
        if lease.is_real:
            partial_file = directory.partial_file(target.key, self._owner)
        else:  # another worker may download the same file now: nothing of it is touched
            partial_file = directory.partial_file_alone(target.key, target.sha256, self._owner)
        request = self._room_request(target, None if lease.is_real else partial_file)
        # The worker is nothing without its checkpoint: no limit of ours keeps it out.
        limit = self._cache.limit if target.checkpoint is None else None
        may_adopt = lease.is_real and target.sha256 is not None  # without a hash nothing would show a wrong byte
        full_at: int | None = None  # how many bytes were there when the volume was full the last time
        with self._space.reserve([request], limit), _kept_if_useful(directory, partial_file, target.sha256):
            while True:
                try:
                    if look(directory.partial_files) is None:  # on a full volume it could not be made before
                        with translated("making the folders of the cache"):
                            directory.prepare()
                    if may_adopt:
                        check = context.deadline.check
                        directory.adopt_partial_files(target.key, self._owner, target.sha256 or "", check)
                    sha256 = self._download(target, partial_file, context, on_bytes)
                    # If the volume loses these bytes now, others do not take their place.
                    target = replace(target, remote=replace(target.remote, sha256=sha256))
                    return self._place(target, partial_file, sha256, context.deadline)
                except FileTooLong:
                    raise
                except VolumeFull as error:
                    state = saved_state(partial_file)
                    present = 0 if state is None else state.present
                    if present == full_at:
                        raise
                    full_at = present
                    log.warning("%s: %s: evicting", target.label, error.message)
                    self._space.make_room_on_full_disk(request)
                    if target.sha256 is None:
                        directory.remove_partial_file(partial_file)

    def _download(self, target: FetchTarget, partial_file: Path, context: JobContext, on_bytes: OnBytes) -> str:
        """Have every byte of the file in the partial file. Returns its SHA-256, which is the right one if one is known.

        A file with a wrong hash is downloaded once more, with a new link.
        """
        directory = self._cache.directories.for_new(target.ref.kind)
        link = functools.partial(self._site.link, target.remote, context.deadline)
        source = Source(target.label, link, size=target.remote.size, sha256=target.sha256, max_size=target.ref.max_size)
        sha256 = self._downloader.fetch(source, partial_file, context, on_bytes).sha256
        if target.sha256 not in (None, sha256):
            log.warning("%s has a wrong SHA-256, %s: downloading it again, with a new link", target.label, sha256[:12])
            directory.remove_partial_file(partial_file)
            sha256 = self._downloader.fetch(source, partial_file, context, on_bytes).sha256
        if target.sha256 not in (None, sha256):
            raise ModelRejected(
                f"{target.label} was downloaded twice, and its SHA-256 is {sha256[:12]}…, "
                f"not {(target.sha256 or '')[:12]}…"
            )
        return sha256

    def _place(self, target: FetchTarget, partial_file: Path, sha256: str, deadline: Deadline) -> CacheHit:
        """Make a complete partial file a model: the last verification, its name, its sidecar."""
        directory = self._cache.directories.for_new(target.ref.kind)
        file = target.file(sha256)
        same = None if target.remote.version_id is not None else self._cache.find_same_bytes(directory, sha256)
        if same is not None:
            file = same.file
        try:
            record = target.record(partial_file, file, sha256)
            if same is not None and not same.restricted:
                record = replace(record, restricted=False)
        except OSError as error:
            if volume_state(error) is VolumeState.GONE:
                raise PartialFileLost(f"the partial file of {target.label} is gone", hint="try again") from error
            raise volume_error(error, "reading a model back") from error
        if self._cache.make_name_free(directory, file, sha256, deadline):
            directory.place(partial_file, file)
        else:  # another worker was as fast, and the WebUI may have that file open
            directory.remove_partial_file(partial_file)
        record = self._cache.sidecars.write(directory, record)
        for url in target.urls:
            self._cache.sidecars.remember_url(directory, url, file)
        log.info("%s is here: %s, %.1f MB, sha256 %s", target.label, file, record.size / 1e6, sha256[:12])
        return CacheHit(directory, record, downloaded=True)


def _reporting_both(target: FetchTarget, lease: Lease, report: ReportFile) -> OnBytes:
    """What counts the bytes of a download: it reports them to the job, and to the workers that wait."""

    def on_bytes(done: int, total: int | None) -> None:
        lease.update(done, total)
        report(FileProgress(target.label, done, total))

    return on_bytes


@contextlib.contextmanager
def _kept_if_useful(directory: CacheDirectory, partial_file: Path, sha256: str | None) -> Iterator[None]:
    """Keep the partial file after a failure only if a later download may go on with it.

    A volume that failed may have lost bytes that it took before. Only a hash that is known beforehand shows that.
    """
    try:
        yield
    except ModelError as error:
        is_useful = isinstance(error, DownloadFailed) or (
            sha256 is not None and isinstance(error, (VolumeFull, VolumeFailed)) and not isinstance(error, FileTooLong)
        )
        state = saved_state(partial_file)
        if not is_useful or state is None or not state.present:
            with contextlib.suppress(VolumeFailed):
                directory.remove_partial_file(partial_file)
        raise

"""How a model that is missing comes into the cache: once for the process, once for the fleet, and proven.

    describe → [somebody in this process is at it: wait] → [another worker is at it: wait] → already here, under a name
    that claims it? → room → fetch → length, SHA-256, safetensors → its final name → what is known of it

Each step looks first whether the model has appeared in the meantime. Whoever waits takes over where the one who fetched
gave up, and goes on with its part.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from a1111_worker.catalog import KnownLora, lora_of_version
from a1111_worker.context import Deadline, JobContext
from a1111_worker.domain import ModelKind, ModelRef, RemoteFile
from a1111_worker.errors import DownloadFailed, FileTooLong, ModelError, ModelRejected, PartialFileLost, VolumeFull
from a1111_worker.models.cache import CheckpointSpec, Found, ModelCache, missing
from a1111_worker.models.civitai import CivitAI
from a1111_worker.models.leases import Lease, Leases
from a1111_worker.models.progress import FileProgress, Tell
from a1111_worker.models.safetensors import family_of_base_model
from a1111_worker.models.sidecars import Record, record_of, url_key, wish_of
from a1111_worker.models.volume import CacheDirectory, can_write, digest_file, version_file
from a1111_worker.transfer.download import Downloader, OnBytes, Source

log = logging.getLogger(__name__)


class Fetcher:
    """The way in. `poll` is how often a waiting one looks, in seconds."""

    def __init__(
        self,
        library: ModelCache,
        civitai: CivitAI,
        downloader: Downloader,
        leases: Leases,
        *,
        owner: str,
        poll: float = 0.1,
    ) -> None:
        self._library = library
        self._civitai = civitai
        self._downloader = downloader
        self._leases = leases
        self._owner = owner
        self._poll = poll
        self._flights: dict[str, _Flight] = {}
        self._lock = threading.Lock()

    def bring(
        self,
        ref: ModelRef,
        deadline: Deadline,
        tell: Tell,
        *,
        spec: CheckpointSpec | None = None,
        foreground: Callable[[], bool] = lambda: True,
    ) -> Found:
        """The model that a reference with an id or a URL means, in the cache and proven.

        With `spec` it is the fixed checkpoint, to be kept under its name. `foreground` says whether the GPU waits for
        it.
        """
        try:
            remote = self._civitai.describe(ref, deadline)
        except ModelError as error:
            found = self._unproven(ref, deadline, tell, error) if spec is None else None
            if found is None:
                raise
            return found
        wanted = _Wanted(ref, remote, spec)
        found = self._once_for_the_process(wanted, deadline, tell, foreground)
        return replace(found, warnings=(*remote.warnings, *found.warnings))

    def _unproven(self, ref: ModelRef, deadline: Deadline, tell: Tell, error: ModelError) -> Found | None:
        """A file that claims to be what is wanted, where CivitAI cannot be asked whether it is."""
        for shelf, file in self._library.claims(ref):
            with contextlib.suppress(ModelError):
                record = self._library.read(
                    shelf, file, deadline, lambda done, total: tell(FileProgress(ref.label, done, total))
                )
                if ref.sha256 is not None and record.sha256 != ref.sha256:
                    continue
                warning = f"{file} is used without a proof that it is {ref.label}: {error.message}"
                log.warning("%s", warning)
                return Found(shelf, record, warnings=() if ref.sha256 else (warning,))
        return None

    # -- one of a process

    def _once_for_the_process(
        self, wanted: _Wanted, deadline: Deadline, tell: Tell, foreground: Callable[[], bool]
    ) -> Found:
        # Whoever names another hash fetches for itself: a wrong one is nobody else's failure.
        key = f"{wanted.ref.kind.value}:{wanted.key}:{wanted.sha256}"
        while True:
            with self._flight(key) as (flight, is_mine), flight.wanted(foreground):
                if is_mine:
                    wanted = replace(wanted, foreground=flight.is_foreground)
                    return flight.landed(self._once_for_the_fleet(wanted, deadline, flight.told(tell)))
                flight.wait(deadline, tell)
                if flight.found is not None:
                    return replace(flight.found, downloaded=False)

    @contextlib.contextmanager
    def _flight(self, key: str) -> Iterator[tuple[_Flight, bool]]:
        with self._lock:
            flight = self._flights.get(key)
            is_mine = flight is None
            if flight is None:
                flight = self._flights[key] = _Flight()
        try:
            yield flight, is_mine
        except ModelError as error:
            flight.error = flight.error or error
            raise
        finally:
            if is_mine:
                with self._lock:
                    del self._flights[key]
                flight.over.set()

    # -- one of a fleet

    def _once_for_the_fleet(self, wanted: _Wanted, deadline: Deadline, tell: Tell) -> Found:
        home = self._library.shelves.home(wanted.ref.kind)
        with contextlib.suppress(OSError):
            home.prepare()  # somebody may have tidied up
        path = home.leases / wanted.key
        waiting = _Patience(wanted.name)
        while True:
            deadline.check()
            if (found := self._look(wanted)) is not None:
                return found
            lease = self._leases.take(path)
            if lease is not None:
                with lease:
                    self._library.list_again(wanted.ref.kind)
                    found = self._look(wanted) or self._claimed(wanted, deadline, tell)
                    try:
                        return found or self._fetch(wanted, home, lease, deadline, tell)
                    except PartialFileLost:
                        log.warning("%s: this worker was thought dead, and another one goes on with it", wanted.name)
            if (note := self._leases.note(path)) is not None:
                waiting.say(note.owner)
                who = "another job" if note.owner == self._owner else "another worker"
                tell(FileProgress(wanted.name, note.done, note.total or wanted.remote.size, waiting=who))
            is_close = note is not None and note.total is not None and note.done > 0.9 * note.total
            deadline.wait(self._poll / 5 if is_close else self._poll)

    def _look(self, wanted: _Wanted) -> Found | None:
        if wanted.spec is not None:
            return self._library.checkpoint(wanted.spec)
        found = self._library.find(wanted.precise, fresh=True)
        wish = wish_of(wanted.ref)
        if found is not None and wish and wish not in found.record.wishes:
            record = replace(found.record, wishes=(*found.record.wishes, wish))  # CivitAI need not be asked again
            return replace(found, record=self._library.registry.write(found.shelf, record))
        return found

    def _claimed(self, wanted: _Wanted, deadline: Deadline, tell: Tell) -> Found | None:
        """A file that is there under a name that claims to be what is wanted: proven by its bytes, or not used."""
        if wanted.spec is not None:  # whoever calls has looked at those, and does not want them
            return None
        for shelf, file in self._library.claims(wanted.precise):
            if wanted.remote.size is not None and shelf.size(file) != wanted.remote.size:
                continue
            try:
                record = self._library.read(
                    shelf, file, deadline, lambda done, total: tell(FileProgress(wanted.name, done, total))
                )
            except ModelError:
                continue
            if wanted.sha256 is None:
                warning = f"{file} was there already, and no hash is known that would prove it to be {wanted.name}"
                return Found(shelf, record, warnings=(warning,))
            if record.sha256 == wanted.sha256:
                known = self._library.registry.write(shelf, wanted.described(record))
                log.info("%s was here already, proven by its SHA-256 %s", file, record.sha256[:12])
                return Found(shelf, known)
            log.warning("%s is not used: its SHA-256 is %s, not %s", file, record.sha256[:12], wanted.sha256[:12])
        return None

    # -- one file

    def _fetch(self, wanted: _Wanted, home: CacheDirectory, lease: Lease, deadline: Deadline, tell: Tell) -> Found:
        part = home.part(wanted.key, self._owner)
        if wanted.sha256 is not None:  # without one, a part whose owner only seemed dead might still be written to
            home.adopt_part(wanted.key, self._owner)
        if wanted.settled_file is not None and self._library.is_taken(home, wanted.settled_file):
            raise DownloadFailed(
                f"another worker uses a different file under the name {wanted.settled_file}", hint="try again later"
            )
        # The worker is nothing without its checkpoint: no limit of ours keeps that out.
        limit = self._library.limit if wanted.spec is None else None

        def on_progress(done: int, total: int | None) -> None:
            lease.tell(done, total)
            tell(FileProgress(wanted.name, done, total))

        with (
            self._library.room(part, wanted.size, wanted.name, kind=home.kind, limit=limit),
            _kept_if_of_use(home, part),
        ):
            sha256 = self._bytes(wanted, part, deadline, on_progress)
        with _kept_if_of_use(home, part):  # a whole part takes what it takes: it needs no more room
            return self._place(wanted, home, part, sha256, deadline)

    def _bytes(self, wanted: _Wanted, part: Path, deadline: Deadline, on_progress: OnBytes) -> str:
        """Every byte in the part, of the right hash: once more where it is the wrong one."""
        sha256 = self._whole(wanted, part, deadline, on_progress)
        if sha256 == (wanted.sha256 or sha256):
            return sha256
        log.warning("%s arrived with the SHA-256 %s: once more, with a fresh link", wanted.name, sha256[:12])
        self._library.shelves.home(wanted.ref.kind).drop_part(part)
        sha256 = self._whole(wanted, part, deadline, on_progress)
        if sha256 == wanted.sha256:
            return sha256
        raise ModelRejected(
            f"{wanted.name} arrived twice with the SHA-256 {sha256[:12]}…, not {(wanted.sha256 or '')[:12]}…"
        )

    def _whole(self, wanted: _Wanted, part: Path, deadline: Deadline, on_progress: OnBytes) -> str:
        """Every byte in the part: once more where the disk was full, which a quota says no sooner."""
        for is_last in (False, True):
            try:
                fetched = self._downloader.fetch(
                    Source(
                        wanted.name,
                        link=lambda: self._civitai.link(wanted.remote, deadline),
                        size=wanted.remote.size,
                        sha256=wanted.sha256,
                    ),
                    part,
                    JobContext(deadline, is_next=wanted.foreground),
                    on_progress,
                )
            except FileTooLong:
                raise
            except VolumeFull:
                if is_last or not can_write(part.parent, self._owner):
                    raise
                log.warning("the disk was full before %s was whole: evicting once", wanted.name)
                self._library.clear(missing(part, wanted.size), wanted.name, kind=wanted.ref.kind)
            else:
                return fetched.sha256
        raise AssertionError("unreachable")

    def _place(self, wanted: _Wanted, home: CacheDirectory, part: Path, sha256: str, deadline: Deadline) -> Found:
        """From a whole part to a model: the last proof, its name, what is known of it."""
        registry = self._library.registry
        file = wanted.file(sha256)
        if wanted.remote.version_id is None and (twin := self._library.with_bytes(home, sha256)) is not None:
            file = twin.file
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        try:
            record = record_of(home.kind, part, file, wanted.remote, wanted.ref, sha256, now)
            if self._makes_way(home, file, sha256, deadline):
                home.place(part, file)
            else:  # somebody else was as fast, and the WebUI may have that file open
                home.drop_part(part)
        except FileNotFoundError as error:
            raise PartialFileLost(f"the part of {wanted.name} was taken away", hint="try again") from error
        except OSError as error:
            raise VolumeFull(f"{wanted.name} could not be written ({error.strerror or 'I/O error'})") from error
        record = registry.write(home, replace(record, name=wanted.title, primary=wanted.is_main))
        if wanted.ref.url is not None:
            registry.remember_url(home, wanted.ref.url, file)
        log.info("%s is here: %s, %.1f MB, sha256 %s", wanted.name, file, record.size / 1e6, sha256[:12])
        return Found(home, record, downloaded=True)

    def _makes_way(self, home: CacheDirectory, file: str, sha256: str, deadline: Deadline) -> bool:
        """Have the name free; False where the very model has it already."""
        occupant = self._library.occupant(home, file)
        if occupant is None:
            return True
        there = self._library.registry.look(home, occupant)
        if there is not None and there.sha256 == sha256 and occupant == file:
            return False
        self._library.set_aside(home, occupant, deadline)
        return True


@dataclass(frozen=True)
class _Wanted:
    """A reference and what CivitAI said of it. With `spec` it is the fixed checkpoint.

    `foreground` says whether the GPU waits for one of the jobs that want it.
    """

    ref: ModelRef
    remote: RemoteFile
    spec: CheckpointSpec | None
    foreground: Callable[[], bool] = lambda: True

    @property
    def name(self) -> str:
        return self.remote.name or self.ref.name or self.ref.label

    @property
    def title(self) -> str:
        if self.spec is not None:
            return self.spec.name
        known = self._known
        return known.title if known else self.name

    @property
    def _known(self) -> KnownLora | None:
        """The catalog's entry, whose file name belongs to this version alone."""
        if self.ref.kind is not ModelKind.LORA or self.remote.version_id is None or not self.is_main:
            return None
        return lora_of_version(self.remote.version_id)

    @property
    def is_main(self) -> bool:
        """Whether it is the file that the version's id alone means."""
        asked_plainly = self.ref.file_id is None and not wish_of(self.ref)
        unseen = self.remote.size is None and self.remote.size_at_most is None
        return asked_plainly or (self.remote.primary and not unseen)

    @property
    def size(self) -> int | None:
        """Bytes that it will not exceed, where anybody says."""
        return self.remote.size or self.remote.size_at_most

    @property
    def sha256(self) -> str | None:
        return self.remote.sha256 or self.ref.sha256

    @property
    def key(self) -> str:
        """What is fetched, as parts and leases name it: the same for every worker, whatever a job calls it."""
        if self.remote.version_id is None:
            return f"u{url_key(self.ref.url or self.remote.url)}"
        if self.is_main or self.remote.file_id is None:
            return f"v{self.remote.version_id}"
        return f"v{self.remote.version_id}-{self.remote.file_id}"

    @property
    def precise(self) -> ModelRef:
        """The reference with the ids that CivitAI's answer settled."""
        if self.remote.version_id is None:
            return self.ref
        file_id = None if self.is_main else self.remote.file_id
        return replace(
            self.ref, version_id=self.remote.version_id, file_id=file_id, size=None, fp=None, url=None, model_id=None
        )

    @property
    def settled_file(self) -> str | None:
        """The file name that this model must have and no other may, where there is one."""
        if self.spec is not None:
            return self.spec.file
        return self._known.file if self._known is not None else None

    def file(self, sha256: str) -> str:
        if self.settled_file is not None:
            return self.settled_file
        name = self.ref.name or self.remote.name
        if self.remote.version_id is None:
            return digest_file(name, sha256)
        return version_file(name, self.remote.version_id, None if self.is_main else self.remote.file_id)

    def described(self, record: Record) -> Record:
        """A record of a file that was there, with what is known now that it is proven to be this one."""
        remote = self.remote
        return replace(
            record,
            name=self.title,
            url=remote.url.partition("?")[0],
            version_id=remote.version_id,
            file_id=remote.file_id,
            primary=self.is_main,
            wishes=tuple(dict.fromkeys((*record.wishes, *filter(None, [wish_of(self.ref)])))),
            base_model=remote.base_model,
            family=family_of_base_model(remote.base_model) if record.family is None else record.family,
            trained_words=remote.trained_words,
        )


class _Flight:
    """One fetch of a process; the others wait for it."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.found: Found | None = None
        self.error: ModelError | None = None
        self._tally: FileProgress | None = None
        self._wanted: list[Callable[[], bool]] = []

    @contextlib.contextmanager
    def wanted(self, foreground: Callable[[], bool]) -> Iterator[None]:
        """One more job wants it until the block ends."""
        self._wanted.append(foreground)
        try:
            yield
        finally:
            self._wanted.remove(foreground)

    def is_foreground(self) -> bool:
        return any(foreground() for foreground in list(self._wanted))

    def landed(self, found: Found) -> Found:
        self.found = found
        return found

    def told(self, tell: Tell) -> Tell:
        def both(tally: FileProgress) -> None:
            self._tally = tally
            tell(tally)

        return both

    def wait(self, deadline: Deadline, tell: Tell) -> None:
        """Until it is over; raises the error that the one who fetched met. Cancelled: nothing, somebody takes over."""
        while not self.over.wait(0.05):
            deadline.check()
            if self._tally is not None:
                tell(replace(self._tally, waiting=self._tally.waiting or "another job"))
        if self.error is not None:
            raise copy.copy(self.error)


class _Patience:
    """One line in the log when somebody else is waited for, another every 20 s."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._began = time.monotonic()
        self._next = 0.0

    def say(self, owner: str) -> None:
        waited = time.monotonic() - self._began
        if waited >= self._next:
            self._next = waited + 20
            log.info("waiting for %s, which is fetching %s, %.0f s", owner, self._name, waited)


@contextlib.contextmanager
def _kept_if_of_use(home: CacheDirectory, part: Path) -> Iterator[None]:
    """Only a download that may go on keeps what has come of it."""
    try:
        yield
    except ModelError as error:
        if not isinstance(error, DownloadFailed) or _is_empty(part):
            home.drop_part(part)
        raise


def _is_empty(part: Path) -> bool:
    try:
        return part.stat().st_size == 0
    except OSError:
        return True

"""A file on its way: what is known of it, which of its bytes are on disk, and its SHA-256 as far as it is computed.

One thread owns an IncomingFile. The threads of the connections use only `accept`, `write` and `end_at`: until the first
answer is accepted there is one such thread, and after that these change nothing but that thread's own range.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

from a1111_worker.errors import ModelError, ModelRejected, PartialFileLost
from a1111_worker.transfer.connection import Answer, FileChanged, RangesUnsupported, TemporaryFault
from a1111_worker.transfer.partial_file import PartialFile, PartialFileState
from a1111_worker.transfer.ranges import ByteRange, ByteRanges, MiB, Tuning

log = logging.getLogger(__name__)

_HASHED_AT_ONCE = 4 * MiB


@dataclass(frozen=True)
class Source:
    """A file to fetch. `label` is how messages and log lines name it.

    `link` returns a URL of the file's bytes, or raises one of our errors. It is called once a file, and again only if
    the last URL is old or was refused. `size` is exact, in bytes. `sha256` tells whether what an earlier download left
    is of the same file; the bytes are not judged by it. None: unknown. A file of more than `max_size` bytes is refused.
    """

    label: str
    link: Callable[[], str]
    size: int | None = None
    sha256: str | None = None
    max_size: int | None = None


class IncomingFile:
    """`is_confirmed`: its owner knows that an answer agrees with all this. Until then only one connection asks."""

    def __init__(self, source: Source, part: PartialFile, tuning: Tuning) -> None:
        self.part = part
        self._source = source
        self.tuning = tuning
        self._max_size = min(source.max_size or tuning.max_file_bytes, tuning.max_file_bytes)
        if source.size is not None:
            self._check_size(source.size)
        self.has_ranges = True  # the storage answers range requests, as far as known
        self._buffer = memoryview(bytearray(MiB))
        self._forget()

    def _forget(self) -> None:
        self.ranges: ByteRanges | None = None
        self.etag: str | None = None
        self.is_confirmed = False
        self._is_size_known = True
        self._ignored_ranges = 0
        self.resumed = 0  # bytes that were there before this download
        self._saved = self._hashed = 0
        self._saved_at = 0.0
        self._digest = hashlib.sha256()

    @property
    def size(self) -> int | None:
        """The file's size, None while it is unknown."""
        return self.ranges.size if self.ranges and self._is_size_known else None

    @property
    def done(self) -> int:
        """Bytes on disk."""
        return self.ranges.size - self.ranges.left if self.ranges else 0

    @property
    def left(self) -> int | None:
        """Missing bytes, as far as known."""
        return self.ranges.left if self.ranges else self._source.size

    @property
    def is_complete(self) -> bool:
        return self.ranges is not None and self._is_size_known and not self.ranges.left

    @property
    def is_hashed(self) -> bool:
        return self.is_complete and self._hashed == self.size

    @property
    def sha256(self) -> str:
        """Of the bytes that were hashed."""
        return self._digest.hexdigest()

    def resume(self) -> None:
        """Go on with what an earlier download of the same file left."""
        source = self._source
        saved = self.part.load_state()
        if saved is None:
            return
        if not saved.may_be_of(source.size, source.sha256):
            log.info("%s: what an earlier download left is of another file; it starts over", source.label)
            return
        ranges = ByteRanges(saved.size, saved.done)
        if not ranges.left and not (source.size or source.sha256):
            return  # complete, but of which file? No answer will tell.
        self.ranges, self.etag = ranges, saved.etag
        self.resumed = self._saved = saved.present
        log.info("%s: %.1f MB of it are on disk already, from an earlier download", source.label, self.done / 1e6)
        self.part.set_size(saved.size)

    def start_over(self) -> None:
        """Forget every byte."""
        self._forget()
        self.part.clear()

    # -- for the connections

    def accept(self, asked: ByteRange, answer: Answer) -> ByteRange:
        """Check an answer against what is known of the file. Returns the range that its bytes fill.

        Raises RequestFault or ModelError.
        """
        total = answer.total
        if answer.is_partial and total is None:
            if self._source.size is None:
                raise RangesUnsupported("the storage does not say how long it is")
            total = self._source.size
        if self.ranges is None:
            return self._open(answer, total)
        if total != self.ranges.size or (self.etag and answer.etag and answer.etag != self.etag):
            raise FileChanged("it is another file than before")
        if not answer.is_partial:
            if self.etag and not answer.etag:
                raise FileChanged("it is another file than before")
            # The same file, but all of it: this server ignores Range at times, or from now on.
            self._ignored_ranges += 1
            if self._ignored_ranges >= 3:
                raise RangesUnsupported("the storage sends no parts any more")
            raise TemporaryFault("the storage sent all instead of a part")
        return asked

    def write(self, byte_range: ByteRange, view: memoryview) -> None:
        """Write the next bytes of a range, as far as it was not stolen. They count, whatever comes after."""
        view = view[: byte_range.left]
        if view:
            self.part.write(view, byte_range.start)
            byte_range.start += len(view)

    def end_at(self, byte_range: ByteRange) -> None:
        """An answer without a length ended, and so does the file, unless it is known to be longer."""
        assert self.ranges is not None
        if self._source.size is not None and byte_range.left:
            raise TemporaryFault("it ended too early")
        self._check_size(byte_range.start)
        self.part.set_size(byte_range.start)
        self.ranges.end_at(byte_range.start)
        self._is_size_known = True

    def _open(self, answer: Answer, total: int | None) -> ByteRange:
        """The first answer of a download says what the file is."""
        if total is not None:
            self._check_size(total)
        size = total or self._source.size
        if size is not None:
            try:
                self.part.set_size(size)
            except ModelError:
                self.part.path.unlink(missing_ok=True)
                raise
        ranges = ByteRanges(size or self._max_size)
        byte_range = ranges.claim(ranges.size if answer.end is None else answer.end)
        assert byte_range is not None
        self.etag, self.has_ranges, self._is_size_known = answer.etag, answer.is_partial, total is not None
        self.ranges = ranges
        return byte_range

    def _check_size(self, size: int) -> None:
        """Raise ModelRejected if this cannot be the size of the file."""
        label, expected, most = self._source.label, self._source.size, self._max_size
        if size > most:
            raise ModelRejected(f"{label} is too large: {size:,} bytes, at most {most:,}")
        if size == 0:
            raise ModelRejected(f"{label} is empty")
        if expected is not None and size != expected:
            raise ModelRejected(f"{label} has {size:,} bytes instead of {expected:,}")

    # -- what is on disk

    @property
    def unsaved(self) -> int:
        """Bytes on disk of which a later download would know nothing."""
        return self.done - self._saved

    def save_sometimes(self, now: float) -> None:
        """Save it when a crash would cost too many bytes."""
        if self.unsaved >= self.tuning.remember_bytes or now - self._saved_at >= self.tuning.remember_seconds:
            self._saved_at = now
            if self.unsaved:
                self.save()

    def save(self) -> None:
        """Save which bytes are on disk, if another download could go on with them."""
        if self.ranges is not None and self.has_ranges and self._is_size_known:
            done = tuple(self.ranges.done())
            state = PartialFileState(self.ranges.size, self.etag, self._source.sha256, done)
            self._saved = state.present
            self.part.save_state(state)

    def hash_some(self) -> bool:
        """Hash some of the bytes that are there without a gap. Returns False if there are none."""
        end = min(self.ranges.contiguous if self.ranges else 0, self._hashed + _HASHED_AT_ONCE)
        if self._hashed >= end:
            return False
        while self._hashed < end:
            count = self.part.read_into(self._buffer[: end - self._hashed], self._hashed)
            if not count:
                raise PartialFileLost("the partial file is shorter than what was written to it")
            self._digest.update(self._buffer[:count])
            self._hashed += count
        return True

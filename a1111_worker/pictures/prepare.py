"""The pictures of a job: fetched, measured against the limits, then decoded one after the other.

It happens before the job waits for the GPU, while another job generates. What pictures take in memory is bounded: a
job's decoded pictures by MAX_DECODED_BYTES, and one picture is decoded at a time in the whole process.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from a1111_worker.context import Deadline, JobContext
from a1111_worker.domain import PictureSource
from a1111_worker.errors import Complaint, DownloadFailed, InvalidRequest
from a1111_worker.pictures.decode import PreparedPicture, count_pixels, decode_mask, decode_picture
from a1111_worker.pictures.fetch import PictureFetcher
from a1111_worker.pictures.source import BadPicture, decode_base64

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_DECODED_BYTES = 128_000_000
_BYTES_OF_PIXEL = 3
_FETCHED_AT_ONCE = 4


class PicturePreparer:
    """Prepares the pictures of jobs; several threads may use it. Without a fetcher no source may be a URL."""

    def __init__(self, fetcher: PictureFetcher | None = None, *, max_decoded: int = MAX_DECODED_BYTES) -> None:
        self._fetcher = fetcher
        self._max_decoded = max_decoded
        self._decoding = threading.Lock()

    def prepare(self, sources: Mapping[str, PictureSource], context: JobContext) -> dict[str, PreparedPicture]:
        """Each picture as a plain PNG, under its path in the job.

        Raises InvalidRequest with every complaint, DownloadFailed if a URL may have its picture later.
        """
        if not sources:
            return {}
        began = time.monotonic()
        complaints = _Complaints()
        files = self._read(sources, complaints, context.deadline)
        pixels = complaints.of_each(files, lambda path: count_pixels(files[path]))
        self._check_sum(pixels, complaints)
        prepared: dict[str, PreparedPicture] = {}

        def decode(path: str) -> PreparedPicture:
            context.deadline.check()
            source, data = sources[path], files.pop(path)
            with self._decoding:
                if source.mask_of is None:
                    return decode_picture(data)
                picture = prepared.get(source.mask_of)  # None: it cannot be used, and the job fails in any case
                return decode_mask(data, picture.size if picture else None, is_rounded=source.is_rounded)

        for are_masks in (False, True):
            paths = [path for path in pixels if (sources[path].mask_of is not None) is are_masks]
            prepared |= complaints.of_each(paths, decode)
        complaints.check(sources)
        log.info("%d pictures are prepared after %.1f s", len(prepared), time.monotonic() - began)
        return prepared

    def read(self, path: str, source: PictureSource, context: JobContext) -> bytes:
        """The file of one picture, as it is. Raises InvalidRequest, DownloadFailed."""
        complaints = _Complaints()
        files = self._read({path: source}, complaints, context.deadline)
        complaints.check([path])
        return files[path]

    def _read(
        self, sources: Mapping[str, PictureSource], complaints: _Complaints, deadline: Deadline
    ) -> dict[str, bytes]:
        """The bytes of the pictures, those behind URLs fetched side by side."""

        def read(path: str) -> bytes:
            source = sources[path]
            if source.base64 is not None:
                return decode_base64(source.base64)
            if self._fetcher is None or source.url is None:
                raise BadPicture("cannot be fetched by this worker")
            try:
                return self._fetcher.fetch(source.url, deadline)
            except DownloadFailed as error:
                raise DownloadFailed(f"{path}: {error.message}", hint=error.hint) from error

        with ThreadPoolExecutor(max_workers=_FETCHED_AT_ONCE, thread_name_prefix="picture") as threads:
            running = {path: threads.submit(read, path) for path in sources}
        return complaints.of_each(running, lambda path: running[path].result())

    def _check_sum(self, pixels: Mapping[str, int], complaints: _Complaints) -> None:
        total = sum(pixels.values()) * _BYTES_OF_PIXEL
        if total > self._max_decoded:
            complaints.add(
                next(iter(pixels)),
                f"and the job's other pictures take {total / 1e6:.0f} MB when they are decoded, "
                f"and the limit is {self._max_decoded / 1e6:.0f} MB",
            )
            complaints.check(pixels)


class _Complaints:
    """What is wrong with a job's pictures so far: at most one complaint about each."""

    def __init__(self) -> None:
        self._found: dict[str, Complaint] = {}

    def add(self, path: str, message: str) -> None:
        self._found[path] = Complaint(path, message)

    def of_each(self, paths: Iterable[str], decide: Callable[[str], T]) -> dict[str, T]:
        """What `decide` returns for each path, without those for which it raises BadPicture."""
        results: dict[str, T] = {}
        for path in list(paths):
            try:
                results[path] = decide(path)
            except BadPicture as error:
                self.add(path, str(error))
        return results

    def check(self, order: Iterable[str]) -> None:
        """Raise InvalidRequest if there is a complaint; they are listed in this order of paths."""
        if self._found:
            raise InvalidRequest([self._found[path] for path in order if path in self._found])

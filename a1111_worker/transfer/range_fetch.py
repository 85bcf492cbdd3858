"""A range of a file on its way over one connection, in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from a1111_worker.errors import ModelRejected
from a1111_worker.transfer.connection import Answer, Connection, TemporaryFault
from a1111_worker.transfer.incoming_file import IncomingFile
from a1111_worker.transfer.ranges import ByteRange
from a1111_worker.transfer.retries import Link


class RangeFetch:
    """It requests `byte_range`, or the whole file if the storage has no ranges. Then the range is what the answer has.

    `report` is called in its thread: when the answer was accepted (`is_answered`), and when all is over (`is_over`,
    with the `error` that ended it, or None). The bytes that came count, however it ended.
    """

    def __init__(
        self,
        connection: Connection,
        file: IncomingFile,
        link: Link,
        byte_range: ByteRange,
        report: Callable[[RangeFetch], None],
    ) -> None:
        self.connection = connection
        self.link = link
        self.byte_range = byte_range
        self.is_answered = False
        self.is_over = False
        self.error: BaseException | None = None
        self._file = file
        self._report = report
        self._received_before = connection.received
        self.began = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="download-range", daemon=True)
        self._thread.start()

    @property
    def received(self) -> int:
        """Bytes that came, whether they are on disk yet or not."""
        return self.connection.received - self._received_before

    def speed(self, now: float) -> float:
        """Bytes a second since the request."""
        return self.received / max(1e-3, now - self.began)

    def abort(self) -> None:
        """End it now. What is missing of its range can be fetched anew."""
        self.connection.abort()

    def join(self, seconds: float | None) -> bool:
        """Wait for its end. Returns whether its thread has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            asked = self.byte_range if self._file.has_ranges else None
            answer = self.connection.ask(self.link.url, asked, self._file.etag)
            self.byte_range = self._file.accept(self.byte_range, answer)
            self.is_answered = True
            self._report(self)
            self._receive(self.byte_range, answer)
        except BaseException as error:  # the thread that wants the file judges it
            self.error = error
            self.connection.close()
        self.is_over = True
        self._report(self)

    def _receive(self, byte_range: ByteRange, answer: Answer) -> None:
        has_ended = self._copy(byte_range)
        if answer.length is None:
            if not byte_range.left and self.connection.has_more():
                raise ModelRejected("more bytes came than the model has")
            self._file.end_at(byte_range)
        elif has_ended:
            raise TemporaryFault("the connection ended too early")
        self.connection.finish()

    def _copy(self, byte_range: ByteRange) -> bool:
        """Copy the answer to disk until it, or the range, is over. Returns whether it ended without being announced."""
        connection, file, buffer = self.connection, self._file, self.connection.buffer
        filled, flushed_at, count = 0, time.monotonic(), 1
        try:
            # The end of the range may be stolen meanwhile.
            while count and not connection.is_read and (room := min(len(buffer), byte_range.left) - filled) > 0:
                count = connection.read_into(buffer[filled : filled + room])
                filled += count
                if filled == len(buffer) or time.monotonic() - flushed_at > 0.5:
                    file.write(byte_range, buffer[:filled])
                    filled, flushed_at = 0, time.monotonic()
        finally:
            file.write(byte_range, buffer[:filled])
        return not count

"""A thread with one connection: range request after range request, until there is none or one fails."""

from __future__ import annotations

import threading
import time

from a1111_worker.errors import ModelRejected
from a1111_worker.transfer.concurrency import ConnectionLimit
from a1111_worker.transfer.connection import (
    NETWORK_ERRORS,
    Connection,
    RangeRequest,
    RangeResponse,
    RequestFault,
    TemporaryFault,
    network_fault,
)
from a1111_worker.transfer.ranges import ByteRange
from a1111_worker.transfer.state import DownloadState


class RangeWorker:
    """It works for one download, and gives its place in the worker's `limit` back when it ends."""

    def __init__(self, state: DownloadState, connection: Connection, limit: ConnectionLimit) -> None:
        self._state = state
        self._connection = connection
        self._limit = limit
        self._buffer = memoryview(bytearray(state.tuning.buffer_bytes))
        self._thread = threading.Thread(target=self._run, name="download-range", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        state, connection = self._state, self._connection
        try:
            while (request := state.next_request(connection)) is not None:
                if (fault := self._try(request)) is not None:
                    state.handle_fault(connection, request, fault)
                    break
        except BaseException as error:  # the thread that asked for the file raises it
            state.fail(error)
        finally:
            connection.close()
            self._limit.release()
            state.leave(connection)

    def _try(self, request: RangeRequest) -> RequestFault | None:
        """Carry out a request. Returns what went wrong, if something can be done about it."""
        byte_range = request.byte_range
        try:
            response = self._connection.ask(request)
            byte_range = self._state.accept(request, response, self._connection.url)
            self._receive(byte_range, response)
        except RequestFault as fault:
            return fault
        except NETWORK_ERRORS as error:
            return network_fault(error)
        finally:
            if byte_range is not None:
                self._state.release(byte_range)
        return None

    def _receive(self, byte_range: ByteRange, response: RangeResponse) -> None:
        """Write the bytes of an answer to their place. The bytes that came count, however it ends."""
        is_cut = self._copy(byte_range)
        connection = self._connection
        if response.length is None:
            if not byte_range.left and connection.has_more():
                raise ModelRejected("more bytes came than the model has")
            if not connection.is_retired:
                self._state.end_file(byte_range)
        connection.finish()
        if is_cut and response.length is not None:
            raise TemporaryFault("the connection ended too early")

    def _copy(self, byte_range: ByteRange) -> bool:
        """Copy the answer to disk until it, or the range, is over. Returns whether the server ended it."""
        state, connection, buffer = self._state, self._connection, self._buffer
        filled, flushed_at = 0, time.monotonic()
        try:
            # Half of the range may be stolen meanwhile. Then it ends earlier.
            while not connection.is_read and (room := min(len(buffer), byte_range.left) - filled) > 0:
                count = connection.read_into(buffer[filled : filled + room])
                filled += count
                now = time.monotonic()
                if filled >= state.tuning.flush_bytes or now - flushed_at > 0.5:
                    state.write(connection, byte_range, buffer[:filled])
                    filled, flushed_at = 0, now
                if not count or connection.is_retired:
                    return not connection.is_retired
            return False
        finally:
            if filled:
                state.write(connection, byte_range, buffer[:filled])

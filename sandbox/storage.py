"""The store that CivitAI keeps its files in: signed links, byte ranges, and every fault of a connection or a store."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import quote, urlencode

from sandbox.server import Exchange, ReceivedRequest, Server

StorageForm = Literal["r2", "b2"]

_LINK_LIFE: Mapping[StorageForm, int] = {"r2": 86_400, "b2": 3_600}
_PIECE = 4 << 20


@dataclass(frozen=True)
class ServerFault:
    """What a server does instead of the correct thing.

    With `status`: it sends this answer. With `no_answer`: it is silent until the client leaves, or sends FIN or RST.
    Otherwise it sends the correct answer, changed by every field that is set.
    """

    status: int | None = None
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    no_answer: Literal["silence", "cut", "reset"] | None = None

    cut_after: int | None = None  # FIN after this many bytes of the body
    reset_after: int | None = None  # RST after this many bytes
    stall_after: int | None = None  # silence after this many bytes
    rate: float | None = None  # bytes per second
    missing: int = 0  # this many bytes too few; Content-Length agrees, Content-Range does not
    extra: int = 0  # this many bytes too many; Content-Length agrees
    shift: int = 0  # another range than the requested one, with its correct Content-Range
    content_range: str | None = None  # only Content-Range is wrong
    whole: bool = False  # 200 and the whole file, whatever range was requested
    framing: Literal["length", "close", "chunked", "gzip"] = "length"
    etag: str | None = None


SILENCE = ServerFault(no_answer="silence")
CUT = ServerFault(no_answer="cut")
RESET = ServerFault(no_answer="reset")


def json_fault(status: int, value: Any, **headers: str) -> ServerFault:
    return ServerFault(status, json.dumps(value).encode(), {"content-type": "application/json", **headers})


def html_fault(status: int, text: str) -> ServerFault:
    page = f"<!DOCTYPE html><html><head><title>{text}</title></head><body><h1>{text}</h1></body></html>\n"
    return ServerFault(status, page.encode(), {"content-type": "text/html; charset=utf-8"})


def redirect(location: str, status: int = 307) -> ServerFault:
    return ServerFault(status, headers={"location": location, "cache-control": "no-store"})


def store_error(status: int, code: str, message: str) -> ServerFault:
    """An error in the format of S3 and R2."""
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return ServerFault(status, body.encode(), {"content-type": "application/xml"})


def b2_error(status: int, code: str, message: str) -> ServerFault:
    """An error in the format of Backblaze."""
    return json_fault(status, {"code": code, "message": message, "status": status})


HTML_PAGE = html_fault(200, "Sign in to continue")
SLOW_DOWN = store_error(503, "SlowDown", "Please reduce your request rate.")
STORE_ERROR = store_error(500, "InternalError", "We encountered an internal error. Please try again.")
EXPIRED_R2 = store_error(403, "ExpiredRequest", "Request has expired")
EXPIRED_B2 = b2_error(401, "expired_auth_token", "Authorization token has expired")
DOWNLOAD_CAP = b2_error(403, "download_cap_exceeded", "Cannot download file, download bandwidth cap exceeded.")
NOT_SATISFIABLE = store_error(416, "InvalidRange", "The requested range is not satisfiable")

_BAD_SIGNATURE = store_error(403, "SignatureDoesNotMatch", "The request signature we calculated does not match.")
_BAD_TOKEN = b2_error(401, "bad_auth_token", "Invalid authorization token")
_NO_KEY = store_error(404, "NoSuchKey", "The specified key does not exist.")
_TWO_KEYS = store_error(400, "InvalidArgument", "Only one auth mechanism allowed")
_NO_METHOD = ServerFault(405)


class FaultyServer(Server):
    """A server that fails on request."""

    def __init__(self, port: int = 0) -> None:
        super().__init__(port)
        self._lock = threading.RLock()
        self._faults: list[tuple[str, ServerFault, int | None]] = []

    def fail(self, fault: ServerFault, *, times: int | None = 1, on: str = "") -> None:
        """Apply the fault to the next `times` requests (None: to all, until `heal`) whose path contains `on`."""
        with self._lock:
            self._faults.append((on, fault, times))

    def heal(self) -> None:
        with self._lock:
            self._faults.clear()

    def _next_fault(self, path: str) -> ServerFault | None:
        with self._lock:
            for number, (on, fault, times) in enumerate(self._faults):
                if on in path:
                    if times == 1:
                        del self._faults[number]
                    elif times is not None:
                        self._faults[number] = (on, fault, times - 1)
                    return fault
        return None


def answer_fault(exchange: Exchange, fault: ServerFault) -> bool:
    """Carry out a fault that replaces the answer; False if the fault only changes the correct answer."""
    if fault.no_answer == "silence":
        exchange.hold()
        exchange.cut()
    elif fault.no_answer == "cut":
        exchange.cut()
    elif fault.no_answer == "reset":
        exchange.reset()
    elif fault.status is not None:
        exchange.send(fault.status, fault.body, fault.headers)
    else:
        return False
    return True


@dataclass
class StoredObject:
    """A file in the store. A link leads to it. `generation` grows each time its bytes are replaced."""

    path: Path
    file_name: str
    generation: int = 0


@dataclass(eq=False)
class StorageKnobs:
    """What a test may change at any time. None, 0 or an empty list: off."""

    rate: float | None = None  # bytes per second of each answer
    total_rate: float | None = None  # bytes per second of all answers together
    latency: float = 0.0  # seconds before each answer
    max_connections: int | None = None  # answers with a body at the same time; any more get 503 SlowDown
    reset_every: int | None = None  # RST each time this many more bytes have been sent in all
    link_life: float | None = None  # seconds for which a link is valid that is made from now on
    public_url: str | None = None  # the origin in links, if it is not the server's own

    # Faults of the next answers with a body: one entry per answer, None for an answer without the fault.
    cut_after: list[int | None] = field(default_factory=list)  # FIN after this many bytes of the body
    reset_after: list[int | None] = field(default_factory=list)  # RST
    stall_after: list[int | None] = field(default_factory=list)  # silence
    trickle: list[float | None] = field(default_factory=list)  # bytes per second

    # Faults at a byte of the file (of any file). Each happens once, in the answer that reaches this byte.
    cut_at: list[int] = field(default_factory=list)
    reset_at: list[int] = field(default_factory=list)
    stall_at: list[int] = field(default_factory=list)
    flip_at: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Traffic:
    """What a storage remembers of its traffic."""

    bytes_sent: int = 0  # of bodies
    sent: Counter[str] = field(default_factory=Counter)  # the same by path
    peak_connections: int = 0  # answers at the same time
    ranges: list[str | None] = field(default_factory=list)  # Range of each answer with a body, in order; or None
    keys_seen: list[str] = field(default_factory=list)  # credentials that must not come here: their requests get 400


class SandboxStorage(StorageKnobs, Traffic, FaultyServer):
    """The store's origin, as R2 (`form="r2"`) or as Backblaze (`form="b2"`): GET of signed links, with ranges.

    `StorageKnobs` lists what a test may change at any time; `fail(ServerFault(…))` does everything else.
    `at(bytes, do)` calls a function when this many bytes of bodies have been sent. It combines well with
    `expire_links` and `replace`. `Traffic` lists what the storage remembers; so does `connections`.
    """

    def __init__(self, *, form: StorageForm = "r2", port: int = 0) -> None:
        StorageKnobs.__init__(self)
        Traffic.__init__(self)
        FaultyServer.__init__(self, port)
        self.form: StorageForm = form
        self.secret: str | None = None  # CivitAI's key: must never be sent to the storage

        self._objects: dict[str, StoredObject] = {}
        self._links = _SignedLinks()
        self._clients: dict[str, set[int]] = {}
        self._callbacks: list[tuple[int, Callable[[], object]]] = []
        self._active = 0
        self._idle = threading.Condition(self._lock)
        self._total_rate_free_at = 0.0

    def wait_until_idle(self, timeout: float = 10.0) -> None:
        """Return when no answer is being sent. Bytes are counted a moment after the client has received them."""
        with self._idle:
            self._idle.wait_for(lambda: self._active == 0, timeout)

    @property
    def connections(self) -> dict[str, int]:
        """How many connections each path has had."""
        with self._lock:
            return {path: len(clients) for path, clients in self._clients.items()}

    def put(self, path: Path, *, file_name: str | None = None) -> str:
        """Store a file under a new key (a path on this server)."""
        stem, suffix = re.sub(r"[^A-Za-z0-9]", "", path.stem) or "file", path.suffix
        folder = "/file/civitai-modelfiles/model" if self.form == "b2" else "/model"
        key = f"{folder}/{10_000 + len(self._objects)}/{stem[:40]}.{secrets.token_hex(2)}{suffix}"
        self._objects[key] = StoredObject(path, file_name or path.name)
        return key

    def publish(self, path: Path, at: str | None = None) -> str:
        """A URL that needs no signature, as another host of models has it: `/files/<name>`, or the path `at`."""
        key = at or f"/files/{quote(path.name)}"
        self._objects[key] = StoredObject(path, path.name)
        return (self.public_url or self.url) + key

    def replace(self, key: str, path: Path) -> None:
        """Serve other bytes under the same key from now on: the ETag changes, the links stay."""
        old = self._objects[key]
        self._objects[key] = StoredObject(path, old.file_name, old.generation + 1)

    def sign(self, key: str) -> str:
        """A new link to an object."""
        life = self.link_life if self.link_life is not None else _LINK_LIFE[self.form]
        query = self._links.sign(key, _disposition(self._objects[key].file_name), self.form, life)
        return f"{self.public_url or self.url}{key}?{urlencode(query)}"

    def expire_links(self) -> None:
        """Let every link that was made so far expire. Answers that are being sent go on."""
        self._links.expire_all()

    def at(self, total: int, do: Callable[[], object]) -> None:
        """Call `do` once, as soon as `total` bytes of bodies have been sent by all answers together."""
        with self._lock:
            self._callbacks.append((total, do))

    def answer(self, exchange: Exchange) -> None:
        asked = exchange.asked
        if self.latency:
            exchange.hold(self.latency)
        if key := self._misplaced_key(asked):
            self.keys_seen.append(key)
            answer_fault(exchange, _TWO_KEYS)
            return
        fault = self._next_fault(asked.path) or ServerFault()
        if answer_fault(exchange, fault):
            return
        stored = self._objects.get(asked.path)
        refusal = self._refusal(asked, stored)
        if refusal or stored is None:
            answer_fault(exchange, refusal or _NO_KEY)
            return
        with self._lock:
            full = self.max_connections is not None and self._active >= self.max_connections
            if not full:
                self._active += 1
                self.peak_connections = max(self.peak_connections, self._active)
                self._clients.setdefault(asked.path, set()).add(exchange.client)
                self.ranges.append(asked.headers.get("range"))
                fault = self._with_listed_faults(fault)
        if full:
            answer_fault(exchange, SLOW_DOWN)
            return
        try:
            with stored.path.open("rb") as file:
                self._send(exchange, stored, file, fault)
        finally:
            with self._idle:
                self._active -= 1
                self._idle.notify_all()

    def _misplaced_key(self, asked: ReceivedRequest) -> str | None:
        """CivitAI's key or any other credential in a request that must have none."""
        for name, value in asked.headers.items():
            if name in ("authorization", "cookie") or self.secret in re.split(r"[\s;,=]+", value):
                return value
        return next((value for value in asked.query.values() if value == self.secret), None)

    def _refusal(self, asked: ReceivedRequest, stored: StoredObject | None) -> ServerFault | None:
        needs_signature = stored is not None and asked.path.startswith(("/model/", "/file/"))
        refusal = self._links.check(asked) if needs_signature else None
        return refusal or (None if asked.method in ("GET", "HEAD") else _NO_METHOD)

    def _with_listed_faults(self, fault: ServerFault) -> ServerFault:
        """The fault, with the next entry of each list of faults."""

        def next_entry(entries: list[Any], otherwise: Any) -> Any:
            return entries.pop(0) if entries else otherwise

        return dataclasses.replace(
            fault,
            cut_after=next_entry(self.cut_after, fault.cut_after),
            reset_after=next_entry(self.reset_after, fault.reset_after),
            stall_after=next_entry(self.stall_after, fault.stall_after),
            rate=next_entry(self.trickle, fault.rate),
        )

    def _send(self, exchange: Exchange, stored: StoredObject, file: IO[bytes], fault: ServerFault) -> None:
        status, start, end, headers = self._head(exchange.asked, stored, fault)
        if status in (412, 416):
            exchange.send(status, NOT_SATISFIABLE.body if status == 416 else b"", headers)
            return
        end = max(start, end - fault.missing)
        body = _Body(self, exchange, file, fault)
        if fault.framing == "gzip":
            file.seek(start)
            packed = gzip.compress(file.read(end - start), 1)
            exchange.send(status, packed, {**headers, "content-encoding": "gzip"})
            self.count_sent(exchange.asked.path, len(packed))
            return
        if fault.framing == "chunked":
            headers["transfer-encoding"] = "chunked"
        elif fault.framing == "length":
            headers["content-length"] = str(end - start + fault.extra)
        exchange.begin(status, headers)
        if exchange.asked.method != "HEAD" and body.send(start, end):
            body.finish()

    def _head(
        self, asked: ReceivedRequest, stored: StoredObject, fault: ServerFault
    ) -> tuple[int, int, int, dict[str, str]]:
        """Status, first byte, end and headers of the answer."""
        about = stored.path.stat()
        size = about.st_size
        content = f"{stored.path}:{stored.generation}:{size}:{about.st_mtime_ns}".encode()
        content_id = hashlib.md5(content, usedforsecurity=False).hexdigest()  # R2's own ETags are MD5 too
        headers = {
            "accept-ranges": "bytes",
            "content-type": "application/octet-stream",
            "content-disposition": _disposition(stored.file_name),
        }
        etag = None
        if "Authorization" in asked.query:
            headers["x-bz-file-id"] = f"4_z{content_id[:24]}_f1{content_id[24:]}"
            headers["x-bz-file-name"] = quote(stored.file_name)
        else:
            etag = fault.etag or f'"{content_id}"'
            headers |= {"etag": etag, "last-modified": formatdate(about.st_mtime, usegmt=True)}
        if asked.headers.get("if-match", etag) != etag:
            return 412, 0, 0, headers
        requested = asked.headers.get("range")
        validators = (None, etag, headers.get("last-modified"))
        if not requested or fault.whole or asked.headers.get("if-range") not in validators:
            return 200, 0, size, headers
        byte_range = parse_range(requested, size)
        if byte_range is None:
            return 200, 0, size, headers
        start, end = byte_range
        if start >= end:
            return 416, 0, 0, {**headers, "content-range": f"bytes */{size}"}
        if fault.shift:
            start, end = min(start + fault.shift, size - 1), min(end + fault.shift, size)
        headers["content-range"] = fault.content_range or f"bytes {start}-{end - 1}/{size}"
        return 206, start, end, headers

    # For _Body: what all answers share

    def count_sent(self, path: str, count: int) -> bool:
        """Count bytes of a body and call what is due in `at`. Whether `reset_every` applies now."""
        with self._lock:
            before, self.bytes_sent = self.bytes_sent, self.bytes_sent + count
            self.sent[path] += count
            due = [entry for entry in self._callbacks if entry[0] <= self.bytes_sent]
            self._callbacks = [entry for entry in self._callbacks if entry[0] > self.bytes_sent]
            resets = self.reset_every is not None and before // self.reset_every != self.bytes_sent // self.reset_every
        for _, do in due:
            do()
        return resets

    def limit_to_next_event(self, count: int) -> int:
        """`count`, or fewer bytes if `at` or `reset_every` is due before."""
        if not self._callbacks and not self.reset_every:
            return count
        with self._lock:
            due = [total - self.bytes_sent for total, _ in self._callbacks]
            if self.reset_every:
                due.append(self.reset_every - self.bytes_sent % self.reset_every)
        return min([count, *(left for left in due if left > 0)])

    def reserve_bandwidth(self, count: int) -> float:
        """Reserve `count` bytes of `total_rate`; the seconds until they may be sent."""
        if not self.total_rate:
            return 0.0
        with self._lock:
            now = time.monotonic()
            self._total_rate_free_at = max(self._total_rate_free_at, now) + count / self.total_rate
            return self._total_rate_free_at - now

    def use_up(self, positions: list[int], position: int) -> bool:
        """Remove the position from a list of faults; whether it was there."""
        with self._lock:
            if position in positions:
                positions.remove(position)
                return True
        return False


@dataclass(frozen=True)
class _Link:
    key: str
    expires: float


class _SignedLinks:
    """The links that a store has given out, by signature."""

    def __init__(self) -> None:
        self._links: dict[str, _Link] = {}

    def sign(self, key: str, disposition: str, form: StorageForm, life: float) -> dict[str, str]:
        """The query of a new link that is valid for `life` seconds."""
        signature, now = secrets.token_hex(32), time.time()
        if form == "b2":
            signature = f"3_{int(now)}_{signature}_004_{int(now + life)}_0042_dnld"
            query = {"Authorization": signature, "b2ContentDisposition": disposition}
        else:
            day = time.strftime("%Y%m%d", time.gmtime(now))
            query = {
                "X-Amz-Expires": str(int(life)),
                "response-content-disposition": disposition,
                "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
                "X-Amz-Credential": f"sandbox/{day}/us-east-1/s3/aws4_request",
                "X-Amz-Date": time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now)),
                "X-Amz-SignedHeaders": "host",
                "X-Amz-Signature": signature,
            }
        self._links[signature] = _Link(key, time.monotonic() + life)
        return query

    def check(self, asked: ReceivedRequest) -> ServerFault | None:
        """Why the request's link is not valid; None if it is."""
        link = self._links.get(asked.query.get("Authorization") or asked.query.get("X-Amz-Signature") or "")
        is_b2 = "Authorization" in asked.query
        if link is None or link.key != asked.path:
            return _BAD_TOKEN if is_b2 else _BAD_SIGNATURE
        if asked.method != "GET" and not is_b2:  # the signature covers the method
            return _BAD_SIGNATURE
        if time.monotonic() >= link.expires:
            return EXPIRED_B2 if is_b2 else EXPIRED_R2
        return None

    def expire_all(self) -> None:
        for signature, link in list(self._links.items()):
            self._links[signature] = _Link(link.key, 0.0)


class _Body:
    """The body of one answer while it is sent."""

    def __init__(self, storage: SandboxStorage, exchange: Exchange, file: IO[bytes], fault: ServerFault) -> None:
        self._storage, self._exchange, self._file, self._fault = storage, exchange, file, fault
        self._rate = fault.rate or storage.rate
        self._began = time.monotonic()
        self._done = 0

    def send(self, start: int, end: int) -> bool:
        """Send these bytes; False if the connection was closed before the end."""
        storage, position = self._storage, start
        while True:
            if self._ends_at(position, end):
                return False
            if position >= end:
                return True
            flip = storage.use_up(storage.flip_at, position)
            count = 1 if flip else self._next_piece(position, end)
            if not self._wait_for_bandwidth(count):
                self._exchange.cut()
                return False
            self._write(position, count, flip=flip)
            position += count
            self._done += count
            if storage.count_sent(self._exchange.asked.path, count):
                self._exchange.reset()
                return False

    def finish(self) -> None:
        if self._fault.extra:
            self._exchange.write(bytes(self._fault.extra))
            self._storage.count_sent(self._exchange.asked.path, self._fault.extra)
        if self._fault.framing == "chunked":
            self._exchange.write(b"0\r\n\r\n")

    def _ends_at(self, position: int, end: int) -> bool:
        """Carry out the fault that ends the body at this position, if there is one."""
        storage, fault = self._storage, self._fault

        def is_reached(after: int | None, positions: list[int]) -> bool:
            return after == self._done or (position < end and storage.use_up(positions, position))

        if is_reached(fault.cut_after, storage.cut_at):
            self._exchange.cut()
            return True
        if is_reached(fault.reset_after, storage.reset_at):
            self._exchange.reset()
            return True
        if is_reached(fault.stall_after, storage.stall_at):
            self._exchange.hold()
            self._exchange.cut()
            return True
        return False

    def _next_piece(self, position: int, end: int) -> int:
        """How many bytes may be sent at once: up to the next position at which something happens."""
        storage, fault = self._storage, self._fault
        rate = min(self._rate or _PIECE * 50, storage.total_rate or _PIECE * 50)
        count = max(1, min(_PIECE, int(rate / 50), end - position))
        for positions in (storage.cut_at, storage.reset_at, storage.stall_at, storage.flip_at):
            for special in tuple(positions):
                if position < special < position + count:
                    count = special - position
        for after in (fault.cut_after, fault.reset_after, fault.stall_after):
            if after is not None and self._done < after < self._done + count:
                count = after - self._done
        return storage.limit_to_next_event(count)

    def _wait_for_bandwidth(self, count: int) -> bool:
        """Wait until the rates allow so many bytes; False if the client has left."""
        wait = self._storage.reserve_bandwidth(count)
        if self._rate:
            wait = max(wait, self._began + (self._done + count) / self._rate - time.monotonic())
        return wait <= 0 or self._exchange.hold(wait)

    def _write(self, position: int, count: int, *, flip: bool) -> None:
        chunked = self._fault.framing == "chunked"
        if not chunked and not flip:
            self._exchange.send_file(self._file, position, count)
            return
        self._file.seek(position)
        data = self._file.read(count)
        if flip:
            data = bytes([data[0] ^ 0xFF])
        self._exchange.write(f"{count:x}\r\n".encode() + data + b"\r\n" if chunked else data)


def parse_range(header: str, size: int) -> tuple[int, int] | None:
    """First byte and end of a single range. Start ≥ end: it cannot be satisfied. None: the header is ignored."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header.strip())
    if not match or match.group(0) == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)), size
    if last and int(last) < int(first):
        return None
    return int(first), min(size, int(last) + 1) if last else size


def _disposition(file_name: str) -> str:
    return f'attachment; filename="{quote(file_name, safe=" !#$&()+,;=@[]{}~")}"'

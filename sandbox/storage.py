"""Where CivitAI keeps its files: signed links, ranges, and every way in which a line or a store can go wrong."""

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

from sandbox.server import Asked, Exchange, Server

Form = Literal["r2", "b2"]

_LINK_LIFE: Mapping[Form, int] = {"r2": 86_400, "b2": 3_600}
_PIECE = 4 << 20


@dataclass(frozen=True)
class Fault:
    """What a server does instead of the right thing.

    With `status`, that answer. With `no_answer`, none: silence until the client leaves, FIN, or RST.
    Else the true answer, spoiled by every field that is set.
    """

    status: int | None = None
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    no_answer: Literal["silence", "cut", "reset"] | None = None

    cut_after: int | None = None  # FIN after so many bytes of body
    reset_after: int | None = None  # RST after so many
    stall_after: int | None = None  # nothing more after so many
    rate: float | None = None  # bytes a second
    missing: int = 0  # so many bytes fewer than asked; Content-Length agrees, Content-Range does not
    extra: int = 0  # so many bytes more; Content-Length agrees
    shift: int = 0  # another range than the one asked, truly labelled
    content_range: str | None = None  # the label alone is wrong
    whole: bool = False  # 200 with everything, whatever the range
    framing: Literal["length", "close", "chunked", "gzip"] = "length"
    etag: str | None = None


SILENCE = Fault(no_answer="silence")
CUT = Fault(no_answer="cut")
RESET = Fault(no_answer="reset")


def json_fault(status: int, value: Any, **headers: str) -> Fault:
    return Fault(status, json.dumps(value).encode(), {"content-type": "application/json", **headers})


def html_fault(status: int, text: str) -> Fault:
    page = f"<!DOCTYPE html><html><head><title>{text}</title></head><body><h1>{text}</h1></body></html>\n"
    return Fault(status, page.encode(), {"content-type": "text/html; charset=utf-8"})


def redirect(location: str, status: int = 307) -> Fault:
    return Fault(status, headers={"location": location, "cache-control": "no-store"})


def store_error(status: int, code: str, message: str) -> Fault:
    """An error as S3 and R2 tell it."""
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return Fault(status, body.encode(), {"content-type": "application/xml"})


def b2_error(status: int, code: str, message: str) -> Fault:
    """An error as Backblaze tells it."""
    return json_fault(status, {"code": code, "message": message, "status": status})


HTML_PAGE = html_fault(200, "Sign in to continue")
SLOW_DOWN = store_error(503, "SlowDown", "Please reduce your request rate.")
STORE_ERROR = store_error(500, "InternalError", "We encountered an internal error. Please try again.")
EXPIRED_R2 = store_error(403, "ExpiredRequest", "Request has expired")
EXPIRED_B2 = b2_error(401, "expired_auth_token", "Authorization token has expired")
DOWNLOAD_CAP = b2_error(403, "download_cap_exceeded", "Cannot download file, download bandwidth cap exceeded.")
NOT_SATISFIABLE = store_error(416, "InvalidRange", "The requested range is not satisfiable")

_BAD_SIGNATURE = store_error(403, "SignatureDoesNotMatch", "The request signature we calculated does not match.")
_NO_KEY = store_error(404, "NoSuchKey", "The specified key does not exist.")
_TWO_KEYS = store_error(400, "InvalidArgument", "Only one auth mechanism allowed")


class FaultyServer(Server):
    """A server that misbehaves on request."""

    def __init__(self, port: int = 0) -> None:
        super().__init__(port)
        self._lock = threading.RLock()
        self._faults: list[tuple[str, Fault, int | None]] = []

    def fail(self, fault: Fault, *, times: int | None = 1, on: str = "") -> None:
        """The next `times` requests (None: all, until `heal`) whose path contains `on` meet this fault."""
        with self._lock:
            self._faults.append((on, fault, times))

    def heal(self) -> None:
        with self._lock:
            self._faults.clear()

    def _next_fault(self, path: str) -> Fault | None:
        with self._lock:
            for number, (on, fault, times) in enumerate(self._faults):
                if on in path:
                    if times == 1:
                        del self._faults[number]
                    elif times is not None:
                        self._faults[number] = (on, fault, times - 1)
                    return fault
        return None


def answer_fault(exchange: Exchange, fault: Fault) -> bool:
    """Carry out a fault that replaces the answer; False where it only spoils one."""
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
class Stored:
    """An object of the store: what a link leads to. `generation` grows when its bytes are replaced."""

    path: Path
    file_name: str
    generation: int = 0


@dataclass(frozen=True)
class _Link:
    key: str
    form: Form
    expires: float


class Storage(FaultyServer):
    """The store's origin, as R2 (`form="r2"`) or as Backblaze (`form="b2"`): GET of signed links, with ranges.

    Knobs, to be set at any time (None or empty: off):
      rate               bytes a second of each answer
      line_rate          bytes a second of all answers together
      latency            seconds before each answer
      max_connections    answers with a body at once; beyond it 503 SlowDown
      reset_every        RST whenever so many more bytes have been sent in all
      link_life          seconds a link made from now on is good for
      public_url         the origin in links, where it is not the server's own
    Faults of the next answers with a body, one entry each, None for an undisturbed one:
      cut_after, reset_after, stall_after    bytes of body until FIN, RST, nothing
      trickle                                bytes a second
    Faults at a byte of the file (of any file), each once, by the answer that gets there:
      cut_at, reset_at, stall_at, flip_at
    Everything else: `fail(Fault(…))`.
    `at(bytes, do)` calls once so many bytes of body have been sent in all; goes well with `expire_links` and `replace`.

    What it remembers: `bytes_sent` (of bodies), `sent` by path, `connections` by path (how many there were),
    `peak_connections` (answers at once), `ranges` (the Range of each answer with a body, in order, None for none),
    `keys_seen` (credentials that arrived and must not have: such requests get 400).
    """

    def __init__(self, *, form: Form = "r2", port: int = 0) -> None:
        super().__init__(port)
        self.form: Form = form
        self.rate: float | None = None
        self.line_rate: float | None = None
        self.latency = 0.0
        self.max_connections: int | None = None
        self.reset_every: int | None = None
        self.link_life: float | None = None
        self.public_url: str | None = None

        self.cut_after: list[int | None] = []
        self.reset_after: list[int | None] = []
        self.stall_after: list[int | None] = []
        self.trickle: list[float | None] = []
        self.cut_at: list[int] = []
        self.reset_at: list[int] = []
        self.stall_at: list[int] = []
        self.flip_at: list[int] = []

        self.bytes_sent = 0
        self.sent: Counter[str] = Counter()
        self.peak_connections = 0
        self.ranges: list[str | None] = []
        self.keys_seen: list[str] = []
        self.secret: str | None = None  # CivitAI's key: must never arrive here

        self._objects: dict[str, Stored] = {}
        self._links: dict[str, _Link] = {}
        self._clients: dict[str, set[int]] = {}
        self._hooks: list[tuple[int, Callable[[], object]]] = []
        self._active = 0
        self._idle = threading.Condition(self._lock)
        self._line_free = 0.0

    def settle(self, timeout: float = 10.0) -> None:
        """Return when nothing is being answered: bytes are counted a moment after they have arrived."""
        with self._idle:
            self._idle.wait_for(lambda: self._active == 0, timeout)

    @property
    def connections(self) -> dict[str, int]:
        with self._lock:
            return {path: len(clients) for path, clients in self._clients.items()}

    def put(self, path: Path, *, file_name: str | None = None) -> str:
        """Keep a file under a key of its own (a path on this server)."""
        stem, suffix = re.sub(r"[^A-Za-z0-9]", "", path.stem) or "file", path.suffix
        folder = "/file/civitai-modelfiles/model" if self.form == "b2" else "/model"
        key = f"{folder}/{10_000 + len(self._objects)}/{stem[:40]}.{secrets.token_hex(2)}{suffix}"
        self._objects[key] = Stored(path, file_name or path.name)
        return key

    def publish(self, path: Path, at: str | None = None) -> str:
        """A URL that needs no signature (another host of models): `/files/<name>` unless `at` says where."""
        key = at or f"/files/{quote(path.name)}"
        self._objects[key] = Stored(path, path.name)
        return (self.public_url or self.url) + key

    def replace(self, key: str, path: Path) -> None:
        """Other bytes under the same key from now on: another ETag, the same links."""
        old = self._objects[key]
        self._objects[key] = Stored(path, old.file_name, old.generation + 1)

    def sign(self, key: str) -> str:
        """A new link to an object."""
        signature, now = secrets.token_hex(32), time.time()
        life = self.link_life if self.link_life is not None else _LINK_LIFE[self.form]
        disposition = _disposition(self._objects[key].file_name)
        if self.form == "b2":
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
        self._links[signature] = _Link(key, self.form, time.monotonic() + life)
        return f"{self.public_url or self.url}{key}?{urlencode(query)}"

    def expire_links(self) -> None:
        """Every link made so far is too old; answers already under way go on."""
        for signature, link in list(self._links.items()):
            self._links[signature] = _Link(link.key, link.form, 0.0)

    def at(self, total: int, do: Callable[[], object]) -> None:
        """Call `do` once as soon as `total` bytes of body have been sent, of all answers together."""
        with self._lock:
            self._hooks.append((total, do))

    def answer(self, exchange: Exchange) -> None:
        asked = exchange.asked
        if self.latency:
            exchange.hold(self.latency)
        if key := self._stray_key(asked):
            self.keys_seen.append(key)
            answer_fault(exchange, _TWO_KEYS)
            return
        fault = self._next_fault(asked.path) or Fault()
        if answer_fault(exchange, fault):
            return
        stored = self._objects.get(asked.path)
        refusal = self._refusal(exchange, stored)
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
                fault = self._listed(fault)
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

    def _stray_key(self, asked: Asked) -> str | None:
        for name, value in asked.headers.items():
            if name in ("authorization", "cookie") or self.secret in re.split(r"[\s;,=]+", value):
                return value
        return next((value for value in asked.query.values() if value == self.secret), None)

    def _refusal(self, exchange: Exchange, stored: Stored | None) -> Fault | None:
        query = exchange.asked.query
        if stored is not None and exchange.asked.path.startswith(("/model/", "/file/")):
            link = self._links.get(query.get("Authorization") or query.get("X-Amz-Signature") or "")
            b2 = "Authorization" in query
            if link is None or link.key != exchange.asked.path:
                return b2_error(401, "bad_auth_token", "Invalid authorization token") if b2 else _BAD_SIGNATURE
            if exchange.asked.method != "GET" and not b2:  # the signature covers the method
                return _BAD_SIGNATURE
            if time.monotonic() >= link.expires:
                return EXPIRED_B2 if b2 else EXPIRED_R2
        return None if exchange.asked.method in ("GET", "HEAD") else Fault(405)

    def _listed(self, fault: Fault) -> Fault:
        """The fault with what the lists have for the next answer."""

        def following(entries: list[Any], otherwise: Any) -> Any:
            return entries.pop(0) if entries else otherwise

        return dataclasses.replace(
            fault,
            cut_after=following(self.cut_after, fault.cut_after),
            reset_after=following(self.reset_after, fault.reset_after),
            stall_after=following(self.stall_after, fault.stall_after),
            rate=following(self.trickle, fault.rate),
        )

    def _send(self, exchange: Exchange, stored: Stored, file: IO[bytes], fault: Fault) -> None:
        status, start, end, headers = self._head(exchange, stored, fault)
        if status in (412, 416):
            exchange.send(status, NOT_SATISFIABLE.body if status == 416 else b"", headers)
            return
        end = max(start, end - fault.missing)
        body = _Body(self, exchange, file, fault)
        if fault.framing == "gzip":
            file.seek(start)
            packed = gzip.compress(file.read(end - start), 1)
            exchange.send(status, packed, {**headers, "content-encoding": "gzip"})
            self._sent(exchange.asked.path, len(packed))
            return
        if fault.framing == "chunked":
            headers["transfer-encoding"] = "chunked"
        elif fault.framing == "length":
            headers["content-length"] = str(end - start + fault.extra)
        exchange.begin(status, headers)
        if exchange.asked.method != "HEAD" and body.send(start, end):
            body.finish()

    def _head(self, exchange: Exchange, stored: Stored, fault: Fault) -> tuple[int, int, int, dict[str, str]]:
        """Status, first byte, end and headers of the answer."""
        about, asked = stored.path.stat(), exchange.asked
        size = about.st_size
        identity = hashlib.md5(  # noqa: S324 — R2's own ETags are MD5
            f"{stored.path}:{stored.generation}:{size}:{about.st_mtime_ns}".encode()
        ).hexdigest()
        headers = {
            "accept-ranges": "bytes",
            "content-type": "application/octet-stream",
            "content-disposition": _disposition(stored.file_name),
        }
        etag = None
        if "Authorization" in asked.query:
            headers["x-bz-file-id"] = f"4_z{identity[:24]}_f1{identity[24:]}"
            headers["x-bz-file-name"] = quote(stored.file_name)
        else:
            etag = fault.etag or f'"{identity}"'
            headers |= {"etag": etag, "last-modified": formatdate(about.st_mtime, usegmt=True)}
        if asked.headers.get("if-match", etag) != etag:
            return 412, 0, 0, headers
        wanted = asked.headers.get("range")
        validators = (None, etag, headers.get("last-modified"))
        if not wanted or fault.whole or asked.headers.get("if-range") not in validators:
            return 200, 0, size, headers
        span = parse_range(wanted, size)
        if span is None:
            return 200, 0, size, headers
        start, end = span
        if start >= end:
            return 416, 0, 0, {**headers, "content-range": f"bytes */{size}"}
        if fault.shift:
            start, end = min(start + fault.shift, size - 1), min(end + fault.shift, size)
        headers["content-range"] = fault.content_range or f"bytes {start}-{end - 1}/{size}"
        return 206, start, end, headers

    def _sent(self, path: str, count: int) -> bool:
        """Count bytes, call what waits for them; whether `reset_every` strikes."""
        with self._lock:
            before, self.bytes_sent = self.bytes_sent, self.bytes_sent + count
            self.sent[path] += count
            due = [hook for hook in self._hooks if hook[0] <= self.bytes_sent]
            self._hooks = [hook for hook in self._hooks if hook[0] > self.bytes_sent]
            strikes = self.reset_every is not None and before // self.reset_every != self.bytes_sent // self.reset_every
        for _, do in due:
            do()
        return strikes

    def _room(self, count: int) -> int:
        """At most so many bytes may go before something is due."""
        if not self._hooks and not self.reset_every:
            return count
        with self._lock:
            due = [total - self.bytes_sent for total, _ in self._hooks]
            if self.reset_every:
                due.append(self.reset_every - self.bytes_sent % self.reset_every)
        return min([count, *(left for left in due if left > 0)])

    def _line_wait(self, count: int) -> float:
        """Seconds until the common line has carried so many bytes more."""
        if not self.line_rate:
            return 0.0
        with self._lock:
            now = time.monotonic()
            self._line_free = max(self._line_free, now) + count / self.line_rate
            return self._line_free - now

    def _take(self, places: list[int], position: int) -> bool:
        with self._lock:
            if position in places:
                places.remove(position)
                return True
        return False


class _Body:
    """One answer's body on its way."""

    def __init__(self, storage: Storage, exchange: Exchange, file: IO[bytes], fault: Fault) -> None:
        self._storage, self._exchange, self._file, self._fault = storage, exchange, file, fault
        self._rate = fault.rate or storage.rate
        self._began = time.monotonic()
        self._done = 0

    def send(self, start: int, end: int) -> bool:
        """False when the connection was ended on the way."""
        storage, position = self._storage, start
        while True:
            if self._ends_here(position, end):
                return False
            if position >= end:
                return True
            flip = storage._take(storage.flip_at, position)
            count = 1 if flip else self._next_piece(position, end)
            if not self._pace(count):
                self._exchange.cut()
                return False
            self._put(position, count, flip=flip)
            position += count
            self._done += count
            if storage._sent(self._exchange.asked.path, count):
                self._exchange.reset()
                return False

    def finish(self) -> None:
        if self._fault.extra:
            self._exchange.write(bytes(self._fault.extra))
            self._storage._sent(self._exchange.asked.path, self._fault.extra)
        if self._fault.framing == "chunked":
            self._exchange.write(b"0\r\n\r\n")

    def _ends_here(self, position: int, end: int) -> bool:
        storage, fault = self._storage, self._fault

        def reached(after: int | None, places: list[int]) -> bool:
            return after == self._done or (position < end and storage._take(places, position))

        if reached(fault.cut_after, storage.cut_at):
            self._exchange.cut()
            return True
        if reached(fault.reset_after, storage.reset_at):
            self._exchange.reset()
            return True
        if reached(fault.stall_after, storage.stall_at):
            self._exchange.hold()
            self._exchange.cut()
            return True
        return False

    def _next_piece(self, position: int, end: int) -> int:
        """As much as may go at once: up to the next place where something happens."""
        storage, fault = self._storage, self._fault
        rate = min(self._rate or _PIECE * 50, storage.line_rate or _PIECE * 50)
        count = max(1, min(_PIECE, int(rate / 50), end - position))
        for places in (storage.cut_at, storage.reset_at, storage.stall_at, storage.flip_at):
            for place in tuple(places):
                if position < place < position + count:
                    count = place - position
        for after in (fault.cut_after, fault.reset_after, fault.stall_after):
            if after is not None and self._done < after < self._done + count:
                count = after - self._done
        return storage._room(count)

    def _pace(self, count: int) -> bool:
        """Wait until the line has room; False when the client has left."""
        wait = self._storage._line_wait(count)
        if self._rate:
            wait = max(wait, self._began + (self._done + count) / self._rate - time.monotonic())
        return wait <= 0 or self._exchange.hold(wait)

    def _put(self, position: int, count: int, *, flip: bool) -> None:
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
    """First byte and end of a single range; start ≥ end where it cannot be satisfied, None where it is ignored."""
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

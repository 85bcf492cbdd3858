"""CivitAI's API: from the ids of a model to what is known of its file, and to the signed link of its bytes.

    GET /api/v1/model-versions/{id}                describe: files, sizes, hashes, base model, scans
    GET /api/v1/models/{id}                        describe: which version of a model is the newest
    GET /api/download/models/{id}?fileId={id}      link: 307 to the storage

This is the only place where the API key is sent: as a header, to the API's own origins, from a session that reaches
nothing else. What CivitAI answers instead, and what is made of each answer, is the table POLICY. The answers and their
causes are those of CivitAI's own server code (github.com/civitai/civitai, 2026).
"""

from __future__ import annotations

import email.utils
import functools
import json
import logging
import math
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import PurePosixPath
from typing import Any, TypeVar, cast
from urllib.parse import unquote, urlencode, urlsplit

import requests
import urllib3

from a1111_worker.context import Deadline
from a1111_worker.domain import ModelKind, ModelRef, RemoteFile
from a1111_worker.errors import (
    DownloadFailed,
    InvalidRequest,
    ModelAccessDenied,
    ModelError,
    ModelNotFound,
    ModelRejected,
)
from a1111_worker.origins import OriginRefused, origin_of
from a1111_worker.transfer.egress import EgressPolicy, Route, open_session

log = logging.getLogger(__name__)

T = TypeVar("T")

URLS = ("https://civitai.com", "https://civitai.red")
"""The second one shows what the first one hides since April 2026; ids and keys are the same."""


@dataclass(frozen=True)
class CivitAITimings:
    """How long the client timings, in seconds."""

    connect: float = 10.0
    answer: float = 20.0  # from a question to the end of its answer
    shortest: float = 0.5  # before something is asked again, growing by decorrelated jitter to …
    longest: float = 10.0
    too_many: float = 60.0  # at most, in all, because of 429 or of a Retry-After


class Refusal(Enum):
    """Why an answer is not what was asked for."""

    BAD_REQUEST = "400"
    NO_KEY = "401, no key was sent"
    KEY_REFUSED = "401, a key was sent"
    DISABLED = "401, its creator has disabled downloads"
    FORBIDDEN = "403"
    EARLY_ACCESS = "403, early access"
    PRIVATE = "403, no access"
    NOT_FOUND = "404"
    GONE = "410"
    TOO_MANY = "429"
    REGION = "451"
    SERVER = "5xx"
    NOT_JSON = "200 without the JSON that was asked for"
    LINE = "no answer, or half of one"
    STRAYED = "a redirect to where nothing may be fetched"
    OTHER = "any other status"


@dataclass(frozen=True)
class Rule:
    """What a refusal means: the error it ends as, and what is tried before.

    `elsewhere`: the other origins are asked once, at once. `again`: then it is asked so many times more, after timings
    (because of 429 only as long as `CivitAITimings.too_many` lasts).
    """

    error: type[ModelError]
    message: str
    hint: str | None = None
    elsewhere: bool = False
    again: int = 0


_KEY_HINT = "set CIVITAI_API_KEY to an API key of a CivitAI account (Account settings, API Keys)"
_LATER = "try again later"

# {model} is how the caller named it, {detail} what the answer adds.
POLICY: Mapping[Refusal, Rule] = {
    # The job's own parameters never get this far: CivitAI's API has changed, or a CIVITAI_URL is not CivitAI.
    Refusal.BAD_REQUEST: Rule(DownloadFailed, "CivitAI did not understand the question for {model} (400)"),
    Refusal.NO_KEY: Rule(ModelAccessDenied, "CivitAI gives {model} to logged-in users only", _KEY_HINT),
    Refusal.KEY_REFUSED: Rule(
        ModelAccessDenied,
        "CivitAI refused the worker's API key when it was asked for {model}",
        "CIVITAI_API_KEY is wrong, expired or revoked: set it to a valid one",
    ),
    Refusal.DISABLED: Rule(
        ModelAccessDenied, "the creator of {model} has disabled its download", "choose another model: no key helps here"
    ),
    # The address or the account is on CivitAI's black list, or Cloudflare wants to see a browser.
    Refusal.FORBIDDEN: Rule(ModelAccessDenied, "CivitAI refuses to serve {model} to this worker (403)"),
    Refusal.EARLY_ACCESS: Rule(
        ModelAccessDenied,
        "{model} is in early access{detail}",
        "buy it with the account of CIVITAI_API_KEY, or wait until it is public",
    ),
    Refusal.PRIVATE: Rule(
        ModelAccessDenied, "{model} is private", "use the key of an account that may see it as CIVITAI_API_KEY"
    ),
    # Also a passing failure of CivitAI's storage resolver, and what .com says of everything that only .red shows.
    Refusal.NOT_FOUND: Rule(
        ModelNotFound,
        "CivitAI does not have {model} (404)",
        "check the id; its creator may have removed it",
        elsewhere=True,
        again=2,
    ),
    Refusal.GONE: Rule(ModelNotFound, "{model} is archived on CivitAI and cannot be downloaded any more (410)"),
    # CivitAI's own limit counts 24 hours back and says nothing of when it ends; a shorter one is Cloudflare's.
    Refusal.TOO_MANY: Rule(
        DownloadFailed,
        "CivitAI answers that this account or address has downloaded too much (429), asked for {model}",
        "try again later; a model that is kept in the cache or the image needs no download",
        again=10,
    ),
    Refusal.REGION: Rule(
        ModelAccessDenied,
        "CivitAI does not serve the region in which this worker runs (451)",
        "CivitAI blocks the United Kingdom and Australia: exclude those data centers from the endpoint",
    ),
    Refusal.SERVER: Rule(
        DownloadFailed, "CivitAI failed when it was asked for {model} ({detail})", _LATER, elsewhere=True, again=3
    ),
    Refusal.NOT_JSON: Rule(
        DownloadFailed,
        "CivitAI answered with something else than was asked, for {model}",
        _LATER,
        elsewhere=True,
        again=2,
    ),
    Refusal.LINE: Rule(
        DownloadFailed, "no connection to CivitAI, or it broke off ({model})", _LATER, elsewhere=True, again=2
    ),
    # Followed to nowhere: a private address, http, a circle, a host that is not in the list.
    Refusal.STRAYED: Rule(
        DownloadFailed,
        "CivitAI sent the download of {model} to where this worker may not fetch: {detail}",
        "if CivitAI has a new storage host, add it to STORAGE_HOSTS",
    ),
    Refusal.OTHER: Rule(DownloadFailed, "CivitAI gave an answer that is not understood, for {model} ({detail})"),
}


class CivitAI:
    """The API of CivitAI, or of what speaks like it; used by many threads at once.

    `urls` are its origins, the one that is asked first in front. `policy` says where a link may lead, and which hosts
    a job's own URL may name; the key never goes there. What is known of a version is remembered for
    `remembered_for` seconds, since its files do not change; a link never is.
    """

    def __init__(
        self,
        *,
        policy: EgressPolicy,
        urls: Sequence[str] = URLS,
        key: str | None = None,
        timings: CivitAITimings = CivitAITimings(),
        remembered_for: float = 600.0,
    ) -> None:
        if key and not (key.isascii() and key.isprintable() and " " not in key):
            raise ValueError("the CivitAI key holds characters that no key has")
        self._urls = tuple(url.rstrip("/") for url in urls)
        self._origins = frozenset(origin_of(url) for url in self._urls)
        self._policy = policy
        self._headers = {"Accept": "application/json, */*"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._keyed = bool(key)
        self._waits = timings
        self._session = open_session(EgressPolicy(self._origins, ca_file=policy.ca_file), connections=16)
        self._remembered = _VersionCache(remembered_for)

    def describe(self, ref: ModelRef, deadline: Deadline) -> RemoteFile:
        """What is known of the file that `ref` means; where CivitAI cannot say, a file to try, with a warning."""
        if ref.version_id is None and ref.model_id is None:
            return self._describe_url(ref)
        warnings: tuple[str, ...] = ()
        version_id = ref.version_id
        if version_id is None:
            model_id = cast(int, ref.model_id)
            version_id = newest_version(self._json(f"/api/v1/models/{model_id}", model_id, ref.label, deadline), ref)
            warnings = (
                f"{ref.label} was named without a version: the newest one ({version_id}) was taken, and another one "
                "may be the newest tomorrow",
            )
        try:
            version = self._version(version_id, ref, deadline)
        except DownloadFailed as error:
            log.warning("CivitAI says nothing of version %s (%s): its file is tried unseen", version_id, error)
            return self._unseen(version_id, ref, warnings)
        return remote_file(version, ref, self._urls[0], warnings)

    def link(self, remote: RemoteFile, deadline: Deadline) -> str:
        """Where the bytes are, for a while: a URL that needs no key (and is a secret itself, if it is signed).

        CivitAI counts each link against its daily limit: ask once a file, and again when the storage refuses it.
        """
        if remote.version_id is None:
            self._check_listed(remote.url, repr(remote.name))
            return remote.url
        # By file id, where it is known: CivitAI's own answer to a query may be 404 where a word of it does not match.
        query = f"fileId={remote.file_id}" if remote.file_id is not None else urlsplit(remote.url).query
        label = f"{_shown(remote.name)!r} (version {remote.version_id})"
        path = _download_path(remote.version_id)
        try:
            return self._until(f"{path}?{query}", label, deadline, self._read_link)
        except ModelNotFound:
            plain = urlencode(_ANY_MODEL)
            if remote.file_id is not None or query == plain:
                raise
            log.warning("CivitAI: %s has no file of %s, perhaps: any model file of it is asked for", label, query)
            return self._until(f"{path}?{plain}", label, deadline, self._read_link)

    def close(self) -> None:
        self._session.close()

    # -- questions

    def _version(self, version_id: int, ref: ModelRef, deadline: Deadline) -> dict[str, Any]:
        if version := self._remembered.get(version_id):
            return version
        version = self._json(f"/api/v1/model-versions/{version_id}", version_id, ref.label, deadline)
        self._remembered.put(version_id, version)
        return version

    def _json(self, path: str, expected_id: int, label: str, deadline: Deadline) -> dict[str, Any]:
        def read(answer: CivitAIResponse) -> dict[str, Any]:
            content = answer.json()
            if not isinstance(content, dict) or content.get("id") != expected_id:
                raise Refused(Refusal.NOT_JSON)
            return content

        return self._until(path, label, deadline, read)

    def _read_link(self, answer: CivitAIResponse) -> str:
        # A mirror may hand out the file itself: then that is its link. (Fetched without the key, as every file.)
        if answer.location is None and answer.is_text:
            raise Refused(Refusal.NOT_JSON)
        link = answer.location or answer.url
        log.info("CivitAI: the link leads to %s", self._policy.check(link))
        return link

    def _until(self, path: str, label: str, deadline: Deadline, read: Callable[[CivitAIResponse], T]) -> T:
        """Ask until there is an answer that `read` accepts, or POLICY says that it is enough."""
        patience = _Patience(self._waits, len(self._urls))
        while True:
            deadline.check()
            url = f"{self._urls[patience.turn % len(self._urls)]}{path}"
            try:
                return read(_abandonable(functools.partial(self._ask, url), self._waits.answer, deadline))
            except OriginRefused as error:
                refused = Refused(Refusal.STRAYED, str(error))
            except Refused as error:
                refused = error
            pause = patience.next(refused)
            if pause is None or 0 < deadline.remaining() <= pause:
                raise _error(refused.refusal, label, refused.detail) from refused
            log.info("CivitAI: %s for %s, asked again in %.1f s", refused.refusal.value, label, pause)
            deadline.wait(pause)

    def _ask(self, url: str) -> CivitAIResponse:
        """One question; its redirects among the API's own origins are followed, each hop with the key."""
        route = Route(url)
        timeout = (self._waits.connect, self._waits.answer)
        try:
            while True:
                here = route.url
                with self._session.get(here, headers=self._headers, timeout=timeout, stream=True) as response:
                    if not route.follow(response.status_code, response.headers.get("Location")):
                        answer = _read(response, here)
                        break
                    status = response.status_code
                if origin_of(route.url) not in self._origins:
                    return CivitAIResponse(here, status, location=route.url)
                if urlsplit(route.url).path.startswith("/login"):  # what CivitAI does with browsers
                    raise Refused(Refusal.KEY_REFUSED if self._keyed else Refusal.NO_KEY)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise Refused(Refusal.LINE) from error
        if refused := refusal_of(answer, keyed=self._keyed):
            raise refused
        return answer

    # -- what needs no answer

    def _describe_url(self, ref: ModelRef) -> RemoteFile:
        if ref.url is None:
            raise ModelNotFound(
                f"{ref.label} is neither in the cache nor in the catalog", hint="give its URL or version id"
            )
        self._check_listed(ref.url, ref.label)
        name = ref.name or PurePosixPath(unquote(urlsplit(ref.url).path)).stem or "a model"
        return RemoteFile(url=ref.url, name=_shown(name), sha256=ref.sha256)

    def _check_listed(self, url: str, label: str) -> None:
        try:
            self._policy.check(url)
        except OriginRefused as error:
            raise InvalidRequest(f"the URL of {label} may not be fetched: {error}", hint="see MODEL_HOSTS") from error

    def _unseen(self, version_id: int, ref: ModelRef, warnings: tuple[str, ...]) -> RemoteFile:
        wishes = {**_ANY_MODEL, "size": ref.size, "fp": ref.fp}
        query = (
            {"fileId": ref.file_id} if ref.file_id is not None else {key: wish for key, wish in wishes.items() if wish}
        )
        return RemoteFile(
            url=f"{self._urls[0]}{_download_path(version_id)}?{urlencode(query)}",
            name=_shown(ref.name or "") or f"CivitAI version {version_id}",
            version_id=version_id,
            file_id=ref.file_id,
            sha256=ref.sha256,
            warnings=(*warnings, f"CivitAI could not be asked about {ref.label}: only the file itself was checked"),
        )


# -- which file, and what is known of it -------------------------------------------------------------------------------

_KINDS = {ModelKind.LORA: ("lora", "locon", "lycoris", "dora"), ModelKind.CHECKPOINT: ("checkpoint",)}
_NAMES = {ModelKind.LORA: "LoRA", ModelKind.CHECKPOINT: "checkpoint"}
_MODEL_FILES = ("Model", "Pruned Model")
_ANY_MODEL = {"type": "Model", "format": "SafeTensor"}


def newest_version(model: Mapping[str, Any], ref: ModelRef) -> int:
    """The id of the version of a model that was published last."""
    published = [
        version
        for version in _dicts(model.get("modelVersions"))
        if _id(version) is not None and version.get("status", "Published") == "Published"
    ]
    if not published:
        raise ModelNotFound(f"{ref.label} has no published version on CivitAI")
    # The list is in the author's order. The dates are all in UTC and of one form, so that text sorts them.
    return int(max(published, key=lambda version: _text(version.get("publishedAt")))["id"])


def remote_file(version: Mapping[str, Any], ref: ModelRef, api_url: str, warnings: Sequence[str] = ()) -> RemoteFile:
    """The file of a version that `ref` means, as its metadata describes it; an error of ours if it may not be had."""
    version_id = int(version["id"])
    model = _dict(version.get("model"))
    found = _text(model.get("type"))
    if found and found.casefold() not in _KINDS[ref.kind]:
        raise ModelRejected(f"{ref.label} is not a {_NAMES[ref.kind]}: CivitAI lists it as {_shown(found)}")
    if _text(version.get("usageControl")) not in ("", "Download"):
        raise _error(Refusal.DISABLED, ref.label)
    file, doubts = choose_file(_dicts(version.get("files")), ref)
    file_id = _id(file)
    sha256 = _sha256(file)
    if ref.sha256 and sha256 and ref.sha256 != sha256:
        raise ModelRejected(f"CivitAI's file of {ref.label} has the SHA-256 {sha256}, and {ref.sha256} was asked for")
    size, size_at_most = size_of(file.get("sizeKB"))
    query = {"fileId": file_id} if file_id is not None else _ANY_MODEL
    return RemoteFile(
        url=f"{api_url}{_download_path(version_id)}?{urlencode(query)}",
        name=_shown(_text(model.get("name"))) or ref.name or f"CivitAI version {version_id}",
        version_id=version_id,
        file_id=file_id,
        primary=file.get("primary") is True,
        size=size,
        size_at_most=size_at_most,
        sha256=ref.sha256 or sha256,
        base_model=_shown(_text(version.get("baseModel"))) or None,
        trained_words=_words(version.get("trainedWords")),
        warnings=(*warnings, *doubts),
    )


def choose_file(files: Sequence[Mapping[str, Any]], ref: ModelRef) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The file of a version that `ref` means, and what is doubtful about it.

    The file id decides; else among the safetensors files of the model itself the SHA-256 that was asked for, then what
    the URL wished (`size`, `fp`), then the primary one, then the first.
    """
    if not files:
        raise ModelNotFound(f"{ref.label} is archived on CivitAI: it has no files any more")
    if ref.file_id is not None:
        named = next((file for file in files if _id(file) == ref.file_id), None)
        if named is None:
            raise ModelNotFound(f"{ref.label} has no file {ref.file_id} on CivitAI")
        if not _is_loadable(named):
            raise ModelRejected(f"file {ref.file_id} of {ref.label} is not the model as a safetensors file")
        return named, _scanned(named, ref)
    fit = [file for file in files if _is_loadable(file)]
    if not fit:
        raise ModelRejected(
            f"{ref.label} has no safetensors file on CivitAI", hint="other formats are never loaded: they may run code"
        )

    def merit(file: Mapping[str, Any]) -> tuple[bool, int, bool]:
        asked_for = ref.sha256 is not None and _sha256(file) == ref.sha256
        return asked_for, sum(_wishes_met(file, ref)), file.get("primary") is True

    best = max(fit, key=merit)  # the first of equals
    doubts = _scanned(best, ref)
    if not merit(best)[0] and not all(_wishes_met(best, ref)):
        wished = " and ".join(f"{key}={wish}" for key, wish in (("size", ref.size), ("fp", ref.fp)) if wish)
        doubts = (f"{ref.label} has no file of {wished} on CivitAI: another one of its files was taken", *doubts)
    return best, doubts


def size_of(kib: object) -> tuple[int | None, int | None]:
    """Exact bytes (None where they are not known), and a number of bytes that is not exceeded.

    CivitAI divides the bytes by 1024 and keeps all digits (`bytesToKB`), which a float holds exactly. A value that is
    no whole number of bytes was rounded by somebody.
    """
    if isinstance(kib, bool) or not isinstance(kib, (int, float)) or not 0 < kib < 2**43:
        return None, None
    size = kib * 1024
    if size == int(size):
        return int(size), int(size)
    return None, math.ceil(size) + 1024


def _wishes_met(file: Mapping[str, Any], ref: ModelRef) -> tuple[bool, bool]:
    about = _dict(file.get("metadata"))
    size = about.get("size") or ("pruned" if file.get("type") == "Pruned Model" else None)
    return ref.size in (None, size), ref.fp in (None, about.get("fp"))


def _is_loadable(file: Mapping[str, Any]) -> bool:
    """The model itself (no VAE, no bare UNet, no training data), as safetensors by its format and by its name."""
    about = _dict(file.get("metadata"))
    return (
        (file.get("type") or "Model") in _MODEL_FILES
        and (about.get("format") or "SafeTensor") == "SafeTensor"
        and _text(file.get("name")).lower().endswith(".safetensors")
    )


def _scanned(file: Mapping[str, Any], ref: ModelRef) -> tuple[str, ...]:
    """What CivitAI's own scans leave in doubt. A safetensors file runs no code, but one that is called a danger is none
    to be touched."""
    scans = {_text(file.get("pickleScanResult")), _text(file.get("virusScanResult"))}
    if "Danger" in scans:
        raise ModelRejected(f"CivitAI's scan calls the file of {ref.label} a danger")
    if scans <= {"Success", ""}:
        return ()
    return (f"CivitAI's scan of {ref.label} is not finished, or failed",)


def _sha256(file: Mapping[str, Any]) -> str | None:
    value = _text(_dict(file.get("hashes")).get("SHA256")).lower()
    return value if re.fullmatch(r"[0-9a-f]{64}", value) else None


def _download_path(version_id: int) -> str:
    return f"/api/download/models/{version_id}"


# Metadata is other people's text: of any type, any length, with half characters.


def _dict(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _dicts(value: object) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _id(value: Mapping[str, Any]) -> int | None:
    found = value.get("id")
    return found if type(found) is int and 0 < found < 2**53 else None


def _shown(text: str) -> str:
    """One printable line of at most 120 characters."""
    whole = text.encode("utf-8", "replace").decode()
    return " ".join("".join(character if character.isprintable() else " " for character in whole).split())[:120]


def _words(value: object) -> tuple[str, ...]:
    words = [_shown(word) for word in value if isinstance(word, str)] if isinstance(value, list) else []
    return tuple(word for word in words if word)[:100]


# -- answers -----------------------------------------------------------------------------------------------------------

_ANSWER_LIMIT = 8 * 1024 * 1024  # bytes; a version with hundreds of sample images has some 100 kB


@dataclass(frozen=True)
class CivitAIResponse:
    """A 200, or a redirect to `location` outside the API. The body is read only where it is a text."""

    url: str
    status: int
    content_type: str = ""
    body: bytes = b""
    location: str | None = None
    retry_after: str = ""

    @property
    def is_text(self) -> bool:
        return "json" in self.content_type or self.content_type.startswith("text/")

    def json(self) -> Any:
        """What it says, None where that is no JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None


class Refused(Exception):
    """An answer that is not what was asked for."""

    def __init__(self, refusal: Refusal, detail: str = "", retry_after: float | None = None) -> None:
        super().__init__(refusal.value)
        self.refusal = refusal
        self.detail = detail
        self.retry_after = retry_after


def refusal_of(answer: CivitAIResponse, *, keyed: bool) -> Refused | None:
    """Why an answer is a refusal, None where it is none. `keyed` is whether a key was sent."""
    status = answer.status
    if status == 200:
        return None
    about = _dict(answer.json())
    says = f"{_text(about.get('error'))} {_text(about.get('message'))}".casefold()
    if status == 401:
        if "disabled" in says:
            return Refused(Refusal.DISABLED)
        return Refused(Refusal.KEY_REFUSED if keyed else Refusal.NO_KEY)
    if status == 403:
        if "early access" in says:
            ends = re.match(r"\d{4}-\d{2}-\d{2}", _text(about.get("deadline")))
            return Refused(Refusal.EARLY_ACCESS, f" until {ends.group()}" if ends else "")
        return Refused(Refusal.PRIVATE if "access" in says else Refusal.FORBIDDEN)
    if status in _BY_STATUS:
        return Refused(_BY_STATUS[status], retry_after=_seconds(answer.retry_after) if status == 429 else None)
    if status >= 500 or status in (408, 425):  # 520 to 527 are Cloudflare's
        return Refused(Refusal.SERVER, str(status), _seconds(answer.retry_after))
    return Refused(Refusal.OTHER, str(status))


_BY_STATUS = {
    400: Refusal.BAD_REQUEST,
    404: Refusal.NOT_FOUND,
    410: Refusal.GONE,
    429: Refusal.TOO_MANY,
    451: Refusal.REGION,
}


def _seconds(retry_after: str) -> float | None:
    """Retry-After is a number of seconds or a date (RFC 9110); None where it is neither."""
    text = retry_after.strip()
    if text.isdecimal() and text.isascii():
        return float(text[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def _error(refusal: Refusal, label: str, detail: str = "") -> ModelError:
    rule = POLICY[refusal]
    return rule.error(rule.message.format(model=label, detail=detail), hint=rule.hint)


def _read(response: requests.Response, url: str) -> CivitAIResponse:
    content_type, retry_after = (response.headers.get(name, "") for name in ("Content-Type", "Retry-After"))
    answer = CivitAIResponse(url, response.status_code, content_type.lower(), retry_after=retry_after)
    if answer.status == 200 and not answer.is_text:
        return answer
    body = bytearray()
    for piece in response.iter_content(64 * 1024):
        body += piece
        if len(body) > _ANSWER_LIMIT:
            raise Refused(Refusal.NOT_JSON)
    return replace(answer, body=bytes(body))


class _Patience:
    """What POLICY still allows for one question: which origin is next, after how many seconds."""

    def __init__(self, timings: CivitAITimings, origins: int) -> None:
        self.turn = 0
        self._waits = timings
        self._origins = origins
        self._met: Counter[Refusal] = Counter()
        self._pause = timings.shortest
        self._spent = 0.0

    def next(self, refused: Refused) -> float | None:
        """Seconds until the next question; None when it was asked often enough."""
        rule = POLICY[refused.refusal]
        self._met[refused.refusal] += 1
        others = self._origins - 1 if rule.elsewhere else 0
        if self._met[refused.refusal] > others + rule.again:
            return None
        if rule.elsewhere:
            self.turn += 1
        if self._met[refused.refusal] <= others:
            return 0.0
        # Decorrelated jitter: workers that were refused together do not come back together.
        self._pause = min(self._waits.longest, random.uniform(self._waits.shortest, self._pause * 3))
        if refused.refusal is not Refusal.TOO_MANY and refused.retry_after is None:
            return self._pause
        pause = max(refused.retry_after or 0.0, self._pause)
        self._spent += pause
        return pause if self._spent <= self._waits.too_many else None


class _VersionCache:
    """What was said of versions, for a while. The oldest goes first."""

    def __init__(self, seconds: float, most: int = 256) -> None:
        self._seconds = seconds
        self._most = most
        self._lock = threading.Lock()
        self._versions: dict[int, tuple[float, dict[str, Any]]] = {}

    def get(self, version_id: int) -> dict[str, Any] | None:
        with self._lock:
            until, version = self._versions.get(version_id, (0.0, None))
        return version if time.monotonic() < until else None

    def put(self, version_id: int, version: dict[str, Any]) -> None:
        with self._lock:
            self._versions.pop(version_id, None)
            self._versions[version_id] = (time.monotonic() + self._seconds, version)
            if len(self._versions) > self._most:
                del self._versions[next(iter(self._versions))]


def _abandonable(work: Callable[[], T], seconds: float, deadline: Deadline) -> T:
    """Do something that nothing can interrupt; leave it behind when it takes too long or nobody timings any more.

    A read timeout counts from byte to byte: a server that trickles would never meet it, and a job that was cancelled
    would wait for it.
    """
    future: Future[T] = Future()
    over = threading.Event()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)
        over.set()

    threading.Thread(target=run, name="civitai-question", daemon=True).start()
    with deadline.on_cancel(over.set):
        over.wait(min(seconds, deadline.remaining()))
    if future.done():
        return future.result()
    deadline.check()
    raise Refused(Refusal.LINE, "no answer in time")

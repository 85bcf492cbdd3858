"""The client of CivitAI's API: from the ids of a model to its file's metadata, and to the signed link of its bytes.

    GET /api/v1/model-versions/{id}                describe: files, sizes, hashes, base model, scans
    GET /api/v1/models/{id}                        describe: which version of a model is the newest
    GET /api/download/models/{id}?fileId={id}      link: 307 to the storage

This is the only place that sends the API key: as a header, to the API's own origins, from a session that reaches
nothing else. `civitai_responses` says what each response means, `civitai_files` which file of a version is meant.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any, TypeVar, cast
from urllib.parse import unquote, urlencode, urlsplit

import requests
import urllib3

from a1111_worker.background import BackgroundCall
from a1111_worker.context import Deadline
from a1111_worker.domain import ModelRef, RemoteFile
from a1111_worker.errors import DownloadFailed, InvalidRequest, ModelNotFound
from a1111_worker.models.civitai_files import (
    ANY_MODEL_FILE,
    download_path,
    newest_version,
    remote_file,
    remote_file_without_metadata,
)
from a1111_worker.models.civitai_responses import POLICY, CivitAIRefused, CivitAIResponse, Refusal, error_of, refusal_of
from a1111_worker.models.sites import SiteTimings
from a1111_worker.origins import CIVITAI_ORIGINS, OriginRefused, origin_of
from a1111_worker.retry import Backoff
from a1111_worker.text import printable, quoted
from a1111_worker.transfer.egress import EgressPolicy, Route, open_session

log = logging.getLogger(__name__)

T = TypeVar("T")

_BODY_LIMIT = 8 * 1024 * 1024  # bytes; a version with hundreds of sample images has some 100 kB


class CivitAI:
    """A client of CivitAI, or of a server that speaks like it. Many threads may use it at once.

    `urls` are its origins, the one to ask first in front. `policy` says where a link may lead, and which hosts a job's
    own URL may name; the key never goes there. The metadata of a version is kept for `cache_seconds`, since its files
    do not change. A link is never kept.
    """

    def __init__(
        self,
        *,
        policy: EgressPolicy,
        urls: Sequence[str] = CIVITAI_ORIGINS,
        key: str | None = None,
        timings: SiteTimings = SiteTimings(),
        cache_seconds: float = 600.0,
    ) -> None:
        if key and not (key.isascii() and key.isprintable() and " " not in key):
            raise ValueError("the CivitAI key holds characters that no key has")
        self._urls = tuple(url.rstrip("/") for url in urls)
        self._origins = frozenset(origin_of(url) for url in self._urls)
        self._policy = policy
        self._headers = {"Accept": "application/json, */*"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._key = key
        self._timings = timings
        self._session = open_session(EgressPolicy(self._origins, ca_file=policy.ca_file), connections=16)
        self._versions = _VersionCache(cache_seconds)

    def describe(self, ref: ModelRef, deadline: Deadline) -> RemoteFile:
        """What is known about the file that `ref` means. If CivitAI cannot tell, a file to try, with a warning."""
        if ref.version_id is None and ref.model_id is None:
            return self._describe_url(ref)
        warnings: tuple[str, ...] = ()
        version_id = ref.version_id
        if version_id is None:
            model_id = cast(int, ref.model_id)
            model = self._get_json(f"/api/v1/models/{model_id}", model_id, ref.label, deadline)
            version_id = newest_version(model, ref)
            warnings = (
                f"{ref.label} was named without a version: its newest version ({version_id}) was taken, and that may "
                "be another one tomorrow",
            )
        try:
            version = self._version(version_id, ref, deadline)
        except DownloadFailed as error:
            log.warning("CivitAI gave no metadata of version %s (%s): its file is tried without it", version_id, error)
            return remote_file_without_metadata(version_id, ref, self._urls[0], warnings)
        return remote_file(version, ref, self._urls[0], warnings, self._show)

    def link(self, remote: RemoteFile, deadline: Deadline) -> str:
        """A URL of the file's bytes. It needs no key, is valid for a while, and is a secret itself if it is signed.

        CivitAI counts every link against its daily limit: ask once a file, and again if the storage refuses the link.
        """
        if remote.version_id is None:
            self._check_allowed(remote.url, quoted(remote.name, 120))
            return remote.url
        # By file id, if it is known: CivitAI may answer 404 to its own query, if one word of it does not match.
        query = f"fileId={remote.file_id}" if remote.file_id is not None else urlsplit(remote.url).query
        label = f"{quoted(remote.name, 120)} (version {remote.version_id})"
        path = download_path(remote.version_id)
        try:
            return self._get(f"{path}?{query}", label, deadline, self._read_link)
        except ModelNotFound:
            any_file = urlencode(ANY_MODEL_FILE)
            if remote.file_id is not None or query == any_file:
                raise
            log.warning("CivitAI: perhaps %s has no file of %s, so any of its model files is requested", label, query)
            return self._get(f"{path}?{any_file}", label, deadline, self._read_link)

    def close(self) -> None:
        self._session.close()

    # -- URLs of other hosts

    def _describe_url(self, ref: ModelRef) -> RemoteFile:
        if ref.url is None:
            raise ModelNotFound(
                f"{ref.label} is neither in the cache nor in the catalog", hint="give its URL or version id"
            )
        self._check_allowed(ref.url, ref.label)
        name = ref.name or PurePosixPath(unquote(urlsplit(ref.url).path)).stem or "a model"
        file_name = printable(PurePosixPath(unquote(urlsplit(ref.url).path)).name) or None
        return RemoteFile(url=ref.url, name=printable(name), sha256=ref.sha256, file_name=file_name)

    def _check_allowed(self, url: str, label: str) -> None:
        try:
            self._policy.check(url)
        except OriginRefused as error:
            raise InvalidRequest(f"the URL of {label} may not be fetched: {error}", hint="see MODEL_HOSTS") from error

    def _show(self, text: str) -> str:
        """A text of CivitAI as it may be shown: without the key, which an answer may repeat."""
        return printable(text.replace(self._key, "[key]") if self._key else text)

    # -- requests

    def _version(self, version_id: int, ref: ModelRef, deadline: Deadline) -> dict[str, Any]:
        if version := self._versions.get(version_id):
            return version
        version = self._get_json(f"/api/v1/model-versions/{version_id}", version_id, ref.label, deadline)
        self._versions.put(version_id, version)
        return version

    def _get_json(self, path: str, expected_id: int, label: str, deadline: Deadline) -> dict[str, Any]:
        def read(response: CivitAIResponse) -> dict[str, Any]:
            content = response.json()
            if not isinstance(content, dict) or content.get("id") != expected_id:
                raise CivitAIRefused(Refusal.NOT_JSON)
            return content

        return self._get(path, label, deadline, read)

    def _read_link(self, response: CivitAIResponse) -> str:
        # A mirror may send the file itself: then this URL is the link. (It is fetched without the key, as every file.)
        if response.location is None and response.is_text:
            raise CivitAIRefused(Refusal.NOT_JSON)
        link = response.location or response.url
        log.info("CivitAI: the link leads to %s", self._policy.check(link))
        return link

    def _get(self, path: str, label: str, deadline: Deadline, read: Callable[[CivitAIResponse], T]) -> T:
        """Request `path` until `read` accepts a response, or POLICY allows no further try."""
        retries = _Retries(self._timings, len(self._urls))
        while True:
            deadline.check()
            url = f"{self._urls[retries.origin]}{path}"
            try:
                return read(self._try(url, deadline))
            except OriginRefused as error:
                refused = CivitAIRefused(Refusal.REDIRECT_REFUSED, str(error))
            except CivitAIRefused as error:
                refused = error
            pause = retries.next_pause(refused)
            if pause is None or 0 < deadline.remaining() <= pause:
                raise error_of(refused, label) from refused
            log.info("CivitAI: %s for %s, tried again in %.1f s", refused.refusal.value, label, pause)
            deadline.wait(pause)

    def _try(self, url: str, deadline: Deadline) -> CivitAIResponse:
        """One try. It is abandoned if it takes too long or the job is cancelled.

        A read timeout counts from byte to byte: a server that trickles would never meet it, and a cancelled job would
        wait for it.
        """
        call = BackgroundCall(functools.partial(self._follow, url), name="civitai-request")
        if not call.wait(self._timings.answer, deadline):
            deadline.check()
            raise CivitAIRefused(Refusal.NO_CONNECTION, "no answer in time")
        return call.result()

    def _follow(self, url: str) -> CivitAIResponse:
        """The response at the end of the redirects among the API's own origins. Every hop is sent the key."""
        route = Route(url)
        response: CivitAIResponse | None = None
        try:
            while response is None:
                response = self._hop(route)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            # ValueError: http.client was told that a chunk has a negative size.
            raise CivitAIRefused(Refusal.NO_CONNECTION) from error
        if refused := refusal_of(response, keyed=bool(self._key)):
            raise refused
        return response

    def _hop(self, route: Route) -> CivitAIResponse | None:
        """One request of a route; None if it leads on, to another URL of the API."""
        url = route.url
        timeout = (self._timings.connect, self._timings.answer)
        with self._session.get(url, headers=self._headers, timeout=timeout, stream=True) as response:
            status = response.status_code
            if not route.follow(response.status_code, response.headers.get("Location")):
                return _read(response, url)
        if origin_of(route.url) not in self._origins:
            return CivitAIResponse(url, status, location=route.url)
        if urlsplit(route.url).path.startswith("/login"):  # what CivitAI does with browsers
            raise CivitAIRefused(Refusal.KEY_REFUSED if self._key else Refusal.NO_KEY)
        return None


def _read(response: requests.Response, url: str) -> CivitAIResponse:
    content_type, retry_after = (response.headers.get(name, "") for name in ("Content-Type", "Retry-After"))
    head = CivitAIResponse(url, response.status_code, content_type.lower(), retry_after=retry_after)
    if head.status == 200 and not head.is_text:
        return head
    body = bytearray()
    for chunk in response.iter_content(64 * 1024):
        body += chunk
        if len(body) > _BODY_LIMIT:
            raise CivitAIRefused(Refusal.NOT_JSON)
    return replace(head, body=bytes(body))


class _Retries:
    """The tries that POLICY allows for one request. `origin` is the index of the origin to ask next."""

    def __init__(self, timings: SiteTimings, origins: int) -> None:
        self.origin = 0
        self._origins = origins
        self._refusals: Counter[Refusal] = Counter()
        self._backoff = Backoff(timings.shortest, timings.longest)
        self._rate_limit_patience = timings.too_many
        self._rate_limited = 0.0

    def next_pause(self, refused: CivitAIRefused) -> float | None:
        """Seconds until the next try; None if no further try is allowed."""
        rule = POLICY[refused.refusal]
        self._refusals[refused.refusal] += 1
        count = self._refusals[refused.refusal]
        other_origins = self._origins - 1 if rule.try_other_origins else 0
        if count > other_origins + rule.retries:
            return None
        if rule.try_other_origins:
            self.origin = (self.origin + 1) % self._origins
        if count <= other_origins:
            return 0.0
        pause = self._backoff.next_pause()
        if refused.refusal is not Refusal.TOO_MANY and refused.retry_after is None:
            return pause
        pause = max(refused.retry_after or 0.0, pause)
        self._rate_limited += pause
        return pause if self._rate_limited <= self._rate_limit_patience else None


class _VersionCache:
    """The metadata of versions, each for some seconds. If there are too many, the oldest goes first."""

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

"""The client of Hugging Face: from a file's name to its size and SHA-256, and to the signed link of its bytes.

    HEAD /OWNER/REPO/resolve/REVISION/PATH      302 to the storage, with X-Repo-Commit, X-Linked-Size and X-Linked-Etag

For a large file (LFS, Xet) X-Linked-Etag is the SHA-256. A small one may be served by the hub itself, with 200 and
without a SHA-256. A refusal has X-Error-Code (huggingface_hub 0.36, utils/_http.py).

This is the only place that sends the token: as a header, to the hub's own origin, for the repositories of `HubAccess`
alone. A private repository, a gated one and one that does not exist all end in the same error, so that nobody can find
out which private repositories there are.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

import requests
import urllib3

from a1111_worker.background import BackgroundCall
from a1111_worker.context import Deadline
from a1111_worker.domain import HubFile, ModelRef, RemoteFile
from a1111_worker.errors import DownloadFailed, ModelAccessDenied, ModelError, ModelNotFound, ModelRejected
from a1111_worker.models.hub_files import HubAccess
from a1111_worker.models.sites import SiteTimings
from a1111_worker.origins import HUB_ORIGIN, OriginRefused, origin_of
from a1111_worker.retry import Backoff, parse_retry_after
from a1111_worker.text import printable, quoted
from a1111_worker.transfer.egress import EgressPolicy, Route, open_session

log = logging.getLogger(__name__)

_TRIES = 4


@dataclass(frozen=True)
class HubResponse:
    """What the hub says about a file. `link` leads to its bytes, "" if it is refused. `is_storage`: outside of the hub.

    Status 0: there was no answer.
    """

    status: int
    headers: Mapping[str, str]
    link: str = ""
    is_storage: bool = False

    @property
    def sha256(self) -> str | None:
        etag = self.headers.get("X-Linked-Etag", "").removeprefix("W/").strip('"').lower()
        return etag if re.fullmatch(r"[0-9a-f]{64}", etag) else None

    @property
    def size(self) -> int | None:
        name = "X-Linked-Size" if self.is_storage else "Content-Length"
        size = self.headers.get(name, "")
        return int(size) if size.isascii() and size.isdigit() else None

    @property
    def commit(self) -> str | None:
        commit = self.headers.get("X-Repo-Commit", "").lower()
        return commit if re.fullmatch(r"[0-9a-f]{40}", commit) else None

    @property
    def error_code(self) -> str:
        return self.headers.get("X-Error-Code", "")


class HuggingFace:
    """A client of Hugging Face, or of a mirror at `url`. Many threads may use it at once.

    `policy` says where a link may lead. The token is sent for the files that `access` names, and for no others.
    """

    def __init__(
        self,
        *,
        policy: EgressPolicy,
        url: str = HUB_ORIGIN,
        token: str | None = None,
        access: HubAccess = HubAccess(),
        timings: SiteTimings = SiteTimings(),
    ) -> None:
        self._url = url.rstrip("/")
        self._origin = origin_of(self._url)
        self._policy = policy
        self._token = token
        self._access = access
        self._timings = timings
        self._session = open_session(EgressPolicy((self._origin,), ca_file=policy.ca_file), connections=16)

    def describe(self, ref: ModelRef, deadline: Deadline) -> RemoteFile:
        """What the hub says about the file that `ref` means. Its revision becomes the commit that it means now."""
        assert ref.hub is not None
        with_token = self._token is not None and self._access.may_send_token(ref.hub)
        response = self._ask(ref.hub, deadline, with_token=with_token)
        if response.commit is None:
            raise _not_understood(ref.hub)
        if ref.sha256 and response.sha256 and ref.sha256 != response.sha256:
            raise ModelRejected(
                f"{quoted(str(ref.hub), 300)} has the SHA-256 {response.sha256}, and {ref.sha256} was asked for"
            )
        exact = replace(ref.hub, revision=response.commit)
        return RemoteFile(
            url=exact.url,
            name=ref.name or printable(exact.name),
            file_name=printable(exact.path.rpartition("/")[2]),
            size=response.size,
            size_at_most=response.size,
            sha256=ref.sha256 or response.sha256,
            hub=exact,
            restricted=with_token,
        )

    def link(self, remote: RemoteFile, deadline: Deadline) -> str:
        """A URL of the file's bytes, without the token: it is signed, or the file is public."""
        assert remote.hub is not None
        response = self._ask(remote.hub, deadline, with_token=remote.restricted)
        try:
            log.info("Hugging Face: the link leads to %s", self._policy.check(response.link))
        except OriginRefused as error:
            raise DownloadFailed(
                f"Hugging Face redirected the download of {quoted(str(remote.hub), 300)} to a place that this worker "
                f"may not use: {error}",
                hint="if Hugging Face has a new storage host, add it to STORAGE_HOSTS",
            ) from error
        if remote.restricted and not response.is_storage:
            raise ModelRejected(
                f"{quoted(str(remote.hub), 300)} is not stored as a large file (LFS), so only the token can read it",
                hint="upload it again with git-lfs or `hf upload`",
            )
        return response.link

    def close(self) -> None:
        self._session.close()

    # -- requests

    def _ask(self, file: HubFile, deadline: Deadline, *, with_token: bool) -> HubResponse:
        """The hub's answer about a file. Failures that may pass are tried again."""
        backoff = Backoff(self._timings.shortest, self._timings.longest)
        patience = self._timings.too_many
        for _ in range(_TRIES):
            deadline.check()
            try:
                response = self._try(f"{self._url}{file.url_path}", with_token, deadline)
            except OriginRefused as error:  # a circle of redirects, or one to something that is no URL
                raise _not_understood(file) from error
            if response.link:
                return response
            if not _may_pass(response.status):
                break
            pause = max(backoff.next_pause(), parse_retry_after(response.headers.get("Retry-After")) or 0.0)
            patience -= pause
            if patience < 0 or 0 < deadline.remaining() <= pause:
                break
            log.info("Hugging Face: status %d for %s, tried again in %.1f s", response.status, file, pause)
            deadline.wait(pause)
        if with_token and response.status in (401, 403):
            log.warning("Hugging Face: HF_TOKEN may not read %s (%s)", file.repo, printable(response.error_code, 100))
        raise _error_of(response, file)

    def _try(self, url: str, with_token: bool, deadline: Deadline) -> HubResponse:
        """One try. It is abandoned if it takes too long or the job is cancelled."""
        call = BackgroundCall(functools.partial(self._follow, url, with_token), name="huggingface-request")
        if not call.wait(self._timings.answer, deadline):
            deadline.check()
            return HubResponse(0, {})
        return call.result()

    def _follow(self, url: str, with_token: bool) -> HubResponse:
        """The response at the end of the redirects inside the hub: a repository may have been renamed."""
        headers = {"Authorization": f"Bearer {self._token}"} if with_token else {}
        route = Route(url)
        timeout = (self._timings.connect, self._timings.answer)
        try:
            while True:
                at = route.url
                with self._session.head(at, headers=headers, timeout=timeout) as response:
                    found = HubResponse(response.status_code, response.headers)
                if not route.follow(found.status, found.headers.get("Location")):
                    return replace(found, link=at if found.status == 200 else "")
                if origin_of(route.url) != self._origin:
                    return replace(found, link=route.url, is_storage=True)
                log.debug("Hugging Face: %s was renamed", urlsplit(at).path)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            log.info("Hugging Face: no answer (%s)", type(error).__name__)
            return HubResponse(0, {})


def _may_pass(status: int) -> bool:
    """Whether the same request may succeed later: no answer, too many requests, or a failure of the hub."""
    return status in (0, 408, 425, 429) or status >= 500


def access_denied(file: HubFile) -> ModelAccessDenied:
    """The error for whatever a caller may not have, and for what does not exist."""
    return ModelAccessDenied(
        f"Hugging Face shows no repository {quoted(file.repo, 200)} to this worker: it does not exist, or it is "
        "private or gated",
        hint="check its name; the operator can name a private or gated repository in HF_REPOS, with an HF_TOKEN that "
        "may read it",
    )


def _error_of(response: HubResponse, file: HubFile) -> ModelError:
    """The error that a refusal ends as."""
    name = quoted(str(file), 300)
    if response.error_code == "EntryNotFound":
        return ModelNotFound(f"{name} names a file that its repository does not have", hint="check its path")
    if response.error_code == "RevisionNotFound":
        return ModelNotFound(f"{name} names a revision that its repository does not have", hint="check the revision")
    if response.status in (401, 403, 404, 451):
        return access_denied(file)
    if response.status == 0:
        return DownloadFailed(f"no connection to Hugging Face, or it broke off ({name})", hint="try again later")
    if response.status == 429:
        return DownloadFailed(
            f"Hugging Face does not give {name}: too many requests from this address (429)", hint="try again later"
        )
    if _may_pass(response.status):
        return DownloadFailed(
            f"Hugging Face failed when it was asked for {name} ({response.status})", hint="try again later"
        )
    return _not_understood(file)


def _not_understood(file: HubFile) -> DownloadFailed:
    return DownloadFailed(f"Hugging Face's answer for {quoted(str(file), 300)} is not understood")

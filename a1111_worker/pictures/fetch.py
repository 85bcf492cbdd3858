"""The bytes behind an https URL: addresses and redirects checked by the egress policy, size and time limited."""

from __future__ import annotations

import http.client
from urllib.parse import urlsplit

from a1111_worker.context import Deadline
from a1111_worker.errors import DownloadFailed
from a1111_worker.origins import OriginRefused
from a1111_worker.pictures.source import MAX_PICTURE_BYTES, BadPicture, too_large
from a1111_worker.transfer.connection import NETWORK_ERRORS, AbortableSocket
from a1111_worker.transfer.egress import USER_AGENT, EgressPolicy, Route, open_connection

_HEADERS = {"User-Agent": USER_AGENT, "Accept": "image/*", "Accept-Encoding": "identity"}


class PictureFetcher:
    """Fetches pictures from the origins of `policy`; each may take `seconds`, all redirects included."""

    def __init__(self, policy: EgressPolicy, *, seconds: float = 30.0) -> None:
        self.policy = policy
        self._seconds = seconds

    def fetch(self, url: str, deadline: Deadline) -> bytes:
        """The bytes of a picture, at most MAX_PICTURE_BYTES.

        Raises BadPicture if the URL itself is the reason (refused, not there, too large), DownloadFailed if another try
        may help, JobTimeout or JobCancelled if the job must end.
        """
        limit = deadline.within(self._seconds)
        opened = AbortableSocket()
        try:
            with limit.on_end(opened.abort):
                return self._fetch(url, opened)
        except OriginRefused as error:
            raise BadPicture(f"is refused: {error}") from error
        except NETWORK_ERRORS as error:
            deadline.check()
            if limit.remaining() == 0.0:
                raise DownloadFailed(f"its host took longer than {self._seconds:.3g} s") from error
            raise DownloadFailed("the connection to its host failed") from error
        finally:
            opened.close()

    def _fetch(self, url: str, opened: AbortableSocket) -> bytes:
        route = Route(url)
        while True:
            origin = self.policy.check(route.url)
            connection = open_connection(self.policy, origin, timeout=self._seconds, on_socket=opened.attach)
            try:
                parts = urlsplit(route.url)
                target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request("GET", target, headers=_HEADERS)
                response = connection.getresponse()
                if not route.follow(response.status, response.headers.get("Location")):
                    return _read(response)
            finally:
                connection.close()


def _read(response: http.client.HTTPResponse) -> bytes:
    status = response.status
    if status in (408, 425, 429) or status >= 500:
        raise DownloadFailed(f"its host answered {status}")
    if status != 200:
        raise BadPicture(f"cannot be fetched: its host answered {status}")
    if response.length is not None and response.length > MAX_PICTURE_BYTES:
        raise too_large()
    data = response.read(MAX_PICTURE_BYTES + 1)
    if len(data) > MAX_PICTURE_BYTES:
        raise too_large()
    if response.length:
        raise http.client.IncompleteRead(data, response.length)
    return data

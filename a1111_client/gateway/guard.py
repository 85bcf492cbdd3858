"""Who may ask: a page on the internet must not spend the user's money, and a secret guards what is not on loopback.

Guard(access)     the Host and Origin of every request; outermost
CORS              Starlette's, for the origins that the operator named
Authorization     checked where a route needs it, with `Access.prove`
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from a1111_client.gateway.errors import Refused

_LOCAL_NAMES = ("localhost", "host.docker.internal")


class BadAccess(ValueError):
    """Settings of access that cannot be meant."""


@dataclass(frozen=True)
class Access:
    """What the operator set: the address to listen at, users, the key, and the names and origins to trust."""

    host: str = "127.0.0.1"
    users: Mapping[str, str] | None = None
    api_key: str = ""
    allowed_hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()

    @property
    def has_secret(self) -> bool:
        return bool(self.users or self.api_key)

    @property
    def keys(self) -> tuple[str, ...]:
        """The Bearer keys of /v1: the key, else the users' passwords."""
        return (self.api_key,) if self.api_key else tuple((self.users or {}).values())

    def prove(self, authorization: str, *, bearer: bool) -> str:
        """The user or key that the header proves; "" if none is asked for. Raises Refused, as A1111 does."""
        if not self.has_secret:
            return ""
        kind, _, value = authorization.strip().partition(" ")
        if kind.lower() == "bearer":
            for number, key in enumerate(self.keys):
                if _same(value.strip(), key):
                    return f"key {number}"
        elif kind.lower() == "basic" and not bearer:
            user, password = _read_basic(value)
            # Without users, the key is the password of any user.
            known = (self.users or {}).get(user) if self.users else self.api_key
            if known is not None and _same(password, known):
                return f"user {user}"
        raise Refused(401, "Incorrect username or password" if authorization else "Not authenticated")

    def is_host(self, header: str) -> bool:
        """Whether a Host header names this machine, and not a name that a page's owner pointed at it."""
        name = _host_name(header)
        if not name:
            return False
        if name in _LOCAL_NAMES or name == self.host.lower() or name in self.allowed_hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def is_allowed(self, headers: Mapping[str, str], *, is_page: bool) -> bool:
        """Whether a browser may send this; a program sends neither header. `is_page`: a GET of the page itself."""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin is not None and origin in self.origins:
            return True
        if origin is not None and (
            origin == "null" or urlsplit(origin).netloc.lower() != headers.get("host", "").lower()
        ):
            return False
        if site in (None, "same-origin", "none"):
            return True
        return is_page and headers.get("sec-fetch-mode") == "navigate"


def parse_access(
    *, host: str, api_auth: str = "", api_key: str = "", allowed_hosts: str = "", origins: str = ""
) -> Access:
    """The settings as they are written on a command line. Raises BadAccess with a sentence."""
    users = {}
    for pair in _split(api_auth):
        user, colon, password = pair.partition(":")
        if not colon or not user or not password:
            raise BadAccess("--api-auth takes user:password, several separated by commas")
        users[user] = password
    named = [origin.rstrip("/") for origin in _split(origins)]
    if "*" in named:
        raise BadAccess(
            "--cors-allow-origins * would let every page on the internet spend your money; name the page's own origin, "
            "such as https://lite.koboldai.net"
        )
    for origin in named:
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.path:
            raise BadAccess(f"--cors-allow-origins takes origins such as https://lite.koboldai.net, not {origin!r}")
    access = Access(
        host, users or None, api_key, frozenset(name.lower() for name in _split(allowed_hosts)), frozenset(named)
    )
    if not access.has_secret and not _is_loopback(host):
        raise BadAccess(
            f"--host {host} is reached by other machines, and who reaches it spends your money: "
            "set --api-auth user:password or --api-key too"
        )
    return access


def _split(text: str) -> Iterable[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_name(header: str) -> str:
    """The name in a Host header, without port and brackets; "" if there is none."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""


def _read_basic(value: str) -> tuple[str, str]:
    try:
        user, _, password = base64.b64decode(value, validate=True).decode("utf-8").partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return "", ""
    return user, password


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode(), wanted.encode())


class Guard:
    """Answers 403 to what a foreign page sends, before anything else looks at it."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            is_page = scope["method"] in ("GET", "HEAD") and scope["path"] == "/"
            if not self._access.is_host(headers.get("host", "")):
                await _forbid("the Host header names another machine; --allowed-hosts allows a name")(
                    scope, receive, send
                )
                return
            if not self._access.is_allowed(headers, is_page=is_page):
                await _forbid("another page may not use this; --cors-allow-origins allows one")(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _forbid(reason: str) -> JSONResponse:
    return JSONResponse(Refused(403, reason).body, status_code=403)

"""The egress policy: which origins may be reached.

Every URL is checked, and every address that its host resolves to. Exactly the address that was checked is connected to.

An `EgressPolicy` is a list of origins. Scheme, host and port must all match. Nothing else is reached, whatever a job, a
redirect or a name server says:

- https only, except for an origin that is listed as `http://127.0.0.1:PORT` or `http://localhost:PORT`;
- a host name leads to public addresses only (`addresses`). Any other one is reached only if it is itself the host of a
  listed origin (`https://10.0.0.7`, `http://127.0.0.1:8081`), or if it is this machine's and that host is `localhost`;
- `*` in the list stands for every host at port 443, `*.host` for every one below it. Both lead to public addresses;
- proxies, netrc, cookies and automatic redirects are off.

There are two ways to use it: `open_session` for answers of ordinary size, `open_connection` for the download engine.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import socket
import ssl
from collections.abc import Callable, Iterable, Sequence
from http.cookiejar import DefaultCookiePolicy
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urljoin

import certifi
import requests
import urllib3
from requests.adapters import HTTPAdapter

from a1111_worker import __version__
from a1111_worker.origins import DEFAULT_PORTS, Origin, OriginRefused, origin_of, parse_origin
from a1111_worker.transfer.addresses import is_loopback, is_public, is_same

if TYPE_CHECKING:
    from requests import PreparedRequest, Response

USER_AGENT = f"a1111-worker/{__version__}"
ANY_HOST = "*"

_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 5
_UNESCAPED = "!#$%&'()*+,-./:;<=>?@[]^_`{|}~"


class EgressPolicy:
    """The origins that may be reached; `*` stands for every host, `*.host` for every one below it.

    `ca_file`: whom TLS trusts.
    """

    def __init__(self, origins: Iterable[str | Origin], *, ca_file: str | None = None) -> None:
        origins = tuple(origins)
        self._any_host = ANY_HOST in origins
        named = [origin for origin in origins if origin != ANY_HOST]
        listed = [parse_origin(origin) if isinstance(origin, str) else origin for origin in named]
        self._origins = frozenset(origin for origin in listed if not origin.host.startswith("*."))
        self._suffixes = tuple((origin.host[1:], origin.port) for origin in listed if origin.host.startswith("*."))
        self.ca_file = ca_file

    def check(self, url: str) -> Origin:
        """The origin of a URL that may be requested. Raises OriginRefused for any other URL."""
        origin = origin_of(url)
        if not self.allows(origin):
            raise OriginRefused(f"{origin} is not among the origins that may be reached")
        return origin

    def allows(self, origin: Origin) -> bool:
        return origin in self._origins or (
            origin.scheme == "https"
            and (
                (self._any_host and origin.port == DEFAULT_PORTS["https"])
                or any(origin.port == port and origin.host.endswith(suffix) for suffix, port in self._suffixes)
            )
        )

    def connect(
        self, origin: Origin, timeout: float | None, on_socket: Callable[[socket.socket], None] | None = None
    ) -> socket.socket:
        """A TCP connection to an origin, made to an address that was checked. `timeout` is in seconds.

        `on_socket` gets every socket before it connects, so that another thread can shut it down. Raises OSError if
        nothing answers, OriginRefused if the name leads to no address that may be reached.
        """
        if not self.allows(origin):
            raise OriginRefused(f"{origin} is not among the origins that may be reached")
        last: OSError | None = None
        for family, kind, protocol, address in self._addresses(origin):
            connection = socket.socket(family, kind, protocol)
            try:
                if on_socket:
                    on_socket(connection)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.settimeout(timeout)
                connection.connect(address)
                return connection
            except OSError as error:
                connection.close()
                last = error
        raise last or OSError(f"{origin} has no address")

    def tls(self) -> ssl.SSLContext:
        return _tls(self.ca_file or certifi.where())

    def _addresses(self, origin: Origin) -> Sequence[tuple[int, int, int, Any]]:
        found = socket.getaddrinfo(origin.host.strip("[]"), origin.port, 0, socket.SOCK_STREAM)
        usable = [
            (family, kind, protocol, address)
            for family, kind, protocol, _, address in found
            if (may_connect(origin, str(address[0])) if origin in self._origins else is_public(str(address[0])))
        ]
        if found and not usable:
            raise OriginRefused(f"{origin} leads to an address that is not public")
        return usable


def may_connect(origin: Origin, address: str) -> bool:
    """Whether a connection may be made to an address to which the host of a listed origin resolved."""
    if origin.host == "localhost":
        return is_loopback(address)
    with contextlib.suppress(ValueError):
        return is_same(address, origin.host.strip("[]"))  # the origin was listed by its address
    return is_public(address)


@functools.cache
def _tls(ca_file: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=ca_file)


# --- for answers of ordinary size


def open_session(policy: EgressPolicy, *, connections: int = 4) -> requests.Session:
    """A session that reaches only what the policy allows, ignores the environment, and follows no redirects.

    A request to any other origin raises OriginRefused. An `Authorization` header is sent only with the request that it
    was given to.
    """
    session = _Session()
    session.trust_env = False
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    session.headers.clear()
    session.headers.update({"User-Agent": USER_AGENT, "Accept": "*/*", "Accept-Encoding": "identity"})
    if policy.ca_file:
        session.verify = policy.ca_file
    adapter = _Adapter(policy, connections)
    session.adapters.clear()
    session.mount("https://", adapter)
    session.mount("http://", adapter)
    return session


class Route:
    """Where the redirects of a URL lead: at most five of them, and never to the same URL twice."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._seen = {url}

    def follow(self, status: int, location: str | None) -> bool:
        """Whether an answer is a redirect. Then `url` is where it leads.

        Raises OriginRefused for a circle, or too many redirects. The policy must still check `url`.
        """
        if status not in _REDIRECTS or not location:
            return False
        # A header is Latin-1 to http.client. Only what is neither ASCII nor escaped is escaped here.
        try:
            self.url = urljoin(self.url, quote(location.encode("latin-1", "replace"), safe=_UNESCAPED))
        except ValueError as error:
            raise OriginRefused(f"a redirect of {origin_of(self.url)} leads to something that is no URL") from error
        if self.url in self._seen:
            raise OriginRefused(f"the redirects of {origin_of(self.url)} go in a circle")
        if len(self._seen) > _MAX_REDIRECTS:
            raise OriginRefused(f"more than {_MAX_REDIRECTS} redirects, the last one to {origin_of(self.url)}")
        self._seen.add(self.url)
        return True


class _Session(requests.Session):
    def get_redirect_target(self, resp: Response) -> None:  # so requests never follows one
        return None


class _Adapter(HTTPAdapter):
    """requests over connections that are made by the policy."""

    def __init__(self, policy: EgressPolicy, connections: int) -> None:
        self._policy = policy
        super().__init__(pool_maxsize=connections)

    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **options: Any) -> None:
        super().init_poolmanager(connections, maxsize, block, **options)
        self.poolmanager.pool_classes_by_scheme = _pools(self._policy)

    def send(self, request: PreparedRequest, *args: Any, **options: Any) -> Response:
        self._policy.check(request.url or "")
        return super().send(request, *args, **options)


def _pools(policy: EgressPolicy) -> dict[str, type[urllib3.HTTPConnectionPool]]:
    def connect(connection: urllib3.connection.HTTPConnection, scheme: str) -> socket.socket:
        host = f"[{connection.host}]" if ":" in connection.host else connection.host.lower()
        timeout = connection.timeout if isinstance(connection.timeout, (int, float)) else None
        return policy.connect(Origin(scheme, host, connection.port or DEFAULT_PORTS[scheme]), timeout)

    class CheckedHTTP(urllib3.connection.HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return connect(self, "http")

    class CheckedHTTPS(urllib3.connection.HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return connect(self, "https")

    class HTTPPool(urllib3.HTTPConnectionPool):
        ConnectionCls = CheckedHTTP

    class HTTPSPool(urllib3.HTTPSConnectionPool):
        ConnectionCls = CheckedHTTPS

    return {"http": HTTPPool, "https": HTTPSPool}


# --- for the download engine


def open_connection(
    policy: EgressPolicy, origin: Origin, *, timeout: float, on_socket: Callable[[socket.socket], None]
) -> http.client.HTTPConnection:
    """A connection of the standard library: its answers can be read into a buffer of ours. It is connected already.

    `timeout`, `on_socket` and what it raises: see `EgressPolicy.connect`; or ssl.SSLError.
    """
    host, is_https = origin.host.strip("[]"), origin.scheme == "https"
    connection: http.client.HTTPConnection = (
        http.client.HTTPSConnection(host, origin.port, context=policy.tls())
        if is_https
        else http.client.HTTPConnection(host, origin.port)
    )
    connection.auto_open = 0  # or it would connect again by itself, to any address
    plain = policy.connect(origin, timeout, on_socket)
    connection.sock = policy.tls().wrap_socket(plain, server_hostname=host) if is_https else plain
    return connection

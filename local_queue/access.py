"""Who may ask: what keeps a page on the internet, and a machine without the key, away from this one's GPU.

A page in a browser on this machine can send requests to 127.0.0.1. A browser says so: it sends Origin with every POST
to another origin, and Sec-Fetch-Site with every request (Fetch Standard, "Origin header"; Fetch Metadata). A page that
gives its own name the address 127.0.0.1 (DNS rebinding) is of the same origin, but sends its name as Host.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

LOCAL_NAMES = frozenset({"localhost", "host.docker.internal"})


def why_refused(headers: Mapping[str, str], allowed_hosts: Collection[str] = ()) -> str | None:
    """Why a request with these headers (names in lower case) may come from a foreign page; None if it may not.

    A program sends neither Origin nor Sec-Fetch-Site. Its Host is an address, or a name of this machine, or one of
    `allowed_hosts`.
    """
    authority = headers.get("host", "")
    name = _host_of(authority)
    if not (_is_address(name) or name in LOCAL_NAMES or name in allowed_hosts):
        return "the Host header names another host: use an IP address or localhost, or allow it with --allowed-hosts"
    origin = headers.get("origin")
    if origin is not None:
        same = origin.lower() in (f"http://{authority.lower()}", f"https://{authority.lower()}")
        return None if same else "the request comes from a page of another origin"
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return "the request comes from a page of another site"
    return None


def has_key(headers: Mapping[str, str], expected: str | None) -> bool:
    """Whether the Authorization header is exactly this text. None: no key is needed."""
    if expected is None:
        return True
    given = headers.get("authorization", "")
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), expected.encode())


def is_loopback(host: str) -> bool:
    """Whether a server that listens on this address can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_of(authority: str) -> str:
    """The host of `name:port` or `[address]:port`, in lower case; empty if there is none."""
    try:
        return urlsplit(f"//{authority}").hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

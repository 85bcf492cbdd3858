"""Origins (scheme, host and port): how a setting or a URL names one, and those that this worker knows."""

from __future__ import annotations

import re
from dataclasses import dataclass

CIVITAI_ORIGINS = ("https://civitai.com", "https://civitai.red")
"""CivitAI's API. The second one shows what the first one hides since April 2026. Ids and keys are the same on both."""

HUB_ORIGIN = "https://huggingface.co"

_R2 = "5ac0637cfd0766c97916cefa3764fbdf.r2.cloudflarestorage.com"

# CivitAI's signed links lead here: its buckets on Cloudflare R2 (CivitAI's own list, with the legacy ones), its domain
# in front of Backblaze, and Backblaze itself, whose links name cluster 004. Hugging Face's lead to hosts below hf.co.
STORAGE_HOSTS = (
    f"https://civitai-delivery-worker-prod.{_R2}",
    f"https://civitai-delivery-worker-prod-2023-05-01.{_R2}",
    f"https://civitai-delivery-worker-prod-2023-10-01.{_R2}",
    f"https://civitai-prod.{_R2}",
    f"https://civitai-prod-settled.{_R2}",
    "https://b2.civitai.com",
    "https://s3.us-west-004.backblazeb2.com",
    "https://f004.backblazeb2.com",
    "https://*.hf.co",
)

DEFAULT_PORTS = {"http": 80, "https": 443}

# Deliberately narrower than RFC 3986: if two parsers might read a text differently (credentials, backslashes, spaces,
# percent escapes in a host), it is no URL here.
_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?|\[[0-9a-f:.]+\])(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<rest>[/?#][\x21-\x5b\x5d-\x7e]*)?",
    re.IGNORECASE,
)
_HOST = re.compile(r"(?:\*\.)?[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?(?::[0-9]{1,5})?", re.IGNORECASE)


class OriginRefused(Exception):
    """A URL or an address that may not be reached. The message names no more of a URL than its origin."""


@dataclass(frozen=True)
class Origin:
    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}" + ("" if self.port == DEFAULT_PORTS[self.scheme] else f":{self.port}")

    @property
    def is_loopback(self) -> bool:
        return self.host in ("127.0.0.1", "localhost", "[::1]")


def origin_of(url: str) -> Origin:
    """A URL's origin. Raises OriginRefused if it is not plainly an http(s) URL, or contains credentials."""
    found = _URL.fullmatch(url)
    if not found:
        raise OriginRefused("not a plain https URL (no credentials, no spaces, no escapes in the host)")
    scheme, host = found["scheme"].lower(), found["host"].lower()
    port = int(found["port"] or DEFAULT_PORTS[scheme])
    if not 1 <= port <= 65535:
        raise OriginRefused("not a plain https URL (its port is not between 1 and 65535)")
    return Origin(scheme, host, port)


def parse_origin(entry: str) -> Origin:
    """An origin as a setting names it: `https://host[:port]`, `host[:port]`, `http://127.0.0.1:PORT`, `*.host`.

    Raises OriginRefused for anything else, and for http to any other host than this machine.
    """
    text = entry.strip().rstrip("/")
    if _HOST.fullmatch(text):
        text = f"https://{text}"
    is_suffix = text.startswith("https://*.")
    origin = origin_of(text.replace("*.", "", 1) if is_suffix else text)
    if text.count("/") != 2 or "?" in text or "#" in text:
        raise OriginRefused(f"{origin} is followed by a path; an origin is scheme, host and port")
    if origin.scheme == "http" and not origin.is_loopback:
        raise OriginRefused(f"{origin} is not https (http is for 127.0.0.1 and localhost only)")
    return Origin(origin.scheme, f"*.{origin.host}", origin.port) if is_suffix else origin

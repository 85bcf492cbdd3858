"""CivitAI's responses: what each one means, whether the request is tried again, and the error that it ends as.

The table is POLICY. The responses and their causes are those of CivitAI's own server code
(github.com/civitai/civitai, 2026).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from a1111_worker.errors import DownloadFailed, ModelAccessDenied, ModelError, ModelNotFound
from a1111_worker.retry import parse_retry_after


class Refusal(Enum):
    """Why a response is not what was asked for."""

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
    NO_CONNECTION = "no answer, or half of one"
    REDIRECT_REFUSED = "a redirect to where nothing may be fetched"
    OTHER = "any other status"


@dataclass(frozen=True)
class RefusalRule:
    """What a refusal means: the error that it ends as, and what is tried before.

    `try_other_origins`: every other origin is asked once, without a pause. `retries`: how often the request is tried
    again after that, with pauses (because of 429 only as long as `SiteTimings.too_many` lasts). In `message`,
    {model} is how the caller named the model, and {detail} is what the response adds.
    """

    error: type[ModelError]
    message: str
    hint: str | None = None
    try_other_origins: bool = False
    retries: int = 0


_KEY_HINT = "set CIVITAI_API_KEY to an API key of a CivitAI account (Account settings, API Keys)"
_LATER = "try again later"

POLICY: Mapping[Refusal, RefusalRule] = {
    # The job's own parameters never get this far: CivitAI's API has changed, or a CIVITAI_URL is not CivitAI.
    Refusal.BAD_REQUEST: RefusalRule(DownloadFailed, "CivitAI did not understand the request for {model} (400)"),
    Refusal.NO_KEY: RefusalRule(ModelAccessDenied, "CivitAI gives {model} to logged-in users only", _KEY_HINT),
    Refusal.KEY_REFUSED: RefusalRule(
        ModelAccessDenied,
        "CivitAI refused the worker's API key when it was asked for {model}",
        "CIVITAI_API_KEY is wrong, expired or revoked: set it to a valid one",
    ),
    Refusal.DISABLED: RefusalRule(
        ModelAccessDenied, "the creator of {model} has disabled its download", "choose another model: no key helps here"
    ),
    # The address or the account is on CivitAI's black list, or Cloudflare wants to see a browser.
    Refusal.FORBIDDEN: RefusalRule(ModelAccessDenied, "CivitAI refuses to serve {model} to this worker (403)"),
    Refusal.EARLY_ACCESS: RefusalRule(
        ModelAccessDenied,
        "{model} is in early access{detail}",
        "buy it with the account of CIVITAI_API_KEY, or wait until it is public",
    ),
    Refusal.PRIVATE: RefusalRule(
        ModelAccessDenied, "{model} is private", "use the key of an account that may see it as CIVITAI_API_KEY"
    ),
    # Also a passing failure of CivitAI's storage resolver, and .com's answer for everything that only .red shows.
    Refusal.NOT_FOUND: RefusalRule(
        ModelNotFound,
        "CivitAI does not have {model} (404)",
        "check the id; its creator may have removed it",
        try_other_origins=True,
        retries=2,
    ),
    Refusal.GONE: RefusalRule(ModelNotFound, "{model} is archived on CivitAI and cannot be downloaded any more (410)"),
    # CivitAI's own limit counts the last 24 hours and does not say when it ends. A shorter one is Cloudflare's.
    Refusal.TOO_MANY: RefusalRule(
        DownloadFailed,
        "CivitAI does not give {model}: this account or address has downloaded too much (429)",
        "try again later; a model that is kept in the cache or the image needs no download",
        retries=10,
    ),
    Refusal.REGION: RefusalRule(
        ModelAccessDenied,
        "CivitAI does not serve the region in which this worker runs (451)",
        "CivitAI blocks the United Kingdom and Australia: exclude those data centers from the endpoint",
    ),
    Refusal.SERVER: RefusalRule(
        DownloadFailed,
        "CivitAI failed when it was asked for {model} ({detail})",
        _LATER,
        try_other_origins=True,
        retries=3,
    ),
    Refusal.NOT_JSON: RefusalRule(
        DownloadFailed,
        "CivitAI's answer for {model} is not what was asked for",
        _LATER,
        try_other_origins=True,
        retries=2,
    ),
    Refusal.NO_CONNECTION: RefusalRule(
        DownloadFailed,
        "no connection to CivitAI, or it broke off ({model})",
        _LATER,
        try_other_origins=True,
        retries=2,
    ),
    # A private address, http, a circle of redirects, or a host that is not in the list.
    Refusal.REDIRECT_REFUSED: RefusalRule(
        DownloadFailed,
        "CivitAI redirected the download of {model} to a place that this worker may not use: {detail}",
        "if CivitAI has a new storage host, add it to STORAGE_HOSTS",
    ),
    Refusal.OTHER: RefusalRule(DownloadFailed, "CivitAI's answer for {model} is not understood ({detail})"),
}


@dataclass(frozen=True)
class CivitAIResponse:
    """A response of the API, or a redirect to `location` outside of it. `body` is empty for a 200 that is no text."""

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
        """The content of the body, None if it is no JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None


class CivitAIRefused(Exception):
    """A response that is not what was asked for. `retry_after` is in seconds."""

    def __init__(self, refusal: Refusal, detail: str = "", retry_after: float | None = None) -> None:
        super().__init__(refusal.value)
        self.refusal = refusal
        self.detail = detail
        self.retry_after = retry_after


_REFUSAL_OF_STATUS = {
    400: Refusal.BAD_REQUEST,
    404: Refusal.NOT_FOUND,
    410: Refusal.GONE,
    429: Refusal.TOO_MANY,
    451: Refusal.REGION,
}


def refusal_of(response: CivitAIResponse, *, keyed: bool) -> CivitAIRefused | None:
    """Why a response is a refusal, None if it is none. `keyed` is whether a key was sent."""
    status = response.status
    if status == 200 or response.location is not None:
        return None
    content = as_dict(response.json())
    explanation = f"{as_text(content.get('error'))} {as_text(content.get('message'))}".casefold()
    if status == 401:
        if "disabled" in explanation:
            return CivitAIRefused(Refusal.DISABLED)
        return CivitAIRefused(Refusal.KEY_REFUSED if keyed else Refusal.NO_KEY)
    if status == 403:
        if "early access" in explanation:
            end = re.match(r"\d{4}-\d{2}-\d{2}", as_text(content.get("deadline")))
            return CivitAIRefused(Refusal.EARLY_ACCESS, f" until {end.group()}" if end else "")
        return CivitAIRefused(Refusal.PRIVATE if "access" in explanation else Refusal.FORBIDDEN)
    retry_after = parse_retry_after(response.retry_after)
    if status in _REFUSAL_OF_STATUS:
        return CivitAIRefused(_REFUSAL_OF_STATUS[status], retry_after=retry_after if status == 429 else None)
    if status >= 500 or status in (408, 425):  # 520 to 527 are Cloudflare's
        return CivitAIRefused(Refusal.SERVER, str(status), retry_after)
    return CivitAIRefused(Refusal.OTHER, str(status))


def error_of(refused: CivitAIRefused, label: str) -> ModelError:
    """The error that a refusal ends as. `label` is how the message names the model."""
    rule = POLICY[refused.refusal]
    return rule.error(rule.message.format(model=label, detail=refused.detail), hint=rule.hint)


# A response may hold any JSON in any place.


def as_dict(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def as_text(value: object) -> str:
    return value if isinstance(value, str) else ""

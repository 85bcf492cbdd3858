"""A client of the sandbox's CivitAI and of its storage."""

from __future__ import annotations

import requests

from sandbox.civitai import SandboxCivitAI

SIZE = 300_000
"""Bytes of the LoRA that the fixture `civitai` serves."""

BEARER = {"Authorization": "Bearer the-key"}


def get(url: str, **headers: str) -> requests.Response:
    """One GET of a client that follows no redirects and adds no headers of its own."""
    own = {"Accept-Encoding": "identity", "User-Agent": "a-client/1"}
    return requests.get(url, headers=own | headers, allow_redirects=False, timeout=10)


def link(civitai: SandboxCivitAI) -> str:
    """A signed link to the LoRA."""
    return get(civitai.download_url(135867), **BEARER).headers["Location"]

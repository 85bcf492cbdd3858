"""Which endpoint is meant, and the key for it. A key goes to the one service that it is for, and is never shown.

~/.config/a1111/runpod-key      written by `a1111 login`, mode 0600; RUNPOD_API_KEY in the environment wins
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import platformdirs

from a1111_client.endpoint import Endpoint, Timings, runpod_url
from a1111_client.errors import EndpointError

APP = "a1111"
_ID = re.compile(r"[A-Za-z0-9-]{1,64}")
_KEY = re.compile(r"[\x21-\x7e]{8,512}")


def key_file() -> Path:
    return platformdirs.user_config_path(APP) / "runpod-key"


def data_folder() -> Path:
    """Where snapshots are kept."""
    return platformdirs.user_data_path(APP)


def save_key(key: str, file: Path) -> None:
    """Keep RunPod's key, readable by its owner alone. Raises EndpointError if it cannot be one, OSError."""
    key = key.strip()
    if not _KEY.fullmatch(key):
        raise EndpointError("BAD_OPTION", "that is no key: one word of 8 to 512 characters")
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = file.with_suffix(".new")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as opened:
        opened.write(key + "\n")
    part.replace(file)


def runpod_key(environ: Mapping[str, str], file: Path) -> str:
    """RunPod's key. Raises EndpointError if there is none."""
    key = environ.get("RUNPOD_API_KEY", "").strip()
    with contextlib.suppress(OSError):
        key = key or file.read_text(encoding="utf-8").strip()
    if not key:
        raise EndpointError("NO_KEY", "there is no key for RunPod", hint="set RUNPOD_API_KEY, or use `a1111 login`")
    return key


def open_endpoint(
    endpoint_id: str, url: str, environ: Mapping[str, str], file: Path, *, timings: Timings | None = None
) -> Endpoint:
    """The endpoint on RunPod, or the one at a URL. Raises EndpointError if neither is named, or the key is missing.

    RunPod's key is for RunPod alone: an endpoint at a URL gets LOCAL_API_KEY, if there is one.
    """
    timings = timings or Timings()
    if url:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
            raise EndpointError("NO_ENDPOINT", "--url takes an address such as http://127.0.0.1:8000")
        return Endpoint(url, environ.get("LOCAL_API_KEY", "").strip(), timings=timings)
    if not endpoint_id:
        raise EndpointError(
            "NO_ENDPOINT",
            "no endpoint is named",
            hint="use --endpoint ID or set RUNPOD_ENDPOINT_ID; for one on this machine use --url",
        )
    if not _ID.fullmatch(endpoint_id):
        raise EndpointError(
            "NO_ENDPOINT", "--endpoint takes the id that RunPod's console shows, such as abc123def456gh"
        )
    return Endpoint(runpod_url(endpoint_id), runpod_key(environ, file), timings=timings)

"""The container's health, from what the worker and start.sh write: status 0 when a job can be taken, 1 with the reason.

    WORKER_STATE_FILE   {"state": "booting"|"ready"|"broken", "heartbeat": <seconds since 1970>, "webui": "up"|"down"}
    WEBUI_STATE_FILE    the WebUI's pid, or `failed` when start.sh has given up

A WebUI that is down for the moment is start.sh's to restart, not a sick container.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

HEARTBEAT_LIFE = 60.0  # seconds; the worker writes far more often


def sickness(environ: Mapping[str, str], now: float) -> str | None:
    """Why no job can be taken, or None."""
    try:
        said = json.loads(Path(environ["WORKER_STATE_FILE"]).read_text(encoding="utf-8"))
        state, heartbeat = str(said["state"]), float(said["heartbeat"])
    except (KeyError, OSError, TypeError, ValueError) as error:
        return f"the worker's state cannot be read: {type(error).__name__}"
    if state != "ready":
        return f"the worker is {state}"
    if now - heartbeat > HEARTBEAT_LIFE:
        return f"the worker's heart stopped {now - heartbeat:.0f} s ago"
    if _webui_state(environ) == "failed":
        return "start.sh has given up on the WebUI"
    return None


def _webui_state(environ: Mapping[str, str]) -> str:
    try:
        return Path(environ["WEBUI_STATE_FILE"]).read_text(encoding="utf-8").strip()
    except (KeyError, OSError, ValueError):
        return ""


if __name__ == "__main__":
    reason = sickness(os.environ, time.time())
    sys.stdout.write(f"{reason or 'ready'}\n")
    sys.exit(reason is not None)

"""The container's health, from the files of the worker and start.sh: status 0 if a job can be taken, else 1 and why.

    WORKER_STATE_FILE   {"state": "booting"|"ready"|"broken", "heartbeat": <seconds since 1970>, "webui": "up"|"down",
                         "ping": "none"|"up"|"down"}
    WEBUI_STATE_FILE    the WebUI's pid, or `failed: WHY` if start.sh has given up

A container is healthy while its WebUI is down for a moment: start.sh restarts it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

MAX_HEARTBEAT_AGE = 60.0  # seconds; the worker writes far more often


def why_unhealthy(environ: Mapping[str, str], now: float) -> str | None:
    """Why no job can be taken; None if the container is healthy."""
    try:
        written = json.loads(Path(environ["WORKER_STATE_FILE"]).read_text(encoding="utf-8"))
        state, heartbeat = str(written["state"]), float(written["heartbeat"])
    except (KeyError, OSError, TypeError, ValueError) as error:
        return f"the worker's state cannot be read: {type(error).__name__}"
    if state != "ready":
        return f"the worker is {state}"
    if now - heartbeat > MAX_HEARTBEAT_AGE:
        return f"the worker's last heartbeat was {now - heartbeat:.0f} s ago"
    if written.get("ping") == "down":
        return "the SDK's ping process has ended: RunPod no longer hears of this worker"
    if _webui_state(environ).startswith("failed"):
        return "start.sh has given up on the WebUI"
    return None


def _webui_state(environ: Mapping[str, str]) -> str:
    try:
        return Path(environ["WEBUI_STATE_FILE"]).read_text(encoding="utf-8").strip()
    except (KeyError, OSError, ValueError):
        return ""


if __name__ == "__main__":
    reason = why_unhealthy(os.environ, time.time())
    sys.stdout.write(f"{reason or 'ready'}\n")
    sys.exit(reason is not None)

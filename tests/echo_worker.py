"""A worker without a WebUI, run by the real SDK: it answers a job with its input, or does what the input says."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import runpod


async def handler(job: dict[str, Any]) -> Any:
    given = job["input"]
    if "progress" in given:
        runpod.serverless.progress_update(job, given["progress"])
    if "wait" in given:
        try:
            await asyncio.sleep(given["wait"])
        except asyncio.CancelledError:
            print("cancelled", flush=True)  # noqa: T201 - the tests read its log
            raise
    if given.get("show") == "environment":
        return dict(os.environ)
    if given.get("show") == "group":
        return os.getpgid(0)
    if given.get("show") == "death":
        os._exit(7)
    return given.get("answer", {"echo": given})


if __name__ == "__main__":
    in_flight = int(os.environ.get("JOBS_IN_FLIGHT", "1"))
    runpod.serverless.start({"handler": handler, "concurrency_modifier": lambda current: in_flight})

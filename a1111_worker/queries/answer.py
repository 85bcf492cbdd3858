"""The `worker` block of an answer without pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from a1111_worker import __version__
from a1111_worker.context import JobContext
from a1111_worker.delivery.answer import MB, serialised_size, size_limit
from a1111_worker.errors import ResultTooLarge


def versions(webui_version: str | None) -> dict[str, str | None]:
    """The versions of this worker and of A1111, as every `worker` block has them. A1111's is None until it is known."""
    return {"worker": __version__, "webui": webui_version}


def check_size(answer: Mapping[str, Any], context: JobContext) -> None:
    """Raise ResultTooLarge if RunPod would not take an answer."""
    limit = size_limit(context.job_id)
    if serialised_size(answer) > limit:
        raise ResultTooLarge(
            f"the answer is larger than {limit / MB:.0f} MB",
            hint="send the job to /runsync, which takes 20 MB, or ask for less",
        )


def worker_block(webui_version: str | None, context: JobContext) -> dict[str, Any]:
    """How long the job took, in seconds, and which worker it was."""
    total = context.times.seconds()["total"]
    return {"warnings": [], "timings": {"total": round(total, 3)}, "versions": versions(webui_version)}

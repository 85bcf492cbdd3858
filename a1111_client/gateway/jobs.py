"""The open jobs of this gateway, by the client that each belongs to, and their progress in A1111's form.

A1111 has one queue and one progress for everybody. Clients of it carry no id. So a client is what it has proven to be
(its user or key), its address and its User-Agent, together; those that are the same in all three share their jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from a1111_client.endpoint import Job, JobState

# How much of the bar each stage takes: from here to there.
_STAGES: Mapping[str, tuple[float, float]] = {
    "models": (0.02, 0.05),
    "queue": (0.05, 0.05),
    "switch": (0.05, 0.08),
    "generate": (0.08, 0.95),
    "upscale": (0.08, 0.95),
    "deliver": (0.95, 0.99),
}
_WAITING = 0.01
_STEP = re.compile(r"step (\d+) of (\d+)")
_IMAGE = re.compile(r"(?:image|batch) (\d+) of (\d+)")


@dataclass(frozen=True)
class Client:
    """Who asks. `proven` is a user or a key that was checked; a header that was not checked is not in it."""

    proven: str
    address: str
    agent: str


@dataclass(eq=False)
class OpenJob:
    """A request that waits for its pictures. `job` is None until RunPod has taken it."""

    client: Client
    name: str  # txt2img, img2img, …
    images: int = 1
    steps: int = 1
    begun: float = field(default_factory=time.monotonic)
    started: str = field(default_factory=lambda: datetime.now().strftime("%Y%m%d%H%M%S"))
    job: Job | None = None
    place: str = "in the queue"
    interrupted: asyncio.Event = field(default_factory=asyncio.Event)
    _shown: float = 0.0

    @property
    def state(self) -> JobState:
        return self.job.state if self.job else JobState()

    def waited(self) -> str:
        """How long its client has waited so far: "34 s"."""
        return f"{time.monotonic() - self.begun:.0f} s"

    def describe(self) -> str:
        """What happens now, in a sentence for people."""
        state = self.state
        if state.status == "IN_QUEUE":
            return f"{self.place}, {self.waited()}"
        told = state.progress
        parts = [str(told.get("stage") or "at work"), str(told.get("detail") or "")]
        if "mb_per_s" in told:
            parts.append(f"{told['mb_per_s']} MB/s")
        return ", ".join(part for part in parts if part)

    def progress(self, *, with_picture: bool) -> dict[str, Any]:
        """A1111's answer to GET /progress. It never goes back, and is never 0."""
        told = self.state.progress
        begin, end = _STAGES.get(str(told.get("stage")), (_WAITING, _WAITING))
        percent = told.get("percent")
        share = min(1.0, max(0.0, percent / 100)) if isinstance(percent, (int, float)) else 0.0
        self._shown = max(self._shown, begin + (end - begin) * share)
        detail = str(told.get("detail") or "")
        step, image = _STEP.search(detail), _IMAGE.search(detail)
        eta = told.get("eta_s")
        preview = told.get("preview")
        return {
            "progress": self._shown,
            "eta_relative": float(eta) if isinstance(eta, (int, float)) else 0.0,
            "state": {
                **_IDLE_STATE,
                "job": f"Batch {image[1]} out of {image[2]}" if image else f"scripts_{self.name}",
                "job_count": int(image[2]) if image else self.images,
                "job_timestamp": self.started,
                "job_no": int(image[1]) - 1 if image else 0,
                "sampling_step": int(step[1]) if step else 0,
                "sampling_steps": int(step[2]) if step else self.steps,
            },
            "current_image": preview if with_picture and isinstance(preview, str) else None,
            "textinfo": self.describe(),
        }


_IDLE_STATE = {
    "skipped": False,
    "interrupted": False,
    "stopping_generation": False,
    "job": "",
    "job_count": 0,
    "job_timestamp": "0",
    "job_no": 0,
    "sampling_step": 0,
    "sampling_steps": 0,
}


def idle_progress() -> dict[str, Any]:
    """A1111's answer if nothing runs: exactly 0.0 and no job, which clients wait for."""
    return {"progress": 0.0, "eta_relative": 0.0, "state": _IDLE_STATE, "current_image": None, "textinfo": None}


class OpenJobs:
    """All open jobs of a gateway, the oldest first."""

    def __init__(self) -> None:
        self._jobs: list[OpenJob] = []

    def __len__(self) -> int:
        return len(self._jobs)

    def all(self) -> tuple[OpenJob, ...]:
        return tuple(self._jobs)

    @contextlib.contextmanager
    def open(self, job: OpenJob) -> Iterator[OpenJob]:
        """Have the job in the list until the block ends."""
        self._jobs.append(job)
        try:
            yield job
        finally:
            self._jobs.remove(job)

    def oldest_of(self, client: Client) -> OpenJob | None:
        """The job that this client's progress shows and its interrupt ends."""
        return next((job for job in self._jobs if job.client == client and not job.interrupted.is_set()), None)

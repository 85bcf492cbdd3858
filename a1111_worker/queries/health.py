"""How the worker is: its GPU, its disk, its cache, its jobs so far. No secret and no path is in the answer."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from typing import Any

from a1111_worker.context import JobContext
from a1111_worker.domain import ModelKind
from a1111_worker.errors import VolumeFailed
from a1111_worker.job.health import HealthReporter
from a1111_worker.models.manager import ModelManager
from a1111_worker.queries.answer import versions, worker_block
from a1111_worker.queries.gpu import find_gpu
from a1111_worker.webui.generation import Generator


class HealthQuery:
    """Counts the outcomes of jobs, and answers `health` jobs. Its uptime begins when it is made."""

    def __init__(self, reporter: HealthReporter, generator: Generator, models: ModelManager) -> None:
        self._reporter = reporter
        self._generator = generator
        self._models = models
        self._began = time.monotonic()
        self._jobs: Counter[str] = Counter()

    def count(self, outcome: str) -> None:
        """Count a job: `COMPLETED`, or the code of its error."""
        self._jobs[outcome] += 1

    def answer(self, context: JobContext) -> dict[str, Any]:
        """The answer of a `health` job, which is not among the jobs that it counts."""
        webui_version = self._generator.proof.webui_version if self._generator.proof else None
        gpu = find_gpu()
        return {
            "health": {
                "state": self._reporter.state,
                "versions": versions(webui_version),
                "gpu": asdict(gpu) if gpu else None,
                "disk": self._disk(),
                "cache": self._cache(),
                "uptime_s": round(time.monotonic() - self._began, 1),
                "jobs": dict(self._jobs),
                "checkpoint_proven": self._generator.is_checkpoint_proven,
            },
            "worker": worker_block(webui_version, context),
        }

    def _disk(self) -> dict[str, int] | None:
        """The bytes that are free for models: an upper bound, because a volume's quota may not show. None: unknown."""
        try:
            return {"free": self._models.cache.directories.for_new(ModelKind.LORA).free()}
        except VolumeFailed:
            return None

    def _cache(self) -> dict[str, Any] | None:
        """How many models there are of each kind, and how many bytes of its limit the cache takes. None: unknown."""
        cache = self._models.cache
        try:
            kinds = Counter(entry.kind for _, entry in cache.list_models())
            used = sum(entry.size for entry in cache.list_entries())
        except VolumeFailed:
            return None
        return {**{kind.plural: kinds[kind] for kind in ModelKind}, "bytes": used, "limit": cache.limit}

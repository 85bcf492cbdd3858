"""Models that a later job will want: brought into the cache now, each with its outcome.

    {"loras": [{"name": "Detail Tweaker XL", "file": "detail_tweaker_xl.safetensors", "tag": …, "size": 228456712,
                "seconds": 2.4, "downloaded": true, "sha256": …},
               {"name": "nobody", "code": "MODEL_NOT_FOUND", "message": …}]}

One that fails is no reason to go without the others. A job that a GPU waits for downloads first.
"""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from a1111_worker.context import JobContext, ignore_progress
from a1111_worker.domain import OWN_CHECKPOINT, Model, ModelKind, ModelRef, PrefetchRequest, Progress, Stage
from a1111_worker.errors import JobTimeout, ModelError, ModelRejected
from a1111_worker.models.manager import ModelManager
from a1111_worker.queries.answer import worker_block
from a1111_worker.queries.models import ModelsQuery
from a1111_worker.request.fields import Limits
from a1111_worker.webui.checkpoint import checkpoint_names
from a1111_worker.webui.readiness import Readiness

THREADS = 4
"""Models that are fetched at once. Each may have several connections."""

ANSWER_SECONDS = 5.0
"""What a job keeps back, so that it can still answer when its time is nearly up."""


class PrefetchQuery:
    """Answers `prefetch` jobs."""

    def __init__(self, models: ModelManager, readiness: Readiness, menus: ModelsQuery, limits: Limits) -> None:
        self._models = models
        self._limits = limits
        self._readiness = readiness
        self._menus = menus

    def answer(self, request: PrefetchRequest, context: JobContext) -> dict[str, Any]:
        """The outcome for each model, in the order of the job. What has arrived is kept until all have."""
        left = context.deadline.remaining()
        limit = context.deadline.within(max(left - ANSWER_SECONDS, left / 2), what="the prefetch")
        quiet = replace(context, deadline=limit, report=ignore_progress, is_next=lambda: False)
        wanted = [(kind, ref) for kind, refs in request.refs.items() for ref in refs]
        outcomes: dict[str, list[dict[str, Any]]] = {kind: [] for kind in request.refs}
        with contextlib.ExitStack() as holds, ThreadPoolExecutor(THREADS, "prefetch") as threads:
            running = [
                (kind, threads.submit(contextvars.copy_context().run, self._outcome, ref, quiet, holds))
                for kind, ref in wanted
            ]
            for number, (kind, outcome) in enumerate(running):
                context.report(
                    Progress(
                        Stage.MODELS, round(100 * number / len(running), 1), f"{number} of {len(running)} are there"
                    )
                )
                outcomes[kind].append(outcome.result())
        context.deadline.check()
        self._menus.list_cache()
        return {
            "prefetch": outcomes,
            "worker": self._menus.add_fingerprint(worker_block(self._menus.webui_version, context)),
        }

    def _outcome(self, ref: ModelRef, context: JobContext, holds: contextlib.ExitStack) -> dict[str, Any]:
        """What became of one model. It is held until `holds` is closed."""
        began = time.monotonic()
        try:
            model = holds.enter_context(self._hold(ref, context))
        except (ModelError, JobTimeout) as error:
            return {"name": ref.label, "code": error.code, "message": error.message}
        return {
            "name": model.name,
            "file": model.file,
            "tag": model.shown,
            "size": model.size,
            "seconds": round(time.monotonic() - began, 3),
            "downloaded": model.downloaded,
            "sha256": model.sha256,
        }

    @contextlib.contextmanager
    def _hold(self, ref: ModelRef, context: JobContext) -> Iterator[Model]:
        if ref.kind is ModelKind.CHECKPOINT:
            allowed = self._allowed_checkpoint(ref)
            if allowed is None:
                yield self._checkpoint(ref)
                return
            ref = allowed
        with self._models.hold([ref], context) as held:
            yield held.models[ref]

    def _allowed_checkpoint(self, ref: ModelRef) -> ModelRef | None:
        """The reference of a checkpoint that jobs may use; None if it is none of these, or the worker's own."""
        limits = self._limits
        listed = limits.checkpoint(ref.name if ref.is_bare_name and ref.name else ref)
        if listed is None and limits.max_checkpoint_bytes is not None and not ref.is_bare_name:
            return replace(ref, max_size=limits.max_checkpoint_bytes)
        return None if listed == OWN_CHECKPOINT else listed

    def _checkpoint(self, ref: ModelRef) -> Model:
        """The worker's own checkpoint, which is held as long as the worker lives. Raises ModelRejected for another."""
        model = self._readiness.own_checkpoint
        is_meant = (
            ref.version_id == model.version_id
            if ref.version_id
            else (ref.name is not None and ref.name.casefold() in checkpoint_names(model))
        )
        if not is_meant:
            raise ModelRejected(f"{ref.label} is no checkpoint of this worker", hint=f"it has {model.name}")
        return replace(model, downloaded=False)  # it was there before this job

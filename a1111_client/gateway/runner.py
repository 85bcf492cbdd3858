"""What a gateway does with a job: send it, follow it, fetch its pictures, and keep the snapshot true.

The snapshot is renewed by jobs that run anyway: each answer names the fingerprint of the worker's lists, and if that is
another than the snapshot's, the next job brings the lists along. A job that was refused for a name that only an old
snapshot had is the exception: its worker is awake, so it is asked at once, and the job is tried once more.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

from a1111_client.endpoint import Endpoint, Job
from a1111_client.errors import EndpointError
from a1111_client.gateway.jobs import OpenJob
from a1111_client.gateway.options import OptionsStore
from a1111_client.gateway.sizes import fit
from a1111_client.gateway.translate import Input, named_in
from a1111_client.snapshot import Snapshot, SnapshotStore

log = logging.getLogger(__name__)

MakeInput = Callable[[Snapshot], Input]

_LOOKS_PER_LINE = 10  # of the log, while a job waits for the same reason
_QUOTED = re.compile(r"['\"]([^'\"]+)['\"]")
_ABOUT_NAMES = ("INVALID_REQUEST", "MODEL_NOT_FOUND")


class Interrupted(Exception):
    """The job was ended before it had pictures, by its own client or by somebody else."""


class Runner:
    """One endpoint, its snapshot, and the settings that clients have posted."""

    def __init__(self, endpoint: Endpoint, snapshots: SnapshotStore) -> None:
        self.endpoint = endpoint
        self.options = OptionsStore()
        self._snapshots = snapshots
        self._snapshot = snapshots.load(endpoint.url)
        self._is_stale = self._snapshot.is_default
        self._tells_lists = True
        if self._snapshot.is_default:
            log.warning(
                "the endpoint's own lists are not known yet: menus show those of A1111 1.10.1 and the worker's "
                "checkpoint, until the first job has run (`a1111 serve --refresh` asks for them at its start)"
            )

    @property
    def snapshot(self) -> Snapshot:
        return self._snapshot

    @property
    def _asks_for_lists(self) -> bool:
        return self._is_stale and self._tells_lists

    def mark_stale(self) -> None:
        """Have the next job bring the lists along."""
        self._is_stale = True

    async def run(self, opened: OpenJob, make_input: MakeInput) -> dict[str, Any]:
        """The answer of a job, its pictures in it as base64. Raises EndpointError, Interrupted, ApiError."""
        given = make_input(self._snapshot)
        try:
            answer = await self._run_once(opened, given)
        except EndpointError as error:
            if not self._is_about_an_old_name(error, given):
                raise
            log.info("the job was refused for a name that may be gone: asking for the endpoint's lists")
            again = make_input(await self.renew())
            if again == given:
                raise
            answer = await self._run_once(opened, again)
        return await self._with_pictures(answer)

    async def renew(self) -> Snapshot:
        """Ask for the endpoint's lists, with a job of its own. Raises EndpointError."""
        async with self.endpoint.job({"task": "models"}) as job:
            self._learn(await job.result())
        return self._snapshot

    async def _run_once(self, opened: OpenJob, given: Input) -> dict[str, Any]:
        given = await asyncio.to_thread(fit, given)
        try:
            return await self._run_job(opened, {**given, "include": ["models"]} if self._asks_for_lists else given)
        except EndpointError as error:
            if [complaint.get("path") for complaint in error.complaints] != ["include"]:
                raise
            log.warning("the endpoint's worker is of an older version, which tells no lists")
            self._tells_lists = False
            return await self._run_job(opened, given)

    async def _run_job(self, opened: OpenJob, given: Input) -> dict[str, Any]:
        async with self.endpoint.job(given) as job:
            opened.job = job
            log.info("%s is job %s", opened.name, job.id)
            watching = asyncio.ensure_future(self._watch_queue(opened, job))
            try:
                async for state in job.follow():
                    if state.status != "IN_QUEUE" and not watching.done():
                        watching.cancel()
                        log.info("job %s runs, after %s", job.id, opened.waited())
            finally:
                watching.cancel()
            if job.state.status == "CANCELLED":
                raise Interrupted
            answer = job.answer()
        self._learn(answer)
        return answer

    async def _watch_queue(self, opened: OpenJob, job: Job) -> None:
        """Say why a job waits: cold starts take minutes, and look like a fault."""
        for look in itertools.count():
            await asyncio.sleep(self.endpoint.timings.queue_look)
            with contextlib.suppress(EndpointError):
                place = await self.endpoint.describe_queue()
                is_new, opened.place = place != opened.place, place
                if is_new or look % _LOOKS_PER_LINE == 0:
                    log.info("job %s: %s", job.id, opened.describe())

    def _learn(self, answer: Mapping[str, Any]) -> None:
        """Keep the lists that an answer brings, and notice that they are others than ours."""
        models = answer.get("models")
        if isinstance(models, dict):
            snapshot = Snapshot(models)
            if snapshot.checkpoints:
                self._snapshot, self._is_stale = snapshot, False
                self._snapshots.save(self.endpoint.url, snapshot)
                log.info("the endpoint's lists are renewed: %s", snapshot.fingerprint)
            return
        worker = answer.get("worker")
        fingerprint = worker.get("lists") if isinstance(worker, dict) else None
        if fingerprint and fingerprint != self._snapshot.fingerprint:
            self._is_stale = True

    def _is_about_an_old_name(self, error: EndpointError, given: Input) -> bool:
        """Whether what the worker refused is a name of this snapshot. Then the snapshot is old."""
        if error.code not in _ABOUT_NAMES or self._snapshot.is_default:
            return False
        if error.complaints:
            paths = (str(complaint.get("path", "")) for complaint in error.complaints)
            fields = {path.partition(".")[0].partition("[")[0] for path in paths}
            named = {text for name in fields for text in named_in(given.get(name))}
        else:
            named = {name.casefold() for name in _QUOTED.findall(error.message)}
        return bool(named & self._snapshot.names)

    async def _with_pictures(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The answer with its pictures in the place of links into a bucket."""
        worker = answer.get("worker")
        delivery = worker.get("delivery") if isinstance(worker, dict) else None
        urls = delivery.get("urls") if isinstance(delivery, dict) else None
        if not urls or answer.get("images"):
            return answer
        pictures = await asyncio.gather(*(self.endpoint.fetch(str(url)) for url in urls))
        return {**answer, "images": [base64.b64encode(picture).decode() for picture in pictures]}

"""The routes of the gateway's own page: jobs that go on while the page is closed, and what the menus show.

POST   /page/jobs       {"input": …}, a worker's job: its id here, at once
GET    /page/jobs       all jobs, the oldest first, with the progress of those that are open
GET    /page/jobs/ID    one job whole: its input, and its answer or error
DELETE /page/jobs/ID    an open job is cancelled, an ended one is forgotten
GET    /page/models     the lists for the menus, from the snapshot

A page asks again and again, rather than keeping a connection open for each job: a browser opens only six to one server,
and a telephone that sleeps closes them. A user sees the jobs of that user alone.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from a1111_client.errors import EndpointError
from a1111_client.gateway import bodies
from a1111_client.gateway.errors import ApiError, InvalidFields, Refused
from a1111_client.gateway.jobs import Client, OpenJob
from a1111_client.gateway.requests import Gateway, read_body
from a1111_client.gateway.runner import Interrupted
from a1111_client.gateway.sizes import body_size

log = logging.getLogger(__name__)

_TASKS = ("txt2img", "img2img", "upscale")
_MOST_KEPT = 256_000_000
"""Bytes of all ended jobs. The oldest are forgotten first."""


@dataclass
class PageJob:
    """A job of the page. `state` is open, done, failed or cancelled."""

    opened: OpenJob
    given: dict[str, Any]
    id: str = field(default_factory=lambda: secrets.token_urlsafe(9))
    state: str = "open"
    answer: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    size: int = 0  # bytes of what is kept, once it has ended

    def summary(self) -> dict[str, Any]:
        """What the page needs to show it in the queue."""
        shown = {"id": self.id, "task": self.opened.name, "prompt": self.given.get("prompt", ""), "state": self.state}
        if self.state != "open":
            return shown
        told = self.opened.progress(with_picture=True)
        return {
            **shown,
            "progress": told["progress"],
            "eta_s": told["eta_relative"],
            "text": told["textinfo"],
            "preview": told["current_image"],
        }


class PageJobs:
    """The jobs that the page has sent, and their results."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._jobs: dict[str, PageJob] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def router(self) -> APIRouter:
        """The routes. Each proves who asks."""

        async def prove(request: Request) -> None:
            self._gateway.client_of(request)

        routes: list[tuple[str, str, Callable[..., Awaitable[Response]]]] = [
            ("POST", "/jobs", self._send),
            ("GET", "/jobs", self._list),
            ("GET", "/jobs/{job_id}", self._show),
            ("DELETE", "/jobs/{job_id}", self._delete),
            ("GET", "/models", self._models),
        ]
        router = APIRouter(prefix="/page", dependencies=[Depends(prove)], include_in_schema=False)
        for method, path, handler in routes:
            router.add_api_route(path, handler, methods=[method], response_model=None)
        return router

    async def close(self) -> None:
        """Cancel what is open, so that RunPod is told before the gateway ends."""
        for job in self._jobs.values():
            job.opened.interrupted.set()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _send(self, request: Request) -> Response:
        client = self._gateway.client_of(request)
        body = bodies.parse_json(await read_body(request), request.headers.get("content-type", ""))
        given = body.get("input") if isinstance(body, dict) else None
        if not isinstance(given, dict):
            raise InvalidFields([(("body", "input"), "value is not a valid dict", "type_error.dict")])
        task = given.get("task", "txt2img")
        if task not in _TASKS:
            raise Refused(422, f"task: must be one of {', '.join(_TASKS)}")
        job = PageJob(OpenJob(client, task, _count(given, "n_iter"), _count(given, "steps")), given)
        self._jobs[job.id] = job
        working = asyncio.ensure_future(self._run(job))
        self._tasks.add(working)
        working.add_done_callback(self._tasks.discard)
        return JSONResponse({"id": job.id})

    async def _list(self, request: Request) -> Response:
        client = self._gateway.client_of(request)
        return JSONResponse([job.summary() for job in self._jobs.values() if _is_of(job, client)])

    async def _show(self, request: Request, job_id: str) -> Response:
        job = self._find(request, job_id)
        return JSONResponse(
            {
                **job.summary(),
                "input": job.given,
                "answer": job.answer,
                "error": job.error,
                "gpu_seconds": job.opened.state.gpu_seconds,
            }
        )

    async def _delete(self, request: Request, job_id: str) -> Response:
        job = self._find(request, job_id)
        if job.state == "open":
            job.opened.interrupted.set()
        else:
            del self._jobs[job.id]
        return JSONResponse({})

    async def _models(self, request: Request) -> Response:
        snapshot = self._gateway.runner.snapshot
        return JSONResponse(
            {
                "endpoint": self._gateway.runner.endpoint.url,
                "is_default": snapshot.is_default,
                "checkpoints": [checkpoint.name for checkpoint in snapshot.checkpoints],
                "catalog": snapshot.catalog,
                "cached": snapshot.cached("loras"),
                "limits": snapshot.models.get("limits", {}),
                **{name: [entry["name"] for entry in snapshot.webui(name)] for name in ("samplers", "upscalers")},
                "schedulers": [entry["label"] for entry in snapshot.webui("schedulers")],
            }
        )

    def _find(self, request: Request, job_id: str) -> PageJob:
        """The job of this user by its id. Raises Refused."""
        job = self._jobs.get(job_id)
        if job is None or not _is_of(job, self._gateway.client_of(request)):
            raise Refused(404, "there is no such job, or no longer")
        return job

    async def _run(self, job: PageJob) -> None:
        """Have the job done, and keep what became of it."""
        opened = job.opened
        with self._gateway.jobs.open(opened):
            work = self._gateway.runner.run(opened, lambda _snapshot: job.given)
            try:
                answer = await self._gateway.run(opened, work)
                job.answer = {name: answer[name] for name in ("images", "info", "worker") if name in answer}
                job.state = "done"
            except Interrupted:
                job.state = "cancelled"
            except EndpointError as error:
                job.state, job.error = "failed", error.as_json()
            except ApiError as error:
                job.state, job.error = "failed", {"message": str(error.body.get("detail"))}
            except Exception:
                log.exception("job %s of the page failed because of a bug in the gateway", job.id)
                job.state, job.error = "failed", {"message": "the gateway failed; its log says why"}
        job.size = body_size([job.given, job.answer])
        for old in too_many(self._jobs.values(), _MOST_KEPT):
            del self._jobs[old.id]


def too_many(jobs: Iterable[PageJob], limit: int) -> list[PageJob]:
    """The oldest ended jobs, without which the others are at most `limit` bytes. The newest one always stays."""
    ended = [job for job in jobs if job.state != "open"]
    size = sum(job.size for job in ended)
    found: list[PageJob] = []
    for job in ended[:-1]:
        if size <= limit:
            break
        found.append(job)
        size -= job.size
    return found


def _is_of(job: PageJob, client: Client) -> bool:
    """Whether the job is this user's. Without users, everybody is the same one, at a desk and at a telephone."""
    return job.opened.client.proven == client.proven


def _count(given: Mapping[str, Any], name: str) -> int:
    value = given.get(name)
    return value if isinstance(value, int) and value > 0 else 1

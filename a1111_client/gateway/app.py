"""A1111's API on one port, in front of an endpoint.

POST txt2img, img2img, extra-single-image, extra-batch-images     a job; everything else is answered here, at once
POST png-info                                                     the picture's own text
GET  progress; POST interrupt, skip                               the oldest open job of the client that asks
GET  options and lists                                            the snapshot; POST options: the store
POST refresh-*, unload-checkpoint, reload-checkpoint              nothing; a refresh renews the snapshot with a job
POST interrogate, train/…, create/…, server-…                     refused, in A1111's form
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware

from a1111_client import __version__
from a1111_client.errors import EndpointError
from a1111_client.gateway import bodies, lists
from a1111_client.gateway.errors import ApiError, Failed, Refused, from_job
from a1111_client.gateway.guard import Access, Guard
from a1111_client.gateway.openai import ImagesApi
from a1111_client.gateway.page_jobs import PageJobs
from a1111_client.gateway.requests import Gateway, Handler
from a1111_client.gateway.runner import Runner

PAGE = resources.files(__package__) / "page"


def create_app(runner: Runner, access: Access) -> FastAPI:
    """The gateway as an ASGI application. It closes the runner's endpoint when it ends."""
    gateway = Gateway(runner, access)
    page_jobs = PageJobs(gateway)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await page_jobs.close()
        await gateway.close()
        await runner.endpoint.close()

    # FastAPI's own /docs loads scripts from another host.
    app = FastAPIOffline(
        redoc_url=None, title="A1111's API in front of an endpoint", version=__version__, lifespan=lifespan
    )
    app.state.gateway = gateway
    app.include_router(_sdapi(gateway))
    app.include_router(ImagesApi(gateway).router())
    app.include_router(page_jobs.router())
    _add_page(app)
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(EndpointError, _answer_error)
    app.add_exception_handler(Exception, _answer_bug)
    if access.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(access.origins),
            allow_methods=["*"],
            allow_headers=["*"],
            allow_credentials=True,
            allow_private_network=True,  # Chrome asks before a page of the internet may call this machine
        )
    app.add_middleware(Guard, access=access)  # the last one added is the outermost
    return app


def _sdapi(gateway: Gateway) -> APIRouter:
    """The routes of A1111's own document."""

    async def prove(request: Request) -> None:
        gateway.client_of(request)

    router = APIRouter(prefix="/sdapi/v1", dependencies=[Depends(prove)], tags=["A1111"])

    def add(method: str, path: str, handler: Handler, **more: Any) -> None:
        router.add_api_route(f"/{path}", handler, methods=[method], name=path, response_model=None, **more)

    for name in ("txt2img", "img2img"):
        add("POST", name, gateway.generate(name), openapi_extra=_body(name))
    for name in ("extra-single-image", "extra-batch-images"):
        add("POST", name, gateway.upscale(name), openapi_extra=_body(name))
    add("POST", "png-info", gateway.png_info, openapi_extra=_body("png-info"))
    add("GET", "progress", gateway.progress)
    add("POST", "interrupt", gateway.interrupt)
    add("POST", "skip", _answer(None))
    add("GET", "options", gateway.get_options)
    add("POST", "options", gateway.post_options)
    for name, make in lists.LISTS.items():
        add("GET", name, _list(gateway.runner, make))
    for name in ("refresh-checkpoints", "refresh-vae", "refresh-loras", "refresh-embeddings"):
        add("POST", name, gateway.refresh)
    for name in ("unload-checkpoint", "reload-checkpoint"):
        add("POST", name, _answer({}))
    for name, reason in _REFUSED.items():
        add("POST", name, _refuse(f"{name}: {reason}"))
    return router


_TRAINING = "an endpoint trains nothing and keeps nothing"
_SERVER = "RunPod starts and stops the workers"
_REFUSED = {
    "interrogate": "no worker has a model that describes pictures",
    "create/embedding": _TRAINING,
    "create/hypernetwork": _TRAINING,
    "train/embedding": _TRAINING,
    "train/hypernetwork": _TRAINING,
    "server-kill": _SERVER,
    "server-restart": _SERVER,
    "server-stop": _SERVER,
}


def _add_page(app: FastAPI) -> None:
    """What needs no secret: the page's files, and what clients look for at A1111's root."""
    folder = Path(str(PAGE))

    async def queue_status(request: Request) -> Response:
        """Gradio's route, by which a plugin for Krita finds out whether A1111 is there."""
        return JSONResponse({"msg": "estimation", "queue_size": 0})

    async def index(request: Request) -> Response:
        return FileResponse(folder / "index.html", headers={**_NOT_CACHED, "Content-Security-Policy": _POLICY})

    app.add_api_route("/queue/status", queue_status, response_model=None, include_in_schema=False)
    app.add_api_route("/", index, methods=["GET", "HEAD"], response_model=None, include_in_schema=False)
    app.mount("/page", _PageFiles(directory=folder))


_NOT_CACHED = {"Cache-Control": "no-cache"}  # a browser asks each time whether a file is a new one
# The page asks nobody but this gateway, and no other page may show it in a frame, where a click could spend money.
_POLICY = "default-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


class _PageFiles(StaticFiles):
    def file_response(self, *arguments: Any, **more: Any) -> Response:
        response = super().file_response(*arguments, **more)
        response.headers.update(_NOT_CACHED)
        return response


def _answer(value: Any) -> Handler:
    async def handle(request: Request) -> Response:
        return JSONResponse(value)

    return handle


def _refuse(reason: str) -> Handler:
    async def handle(request: Request) -> Response:
        raise Refused(501, reason)

    return handle


def _list(runner: Runner, make: Callable[[Any], Any]) -> Handler:
    async def handle(request: Request) -> Response:
        return JSONResponse(make(runner.snapshot))

    return handle


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, EndpointError):
        error = from_job(error)
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, status_code=error.status)


async def _answer_bug(request: Request, error: Exception) -> Response:
    reason = "the gateway failed; its log says why"
    return JSONResponse(Failed(500, type(error).__name__, reason, reason).body, status_code=500)


_JSON_TYPES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "list": "array",
    "dict": "object",
}


def _body(path: str) -> dict[str, Any]:
    """The schema of a body, for the OpenAPI page."""
    schema = _schema(bodies.fields(path))
    return {"requestBody": {"content": {"application/json": {"schema": schema}}, "required": True}}


def _schema(table: Mapping[str, Any]) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for name, field in table.items():
        properties[name] = {"type": _JSON_TYPES[field["type"]]}
        items = field.get("items")
        if isinstance(items, dict):
            properties[name]["items"] = _schema(items)
        elif field["type"] == "list":
            properties[name]["items"] = {"type": _JSON_TYPES[items]} if items else {}
        if "default" in field:
            properties[name]["default"] = field["default"]
    return {"type": "object", "properties": properties}

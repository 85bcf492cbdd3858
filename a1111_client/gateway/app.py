"""A1111's API on one port, in front of an endpoint.

POST txt2img, img2img, extra-single-image, extra-batch-images     a job; everything else is answered here, at once
POST png-info                                                     the picture's own text
GET  progress; POST interrupt, skip                               the oldest open job of the client that asks
GET  options and lists                                            the snapshot; POST options: the store
POST refresh-*, unload-checkpoint, reload-checkpoint              nothing; a refresh renews the snapshot with a job
POST interrogate, train/…, create/…, server-…                     refused, in A1111's form
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.middleware.cors import CORSMiddleware

from a1111_client import __version__
from a1111_client.errors import EndpointError
from a1111_client.gateway import bodies, lists
from a1111_client.gateway.errors import ApiError, Failed, InvalidFields, Refused, from_job
from a1111_client.gateway.guard import Access, Guard
from a1111_client.gateway.jobs import Client, OpenJob, OpenJobs, idle_progress
from a1111_client.gateway.runner import Interrupted, Runner
from a1111_client.gateway.sizes import decode
from a1111_client.gateway.translate import generation_input, upscale_input
from a1111_client.infotext import NotAPicture, parse_infotext, read_infotext

log = logging.getLogger(__name__)

MAX_REQUEST = 128 * 1024 * 1024
"""Bytes of a request's body. RunPod takes a twelfth of it: pictures in it are made smaller."""

PAGE = resources.files(__package__) / "page"

Handler = Callable[[Request], Awaitable[Response]]


class Gateway:
    """The parts behind the routes: the runner of one endpoint, the open jobs, and who may ask."""

    def __init__(self, runner: Runner, access: Access) -> None:
        self.runner = runner
        self.access = access
        self.jobs = OpenJobs()
        self._left: set[asyncio.Task[Any]] = set()

    def client_of(self, request: Request, *, bearer: bool = False) -> Client:
        """Who asks. Raises Refused if a secret is asked for and not given."""
        headers = request.headers
        proven = self.access.prove(headers.get("authorization", ""), bearer=bearer)
        address = request.client.host if request.client else ""
        return Client(proven, address, headers.get("user-agent", ""))

    async def run(self, request: Request, opened: OpenJob, work: Awaitable[dict[str, Any]]) -> dict[str, Any]:
        """What the work returns. An interrupt ends it, and a client that hangs up. Raises Interrupted, ApiError."""
        working = asyncio.ensure_future(work)
        interrupted = asyncio.ensure_future(opened.interrupted.wait())
        gone = asyncio.ensure_future(_until_gone(request))
        try:
            await asyncio.wait([working, interrupted, gone], return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            reason = "it was interrupted" if interrupted.done() else "its client hung up"
            log.info("%s ends after %s: %s", opened.name, opened.waited(), reason)
            raise Interrupted
        except EndpointError as error:
            log.warning("%s failed: %s", opened.name, error)
            raise from_job(error) from None
        finally:
            interrupted.cancel()
            gone.cancel()
            if not working.done():
                working.cancel()  # which cancels the job at RunPod; nobody waits for that
                self._left.add(working)
                working.add_done_callback(self._left.discard)

    def generate(self, name: str) -> Handler:
        """The route of txt2img or img2img."""

        async def handle(request: Request) -> Response:
            client = self.client_of(request)
            given = bodies.read(name, await _json(request))
            images = (given.get("batch_size") or 1) * (given.get("n_iter") or 1)
            opened = OpenJob(client, name, images, given.get("steps") or 50)
            with self.jobs.open(opened):
                work = self.runner.run(
                    opened, lambda snapshot: generation_input(name, given, snapshot, self.runner.options)
                )
                try:
                    answer = await self.run(request, opened, work)
                except Interrupted:
                    answer = {"images": [], "info": json.dumps(_empty_info(name, given))}
            shown = {
                "images": answer.get("images", []),
                "parameters": _parameters(name, given),
                "info": answer.get("info", "{}"),
            }
            if "worker" in request.query_params and "worker" in answer:
                shown["worker"] = answer["worker"]
            return JSONResponse(shown)

        return handle

    def upscale(self, name: str) -> Handler:
        """The route of extra-single-image or extra-batch-images."""

        async def handle(request: Request) -> Response:
            client = self.client_of(request)
            given = bodies.read(name, await _json(request))
            with self.jobs.open(OpenJob(client, "upscale")) as opened:
                work = self.runner.run(opened, lambda _snapshot: upscale_input(given))
                try:
                    answer = await self.run(request, opened, work)
                except Interrupted:
                    answer = {}
            images, html_info = answer.get("images", []), answer.get("html_info", "<p></p>")
            if name == "extra-single-image":
                return JSONResponse({"html_info": html_info, "image": images[0] if images else ""})
            return JSONResponse({"html_info": html_info, "images": images})

        return handle

    async def png_info(self, request: Request) -> Response:
        given = bodies.read("png-info", await _json(request))
        image = str(given["image"])
        if image.startswith(("http://", "https://")):
            raise Failed(500, "HTTPException", "Request to local resource not allowed", "")
        try:
            infotext, items = await asyncio.to_thread(lambda: read_infotext(decode(image)))
        except (NotAPicture, ValueError):
            raise Failed(500, "HTTPException", "Invalid encoded image", "") from None
        return JSONResponse({"info": infotext, "items": items, "parameters": parse_infotext(infotext)})

    async def progress(self, request: Request) -> Response:
        skip = request.query_params.get("skip_current_image", "").lower() in ("true", "1", "yes", "on")
        job = self.jobs.oldest_of(self.client_of(request))
        return JSONResponse(job.progress(with_picture=not skip) if job else idle_progress())

    async def interrupt(self, request: Request) -> Response:
        job = self.jobs.oldest_of(self.client_of(request))
        if job:
            job.interrupted.set()
        return JSONResponse({})

    async def get_options(self, request: Request) -> Response:
        return JSONResponse(self.runner.options.show(self.runner.snapshot))

    async def post_options(self, request: Request) -> Response:
        body = await _json(request)
        if not isinstance(body, dict):
            raise InvalidFields([(("body",), "value is not a valid dict", "type_error.dict")])
        self.runner.options.post(body, self.runner.snapshot)
        return JSONResponse(None)

    async def refresh(self, request: Request) -> Response:
        self.runner.mark_stale()
        return JSONResponse(None)


def create_app(runner: Runner, access: Access) -> FastAPI:
    """The gateway as an ASGI application. It closes the runner's endpoint when it ends."""
    gateway = Gateway(runner, access)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await runner.endpoint.close()

    app = FastAPI(title="A1111's API in front of an endpoint", version=__version__, lifespan=lifespan)
    app.state.gateway = gateway
    app.include_router(_sdapi(gateway))
    _add_page(app)
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(Exception, _answer_bug)
    if access.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(access.origins),
            allow_methods=["*"],
            allow_headers=["*"],
            allow_credentials=True,
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
        return FileResponse(folder / "index.html", headers={"Cache-Control": "no-cache"})

    app.add_api_route("/queue/status", queue_status, response_model=None, include_in_schema=False)
    app.add_api_route("/", index, methods=["GET", "HEAD"], response_model=None, include_in_schema=False)
    app.mount("/page", StaticFiles(directory=folder))


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
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, status_code=error.status)


async def _answer_bug(request: Request, error: Exception) -> Response:
    reason = "the gateway failed; its log tells why"
    return JSONResponse(Failed(500, type(error).__name__, reason, reason).body, status_code=500)


async def _json(request: Request) -> Any:
    """The JSON of a request. Raises InvalidFields, Refused."""
    return bodies.parse_json(await read_body(request), request.headers.get("content-type", ""))


async def read_body(request: Request) -> bytes:
    """The body of a request. Raises Refused if it is too large."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_REQUEST:
            raise Refused(413, f"the request is larger than {MAX_REQUEST // 1_000_000} MB")
    return bytes(body)


async def _until_gone(request: Request) -> None:
    """Return when the client has closed the connection. Only after the whole body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _parameters(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What A1111 echoes: the fields as they were asked for, without pictures unless the client wants those too."""
    parameters = bodies.with_defaults(name, given)
    parameters["save_images"] = False  # true: clients take the first picture for a grid
    if name == "img2img" and not given.get("include_init_images"):
        parameters |= {"init_images": None, "mask": None}
    return parameters


def _empty_info(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """`info` of an answer without pictures."""
    asked = bodies.with_defaults(name, given)
    return {
        **{key: asked[key] for key in ("prompt", "negative_prompt", "seed", "subseed", "subseed_strength")},
        **{key: asked[key] for key in ("width", "height", "cfg_scale", "steps", "batch_size", "denoising_strength")},
        "sampler_name": asked["sampler_name"] or asked["sampler_index"],
        **{
            key: []
            for key in ("all_prompts", "all_negative_prompts", "all_seeds", "all_subseeds", "infotexts", "styles")
        },
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
    }


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
    properties: dict[str, Any] = {}
    for name, field in bodies.fields(path).items():
        properties[name] = {"type": _JSON_TYPES[field["type"]]}
        if field["type"] == "list":
            properties[name]["items"] = {"type": _JSON_TYPES[field["items"]]} if "items" in field else {}
        if "default" in field:
            properties[name]["default"] = field["default"]
    schema = {"type": "object", "properties": properties}
    return {"requestBody": {"content": {"application/json": {"schema": schema}}, "required": True}}

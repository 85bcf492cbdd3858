"""What a gateway does with a request: it proves who asks, reads the body, and draws, shows or refuses."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from a1111_client.errors import EndpointError
from a1111_client.gateway import bodies
from a1111_client.gateway.errors import InvalidFields, Refused
from a1111_client.gateway.guard import Access
from a1111_client.gateway.jobs import Client, OpenJob, OpenJobs, idle_progress
from a1111_client.gateway.runner import Interrupted, Runner
from a1111_client.gateway.sizes import decode
from a1111_client.gateway.translate import Input, changes_pictures, generation_input, upscale_input
from a1111_client.infotext import open_picture, parse_infotext, read_infotext
from a1111_client.snapshot import Snapshot

log = logging.getLogger(__name__)

MAX_REQUEST = 128 * 1024 * 1024
"""Bytes of a request's body. RunPod takes a twelfth of it: pictures in it are made smaller."""

_MOST_WATCHERS = 1000
_ONE_WISH = 2.0
"""Seconds after a connection was closed in which an interrupt of the same client means that connection's job."""

Handler = Callable[[Request], Awaitable[Response]]


class Gateway:
    """The parts behind the routes: the runner of one endpoint, the open jobs, and who may ask."""

    def __init__(self, runner: Runner, access: Access) -> None:
        self.runner = runner
        self.access = access
        self.jobs = OpenJobs()
        self._left: set[asyncio.Task[Any]] = set()
        self._hung_up: dict[Client, float] = {}  # when
        self._watchers: set[Client] = set()  # who asks for progress with a picture: their jobs make previews

    def client_of(self, request: Request, *, bearer: bool = False) -> Client:
        """Who asks. Raises Refused if a secret is asked for and not given."""
        headers = request.headers
        proven = self.access.prove(headers.get("authorization", ""), bearer=bearer)
        address = request.client.host if request.client else ""
        return Client(proven, address, headers.get("user-agent", ""))

    async def close(self) -> None:
        """Wait for the work that was left: it tells RunPod that its jobs are cancelled."""
        if self._left:
            await asyncio.wait(self._left)

    async def run(
        self, opened: OpenJob, work: Awaitable[dict[str, Any]], request: Request | None = None
    ) -> dict[str, Any]:
        """What the work returns. An interrupt ends it, and the client of the request, if there is one, that hangs up.

        Raises EndpointError, ApiError, Interrupted.
        """
        working = asyncio.ensure_future(work)
        ends: list[asyncio.Future[Any]] = [asyncio.ensure_future(opened.interrupted.wait())]
        if request is not None:
            ends.append(asyncio.ensure_future(_until_gone(request)))
        try:
            await asyncio.wait([working, *ends], return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            if not opened.interrupted.is_set():
                self._hung_up[opened.client] = time.monotonic()
            reason = "it was interrupted" if opened.interrupted.is_set() else "its client hung up"
            log.info("%s ends after %s: %s", opened.name, opened.waited(), reason)
            raise Interrupted
        except EndpointError as error:
            log.warning("%s failed: %s", opened.name, error)
            raise
        finally:
            for end in ends:
                end.cancel()
            if not working.done():
                working.cancel()  # which cancels the job at RunPod; nobody waits for that
                self._left.add(working)
                working.add_done_callback(self._left.discard)

    def generate(self, name: str) -> Handler:
        """The route of txt2img or img2img."""

        async def handle(request: Request) -> Response:
            client = self.client_of(request)
            given = bodies.read(name, await _json(request))
            await _check_pictures([*(given.get("init_images") or ()), *([given["mask"]] if given.get("mask") else ())])
            images = (given.get("batch_size") or 1) * (given.get("n_iter") or 1)
            opened = OpenJob(client, name, images, given.get("steps") or 50)
            with self.jobs.open(opened):
                watches = client in self._watchers

                def make_input(snapshot: Snapshot) -> Input:
                    made = generation_input(name, given, snapshot, self.runner.options)
                    return {**made, "preview": True} if watches else made

                work = self.runner.run(opened, make_input)
                try:
                    answer = await self.run(opened, work, request)
                except Interrupted:
                    answer = {"images": [], "info": json.dumps(_empty_info(name, given))}
            shown = {
                "images": [] if given.get("send_images") is False else answer.get("images", []),
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
            is_single = name == "extra-single-image"
            pictures = [given.get("image", "")] if is_single else [entry["data"] for entry in given["imageList"]]
            await _check_pictures(pictures)
            if not changes_pictures(given) and not any(map(_is_link, pictures)):
                answer: dict[str, Any] = {"images": [picture.rpartition(",")[2] for picture in pictures]}
            else:
                answer = await self._upscale(request, OpenJob(client, "upscale"), given)
            images, html_info = answer.get("images", []), answer.get("html_info", "<p></p>")
            if is_single:
                return JSONResponse({"html_info": html_info, "image": images[0] if images else ""})
            return JSONResponse({"html_info": html_info, "images": images})

        return handle

    async def _upscale(self, request: Request, opened: OpenJob, given: Mapping[str, Any]) -> dict[str, Any]:
        with self.jobs.open(opened):
            work = self.runner.run(opened, lambda _snapshot: upscale_input(given))
            try:
                return await self.run(opened, work, request)
            except Interrupted:
                return {}

    async def png_info(self, request: Request) -> Response:
        given = bodies.read("png-info", await _json(request))
        image = given["image"]
        if _is_link(image):
            raise Refused(500, "Request to local resource not allowed")
        try:
            infotext, items = await asyncio.to_thread(lambda: read_infotext(decode(image)))
        except ValueError:
            raise Refused(500, _NO_PICTURE) from None
        return JSONResponse({"info": infotext, "items": items, "parameters": parse_infotext(infotext)})

    async def progress(self, request: Request) -> Response:
        skip = request.query_params.get("skip_current_image", "").lower() in ("true", "1", "yes", "on")
        client = self.client_of(request)
        if not skip and len(self._watchers) < _MOST_WATCHERS:
            self._watchers.add(client)
        job = self.jobs.oldest_of(client)
        return JSONResponse(job.progress(with_picture=not skip) if job else idle_progress())

    async def interrupt(self, request: Request) -> Response:
        client = self.client_of(request)
        job = self.jobs.oldest_of(client)
        # SillyTavern closes the connection and interrupts, at the same moment: that is one job, not two.
        if job and time.monotonic() - self._hung_up.pop(client, -_ONE_WISH) >= _ONE_WISH:
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


async def _json(request: Request) -> Any:
    """The JSON of a request. Raises InvalidFields, Refused."""
    return bodies.parse_json(await read_body(request), request.headers.get("content-type", ""))


_NO_PICTURE = "Invalid encoded image"  # A1111's words


async def _check_pictures(pictures: Sequence[Any]) -> None:
    """Raise Refused, as A1111 does, if one is no picture: no worker starts for it. Links are left to the worker."""

    def check() -> None:
        for picture in pictures:
            if not _is_link(str(picture)):
                open_picture(decode(str(picture)))

    try:
        await asyncio.to_thread(check)
    except ValueError:
        raise Refused(500, _NO_PICTURE) from None


def _is_link(picture: str) -> bool:
    return picture.startswith(("http://", "https://"))


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

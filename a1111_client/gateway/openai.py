"""OpenAI's Images API at the same port: /v1/images/generations, /v1/images/edits, /v1/models.

A body may have A1111's fields beside OpenAI's (`seed`, `negative_prompt`, `steps`, `sampler_name`, …) and `loras`, as
the worker takes them. What it leaves out is the worker's own default, not A1111's: 1024 x 1024, 25 steps.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image, ImageOps
from starlette.datastructures import FormData, UploadFile

from a1111_client.errors import EndpointError
from a1111_client.gateway import bodies
from a1111_client.gateway.errors import ApiError, from_job
from a1111_client.gateway.jobs import OpenJob
from a1111_client.gateway.requests import Gateway, read_body
from a1111_client.gateway.runner import Interrupted
from a1111_client.gateway.translate import Input, generation_input
from a1111_client.infotext import NotAPicture, open_picture
from a1111_client.snapshot import Snapshot

log = logging.getLogger(__name__)

MAX_IMAGES = 10
_SIZE = re.compile(r"(\d{2,5})x(\d{2,5})")
_FORMATS = ("png", "jpeg", "webp")
_MOST_PIXELS = 1024 * 1024  # of an edited picture, if the body names no size
# What programs ask for that know OpenAI alone: the endpoint's own checkpoint.
_OPENAIS_MODELS = re.compile(r"dall-e-\d|(chatgpt|gpt)-image.*")
_DEFAULTS = {"steps": 25, "cfg_scale": 7.0, "width": 1024, "height": 1024, "sampler_name": "DPM++ 2M Karras"}
_NO_TOKENS = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
_TICK = 0.5  # seconds between two looks for a preview; a comment goes out at each, so that a dropped line is noticed


class OpenAIError(Exception):
    """An error in OpenAI's form. `code` is the worker's, or one of a1111_client.errors."""

    def __init__(self, status: int, message: str, *, code: str = "INVALID_REQUEST", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> Response:
        # The openai package sends a job three times if it fails with 500 and nobody says this.
        return JSONResponse(self.body, status_code=self.status, headers={"x-should-retry": "false"})


def _from_endpoint(error: EndpointError) -> OpenAIError:
    sentence = f"{error.message} ({error.hint})" if error.hint else error.message
    status = from_job(error).status
    param = next((str(complaint["path"]) for complaint in error.complaints if complaint.get("path")), None)
    return OpenAIError(400 if status == 422 else status, sentence, code=error.code, param=param)


def _from_api(error: ApiError) -> OpenAIError:
    detail = error.body.get("detail")
    if isinstance(detail, list):
        told = "; ".join(f"{problem['loc'][-1]}: {problem['msg']}" for problem in detail)
        return OpenAIError(400, told, param=str(detail[0]["loc"][-1]))
    code = {401: "invalid_api_key", 404: "MODEL_NOT_FOUND", 413: "REQUEST_TOO_LARGE"}.get(
        error.status, "INVALID_REQUEST"
    )
    return OpenAIError(400 if error.status == 422 else error.status, str(detail), code=code)


class Pictures:
    """Pictures behind links, for a while. A link cannot be guessed, and is the only way to its picture."""

    def __init__(self, *, seconds: float = 3600.0, limit: int = 256_000_000) -> None:
        self._seconds = seconds
        self._limit = limit  # bytes of all pictures
        self._kept: OrderedDict[str, tuple[float, bytes]] = OrderedDict()

    def keep(self, picture: bytes, kind: str) -> str:
        """The picture's name."""
        name = f"{secrets.token_urlsafe(24)}.{kind}"
        self._kept[name] = time.monotonic(), picture
        self._drop_old()
        return name

    def find(self, name: str) -> bytes | None:
        self._drop_old()
        found = self._kept.get(name)
        return found[1] if found else None

    def _drop_old(self) -> None:
        size = sum(len(picture) for _, picture in self._kept.values())
        while self._kept:
            kept, picture = next(iter(self._kept.values()))
            if time.monotonic() - kept < self._seconds and size <= self._limit:
                return
            self._kept.popitem(last=False)
            size -= len(picture)


class Order:
    """What a body of OpenAI's API asks for. Raises OpenAIError for what it cannot mean."""

    def __init__(self, body: Mapping[str, Any], snapshot: Snapshot) -> None:
        prompt = body.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise OpenAIError(400, "prompt: must be a text that is not blank", param="prompt")
        self.count = _number(body, "n", 1, MAX_IMAGES) or 1
        self.format = _one_of(body, "output_format", _FORMATS) or "png"
        self.response_format = _one_of(body, "response_format", ("b64_json", "url"))
        self.streams = body.get("stream") in (True, "true")
        self.previews = _number(body, "partial_images", 0, 3) or 0
        self.size = _size(body.get("size"))
        self.checkpoint = _checkpoint(body.get("model"), snapshot)
        self.compression = _number(body, "output_compression", 1, 100)
        self._body = body

    def input(self, path: str, given: Mapping[str, Any], gateway: Gateway, snapshot: Snapshot) -> Input:
        """The job's input. `given` are A1111's fields that the route itself adds. Raises ApiError."""
        fields = {**_DEFAULTS, **bodies.read(path, {**self._body, **given}), "n_iter": self.count}
        if self.size:
            fields["width"], fields["height"] = self.size
        made = generation_input(path, fields, snapshot, gateway.runner.options)
        if self.checkpoint:
            made["checkpoint"] = self.checkpoint
        if isinstance(self._body.get("loras"), list):
            made["loras"] = self._body["loras"]
        if self.format != "png":
            quality = {"quality": self.compression} if self.compression else {}
            made["output"] = {"format": self.format, **quality}
        if self.streams and self.previews:
            made["preview"] = True
        return made


def _number(body: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    value = body.get(name)
    if value in (None, "", "auto"):
        return None
    try:
        number = int(value)  # forms have text
    except (TypeError, ValueError):
        number = least - 1
    if not least <= number <= most:
        raise OpenAIError(400, f"{name}: must be a whole number from {least} to {most}", param=name)
    return number


def _one_of(body: Mapping[str, Any], name: str, choices: Iterable[str]) -> str | None:
    value = body.get(name)
    if value in (None, "", "auto"):
        return None
    if value not in choices:
        raise OpenAIError(400, f"{name}: must be one of {', '.join(choices)}", param=name)
    return str(value)


def _size(value: Any) -> tuple[int, int] | None:
    if value in (None, "", "auto"):
        return None
    found = _SIZE.fullmatch(str(value))
    if found is None:
        raise OpenAIError(400, 'size: must be like "1024x1024", or "auto"', param="size")
    return int(found[1]), int(found[2])


def _checkpoint(value: Any, snapshot: Snapshot) -> str:
    """The name of the checkpoint that a model stands for; "" for the endpoint's own."""
    if not value or _OPENAIS_MODELS.fullmatch(str(value)):
        return ""
    found = snapshot.find_checkpoint(str(value))
    if found is not None:
        return "" if found == snapshot.default_checkpoint else found.name
    there = ", ".join(checkpoint.stem for checkpoint in snapshot.checkpoints[:8])
    raise OpenAIError(
        404, f"there is no model {str(value)[:200]!r}; there is {there}", code="MODEL_NOT_FOUND", param="model"
    )


class ImagesApi:
    """The routes. Each proves who asks, reads the order, and has the gateway draw it."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._pictures = Pictures()

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1", tags=["OpenAI"])
        for method, path, handler in (
            ("POST", "/images/generations", self.generations),
            ("POST", "/images/edits", self.edits),
            ("GET", "/models", self.models),
            ("GET", "/models/{name:path}", self.model),
        ):
            router.add_api_route(path, handler, methods=[method], response_model=None)
        router.add_api_route("/images/files/{name}", self.file, response_model=None, include_in_schema=False)
        return router

    async def generations(self, request: Request) -> Response:
        return await self._answer(request, "txt2img")

    async def edits(self, request: Request) -> Response:
        return await self._answer(request, "img2img")

    async def models(self, request: Request) -> Response:
        try:
            self._gateway.client_of(request, bearer=True)
        except ApiError as error:
            return _from_api(error).response()
        data = [_model(checkpoint.stem) for checkpoint in self._gateway.runner.snapshot.checkpoints]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: Request, name: str) -> Response:
        try:
            self._gateway.client_of(request, bearer=True)
        except ApiError as error:
            return _from_api(error).response()
        found = self._gateway.runner.snapshot.find_checkpoint(name)
        if found is None:
            return OpenAIError(
                404, f"there is no model {name[:200]!r}", code="MODEL_NOT_FOUND", param="model"
            ).response()
        return JSONResponse(_model(found.stem))

    async def file(self, name: str) -> Response:
        """A picture behind a link. The name in the link is the secret: whoever follows it sends no header."""
        picture = self._pictures.find(name)
        if picture is None:
            return JSONResponse({"detail": "Not Found"}, status_code=404)
        return Response(picture, media_type=f"image/{name.rpartition('.')[2]}", headers={"Cache-Control": "private"})

    async def _answer(self, request: Request, path: str) -> Response:
        """A job's pictures, or why there are none. `path` is A1111's endpoint of the same kind."""
        try:
            client = self._gateway.client_of(request, bearer=True)
            body, given = await (_read_json(request) if path == "txt2img" else _read_form(request))
            order = Order(body, self._gateway.runner.snapshot)
            if path == "img2img" and order.size is None:
                order.size = given.pop("size")
            given.pop("size", None)
            order.input(path, given, self._gateway, self._gateway.runner.snapshot)  # complaints before a stream begins
            opened = OpenJob(client, path, order.count)
            if order.streams:
                events = self._stream(request, order, path, given, opened)
                return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
            with self._gateway.jobs.open(opened):
                work = self._gateway.runner.run(
                    opened, lambda snapshot: order.input(path, given, self._gateway, snapshot)
                )
                answer = await self._gateway.run(opened, work, request)
            return JSONResponse(
                {**_about(order), "data": [self._datum(request, order, text) for text in answer["images"]]}
            )
        except OpenAIError as error:
            return error.response()
        except EndpointError as error:
            return _from_endpoint(error).response()
        except ApiError as error:
            return _from_api(error).response()
        except Interrupted:
            return OpenAIError(409, "the job was cancelled", code="JOB_CANCELLED").response()

    def _datum(self, request: Request, order: Order, picture: str) -> dict[str, Any]:
        """A picture as the order wants it; if it does not say, both ways."""
        datum: dict[str, Any] = {}
        if order.response_format != "url":
            datum["b64_json"] = picture
        if order.response_format != "b64_json":
            name = self._pictures.keep(base64.b64decode(picture), order.format)
            datum["url"] = f"{str(request.base_url).rstrip('/')}/v1/images/files/{name}"
        return datum

    async def _stream(
        self, request: Request, order: Order, path: str, given: Mapping[str, Any], opened: OpenJob
    ) -> AsyncIterator[str]:
        """The events of a job: its previews, then its pictures. If the client hangs up, the job is cancelled."""
        kind = "image_edit" if path == "img2img" else "image_generation"
        with self._gateway.jobs.open(opened):
            working = asyncio.ensure_future(
                self._gateway.runner.run(opened, lambda snapshot: order.input(path, given, self._gateway, snapshot))
            )
            interrupted = asyncio.ensure_future(opened.interrupted.wait())
            try:
                sent: list[str] = []
                while not (working.done() or interrupted.done()):
                    yield ": working\n\n"
                    preview = opened.state.progress.get("preview")
                    if isinstance(preview, str) and preview not in sent and len(sent) < order.previews:
                        yield _event(f"{kind}.partial_image", order, b64_json=preview, partial_image_index=len(sent))
                        sent.append(preview)
                    await asyncio.wait([working, interrupted], timeout=_TICK, return_when=asyncio.FIRST_COMPLETED)
                if not working.done():
                    raise Interrupted
                for picture in working.result()["images"]:
                    yield _event(f"{kind}.completed", order, b64_json=picture, usage=_NO_TOKENS)
            except EndpointError as error:
                yield _failure(_from_endpoint(error))
            except ApiError as error:
                yield _failure(_from_api(error))
            except Interrupted:
                yield _failure(OpenAIError(409, "the job was cancelled", code="JOB_CANCELLED"))
            finally:
                interrupted.cancel()
                working.cancel()


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "a1111"}


def _about(order: Order) -> dict[str, Any]:
    size = f"{order.size[0]}x{order.size[1]}" if order.size else "1024x1024"
    return {"created": int(time.time()), "size": size, "output_format": order.format, "usage": _NO_TOKENS}


def _event(kind: str, order: Order, **more: Any) -> str:
    about = _about(order)
    data = {
        "type": kind,
        "created_at": about["created"],
        "size": about["size"],
        "output_format": order.format,
        "quality": "auto",
        "background": "auto",
        **more,
    }
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"


def _failure(error: OpenAIError) -> str:
    return f"event: error\ndata: {json.dumps(error.body)}\n\n"


async def _read_json(request: Request) -> tuple[dict[str, Any], dict[str, Any]]:
    body = bodies.parse_json(await read_body(request), request.headers.get("content-type", ""))
    if not isinstance(body, dict):
        raise OpenAIError(400, "the body must be a JSON object")
    return body, {}


async def _read_form(request: Request) -> tuple[dict[str, Any], dict[str, Any]]:
    """The texts of a form, and A1111's fields for its pictures. Raises OpenAIError."""
    async with request.form(max_files=4) as form:
        body = {name: value for name, value in form.multi_items() if isinstance(value, str)}
        pictures, mask = await _uploads(form, "image", "image[]"), await _uploads(form, "mask")
    if len(pictures) != 1:
        raise OpenAIError(400, f"image: exactly one picture can be edited, not {len(pictures)}", param="image")
    return body, await asyncio.to_thread(_edit_fields, pictures[0], mask[0] if mask else None)


async def _uploads(form: FormData, *names: str) -> list[bytes]:
    return [await value.read() for name in names for value in form.getlist(name) if isinstance(value, UploadFile)]


def _edit_fields(data: bytes, mask: bytes | None) -> dict[str, Any]:
    """img2img's fields for a picture and what of it is to be repainted: where the mask is transparent."""
    try:
        picture: Image.Image = ImageOps.exif_transpose(open_picture(data))
        shape = open_picture(mask) if mask is not None else picture
        hole = _hole(shape) if mask is not None or "A" in picture.getbands() else None
    except (NotAPicture, OSError, ValueError):
        raise OpenAIError(400, "image, mask: must be pictures (PNG, JPEG or WebP)", param="image") from None
    fields: dict[str, Any] = {"init_images": [base64.b64encode(data).decode()]}
    if hole is not None and hole.getextrema() != (0, 0):
        file = io.BytesIO()
        hole.resize(picture.size).save(file, "png")
        fields |= {"mask": base64.b64encode(file.getvalue()).decode(), "inpainting_fill": 1, "inpaint_full_res": False}
    share = min(1.0, (_MOST_PIXELS / (picture.width * picture.height)) ** 0.5)
    fields["size"] = tuple(max(64, int(side * share) // 8 * 8) for side in picture.size)
    return fields


def _hole(mask: Image.Image) -> Image.Image:
    """White where a mask is transparent; one without transparency is A1111's already: white is repainted."""
    if "A" not in mask.getbands() and "transparency" not in mask.info:
        return mask.convert("L")
    return mask.convert("RGBA").getchannel("A").point(lambda alpha: 0 if alpha >= 128 else 255)

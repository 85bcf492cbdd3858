"""A WebUI for tests: Automatic1111 1.9.3 or 1.10.1 as its callers see it (`--nowebui --api`), without a model.

    python -m sandbox.webui --models-dir models --port 7860

It refuses, forgets, leaks and breaks in the same cases as A1111. tests/sandbox/test_webui.py compares its answers with
recorded ones, and lists what is not imitated.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import enum
import gzip
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sandbox import webui_extensions, webui_extras
from sandbox.server import Exchange, Server
from sandbox.webui_errors import ErrorAnswer, MethodNotAllowed, RouteNotFound, WebUIError
from sandbox.webui_fields import json_object, read_fields, read_query_bool
from sandbox.webui_files import HashCache
from sandbox.webui_generate import GenerationAnswer, answer, check_fields, run
from sandbox.webui_model import lowvram
from sandbox.webui_process import VERSIONS, Killed, Process, ProcessOwner
from sandbox.webui_processing import PictureSettings, nans, out_of_memory

JSON = {"content-type": "application/json"}


class WebUIFault(enum.Enum):
    """How a txt2img or img2img fails."""

    BAD_GATEWAY = "502 with a page of HTML, at once"
    NOT_FOUND = "the router's 404, at once, as if the route did not exist"
    RESET = "the connection is reset before an answer, at once"
    HANG = "no progress and no answer, /interrupt has no effect, the lock is held; goes on after `release`"
    OUT_OF_MEMORY = "500 OutOfMemoryError during the generation"
    NANS = "500 NansException during the generation"
    BLACK = "generated, and every picture is black"
    NO_IMAGES = "generated, 200, and `images` is empty"
    OTHER_CHECKPOINT = "generated, and `info` names another checkpoint"
    CUT = "generated, Content-Length is correct, half of the body is sent"


@dataclasses.dataclass(frozen=True)
class CannedAnswer:
    """Any other answer to a txt2img or img2img, at once. A `body` that is not bytes is sent as JSON."""

    status: int
    body: Any
    content_type: str = "application/json"


@dataclasses.dataclass(eq=False, repr=False)
class SandboxWebUI(ProcessOwner, Server):
    """A1111 on loopback. Further keywords are those of WebUIKnobs.

    `models_dir` has the folders `Stable-diffusion/`, `Lora/`, `VAE/`, `embeddings/` and `ESRGAN/`. Links in them are
    followed.
    `own_models_dir` is A1111's own folder `models`, with other upscalers and faces; None: the same folder.
    `no_hashing` is `--no-hashing`: without hashes no checkpoint can be verified. `initial_checkpoint` is `--ckpt`, and
    is loaded in the background at the start; None is `--skip-load-model-at-start`. `config_json` is A1111's file of
    options: read when a process starts, written by each POST of options.

    `asked` lists every request so far, and `loads` every load of a checkpoint's file, also those of earlier processes.
    `process` is the current one. `release` lets
    hanging jobs go on. `crash` ends the process, with every job in flight; `restart` starts it on the same port, with
    nothing loaded.
    """

    models_dir: Path
    _: dataclasses.KW_ONLY
    version: str = "1.10.1"
    port: dataclasses.InitVar[int] = 0
    no_hashing: dataclasses.InitVar[bool] = False
    initial_checkpoint: str | None = None
    config_json: Mapping[str, Any] | None = None
    own_models_dir: Path | None = None

    loads: list[str] = dataclasses.field(default_factory=list, init=False)
    fail_next: list[WebUIFault | CannedAnswer] = dataclasses.field(default_factory=list, init=False)  # one a generation
    not_mounted_for: int = dataclasses.field(default=0, init=False)  # this many requests to /sdapi get the router's 404

    def __post_init__(self, port: int, no_hashing: bool) -> None:
        if self.version not in VERSIONS:
            raise ValueError(f"version is one of {', '.join(VERSIONS)}")
        Server.__init__(self, port)
        self.hashes = HashCache(enabled=not no_hashing)
        self._answering = _RequestCounter()
        self.process = self._new_process()

    def start(self) -> None:
        super().start()
        if self.initial_checkpoint:
            threading.Thread(target=_load_model, args=(self.process,), daemon=True).start()

    def stop(self) -> None:
        super().stop()  # first the port, then the requests in flight: a client that saw one end must not reach the port
        self.process.kill()

    def drain(self) -> None:
        """Do what uvicorn does on SIGTERM: accept no more requests, answer those in flight, then stop."""
        if self._thread.is_alive():
            self._http.shutdown()
        self._http.server_close()
        self._answering.wait_for_none()
        self.stop()

    def crash(self) -> None:
        """End as by SIGKILL: requests in flight get no answer, and the port refuses connections."""
        self.stop()

    def restart(self, *, forget_hashes: bool = False) -> None:
        """Start a new process on the same port. It knows the hashes of files, as A1111 does from its cache.json."""
        port, asked, before = self._http.server_address[1], self.asked, self.before
        self.crash()
        Server.__init__(self, port)
        self.asked, self.before = asked, before
        if forget_hashes:
            self.hashes.forget()
        self.process = self._new_process()
        self.start()

    def release(self) -> None:
        """Let every job go on that hangs now."""
        self.process.release()

    def answer(self, exchange: Exchange) -> None:
        began, process = time.monotonic(), self.process
        with self._answering:
            try:
                self._answer(exchange, process, began)
            except Killed:
                exchange.reset()

    def _new_process(self) -> Process:
        return Process(self.models_dir, self.version, self, self.initial_checkpoint)

    def _answer(self, exchange: Exchange, process: Process, began: float) -> None:
        asked = exchange.asked
        try:
            response = self._route(asked.method, asked.path)(self, process, exchange)
        except ErrorAnswer as error:
            response = _error_response(error)
        except (Killed, ConnectionError):
            raise
        except Exception as error:  # a bug of the sandbox: also on the console, since the answer looks like A1111's
            traceback.print_exc()
            response = _error_response(WebUIError(type(error).__name__, f"the sandbox itself failed: {error}"))
        headers = dict(response.headers)
        if response.timed:
            headers["x-process-time"] = str(round(time.monotonic() - began, 4))
        body = response.body
        if self.gzip and len(body) >= 1000 and "gzip" in asked.headers.get("accept-encoding", ""):
            body = gzip.compress(body, compresslevel=9, mtime=0)
            headers |= {"content-encoding": "gzip", "vary": "Accept-Encoding"}
        if response.cut:
            headers["content-length"] = str(len(body))
            body = body[: len(body) // 2]
            exchange.cut()
        exchange.send(response.status, body, headers)
        exchange.flush()

    def _route(self, method: str, path: str) -> _Route:
        if path.startswith("/sdapi/") and self.not_mounted_for > 0:
            self.not_mounted_for -= 1
            raise RouteNotFound
        if path.split("/")[1] in webui_extensions.SCRIPTS and path.split("/")[1] not in self.extensions:
            raise RouteNotFound
        methods = _ROUTES.get(path)
        if methods is None and path.rstrip("/") in _ROUTES:
            return _redirect_without_slash
        if methods is None:
            raise RouteNotFound
        if method not in methods:
            raise MethodNotAllowed(next(iter(methods)))
        return methods[method]

    # The endpoints

    def _txt2img(self, process: Process, exchange: Exchange) -> _Response:
        return self._generate(process, exchange, "txt2img")

    def _img2img(self, process: Process, exchange: Exchange) -> _Response:
        return self._generate(process, exchange, "img2img")

    def _generate(self, process: Process, exchange: Exchange, task: str) -> _Response:
        fault = self.fail_next.pop(0) if self.fail_next else None
        if immediate := _immediate_response(fault):
            return immediate
        asked = exchange.asked
        fields = read_fields(json_object(asked.body, asked.headers.get("content-type")), process.tables[task])
        sampler = check_fields(process, fields)
        settings = PictureSettings(black=fault is WebUIFault.BLACK, min_bytes=self.image_bytes or 0)
        with process.lock:
            process.model.get()
            with process.job(f"scripts_{task}"), self._journaled():
                if fault is WebUIFault.HANG:
                    process.hang()
                elif fault is WebUIFault.OUT_OF_MEMORY:
                    raise out_of_memory()
                elif fault is WebUIFault.NANS:
                    raise nans()
                processed = run(process, fields, sampler, settings)
        answered = answer(process, fields, processed, settings)
        _falsify(answered, fault)
        return _Response(200, answered.body(), JSON, cut=fault is WebUIFault.CUT)

    def _extra_single(self, process: Process, exchange: Exchange) -> _Response:
        asked = exchange.asked
        fields = webui_extras.read_single(json_object(asked.body, asked.headers.get("content-type")))
        with process.lock, self._journaled():
            return _json(webui_extras.run_single(process, fields))

    def _extra_batch(self, process: Process, exchange: Exchange) -> _Response:
        asked = exchange.asked
        fields = webui_extras.read_batch(json_object(asked.body, asked.headers.get("content-type")))
        with process.lock, self._journaled():
            return _json(webui_extras.run_batch(process, fields))

    @contextlib.contextmanager
    def _journaled(self) -> Iterator[None]:
        """Write when a generation began and ended, to measure the time between two generations."""
        began = time.monotonic()
        yield
        if self.journal is not None:
            with self.journal.open("a") as journal:
                journal.write(f"{began:.6f} {time.monotonic():.6f}\n")

    def _progress(self, process: Process, exchange: Exchange) -> _Response:
        skip = read_query_bool(exchange.asked.query, "skip_current_image")
        every = process.option("show_progress_every_n_steps")
        return _json(process.state.answer(preview=not skip, preview_every=every))

    def _set_options(self, process: Process, exchange: Exchange) -> _Response:
        asked = exchange.asked
        process.set_options(json_object(asked.body, asked.headers.get("content-type")))
        return _json(None)

    def _get_options(self, process: Process, exchange: Exchange) -> _Response:
        return _json(process.options.shown())

    def _interrupt(self, process: Process, exchange: Exchange) -> _Response:
        process.state.interrupt()
        return _json({})

    def _skip(self, process: Process, exchange: Exchange) -> _Response:
        process.state.skip()
        return _json(None)

    def _sd_models(self, process: Process, exchange: Exchange) -> _Response:
        return _json([checkpoint.as_listed() for checkpoint in process.files.checkpoints.listed])

    def _sd_vae(self, process: Process, exchange: Exchange) -> _Response:
        return _json([{"model_name": name, "filename": str(path)} for name, path in process.files.vaes.listed.items()])

    def _loras(self, process: Process, exchange: Exchange) -> _Response:
        return _json([lora.as_listed() for lora in process.files.loras.files.values()])

    def _refresh_checkpoints(self, process: Process, exchange: Exchange) -> _Response:
        with process.lock:
            process.files.checkpoints.refresh()
        return _json(None)

    def _refresh_vae(self, process: Process, exchange: Exchange) -> _Response:
        with process.lock:
            process.files.vaes.refresh()
        return _json(None)

    def _refresh_embeddings(self, process: Process, exchange: Exchange) -> _Response:
        with process.lock:
            process.files.embeddings.refresh()
        return _json(None)

    def _embeddings(self, process: Process, exchange: Exchange) -> _Response:
        model = process.model.loaded
        return _json(process.files.embeddings.listed(model.architecture if model else None))

    def _refresh_loras(self, process: Process, exchange: Exchange) -> _Response:
        process.files.loras.refresh()
        return _json(None)

    def _touch_checkpoint(self, process: Process, exchange: Exchange) -> _Response:
        """unload-checkpoint and reload-checkpoint: neither waits for the lock, and neither repairs anything.

        If nothing is loaded yet, both load the checkpoint that the option names: they access `shared.sd_model`.
        """
        if process.model.get() is None or process.model.is_broken:
            raise lowvram()
        return _json({})

    def _upscalers(self, process: Process, exchange: Exchange) -> _Response:
        return _json(process.files.upscalers)

    def _prompt_styles(self, process: Process, exchange: Exchange) -> _Response:
        keys = ("name", "prompt", "negative_prompt")
        return _json([{key: style.get(key, "") for key in keys} for style in self.styles])

    def _memory(self, process: Process, exchange: Exchange) -> _Response:
        total, used = 25276502016.0, 945483776
        return _json({"ram": {"free": total - used, "used": used, "total": total}, "cuda": {"error": "unavailable"}})

    def _cmd_flags(self, process: Process, exchange: Exchange) -> _Response:
        folders = {"ckpt_dir": str(process.files.checkpoint_folder), "lora_dir": str(self.models_dir / "Lora")}
        folders |= process.files.face_folders
        extensions = process.extension_files.flags(self.extensions)
        flags = {**process.tables["cmd-flags"], **folders, **extensions, "no_hashing": not self.hashes.enabled}
        return _json(
            {**flags, "skip_load_model_at_start": self.initial_checkpoint is None, "port": self.url.rpartition(":")[2]}
        )

    def _controlnet_models(self, process: Process, exchange: Exchange) -> _Response:
        return _json({"model_list": process.extension_files.controlnet_models()})

    def _controlnet_modules(self, process: Process, exchange: Exchange) -> _Response:
        return _json(webui_extensions.controlnet_modules())

    def _adetailer_models(self, process: Process, exchange: Exchange) -> _Response:
        return _json({"ad_model": process.extension_files.detectors()})

    def _adetailer_schema(self, process: Process, exchange: Exchange) -> _Response:
        return _json(webui_extensions.adetailer_schema())

    def _server_stop(self, process: Process, exchange: Exchange) -> _Response:
        """Without its own web page, 1.9.3 does not stop."""
        return _json("Stopping.")

    def _server_restart(self, process: Process, exchange: Exchange) -> _Response:
        return _Response(501, b"", {})

    def _server_kill(self, process: Process, exchange: Exchange) -> _Response:
        self.crash()
        raise Killed


@dataclasses.dataclass(frozen=True)
class _Response:
    """An answer, ready to be sent. `timed`: with x-process-time. `cut`: only half of the body is sent."""

    status: int
    body: bytes
    headers: Mapping[str, str]
    timed: bool = True
    cut: bool = False


_Route = Callable[[SandboxWebUI, Process, Exchange], _Response]


class _RequestCounter:
    """How many requests are being answered."""

    def __init__(self) -> None:
        self._number = 0
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        with self._changed:
            self._number += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._number -= 1
            self._changed.notify_all()

    def wait_for_none(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._number == 0)


def _table(name: str) -> _Route:
    def answer(server: SandboxWebUI, process: Process, exchange: Exchange) -> _Response:
        return _json(process.tables[name])

    return answer


def _constant(value: Any) -> _Route:
    def answer(server: SandboxWebUI, process: Process, exchange: Exchange) -> _Response:
        return _json(value)

    return answer


def _redirect_without_slash(server: SandboxWebUI, process: Process, exchange: Exchange) -> _Response:
    return _Response(307, b"", {"location": server.url + exchange.asked.path.rstrip("/")})


def _not_imitated(server: SandboxWebUI, process: Process, exchange: Exchange) -> _Response:
    return _Response(501, b'{"detail":"A1111 has this, the sandbox does not"}', JSON)


_ENDPOINTS: Mapping[str, Mapping[str, _Route]] = {
    "txt2img": {"POST": SandboxWebUI._txt2img},
    "progress": {"GET": SandboxWebUI._progress},
    "options": {"GET": SandboxWebUI._get_options, "POST": SandboxWebUI._set_options},
    "interrupt": {"POST": SandboxWebUI._interrupt},
    "skip": {"POST": SandboxWebUI._skip},
    "sd-models": {"GET": SandboxWebUI._sd_models},
    "sd-vae": {"GET": SandboxWebUI._sd_vae},
    "loras": {"GET": SandboxWebUI._loras},
    "refresh-checkpoints": {"POST": SandboxWebUI._refresh_checkpoints},
    "refresh-vae": {"POST": SandboxWebUI._refresh_vae},
    "refresh-loras": {"POST": SandboxWebUI._refresh_loras},
    "refresh-embeddings": {"POST": SandboxWebUI._refresh_embeddings},
    "unload-checkpoint": {"POST": SandboxWebUI._touch_checkpoint},
    "reload-checkpoint": {"POST": SandboxWebUI._touch_checkpoint},
    "samplers": {"GET": _table("samplers")},
    "schedulers": {"GET": _table("schedulers")},
    "upscalers": {"GET": SandboxWebUI._upscalers},
    "latent-upscale-modes": {"GET": _table("latent-upscale-modes")},
    "scripts": {"GET": _table("scripts")},
    "script-info": {"GET": _table("script-info")},
    "realesrgan-models": {"GET": _table("realesrgan-models")},
    "face-restorers": {"GET": _table("face-restorers")},
    "prompt-styles": {"GET": SandboxWebUI._prompt_styles},
    "hypernetworks": {"GET": _constant([])},
    "embeddings": {"GET": SandboxWebUI._embeddings},
    "extensions": {"GET": _constant([])},
    "memory": {"GET": SandboxWebUI._memory},
    "cmd-flags": {"GET": SandboxWebUI._cmd_flags},
    "server-stop": {"POST": SandboxWebUI._server_stop},
    "server-restart": {"POST": SandboxWebUI._server_restart},
    "server-kill": {"POST": SandboxWebUI._server_kill},
    "img2img": {"POST": SandboxWebUI._img2img},
    "extra-single-image": {"POST": SandboxWebUI._extra_single},
    "extra-batch-images": {"POST": SandboxWebUI._extra_batch},
    "png-info": {"POST": _not_imitated},
    "interrogate": {"POST": _not_imitated},
    "create/embedding": {"POST": _not_imitated},
    "create/hypernetwork": {"POST": _not_imitated},
    "train/embedding": {"POST": _not_imitated},
    "train/hypernetwork": {"POST": _not_imitated},
}

_ROUTES = {f"/sdapi/v1/{name}": methods for name, methods in _ENDPOINTS.items()} | {
    "/controlnet/version": {"GET": _constant({"version": 3})},
    "/controlnet/settings": {"GET": _constant({"control_net_unit_count": webui_extensions.UNIT_COUNT})},
    "/controlnet/model_list": {"GET": SandboxWebUI._controlnet_models},
    "/controlnet/module_list": {"GET": SandboxWebUI._controlnet_modules},
    "/controlnet/detect": {"POST": _not_imitated},
    "/adetailer/v1/version": {"GET": _constant({"version": "25.3.0"})},
    "/adetailer/v1/ad_model": {"GET": SandboxWebUI._adetailer_models},
    "/adetailer/v1/schema": {"GET": SandboxWebUI._adetailer_schema},
}


def _json(value: Any) -> _Response:
    return _Response(200, json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(), JSON)


def _load_model(process: Process) -> None:
    with contextlib.suppress(Killed):
        process.model.get()


def _error_response(error: ErrorAnswer) -> _Response:
    return _Response(error.status, json.dumps(error.body).encode(), {**JSON, **error.headers}, timed=error.timed)


def _immediate_response(fault: WebUIFault | CannedAnswer | None) -> _Response | None:
    if isinstance(fault, CannedAnswer):
        body = fault.body if isinstance(fault.body, bytes) else json.dumps(fault.body).encode()
        return _Response(fault.status, body, {"content-type": fault.content_type})
    if fault is WebUIFault.BAD_GATEWAY:
        page = b"<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>"
        return _Response(502, page, {"content-type": "text/html"})
    if fault is WebUIFault.NOT_FOUND:
        raise RouteNotFound
    if fault is WebUIFault.RESET:
        raise Killed
    return None


def _falsify(answer: GenerationAnswer, fault: WebUIFault | CannedAnswer | None) -> None:
    if fault is WebUIFault.NO_IMAGES:
        answer.images.clear()
    if fault is WebUIFault.OTHER_CHECKPOINT:
        was, other = answer.info["sd_model_name"], {"sd_model_name": "another_model", "sd_model_hash": "0123456789"}
        answer.info |= other
        answer.info["infotexts"] = [
            text.replace(f"Model: {was}", "Model: another_model") for text in answer.info["infotexts"]
        ]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sandbox.webui", description="A WebUI for tests, in place of A1111."
    )
    parser.add_argument("--models-dir", type=Path, required=True, help="holds Stable-diffusion/, Lora/ and VAE/")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--version", choices=VERSIONS, default=VERSIONS[-1])
    parser.add_argument("--step-seconds", type=float, default=0.0)
    parser.add_argument("--switch-seconds", type=float, default=0.0)
    parser.add_argument("--hash-seconds", type=float, default=0.0)
    parser.add_argument("--image-bytes", type=int)
    parser.add_argument("--journal", type=Path, help="gets a line per generation: its begin and end (monotonic clock)")
    parser.add_argument("--initial-checkpoint")
    parser.add_argument("--no-hashing", action="store_true")
    parser.add_argument("--no-gzip", dest="gzip", action="store_false")
    arguments = vars(parser.parse_args())

    server = _SeparateProcess(arguments.pop("models_dir"), **arguments)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    server.start()
    print(server.url, flush=True)
    ended.wait()
    server.drain()
    return 0


class _SeparateProcess(SandboxWebUI):
    def crash(self) -> None:
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())

"""The sandbox's WebUI: Automatic1111 1.9.3 or 1.10.1 as its callers see it (`--nowebui --api`), without a model.

    python -m sandbox.webui --models-dir models --port 7860

It refuses, forgets, leaks and breaks where A1111 does; what it answers is held against recorded answers by
tests/test_sandbox_webui.py, which also lists what is not imitated.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sandbox.server import Exchange, Server
from sandbox.webui_errors import NoMethod, NoRoute, Refusal, WebUIError
from sandbox.webui_fields import json_object, read_fields, read_query_bool
from sandbox.webui_files import Hashes
from sandbox.webui_process import VERSIONS, Killed, Process, lowvram
from sandbox.webui_txt2img import Answer, Extras, check, nans, out_of_memory, run

JSON = {"content-type": "application/json"}


class Fault(enum.Enum):
    """A wrong end for a txt2img."""

    BAD_GATEWAY = "502 and a page of HTML, at once"
    NOT_FOUND = "the router's 404, at once: no such route"
    RESET = "the connection is reset before an answer, at once"
    HANG = "no progress, no answer, deaf to /interrupt, the lock held; goes on after `release`"
    OUT_OF_MEMORY = "500 OutOfMemoryError out of the generation"
    NANS = "500 NansException out of the generation"
    BLACK = "generated, and every picture black"
    NO_IMAGES = "generated, 200, and `images` empty"
    OTHER_CHECKPOINT = "generated, and `info` names another checkpoint"
    CUT = "generated, the length promised, half of it sent"


@dataclasses.dataclass(frozen=True)
class Canned:
    """Any other answer to a txt2img, at once. A `body` that is not bytes is sent as JSON."""

    status: int
    body: Any
    content_type: str = "application/json"


class WebUI(Server):
    """A1111 on loopback. `models_dir` holds `Stable-diffusion/`, `Lora/` and `VAE/`; links are followed.

    Knobs, arguments of the constructor; all but the last two may be set at any time:

    step_seconds       time of a sampling step (0: a job takes no time)
    switch_seconds     time of loading a checkpoint
    hash_seconds       time of hashing a checkpoint the first time
    image_bytes        each PNG is brought to this size by incompressible bytes
    nan_check          False is `--disable-nan-check`: black pictures instead of NansException
    styles             what /prompt-styles lists: [{"name", "prompt", "negative_prompt"}]
    journal            a file that gets a line a generation: when it began and ended, on the monotonic clock
    gzip               answers above 1000 bytes are compressed for who accepts that, as A1111 does
    no_hashing         `--no-hashing`: no proof of anything
    initial_checkpoint loaded in the background at start; None is `--skip-load-model-at-start`

    Misbehaviour, to be set at any time:

    fail_next          the next txt2img end so, one each: Fault or Canned
    not_mounted_for    so many requests to /sdapi get the router's 404
    nan_models         model names whose weights are NaN
    misshapen_models   model names whose tensors do not fit (beside files where that can be seen)
    release()          lets hanging jobs go on
    crash(), restart() die with everything in flight; come back on the same port with nothing loaded and nothing set

    `asked` is every request so far, of all lives; `process` is the present one.
    """

    def __init__(
        self,
        models_dir: Path,
        *,
        version: str = "1.10.1",
        port: int = 0,
        image_bytes: int | None = None,
        no_hashing: bool = False,
        initial_checkpoint: str | None = None,
        gzip: bool = True,
        step_seconds: float = 0.0,
        switch_seconds: float = 0.0,
        hash_seconds: float = 0.0,
        nan_check: bool = True,
        styles: Sequence[Mapping[str, str]] = (),
        journal: Path | None = None,
    ) -> None:
        if version not in VERSIONS:
            raise ValueError(f"version is one of {', '.join(VERSIONS)}")
        super().__init__(port)
        self.models_dir = models_dir
        self.version = version
        self.image_bytes = image_bytes
        self.gzip = gzip
        self.journal = journal
        self.step_seconds = step_seconds
        self.switch_seconds = switch_seconds
        self.hash_seconds = hash_seconds
        self.nan_check = nan_check
        self.styles = styles
        self.fail_next: list[Fault | Canned] = []
        self.not_mounted_for = 0
        self.nan_models: set[str] = set()
        self.misshapen_models: set[str] = set()
        self.hashes = Hashes(enabled=not no_hashing)
        self._initial = initial_checkpoint
        self._answering = _Count()
        self.process = self._new_process()

    def start(self) -> None:
        super().start()
        if self._initial:
            threading.Thread(target=_load_quietly, args=(self.process,), daemon=True).start()

    def stop(self) -> None:
        super().stop()  # first the port, then who is in flight: nobody who saw it die can still reach it
        self.process.kill()

    def drain(self) -> None:
        """What uvicorn does on SIGTERM: accept nothing more, answer what is asked, then stop."""
        if self._thread.is_alive():
            self._http.shutdown()
        self._http.server_close()
        self._answering.wait_for_none()
        self.stop()

    def crash(self) -> None:
        """Gone, as by SIGKILL: nobody in flight gets an answer, and the port refuses."""
        self.stop()

    def restart(self, *, forget_hashes: bool = False) -> None:
        """A new life on the same port. The hashes of files are remembered, as A1111's cache.json remembers them."""
        port, asked, before = self._http.server_address[1], self.asked, self.before
        self.crash()
        super().__init__(port)
        self.asked, self.before = asked, before
        if forget_hashes:
            self.hashes.forget()
        self.process = self._new_process()
        self.start()

    def release(self) -> None:
        """Let every job that hangs now go on."""
        self.process.release()

    def answer(self, exchange: Exchange) -> None:
        began, process = time.monotonic(), self.process
        with self._answering:
            try:
                self._answer(exchange, process, began)
            except Killed:
                exchange.reset()

    def _new_process(self) -> Process:
        return Process(self.models_dir, self.version, self, self.hashes, self._initial)

    def _answer(self, exchange: Exchange, process: Process, began: float) -> None:
        asked = exchange.asked
        try:
            reply = self._route(asked.method, asked.path)(self, process, exchange)
        except Refusal as refusal:
            reply = _refused(refusal)
        except (Killed, ConnectionError):
            raise
        except Exception as error:  # ours, not A1111's: said on the console, since the answer looks like one of its own
            traceback.print_exc()
            reply = _refused(WebUIError(type(error).__name__, f"the sandbox itself failed: {error}"))
        headers = dict(reply.headers)
        if reply.timed:
            headers["x-process-time"] = str(round(time.monotonic() - began, 4))
        body = reply.body
        if self.gzip and len(body) >= 1000 and "gzip" in asked.headers.get("accept-encoding", ""):
            body = gzip.compress(body, compresslevel=9, mtime=0)
            headers |= {"content-encoding": "gzip", "vary": "Accept-Encoding"}
        if reply.cut:
            headers["content-length"] = str(len(body))
            body = body[: len(body) // 2]
            exchange.cut()
        exchange.send(reply.status, body, headers)
        exchange.flush()

    def _route(self, method: str, path: str) -> _Route:
        if path.startswith("/sdapi/") and self.not_mounted_for > 0:
            self.not_mounted_for -= 1
            raise NoRoute
        methods = _ROUTES.get(path)
        if methods is None and path.rstrip("/") in _ROUTES:
            return _elsewhere
        if methods is None:
            raise NoRoute
        if method not in methods:
            raise NoMethod(next(iter(methods)))
        return methods[method]

    # The endpoints

    def _txt2img(self, process: Process, exchange: Exchange) -> _Reply:
        fault = self.fail_next.pop(0) if self.fail_next else None
        if canned := _at_once(fault):
            return canned
        asked = exchange.asked
        fields = read_fields(json_object(asked.body, asked.headers.get("content-type")), process.tables["txt2img"])
        found = check(process, fields)
        extras = Extras(black=fault is Fault.BLACK, at_least=self.image_bytes or 0)
        with process.lock:
            process.model()
            with process.job(), self._noted():
                if fault is Fault.HANG:
                    process.hang()
                elif fault is Fault.OUT_OF_MEMORY:
                    raise out_of_memory()
                elif fault is Fault.NANS:
                    raise nans()
                answer = run(process, fields, found, extras)
        _falsify(answer, fault)
        return _Reply(200, answer.body(), JSON, cut=fault is Fault.CUT)

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        """When a generation began and ended, for whoever measures the time between two."""
        began = time.monotonic()
        yield
        if self.journal is not None:
            with self.journal.open("a") as journal:
                journal.write(f"{began:.6f} {time.monotonic():.6f}\n")

    def _progress(self, process: Process, exchange: Exchange) -> _Reply:
        skip = read_query_bool(exchange.asked.query, "skip_current_image")
        every = process.option("show_progress_every_n_steps")
        return _json(process.progress.answer(preview=not skip, preview_every=every))

    def _set_options(self, process: Process, exchange: Exchange) -> _Reply:
        asked = exchange.asked
        process.set_options(json_object(asked.body, asked.headers.get("content-type")))
        return _json(None)

    def _get_options(self, process: Process, exchange: Exchange) -> _Reply:
        return _json(process.options())

    def _interrupt(self, process: Process, exchange: Exchange) -> _Reply:
        process.progress.interrupt()
        return _json({})

    def _skip(self, process: Process, exchange: Exchange) -> _Reply:
        process.progress.skip()
        return _json(None)

    def _sd_models(self, process: Process, exchange: Exchange) -> _Reply:
        return _json([checkpoint.item() for checkpoint in process.checkpoints.listed])

    def _sd_vae(self, process: Process, exchange: Exchange) -> _Reply:
        return _json([{"model_name": name, "filename": str(path)} for name, path in process.vaes.listed.items()])

    def _loras(self, process: Process, exchange: Exchange) -> _Reply:
        return _json([lora.item() for lora in process.loras.files.values()])

    def _refresh_checkpoints(self, process: Process, exchange: Exchange) -> _Reply:
        with process.lock:
            process.checkpoints.refresh()
        return _json(None)

    def _refresh_vae(self, process: Process, exchange: Exchange) -> _Reply:
        with process.lock:
            process.vaes.refresh()
        return _json(None)

    def _refresh_embeddings(self, process: Process, exchange: Exchange) -> _Reply:
        with process.lock:
            return _json(None)

    def _refresh_loras(self, process: Process, exchange: Exchange) -> _Reply:
        process.loras.refresh()
        return _json(None)

    def _touch_checkpoint(self, process: Process, exchange: Exchange) -> _Reply:
        """unload-checkpoint and reload-checkpoint: neither waits for the lock, neither heals anything."""
        if process.model() is None or process.broken:
            raise lowvram()
        return _json({})

    def _prompt_styles(self, process: Process, exchange: Exchange) -> _Reply:
        keys = ("name", "prompt", "negative_prompt")
        return _json([{key: style.get(key, "") for key in keys} for style in self.styles])

    def _memory(self, process: Process, exchange: Exchange) -> _Reply:
        total, used = 25276502016.0, 945483776
        return _json({"ram": {"free": total - used, "used": used, "total": total}, "cuda": {"error": "unavailable"}})

    def _cmd_flags(self, process: Process, exchange: Exchange) -> _Reply:
        folders = {"ckpt_dir": str(process.folder), "lora_dir": str(self.models_dir / "Lora")}
        flags = {**process.tables["cmd-flags"], **folders, "no_hashing": not self.hashes.enabled}
        return _json({**flags, "skip_load_model_at_start": self._initial is None, "port": self.url.rpartition(":")[2]})

    def _server_stop(self, process: Process, exchange: Exchange) -> _Reply:
        """Without a web UI nothing stops (1.9.3)."""
        return _json("Stopping.")

    def _server_restart(self, process: Process, exchange: Exchange) -> _Reply:
        return _Reply(501, b"", {})

    def _server_kill(self, process: Process, exchange: Exchange) -> _Reply:
        self.crash()
        raise Killed


@dataclasses.dataclass(frozen=True)
class _Reply:
    """An answer, ready. `cut`: so much of the body is promised and not sent."""

    status: int
    body: bytes
    headers: Mapping[str, str]
    timed: bool = True
    cut: bool = False


_Route = Callable[[WebUI, Process, Exchange], _Reply]


class _Count:
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
    def answer(server: WebUI, process: Process, exchange: Exchange) -> _Reply:
        return _json(process.tables[name])

    return answer


def _constant(value: Any) -> _Route:
    def answer(server: WebUI, process: Process, exchange: Exchange) -> _Reply:
        return _json(value)

    return answer


def _elsewhere(server: WebUI, process: Process, exchange: Exchange) -> _Reply:
    return _Reply(307, b"", {"location": server.url + exchange.asked.path.rstrip("/")})


def _not_imitated(server: WebUI, process: Process, exchange: Exchange) -> _Reply:
    return _Reply(501, b'{"detail":"A1111 has this, its double in the sandbox does not"}', JSON)


_ENDPOINTS: Mapping[str, Mapping[str, _Route]] = {
    "txt2img": {"POST": WebUI._txt2img},
    "progress": {"GET": WebUI._progress},
    "options": {"GET": WebUI._get_options, "POST": WebUI._set_options},
    "interrupt": {"POST": WebUI._interrupt},
    "skip": {"POST": WebUI._skip},
    "sd-models": {"GET": WebUI._sd_models},
    "sd-vae": {"GET": WebUI._sd_vae},
    "loras": {"GET": WebUI._loras},
    "refresh-checkpoints": {"POST": WebUI._refresh_checkpoints},
    "refresh-vae": {"POST": WebUI._refresh_vae},
    "refresh-loras": {"POST": WebUI._refresh_loras},
    "refresh-embeddings": {"POST": WebUI._refresh_embeddings},
    "unload-checkpoint": {"POST": WebUI._touch_checkpoint},
    "reload-checkpoint": {"POST": WebUI._touch_checkpoint},
    "samplers": {"GET": _table("samplers")},
    "schedulers": {"GET": _table("schedulers")},
    "upscalers": {"GET": _table("upscalers")},
    "latent-upscale-modes": {"GET": _table("latent-upscale-modes")},
    "scripts": {"GET": _table("scripts")},
    "script-info": {"GET": _table("script-info")},
    "realesrgan-models": {"GET": _table("realesrgan-models")},
    "face-restorers": {"GET": _table("face-restorers")},
    "prompt-styles": {"GET": WebUI._prompt_styles},
    "hypernetworks": {"GET": _constant([])},
    "embeddings": {"GET": _constant({"loaded": {}, "skipped": {}})},
    "extensions": {"GET": _constant([])},
    "memory": {"GET": WebUI._memory},
    "cmd-flags": {"GET": WebUI._cmd_flags},
    "server-stop": {"POST": WebUI._server_stop},
    "server-restart": {"POST": WebUI._server_restart},
    "server-kill": {"POST": WebUI._server_kill},
    "img2img": {"POST": _not_imitated},
    "extra-single-image": {"POST": _not_imitated},
    "extra-batch-images": {"POST": _not_imitated},
    "png-info": {"POST": _not_imitated},
    "interrogate": {"POST": _not_imitated},
    "create/embedding": {"POST": _not_imitated},
    "create/hypernetwork": {"POST": _not_imitated},
    "train/embedding": {"POST": _not_imitated},
    "train/hypernetwork": {"POST": _not_imitated},
}

_ROUTES = {f"/sdapi/v1/{name}": methods for name, methods in _ENDPOINTS.items()}


def _json(value: Any) -> _Reply:
    return _Reply(200, json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(), JSON)


def _load_quietly(process: Process) -> None:
    with contextlib.suppress(Killed):
        process.model()


def _refused(refusal: Refusal) -> _Reply:
    return _Reply(refusal.status, json.dumps(refusal.body).encode(), {**JSON, **refusal.headers}, timed=refusal.timed)


def _at_once(fault: Fault | Canned | None) -> _Reply | None:
    if isinstance(fault, Canned):
        body = fault.body if isinstance(fault.body, bytes) else json.dumps(fault.body).encode()
        return _Reply(fault.status, body, {"content-type": fault.content_type})
    if fault is Fault.BAD_GATEWAY:
        page = b"<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>"
        return _Reply(502, page, {"content-type": "text/html"})
    if fault is Fault.NOT_FOUND:
        raise NoRoute
    if fault is Fault.RESET:
        raise Killed
    return None


def _falsify(answer: Answer, fault: Fault | Canned | None) -> None:
    if fault is Fault.NO_IMAGES:
        answer.images.clear()
    if fault is Fault.OTHER_CHECKPOINT:
        was, other = answer.info["sd_model_name"], {"sd_model_name": "another_model", "sd_model_hash": "0123456789"}
        answer.info |= other
        answer.info["infotexts"] = [
            text.replace(f"Model: {was}", "Model: another_model") for text in answer.info["infotexts"]
        ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sandbox.webui", description="A stand-in for the A1111 WebUI.")
    parser.add_argument("--models-dir", type=Path, required=True, help="holds Stable-diffusion/, Lora/ and VAE/")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--version", choices=VERSIONS, default=VERSIONS[-1])
    parser.add_argument("--step-seconds", type=float, default=0.0)
    parser.add_argument("--switch-seconds", type=float, default=0.0)
    parser.add_argument("--hash-seconds", type=float, default=0.0)
    parser.add_argument("--image-bytes", type=int)
    parser.add_argument("--journal", type=Path, help="a line a generation: when it began and ended (monotonic)")
    parser.add_argument("--initial-checkpoint")
    parser.add_argument("--no-hashing", action="store_true")
    parser.add_argument("--no-gzip", dest="gzip", action="store_false")
    arguments = vars(parser.parse_args())

    server = _OwnProcess(arguments.pop("models_dir"), **arguments)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    server.start()
    print(server.url, flush=True)
    ended.wait()
    server.drain()
    return 0


class _OwnProcess(WebUI):
    def crash(self) -> None:
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())

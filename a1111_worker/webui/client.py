"""The WebUI's HTTP API: one method an endpoint, no policy. Every failure leaves as one of our errors.

What A1111 says when something is wrong comes in four shapes (measured on 1.9.3 and 1.10.1):

    {"detail": [{"loc": …, "msg": …}]}                                   422, pydantic: a field of the wrong type
    {"error": "HTTPException", "detail": "Sampler not found", …}         4xx, the request is wrong
    {"error": "<class>", "detail": "", "errors": "<text>"}               500, any exception in the WebUI
    {"detail": "Not Found"}                                              404/405, the route is not there
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from a1111_worker.errors import (
    GenerationFailed,
    InvalidRequest,
    OutOfMemory,
    RouteMissing,
    WebUIBroken,
    WebUILost,
    WebUIRefused,
    WebUISilent,
    WorkerError,
)

T = TypeVar("T")

API = "/sdapi/v1"

_QUOTED_PATH = re.compile(r"""(['"])(?:[A-Za-z]:)?[/\\](?:(?!\1).)*\1""")
_BARE_PATH = re.compile(r"(?<![\w.<])(?:[A-Za-z]:)?[/\\][\w.+~@-]+(?:[/\\][\w.+~@-]*)*")


@dataclass(frozen=True)
class WebUIProgress:
    """One answer of /progress. It never says whose job it is; `job_timestamp` tells jobs apart."""

    progress: float
    eta_seconds: float
    job: str
    job_timestamp: str
    image: int
    images: int
    step: int
    steps: int


class WebUI:
    """A1111's API at `url`. Timeouts are seconds; connections are kept and may be used from several threads."""

    def __init__(
        self,
        url: str,
        *,
        connect_timeout: float = 5.0,
        timeout: float = 30.0,
        glance: float = 0.8,
        backoff: float = 0.2,
    ) -> None:
        """`glance` is how long a look or an interrupt may take: whoever asks does so again, and must not be held up."""
        self.url = url.rstrip("/")
        self._glance = glance
        self._connect_timeout = connect_timeout
        self._timeout = timeout
        self._session = requests.Session()
        self._session.trust_env = False
        # gzip costs the WebUI 80 ms for a picture of 2 MB and saves nothing on loopback.
        self._session.headers["Accept-Encoding"] = "identity"
        repeatable = _Repeated(
            total=3,
            backoff_factor=backoff,
            status_forcelist=(502, 503, 504),
            allowed_methods=None,
            raise_on_status=False,
        )
        self._session.mount(f"{self.url}/", HTTPAdapter(max_retries=repeatable, pool_maxsize=8))
        # A generation that may be running is never asked for twice.
        self._session.mount(f"{self.url}{API}/txt2img", HTTPAdapter(max_retries=0, pool_maxsize=8))
        # Looks and interrupts are repeated by whoever asks.
        self._session.mount(f"{self.url}{API}/progress", HTTPAdapter(max_retries=0, pool_maxsize=8))
        self._session.mount(f"{self.url}{API}/interrupt", HTTPAdapter(max_retries=0, pool_maxsize=8))

    def close(self) -> None:
        """Let the connections go."""
        self._session.close()

    def options(self) -> dict[str, Any]:
        return self._get("/options", dict)

    def set_options(self, options: Mapping[str, Any], *, timeout: float | None = None) -> None:
        """Set options; a checkpoint among them is loaded before this returns, and 200 proves nothing."""
        self._post("/options", options, timeout=timeout)

    def checkpoints(self) -> list[dict[str, Any]]:
        return self._get("/sd-models", list)

    def refresh_checkpoints(self) -> None:
        self._post("/refresh-checkpoints", {})

    def flags(self) -> dict[str, Any]:
        """The flags the WebUI was started with."""
        return self._get("/cmd-flags", dict)

    def samplers(self) -> list[dict[str, Any]]:
        return self._get("/samplers", list)

    def schedulers(self) -> list[dict[str, Any]]:
        return self._get("/schedulers", list)

    def upscalers(self) -> list[dict[str, Any]]:
        return self._get("/upscalers", list)

    def latent_upscale_modes(self) -> list[dict[str, Any]]:
        return self._get("/latent-upscale-modes", list)

    def scripts(self) -> dict[str, list[str]]:
        return self._get("/scripts", dict)

    def styles(self) -> list[dict[str, Any]]:
        return self._get("/prompt-styles", list)

    def vaes(self) -> list[dict[str, Any]]:
        return self._get("/sd-vae", list)

    def progress(self, *, timeout: float | None = None) -> WebUIProgress:
        """Where the running generation is; all zero while nothing runs, and during a switch. Asked once, briefly."""
        found = self._get("/progress?skip_current_image=true", dict, timeout=timeout or self._glance)
        try:
            state = found["state"]
            return WebUIProgress(
                progress=float(found["progress"]),
                eta_seconds=float(found["eta_relative"]),
                job=str(state["job"]),
                job_timestamp=str(state["job_timestamp"]),
                image=int(state["job_no"]) + 1,
                images=int(state["job_count"]),
                step=int(state["sampling_step"]),
                steps=int(state["sampling_steps"]),
            )
        except (LookupError, TypeError, ValueError) as error:
            raise WebUILost("the WebUI's answer to /progress has another form than A1111's") from error

    def interrupt(self) -> None:
        """End the running generation; its answer comes back with what is there. Harmless when nothing runs."""
        self._post("/interrupt", None, timeout=self._glance)

    def txt2img(self, body: Mapping[str, Any], *, timeout: float) -> WebUIResponse:
        """Start a generation and return when its answer begins: the WebUI is free for the next one then.

        `timeout` is how long the WebUI may be silent; an error it answers with is raised here.
        """
        return WebUIResponse(self._send("POST", "/txt2img", body, timeout=timeout))

    def unload_checkpoint(self) -> None:
        """Put the weights out of the GPU's memory."""
        self._post("/unload-checkpoint", None)

    def reload_checkpoint(self) -> None:
        """Put the weights of the checkpoint that was unloaded back on the GPU."""
        self._post("/reload-checkpoint", None)

    def _get(self, path: str, kind: type[T], *, timeout: float | None = None) -> T:
        found = WebUIResponse(self._send("GET", path, None, timeout=timeout)).read()
        if not isinstance(found, kind):
            raise WebUILost(f"the WebUI's answer to {path} has another form than A1111's")
        return found

    def _post(self, path: str, body: Mapping[str, Any] | None, *, timeout: float | None = None) -> None:
        WebUIResponse(self._send("POST", path, body, timeout=timeout)).read()

    def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None, *, timeout: float | None = None
    ) -> requests.Response:
        data = None if body is None else json.dumps(body, allow_nan=False).encode()
        try:
            response = self._session.request(
                method,
                f"{self.url}{API}{path}",
                data=data,
                headers=None if data is None else {"Content-Type": "application/json"},
                timeout=(min(self._connect_timeout, timeout or self._timeout), timeout or self._timeout),
                stream=True,
                allow_redirects=False,
            )
        except requests.exceptions.ReadTimeout as error:
            raise WebUISilent(f"the WebUI said nothing for {timeout or self._timeout:.3g} s") from error
        except requests.exceptions.RequestException as error:
            raise _unreachable(error) from error
        if response.status_code != 200:
            raise translate(response.status_code, _bytes_of(response))
        return response


class _Repeated(Retry):
    """Everything is repeated but what ran into its timeout: it may be under way still, and that time is gone."""

    def increment(self, *arguments: Any, **more: Any) -> _Repeated:
        error = more.get("error")
        if isinstance(error, urllib3.exceptions.ReadTimeoutError):
            raise error
        return super().increment(*arguments, **more)


class WebUIResponse:
    """The WebUI's 200, its head here and its body still to be read."""

    def __init__(self, response: requests.Response) -> None:
        self._response = response

    def close(self) -> None:
        """Throw the body away unread."""
        self._response.close()

    def cut(self) -> None:
        """End it for whoever reads it at this moment."""
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            self._response.raw.shutdown()

    def read(self) -> Any:
        """The body's JSON; WebUILost where it is cut short or is none."""
        body = _bytes_of(self._response)
        try:
            return json.loads(body)
        except ValueError as error:
            raise WebUILost("what answers at the WebUI's address does not speak A1111's API") from error


def translate(status: int, body: bytes) -> WorkerError:
    """The error that a status and a body of the WebUI mean: a pure function, tested on recorded answers."""
    try:
        found = json.loads(body)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        return WebUILost(f"the WebUI answered {status} without a reason")
    detail, name, text = found.get("detail"), str(found.get("error") or ""), str(found.get("errors") or "")
    if isinstance(detail, list):
        return InvalidRequest("; ".join(_pydantic(entry) for entry in detail) or "the WebUI refused a field")
    if not name:
        if status in (404, 405):
            return RouteMissing(
                "the WebUI's API is not there", hint="start the WebUI with --api, or set WEBUI_URL to where it is"
            )
        return WebUILost(f"the WebUI answered {status}: {plain(str(detail))}")
    if name == "HTTPException":
        refused = plain(str(detail))
        return InvalidRequest(f"the WebUI refused it: {refused}") if status < 500 else GenerationFailed(refused)
    return _exception(name, text)


def _exception(name: str, text: str) -> WorkerError:
    if name == "OutOfMemoryError" or "CUDA out of memory" in text:
        return OutOfMemory(
            "the GPU ran out of memory",
            hint="ask for a smaller width and height, a smaller batch_size, or less hires upscaling",
        )
    if name == "NansException":
        return GenerationFailed(
            "the model produced NaN instead of a picture",
            hint="try another seed, a lower LoRA scale or another sampler",
        )
    if name == "AttributeError" and "lowvram" in text:
        return WebUIBroken("the WebUI has lost its checkpoint and must be restarted")
    said = plain(f"{name}: {text}" if text else name)
    return GenerationFailed(f"the WebUI failed with {said}")


def plain(text: str, limit: int = 300) -> str:
    """Text of the WebUI that may be shown to a caller: one line, no path of the container."""
    line = " ".join(text.split())
    line = _QUOTED_PATH.sub(r"\1<path>\1", line)
    line = _BARE_PATH.sub("<path>", line)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _pydantic(entry: Any) -> str:
    if not isinstance(entry, dict):
        return "the WebUI refused a field"
    where = ".".join(str(part) for part in entry.get("loc", ()) if part != "body")
    return f"{where}: {plain(str(entry.get('msg', 'refused')))}" if where else plain(str(entry.get("msg", "refused")))


def _bytes_of(response: requests.Response) -> bytes:
    # `raw.read` in one go: `response.content` collects 10 KiB pieces, which costs milliseconds for a picture.
    try:
        body: bytes = response.raw.read(decode_content=True)
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise WebUILost("the WebUI's answer ended in the middle") from error
    finally:
        response.close() if response.raw.closed else response.raw.release_conn()
    return body


def _unreachable(error: requests.exceptions.RequestException) -> WebUILost:
    reason: object = error.args[0] if error.args else None
    reason = getattr(reason, "reason", reason)  # urllib3's MaxRetryError wraps the cause
    if isinstance(reason, urllib3.exceptions.NewConnectionError):
        return WebUIRefused("the WebUI is not there")
    return WebUILost("the connection to the WebUI broke")

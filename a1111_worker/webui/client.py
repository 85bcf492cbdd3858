"""The WebUI's HTTP API: one method for each endpoint, no policy. Every failure is raised as one of our errors.

A1111 reports a failure in one of four forms (measured on 1.9.3 and 1.10.1):

    {"detail": [{"loc": …, "msg": …}]}                                   422, pydantic: a field of the wrong type
    {"error": "HTTPException", "detail": "Sampler not found", …}         4xx, the request is wrong
    {"error": "<class>", "detail": "", "errors": "<text>"}               500, any exception in the WebUI
    {"detail": "Not Found"}                                              404/405, the route is not there
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from a1111_worker.domain import Task
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
from a1111_worker.text import printable
from a1111_worker.webui.responses import (
    MENUS,
    ListedCheckpoint,
    Sampler,
    Scheduler,
    Style,
    UnexpectedForm,
    Upscaler,
    WebUIFlags,
    WebUIOptions,
    WebUIProgress,
    parse_adetailer_models,
    parse_argument_count,
    parse_checkpoints,
    parse_controlnet_models,
    parse_controlnet_modules,
    parse_controlnet_units,
    parse_extra_image,
    parse_flags,
    parse_menu,
    parse_names,
    parse_options,
    parse_progress,
    parse_samplers,
    parse_schedulers,
    parse_script_axes,
    parse_scripts,
    parse_styles,
    parse_upscalers,
    parse_vaes,
)

T = TypeVar("T")

API = "/sdapi/v1"

_QUOTED_PATH = re.compile(r"""(['"])(?:[A-Za-z]:)?[/\\](?:(?!\1).)*\1""")
_BARE_PATH = re.compile(r"(?<![\w.<])(?:[A-Za-z]:)?[/\\][\w.+~@-]+(?:[/\\][\w.+~@-]*)*")


class WebUI:
    """A1111's API at `url`. Timeouts are seconds. Connections are kept, and several threads may use them."""

    def __init__(
        self,
        url: str,
        *,
        connect_timeout: float = 5.0,
        timeout: float = 30.0,
        short_timeout: float = 0.8,
        backoff: float = 0.2,
    ) -> None:
        """`short_timeout` is for /progress and /interrupt: their caller repeats them, and must not wait long."""
        self.url = url.rstrip("/")
        self._connect_timeout = connect_timeout
        self._timeout = timeout
        self._short_timeout = short_timeout
        self._menus: dict[str, Any] = {}
        self._session = requests.Session()
        self._session.trust_env = False
        # gzip costs the WebUI 80 ms for an image of 2 MB and saves nothing on loopback.
        self._session.headers["Accept-Encoding"] = "identity"
        retry = _RetryUnlessTimeout(
            total=3,
            backoff_factor=backoff,
            status_forcelist=(502, 503, 504),
            allowed_methods=None,
            raise_on_status=False,
            respect_retry_after_header=False,  # it may be hours, or no number: a job cannot wait so long
        )
        self._session.mount(f"{self.url}/", HTTPAdapter(max_retries=retry, pool_maxsize=8))
        # A generation that may be running is never requested a second time. The caller repeats the other two.
        for endpoint in ("/txt2img", "/img2img", "/extra-single-image", "/progress", "/interrupt"):
            self._session.mount(f"{self.url}{API}{endpoint}", HTTPAdapter(max_retries=0, pool_maxsize=8))

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def options(self, *, timeout: float | None = None) -> WebUIOptions:
        return self._get("/options", parse_options, timeout=timeout)

    def set_options(self, options: Mapping[str, Any], *, timeout: float | None = None) -> None:
        """Set options. If a checkpoint is among them, it is loaded before this returns; a 200 does not verify that."""
        self._post("/options", options, timeout=timeout)

    def checkpoints(self) -> tuple[ListedCheckpoint, ...]:
        return self._get("/sd-models", parse_checkpoints)

    def refresh_checkpoints(self) -> None:
        self._post("/refresh-checkpoints", {})

    def flags(self) -> WebUIFlags:
        """How the WebUI was started."""
        return self._get("/cmd-flags", parse_flags)

    def menu(self, name: str, *, timeout: float | None = None) -> Any:
        """What A1111 answers to one of MENUS, as JSON."""
        return self._get(f"/{name}", parse_menu, timeout=timeout)

    def last_menu(self, name: str) -> Any:
        """The last answer of A1111 to one of MENUS, whoever asked; None if nobody has asked yet."""
        return self._menus.get(f"/{name}")

    def samplers(self) -> tuple[Sampler, ...]:
        return self._get("/samplers", parse_samplers)

    def schedulers(self) -> tuple[Scheduler, ...]:
        return self._get("/schedulers", parse_schedulers)

    def upscalers(self) -> tuple[Upscaler, ...]:
        return self._get("/upscalers", parse_upscalers)

    def latent_upscale_modes(self) -> tuple[str, ...]:
        return self._get("/latent-upscale-modes", parse_names)

    def scripts(self) -> Mapping[Task, tuple[str, ...]]:
        """The names of the scripts for txt2img, and those for img2img."""
        return self._get("/scripts", parse_scripts)

    def script_axes(self) -> Mapping[Task, tuple[str, ...]]:
        """The axes of the script "X/Y/Z plot" of both tasks, in the order of their numbers."""
        return self._get("/script-info", parse_script_axes)

    def styles(self) -> tuple[Style, ...]:
        return self._get("/prompt-styles", parse_styles)

    def vaes(self) -> tuple[str, ...]:
        """The file names of the VAEs."""
        return self._get("/sd-vae", parse_vaes)

    def refresh_vaes(self) -> None:
        self._post("/refresh-vae", {})

    def progress(self, *, timeout: float | None = None, preview: bool = False) -> WebUIProgress:
        """How far the running generation is; all zero if nothing runs, and during a switch. Never retried.

        With `preview` the WebUI may render the picture so far, which takes it a moment.
        """
        query = f"skip_current_image={str(not preview).lower()}"
        return self._get("/progress", parse_progress, query=query, timeout=timeout or self._short_timeout)

    def interrupt(self) -> None:
        """End the running generation; it answers with the images that are done. Does no harm if nothing runs."""
        self._post("/interrupt", None, timeout=self._short_timeout)

    def txt2img(self, body: Mapping[str, Any], *, timeout: float) -> WebUIResponse:
        """Start a generation and return when its answer begins. From then on the WebUI can take the next request.

        `timeout` is how long the WebUI may be silent. An error that it answers with is raised here.
        """
        return WebUIResponse(self._send("POST", "/txt2img", body, timeout=timeout))

    def img2img(self, body: Mapping[str, Any], *, timeout: float) -> WebUIResponse:
        """The same with pictures to begin with."""
        return WebUIResponse(self._send("POST", "/img2img", body, timeout=timeout))

    def upscale(self, body: Mapping[str, Any], *, timeout: float) -> WebUIResponse:
        """Enlarge one picture, and return when the answer begins."""
        return WebUIResponse(self._send("POST", "/extra-single-image", body, timeout=timeout))

    def extra_single_image(self, body: Mapping[str, Any], *, timeout: float) -> str:
        """Enlarge one picture. Returns it in base64."""
        answer = self.upscale(body, timeout=timeout).read()
        try:
            return parse_extra_image(answer)
        except UnexpectedForm as error:
            raise WebUILost(f"the WebUI's answer to /extra-single-image has another form: {error}") from error

    def script_argument_count(self, script: str) -> int:
        """How many arguments a script takes in txt2img. 0 if there is no such script."""
        return self._get("/script-info", lambda answer: parse_argument_count(answer, script))

    def controlnet_models(self) -> tuple[str, ...]:
        """ControlNet's models, `STEM [hash]`. It looks for new files now."""
        return self._get("/model_list", parse_controlnet_models, api="/controlnet")

    def controlnet_modules(self) -> Mapping[str, bool]:
        """ControlNet's modules, and whether each works without a model."""
        return self._get("/module_list", parse_controlnet_modules, api="/controlnet")

    def controlnet_units(self) -> int:
        """How many units ControlNet runs."""
        return self._get("/settings", parse_controlnet_units, api="/controlnet")

    def adetailer_models(self) -> tuple[str, ...]:
        """ADetailer's detectors."""
        return self._get("/ad_model", parse_adetailer_models, api="/adetailer/v1")

    def unload_checkpoint(self) -> None:
        """Move the weights out of the GPU's memory."""
        self._post("/unload-checkpoint", None)

    def reload_checkpoint(self, *, timeout: float | None = None) -> None:
        """Move the weights of the unloaded checkpoint back to the GPU. If none was loaded since the start, load it."""
        self._post("/reload-checkpoint", None, timeout=timeout)

    def _get(
        self,
        endpoint: str,
        parse: Callable[[Any], T],
        *,
        query: str = "",
        timeout: float | None = None,
        api: str = API,
    ) -> T:
        path = f"{endpoint}?{query}" if query else endpoint
        answer = WebUIResponse(self._send("GET", path, None, timeout=timeout, api=api)).read()
        try:
            found = parse(answer)
            if endpoint.removeprefix("/") in MENUS:
                self._menus[endpoint] = answer
            return found
        except UnexpectedForm as error:
            # This WebUI will not change its form: another worker may have another WebUI.
            raise WebUILost(
                f"the WebUI's answer to {endpoint} has another form than A1111's: {error}", refresh_worker=True
            ) from error

    def _post(self, path: str, body: Mapping[str, Any] | None, *, timeout: float | None = None) -> None:
        WebUIResponse(self._send("POST", path, body, timeout=timeout)).read()

    def _send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        *,
        timeout: float | None = None,
        api: str = API,
    ) -> requests.Response:
        timeout = timeout or self._timeout
        data = None if body is None else json.dumps(body, allow_nan=False).encode()
        try:
            response = self._session.request(
                method,
                f"{self.url}{api}{path}",
                data=data,
                headers=None if data is None else {"Content-Type": "application/json"},
                timeout=(min(self._connect_timeout, timeout), timeout),
                stream=True,
                allow_redirects=False,
            )
        except requests.exceptions.ReadTimeout as error:
            raise WebUISilent(f"the WebUI did not answer for {timeout:.3g} s") from error
        except requests.exceptions.RequestException as error:
            raise _connection_error(error) from error
        if response.status_code != 200:
            raise parse_error(response.status_code, _read_body(response))
        return response


class WebUIResponse:
    """A 200 of the WebUI whose head has arrived, and whose body is still to be read."""

    def __init__(self, response: requests.Response) -> None:
        self._response = response

    def close(self) -> None:
        """Drop the body unread."""
        self._response.close()

    def abort(self) -> None:
        """Make `read` fail now, in whatever thread it runs."""
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            self._response.raw.shutdown()

    def read(self) -> Any:
        """The body's JSON. Raises WebUILost if the body is cut short or is no JSON."""
        body = _read_body(self._response)
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise WebUILost("what answers at the WebUI's address does not speak A1111's API") from error


class _RetryUnlessTimeout(Retry):
    """Retries after every failure but a read timeout: that request may still be running, and its time is over."""

    def increment(self, *arguments: Any, **more: Any) -> _RetryUnlessTimeout:
        error = more.get("error")
        if isinstance(error, urllib3.exceptions.ReadTimeoutError):
            raise error
        return super().increment(*arguments, **more)


def parse_error(status: int, body: bytes) -> WorkerError:
    """The error that a status and a body of the WebUI mean. A pure function, tested on recorded answers."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        return WebUILost(f"the WebUI answered {status} without a reason")
    detail, name, text = found.get("detail"), str(found.get("error") or ""), str(found.get("errors") or "")
    if isinstance(detail, list):
        fields = "; ".join(_describe_field_error(entry) for entry in detail)
        return InvalidRequest(fields or "the WebUI refused a field")
    if not name:
        if status in (404, 405):
            return RouteMissing(
                "the WebUI's API is not there", hint="start the WebUI with --api, or set WEBUI_URL to where it is"
            )
        return WebUILost(f"the WebUI answered {status}: {without_paths(str(detail))}")
    if name == "HTTPException":
        reason = without_paths(str(detail))
        return InvalidRequest(f"the WebUI refused it: {reason}") if status < 500 else GenerationFailed(reason)
    return _parse_exception(name, text)


def without_paths(text: str, limit: int = 300) -> str:
    """A text of the WebUI as a caller may see it: a single line of at most `limit` characters, no container path."""
    shown = printable(text, 20 * limit)  # bounded before it is searched, and long enough to hold what paths hide
    shown = _QUOTED_PATH.sub(r"\1<path>\1", shown)
    return printable(_BARE_PATH.sub("<path>", shown), limit)


def _parse_exception(name: str, text: str) -> WorkerError:
    """The error for an exception of this class name and text that was raised inside the WebUI."""
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
    return GenerationFailed(f"the WebUI failed with {without_paths(f'{name}: {text}' if text else name)}")


def _describe_field_error(entry: Any) -> str:
    """What pydantic says about a field, as `field: message`."""
    if not isinstance(entry, dict):
        return "the WebUI refused a field"
    location = entry.get("loc")
    field = ".".join(str(part) for part in location if part != "body") if isinstance(location, list) else ""
    message = without_paths(str(entry.get("msg", "refused")))
    return f"{field}: {message}" if field else message


def _read_body(response: requests.Response) -> bytes:
    # `raw.read` reads all at once: `response.content` collects pieces of 10 KiB, which costs milliseconds for an image.
    try:
        body: bytes = response.raw.read(decode_content=True)
    except (urllib3.exceptions.HTTPError, OSError, ValueError, OverflowError, MemoryError) as error:
        # The last three: the announced length, of the body or of a chunk, is negative or absurdly large.
        raise WebUILost("the WebUI's answer ended in the middle") from error
    finally:
        response.close() if response.raw.closed else response.raw.release_conn()
    return body


def _connection_error(error: requests.exceptions.RequestException) -> WebUILost:
    reason: object = error.args[0] if error.args else None
    reason = getattr(reason, "reason", reason)  # urllib3's MaxRetryError wraps the cause
    if isinstance(reason, urllib3.exceptions.NewConnectionError):
        return WebUIRefused("the WebUI is not there")
    return WebUILost("the connection to the WebUI broke")

"""RunPod's management API (REST, v2): endpoints, their workers and logs, network volumes, what is in stock.

One method per call: ask, translate the failure, return RunPod's own JSON. A question is asked again if RunPod is busy
or out of reach. Something that is created is not asked for twice: if the answer is lost, it may be there.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx

from a1111_client.errors import EndpointError

RUNPOD_API = "https://api.runpod.io"

_TOO_MANY = 429


@dataclass(frozen=True)
class LogLine:
    """A line of a worker's log. `at` is RunPod's time of it; the log can be read on from there."""

    at: str
    source: str
    text: str


@dataclass(frozen=True)
class ApiTimings:
    """Seconds, and how often a question is asked."""

    timeout: float = 60.0
    tries: int = 4
    pause: float = 1.0  # before the second try; doubled each time, or what RunPod asks for
    pause_most: float = 30.0
    quiet: float = 3.0  # a log without a new line for so long has been read to its end


class RunPodApi:
    """The API, with a key. Close it, or use it in a `with`."""

    def __init__(self, key: str, url: str = RUNPOD_API, *, timings: ApiTimings | None = None) -> None:
        self._timings = timings or ApiTimings()
        self._http = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=self._timings.timeout
        )

    def __enter__(self) -> RunPodApi:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def endpoints(self) -> list[dict[str, Any]]:
        return list(self._get("/v2/serverless")["endpoints"])

    def endpoint(self, endpoint_id: str) -> dict[str, Any]:
        return self._get(f"/v2/serverless/{_quoted(endpoint_id)}")

    def create_endpoint(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._send("POST", "/v2/serverless", body)

    def update_endpoint(self, endpoint_id: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._send("PATCH", f"/v2/serverless/{_quoted(endpoint_id)}", body)

    def delete_endpoint(self, endpoint_id: str) -> None:
        self._send("DELETE", f"/v2/serverless/{_quoted(endpoint_id)}")

    def workers(self, endpoint_id: str) -> dict[str, Any]:
        """`workers`, each with its state, and a `summary`."""
        return self._get(f"/v2/serverless/{_quoted(endpoint_id)}/workers")

    def volumes(self) -> list[dict[str, Any]]:
        return list(self._get("/v2/network-volumes")["networkVolumes"])

    def volume(self, volume_id: str) -> dict[str, Any]:
        return self._get(f"/v2/network-volumes/{_quoted(volume_id)}")

    def create_volume(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._send("POST", "/v2/network-volumes", body)

    def delete_volume(self, volume_id: str) -> None:
        self._send("DELETE", f"/v2/network-volumes/{_quoted(volume_id)}")

    def gpus(self, min_cuda: str) -> list[dict[str, Any]]:
        """The GPUs of serverless workers whose driver has at least this CUDA version, with their stock."""
        query = {"include": "AVAILABILITY", "product": "SERVERLESS", "minCudaVersion": min_cuda}
        return list(self._get("/v2/catalog/gpus", query)["gpus"])

    def data_centers(self) -> list[dict[str, Any]]:
        """Each with its kinds of network volumes and its stock of GPUs."""
        return list(self._get("/v2/catalog/datacenters", {"include": "GPU_AVAILABILITY"})["dataCenters"])

    def logs(self, endpoint_id: str, worker_id: str, *, tail: int = 100, follow: bool = False) -> Iterator[LogLine]:
        """The last `tail` lines of a worker's log; with `follow` also those that come, for ever."""
        path = f"/v2/serverless/{_quoted(endpoint_id)}/workers/{_quoted(worker_id)}/logs"
        quiet = None if follow else self._timings.quiet
        timeout = httpx.Timeout(self._timings.timeout, read=quiet)
        try:
            with self._http.stream("GET", path, params={"tail": tail}, timeout=timeout) as answer:
                if answer.is_error:
                    answer.read()
                    raise _refusal(answer)
                with contextlib.suppress(httpx.ReadTimeout):
                    yield from _read_events(answer.iter_lines())
        except httpx.HTTPError as error:
            raise _unreachable(error) from error

    def _get(self, path: str, query: Mapping[str, str] | None = None) -> dict[str, Any]:
        for number in range(1, self._timings.tries + 1):
            is_last = number == self._timings.tries
            wait = min(self._timings.pause_most, self._timings.pause * 2 ** (number - 1))
            try:
                answer = self._http.get(path, params=query)
            except httpx.HTTPError as error:
                if is_last:
                    raise _unreachable(error) from error
            else:
                if is_last or not (answer.status_code == _TOO_MANY or answer.is_server_error):
                    return _read(answer)
                wait = min(self._timings.pause_most, _retry_after(answer) or wait)
            time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Only a refused request is sent again: 429 says that nothing was done."""
        for number in range(1, self._timings.tries + 1):
            try:
                answer = self._http.request(method, path, json=body)
            except httpx.HTTPError as error:
                raise _unreachable(error) from error
            if answer.status_code != _TOO_MANY or number == self._timings.tries:
                break
            time.sleep(min(self._timings.pause_most, _retry_after(answer) or self._timings.pause * 2 ** (number - 1)))
        return _read(answer)


def _quoted(name: str) -> str:
    """A name as one part of a path, whatever it holds."""
    return quote(name, safe="")


def _read(answer: httpx.Response) -> dict[str, Any]:
    if answer.is_error or answer.is_redirect:
        raise _refusal(answer)
    if not answer.content:
        return {}
    with contextlib.suppress(ValueError):
        value = answer.json()
        if isinstance(value, dict):
            return value
    raise EndpointError("ENDPOINT_UNREACHABLE", "RunPod's answer is no JSON object", retryable=True)


def _refusal(answer: httpx.Response) -> EndpointError:
    """RunPod's own sentences, or what the status means."""
    told: Any = {}
    with contextlib.suppress(ValueError):
        told = answer.json()
    told = told if isinstance(told, dict) else {}
    parts = [told.get("detail") or told.get("title") or f"RunPod answered {answer.status_code}"]
    parts += told.get("errors") or ()
    message = _one_line("; ".join(str(part) for part in parts))
    if answer.status_code in (401, 403):
        return EndpointError(
            "ENDPOINT_REFUSED",
            message,
            hint="the key must be one of RunPod's API keys that may change endpoints and volumes: console, Settings",
        )
    if answer.status_code == 404:
        return EndpointError("ENDPOINT_NOT_FOUND", message)
    if answer.status_code == _TOO_MANY or answer.is_server_error:
        return EndpointError("ENDPOINT_UNREACHABLE", message, retryable=True)
    return EndpointError("RUNPOD_REFUSED", message)


def _unreachable(error: httpx.HTTPError) -> EndpointError:
    return EndpointError("ENDPOINT_UNREACHABLE", f"RunPod gives no answer ({type(error).__name__})", retryable=True)


def _one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)[:1000]


def _retry_after(answer: httpx.Response) -> float:
    text = answer.headers.get("retry-after", "")
    return float(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0.0


def _read_events(lines: Iterator[str]) -> Iterator[LogLine]:
    """Server-sent events whose data is `{"source": …, "line": …, "ts": …}`."""
    for line in lines:
        if not line.startswith("data:"):
            continue
        with contextlib.suppress(ValueError):
            event = json.loads(line.removeprefix("data:"))
            if isinstance(event, dict):
                yield LogLine(str(event.get("ts", "")), str(event.get("source", "")), str(event.get("line", "")))


def hourly_price(gpu: Mapping[str, Any]) -> float | None:
    """Dollars an hour of one worker with this GPU; None if the catalog does not say.

    The schema names no unit. RunPod's pages give serverless prices by the second, the largest 0.0024; an hour of the
    smallest GPU costs 0.58 (August 2026). So a price below 0.02 is one of a second.
    """
    price = gpu.get("price", {}).get("serverless")
    if not isinstance(price, int | float) or price <= 0:
        return None
    return float(price) if price >= 0.02 else float(price) * 3600


def stock_of(found: Sequence[Mapping[str, Any]], wanted: str) -> str:
    """How many there are of the resource with this id: NONE, LOW, MEDIUM or HIGH."""
    return next((str(item.get("availability", "NONE")) for item in found if item.get("id") == wanted), "NONE")

"""RunPod's management API in memory. Every request and every answer is held to RunPod's own schema."""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Mapping
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from sandbox.server import Exchange, Server
from tests.support import DATA

KEY = "rpa_the-runpod-key"
API: dict[str, Any] = json.loads((DATA / "runpod" / "openapi-v2.json").read_bytes())
REGISTRY: Registry[Any] = Registry().with_resource("urn:runpod", DRAFT202012.create_resource(API))


def errors_of(schema: Mapping[str, Any], value: Any) -> list[str]:
    """What is wrong with a value by a schema of the document."""
    return [
        f"{'/'.join(map(str, error.path))}: {error.message}"
        for error in Draft202012Validator(_absolute(schema), registry=REGISTRY).iter_errors(value)
    ]


def _absolute(schema: Any) -> Any:
    """The schema with references that are found from anywhere."""
    if isinstance(schema, dict):
        return {name: f"urn:runpod{value}" if name == "$ref" else _absolute(value) for name, value in schema.items()}
    return [_absolute(item) for item in schema] if isinstance(schema, list) else schema


class RunPodPlatform(Server):
    """Endpoints and volumes. `fail("POST", "/v2/serverless", 500)` spoils the next such request."""

    def __init__(self, jobs_url: str = "https://api.runpod.ai/v2") -> None:
        super().__init__()
        self.jobs_url = jobs_url
        self.endpoints: dict[str, dict[str, Any]] = {}
        self.volumes: dict[str, dict[str, Any]] = {}
        self.workers: list[dict[str, Any]] = []
        self.log_lines: dict[str, list[str]] = {}
        self.log_goes_on = True  # as at RunPod; False: the stream ends with its last line
        self.gpus = [
            gpu("NVIDIA GeForce RTX 4090", "ADA_24", 1.12),
            gpu("NVIDIA L4", "AMPERE_24", 0.69),
            gpu("NVIDIA GeForce RTX 3090", "AMPERE_24", 0.00019),  # a price by the second
            gpu("Tesla V100", None, 0.5),
        ]
        self.data_centers = [center("EU-RO-1"), center("US-TX-3"), center("EU-SE-1", volumes=False)]
        self.invalid: list[str] = []  # what the schema says against requests and answers
        self._faults: list[tuple[str, str, int | str]] = []

    def fail(self, method: str, path: str, what: int | str, times: int = 1) -> None:
        """What happens to the next requests: a status, "cut" (before it is done) or "lost" (after it is done)."""
        self._faults += [(method, path, what)] * times

    def changes(self) -> list[tuple[str, str]]:
        """Every request that changes something, in order."""
        return [(asked.method, asked.path) for asked in self.asked if asked.method != "GET"]

    def answer(self, exchange: Exchange) -> None:
        asked = exchange.asked
        if asked.headers.get("authorization") != f"Bearer {KEY}":
            self._problem(exchange, 401, "the API key is not known")
            return
        fault = next((fault for fault in self._faults if fault[:2] == (asked.method, asked.path)), None)
        if fault is not None:
            self._faults.remove(fault)
            if isinstance(fault[2], int):
                self._problem(exchange, fault[2], "out of order", {"retry-after": "0"})
                return
        template, names = self._match(asked.path)
        operation = API["paths"].get(template, {}).get(asked.method.lower())
        if operation is None:
            self.invalid.append(f"{asked.method} {asked.path}: the API has no such route")
            self._problem(exchange, 404, "no such route")
            return
        if complaints := self._complaints(operation, exchange):
            self.invalid += complaints
            self._problem(exchange, 422, "the request is not valid", errors=complaints)
            return
        if fault is not None and fault[2] == "cut":
            exchange.cut()
            return
        if template.endswith("/logs"):
            self._stream(exchange, names[1])
            return
        status, value = self._do(asked.method, template, names, json.loads(asked.body or b"null"))
        if fault is not None:
            exchange.cut()
        elif status >= 400:
            self._problem(exchange, status, str(value))
        else:
            self._send(exchange, operation, status, value)

    def _match(self, path: str) -> tuple[str, list[str]]:
        for template in API["paths"]:
            pattern = re.sub(r"\{\w+\}", "([^/]+)", template)
            if match := re.fullmatch(pattern, path):
                return template, [urllib.parse.unquote(name) for name in match.groups()]
        return "", []

    def _complaints(self, operation: Mapping[str, Any], exchange: Exchange) -> list[str]:
        asked = exchange.asked
        where = f"{asked.method} {asked.path}"
        declared = {}
        for parameter in operation.get("parameters", ()):
            if "$ref" in parameter:
                parameter = API["components"]["parameters"][parameter["$ref"].rpartition("/")[2]]
            declared[parameter["name"]] = parameter["schema"]
        complaints = [f"{where}: no parameter {name}" for name in asked.query if name not in declared]
        for name, text in asked.query.items():
            kind = declared.get(name, {}).get("type")
            value: Any = text.split(",") if kind == "array" else int(text) if kind == "integer" else text
            complaints += [f"{where}?{name}: {error}" for error in errors_of(declared.get(name, {}), value)]
        body = operation.get("requestBody")
        if body is None:
            return complaints + ([f"{where}: takes no body"] if asked.body else [])
        schema = body["content"]["application/json"]["schema"]
        return complaints + [f"{where}: {error}" for error in errors_of(schema, json.loads(asked.body))]

    def _do(self, method: str, template: str, names: list[str], body: Any) -> tuple[int, Any]:
        if template == "/v2/catalog/gpus":
            return 200, {"gpus": self.gpus}
        if template == "/v2/catalog/datacenters":
            return 200, {"dataCenters": self.data_centers}
        if template.startswith("/v2/network-volumes"):
            return self._volumes(method, names, body)
        if template.endswith("/workers"):
            counts = dict.fromkeys(("running", "idle", "initializing", "throttled", "unhealthy"), 0)
            for worker in self.workers:
                counts[worker["status"].lower()] += 1
            return 200, {"workers": self.workers, "summary": {**counts, "total": len(self.workers)}}
        return self._endpoints(method, names, body)

    def _volumes(self, method: str, names: list[str], body: Any) -> tuple[int, Any]:
        if names and names[0] not in self.volumes:
            return 404, "no such volume"
        if method == "POST":
            made = {"type": "STANDARD", **body, "id": f"vol{len(self.volumes) + 1}"}
            self.volumes[made["id"]] = made
            return 201, made
        if method == "DELETE":
            del self.volumes[names[0]]
            return 204, None
        return 200, self.volumes[names[0]] if names else {"networkVolumes": list(self.volumes.values())}

    def _endpoints(self, method: str, names: list[str], body: Any) -> tuple[int, Any]:
        if names and names[0] not in self.endpoints:
            return 404, "no such endpoint"
        if method == "POST":
            if refusal := self._refusal(body):
                return refusal
            made = self._made(f"ep{len(self.endpoints) + 1}", body)
            self.endpoints[made["id"]] = made
            return 201, made
        if method == "PATCH":
            changed = {**self.endpoints[names[0]], **body}
            changed["workers"] = {**self.endpoints[names[0]]["workers"], **body.get("workers", {})}
            if changed["scaling"]["type"] == "REQUEST_COUNT" and "idleTimeout" in body.get("workers", {}):
                return 400, "idleTimeout cannot be combined with REQUEST_COUNT"
            changed["gpu"] = {**self.endpoints[names[0]]["gpu"], **body.get("gpu", {})}
            self.endpoints[names[0]] = changed
            return 200, changed
        if method == "DELETE":
            del self.endpoints[names[0]]
            return 204, None
        return 200, self.endpoints[names[0]] if names else {"endpoints": list(self.endpoints.values())}

    def _refusal(self, body: Mapping[str, Any]) -> tuple[int, str] | None:
        """The rules that the pages tell, and no schema can."""
        if ("gpu" in body) == ("cpu" in body):
            return 400, "exactly one of gpu and cpu"
        if {"allowedCudaVersions", "minCudaVersion"} <= set(body["gpu"]):
            return 400, "allowedCudaVersions cannot be combined with minCudaVersion"
        if body["scaling"]["type"] == "REQUEST_COUNT" and "idleTimeout" in body.get("workers", {}):
            return 400, "idleTimeout cannot be combined with REQUEST_COUNT"
        for volume in body.get("networkVolumes", ()):
            if volume not in self.volumes:
                return 404, f"no network volume {volume}"
            if self.volumes[volume]["dataCenter"] not in body.get("dataCenterIds", ()):
                return 400, "the network volume is in another data center"
        return None

    def _made(self, id: str, body: Mapping[str, Any]) -> dict[str, Any]:
        routes = {name: name.lower() for name in ("run", "runSync", "status", "stream", "cancel", "retry", "health")}
        return {
            "dataCenterIds": [],
            "networkVolumes": [],
            "flashboot": "OFF",
            "timeout": 300_000,
            **body,
            "id": id,
            "gpu": {"allowedCudaVersions": [], "minCudaVersion": None, **body["gpu"]},
            "workers": {"min": 0, "max": 3, **body.get("workers", {})},
            "createdAt": "2026-11-21T20:00:00Z",
            "requestUrls": {
                "purgeQueue": f"{self.jobs_url}/{id}/purge-queue",
                **{name: f"{self.jobs_url}/{id}/{route}" for name, route in routes.items()},
            },
        }

    def _send(self, exchange: Exchange, operation: Mapping[str, Any], status: int, value: Any) -> None:
        response = operation["responses"][str(status)]
        if "content" in response:
            complaints = errors_of(response["content"]["application/json"]["schema"], value)
            self.invalid += [f"the answer of {exchange.asked.path}: {error}" for error in complaints]
            exchange.send_json(status, value)
        else:
            exchange.send(status)

    def _problem(
        self,
        exchange: Exchange,
        status: int,
        detail: str,
        headers: Mapping[str, str] | None = None,
        errors: list[str] | None = None,
    ) -> None:
        value = {"title": "Problem", "status": status, "detail": detail, **({"errors": errors} if errors else {})}
        assert errors_of({"$ref": "#/components/schemas/ErrorResponse"}, value) == []
        exchange.send_json(status, value, {"content-type": "application/problem+json", **(headers or {})})

    def _stream(self, exchange: Exchange, worker: str) -> None:
        lines = self.log_lines.get(worker)
        if lines is None:
            self._problem(exchange, 404, "no such worker")
            return
        exchange.begin(200, {"content-type": "text/event-stream"})
        tail = int(exchange.asked.query.get("tail", 100))
        exchange.write(b": welcome\n\n")
        for number, line in list(enumerate(lines))[len(lines) - tail :]:
            at = f"2026-11-21T20:00:{number:02}Z"
            event = json.dumps({"source": "container", "line": line, "ts": at})
            exchange.write(f"id: {at}\ndata: {event}\n\n".encode())
        exchange.flush()
        if self.log_goes_on:
            exchange.hold()


def gpu(name: str, pool: str | None, price: float, *, stock: str = "HIGH", cuda: str = "12.8") -> dict[str, Any]:
    return {
        "id": name,
        "name": name.rpartition(" ")[2],
        "pool": pool,
        "manufacturer": "NVIDIA",
        "memory": 24,
        "secure": True,
        "community": True,
        "price": {"secure": 0.69, "community": 0.34, "serverless": price},
        "maxCount": {"secure": 8, "community": 8},
        "availability": stock,
        "cudaVersions": [{"version": "12.4", "available": True}, {"version": cuda, "available": True}],
    }


def center(name: str, *, volumes: bool = True, stock: str = "HIGH") -> dict[str, Any]:
    cards = ("NVIDIA GeForce RTX 4090", "NVIDIA L4", "NVIDIA GeForce RTX 3090")
    return {
        "id": name,
        "name": name,
        "region": "EUROPE",
        "globalNetwork": True,
        "networkVolumeTypes": ["STANDARD"] if volumes else [],
        "compliance": [],
        "gpuAvailability": [{"id": card, "name": card, "availability": stock} for card in cards],
    }


def worker(id: str, status: str = "RUNNING", **more: Any) -> dict[str, Any]:
    known = {"gpuTypeId": "NVIDIA L4", "dataCenterId": "EU-RO-1", "uptimeSeconds": 125}
    return {"id": id, "status": status, "gpuCount": 1, "isStale": False, **known, **more}

"""A small CivitAI: metadata and links on one origin, files on another. It fails only on request.

    with SandboxCivitAI(key="sandbox") as civitai:
        civitai.add(135867, path, name="Detail Tweaker XL", base_model="SDXL 1.0")
        civitai.fail(TOO_MANY, on="/api/download/")
        civitai.storage.cut_after = [300_000]

`python -m sandbox.civitai VERSION=FILE…` starts it as a separate process, for measurements.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict
from urllib.parse import urlencode

from sandbox.server import Exchange, ReceivedRequest
from sandbox.storage import (
    CUT,
    DOWNLOAD_CAP,
    EXPIRED_B2,
    EXPIRED_R2,
    HTML_PAGE,
    NOT_SATISFIABLE,
    RESET,
    SILENCE,
    SLOW_DOWN,
    STORE_ERROR,
    FaultyServer,
    SandboxStorage,
    ServerFault,
    StorageForm,
    answer_fault,
    html_fault,
    json_fault,
    redirect,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "ARCHIVED",
    "BAD_REQUEST",
    "CLOUDFLARE_522",
    "CUT",
    "DOWNLOADS_DISABLED",
    "DOWNLOAD_CAP",
    "EARLY_ACCESS",
    "EXPIRED_B2",
    "EXPIRED_R2",
    "FORBIDDEN",
    "HTML_PAGE",
    "LOGIN_REQUIRED",
    "NOT_FOUND",
    "NOT_SATISFIABLE",
    "NO_MODEL",
    "PRIVATE",
    "REGION_BLOCKED",
    "RESET",
    "SERVER_ERROR",
    "SILENCE",
    "SLOW_DOWN",
    "STORE_ERROR",
    "TOO_MANY",
    "HostedFile",
    "HostedVersion",
    "SandboxCivitAI",
    "SandboxStorage",
    "ServerFault",
    "Upload",
    "html_fault",
    "json_fault",
    "redirect",
    "too_many",
]

# The API's refusals, in the order in which it checks for them.
REGION_BLOCKED = json_fault(
    451, {"error": "Civitai is not available in your region", "code": "REGION_BLOCKED"}
)  # for any path under /api, to clients in GB or AU
FORBIDDEN = json_fault(403, {"error": "Forbidden"})
TOO_MANY = json_fault(
    429,
    {
        "error": "We've noticed an unusual amount of downloading from your account. "
        "Contact support@civitai.com or come back later."
    },
)
BAD_REQUEST = json_fault(400, {"error": "Invalid id: Expected number, received nan"})
NOT_FOUND = json_fault(404, {"error": "File not found"})
NO_MODEL = json_fault(404, {"error": "Model not found"})
ARCHIVED = json_fault(410, {"error": "Model archived, not available for download"})
DOWNLOADS_DISABLED = json_fault(
    401, {"error": "Unauthorized", "message": "The creator of this asset has disabled downloads on this file"}
)
LOGIN_REQUIRED = json_fault(
    401, {"error": "Unauthorized", "message": "The creator of this asset requires you to be logged in to download it"}
)
PRIVATE = json_fault(403, {"error": "Forbidden", "message": "You do not have access to this model version"})
SERVER_ERROR = json_fault(500, {"error": "Internal server error"})
CLOUDFLARE_522 = html_fault(522, "civitai.com | 522: Connection timed out")


def early_access(deadline: str) -> ServerFault:
    return json_fault(
        403,
        {
            "error": "Early Access",
            "deadline": deadline,
            "message": "This asset is in Early Access. You can use Buzz access it now!",
        },
    )


EARLY_ACCESS = early_access("2027-01-31T00:00:00.000Z")


def too_many(retry_after: int | str) -> ServerFault:
    """429 with Retry-After, as from a proxy in front of CivitAI. CivitAI itself never sends this header."""
    return dataclasses.replace(TOO_MANY, headers={**TOO_MANY.headers, "retry-after": str(retry_after)})


_TYPES = (
    *("Model", "Pruned Model", "VAE", "Text Encoder", "UNet", "Diffusion Model"),
    *("Config", "Archive", "Training Data", "Negative"),
)
_FORMATS = ("SafeTensor", "PickleTensor", "GGUF", "Diffusers", "Core ML", "ONNX", "Other")
_SIZES = ("full", "pruned")
_BROWSERS = ("mozilla", "chrome", "safari", "firefox", "opera", "edge")


@dataclass
class HostedFile:
    """One file of a version. `sha256`: None is the file's own, "" is not scanned yet, any other value is reported."""

    id: int
    path: Path
    name: str
    key: str  # where the storage keeps it
    type: str = "Model"
    format: str = "SafeTensor"
    size: str | None = None
    fp: str | None = None
    primary: bool = True
    sha256: str | None = None
    size_kb: float | None = None  # None = the file's own
    pickle_scan: str = "Success"
    virus_scan: str = "Success"
    _hashes: tuple[tuple[int, int], dict[str, str]] | None = field(default=None, repr=False)

    def hashes(self) -> dict[str, str]:
        if self.sha256 == "":
            return {}
        if self.sha256 is not None:
            return {"AutoV2": self.sha256[:10].upper(), "SHA256": self.sha256.upper()}
        stat = self.path.stat()
        state = (stat.st_size, stat.st_mtime_ns)
        if self._hashes is None or self._hashes[0] != state:
            self._hashes = (state, _hashes_of(self.path))
        return self._hashes[1]


@dataclass
class HostedVersion:
    """A version of a model at CivitAI. The answers follow its fields, which a test may change."""

    id: int
    model_id: int
    name: str
    version_name: str
    base_model: str
    model_type: str
    trained_words: tuple[str, ...]
    files: list[HostedFile]
    status: str = "Published"  # anything else: 404
    availability: str = "Public"  # Unsearchable, Private, EarlyAccess
    usage_control: str = "Download"  # "Generation": downloads are disabled
    early_access_ends: str | None = None
    archived: bool = False
    published_at: str = "2024-03-05T10:00:00.000Z"
    nsfw: bool = False

    def air(self) -> str:
        ecosystem = {"SD 1.5": "sd1", "Flux.1 D": "flux1"}.get(self.base_model, "sdxl")
        return f"urn:air:{ecosystem}:{self.model_type.lower()}:civitai:{self.model_id}@{self.id}"


class Upload(TypedDict, total=False):
    """What `SandboxCivitAI.add` may be given about a file, and about its version if this is its first file."""

    # of the version
    name: str
    version_name: str
    base_model: str
    model_type: str
    model_id: int | None
    trained_words: Sequence[str]
    # of the file
    file_id: int | None
    file_name: str | None
    type: str
    format: str
    size: str | None
    fp: str | None
    primary: bool | None  # None: the first file of a version is the primary one
    sha256: str | None  # as in HostedFile


class SandboxCivitAI(FaultyServer):
    """The API's origin. It starts and stops its `storage` too, unless it was given one.

    `key`: a download must send it as `Authorization: Bearer`. None: no key is required.
    `fail(ServerFault(…))` spoils the next answers: `on="/api/download/"` for links, `on="/api/v1/"` for metadata.
    `redirects`: the next links go through this many redirects on this origin first, one entry per link; -1 is a circle.
    `quota`: after this many links every further one is a 429.
    `public_url`: the origin in metadata, if it is not the server's own.

    It remembers `resolves` (the number of links given, by version id; `links_given` is their sum) and `metadata_asked`
    (the number of requests for metadata).
    """

    def __init__(
        self,
        *,
        key: str | None = None,
        port: int = 0,
        storage: SandboxStorage | None = None,
        storage_port: int = 0,
        form: StorageForm = "r2",
    ) -> None:
        super().__init__(port)
        self.key = key
        self.storage = storage or SandboxStorage(form=form, port=storage_port)
        self._owns_storage = storage is None
        if key:
            self.storage.secret = key
        self.versions: dict[int, HostedVersion] = {}
        self.redirects: list[int] = []
        self.quota: int | None = None
        self.public_url: str | None = None
        self.resolves: Counter[int] = Counter()
        self.metadata_asked = 0

    @property
    def links_given(self) -> int:
        return sum(self.resolves.values())

    def start(self) -> None:
        if self._owns_storage:
            self.storage.start()
        super().start()

    def stop(self) -> None:
        super().stop()
        if self._owns_storage:
            self.storage.stop()

    def add(self, version_id: int, path: Path, **about: Unpack[Upload]) -> HostedVersion:
        """Serve a file as a version, or as one more file of a version.

        Its size is the file's own. So are its hashes, unless `sha256` is given.
        """
        if unknown := about.keys() - Upload.__annotations__.keys():
            raise TypeError(f"an upload has no {', '.join(sorted(unknown))}")
        version = self.versions.get(version_id)
        if version is None:
            version = self.versions[version_id] = _new_version(version_id, about)
        version.files.append(self._new_file(version, path, about))
        return version

    def _new_file(self, version: HostedVersion, path: Path, about: Upload) -> HostedFile:
        is_primary = about.get("primary")
        return HostedFile(
            id=about.get("file_id") or version.id * 10 + len(version.files),
            path=path,
            name=about.get("file_name") or path.name,
            key=self.storage.put(path, file_name=about.get("file_name")),
            type=about.get("type", "Model"),
            format=about.get("format", "SafeTensor"),
            size=about.get("size"),
            fp=about.get("fp"),
            primary=not version.files if is_primary is None else is_primary,
            sha256=about.get("sha256"),
        )

    def replace(self, version_id: int, path: Path) -> None:
        """Serve other bytes as the first file of a version from now on. The metadata does not change."""
        file = self.versions[version_id].files[0]
        file.sha256 = file.hashes().get("SHA256", "")
        file.size_kb = file.path.stat().st_size / 1024
        self.storage.replace(file.key, path)

    def download_url(self, version_id: int, **query: object) -> str:
        """The URL that a person copies: `civitai.download_url(135867, type="Model", format="SafeTensor")`."""
        url = f"{self.public_url or self.url}/api/download/models/{version_id}"
        return f"{url}?{urlencode(query)}" if query else url

    def answer(self, exchange: Exchange) -> None:
        asked = exchange.asked
        if asked.path == "/_counters":  # for measurements from another process
            exchange.send_json(200, self.counters())
            return
        fault = self._next_fault(asked.path)
        if fault is not None and answer_fault(exchange, fault):
            return
        if match := re.fullmatch(r"/api/download/models/([^/]+)", asked.path):
            self._download(exchange, match[1])
        elif match := re.fullmatch(r"/api/hops/(-?\d+)/(\d+)", asked.path):
            self._hop(exchange, int(match[1]), int(match[2]))
        elif asked.path.startswith("/api/v1/"):
            self._metadata(exchange)
        elif asked.path == "/login":
            answer_fault(exchange, HTML_PAGE)
        else:
            answer_fault(exchange, html_fault(404, "Page not found"))

    def counters(self) -> dict[str, Any]:
        return {
            "links_given": self.links_given,
            "metadata_asked": self.metadata_asked,
            "bytes_sent": self.storage.bytes_sent,
            "connections": sum(self.storage.connections.values()),
            "peak_connections": self.storage.peak_connections,
            "data_requests": len(self.storage.ranges),
        }

    # Links

    def _download(self, exchange: Exchange, version_id: str) -> None:
        asked = exchange.asked
        refusal, file = self._check_download(asked, version_id)
        if refusal is LOGIN_REQUIRED and _is_browser(asked):
            query = urlencode({"reason": "download-auth", "returnUrl": f"/model-versions/{version_id}"})
            refusal = redirect(f"/login?{query}")
        if refusal is not None or file is None:
            answer_fault(exchange, refusal or NOT_FOUND)
            return
        with self._lock:
            self.resolves[int(version_id)] += 1
            hops = self.redirects.pop(0) if self.redirects else 0
        if hops:
            answer_fault(exchange, redirect(f"{self.url}/api/hops/{hops}/{file.id}"))
        else:
            answer_fault(exchange, redirect(self.storage.sign(file.key)))

    def _check_download(self, asked: ReceivedRequest, version_id: str) -> tuple[ServerFault | None, HostedFile | None]:
        """Why the request is refused, or the file that it asks for. The order is that of CivitAI's own code."""
        if self.quota is not None and self.links_given >= self.quota:
            return TOO_MANY, None
        allowed = {"type": _TYPES, "format": _FORMATS, "size": _SIZES}
        if not version_id.isdigit() or any(
            asked.query.get(name, values[0]) not in values for name, values in allowed.items()
        ):
            return BAD_REQUEST, None
        version = self.versions.get(int(version_id))
        if version is None or version.status != "Published":
            return NOT_FOUND, None
        if version.archived:
            return ARCHIVED, None
        file = _choose(version.files, asked.query)
        if file is None:
            return NOT_FOUND, None
        if version.usage_control != "Download":
            return DOWNLOADS_DISABLED, None
        if not self._is_logged_in(asked):
            return LOGIN_REQUIRED, None
        if version.availability == "EarlyAccess":
            return early_access(version.early_access_ends or "2027-01-31T00:00:00.000Z"), None
        if version.availability == "Private":
            return PRIVATE, None
        return None, file

    def _is_logged_in(self, asked: ReceivedRequest) -> bool:
        """The header takes precedence over `?token=`: with a wrong header, the right token does not help."""
        header = asked.headers.get("authorization")
        given = asked.query.get("token") if header is None else header.removeprefix("Bearer ")
        return self.key is None or given == self.key

    def _hop(self, exchange: Exchange, hops: int, file_id: int) -> None:
        """One redirect of a chain of `hops`. -1 leads to itself for ever."""
        if hops == 1:
            key = next(file.key for version in self.versions.values() for file in version.files if file.id == file_id)
            answer_fault(exchange, redirect(self.storage.sign(key)))
        else:
            answer_fault(exchange, redirect(f"{self.url}/api/hops/{hops if hops < 0 else hops - 1}/{file_id}"))

    # Metadata

    def _metadata(self, exchange: Exchange) -> None:
        asked, path = exchange.asked, exchange.asked.path.removeprefix("/api/v1/")
        with self._lock:
            self.metadata_asked += 1
        if asked.method == "POST" and path == "model-versions/by-hash":
            exchange.send_json(200, [self._version_json(found) for found in self._by_hash(*asked.json())])
            return
        if asked.method != "GET":
            exchange.send_json(405, {"error": "Method not allowed"})
            return
        answer: Any = None
        if match := re.fullmatch(r"model-versions/by-hash/(\w+)", path):
            answer = next((self._version_json(found) for found in self._by_hash(match[1])), None)
        elif match := re.fullmatch(r"(models|model-versions|model-versions/mini)/([^/]+)", path):
            if not match[2].isdigit():
                answer_fault(exchange, BAD_REQUEST)
                return
            answer = {"models": self._model_json, "model-versions": self._version_by_id}.get(match[1], self._mini)(
                int(match[2]), asked.query
            )
        if answer is None:
            answer_fault(exchange, NO_MODEL)
        else:
            exchange.send_json(200, answer, {"cache-control": "public, s-maxage=300, stale-while-revalidate=150"})

    def _published(self, version_id: int) -> HostedVersion | None:
        version = self.versions.get(version_id)
        return version if version and version.status == "Published" else None

    def _by_hash(self, *hashes: str) -> Iterator[HostedVersion]:
        """For each hash the oldest version with a file that has it."""
        for hash_ in hashes:
            found = (
                version
                for _, version in sorted(self.versions.items())
                if any(hash_.upper() in file.hashes().values() for file in version.files)
            )
            yield from list(found)[:1]

    def _version_by_id(self, version_id: int, query: Mapping[str, str]) -> dict[str, Any] | None:
        version = self._published(version_id)
        return self._version_json(version) if version else None

    def _version_json(self, version: HostedVersion) -> dict[str, Any]:
        return {
            "id": version.id,
            "modelId": version.model_id,
            "name": version.version_name,
            "nsfwLevel": 1,
            "createdAt": version.published_at,
            "updatedAt": version.published_at,
            "status": version.status,
            "publishedAt": version.published_at,
            "trainedWords": list(version.trained_words),
            "trainingStatus": None,
            "trainingDetails": None,
            "baseModel": version.base_model,
            "baseModelType": "Standard",
            "earlyAccessEndsAt": version.early_access_ends,
            "earlyAccessConfig": None,
            "paidAccess": None,
            "description": None,
            "uploadType": "Created",
            "usageControl": version.usage_control,
            "air": version.air(),
            "availability": version.availability,
            "stats": {"downloadCount": 0, "ratingCount": 0, "rating": 0, "thumbsUpCount": 0},
            "model": {
                "name": version.name,
                "type": version.model_type,
                "nsfw": version.nsfw,
                "poi": False,
                **({"mode": "Archived"} if version.archived else {}),
            },
            "files": [] if version.archived else [self._file_json(version, file) for file in version.files],
            "images": [],
            "downloadUrl": self.download_url(version.id),
        }

    def _file_json(self, version: HostedVersion, file: HostedFile) -> dict[str, Any]:
        variant = {"type": file.type, "format": file.format, "size": file.size, "fp": file.fp}
        return {
            "id": file.id,
            "sizeKB": file.path.stat().st_size / 1024 if file.size_kb is None else file.size_kb,
            "name": file.name,
            "type": file.type,
            "pickleScanResult": file.pickle_scan,
            "pickleScanMessage": "No Pickle imports" if file.pickle_scan == "Success" else None,
            "virusScanResult": file.virus_scan,
            "virusScanMessage": None,
            "scannedAt": version.published_at,
            "metadata": {"format": file.format, "size": file.size, "fp": file.fp},
            "hashes": file.hashes(),
            **({"primary": True} if file.primary else {}),
            "downloadUrl": self.download_url(
                version.id, **({} if file.primary else {name: value for name, value in variant.items() if value})
            ),
        }

    def _mini(self, version_id: int, query: Mapping[str, str]) -> dict[str, Any] | None:
        version = self._published(version_id)
        file_id = query.get("modelFileId")
        file = version and _choose(version.files, {"fileId": file_id} if file_id else {})
        if not version or not file or version.archived:
            return None
        return {
            "air": version.air(),
            "versionName": version.version_name,
            "modelName": version.name,
            "baseModel": version.base_model,
            "availability": version.availability,
            "publishedAt": version.published_at,
            "size": file.path.stat().st_size / 1024 if file.size_kb is None else file.size_kb,
            "fileName": file.name,
            "hashes": file.hashes(),
            "downloadUrls": [self.download_url(version.id, fileId=file.id)],
            "format": file.format,
            "canGenerate": False,
            "requireAuth": self.key is not None,
            "checkPermission": version.availability in ("EarlyAccess", "Private"),
            "earlyAccessEndsAt": version.early_access_ends,
            "freeTrialLimit": None,
        }

    def _model_json(self, model_id: int, query: Mapping[str, str]) -> dict[str, Any] | None:
        """The model with its versions, newest first."""
        versions = [
            version
            for _, version in sorted(self.versions.items(), reverse=True)
            if version.model_id == model_id and version.status == "Published"
        ]
        if not versions:
            return None
        return {
            "id": model_id,
            "name": versions[0].name,
            "description": None,
            "type": versions[0].model_type,
            "poi": False,
            "nsfw": versions[0].nsfw,
            "nsfwLevel": 1,
            "availability": "Public",
            "mode": "Archived" if versions[0].archived else None,
            "creator": {"username": "sandbox", "image": None},
            "tags": [],
            "modelVersions": [
                {
                    "index": index,
                    **{name: value for name, value in self._version_json(version).items() if name != "model"},
                }
                for index, version in enumerate(versions)
            ],
        }


def _new_version(version_id: int, about: Upload) -> HostedVersion:
    return HostedVersion(
        id=version_id,
        model_id=about.get("model_id") or version_id + 1_000_000,
        name=about.get("name", "A model"),
        version_name=about.get("version_name", "v1.0"),
        base_model=about.get("base_model", "SDXL 1.0"),
        model_type=about.get("model_type", "LORA"),
        trained_words=tuple(about.get("trained_words", ())),
        files=[],
    )


def _is_browser(asked: ReceivedRequest) -> bool:
    agent = asked.headers.get("user-agent", "").lower()
    return any(browser in agent for browser in _BROWSERS)


def _choose(files: Sequence[HostedFile], query: Mapping[str, str]) -> HostedFile | None:
    """The file with this `fileId`. Without one: a file that fits every filter exactly, the primary file if it fits."""
    if "fileId" in query:
        return next((file for file in files if str(file.id) == query["fileId"]), None)
    fitting = [
        file
        for file in files
        if all(query.get(name) in (None, getattr(file, name)) for name in ("type", "format", "size", "fp"))
    ]
    return min(fitting, key=lambda file: not file.primary, default=None)


def _hashes_of(path: Path) -> dict[str, str]:
    """By CivitAI's own names. AutoV3 is A1111's hash of the tensors of a safetensors file."""
    whole, tensors, crc, position = hashlib.sha256(), hashlib.sha256(), 0, 0
    with path.open("rb") as file:
        file.seek(0x100000)
        old = hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
        file.seek(0)
        header = file.read(8)
        start = 8 + struct.unpack("<Q", header)[0] if len(header) == 8 else 0
        file.seek(0)
        while piece := file.read(1 << 20):
            whole.update(piece)
            crc = zlib.crc32(piece, crc)
            if position + len(piece) > start:
                tensors.update(memoryview(piece)[max(0, start - position) :])
            position += len(piece)
    sha256 = whole.hexdigest()
    hashes = {"AutoV1": old, "AutoV2": sha256[:10], "SHA256": sha256, "CRC32": f"{crc:08x}"}
    if path.suffix == ".safetensors":
        hashes["AutoV3"] = tensors.hexdigest()[:12]
    return {name: value.upper() for name, value in hashes.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve files until standard input ends. Prints the URLs as one line of JSON; GET /_counters counts requests."""
    parser = argparse.ArgumentParser(prog="python -m sandbox.civitai", description=main.__doc__)
    parser.add_argument("files", nargs="+", metavar="VERSION=FILE")
    parser.add_argument("--key")
    parser.add_argument("--form", choices=("r2", "b2"), default="r2")
    parser.add_argument("--rate", type=float, help="bytes per second of each connection")
    parser.add_argument("--total-rate", type=float, help="bytes per second of all connections together")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer of the storage")
    parser.add_argument("--reset-every", type=int, help="RST each time this many more bytes were sent")
    parser.add_argument("--unhashed", action="store_true", help="publish no hashes, and compute none")
    options = parser.parse_args(arguments)
    with SandboxCivitAI(key=options.key, form=options.form) as civitai:
        storage = civitai.storage
        storage.rate, storage.total_rate = options.rate, options.total_rate
        storage.latency, storage.reset_every = options.latency, options.reset_every
        for pair in options.files:
            version_id, _, path = pair.partition("=")
            civitai.add(int(version_id), Path(path), sha256="" if options.unhashed else None)
        print(json.dumps({"api": civitai.url, "storage": storage.url}), flush=True)
        while sys.stdin.read(1):
            pass


if __name__ == "__main__":
    main()

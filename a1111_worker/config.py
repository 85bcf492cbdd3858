"""The environment, read once: the only module that knows the names of variables.

`SETTINGS` lists every variable with its default, as docs/subsystems/container-management.md does (a test compares
them). `Config.from_env` parses all of them and refuses to start on a bad value with one line a variable.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from a1111_worker import catalog
from a1111_worker.domain import BucketSettings
from a1111_worker.errors import ConfigError
from a1111_worker.origins import STORAGE_HOSTS, OriginRefused, parse_origin

T = TypeVar("T")

CIVITAI = "https://civitai.com"
CIVITAI_SECOND = "https://civitai.red"
RUNPOD_INIT_TIMEOUT = 420.0  # RunPod's own default: a worker that is not ready by then is unhealthy
SDK_LOG_LEVELS = ("NOTSET", "TRACE", "DEBUG", "INFO", "WARN", "ERROR")


@dataclass(frozen=True)
class Setting:
    """A variable as the documentation shows it. `secret` values are never printed; `reader` is who reads it."""

    name: str
    default: str
    what: str
    secret: bool = False
    reader: str = "worker"


SETTINGS = (
    Setting("WEBUI_URL", "http://127.0.0.1:3000", "the WebUI's root"),
    Setting("BOOT_TIMEOUT", "RUNPOD_INIT_TIMEOUT − 20, else 400", "seconds from start to ready, download included"),
    Setting("WEBUI_READY_TIMEOUT", "300", "seconds the WebUI alone may take to answer"),
    Setting("WEBUI_STATE_FILE", "none", "the WebUI's pid, or `failed`; written by start.sh"),
    Setting("WORKER_STATE_FILE", "none", "the worker's own state, for the health check"),
    Setting("GENERATION_TIMEOUT", "540", "seconds for one generation"),
    Setting("JOB_TIMEOUT", "570", "seconds from taking a job to its answer"),
    Setting("SHUTDOWN_GRACE", "8", "seconds between TERM and KILL"),
    Setting("MODELS_DIR", "/runpod-volume/models, /models or ./models", "the cache that is written"),
    Setting("MODEL_SOURCES", "/models", "further folders, read only, separated by `:`"),
    Setting("WEBUI_MODELS_DIR", "/tmp/webui-models", "links to proven files: what the WebUI sees"),  # noqa: S108 - a documented default
    Setting("MODEL_CACHE_LIMIT_GB", "none", "above it the least recently used models go"),
    Setting("CIVITAI_API_KEY", "none", "sent to CivitAI's API alone, as a header", secret=True),
    Setting("CIVITAI_URL", CIVITAI, "the API's origin"),
    Setting("STORAGE_HOSTS", "CivitAI's storage", "where a download may be redirected"),
    Setting("MODEL_HOSTS", "none", "further https hosts that a job's URL may name"),
    Setting("CHECKPOINT_URL", "the fixed checkpoint", "an operator's other checkpoint"),
    Setting("CHECKPOINT_FILE", catalog.CHECKPOINT_FILE, "its file name"),
    Setting("CHECKPOINT_NAME", catalog.CHECKPOINT_NAME, "its title"),
    Setting("CHECKPOINT_SHA256", "none", "64 hex digits its file must have"),
    Setting("JOBS_IN_FLIGHT", "2", "jobs a worker holds at once; one generates"),
    Setting("MAX_STEPS", "150", "steps of one job"),
    Setting("MAX_PIXELS", "4194304", "pixels of one final image, hires included"),
    Setting("MAX_IMAGES", "16", "images of one job"),
    Setting("BUCKET_ENDPOINT_URL", "none", "S3-compatible storage for results: its origin, without the bucket"),
    Setting("BUCKET_ACCESS_KEY_ID", "none", "the key's name there", secret=True),
    Setting("BUCKET_SECRET_ACCESS_KEY", "none", "the key", secret=True),
    Setting("BUCKET_NAME", "none", "the bucket; it must exist"),
    Setting("BUCKET_REGION", "us-east-1", "its region, as the storage calls it (R2: `auto`)"),
    Setting("BUCKET_PREFIX", "none", "what every key begins with, such as `a1111/prod`"),
    Setting("BUCKET_LINK_TTL", "86400", "seconds a signed link lives, 604800 at most"),
    Setting("BUCKET_PUBLIC_URL", "none", "links are this and the key, unsigned: a bucket that anyone may read"),
    Setting("WARMUP", "1", "a tiny generation before the first job"),
    Setting("WEBUI_ARGS", "none", "further flags for the WebUI", reader="start.sh"),
    Setting("ALLOW_CPU", "0", "start.sh may run without a GPU", reader="start.sh"),
    Setting("OUTPUT_DIR", "none", "a local run saves its pictures there"),
    Setting("LOG_LEVEL", "INFO", "DEBUG, INFO, WARNING or ERROR"),
    Setting("LOG_FORMAT", "text", "text or json: one object a line"),
)


@dataclass(frozen=True)
class RunPodPlatform:
    """Where RunPod listens to this worker: the address of job-done and the key it wants. None of it off RunPod."""

    output_url: str
    api_key: str


@dataclass(frozen=True)
class Config:
    """Every setting, parsed. Times are seconds, sizes bytes. Docs: docs/subsystems/container-management.md."""

    webui_url: str
    boot_timeout: float
    webui_ready_timeout: float
    webui_state_file: Path | None
    worker_state_file: Path | None
    generation_timeout: float
    job_timeout: float
    shutdown_grace: float
    models_dir: Path
    model_sources: tuple[Path, ...]
    webui_models_dir: Path
    cache_limit_bytes: int | None
    civitai_key: str | None
    civitai_urls: tuple[str, ...]
    storage_hosts: tuple[str, ...]
    model_hosts: tuple[str, ...]
    checkpoint_url: str
    checkpoint_file: str
    checkpoint_name: str
    checkpoint_sha256: str | None
    jobs_in_flight: int
    max_steps: int
    max_pixels: int
    max_images: int
    bucket: BucketSettings | None
    warmup: bool
    output_dir: Path | None
    log_level: str
    log_format: str
    runpod: RunPodPlatform | None

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Config:
        """Read every setting; an unset or empty one has its default. Raises ConfigError, one line a bad value."""
        env = _Environment(environ)
        init_timeout = env.read("RUNPOD_INIT_TIMEOUT", _seconds, RUNPOD_INIT_TIMEOUT)
        civitai_url = env.read("CIVITAI_URL", _api, CIVITAI)
        checkpoint_url = env.read("CHECKPOINT_URL", _text, catalog.CHECKPOINT_URL)
        config = cls(
            webui_url=env.read("WEBUI_URL", _url, "http://127.0.0.1:3000"),
            boot_timeout=env.read("BOOT_TIMEOUT", _seconds, max(init_timeout - 20.0, 10.0)),
            webui_ready_timeout=env.read("WEBUI_READY_TIMEOUT", _seconds, 300.0),
            webui_state_file=env.read("WEBUI_STATE_FILE", _path, None),
            worker_state_file=env.read("WORKER_STATE_FILE", _path, None),
            generation_timeout=env.read("GENERATION_TIMEOUT", _seconds, 540.0),
            job_timeout=env.read("JOB_TIMEOUT", _seconds, 570.0),
            shutdown_grace=env.read("SHUTDOWN_GRACE", _seconds, 8.0),
            models_dir=env.read("MODELS_DIR", _path, None) or default_models_dir(Path("/")),
            model_sources=_paths(environ.get("MODEL_SOURCES", "/models")),
            webui_models_dir=env.read("WEBUI_MODELS_DIR", _path, None) or Path("/tmp/webui-models"),  # noqa: S108 - a documented default
            cache_limit_bytes=env.read("MODEL_CACHE_LIMIT_GB", _gigabytes, None),
            civitai_key=env.read("CIVITAI_API_KEY", _secret, None),
            civitai_urls=(CIVITAI, CIVITAI_SECOND) if civitai_url == CIVITAI else (civitai_url,),
            storage_hosts=env.read("STORAGE_HOSTS", _hosts, STORAGE_HOSTS),
            model_hosts=env.read("MODEL_HOSTS", _hosts, ()),
            checkpoint_url=checkpoint_url,
            checkpoint_file=env.read("CHECKPOINT_FILE", _model_file, catalog.CHECKPOINT_FILE),
            checkpoint_name=env.read("CHECKPOINT_NAME", _text, catalog.CHECKPOINT_NAME),
            checkpoint_sha256=env.read("CHECKPOINT_SHA256", _sha256, None),
            jobs_in_flight=env.read("JOBS_IN_FLIGHT", _whole(1, 16), 2),
            max_steps=env.read("MAX_STEPS", _whole(1, 10_000), 150),
            max_pixels=env.read("MAX_PIXELS", _whole(64 * 64, 1 << 28), 4_194_304),
            max_images=env.read("MAX_IMAGES", _whole(1, 1000), 16),
            bucket=_bucket(env),
            warmup=env.read("WARMUP", _flag, True),
            output_dir=env.read("OUTPUT_DIR", _path, None),
            log_level=env.read("LOG_LEVEL", _one_of("DEBUG", "INFO", "WARNING", "ERROR"), "INFO"),
            log_format=env.read("LOG_FORMAT", _one_of("text", "json"), "text"),
            runpod=_runpod(environ),
        )
        if "CHECKPOINT_URL" in env.given and "CHECKPOINT_FILE" not in env.given:
            env.bad.append("CHECKPOINT_URL is set and CHECKPOINT_FILE is not: another checkpoint takes a file name too")
        if env.bad:
            raise ConfigError("\n".join(env.bad))
        return config


def prepare_sdk_environment(environ: MutableMapping[str, str]) -> None:
    """Make the SDK's own log level a sane one before it is imported (runpod 1.12, rp_logger.py): its default, DEBUG,
    logs prompts and results, and a word it does not know, such as WARNING or none at all, ends its import."""
    for name in ("RUNPOD_LOG_LEVEL", "RUNPOD_DEBUG_LEVEL"):
        level = environ.pop(name, "").strip()
        if level:  # an empty one is as good as none
            environ[name] = level if level.upper() in SDK_LOG_LEVELS else "INFO"
    environ.setdefault("RUNPOD_DEBUG_LEVEL", "INFO")


def default_models_dir(root: Path) -> Path:
    """Where the cache lies when nobody says: RunPod's network volume, else /models, else ./models."""
    volume = root / "runpod-volume"
    if volume.is_dir():
        return volume / "models"
    models = root / "models"
    return models if os.access(models if models.exists() else root, os.W_OK) else Path("models")


class _Environment:
    """Reads variables one by one and keeps every complaint."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.given: set[str] = set()
        self.bad: list[str] = []

    def read(self, name: str, parse: Callable[[str], T], default: Any) -> Any:
        value = self._environ.get(name, "").strip()
        if not value:
            return default
        self.given.add(name)
        try:
            return parse(value)
        except ValueError as takes:
            shown = "(not shown)" if any(s.name == name and s.secret for s in SETTINGS) else repr(value[:200])
            self.bad.append(f"{name}={shown}: takes {takes}")
            return default


def _bucket(env: _Environment) -> BucketSettings | None:
    """The bucket for results. All of what it takes or none of it: half a bucket would fail job after job."""
    takes = ("BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY", "BUCKET_NAME")
    bucket = BucketSettings(
        endpoint_url=env.read("BUCKET_ENDPOINT_URL", _origin, ""),
        access_key_id=env.read("BUCKET_ACCESS_KEY_ID", _secret, ""),
        secret_access_key=env.read("BUCKET_SECRET_ACCESS_KEY", _secret, ""),
        name=env.read("BUCKET_NAME", _bucket_name, ""),
        region=env.read("BUCKET_REGION", _region, BucketSettings.region),
        prefix=env.read("BUCKET_PREFIX", _key_prefix, BucketSettings.prefix),
        link_seconds=env.read("BUCKET_LINK_TTL", _whole(1, 604_800), BucketSettings.link_seconds),
        public_url=env.read("BUCKET_PUBLIC_URL", _url, None),
    )
    missing = [name for name in takes if name not in env.given]
    given = [name for name in sorted(env.given) if name.startswith("BUCKET_")]
    if given and missing:
        env.bad.append(f"{', '.join(given)} set without {', '.join(missing)}: a bucket takes all of {', '.join(takes)}")
    return bucket if given and not missing else None


def _runpod(environ: Mapping[str, str]) -> RunPodPlatform | None:
    """RunPod's own variables, as its SDK reads them (runpod 1.12, rp_http.py): `$RUNPOD_POD_ID` is filled in here,
    `$ID` stays for the job's id."""
    if not environ.get("RUNPOD_WEBHOOK_GET_JOB"):
        return None
    url = environ.get("RUNPOD_WEBHOOK_POST_OUTPUT", "").replace("$RUNPOD_POD_ID", environ.get("RUNPOD_POD_ID", ""))
    return RunPodPlatform(output_url=url, api_key=environ.get("RUNPOD_AI_API_KEY", ""))


def _seconds(value: str) -> float:
    # Not all that Python takes for a number: start.sh reads SHUTDOWN_GRACE too, and 1e1 or 1_0 is none there.
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", value) or not 0 < float(value) < 1e6:
        raise ValueError("a number of seconds above 0, such as 8 or 0.5")
    return float(value)


def _gigabytes(value: str) -> int:
    try:
        gigabytes = float(value)
    except ValueError:
        gigabytes = math.nan
    if not 0 < gigabytes < 1e6:
        raise ValueError("a number of gigabytes (10⁹ bytes) above 0")
    return int(gigabytes * 1e9)


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        if not (value.isascii() and value.isdigit() and low <= int(value) <= high):
            raise ValueError(f"a whole number from {low} to {high}")
        return int(value)

    return parse


def _flag(value: str) -> bool:
    if value.lower() not in ("0", "1", "true", "false", "yes", "no"):
        raise ValueError("1 or 0")
    return value.lower() in ("1", "true", "yes")


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        for choice in choices:
            if value.casefold() == choice.casefold():
                return choice
        raise ValueError(f"one of {', '.join(choices)}")

    return parse


def _text(value: str) -> str:
    return value


def _secret(value: str) -> str:
    if not (value.isascii() and value.isprintable()) or " " in value:
        raise ValueError("a key: printable ASCII without spaces")
    return value


def _path(value: str) -> Path:
    return Path(value)


def _paths(value: str) -> tuple[Path, ...]:
    return tuple(Path(part) for part in value.split(os.pathsep) if part.strip())


def _url(value: str) -> str:
    with contextlib.suppress(ValueError):  # a bracket that is never closed, a port that is none
        parts = urlsplit(value)
        is_plain = not (parts.query or parts.fragment or parts.username)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and is_plain:
            return value.rstrip("/")
    raise ValueError("an http(s) URL without a query")


def _origin(value: str) -> str:
    if urlsplit(_url(value)).path not in ("", "/"):
        raise ValueError("an origin: scheme, host and port, without a path")
    return value.rstrip("/")


def _api(value: str) -> str:
    if "*" in value:
        raise ValueError("one origin, not a family of them")
    return _reachable(_origin(value))


def _hosts(value: str) -> tuple[str, ...]:
    """Hosts or origins separated by commas or spaces; `cdn.example.com` means `https://cdn.example.com`."""
    hosts = tuple(host if "://" in host else f"https://{host}" for host in re.split(r"[,\s]+", value) if host)
    for host in hosts:
        parts = urlsplit(host)
        local = parts.hostname in ("127.0.0.1", "localhost")
        if parts.scheme != "https" and not (parts.scheme == "http" and local and parts.port):
            raise ValueError("https hosts, or exactly http://127.0.0.1:PORT or http://localhost:PORT")
        if not parts.hostname or parts.path not in ("", "/") or parts.query or parts.username:
            raise ValueError("hosts separated by commas, without a path")
    return tuple(_reachable(host.rstrip("/")) for host in hosts)


def _reachable(origin: str) -> str:
    """An origin as it is, if the host policy takes it."""
    try:
        parse_origin(origin)
    except OriginRefused as error:
        raise ValueError(f"hosts that can be reached: {error}") from error
    return origin


def _model_file(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}\.safetensors", value):
        raise ValueError("a file name of letters, digits, `.`, `_` and `-` that ends with .safetensors")
    return value


def _bucket_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{2,62}", value):
        raise ValueError("a bucket's name: 3 to 63 letters, digits, `.`, `_` and `-`")
    return value


def _region(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9-]{1,63}", value):
        raise ValueError("a region such as eu-central-1: letters, digits and `-`")
    return value


def _key_prefix(value: str) -> str:
    parts = value.strip("/").split("/")
    if len(value) > 200 or not all(re.fullmatch(r"(?!\.)[A-Za-z0-9._-]+", part) for part in parts):
        raise ValueError("names of letters, digits, `.`, `_` and `-`, none beginning with `.`, with / between them")
    return "/".join(parts)


def _sha256(value: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", value):
        raise ValueError("64 hex digits")
    return value.lower()

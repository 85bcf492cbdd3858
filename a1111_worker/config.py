"""The settings: the only module that knows the names of variables.

The fields of `Config` are the table of settings. Each has its variable, its parser, its default and its description
beside it. `Config.from_env` reads them all, and refuses to start on a bad value, with one line for each. `SETTINGS`
lists them for the documentation: a test compares it with docs/subsystems/container-management.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from a1111_worker import catalog
from a1111_worker.domain import BucketSettings, CheckpointEntry
from a1111_worker.environment import (
    Environment,
    Setting,
    api_origin,
    bucket_name,
    checkpoints,
    flag,
    gigabytes,
    hosts,
    hosts_or_any,
    key_prefix,
    model_file,
    one_of,
    origin,
    paths,
    region_name,
    repositories,
    seconds,
    secret,
    setting,
    settings_of,
    sha256,
    url,
    whole,
)
from a1111_worker.origins import CIVITAI_ORIGINS, HUB_ORIGIN, STORAGE_HOSTS
from a1111_worker.similar import nearest


def civitai_origins(text: str) -> tuple[str, ...]:
    """The origins of the API that are asked: both of CivitAI's own, or a mirror alone."""
    given = api_origin(text)
    return CIVITAI_ORIGINS if given == CIVITAI_ORIGINS[0] else (given,)


@dataclass(frozen=True)
class RunPodPlatform:
    """Where RunPod listens to this worker: the address of job-done and the key for it."""

    output_url: str
    api_key: str = field(repr=False)


@dataclass(frozen=True)
class Config:
    """Every setting, parsed. Times are seconds, sizes bytes. Docs: docs/subsystems/container-management.md."""

    webui_url: str = setting("WEBUI_URL", url, "http://127.0.0.1:3000", "the WebUI's root")
    boot_timeout: float = setting(
        "BOOT_TIMEOUT",
        seconds,
        400.0,
        "seconds from start to ready, download included",
        default="RUNPOD_INIT_TIMEOUT − 20, else 400",
    )
    webui_ready_timeout: float = setting(
        "WEBUI_READY_TIMEOUT", seconds, 300.0, "seconds the WebUI alone may take to answer"
    )
    webui_state_file: Path | None = setting(
        "WEBUI_STATE_FILE", Path, None, "the WebUI's pid, or `failed`; written by start.sh"
    )
    worker_state_file: Path | None = setting(
        "WORKER_STATE_FILE", Path, None, "the worker's own state, for the health check"
    )
    generation_timeout: float = setting("GENERATION_TIMEOUT", seconds, 540.0, "seconds for one generation")
    job_timeout: float = setting("JOB_TIMEOUT", seconds, 570.0, "seconds from taking a job to its answer")
    prefetch_timeout: float = setting("PREFETCH_TIMEOUT", seconds, 570.0, "seconds of a `prefetch` job")
    shutdown_grace: float = setting("SHUTDOWN_GRACE", seconds, 8.0, "seconds between TERM and KILL")

    models_dir: Path = setting(
        "MODELS_DIR",
        Path,
        Path("models"),
        "the cache that is written",
        default="/runpod-volume/models, /models or ./models",
    )
    model_sources: tuple[Path, ...] = setting(
        "MODEL_SOURCES", paths, (Path("/models"),), "further folders, read only, separated by `:`"
    )
    webui_models_dir: Path = setting(
        "WEBUI_MODELS_DIR",
        Path,
        Path("/tmp/webui-models"),  # noqa: S108 - a documented default
        "links to proven files: what the WebUI sees",
    )
    cache_limit_bytes: int | None = setting(
        "MODEL_CACHE_LIMIT_GB", gigabytes, None, "above it the least recently used models are removed"
    )

    civitai_key: str | None = secret("CIVITAI_API_KEY", "sent to CivitAI's API alone, as a header")
    civitai_urls: tuple[str, ...] = setting(
        "CIVITAI_URL", civitai_origins, CIVITAI_ORIGINS, "the API's origin", default=CIVITAI_ORIGINS[0]
    )
    storage_hosts: tuple[str, ...] = setting(
        "STORAGE_HOSTS",
        hosts,
        STORAGE_HOSTS,
        "where a download may be redirected",
        default="CivitAI's and Hugging Face's",
    )
    hf_token: str | None = secret("HF_TOKEN", "sent to Hugging Face alone, as a header")
    hf_repos: tuple[str, ...] = setting(
        "HF_REPOS", repositories, (), "private or gated repositories that every caller may use"
    )
    hf_endpoint: str = setting("HF_ENDPOINT", api_origin, HUB_ORIGIN, "Hugging Face's origin, or a mirror's")
    model_hosts: tuple[str, ...] = setting("MODEL_HOSTS", hosts, (), "further https hosts that a job's URL may name")

    checkpoint_url: str = setting(
        "CHECKPOINT_URL", str, catalog.CHECKPOINT_URL, "an operator's other checkpoint", default="the fixed checkpoint"
    )
    checkpoint_file: str = setting("CHECKPOINT_FILE", model_file, catalog.CHECKPOINT_FILE, "its file name")
    checkpoint_name: str = setting("CHECKPOINT_NAME", str, catalog.CHECKPOINT_NAME, "its title")
    checkpoint_sha256: str | None = setting("CHECKPOINT_SHA256", sha256, None, "64 hex digits its file must have")

    checkpoints: tuple[CheckpointEntry, ...] = setting(
        "CHECKPOINTS", checkpoints, (), "further checkpoints that a job may name: JSON, or the path of a JSON file"
    )

    any_checkpoint: bool = setting("ANY_CHECKPOINT", flag, False, "a job may bring a reference to a checkpoint")
    max_checkpoint_bytes: int = setting(
        "MAX_CHECKPOINT_GB", gigabytes, 8_000_000_000, "the largest file of such a checkpoint", default="8"
    )

    jobs_in_flight: int = setting("JOBS_IN_FLIGHT", whole(1, 16), 2, "jobs a worker holds at once; one generates")
    max_steps: int = setting("MAX_STEPS", whole(1, 10_000), 150, "steps of one job")
    max_pixels: int = setting(
        "MAX_PIXELS", whole(64 * 64, 1 << 28), 4_194_304, "pixels of one final image, hires included"
    )
    max_images: int = setting("MAX_IMAGES", whole(1, 1000), 16, "images of one job")
    warmup: bool = setting("WARMUP", flag, True, "a tiny generation before the first job")
    image_hosts: tuple[str, ...] = setting(
        "IMAGE_HOSTS", hosts_or_any, (), "https hosts from which pictures of a job are fetched; `*`: any public one"
    )
    max_input_images: int = setting("MAX_INPUT_IMAGES", whole(1, 64), 8, "pictures that one job may bring")
    max_upscale_pixels: int = setting(
        "MAX_UPSCALE_PIXELS", whole(64 * 64, 1 << 30), 67_108_864, "pixels of a picture that `upscale` makes"
    )
    output_dir: Path | None = setting("OUTPUT_DIR", Path, None, "a local run saves its pictures there")
    log_level: str = setting(
        "LOG_LEVEL", one_of("DEBUG", "INFO", "WARNING", "ERROR"), "INFO", "DEBUG, INFO, WARNING or ERROR"
    )
    log_format: str = setting("LOG_FORMAT", one_of("text", "json"), "text", "text or json: one object a line")

    hub_cache: Path = Path("/runpod-volume/huggingface-cache/hub")
    """Where RunPod puts cached models (docs.runpod.io, "Cached models"). It is no setting of this worker."""
    bucket: BucketSettings | None = None
    """Made of `BucketVariables`; None without a bucket."""
    runpod: RunPodPlatform | None = None
    """None outside of RunPod."""

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Config:
        """Read every setting; an unset or empty one has its default. ConfigError has a line for each bad value."""
        environment = Environment(environ)
        config = environment.read(cls)

        # What follows from several variables.
        init_timeout = environment.value_of(RUNPOD_INIT_TIMEOUT)
        if "BOOT_TIMEOUT" not in environment.given:
            config = replace(config, boot_timeout=max(init_timeout - 20.0, 10.0))
        if "MODELS_DIR" not in environment.given:
            config = replace(config, models_dir=default_models_dir(Path("/")))
        if "MODEL_SOURCES" in environ:  # an empty value means no further folders, not the default
            config = replace(config, model_sources=paths(environ["MODEL_SOURCES"]))
        config = replace(config, bucket=_read_bucket(environment), runpod=_read_runpod(environ))

        if "CHECKPOINT_URL" in environment.given and "CHECKPOINT_FILE" not in environment.given:
            environment.complain(
                "CHECKPOINT_URL is set and CHECKPOINT_FILE is not: another checkpoint takes a file name too"
            )
        environment.check()
        return config


@dataclass(frozen=True)
class BucketVariables:
    """The settings of the bucket for results, under the names of their fields in BucketSettings."""

    endpoint_url: str | None = setting(
        "BUCKET_ENDPOINT_URL", origin, None, "S3-compatible storage for results: its origin, without the bucket"
    )
    access_key_id: str | None = secret("BUCKET_ACCESS_KEY_ID", "the key's name there")
    secret_access_key: str | None = secret("BUCKET_SECRET_ACCESS_KEY", "the key")
    name: str | None = setting("BUCKET_NAME", bucket_name, None, "the bucket; it must exist")
    region: str = setting(
        "BUCKET_REGION", region_name, BucketSettings.region, "its region, as the storage calls it (R2: `auto`)"
    )
    prefix: str = setting(
        "BUCKET_PREFIX", key_prefix, BucketSettings.prefix, "what every key begins with, such as `a1111/prod`"
    )
    link_seconds: int = setting(
        "BUCKET_LINK_TTL",
        whole(1, 604_800),
        BucketSettings.link_seconds,
        "seconds a signed link lives, 604800 at most",
    )
    public_url: str | None = setting(
        "BUCKET_PUBLIC_URL", url, None, "links are this and the key, unsigned: a bucket that anyone may read"
    )


RUNPOD_INIT_TIMEOUT = Setting(
    "RUNPOD_INIT_TIMEOUT", "RunPod's: a worker not ready by then is unhealthy", seconds, 420.0
)
"""RunPod's own setting, with RunPod's own default. It is no setting of this worker."""

SETTINGS = (
    *settings_of(Config).values(),
    *settings_of(BucketVariables).values(),
    Setting("WEBUI_ARGS", "further flags for the WebUI", reader="start.sh"),
    Setting("ALLOW_CPU", "start.sh may run without a GPU", default="0", reader="start.sh"),
    Setting("LOCAL_API_KEY", "the key of the local queue's callers", secret=True, reader="local_queue"),
    Setting("LOCAL_API_HOST", "where the local queue listens", default="127.0.0.1", reader="start.sh"),
)

START_SH_SETTINGS = (
    "WEBUI_DATA_DIR",
    "WEBUI_DIR",
    "WEBUI_HF_HOME",
    "WEBUI_PYTHON",
    "WEBUI_RESTARTS",
    "WEBUI_RESTART_BACKOFF",
    "WEBUI_RESTART_WINDOW",
    "WORKER_DIR",
    "WORKER_PYTHON",
)
"""Variables that only start.sh reads. docs/modules/startup-script.md describes them."""

OUR_PREFIXES = ("BUCKET_", "CHECKPOINT_", "CIVITAI_", "MODEL_", "MODELS_", "WEBUI_")


def find_misspelt_settings(names: Iterable[str]) -> dict[str, list[str]]:
    """The variables among `names` that look like settings and are none, each with the settings that it may mean.

    A name looks like a setting if it begins with one of our prefixes, or is nearly the name of a setting. It may mean
    the settings that have all of its words, else the one that resembles it most. A name that
    a log line cannot show unchanged counts as another program's.
    """
    known = (*(setting.name for setting in SETTINGS), *START_SH_SETTINGS)
    found = {}
    for name in names:
        if name in known or not re.fullmatch(r"[A-Za-z0-9_]{1,80}", name):
            continue
        if name.upper().startswith(OUR_PREFIXES):
            words = set(name.upper().split("_"))
            found[name] = [setting for setting in known if words <= set(setting.split("_"))] or nearest(name, known, 1)
        elif near := nearest(name, known, 1, cutoff=0.85):
            found[name] = near
    return found


def default_models_dir(root: Path) -> Path:
    """Where the cache is if MODELS_DIR is not set: on RunPod's network volume, else in /models, else in ./models.

    A folder with RunPod's cached models and nothing else is no network volume, only at the same place.
    """
    volume = root / "runpod-volume"
    if volume.is_dir() and os.listdir(volume) != ["huggingface-cache"]:  # noqa: PTH208 - the names alone
        return volume / "models"
    models = root / "models"
    return models if os.access(models if models.exists() else root, os.W_OK) else Path("models")


def _read_bucket(environment: Environment) -> BucketSettings | None:
    """The bucket for results. It needs four settings. With some of them and not all, every job would fail."""
    values = environment.read(BucketVariables)
    needed = ("BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY", "BUCKET_NAME")
    missing = [name for name in needed if name not in environment.given]
    names = {setting.name for setting in settings_of(BucketVariables).values()}
    given = sorted(names & environment.given)
    if given and missing:
        environment.complain(
            f"{', '.join(given)} set without {', '.join(missing)}: a bucket takes all of {', '.join(needed)}"
        )
    return BucketSettings(**vars(values)) if given and not missing else None


def _read_runpod(environ: Mapping[str, str]) -> RunPodPlatform | None:
    """RunPod's own variables, as its SDK reads them (runpod 1.12, rp_http.py): `$RUNPOD_POD_ID` is filled in here,
    `$ID` stays for the job's id."""
    if not environ.get("RUNPOD_WEBHOOK_GET_JOB"):
        return None
    output_url = environ.get("RUNPOD_WEBHOOK_POST_OUTPUT", "")
    output_url = output_url.replace("$RUNPOD_POD_ID", environ.get("RUNPOD_POD_ID", ""))
    return RunPodPlatform(output_url, environ.get("RUNPOD_AI_API_KEY", ""))


SDK_LOG_LEVELS = ("NOTSET", "TRACE", "DEBUG", "INFO", "WARN", "ERROR")


def prepare_sdk_environment(environ: MutableMapping[str, str]) -> None:
    """Replace log levels that the SDK cannot use. Call it before the SDK is imported (runpod 1.12, rp_logger.py).

    Without a level the SDK takes DEBUG, and logs prompts and results. A level that it does not know, such as WARNING or
    an empty one, ends its import.
    """
    for name in ("RUNPOD_LOG_LEVEL", "RUNPOD_DEBUG_LEVEL"):
        level = environ.pop(name, "").strip()
        if level:  # an empty one is as good as none
            environ[name] = level if level.upper() in SDK_LOG_LEVELS else "INFO"
    environ.setdefault("RUNPOD_DEBUG_LEVEL", "INFO")


def runs_test_file(environ: Mapping[str, str]) -> bool:
    """Whether the SDK, without arguments, runs the job in test_input.json (runpod 1.12, serverless/worker.py).

    If not, it takes jobs from RunPod's queue, or serves them at the port that RunPod gives it.
    """
    return "RUNPOD_WEBHOOK_GET_JOB" not in environ and environ.get("RUNPOD_REALTIME_PORT", "0") == "0"

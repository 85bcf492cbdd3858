"""Models for a worker: on disk, verified, and kept there until the job ends. Also a command line.

    with open_manager(config) as manager, manager.hold(refs, JobContext()) as held:
        held.models[ref].path

    python model_manager.py fetch https://civitai.com/models/122359?modelVersionId=135867
    python model_manager.py --help

The work is done by a1111_worker/models/manager.py. Here it is built from the settings.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from a1111_worker import logs
from a1111_worker.catalog import LORAS
from a1111_worker.config import Config
from a1111_worker.context import Deadline, JobContext, ReportProgress, ignore_progress
from a1111_worker.domain import HeldModels, Model, ModelKind, ModelRef, Progress
from a1111_worker.errors import (
    ConfigError,
    DownloadFailed,
    JobCancelled,
    ModelError,
    VolumeFailed,
    VolumeFull,
    WorkerError,
)
from a1111_worker.models import care
from a1111_worker.models.cache import CacheSettings, CheckpointSpec
from a1111_worker.models.civitai import CivitAI
from a1111_worker.models.eviction import Entry
from a1111_worker.models.hub_files import HubAccess
from a1111_worker.models.huggingface import HuggingFace
from a1111_worker.models.manager import ModelManager
from a1111_worker.models.references import BadReference, parse_reference
from a1111_worker.models.sites import ModelSites, SiteTimings
from a1111_worker.transfer.download import Downloader
from a1111_worker.transfer.egress import EgressPolicy
from a1111_worker.transfer.ranges import Tuning

T = TypeVar("T")

__all__ = ["CheckpointSpec", "HeldModels", "ModelManager", "main", "open_manager"]


def own_checkpoint_ref(config: Config) -> ModelRef:
    """The reference of the worker's own checkpoint. ConfigError if CHECKPOINT_URL names no model."""
    try:
        return parse_reference(config.checkpoint_url, kind=ModelKind.CHECKPOINT, allowed_hosts=config.model_hosts)
    except BadReference as error:
        raise ConfigError(f"CHECKPOINT_URL: {error}") from error


def checkpoint_refs(config: Config) -> tuple[tuple[str, ModelRef], ...]:
    """The checkpoints of CHECKPOINTS that a job may name, with their references. ConfigError if one names no model."""
    refs: list[tuple[str, ModelRef]] = []
    for entry in config.checkpoints:
        try:
            ref = parse_reference(entry.reference, kind=ModelKind.CHECKPOINT, allowed_hosts=config.model_hosts)
        except BadReference as error:
            raise ConfigError(f"CHECKPOINTS: {entry.name}: {error}") from error
        if ref.is_bare_name:
            raise ConfigError(f"CHECKPOINTS: {entry.name}: the reference must be a URL, an AIR or hf:…, not a name")
        refs.append((entry.name, replace(ref, name=entry.name, sha256=entry.sha256 or ref.sha256)))
    return tuple(refs)


def open_manager(
    config: Config, *, webui: bool = True, timings: SiteTimings | None = None, tuning: Tuning | None = None
) -> ModelManager:
    """The manager that the settings describe. Without `webui` it shows nothing to any WebUI.

    `timings` are those of CivitAI and Hugging Face, `tuning` is that of the downloads. None: the measured defaults.
    """
    policy = EgressPolicy((*config.storage_hosts, *config.model_hosts, *config.civitai_urls, config.hf_endpoint))
    reference = own_checkpoint_ref(config)
    checkpoint = CheckpointSpec(
        replace(reference, sha256=config.checkpoint_sha256 or reference.sha256),
        config.checkpoint_file,
        config.checkpoint_name,
        config.checkpoint_sha256,
    )
    settings = CacheSettings(
        config.models_dir,
        config.webui_models_dir if webui else None,
        local_dir=config.webui_models_dir.with_name(f"{config.webui_models_dir.name}.local"),
        sources=config.model_sources,
        checkpoint=checkpoint,
        limit=config.cache_limit_bytes,
        hub_cache=config.hub_cache,
        hub_access=HubAccess(
            frozenset(config.hf_repos),
            frozenset(ref.hub for ref in (reference, *(ref for _, ref in checkpoint_refs(config))) if ref.hub),
        ),
    )
    timings = timings or SiteTimings()
    civitai = CivitAI(policy=policy, urls=config.civitai_urls, key=config.civitai_key, timings=timings)
    hugging_face = HuggingFace(
        policy=policy, url=config.hf_endpoint, token=config.hf_token, access=settings.hub_access, timings=timings
    )
    return ModelManager(settings, ModelSites(civitai, hugging_face), Downloader(policy, tuning))


# -- the command line --------------------------------------------------------------------------------------------------

DESCRIPTION = """\
The models of this worker: what is there, and bringing, checking and removing them.
Settings come from the environment, as for the worker itself: MODELS_DIR, MODEL_SOURCES, CIVITAI_API_KEY, …
"""
EPILOG = """\
A REFERENCE is a CivitAI URL of any form (model page, version, download), a version id, an AIR
(civitai:122359@135867), a file of Hugging Face (hf:OWNER/REPO/FILE.safetensors, or its URL), a name of
the catalog, or a URL of a host in MODEL_HOSTS.

  python model_manager.py prefetch all                          warm a volume, or bake models into an image
  python model_manager.py prefetch checkpoint detail_tweaker_xl --models-dir DIR
  python model_manager.py fetch 135867 https://civitai.com/models/122359?modelVersionId=135867
  python model_manager.py list --json
  python model_manager.py verify --repair

The exit status is 0 only if everything that was asked for is so now.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        config = Config.from_env(os.environ)
        if getattr(options, "models_dir", None):  # all of it there: what other folders have does not count
            config = replace(config, models_dir=options.models_dir, model_sources=())
        logs.configure("INFO" if options.verbose else "WARNING", config.log_format)
        deadline = Deadline(what="this command")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: deadline.cancel())
        with open_manager(config, webui=False) as manager:
            return _Command(manager, config, options, deadline).run()
    except ConfigError as error:
        print(error, file=sys.stderr)
    except JobCancelled:
        print("stopped; what has arrived stays, and the next run goes on with it", file=sys.stderr)
        return 130
    except WorkerError as error:
        print(_format_error(error), file=sys.stderr)
    except BrokenPipeError:  # `| head`
        sys.stderr.close()
    return 1


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="one JSON document on stdout instead of text")
    shared.add_argument("-v", "--verbose", action="store_true", help="log what is done to stderr")
    parser = argparse.ArgumentParser(
        prog="model_manager.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help, parents=[shared])

    command("list", "what is there, since when, how often used")
    fetch = command("fetch", "have models in the cache, verified")
    fetch.add_argument("references", nargs="+", metavar="REFERENCE")
    fetch.add_argument("--kind", choices=[kind.value for kind in ModelKind], default="lora", help="default: lora")
    prefetch = command(
        "prefetch", "have the checkpoint, the catalog's LoRAs, other LoRAs, or all of these in the cache"
    )
    prefetch.add_argument(
        "what",
        nargs="*",
        default=["all"],
        metavar="WHAT",
        help="checkpoint, catalog, all (both; the default), or a REFERENCE of a LoRA",
    )
    prefetch.add_argument(
        "--models-dir",
        type=Path,
        metavar="DIR",
        help="into this folder, all of them, so that `a1111 volume upload DIR VOLUME` can send it",
    )
    verify = command("verify", "read every model and compare it with what is known of it")
    verify.add_argument("--repair", action="store_true", help="fetch damaged ones again, remove those without a source")
    evict = command("evict", "remove the least recently used models, never one in use, never the checkpoint")
    evict.add_argument(
        "--to-gb", type=_gigabytes, required=True, metavar="N", help="what the models may take afterwards, in 10⁹ bytes"
    )
    remove = command("remove", "remove models by name, unless one is in use")
    remove.add_argument("names", nargs="+", metavar="NAME")
    command("paths", "where the models and the other files are")
    return parser


class _Command:
    """One command of the command line."""

    def __init__(self, manager: ModelManager, config: Config, options: argparse.Namespace, deadline: Deadline) -> None:
        self._manager = manager
        self._config = config
        self._options = options
        self._deadline = deadline

    def run(self) -> int:
        status: int = getattr(self, f"_{self._options.command}")()
        return status

    def _print(self, document: object, lines: Iterable[str]) -> None:
        if self._options.json:
            print(json.dumps(document, indent=2))
        else:
            for line in lines:
                print(line)

    def _list(self) -> int:
        rows: list[dict[str, Any]] = []
        sidecars = self._manager.cache.sidecars
        for directory, entry in self._manager.cache.list_models():
            record, uses = None, 0
            with contextlib.suppress(VolumeFailed):  # what cannot be read is listed too
                record, uses = sidecars.find(directory, entry.file), sidecars.uses(directory, entry.file).count
            rows.append(
                {
                    "kind": entry.kind.value,
                    "file": entry.file,
                    "name": record.name if record else None,
                    "version_id": record.version_id if record else None,
                    "size": entry.size,
                    "uses": uses,
                    "last_used": _format_time(entry.last_used),
                    "downloaded_at": record.downloaded_at if record else None,
                    "base_model": (record.base_model or record.family) if record else None,
                    "sha256": record.sha256 if record else None,
                    "keep": entry.keep,
                    "cache": directory.is_writable,
                }
            )
        lines = [f"{'KIND':<10} {'MB':>8} {'USES':>5}  {'SINCE':<20}  {'LAST USED':<20} {'VERSION':>8}  FILE"]
        for row in rows:
            notes = ", ".join(filter(None, [row["keep"], None if row["cache"] else "in a source"]))
            lines.append(
                f"{row['kind']:<10} {row['size'] / 1e6:>8.1f} {row['uses']:>5}  "
                f"{row['downloaded_at'] or '-':<20}  {row['last_used']:<20} {row['version_id'] or '-':>8}  "
                f"{row['file']}{f'  ({notes})' if notes else ''}"
            )
        lines.append(f"{len(rows)} models, {sum(row['size'] for row in rows) / 1e9:.2f} GB")
        self._print(rows, lines)
        return 0

    def _fetch(self) -> int:
        return self._hold_and_print(*self._parse(self._options.references, ModelKind(self._options.kind)))

    def _parse(self, words: Iterable[str], kind: ModelKind) -> tuple[dict[ModelRef, str], dict[str, str]]:
        """Each reference with the word that named it, and each other word with what is wrong with it."""
        refs: dict[ModelRef, str] = {}
        bad: dict[str, str] = {}
        for text in words:
            try:
                refs[parse_reference(text, kind=kind, allowed_hosts=self._config.model_hosts)] = text
            except BadReference as error:
                bad[text] = str(error)
        return refs, bad

    def _prefetch(self) -> int:
        models: list[Model] = []
        words = set(self._options.what)
        refs, failed = self._parse(
            (word for word in self._options.what if word not in ("checkpoint", "catalog", "all")), ModelKind.LORA
        )
        if words & {"checkpoint", "all"}:
            try:
                with _ProgressBar("checkpoint") as report:
                    models.append(self._manager.prepare_checkpoint(JobContext(self._deadline, report)))
            except ModelError as error:
                failed[self._config.checkpoint_name] = _format_error(error)
        catalog = LORAS if words & {"catalog", "all"} else ()
        refs |= {ModelRef(ModelKind.LORA, lora.version_id): lora.title for lora in catalog}
        return self._hold_and_print(refs, failed, models)

    def _hold_and_print(
        self, refs: Mapping[ModelRef, str], failed: Mapping[str, str], models: Sequence[Model] = ()
    ) -> int:
        """Have models in the cache. Print them after `models`, and the failures after `failed`. Returns the status."""
        with (
            _ProgressBar("models") as report,
            self._manager.hold(list(refs), JobContext(self._deadline, report), tolerate=True) as held,
        ):
            models = [*models, *held.models.values()]
            failed = {**failed, **{refs[ref]: _format_error(error) for ref, error in held.failures.items()}}
        self._print({"models": [_as_json(model) for model in models], "failed": failed}, map(_format_model, models))
        for text, error in failed.items():
            print(f"{text}: {error}", file=sys.stderr)
        return 1 if failed else 0

    def _verify(self) -> int:
        results = []
        for result in care.verify(self._manager, self._deadline, repair=self._options.repair):
            results.append(result)
            if not self._options.json:
                mark = "ok " if result.ok else "BAD"
                print(f"{mark} {result.entry.kind.value:<10} {result.entry.file}: {result.finding}")
        if self._options.json:
            rows = [{"file": r.entry.file, "ok": r.ok, "finding": r.finding, "sha256": r.sha256} for r in results]
            print(json.dumps(rows, indent=2))
        return 0 if all(result.ok for result in results) else 1

    def _evict(self) -> int:
        self._print_removed(self._try_twice(functools.partial(care.shrink, self._manager.cache, self._options.to_gb)))
        return 0

    def _remove(self) -> int:
        removed: list[Entry] = []
        failed: dict[str, str] = {}
        for name in self._options.names:
            try:
                removed += self._try_twice(functools.partial(care.remove, self._manager.cache, name))
            except ModelError as error:
                failed[name] = _format_error(error)
        if removed or self._options.json:
            self._print_removed(removed)
        for message in failed.values():
            print(message, file=sys.stderr)
        return 1 if failed else 0

    def _try_twice(self, function: Callable[[], T]) -> T:
        """Call a function. If models in use prevent it, find out whether their users are alive, and call it again."""
        try:
            return function()
        except (DownloadFailed, VolumeFull):
            if not self._manager.cache.observe_other_workers(self._deadline):
                raise
        return function()

    def _print_removed(self, entries: Iterable[Entry]) -> None:
        rows = [{"kind": entry.kind.value, "file": entry.file, "size": entry.size} for entry in entries]
        self._print(rows, [f"removed {row['kind']} {row['file']}" for row in rows] or ["nothing had to go"])

    def _paths(self) -> int:
        directories = self._manager.cache.directories
        entries = self._manager.cache.list_entries()
        written_to = {directory.kind.folder: str(directory.folder) for directory in directories.writable()}
        rows = {
            "models_dir": str(directories.models_dir),
            "written_to": written_to,
            "sources": [str(source) for source in directories.sources],
            "local": str(directories.local_dir),
            "webui_models_dir": str(self._config.webui_models_dir),
            "bytes": sum(entry.size for entry in entries),
            "limit": self._config.cache_limit_bytes,
            "free": min((directory.free() for directory in directories.writable()), default=None),
        }
        self._print(rows, [f"{name:<18}{value}" for name, value in rows.items()])
        return 0 if len(written_to) == len(ModelKind) else 1


class _ProgressBar:
    """A progress bar if stderr is a terminal, else nothing."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._bar: Any = None
        self._lock = threading.Lock()

    def __enter__(self) -> ReportProgress:
        return self._report if sys.stderr.isatty() else ignore_progress

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def _report(self, progress: Progress) -> None:
        with self._lock:
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(desc=self._what, unit="B", unit_scale=True, file=sys.stderr)
            self._bar.total = progress.facts["total"]
            self._bar.set_postfix_str(progress.detail, refresh=False)
            self._bar.update(int(progress.facts["bytes"]) - self._bar.n)


def _format_error(error: WorkerError) -> str:
    return f"{error.code}: {error.message}{f' ({error.hint})' if error.hint else ''}"


def _as_json(model: Model) -> dict[str, object]:
    return {
        "kind": model.kind.value,
        "file": model.file,
        "name": model.name,
        "version_id": model.version_id,
        "size": model.size,
        "sha256": model.sha256,
        "downloaded": model.downloaded,
        "warnings": list(model.warnings),
    }


def _format_model(model: Model) -> str:
    how = "fetched" if model.downloaded else "was there"
    warnings = "".join(f"\n  warning: {warning}" for warning in model.warnings)
    return f"{model.file}  {model.size / 1e6:.1f} MB  sha256 {model.sha256[:12]}…  {how}{warnings}"


def _format_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _gigabytes(text: str) -> int:
    value = float(text)
    if not 0 <= value < 1e9:
        raise ValueError("not a number of gigabytes")
    return int(value * 1e9)


if __name__ == "__main__":
    sys.exit(main())

"""Models for a worker: on disk, proven, and kept there until the job ends; also a command line.

    with open_manager(config) as manager, manager.hold(refs, JobContext()) as held:
        held.models[ref].path

    python model_manager.py fetch https://civitai.com/models/122359?modelVersionId=135867
    python model_manager.py --help

What holds them is a1111_worker/manager.py; here it is built from the settings.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from a1111_worker import logs
from a1111_worker.catalog import LORAS
from a1111_worker.config import Config
from a1111_worker.context import Deadline, JobContext, ReportProgress, ignore_progress
from a1111_worker.domain import HeldModels, Model, ModelKind, ModelRef, Progress
from a1111_worker.errors import ConfigError, DownloadFailed, JobCancelled, ModelError, VolumeFull, WorkerError
from a1111_worker.models.cache import CheckpointSpec
from a1111_worker.models.eviction import Entry
from a1111_worker.models.manager import ModelManager

if TYPE_CHECKING:
    from a1111_worker.models.civitai import CivitAITimings
    from a1111_worker.transfer.ranges import Tuning

T = TypeVar("T")

__all__ = ["CheckpointSpec", "HeldModels", "ModelManager", "main", "open_manager"]


def open_manager(
    config: Config, *, webui: bool = True, timings: CivitAITimings | None = None, tuning: Tuning | None = None
) -> ModelManager:
    """The manager that the settings describe; without `webui` it shows nothing to any WebUI.

    `timings` are CivitAI's periods, `tuning` the downloads'; None are the measured defaults.
    """
    from a1111_worker.models.civitai import CivitAI, CivitAITimings
    from a1111_worker.models.references import BadReference, parse_reference
    from a1111_worker.transfer.download import Downloader
    from a1111_worker.transfer.egress import EgressPolicy

    policy = EgressPolicy((*config.storage_hosts, *config.model_hosts, *config.civitai_urls))
    try:
        reference = parse_reference(config.checkpoint_url, kind=ModelKind.CHECKPOINT, allowed_hosts=config.model_hosts)
    except BadReference as error:
        raise ConfigError(f"CHECKPOINT_URL: {error}") from error
    return ModelManager(
        config.models_dir,
        config.webui_models_dir if webui else None,
        CivitAI(policy=policy, urls=config.civitai_urls, key=config.civitai_key, timings=timings or CivitAITimings()),
        Downloader(policy, tuning),
        local=config.webui_models_dir.with_name(f"{config.webui_models_dir.name}.local"),
        sources=config.model_sources,
        checkpoint=CheckpointSpec(
            replace(reference, sha256=config.checkpoint_sha256 or reference.sha256),
            config.checkpoint_file,
            config.checkpoint_name,
            config.checkpoint_sha256,
        ),
        limit=config.cache_limit_bytes,
    )


# -- the command line --------------------------------------------------------------------------------------------------

DESCRIPTION = """\
The models of this worker: what is there, and bringing, checking and removing them.
Settings come from the environment, as for the worker itself: MODELS_DIR, MODEL_SOURCES, CIVITAI_API_KEY, …
"""
EPILOG = """\
A REFERENCE is a CivitAI URL of any form (model page, version, download), a version id, an AIR
(civitai:122359@135867), a name of the catalog, or a URL of a host in MODEL_HOSTS.

  python model_manager.py prefetch all                          warm a volume, or bake models into an image
  python model_manager.py fetch 135867 https://civitai.com/models/122359?modelVersionId=135867
  python model_manager.py list --json
  python model_manager.py verify --repair

The exit status is 0 only if everything that was asked for is so now.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    options = _parser().parse_args(arguments)
    try:
        config = Config.from_env(os.environ)
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
        print(_sentence(error), file=sys.stderr)
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
    fetch = command("fetch", "have models in the cache, proven")
    fetch.add_argument("references", nargs="+", metavar="REFERENCE")
    fetch.add_argument("--kind", choices=[kind.value for kind in ModelKind], default="lora", help="default: lora")
    prefetch = command("prefetch", "have the checkpoint, the catalog's LoRAs, or both in the cache")
    prefetch.add_argument(
        "what", nargs="?", choices=["checkpoint", "catalog", "all"], default="all", help="default: all"
    )
    verify = command("verify", "read every model and compare it with what is known of it")
    verify.add_argument("--repair", action="store_true", help="fetch damaged ones again, remove those without a source")
    evict = command("evict", "remove the least recently used models, never one in use, never the checkpoint")
    evict.add_argument("--to-gb", type=_gigabytes, required=True, metavar="N", help="what may stay, in 10⁹ bytes")
    remove = command("remove", "remove models by name, unless one is in use")
    remove.add_argument("names", nargs="+", metavar="NAME")
    command("paths", "where everything lies")
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

    def _say(self, document: object, lines: Iterable[str]) -> None:
        if self._options.json:
            print(json.dumps(document, indent=2))
        else:
            for line in lines:
                print(line)

    def _list(self) -> int:
        rows: list[dict[str, Any]] = []
        for shelf, entry in self._manager.library.stock():
            record = self._manager.library.registry.look(shelf, entry.file)
            count, _ = self._manager.library.registry.uses(shelf, entry.file)
            rows.append(
                {
                    "kind": entry.kind.value,
                    "file": entry.file,
                    "name": record.name if record else None,
                    "version_id": record.version_id if record else None,
                    "size": entry.size,
                    "uses": count,
                    "last_used": _when(entry.last_used),
                    "downloaded_at": record.downloaded_at if record else None,
                    "base_model": (record.base_model or record.family) if record else None,
                    "sha256": record.sha256 if record else None,
                    "keep": entry.keep,
                    "cache": shelf.writable,
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
        self._say(rows, lines)
        return 0

    def _fetch(self) -> int:
        from a1111_worker.models.references import BadReference, parse_reference

        kind = ModelKind(self._options.kind)
        refs: dict[ModelRef, str] = {}
        bad: dict[str, str] = {}
        for text in self._options.references:
            is_id = text.isascii() and text.isdigit() and len(text) < 20
            value = {"version_id": int(text)} if is_id else text
            try:
                refs[parse_reference(value, kind=kind, allowed_hosts=self._config.model_hosts)] = text
            except BadReference as error:
                bad[text] = str(error)
        return self._bring(refs, bad)

    def _prefetch(self) -> int:
        models: list[Model] = []
        failed: dict[str, str] = {}
        if self._options.what in ("checkpoint", "all"):
            try:
                with _Bar("checkpoint") as report:
                    models.append(self._manager.prepare_checkpoint(JobContext(self._deadline, report)))
            except ModelError as error:
                failed[self._config.checkpoint_name] = _sentence(error)
        catalog = LORAS if self._options.what in ("catalog", "all") else ()
        refs = {ModelRef(ModelKind.LORA, lora.version_id): lora.title for lora in catalog}
        return self._bring(refs, failed, models)

    def _bring(self, refs: Mapping[ModelRef, str], failed: dict[str, str], models: Sequence[Model] = ()) -> int:
        with (
            _Bar("models") as report,
            self._manager.hold(list(refs), JobContext(self._deadline, report), tolerate=True) as held,
        ):
            models = [*models, *held.models.values()]
            failed |= {refs[ref]: _sentence(error) for ref, error in held.failures.items()}
        self._say({"models": [_told(model) for model in models], "failed": failed}, map(_line, models))
        for text, sentence in failed.items():
            print(f"{text}: {sentence}", file=sys.stderr)
        return 1 if failed else 0

    def _verify(self) -> int:
        verdicts = []
        for verdict in self._manager.verify(self._deadline, repair=self._options.repair):
            verdicts.append(verdict)
            if not self._options.json:
                mark = "ok " if verdict.ok else "BAD"
                print(f"{mark} {verdict.entry.kind.value:<10} {verdict.entry.file}: {verdict.finding}")
        if self._options.json:
            told = [{"file": v.entry.file, "ok": v.ok, "finding": v.finding, "sha256": v.sha256} for v in verdicts]
            print(json.dumps(told, indent=2))
        return 0 if all(verdict.ok for verdict in verdicts) else 1

    def _evict(self) -> int:
        self._tell_removed(self._patiently(functools.partial(self._manager.shrink, self._options.to_gb)))
        return 0

    def _remove(self) -> int:
        gone: list[Entry] = []
        failed: dict[str, str] = {}
        for name in self._options.names:
            try:
                gone += self._patiently(functools.partial(self._manager.remove, name))
            except ModelError as error:
                failed[name] = _sentence(error)
        if gone or self._options.json:
            self._tell_removed(gone)
        for sentence in failed.values():
            print(sentence, file=sys.stderr)
        return 1 if failed else 0

    def _patiently(self, do: Callable[[], T]) -> T:
        """Do it; where somebody is in the way, once more when it is known who of them still lives."""
        try:
            return do()
        except (DownloadFailed, VolumeFull):
            if not self._manager.library.tell_living_from_dead(self._deadline):
                raise
        return do()

    def _tell_removed(self, entries: Iterable[Entry]) -> None:
        told = [{"kind": entry.kind.value, "file": entry.file, "size": entry.size} for entry in entries]
        self._say(told, [f"removed {row['kind']} {row['file']}" for row in told] or ["nothing had to go"])

    def _paths(self) -> int:
        shelves = self._manager.library.shelves
        entries = self._manager.library.entries()
        homes = {shelf.kind.folder: str(shelf.folder) for shelf in shelves.writable()}
        told = {
            "models_dir": str(shelves.models_dir),
            "written_to": homes,
            "sources": [str(source) for source in shelves.sources],
            "local": str(shelves.local),
            "webui_models_dir": str(self._config.webui_models_dir),
            "bytes": sum(entry.size for entry in entries),
            "limit": self._config.cache_limit_bytes,
            "free": min((shelf.free() for shelf in shelves.writable()), default=None),
        }
        self._say(told, [f"{name:<18}{value}" for name, value in told.items()])
        return 0 if len(homes) == len(ModelKind) else 1


class _Bar:
    """A progress bar on a terminal, nothing anywhere else."""

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


def _sentence(error: WorkerError) -> str:
    return f"{error.code}: {error.message}{f' ({error.hint})' if error.hint else ''}"


def _told(model: Model) -> dict[str, object]:
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


def _line(model: Model) -> str:
    how = "fetched" if model.downloaded else "was there"
    warnings = "".join(f"\n  warning: {warning}" for warning in model.warnings)
    return f"{model.file}  {model.size / 1e6:.1f} MB  sha256 {model.sha256[:12]}…  {how}{warnings}"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _gigabytes(text: str) -> int:
    value = float(text)
    if not 0 <= value < 1e9:
        raise ValueError("not a number of gigabytes")
    return int(value * 1e9)


if __name__ == "__main__":
    sys.exit(main())

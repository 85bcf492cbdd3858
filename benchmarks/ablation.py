"""What each mechanism of the download engine earns: python -m benchmarks.ablation [--json FILE] [--quick] [--rounds N]

On every row, the whole engine and the engine without one of its mechanisms download in turn, again and again, each in a
process of its own from a server of its own (benchmarks.throttle). A row's figures are ratios to the whole engine's time
in the same round: the median of all rounds, and the lowest and the highest. So what else the machine does at that time
disturbs both sides alike. The rows that the server throttles are hardly disturbed at all.

`--beside FOLDER`: the engine of another checkout runs too, as "other".
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.report import Row, show
from benchmarks.throttle import serving

_ROOT = Path(__file__).resolve().parent.parent
MB = 1_000_000
MiB = 1024 * 1024
_NETWORK = {"rate": 20 * MB, "latency": 0.05}


@dataclass(frozen=True)
class Case:
    """A row: files of these sizes at once, over such a network. Its time is that of the file that the GPU waits for."""

    name: str
    sizes: tuple[int, ...]
    network: dict[str, float] = field(default_factory=lambda: _NETWORK)
    without: str = ".*"  # the mechanisms that are switched off here
    is_first_next: bool = False  # a job that is next at the GPU waits for the first file only
    settings: dict[str, str] = field(default_factory=dict)  # the environment of the client


NO_SHA = {"OPENSSL_ia32cap": ":~0x20000000"}  # OpenSSL does not see them (OPENSSL_ia32cap(3))

WITHOUT: dict[str, dict[str, Any]] = {
    "taking over from a connection that is far behind": {"far_behind": 1e99},
    "dividing the last ranges": {"min_steal_bytes": 1 << 60},
    "both": {"far_behind": 1e99, "min_steal_bytes": 1 << 60},
    "16 connections: 8": {"connections": 8},
    "growing and shrinking requests: all of 16 MiB": {"min_range_bytes": 16 * MiB, "max_range_bytes": 16 * MiB},
    "growing and shrinking requests: all of 64 MiB": {"min_range_bytes": 64 * MiB, "max_range_bytes": 64 * MiB},
    "more connections for small files": {"min_range_bytes": 16 * MiB},
    "the budget": {},
    "the job that the GPU waits for first": {},
}
"""The mechanisms, and the Tuning that switches one off. The last two are not a matter of tuning."""


def cases(scale: float) -> list[Case]:
    def mb(size: float) -> int:
        return int(size * scale) * MB

    line = {**_NETWORK, "line": 320 * MB}
    return [
        Case("a checkpoint, 20 MB/s a connection, 50 ms latency", (mb(1600),), without="dividing|8$|requests"),
        Case("… one connection of eight at 0.5 MB/s", (mb(1600),), {**_NETWORK, "slow_rate": 0.5 * MB}, "tak|both|div"),
        Case("… a reset every 200 MB", (mb(1600),), {**_NETWORK, "reset_every": 200 * MB}, "dividing"),
        Case("… without instructions for SHA-256", (mb(1600),), without="requests", settings=NO_SHA),
        Case("… not throttled", (mb(1600),), {}, "dividing|8$"),
        Case("a LoRA of 30 MB", (30 * MB,), without="dividing|small"),
        Case("a LoRA of 215 MB", (215 * MB,), without="dividing|small"),
        Case(
            "two checkpoints, a line of 320 MB/s, the GPU waits for one",
            (mb(800),) * 2,
            line,
            "the",
            is_first_next=True,
        ),
        Case("nine LoRAs of 215 MB, a line of 320 MB/s", (mb(215),) * 9, line, "the budget|dividing"),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows there too")
    parser.add_argument("--quick", action="store_true", help="small files, one round: to see that it works")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scale", type=float, default=1.0, help="of the files' sizes")
    parser.add_argument("--rows", default="", help="only the rows whose name matches")
    parser.add_argument("--without", default="", help="only the mechanisms whose name matches")
    parser.add_argument("--beside", type=Path, help="another checkout, whose engine runs too")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.client:
        print(json.dumps(_client(**json.loads(given.client))))
        return 0
    rows = []
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="bench-") as folder:
        for case in cases(0.16 if given.quick else given.scale):
            if re.search(given.rows, case.name):
                mechanisms = [
                    each for each in WITHOUT if re.search(given.without, each) and re.search(case.without, each)
                ]
                rows += _measure(case, mechanisms, given, Path(folder))
    show("What each mechanism earns", rows)
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


def _measure(case: Case, mechanisms: Sequence[str], given: argparse.Namespace, folder: Path) -> list[Row]:
    files = folder / "files"
    files.mkdir(exist_ok=True)
    for number, size in enumerate(case.sizes):
        if not (files / str(number)).exists() or (files / str(number)).stat().st_size != size:
            _fill(files / str(number), size)
    sides = ["", *mechanisms, *(["other"] if given.beside else [])]
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    _run(case, "", _ROOT, folder)  # memory that was never used costs more
    for number in range(1 if given.quick else given.rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            runs[side].append(_run(case, side, given.beside if side == "other" else _ROOT, folder))
    whole = [run["seconds"] for run in runs[""]]
    rows = [Row(case.name, f"{statistics.median(whole):.2f} s ({min(whole):.2f} to {max(whole):.2f}){_more(runs[''])}")]
    for side in sides[1:]:
        ratios = [run["seconds"] / seconds for run, seconds in zip(runs[side], whole, strict=True)]
        words = f"{statistics.median(ratios):.2f} × ({min(ratios):.2f} to {max(ratios):.2f}){_more(runs[side])}"
        rows.append(Row(f"    without {side}" if side != "other" else "    other engine", words))
    show("", rows)
    return rows


def _more(runs: Sequence[dict[str, float]]) -> str:
    all_, cpu, sent, most = (statistics.median(run[name] for run in runs) for name in ("all", "cpu", "sent", "most"))
    return f"; all files {all_:.2f} s, cpu {cpu:.1f} s, {sent:.3f} × the bytes, {most:.0f} connections made"


def _run(case: Case, without: str, root: Path, folder: Path) -> dict[str, float]:
    with serving(folder / "files", **case.network) as server:
        spec = {
            "url": server.url,
            "out": str(folder / "out"),
            "files": len(case.sizes),
            "without": without,
            "is_first_next": case.is_first_next,
        }
        done = subprocess.run(
            [sys.executable, __file__, "--client", json.dumps(spec)],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root), **case.settings},
            stdout=subprocess.PIPE,
            check=True,
            timeout=300,
        )
        counts = server.counts()
    for left in folder.glob("out*"):
        left.unlink()
    result: dict[str, float] = json.loads(done.stdout)
    return {**result, "sent": counts["bytes"] / sum(case.sizes), "most": counts["connections"] - 1}


def _fill(path: Path, size: int) -> None:
    block = os.urandom(8 * MiB)
    with path.open("wb") as file:
        while (left := size - file.tell()) > 0:
            file.write(block[:left])


# --- in a process of its own


def _client(url: str, out: str, files: int, without: str, is_first_next: bool) -> dict[str, float]:
    from a1111_worker.context import Deadline, JobContext
    from a1111_worker.transfer.download import Downloader, Source
    from a1111_worker.transfer.egress import EgressPolicy
    from a1111_worker.transfer.ranges import Tuning

    policy, tuning = EgressPolicy([url]), Tuning(**WITHOUT.get(without, {}))
    shared = Downloader(policy, tuning)
    downloaders = [Downloader(policy, tuning) if without == "the budget" else shared for _ in range(files)]
    seconds = [0.0] * files
    began = time.monotonic()

    def fetch(number: int) -> None:
        is_next = without == "the job that the GPU waits for first" or not is_first_next or number == 0
        context = JobContext(Deadline(600), is_next=lambda: is_next)
        downloaders[number].fetch(Source(str(number), lambda: f"{url}/{number}"), Path(f"{out}{number}"), context)
        seconds[number] = time.monotonic() - began

    threads = [threading.Thread(target=fetch, args=(number,)) for number in range(files)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": seconds[0] if is_first_next else max(seconds),
        "all": max(seconds),
        "cpu": used.ru_utime + used.ru_stime,
    }


if __name__ == "__main__":
    sys.exit(main())

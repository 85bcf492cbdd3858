"""How fast files arrive, side by side with aria2c and requests: python -m benchmarks.download [--json FILE] [--quick]

A server in a process of its own throttles each connection, adds latency, cuts lines. Every client runs in a process of
its own, in turn, `--rounds` times; what is compared is the median of the rounds' ratios. Client, server and hash share
this machine's cores, so ratios are what to look at. aria2c comes from the system's packages; without it its rows say
so.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.throttle import Throttle, serving

MB = 1_000_000
MiB = 1024 * 1024
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """One line of the table: `measured` against `goal`; `met` is None where there is nothing to meet."""

    work: str
    measured: str
    goal: str
    met: bool | None


@dataclass(frozen=True)
class Run:
    seconds: float
    sent: int
    links: int = 1
    memory: int = 0


@dataclass(frozen=True)
class Bench:
    folder: Path  # the files that are served, in memory where there is room
    disk: Path  # what arrives
    size: int
    rounds: int
    overwrite: bool = False  # what arrives takes the place of what the last client left

    def in_memory(self) -> Bench:
        """The same without a disk, which would be what is measured where no line is."""
        return replace(self, disk=self.folder)

    def compare(self, clients: dict[str, Callable[[Throttle], Run]], **line: Any) -> dict[str, list[Run]]:
        """Run every client in turn, again and again, each against a fresh server."""
        runs: dict[str, list[Run]] = {name: [] for name in clients}
        for _ in range(self.rounds):
            for name, client in clients.items():
                with serving(self.folder / "files", **line) as server:
                    run = client(server)
                    runs[name].append(Run(run.seconds, server.counts()["bytes"], run.links, run.memory))
                for left in self.disk.glob("out*.ranges" if self.overwrite else "out*"):
                    left.unlink()
        return runs


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.download", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the table there too")
    parser.add_argument("--quick", action="store_true", help="small files, one round: whether it works, not how fast")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to put some gigabytes (default: memory, else /tmp)")
    parser.add_argument("--only", help="rows whose name matches")
    parser.add_argument("--client", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.client:
        print(json.dumps(_client(given.client)))
        return 0
    size = 256 * MiB if given.quick else 2048 * MiB
    with _folder(given.folder, size) as folder, tempfile.TemporaryDirectory(prefix="bench-") as disk:
        bench = Bench(folder, Path(disk), size, 1 if given.quick else given.rounds)
        rows = [row for measure in _ROWS if re.search(given.only or "", measure.__name__) for row in measure(bench)]
    print(table(rows))
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


def table(rows: Sequence[Row]) -> str:
    marks = {True: "yes", False: "**no**", None: ""}
    lines = ["| work | measured | goal | met |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {row.work} | {row.measured} | {row.goal} | {marks[row.met]} |" for row in rows)])


# --- the rows


def throttled(bench: Bench) -> Iterator[Row]:
    runs = bench.compare(
        {
            "ours": _ours(bench),
            "unproven": _ours(bench, prove=False),
            "aria2": _aria2(bench),
            "sha256": lambda server: Run(_hashed(bench.folder / "files" / "big"), 0),
        },
        rate=20 * MB,
        latency=0.05,
    )
    work = f"{_gb(bench)}, 20 MB/s a connection, 50 ms latency"
    yield _against(f"{work}, SHA-256 included, against `aria2c -x16 -s16` without", bench, runs, "ours", "aria2", 0.95)
    yield _against(f"{work}, SHA-256 left out, against the same", bench, runs, "unproven", "aria2", None)
    ratio = _ratio(runs["ours"], runs["unproven"])
    yield Row(
        f"{work}, SHA-256 included, against left out",
        f"{ratio:.2f} × the time (SHA-256 alone: {_rate(bench, runs['sha256'])})",
        "≤ 1.05 ×",
        ratio <= 1.05,
    )


def unthrottled(bench: Bench) -> Iterator[Row]:
    bench = bench.in_memory()
    runs = bench.compare(
        {
            "ours": _ours(bench, prove=False),
            "aria2": _aria2(bench),
            "requests": _python(bench, "requests"),
            "proven": _ours(bench),
        }
    )
    work = f"{_gb(bench)}, not throttled"
    yield _against(f"{work}, proof off, against `aria2c -x16 -s16`", bench, runs, "ours", "aria2", 1.5)
    yield _against(f"{work}, proof off, against `requests` with 8 KiB pieces", bench, runs, "ours", "requests", 2.5)
    yield Row(f"{work}, with the proof", _rate(bench, runs["proven"]), "", None)
    memory = max(run.memory for run in (*runs["ours"], *runs["proven"]))
    yield Row("memory, over the idle process", f"{memory / MiB:.0f} MiB", "≤ 64 MB", memory <= 64 * MB)


def resets(bench: Bench) -> Iterator[Row]:
    rounds = bench.rounds
    # Overwritten, since new memory can cost more than the whole download, and never twice the same: the machine below
    # takes it away when it is free.
    bench = replace(bench.in_memory(), rounds=1, overwrite=True)
    every = bench.size // 10
    client = {"ours": _ours(bench, prove=False)}
    bench.compare(client)
    smooth, broken = [], []
    for _ in range(rounds):
        smooth += bench.compare(client)["ours"]
        broken += bench.compare(client, reset_every=every)["ours"]
    time_ratio, byte_ratio = _ratio(broken, smooth), max(run.sent for run in broken) / bench.size
    links = max(run.links for run in broken)
    yield Row(
        f"{_gb(bench)}, a reset every {every / MB:.0f} MB",
        f"{time_ratio:.2f} × the time, {byte_ratio:.3f} × the bytes, {links} link asked for",
        "≤ 1.1 ×, ≤ 1.05 ×, 1",
        time_ratio <= 1.1 and byte_ratio <= 1.05 and links == 1,
    )


def loras(bench: Bench) -> Iterator[Row]:
    size = bench.size // 10
    for number in range(9):
        _fill(bench.folder / "files" / f"lora{number}", size)
    runs = bench.compare(
        {"ours": _python(bench, "ours", "--nine", "--no-proof"), "proven": _python(bench, "ours", "--nine")},
        rate=20 * MB,
    )
    ideal = 9 * size / (16 * 20 * MB)
    for name, words in (("proven", "SHA-256 included"), ("ours", "without SHA-256")):
        ratio = _seconds(runs[name]) / ideal
        yield Row(
            f"9 LoRAs of {size / MB:.0f} MB at once, 20 MB/s a connection, {words}",
            f"{ratio:.2f} × (bytes ÷ 320 MB/s)",
            "≤ 1.15 ×",
            ratio <= 1.15,
        )


_ROWS = (throttled, unthrottled, resets, loras)


def _against(work: str, bench: Bench, runs: dict[str, list[Run]], mine: str, other: str, goal: float | None) -> Row:
    if not all(run.seconds for run in runs[other]):
        return Row(work, f"{_rate(bench, runs[mine])}; aria2c is not installed", f"≥ {goal} ×" if goal else "", None)
    ratio = _ratio(runs[other], runs[mine])
    measured = f"{ratio:.2f} × ({_rate(bench, runs[mine])}, the other {_rate(bench, runs[other])})"
    return Row(work, measured, f"≥ {goal} ×" if goal else "", ratio >= goal if goal else None)


def _ratio(some: Sequence[Run], others: Sequence[Run]) -> float:
    """Of the times, round by round: what else the machine does changes from round to round."""
    return statistics.median(one.seconds / other.seconds for one, other in zip(some, others, strict=True))


def _seconds(runs: Sequence[Run]) -> float:
    return statistics.median(run.seconds for run in runs)


def _rate(bench: Bench, runs: Sequence[Run]) -> str:
    return f"{bench.size / _seconds(runs) / MB:.0f} MB/s"


def _gb(bench: Bench) -> str:
    return f"{bench.size / 1024**3:.3g} GiB"


# --- the clients


def _ours(bench: Bench, *, prove: bool = True) -> Callable[[Throttle], Run]:
    return _python(bench, "ours", *([] if prove else ["--no-proof"]))


def _python(bench: Bench, client: str, *options: str) -> Callable[[Throttle], Run]:
    def run(server: Throttle) -> Run:
        command = [
            sys.executable,
            "-m",
            "benchmarks.download",
            "--client",
            client,
            server.url,
            str(bench.disk / "out"),
        ]
        done = subprocess.run([*command, *options], cwd=_ROOT, stdout=subprocess.PIPE, check=True)
        said = json.loads(done.stdout)
        return Run(said["seconds"], 0, said["links"], said["memory"])

    return run


def _aria2(bench: Bench) -> Callable[[Throttle], Run]:
    def run(server: Throttle) -> Run:
        aria2c = shutil.which("aria2c")
        if not aria2c:
            return Run(0.0, 0)
        options = ["-x16", "-s16", "-q", "--no-conf", "--file-allocation=none", "-d", str(bench.disk), "-o", "out"]
        began = time.monotonic()
        subprocess.run([aria2c, *options, server.link("big")], check=True)
        return Run(time.monotonic() - began, 0)

    return run


def _client(arguments: Sequence[str]) -> dict[str, Any]:
    """Inside a client's process: the time without the interpreter's start, the memory over what it was before."""
    name, url, out, *options = arguments
    if name == "requests":
        return _timed(lambda: _with_requests(f"{url}/big", Path(out)))
    from a1111_worker.context import Deadline
    from a1111_worker.transfer.download import Downloader
    from a1111_worker.transfer.egress import EgressPolicy

    asked: list[bool] = []

    class Source:
        def __init__(self, link: str) -> None:
            self._link = link

        def link(self, *, renew: bool) -> str:
            asked.append(renew)
            return self._link

    downloader = Downloader(EgressPolicy([url]))
    prove = "--no-proof" not in options
    files = [f"lora{number}" for number in range(9)] if "--nine" in options else ["big"]

    def fetch(file: str) -> None:
        downloader.fetch(Source(f"{url}/{file}"), Path(f"{out}.{file}"), deadline=Deadline(600), prove=prove)

    def all_at_once() -> None:
        threads = [threading.Thread(target=fetch, args=(file,)) for file in files]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    said = _timed(all_at_once)
    return {**said, "links": len(asked)}


def _timed(work: Callable[[], object]) -> dict[str, Any]:
    before = _status("VmRSS")
    began = time.monotonic()
    work()
    return {"seconds": time.monotonic() - began, "memory": _status("VmHWM") - before, "links": 1}


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def _with_requests(url: str, out: Path) -> None:
    import requests

    with requests.get(url, stream=True, timeout=30) as answer, out.open("wb") as file:
        for piece in answer.iter_content(8192):
            file.write(piece)


# --- what it stands on


def _hashed(path: Path) -> float:
    digest, began = hashlib.sha256(), time.monotonic()
    with path.open("rb") as file:
        while piece := file.read(MiB):
            digest.update(piece)
    return time.monotonic() - began


@contextlib.contextmanager
def _folder(wished: Path | None, size: int) -> Iterator[Path]:
    memory = Path("/dev/shm")
    room = memory.is_dir() and shutil.disk_usage(memory).free > 4 * size
    with tempfile.TemporaryDirectory(dir=wished or (memory if room else None), prefix="bench-") as folder:
        (Path(folder) / "files").mkdir()
        _fill(Path(folder) / "files" / "big", size)
        yield Path(folder)


def _fill(path: Path, size: int) -> None:
    block = os.urandom(8 * MiB)
    with path.open("wb") as file:
        while (left := size - file.tell()) > 0:
            file.write(block[:left])


if __name__ == "__main__":
    sys.exit(main())

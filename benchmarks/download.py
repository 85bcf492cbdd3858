"""How fast files arrive, side by side with aria2c and requests: python -m benchmarks.download [--json FILE] [--quick]

A server in a process of its own throttles each connection, adds latency and resets connections. The clients run in
turn, each in a process of its own, `--rounds` times. The medians of the rounds' ratios are compared: client, server and
hash share this machine's cores, so ratios say more than rates. Our engine computes the SHA-256 while it downloads; the
other clients compute none. aria2c comes from the system's packages; its rows say so if it is not installed.
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

from benchmarks.report import Row, show
from benchmarks.throttle import Throttle, serving

MB = 1_000_000
MiB = 1024 * 1024
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class ClientRun:
    """What one download took. `sent`: bytes that the server sent. `memory`: bytes beyond the idle process."""

    seconds: float
    sent: int = 0
    links: int = 1
    memory: int = 0


@dataclass(frozen=True)
class Bench:
    """Where the files are, and how often each client downloads them."""

    folder: Path  # of the files that are served; in memory if there is room
    disk: Path  # the folder to download to
    size: int
    rounds: int
    overwrite: bool = False  # the files of one client take the place of those of the one before

    def in_memory(self) -> Bench:
        """The same without a disk: if nothing is throttled, the disk would be measured."""
        return replace(self, disk=self.folder)

    def compare(
        self, clients: dict[str, Callable[[Throttle], ClientRun]], **network: Any
    ) -> dict[str, list[ClientRun]]:
        """Run every client in turn, again and again, each against a new server. `network`: see `serving`."""
        runs: dict[str, list[ClientRun]] = {name: [] for name in clients}
        for _ in range(self.rounds):
            for name, client in clients.items():
                with serving(self.folder / "files", **network) as server:
                    runs[name].append(replace(client(server), sent=server.counts()["bytes"]))
                for left in self.disk.glob("out*.ranges" if self.overwrite else "out*"):
                    left.unlink()
        return runs


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.download", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows there too")
    parser.add_argument(
        "--quick", action="store_true", help="small files, one round: to see that it works, not how fast"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to put some gigabytes (default: memory, else /tmp)")
    parser.add_argument("--only", help="only the rows whose name matches")
    parser.add_argument("--client", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.client:
        print(json.dumps(_client(given.client)))
        return 0
    size = 256 * MiB if given.quick else 2048 * MiB
    with _folder(given.folder, size) as folder, tempfile.TemporaryDirectory(prefix="bench-") as disk:
        bench = Bench(folder, Path(disk), size, 1 if given.quick else given.rounds)
        rows = [row for measure in _ROWS if re.search(given.only or "", measure.__name__) for row in measure(bench)]
    show("Downloads", rows)
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


# --- the rows


def throttled(bench: Bench) -> Iterator[Row]:
    runs = bench.compare(
        {
            "ours": _ours(bench),
            "aria2": _aria2(bench),
            "sha256": lambda server: ClientRun(_seconds_to_hash(bench.folder / "files" / "big")),
        },
        rate=20 * MB,
        latency=0.05,
    )
    work = f"{_gb(bench)}, 20 MB/s a connection, 50 ms latency"
    yield _against(f"{work}, SHA-256 included, against `aria2c -x16 -s16` without", bench, runs, "ours", "aria2", 0.95)
    yield Row("the SHA-256 of the same file alone", _rate(bench, runs["sha256"]))


def unthrottled(bench: Bench) -> Iterator[Row]:
    bench = bench.in_memory()
    runs = bench.compare({"ours": _ours(bench), "aria2": _aria2(bench), "requests": _python(bench, "requests")})
    work = f"{_gb(bench)}, not throttled, SHA-256 included"
    yield _against(f"{work}, against `aria2c -x16 -s16` without", bench, runs, "ours", "aria2")
    yield _against(f"{work}, against `requests` with 8 KiB chunks, without", bench, runs, "ours", "requests")
    memory = max(run.memory for run in runs["ours"])
    yield Row("memory, over the idle process", f"{memory / MiB:.0f} MiB", "≤ 64 MB", memory <= 64 * MB)


def resets(bench: Bench) -> Iterator[Row]:
    rounds = bench.rounds
    # Files are overwritten: new memory can cost more than the whole download, and never the same twice, since a virtual
    # machine's host takes free memory away.
    bench = replace(bench.in_memory(), rounds=1, overwrite=True)
    every = bench.size // 10
    client = {"ours": _ours(bench)}
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
    runs = bench.compare({"ours": _python(bench, "ours", "--nine")}, rate=20 * MB)
    ratio = _seconds(runs["ours"]) / (9 * size / (16 * 20 * MB))
    yield Row(
        f"9 LoRAs of {size / MB:.0f} MB at once, 20 MB/s a connection, SHA-256 included",
        f"{ratio:.2f} × (bytes ÷ 320 MB/s)",
        "≤ 1.15 ×",
        ratio <= 1.15,
    )


_ROWS = (throttled, unthrottled, resets, loras)


def _against(
    work: str, bench: Bench, runs: dict[str, list[ClientRun]], mine: str, other: str, goal: float | None = None
) -> Row:
    """How many times as fast one client is as the other."""
    words = f"≥ {goal} ×" if goal else ""
    if not all(run.seconds for run in runs[other]):
        return Row(work, f"{_rate(bench, runs[mine])}; aria2c is not installed", words)
    ratio = _ratio(runs[other], runs[mine])
    measured = f"{ratio:.2f} × ({_rate(bench, runs[mine])}, the other {_rate(bench, runs[other])})"
    return Row(work, measured, words, ratio >= goal if goal else None)


def _ratio(some: Sequence[ClientRun], others: Sequence[ClientRun]) -> float:
    """Of the times, round by round: what else the machine does changes from round to round."""
    return statistics.median(a.seconds / b.seconds for a, b in zip(some, others, strict=True))


def _seconds(runs: Sequence[ClientRun]) -> float:
    return statistics.median(run.seconds for run in runs)


def _rate(bench: Bench, runs: Sequence[ClientRun]) -> str:
    return f"{bench.size / _seconds(runs) / MB:.0f} MB/s"


def _gb(bench: Bench) -> str:
    return f"{bench.size / 1024**3:.3g} GiB"


# --- the clients


def _ours(bench: Bench) -> Callable[[Throttle], ClientRun]:
    return _python(bench, "ours")


def _python(bench: Bench, client: str, *options: str) -> Callable[[Throttle], ClientRun]:
    def run(server: Throttle) -> ClientRun:
        module = [sys.executable, "-m", "benchmarks.download"]
        command = [*module, "--client", client, server.url, str(bench.disk / "out"), *options]
        done = subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, check=True)
        return ClientRun(**json.loads(done.stdout))

    return run


def _aria2(bench: Bench) -> Callable[[Throttle], ClientRun]:
    def run(server: Throttle) -> ClientRun:
        aria2c = shutil.which("aria2c")
        if not aria2c:
            return ClientRun(0.0)
        options = ["-x16", "-s16", "-q", "--no-conf", "--file-allocation=none", "-d", str(bench.disk), "-o", "out"]
        began = time.monotonic()
        subprocess.run([aria2c, *options, server.link("big")], check=True)
        return ClientRun(time.monotonic() - began)

    return run


def _client(arguments: Sequence[str]) -> dict[str, Any]:
    """Inside a client's process: the fields of its ClientRun. The time is without the interpreter's start."""
    name, url, out, *options = arguments
    if name == "requests":
        return _timed(lambda: _with_requests(f"{url}/big", Path(out)))
    from a1111_worker.context import Deadline, JobContext
    from a1111_worker.transfer.download import Downloader, Source
    from a1111_worker.transfer.egress import EgressPolicy

    downloader = Downloader(EgressPolicy([url]))
    files = [f"lora{number}" for number in range(9)] if "--nine" in options else ["big"]
    links: list[str] = []

    def fetch(file: str) -> None:
        def link() -> str:
            links.append(f"{url}/{file}")
            return links[-1]

        downloader.fetch(Source(file, link), Path(f"{out}.{file}"), JobContext(Deadline(600)))

    def fetch_all_at_once() -> None:
        threads = [threading.Thread(target=fetch, args=(file,)) for file in files]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return {**_timed(fetch_all_at_once), "links": len(links)}


def _timed(work: Callable[[], object]) -> dict[str, Any]:
    before = _status("VmRSS")
    began = time.monotonic()
    work()
    return {"seconds": time.monotonic() - began, "memory": _status("VmHWM") - before}


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def _with_requests(url: str, out: Path) -> None:
    import requests

    with requests.get(url, stream=True, timeout=30) as answer, out.open("wb") as file:
        for chunk in answer.iter_content(8192):
            file.write(chunk)


# --- files


def _seconds_to_hash(path: Path) -> float:
    digest, began = hashlib.sha256(), time.monotonic()
    with path.open("rb") as file:
        while chunk := file.read(MiB):
            digest.update(chunk)
    return time.monotonic() - began


@contextlib.contextmanager
def _folder(given: Path | None, size: int) -> Iterator[Path]:
    memory = Path("/dev/shm")
    room = memory.is_dir() and shutil.disk_usage(memory).free > 4 * size
    with tempfile.TemporaryDirectory(dir=given or (memory if room else None), prefix="bench-") as folder:
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

"""Runs the benchmarks, one after the other. They measure what the docs claim about speed.

    python -m benchmarks [--quick] [NAME…]

Each benchmark runs in its own process and prints its own table. The rows of all of them are written to
benchmarks/results.json, with the machine on which they were measured. A benchmark that does not run this time keeps its
old rows. The exit status is 0 if every benchmark finished. Whether they met their goals is only in the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results.json"
BENCHMARKS = ("warm_job", "in_flight", "checkpoints", "memory", "boot", "cache", "headers", "download", "gateway")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Run the benchmarks, one after the other."
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller files; not a valid result")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these: {', '.join(BENCHMARKS)}")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown benchmark: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    failed = [name for name in options.names or BENCHMARKS if not run_benchmark(name, options.quick)]
    rows = [row for result in read_results().values() for row in result["rows"]]
    met, unmet = (sum(row["met"] is expected for row in rows) for expected in (True, False))
    print(f"\n{met} goals met, {unmet} not met; all rows are in {RESULTS.relative_to(ROOT)}")
    if failed:
        print(f"did not finish: {', '.join(failed)}")
    return 1 if failed else 0


def run_benchmark(name: str, quick: bool) -> bool:
    """Run one benchmark and save its rows; whether it finished."""
    print(f"\n{name} …", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(rows), *(["--quick"] if quick else [])]
        if subprocess.run(command, cwd=ROOT).returncode != 0 or not rows.exists():
            return False
        save_rows(name, json.loads(rows.read_bytes()), quick, time.monotonic() - began)
    return True


def save_rows(name: str, rows: list[dict[str, Any]], quick: bool, seconds: float) -> None:
    result = {
        "rows": rows,
        "quick": quick,
        "seconds": round(seconds, 1),
        "machine": f"{os.cpu_count()} cores, {processor()}, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    new = RESULTS.with_name(f"{RESULTS.name}.new")
    new.write_text(json.dumps({**read_results(), name: result}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    new.replace(RESULTS)


def processor() -> str:
    """The processor's name, and whether it has SHA instructions. Without them a download waits for its SHA-256."""
    with contextlib.suppress(OSError):
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        facts = {name.strip(): value.strip() for name, _, value in lines}
        flags = (facts.get("flags") or facts.get("Features") or "").split()
        has_sha = not {"sha_ni", "sha2"}.isdisjoint(flags)
        return f"{facts.get('model name', platform.machine())} {'with' if has_sha else 'without'} SHA instructions"
    return platform.machine()


def read_results() -> dict[str, Any]:
    """The results of earlier runs, by benchmark."""
    try:
        found = json.loads(RESULTS.read_bytes())
    except (OSError, ValueError):
        return {}
    return {name: result for name, result in found.items() if name in BENCHMARKS} if isinstance(found, dict) else {}


if __name__ == "__main__":
    sys.exit(main())

"""Every bench, one after the other: what the docs say about speed, measured here.

    python -m benchmarks [--quick] [NAME…]

Each one is a process of its own and prints its own table. All rows together are written to benchmarks/results.json,
with the machine they come from; a bench that was not run this time keeps the rows it had. The exit status is 0 when
every bench ran through, whether or not its goals were met: the tables say that.
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
BENCHES = ("warm_job", "in_flight", "memory", "boot", "cache", "headers", "download")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Every bench, one after the other.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller files: a look, not a result")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of them only: {', '.join(BENCHES)}")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in BENCHES]
    if unknown:
        parser.error(f"there is no bench {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    failed = [name for name in options.names or BENCHES if not take(name, options.quick)]
    rows = [row for bench in known().values() for row in bench["rows"]]
    met, unmet = (sum(row["met"] is wanted for row in rows) for wanted in (True, False))
    print(f"\n{met} goals met, {unmet} not; all rows are in {RESULTS.relative_to(ROOT)}")
    if failed:
        print(f"did not run through: {', '.join(failed)}")
    return 1 if failed else 0


def take(name: str, quick: bool) -> bool:
    """Run one bench and keep its rows; whether it ran through."""
    print(f"\n{name} …", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(rows), *(["--quick"] if quick else [])]
        if subprocess.run(command, cwd=ROOT).returncode != 0 or not rows.exists():
            return False
        keep(name, json.loads(rows.read_bytes()), quick, time.monotonic() - began)
    return True


def keep(name: str, rows: list[dict[str, Any]], quick: bool, seconds: float) -> None:
    bench = {
        "rows": rows,
        "quick": quick,
        "seconds": round(seconds, 1),
        "machine": f"{os.cpu_count()} cores, {processor()}, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    new = RESULTS.with_name(f"{RESULTS.name}.new")
    new.write_text(json.dumps({**known(), name: bench}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    new.replace(RESULTS)


def processor() -> str:
    """Its name, and whether it has instructions for SHA-256: without them the proof is what a download waits for."""
    with contextlib.suppress(OSError):
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        facts = {name.strip(): value.strip() for name, _, value in lines}
        flags = (facts.get("flags") or facts.get("Features") or "").split()
        has_sha = not {"sha_ni", "sha2"}.isdisjoint(flags)
        return f"{facts.get('model name', platform.machine())} {'with' if has_sha else 'without'} SHA instructions"
    return platform.machine()


def known() -> dict[str, Any]:
    """The rows of earlier runs, bench by bench."""
    try:
        found = json.loads(RESULTS.read_bytes())
    except (OSError, ValueError):
        return {}
    return {name: bench for name, bench in found.items() if name in BENCHES} if isinstance(found, dict) else {}


if __name__ == "__main__":
    sys.exit(main())

"""The result of a benchmark: rows of a table, as Markdown and as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One measurement. `met` is None if there is no goal or no measurement; then `measured` has the reason."""

    work: str
    measured: str
    goal: str = ""
    met: bool | None = None


def show(title: str, rows: Sequence[Row]) -> None:
    print(f"\n{title}\n\n| work | measured | goal | met |\n| --- | --- | --- | --- |")
    for row in rows:
        met = "" if row.met is None else "yes" if row.met else "**no**"
        print(f"| {row.work} | {row.measured} | {row.goal} | {met} |", flush=True)


def run(title: str, measure: Callable[[bool], Sequence[Row]]) -> None:
    """The command line of one benchmark: `--quick` for a fast trial, `--json FILE` for the rows."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller files; not a valid result")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    rows = measure(options.quick)
    show(title, rows)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2))

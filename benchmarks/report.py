"""What every bench gives: rows of a table, as markdown and as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One measurement. `met` is None where there is no goal, or nothing was measured (`measured` says why)."""

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
    """The command line of one bench: `--quick` for a look, `--json FILE` for the rows."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller files: a look, not a result")
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    rows = measure(options.quick)
    show(title, rows)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2))

"""Log lines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import logging
from a1111_worker import logs
logs.configure("INFO", {form!r})
log = logging.getLogger("worker")
log.debug("not shown")
log.info("before")
with logs.of_job("job-1"):
    log.warning("inside %d", 1)
try:
    1 / 0
except ZeroDivisionError:
    log.exception("after")
"""


def logged(log_format: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(form=log_format)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stderr.splitlines()


def test_only_lines_inside_a_job_carry_its_id() -> None:
    before, inside, after, *trace = logged("text")

    assert before.endswith("INFO    before")
    assert inside.endswith("WARNING job-1 | inside 1")
    assert after.endswith("ERROR   after")
    assert trace[-1].startswith("ZeroDivisionError")


def test_json_lines_are_one_object_each() -> None:
    lines = [json.loads(line) for line in logged("json")]

    assert [line["requestId"] for line in lines] == [None, "job-1", None]
    assert lines[1]["message"] == "inside 1"
    assert "ZeroDivisionError" in lines[2]["exception"]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_lines_below_the_level_are_dropped(log_format: str) -> None:
    assert not any("not shown" in line for line in logged(log_format))

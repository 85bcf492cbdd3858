"""Log lines."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time

import pytest
from tqdm import tqdm

from a1111_worker.relay import relayed
from tests.support import ROOT

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
        cwd=ROOT,
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
    assert {line["source"] for line in lines} == {"worker"}
    assert "ZeroDivisionError" in lines[2]["exception"]


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_level_is_kept(form: str) -> None:
    assert not any("not shown" in line for line in logged(form))


# Lines of other processes


def relay(form: str, *printed: str) -> list[str]:
    return list(relayed([f"{line}\n".encode() for line in printed], "webui", form))


def a_bar(desc: str | None, total: int | None) -> str:
    """What tqdm really prints for a bar."""
    out = io.StringIO()
    for _ in tqdm(range(20), desc=desc, total=total, file=out, mininterval=0, ascii=False):
        pass
    return out.getvalue()


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("desc", [None, "Total progress"])
@pytest.mark.parametrize("total", [20, None])
def test_progress_bars_are_left_out(form: str, desc: str | None, total: int | None) -> None:
    printed = a_bar(desc, total)

    assert "it [" in printed or "20/20 [" in printed
    assert relay(form, *printed.split("\n")) == []


def test_a_message_that_was_printed_behind_a_bar_is_kept() -> None:
    assert relay("text", "\r 50%|█████     | 10/20 [00:03<00:03,  2.9it/s]Model loaded") == ["webui | Model loaded"]


# printed, whether it is kept
ACCESS = [
    ('INFO:     127.0.0.1:1 - "GET /sdapi/v1/progress HTTP/1.1" 200 OK', False),
    ('INFO:     127.0.0.1:1 - "GET /sdapi/v1/progress?skip_current_image=true HTTP/1.1" 200 OK', False),
    ('INFO:     127.0.0.1:1 - "GET /sdapi/v1/progress HTTP/1.1" 500 Internal Server Error', True),  # worth a look
    ('INFO:     127.0.0.1:1 - "POST /sdapi/v1/txt2img HTTP/1.1" 200 OK', True),
    ('INFO:     127.0.0.1:1 - "GET /sdapi/v1/progression HTTP/1.1" 200 OK', True),
    ("Loading weights [8ed830de38] from /tmp/webui-models/x.safetensors", True),
    ("  a traceback's line keeps its blanks", True),
    ("50% of it, 3/4 [done]", True),
    ("", False),
]


@pytest.mark.parametrize(("printed", "is_kept"), ACCESS)
def test_looks_at_the_progress_are_left_out_and_nothing_else(printed: str, is_kept: bool) -> None:
    assert relay("text", printed) == [f"webui | {printed}"] * is_kept
    assert len(relay("json", printed)) == is_kept


# printed, level, message, the job's id
LINES: list[tuple[str, str, str, str | None]] = [
    ("Model loaded in 3.1s", "INFO", "Model loaded in 3.1s", None),
    ("INFO:     Application startup complete.", "INFO", "Application startup complete.", None),  # uvicorn
    ("ERROR   | Ping Request Error", "ERROR", "Ping Request Error", None),  # the SDK off RunPod
    ("WARN   | a tip", "WARNING", "a tip", None),
    ('{"requestId": "job-1", "message": "Started.", "level": "INFO"}', "INFO", "Started.", "job-1"),  # on RunPod
    ('{"a": 1}', "INFO", '{"a": 1}', None),
    ('{"message": "cut', "INFO", '{"message": "cut', None),
    ('a "quoted" \\ line', "INFO", 'a "quoted" \\ line', None),
]


@pytest.mark.parametrize(("printed", "level", "message", "job"), LINES)
def test_with_json_every_line_is_an_object_with_time_level_source_and_message(
    printed: str, level: str, message: str, job: str | None
) -> None:
    (line,) = relay("json", printed)

    found = json.loads(line)
    assert (found["level"], found["source"], found["message"], found.get("requestId")) == (level, "webui", message, job)
    assert time.strptime(found["time"], "%Y-%m-%dT%H:%M:%SZ")


def test_the_workers_own_objects_stay_as_they_are() -> None:
    for form in ("text", "json"):
        for line in logged("json"):
            (passed,) = relay(form, line)
            assert json.loads(passed) == json.loads(line)


def test_a_line_is_passed_on_before_the_next_one_is_there() -> None:
    with subprocess.Popen(
        [sys.executable, "-IS", ROOT / "a1111_worker" / "relay.py", "webui", "text"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin and process.stdout
        process.stdin.write("größer \udcff\n".encode("utf-8", "surrogateescape"))
        process.stdin.flush()

        assert process.stdout.readline().decode() == "webui | größer \ufffd\n"

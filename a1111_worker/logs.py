"""Log lines: the worker's own, and those of the processes beside it.

    python a1111_worker/logs.py SOURCE text|json     passes on what another process prints

The worker's own lines go to stderr, one per stage, with the job's id. start.sh runs this file as a program for the
WebUI and for the worker (whose SDK prints too): then all lines of a container have one form. It needs the standard
library alone.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import re
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from a1111_worker.text import printable

MAX_LINE = 8_000  # characters of a message

_job_id: contextvars.ContextVar[str] = contextvars.ContextVar("job_id", default="")


@contextlib.contextmanager
def of_job(job_id: str) -> Iterator[None]:
    """Lines logged inside carry the job's id. So do lines of threads that run in a copy of this context."""
    token = _job_id.set(job_id)
    try:
        yield
    finally:
        _job_id.reset(token)


def configure(level: str, log_format: str) -> None:
    """Send our lines to stderr: `text`, or `json` with one object a line, as RunPod groups them by `requestId`."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter() if log_format == "json" else _TextFormatter())
    handler.addFilter(add_job_id)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # whoever gives up after its retries logs that
    for name in ("worker", "a1111_worker", "model_manager"):
        logging.getLogger(name).setLevel(level)


def add_job_id(record: logging.LogRecord) -> bool:
    """A filter that lets every record pass, and adds the id of its job as `job`."""
    record.job = _job_id.get()
    return True


def _message(record: logging.LogRecord) -> str:
    """A record's message as one printable line: no name in it can forge a line, or steer a terminal."""
    return printable(record.getMessage(), MAX_LINE)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        job = f"{record.__dict__['job']} | " if record.__dict__["job"] else ""
        line = f"{self.formatTime(record, '%H:%M:%S')} {record.levelname:<7} {job}{_message(record)}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": _time(record.created),
            "level": record.levelname,
            "source": "worker",
            "requestId": record.__dict__["job"] or None,
            "message": _message(record),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


# -- lines of other processes

# uvicorn's line for a look at the progress. A worker with a job looks twice a second.
_LOOK = re.compile(r'"GET /sdapi/v1/progress\b[^"]*" 200\b')
# tqdm's bar, such as ` 35%|███▌      | 7/20 [00:03<00:06,  2.1it/s]`, or `7it [00:03,  2.1it/s]` without a total. A1111
# passes `disable=False` to k-diffusion's bars (1.10.1, modules/sd_samplers_kdiffusion.py), so neither
# --disable-console-progressbars nor TQDM_DISABLE stops them.
_BAR = re.compile(r"[^|]{0,100}?(\d{1,3}%\|[^|]{0,200}\| *\S{1,30}/\S{1,30}|\b\d{1,9}it) \[[^\]]{0,100}\]")
# A line with a level: `INFO:     …` of uvicorn, `INFO   | …` of the SDK.
_LEVEL = re.compile(r"(TRACE|DEBUG|INFO|WARN|WARNING|ERROR|CRITICAL) *[:|] *(.*)")

_LONGEST = 1 << 20  # bytes of one line; a longer one is passed on in pieces


def relayed(lines: Iterable[bytes], source: str, form: str) -> Iterator[str]:
    """What is written to the log for another process's lines.

    Blank lines, progress bars and looks at the progress are left out.

    `text`: the source before each line; a JSON object stays as it is. `json`: one object a line, with `time`, `level`,
    `source` and `message`; an object that has a message keeps what it has.
    """
    for raw in lines:
        text = raw.decode("utf-8", "replace").rstrip("\r\n")
        if not text.startswith("{"):
            text = "".join(map(_without_bar, text.split("\r")))
        if not text or _LOOK.search(text):
            continue
        if form == "json":
            yield json.dumps(_as_object(text, source))
        else:
            yield text if text.startswith("{") else f"{source} | {text}"


def _without_bar(piece: str) -> str:
    bar = _BAR.match(piece)
    return piece[bar.end() :].rstrip() if bar else piece


def _as_object(text: str, source: str) -> dict[str, Any]:
    try:
        found = json.loads(text) if text.startswith("{") else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or "message" not in found:
        level = _LEVEL.match(text)
        found = {"level": level[1], "message": level[2]} if level else {"message": text}
    found = {"time": _time(time.time()), "level": "INFO", "source": source} | found
    found["level"] = "WARNING" if found["level"] == "WARN" else found["level"]
    return found


def _main(source: str, form: str) -> None:
    form = form.strip().lower()
    for line in relayed(iter(lambda: sys.stdin.buffer.readline(_LONGEST), b""), source, form):
        sys.stdout.buffer.write(f"{line}\n".encode("utf-8", "replace"))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # nobody reads the log any more
        _main(*sys.argv[1:3])

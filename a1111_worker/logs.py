"""Log lines for the person at three in the morning: one a stage, with the job's id, on stderr."""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import time
from collections.abc import Iterator

from a1111_worker.text import printable

MAX_LINE = 8_000  # characters of a message

_job: contextvars.ContextVar[str] = contextvars.ContextVar("job", default="")


@contextlib.contextmanager
def of_job(job_id: str) -> Iterator[None]:
    """Lines logged inside carry the job's id; so do those of threads started with this context."""
    token = _job.set(job_id)
    try:
        yield
    finally:
        _job.reset(token)


def configure(level: str, form: str) -> None:
    """Send our lines to stderr: `text`, or `json` with one object a line, as RunPod groups them by `requestId`."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if form == "json" else _Text())
    handler.addFilter(with_job)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # what is tried again is told by whoever gives up
    for name in ("worker", "a1111_worker", "model_manager"):
        logging.getLogger(name).setLevel(level)


def with_job(record: logging.LogRecord) -> bool:
    """A filter that lets everything pass, and gives it the id of the job it belongs to."""
    record.job = _job.get()
    return True


def _message(record: logging.LogRecord) -> str:
    """A record's message as one printable line: no name in it can forge a line, or steer a terminal."""
    return printable(record.getMessage(), MAX_LINE)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        job = f"{record.__dict__['job']} | " if record.__dict__["job"] else ""
        line = f"{self.formatTime(record, '%H:%M:%S')} {record.levelname:<7} {job}{_message(record)}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        found = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname,
            "requestId": record.__dict__["job"] or None,
            "message": _message(record),
        }
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found)

"""The worker's own log lines, on stderr: one per stage, with the job's id. relay.py has those of others."""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
from collections.abc import Iterator

from a1111_worker.relay import utc_time
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
    """Send our lines to stderr: `text`, or `json` with one object per line, as RunPod groups them by `requestId`."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter() if log_format == "json" else _TextFormatter())
    handler.addFilter(add_job_id)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # the code that gives up after the retries logs that itself
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
            "time": utc_time(record.created),
            "level": record.levelname,
            "source": "worker",
            "requestId": record.__dict__["job"] or None,
            "message": _message(record),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)

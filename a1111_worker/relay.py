"""The lines of other processes, as the container's log shows them.

start.sh runs this file as a filter for the WebUI, the worker and itself: `python relay.py SOURCE text|json`. So it is
started without the worker's packages, and imports the standard library alone.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

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


def utc_time(seconds: float) -> str:
    """Seconds since the epoch, as log lines show them."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


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
    found = {"time": utc_time(time.time()), "level": "INFO", "source": source} | found
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

"""What the commands share: the options that name an endpoint, errors, and progress bars on standard error."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Coroutine, Iterator, Mapping
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from a1111_client.credentials import key_file, open_endpoint
from a1111_client.endpoint import Endpoint, Job, JobState
from a1111_client.errors import EndpointError

T = TypeVar("T")

FAILED = 1
WRONG_OPTIONS = 2
TRY_AGAIN = 3
"""The exit status of a failure that the same command may not meet later: a lost connection, a dead worker."""

STOPPED = 130
_NOTHING_SENT = ("BAD_OPTION", "NO_ENDPOINT", "NO_KEY", "NOT_CONFIRMED")
"""The codes of what is wrong before anything is sent."""

EndpointId = Annotated[
    str, typer.Option("--endpoint", envvar="RUNPOD_ENDPOINT_ID", help="The endpoint's id on RunPod.", metavar="ID")
]
Url = Annotated[
    str, typer.Option("--url", envvar="A1111_URL", help="An endpoint elsewhere, such as http://127.0.0.1:8000.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def the_endpoint(endpoint_id: str, url: str) -> Endpoint:
    """The endpoint that the options name. Ends the command if there is none."""
    with errors():
        return open_endpoint(endpoint_id, url, os.environ, key_file())


def run(work: Coroutine[Any, Any, T], *, as_json: bool = False) -> T:
    """Do the work. If it is left early, its jobs are cancelled first, and the log says so."""
    with errors(as_json=as_json):
        return asyncio.run(work)


@contextlib.contextmanager
def errors(*, as_json: bool = False) -> Iterator[None]:
    """End the command if the block fails: with an error's code, sentence and hint, or after Ctrl-C."""
    try:
        yield
    except EndpointError as error:
        fail_with(error, as_json=as_json)
    except KeyboardInterrupt:
        fail("stopped", status=STOPPED)


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def print_table(table: Table) -> None:
    """Print a table, every name as it is and whole: in a terminal over several lines, elsewhere on one."""
    for column in table.columns:
        column.overflow = "fold"
    width = None if sys.stdout.isatty() else 1000
    Console(width=width, markup=False, emoji=False, highlight=False).print(table)


def fail_with(error: EndpointError, *, as_json: bool = False) -> NoReturn:
    """End with the code, the sentence and the hint."""
    if as_json:
        print_json(error.as_json())
    fail(f"{error}" + (f"\n  {error.hint}" if error.hint else ""), status=status_of(error))


def status_of(error: EndpointError) -> int:
    """The exit status of a command that failed so."""
    if error.code in _NOTHING_SENT:
        return WRONG_OPTIONS
    return TRY_AGAIN if error.retryable else FAILED


def fail(message: str, *, status: int = FAILED) -> NoReturn:
    sys.stderr.write(f"a1111: {message}\n")
    raise typer.Exit(status)


class Bars:
    """Progress bars on standard error; nothing if that is no terminal."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def add(self, name: str, total: float = 100.0) -> TaskID:
        return self._progress.add_task(name, total=total, note="")

    def advance(self, bar: TaskID) -> None:
        self._progress.advance(bar)

    def remove(self, bar: TaskID) -> None:
        self._progress.remove_task(bar)

    def show(self, bar: TaskID, state: JobState, place: str) -> None:
        """A job's state: its place in the queue, or its stage with MB/s or steps."""
        percent = state.progress.get("percent")
        done = percent if isinstance(percent, (int, float)) else None
        self._progress.update(bar, completed=done, note=describe(state, place))


def describe(state: JobState, place: str) -> str:
    """What a job does now, in a few words. `place` is where it stands in the queue."""
    if state.status == "IN_QUEUE":
        return place
    told: Mapping[str, Any] = state.progress
    speed = f"{told['mb_per_s']} MB/s" if "mb_per_s" in told else ""
    return ", ".join(str(part) for part in (told.get("stage", ""), told.get("detail", ""), speed) if part)


async def follow(job: Job, bars: Bars, bar: TaskID) -> dict[str, Any]:
    """Wait for a job and show its progress. Its answer. Raises EndpointError."""
    place = "in the queue"

    async def watch_queue() -> None:
        nonlocal place
        while True:
            await asyncio.sleep(job.endpoint.timings.queue_look)
            try:
                place = await job.endpoint.describe_queue()
            except EndpointError:
                continue
            bars.show(bar, job.state, place)

    bars.show(bar, job.state, place)
    watching = asyncio.ensure_future(watch_queue())
    try:
        async for state in job.follow():
            if state.status != "IN_QUEUE":
                watching.cancel()
            bars.show(bar, state, place)
    finally:
        watching.cancel()
    return job.answer()

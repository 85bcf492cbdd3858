"""Many jobs from a file, several at once, resumable.

    jobs.jsonl            a job's input in each line: {"prompt": "a lighthouse", "seed": 1}
    jobs.results.jsonl    a line for each job that has ended, in the order of their ends:
                          {"line": 1, "job": "3f2a…", "files": ["out/1.png"], "seeds": [1], "seconds": 4.2}
                          {"line": 2, "job": "77b0…", "error": "MODEL_NOT_FOUND: …", "code": "MODEL_NOT_FOUND", …}

`job` is a hash of the input. A job whose hash has a line with files is not sent again, so a batch that was stopped, or
of which some failed, is started again with the same command.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a1111_client.endpoint import Endpoint
from a1111_client.errors import EndpointError
from a1111_client.pictures import fetch_all, save, seeds_of, stems
from a1111_client.terminal import Bars, follow


@dataclass(frozen=True)
class BatchJob:
    """A line of the file. `line` counts from 1."""

    line: int
    given: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The same for the same input."""
        return hashlib.sha256(json.dumps(self.given, sort_keys=True).encode()).hexdigest()[:16]


def read_jobs(text: str) -> list[BatchJob]:
    """The jobs of a file. Raises EndpointError with all lines that are none."""
    jobs, problems = [], []
    for number, line in enumerate(text.split("\n"), start=1):  # JSON may hold the other ends of lines of `splitlines`
        if not line.strip():
            continue
        try:
            given = json.loads(line)
        except ValueError:
            given = None
        if isinstance(given, dict) and isinstance(given.get("input"), dict):
            given = given["input"]
        if isinstance(given, dict):
            jobs.append(BatchJob(number, given))
        else:
            problems.append(f"line {number}")
    if problems:
        raise EndpointError("BAD_OPTION", f"{', '.join(problems[:20])}: must be a JSON object, a job's input")
    return jobs


def left_to_do(jobs: Sequence[BatchJob], results: str) -> list[BatchJob]:
    """The jobs that have no result with files yet. Two equal lines need two results."""
    done = Counter(str(result["job"]) for result in _read_results(results) if "files" in result and "job" in result)
    left = []
    for job in jobs:
        if done[job.key]:
            done[job.key] -= 1
        else:
            left.append(job)
    return left


def _read_results(text: str) -> Iterator[dict[str, Any]]:
    for line in text.split("\n"):
        try:
            result = json.loads(line)
        except ValueError:
            continue  # the last line of a batch that was killed
        if isinstance(result, dict):
            yield result


def end_last_line(results: Path) -> None:
    """Let the next result begin a line of its own, also if a batch was killed as it wrote one. Raises OSError."""
    with results.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")


class Batch:
    """Runs jobs, `at_once` at most, and writes a result for each as it ends."""

    def __init__(self, endpoint: Endpoint, results: Path, out: Path, at_once: int) -> None:
        self._endpoint = endpoint
        self._results = results
        self._out = out
        self._at_once = asyncio.Semaphore(at_once)

    async def run(self, jobs: Sequence[BatchJob], total: int) -> int:
        """Run the jobs, to the end of each; how many failed. `total` counts those of earlier runs too."""
        with Bars() as bars:
            everything = bars.add("all", total)
            for _ in range(total - len(jobs)):
                bars.advance(everything)

            async def run_one(job: BatchJob) -> bool:
                async with self._at_once:
                    result = await self._run_job(job, bars)
                    with self._results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(result, ensure_ascii=False) + "\n")
                    bars.advance(everything)
                    return "error" not in result

            return (await asyncio.gather(*(run_one(job) for job in jobs))).count(False)

    async def _run_job(self, job: BatchJob, bars: Bars) -> dict[str, Any]:
        begun, bar = time.monotonic(), bars.add(f"line {job.line}")
        try:
            async with self._endpoint.job(job.given) as sent:
                answer = await follow(sent, bars, bar)
            pictures = await fetch_all(self._endpoint, answer)
            files = await asyncio.to_thread(save, self._out, pictures, stems(answer, len(pictures)))
            result: dict[str, Any] = {"files": [str(file) for file in files], "seeds": seeds_of(answer)}
        except EndpointError as error:
            result = error.as_json()
        finally:
            bars.remove(bar)
        return {"line": job.line, "job": job.key, **result, "seconds": round(time.monotonic() - begun, 1)}

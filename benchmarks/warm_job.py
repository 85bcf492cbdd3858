"""What the worker adds to a warm job: `Worker.handle` against `requests.post(…).json()` of the same body.

    python -m benchmarks.warm_job [--quick] [--json FILE]

Both use the same sandbox WebUI (a process of its own, generation time 0, an image of 2 MB), in turn, and both
serialise the answer. The ratio of the medians is the result; milliseconds are for information.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import requests

from a1111_worker.config import Config
from a1111_worker.images import is_blank
from benchmarks.place import place
from benchmarks.report import Row, run
from handler import Worker

GOAL = 1.15
BODY = {"prompt": "a lighthouse", "steps": 1, "seed": 42, "sampler_name": "Euler a", "width": 512, "height": 512}


def measure(quick: bool) -> list[Row]:
    with place("--image-bytes", "2000000") as here:
        worker = Worker(Config.from_env(here.settings))
        try:
            worker.boot()
            rows = compare(worker, here.webui_url, 15 if quick else 60)
        finally:
            worker.close()
    return [*rows, import_time()]


def compare(worker: Worker, url: str, rounds: int) -> list[Row]:
    loop = asyncio.new_event_loop()
    job = {"id": "sync-bench", "input": BODY}

    def ours() -> None:
        json.dumps(loop.run_until_complete(worker.handle(job)))

    def bare(**headers: str) -> None:
        json.dumps(requests.post(f"{url}/sdapi/v1/txt2img", json=BODY, headers=headers, timeout=60).json())

    turns: dict[str, Callable[[], None]] = {
        "worker": ours,
        "requests without gzip": lambda: bare(**{"Accept-Encoding": "identity"}),
        "requests": bare,  # A1111 compresses for a client that accepts it: 80 ms for 2 MB
    }
    milliseconds: dict[str, list[float]] = {name: [] for name in turns}
    for round_ in range(rounds + 3):
        for name, turn in turns.items():
            spent = timed(turn)
            if round_ >= 3:  # the first ones are warm-up
                milliseconds[name].append(spent)
    loop.close()
    picture = requests.post(f"{url}/sdapi/v1/txt2img", json=BODY, timeout=60).json()["images"][0]
    blank_check = statistics.median(timed(partial(is_blank, picture)) for _ in range(rounds))
    medians = {name: statistics.median(values) for name, values in milliseconds.items()}
    return [
        *(compared(medians, other) for other in turns if other != "worker"),
        Row("… of which: the look for a picture of one colour", f"{blank_check:.2f} ms"),
    ]


def compared(medians: dict[str, float], other: str) -> Row:
    ratio = medians["worker"] / medians[other]
    return Row(
        f"a warm job, 2 MB picture, generation time 0, against {other}",
        f"{ratio:.3f} × ({medians['worker']:.1f} ms beside {medians[other]:.1f} ms)",
        f"≤ {GOAL}",
        ratio <= GOAL,
    )


def import_time() -> Row:
    """How long importing handler.py takes, without the interpreter's own start."""
    code = "import time; t = time.perf_counter(); import handler; print(time.perf_counter() - t)"
    seconds = statistics.median(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(7)
    )
    return Row("import handler (without the SDK)", f"{seconds:.3f} s", "< 0.3 s", seconds < 0.3)


def timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return (time.perf_counter() - began) * 1000


if __name__ == "__main__":
    run("A warm job", measure)

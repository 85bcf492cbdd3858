"""What the cache costs: a job whose models are there, a start with ten thousand models, a fleet that needs one file.

    python -m benchmarks.cache [--quick] [--json FILE]

Every model has its sidecar and its uses, so the folder has three times as many names. Each worker of the fleet is a
process of its own, and CivitAI with its storage is another one.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from a1111_worker.context import Deadline, JobContext
from a1111_worker.domain import ModelKind, ModelRef
from a1111_worker.models.cache import CacheSettings
from a1111_worker.models.civitai import CivitAI
from a1111_worker.models.manager import ModelManager
from a1111_worker.models.sidecars import ModelRecord
from a1111_worker.transfer.download import Downloader
from a1111_worker.transfer.egress import EgressPolicy
from benchmarks.report import Row, run
from sandbox.models import sdxl_lora, sha256_of

MODELS = 10_000
ROOT = Path(__file__).resolve().parent.parent


def measure(quick: bool) -> Sequence[Row]:
    with tempfile.TemporaryDirectory() as folder:
        rows = cached(Path(folder), rounds=50 if quick else 300)
    with tempfile.TemporaryDirectory() as folder:
        rows += fleet(Path(folder), 8, 200_000_000 if quick else 2_000_000_000)
    return rows


# -- models that are there


def cached(folder: Path, rounds: int) -> list[Row]:
    refs = fill(folder / "models" / "loras", MODELS)
    with manager(folder, "warm") as worker:
        seconds = [hold(worker, refs) for _ in range(rounds)]
    starts = sorted(start_of(folder, refs, number) for number in range(max(5, rounds // 30)))
    median, p95 = statistics.median(seconds), statistics.quantiles(seconds, n=20)[-1]
    start = statistics.median(starts)
    return [
        Row(
            f"hold of 9 cached LoRAs among {MODELS:,}",
            f"{median * 1e3:.2f} ms (p95 {p95 * 1e3:.2f} ms, first {seconds[0] * 1e3:.1f} ms)",
            "≤ 5 ms",
            median <= 0.005,
        ),
        Row(
            f"start with {MODELS:,} models, first hold of 9 included",
            f"{start * 1e3:.0f} ms (worst of {len(starts)}: {starts[-1] * 1e3:.0f} ms)",
            "≤ 300 ms",
            start <= 0.3,
        ),
    ]


def fill(loras: Path, count: int) -> list[ModelRef]:
    """Fill a cache with small models, each with its sidecar and its uses. Returns references to nine of them."""
    path = sdxl_lora(loras / "first.safetensors", 1)
    content, sha256 = path.read_bytes()[:200], sha256_of(path)
    path.unlink()
    for number in range(1, count + 1):
        file = f"Some_model_of_somebody_{number}.safetensors"
        (loras / file).write_bytes(content)
        record = ModelRecord(
            ModelKind.LORA,
            f"Some model of somebody {number}",
            file,
            sha256,
            len(content),
            url=f"https://civitai.com/api/download/models/{number}",
            version_id=number,
            base_model="SDXL 1.0",
            family="sdxl",
            trained_words=("a word", "another word"),
        )
        (loras / f"{file}.json").write_bytes(record.to_json())
        (loras / f"{file}.uses").write_bytes(b"....")
    return [ModelRef(ModelKind.LORA, version_id=number) for number in range(1, count, count // 9)][:9]


def manager(folder: Path, name: str, api: str = "https://civitai.invalid", storage: str = "") -> ModelManager:
    policy = EgressPolicy(filter(None, (api, storage)))
    container = folder / name
    settings = CacheSettings(folder / "models", container / "webui", container / "local")
    return ModelManager(settings, CivitAI(policy=policy, urls=[api]), Downloader(policy))


def hold(worker: ModelManager, refs: Sequence[ModelRef]) -> float:
    began = time.perf_counter()
    with worker.hold(refs, JobContext(Deadline(60))) as held:
        took = time.perf_counter() - began
        assert len(held.models) == len(refs)
    return took


def start_of(folder: Path, refs: Sequence[ModelRef], number: int) -> float:
    began = time.perf_counter()
    with manager(folder, f"start{number}") as worker:
        hold(worker, refs)
        return time.perf_counter() - began


# -- a fleet that needs one file

WORKER = """
import sys, time
from pathlib import Path
from a1111_worker.context import Deadline, JobContext
from a1111_worker.domain import ModelKind, ModelRef
from benchmarks.cache import manager

folder, name, api, storage = sys.argv[1:]
with manager(Path(folder), name, api, storage) as worker:
    print("ready", flush=True)
    sys.stdin.readline()
    with worker.hold([ModelRef(ModelKind.LORA, version_id=1)], JobContext(Deadline(300))) as held:
        print(time.monotonic(), flush=True)
"""


def fleet(folder: Path, workers: int, size: int) -> list[Row]:
    path = sdxl_lora(folder / "served.safetensors", 1, size)
    command = [sys.executable, "-m", "sandbox.civitai", "--rate", "20000000", f"1={path}"]
    site = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert site.stdout is not None
        urls = json.loads(site.stdout.readline())
        api, storage = urls["api"], urls["storage"]
        ask(f"{api}/api/v1/model-versions/1")  # it hashes its file once
        running = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(folder), f"worker{number}", api, storage],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            for number in range(workers)
        ]
        for process in running:
            assert process.stdout is not None
            process.stdout.readline()
        began = time.monotonic()
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        ready = sorted(float(process.communicate(timeout=600)[0]) - began for process in running)
        sent = ask(f"{api}/_counters")["bytes_sent"]
    finally:
        site.communicate()
    return [
        Row(
            f"{workers} processes, one file of {size / 1e9:.1f} GB, one folder: bytes sent",
            f"{sent / size:.4f} × the file",
            "≤ 1.01 ×",
            sent <= 1.01 * size,
        ),
        Row(
            "… the last one ready after",
            f"{ready[-1] / ready[0]:.3f} × the first ({ready[0]:.2f} s, {ready[-1]:.2f} s)",
            "≤ 1.05 ×",
            ready[-1] <= 1.05 * ready[0],
        ),
    ]


def ask(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=60) as answer:
        document: dict[str, Any] = json.load(answer)
        return document


if __name__ == "__main__":
    run("The cache", measure)

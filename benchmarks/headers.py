"""How long the event loop stands still while a thread reads a model's header.

    python -m benchmarks.headers [--quick] [--json FILE]

An asyncio loop notes the time as often as it can, while a thread of the same process reads a header, as a job's thread
does. The longest time between two notes is how long a job, a heartbeat or the SDK's ping would have waited.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from a1111_worker.errors import ModelRejected
from a1111_worker.models.safetensors import read_header
from benchmarks.report import Row, run

ROUNDS, QUICK_ROUNDS = 5, 1
ALLOWED = 0.2  # seconds
NAME = "lora_unet_input_blocks_{}_1_transformer_blocks_0_attn2_to_k.lora_down.weight"


def tensors(count: int, name: str = NAME) -> dict[str, Any]:
    """Tensors of a row of 2,048 bytes each."""
    return {
        name.format(number): {"dtype": "U8", "shape": [1, 2048], "data_offsets": [2048 * number, 2048 * number + 2048]}
        for number in range(count)
    }


CHECKPOINT_NAME = "model.diffusion_model.input_blocks.{}.1.transformer_blocks.0.attn2.to_k.weight"
HEADERS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "2,500 tensors, as a checkpoint of SDXL has": lambda: tensors(2_500, CHECKPOINT_NAME),
    "6,000 tensors, just below 1 MB": lambda: tensors(6_000),
    "80,000 tensors": lambda: tensors(80_000),
    "one tensor, 1,000,000 tags": lambda: {"__metadata__": {str(n): "" for n in range(1_000_000)}, **tensors(1)},
    "200,000 tensors, which is refused": lambda: tensors(200_000, "t{}"),
    "a header of 90 MB, which is refused": lambda: {"__metadata__": {"": " " * 90_000_000}, **tensors(1)},
}


def measure(quick: bool) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, header in HEADERS.items():
            file = Path(folder) / "model.safetensors"
            length = write(file, header())
            rounds = [asyncio.run(read_beside_a_loop(file)) for _ in range(QUICK_ROUNDS if quick else ROUNDS)]
            longest, seconds = max(stop for stop, _ in rounds), min(whole for _, whole in rounds)
            rows.append(
                Row(
                    f"{name} ({length / 1e6:.1f} MB): the longest stop of the event loop",
                    f"{longest:.3f} s (read in {seconds:.2f} s)",
                    f"≤ {ALLOWED} s",
                    longest <= ALLOWED,
                )
            )
    return rows


def write(file: Path, header: dict[str, Any]) -> int:
    """Write a file with this header, its data as a hole. Returns the header's length in bytes."""
    text = json.dumps(header, separators=(",", ":")).encode()
    data = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + data)
    return len(text)


async def read_beside_a_loop(file: Path) -> tuple[float, float]:
    """Seconds of the loop's longest stop, and of the whole reading."""
    reading = asyncio.create_task(asyncio.to_thread(try_to_read, file))
    began = last = time.perf_counter()
    longest = 0.0
    while not reading.done():
        await asyncio.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest, last - began


def try_to_read(file: Path) -> None:
    with contextlib.suppress(ModelRejected):
        read_header(file)


if __name__ == "__main__":
    run("Headers", measure)

"""What nvidia-smi says of the GPU: its name and its memory.

A1111's own `GET /memory` does not tell the GPU's name, and its free memory is what torch sees in its own process.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits")
MIB = 1 << 20


@dataclass(frozen=True)
class Gpu:
    """The first GPU. Memory is in bytes."""

    name: str
    memory_total: int
    memory_free: int


def find_gpu(command: Sequence[str] = NVIDIA_SMI, *, timeout: float = 5.0) -> Gpu | None:
    """The first GPU that nvidia-smi lists; None if it lists none, or does not answer in `timeout` seconds."""
    try:
        done = subprocess.run(  # noqa: S603 - its arguments are fixed
            command, capture_output=True, text=True, timeout=timeout, check=True
        )
        name, total, free = done.stdout.splitlines()[0].rsplit(", ", 2)
        return Gpu(name, int(total) * MIB, int(free) * MIB)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):  # "[N/A]" is no number
        return None

"""What nvidia-smi prints, as real processes print it."""

from __future__ import annotations

import sys

import pytest

from a1111_worker.queries.gpu import MIB, Gpu, find_gpu


@pytest.mark.parametrize(
    ("printed", "found"),
    [
        ("NVIDIA GeForce RTX 4090, 24564, 23010\n", Gpu("NVIDIA GeForce RTX 4090", 24564 * MIB, 23010 * MIB)),
        # the first of several counts
        ("NVIDIA A40, 46068, 46000\nNVIDIA L4, 23034, 23000\n", Gpu("NVIDIA A40", 46068 * MIB, 46000 * MIB)),
        # memory that it cannot tell
        ("NVIDIA GB10, [N/A], [N/A]\n", None),
        # no GPU
        ("No devices were found\n", None),
        ("", None),
    ],
)
def test_the_gpu_is_the_first_that_is_listed(printed: str, found: Gpu | None) -> None:
    assert find_gpu([sys.executable, "-c", f"print({printed!r}, end='')"], timeout=60.0) == found


@pytest.mark.parametrize("script", ["raise SystemExit(9)", "import time; time.sleep(600)"])
def test_without_an_answer_there_is_no_gpu(script: str) -> None:
    assert find_gpu([sys.executable, "-c", script], timeout=0.3) is None


def test_without_nvidia_smi_there_is_no_gpu() -> None:
    assert find_gpu(["/nowhere/nvidia-smi"]) is None

"""`make gpu-check` against the sandbox: every step runs, and no figure is presented as a GPU's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check import Backend, cuda_of, difference, vram_row
from sandbox import draw
from tests.soak_webui import launch_py
from tests.support import ROOT, World, free_port, world

NO_CUDA = {"ram": {"free": 1, "used": 1, "total": 2}, "cuda": {"error": "unavailable"}}
CUDA = {  # as modules/api/api.py of A1111 1.10.1 returns it
    "ram": {"free": 1, "used": 1, "total": 2},
    "cuda": {
        "system": {"free": 14_000_000_000, "used": 10_000_000_000, "total": 24_000_000_000},
        "active": {"current": 7_000_000_000, "peak": 9_000_000_000},
        "reserved": {"current": 8_000_000_000, "peak": 9_500_000_000},
        "events": {"retries": 0, "oom": 0},
    },
}


def run_check(folder: Path, environ: Mapping[str, str]) -> tuple[int, str, dict[str, Any]]:
    rows = folder / "rows.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", "--quick", "--json", str(rows)],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "OUTPUT_DIR": str(folder / "out"), **environ},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert rows.exists(), done.stdout + done.stderr
    return done.returncode, done.stdout, json.loads(rows.read_bytes())


def environment_of(it: World) -> dict[str, str]:
    origins = f"{it.civitai.url},{it.civitai.storage.url}"
    return {
        "CIVITAI_URL": it.civitai.url,
        "CIVITAI_API_KEY": "the-key",
        "STORAGE_HOSTS": origins,
        "MODEL_HOSTS": origins,
        "MODELS_DIR": str(it.models_dir),
        "WEBUI_MODELS_DIR": str(it.webui_models),
        "MODEL_SOURCES": "",
    }


def row_of(found: Mapping[str, Any], work: str) -> dict[str, Any]:
    rows: list[dict[str, Any]] = [row for row in found["rows"] if work in row["work"]]
    assert rows, f"no row about {work}"
    return rows[0]


def test_against_the_sandbox_everything_works_and_no_figure_is_called_a_gpus(tmp_path: Path) -> None:
    with world(tmp_path, boot=False) as it:
        status, output, found = run_check(tmp_path, {**environment_of(it), "WEBUI_URL": it.webui.url})

    assert status == 1
    assert found["gpu"] is False
    assert "the SANDBOX" in row_of(found, "what answers")["measured"]
    assert "nothing above may be quoted" in output
    assert "knows of no CUDA" in row_of(found, "VRAM")["measured"]
    for work in ("the switch", "with and without", "out of memory", "the next job"):
        assert row_of(found, work)["met"] is True, output
        assert row_of(found, work)["measured"].endswith("(sandbox, not a GPU)")
    for work in ("the WebUI answers", "the first after the switch", "warm"):
        assert row_of(found, work)["measured"].endswith("(sandbox, not a GPU)")


def test_if_no_webui_answers_start_sh_is_run_with_the_check_as_its_worker(tmp_path: Path) -> None:
    port = free_port()
    launch = tmp_path / "webui" / "launch.py"
    launch.parent.mkdir()
    launch.write_text(launch_py(tmp_path), encoding="utf-8")

    with world(tmp_path, boot=False) as it:
        _, output, found = run_check(
            tmp_path,
            {
                **environment_of(it),
                "WEBUI_URL": f"http://127.0.0.1:{port}",
                "ALLOW_CPU": "1",
                "WEBUI_DIR": str(launch.parent),
                "WEBUI_PYTHON": sys.executable,
                "WEBUI_STATE_FILE": str(tmp_path / "webui.state"),
            },
        )

    assert "from the start of start.sh" in row_of(found, "the WebUI answers")["work"]
    assert row_of(found, "the next job")["met"] is True, output
    assert "gpu-check" in " ".join(path.name for path in (tmp_path / "out").iterdir())


# server, memory, whether it is a GPU, and what the table shows of its VRAM
BACKENDS = [
    ("uvicorn", CUDA, True, "10.0 of 24.0 GB in use, reserved by the WebUI at most 9.5 GB"),
    ("uvicorn", NO_CUDA, False, "nothing to measure"),  # A1111 on a CPU
    ("uvicorn", {"ram": {}, "cuda": {"error": "CUDA driver"}}, False, "nothing to measure"),
    ("BaseHTTP/0.6 Python/3.11", NO_CUDA, False, "nothing to measure"),  # the sandbox
    ("BaseHTTP/0.6 Python/3.11", CUDA, False, "nothing to measure"),  # whatever it returns
]


@pytest.mark.parametrize(("server", "memory", "is_gpu", "vram"), BACKENDS)
def test_only_a1111_with_cuda_counts_as_a_gpu(server: str, memory: dict[str, Any], is_gpu: bool, vram: str) -> None:
    backend = Backend(server, cuda_of(memory))

    assert backend.is_gpu is is_gpu
    assert backend.qualify("4.2 s") == ("4.2 s" if is_gpu else f"4.2 s ({backend.kind}, not a GPU)")
    assert vram_row("VRAM", backend).measured.startswith(vram)


def test_images_differ_by_their_pixels_and_not_by_their_infotext() -> None:
    lighthouse, harbour = (draw.picture(text, 64, 64) for text in ("a lighthouse", "a harbour"))

    same = difference(draw.encode(lighthouse, "one", "png"), draw.encode(lighthouse, "two", "png"))
    other = difference(draw.encode(lighthouse, "one", "png"), draw.encode(harbour, "one", "png"))

    assert same == 0.0
    assert other > 1.0

"""The examples of docs/subsystems/api-gateway.md run unchanged against the real worker behind the sandbox's queue.

Only RunPod's address is replaced.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.runpod import SandboxRunPod
from tests.support import ROOT, world
from tests.test_docs import API, blocks
from tests.test_runpod import Endpoint

RUNPOD = "https://api.runpod.ai/v2"
KEY = "a-callers-key"
PNG, WEBP = b"\x89PNG", b"RIFF"


@pytest.fixture(scope="module")
def queue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxRunPod]:
    folder = tmp_path_factory.mktemp("examples")
    with world(folder, boot=False) as servers, SandboxRunPod(long_poll=0.5, client_key=KEY) as queue:
        endpoint = Endpoint(servers, queue, folder / "worker.log")
        endpoint.start()
        try:
            yield queue
        finally:
            endpoint.kill()


def example(language: str) -> str:
    """The example in this language, as it is on the page."""
    (found,) = blocks(API, language)
    return found


def run(command: list[str], queue: SandboxRunPod, folder: Path, *, status: int = 0) -> str:
    """Run an example as its caller would. Returns what it printed. `status` is the exit status that it must have."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={
            **{name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ},
            "HOME": str(folder),
            "RUNPOD_API_KEY": KEY,
            "RUNPOD_ENDPOINT_ID": queue.endpoint,
            "RUNPOD_ENDPOINT_BASE_URL": f"{queue.url}/v2",  # the Python client's own setting
        },
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("curl") is None, reason="the example in the shell needs curl, which is not installed")
def test_the_curl_example_runs(queue: SandboxRunPod, tmp_path: Path) -> None:
    shutil.copy(ROOT / "test_input.json", tmp_path)
    script = example("sh").replace(RUNPOD, f"{queue.url}/v2")

    run(["bash", "-euo", "pipefail", "-c", script], queue, tmp_path)

    answers = [json.loads((tmp_path / name).read_text()) for name in ("answer.json", "status.json", "cancelled.json")]
    assert [answer["status"] for answer in answers] == ["COMPLETED", "COMPLETED", "CANCELLED"]
    assert answers[0]["output"]["worker"]["loras"][0]["loaded"] is True


def test_the_python_example_runs(queue: SandboxRunPod, tmp_path: Path) -> None:
    printed = run([sys.executable, "-c", example("python")], queue, tmp_path)

    assert (tmp_path / "1.png").read_bytes().startswith(PNG)
    assert re.search(r"^\[\d+\] \[\]$", printed, re.MULTILINE)


needs_node = pytest.mark.skipif(
    shutil.which("node") is None, reason="the JavaScript example needs Node.js, which is not installed"
)

# The examples' prompt, and one that two things are wrong with.
GOOD, BAD = '"a lighthouse at dawn"', '"", steps: 0'
EXPLANATION = ["FAILED", "INVALID_REQUEST", "steps: must be", "- prompt: must not be blank", "- steps: must be"]


def test_the_python_example_says_why_a_job_failed(queue: SandboxRunPod, tmp_path: Path) -> None:
    script = example("python").replace(GOOD, BAD.replace("steps", '"steps"'))

    printed = run([sys.executable, "-c", script], queue, tmp_path, status=1)

    assert [text for text in EXPLANATION if text not in printed] == []


@needs_node
def test_the_javascript_example_says_why_a_job_failed(queue: SandboxRunPod, tmp_path: Path) -> None:
    script = tmp_path / "example.mjs"
    script.write_text(example("js").replace(RUNPOD, f"{queue.url}/v2").replace(GOOD, BAD))

    printed = run(["node", str(script)], queue, tmp_path, status=1)

    assert [text for text in EXPLANATION if text not in printed] == []


@pytest.mark.skipif(shutil.which("curl") is None, reason="the example in the shell needs curl, which is not installed")
def test_the_curl_example_prints_why_a_job_failed(queue: SandboxRunPod, tmp_path: Path) -> None:
    (tmp_path / "test_input.json").write_text('{"input": {"prompt": "", "steps": 0}}')
    script = example("sh").replace(RUNPOD, f"{queue.url}/v2")

    printed = run(["bash", "-euo", "pipefail", "-c", script], queue, tmp_path)

    (output,) = [json.loads(line)["output"] for line in printed.splitlines() if line.startswith("{")]
    assert [complaint["path"] for complaint in output["complaints"]] == ["prompt", "steps"]


@needs_node
def test_the_javascript_example_runs(queue: SandboxRunPod, tmp_path: Path) -> None:
    script = tmp_path / "example.mjs"
    script.write_text(example("js").replace(RUNPOD, f"{queue.url}/v2"))

    printed = run(["node", str(script)], queue, tmp_path)

    assert (tmp_path / "1.webp").read_bytes().startswith(WEBP)
    assert re.search(r"^\[ \d+ \]$", printed, re.MULTILINE)

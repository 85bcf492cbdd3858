"""`python -m sandbox`: alone, and with a command that uses it."""

from __future__ import annotations

import base64
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

SHOW = "import json, os; print(json.dumps(dict(os.environ)))"


def sandbox(folder: Path, *command: str, **env: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "sandbox", "--folder", str(folder), *command]
    return subprocess.Popen(words, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sandbox")


def test_a_command_gets_the_settings_of_the_sandbox_and_none_of_runpod(folder: Path) -> None:
    process = sandbox(folder, "--", sys.executable, "-c", SHOW, RUNPOD_WEBHOOK_GET_JOB="x", RUNPOD_POD_ID="x")

    out, _ = process.communicate(timeout=60)

    env = json.loads(out)
    assert process.returncode == 0
    assert env["CIVITAI_URL"] in env["MODEL_HOSTS"].split(",")
    assert set(env["MODEL_HOSTS"].split(",")) < set(env["STORAGE_HOSTS"].split(","))
    assert env["HF_ENDPOINT"].startswith("http://127.0.0.1:")
    assert (env["CIVITAI_API_KEY"], env["MODEL_SOURCES"]) == ("sandbox", "")
    assert Path(env["MODELS_DIR"]) == folder / "models"
    assert not [name for name in env if name.startswith("RUNPOD_WEBHOOK") or name == "RUNPOD_POD_ID"]


def test_a_command_can_use_the_webui_the_checkpoint_and_the_catalog(folder: Path) -> None:
    script = (
        "import json, os, requests\n"
        "from a1111_worker import catalog\n"
        "api = os.environ['CIVITAI_URL']\n"
        "ids = [1590699, *(lora.version_id for lora in catalog.LORAS)]\n"
        "found = [requests.get(f'{api}/api/v1/model-versions/{id}').status_code for id in ids]\n"
        "url = api + catalog.CHECKPOINT_URL.removeprefix('https://civitai.com')\n"
        "key = {'Authorization': 'Bearer ' + os.environ['CIVITAI_API_KEY']}\n"
        "found.append(requests.get(url, headers=key, allow_redirects=False).status_code)\n"
        "found.append(requests.get(os.environ['WEBUI_URL'] + '/sdapi/v1/options').status_code)\n"
        "print(json.dumps(found))\n"
    )

    out, _ = sandbox(folder, "--", sys.executable, "-c", script).communicate(timeout=60)

    assert json.loads(out) == [200] * 10 + [307, 200]


def test_files_are_made_once(folder: Path) -> None:
    def times() -> dict[str, int]:
        sandbox(folder, "--", "true").communicate(timeout=60)
        return {path.name: path.stat().st_mtime_ns for path in (folder / "civitai").iterdir()}

    first, second = times(), times()

    assert len(first) == 10
    assert first == second


@pytest.mark.parametrize(("command", "status"), [("exit 3", 3), ("kill -KILL $$", 137)])
def test_the_sandbox_ends_with_the_status_of_the_command(folder: Path, command: str, status: int) -> None:
    process = sandbox(folder, "--", "sh", "-c", command)
    process.communicate(timeout=60)

    assert process.returncode == status


def test_a_command_that_does_not_exist_is_one_line_of_error(folder: Path) -> None:
    process = sandbox(folder, "--", "/no/such/command")
    _, err = process.communicate(timeout=60)

    assert (process.returncode, err) == (127, "/no/such/command: No such file or directory\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_command(folder: Path, number: signal.Signals) -> None:
    wait = "import signal, sys\nfor n in (2, 15): signal.signal(n, lambda n, f: sys.exit(n))\n"
    wait += "print('ready', flush=True)\nsignal.pause()"
    process = sandbox(folder, "--", sys.executable, "-c", wait)
    assert process.stdout and process.stdout.readline() == "ready\n"

    process.send_signal(number)
    process.communicate(timeout=60)

    assert process.returncode == number


def test_with_a_local_endpoint_it_prints_a_curl_command(folder: Path) -> None:
    out, _ = sandbox(folder, "--", "true", "-m", "local_queue", "--port", "8123").communicate(timeout=60)

    assert "http://127.0.0.1:8123/runsync" in out


def test_alone_it_prints_its_urls_and_ends_at_a_signal(folder: Path) -> None:
    process = sandbox(folder, "--port", "0")
    assert process.stdout
    lines: list[str] = []
    while not (lines and lines[-1].startswith("export RUNPOD_DEBUG_LEVEL")):
        lines.append(process.stdout.readline())
        assert lines[-1], "the sandbox ended"

    process.terminate()
    process.communicate(timeout=60)

    assert process.returncode == 0
    assert any(line.startswith("export WEBUI_URL=http://127.0.0.1:") for line in lines)
    assert any(line.startswith("export RUNPOD_WEBHOOK_GET_JOB='http") for line in lines)


@pytest.mark.skipif(shutil.which("curl") is None, reason="the printed command needs curl, which is not installed")
def test_the_curl_command_that_it_prints_saves_a_picture(folder: Path, tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), OnePicture) as api:
        threading.Thread(target=api.serve_forever, daemon=True).start()
        port = str(api.server_port)
        out, _ = sandbox(folder, "--", "true", "-m", "local_queue", "--port", port).communicate(timeout=60)
        (command,) = (line for line in out.splitlines() if "curl" in line)
        (tmp_path / "test_input.json").write_text('{"input": {}}', encoding="utf-8")

        subprocess.run(["bash", "-euo", "pipefail", "-c", command], cwd=tmp_path, check=True)
        api.shutdown()

    assert (tmp_path / "picture.png").read_bytes() == OnePicture.PICTURE


class OnePicture(http.server.BaseHTTPRequestHandler):
    """A local endpoint that answers each job with the same picture."""

    PICTURE = b"\x89PNG and more"

    def do_POST(self) -> None:
        assert json.loads(self.rfile.read(int(self.headers["content-length"]))) == {"input": {}}
        answer = {"status": "COMPLETED", "output": {"images": [base64.b64encode(self.PICTURE).decode()]}}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass

"""Build the image with stand-ins for A1111 and its helpers, run it, send it a job, break it, stop it.

    python -m tests.image [ARGUMENTS OF docker build]

Takes a Docker engine with BuildKit and says so where none answers. Everything else comes from this checkout, the
distribution's archive and PyPI; BASE_IMAGE in the environment names another base. What it prints are measurements.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sandbox.__main__ import Sandbox
from tests.image import make_mirror

CHECKOUT = Path(__file__).parent.parent.parent
PARTS = ("Dockerfile", ".dockerignore", *("a1111_worker", "handler.py", "image"), "model_manager.py")
TAG = "a1111-worker:image-test"
PATIENCE = 120.0  # seconds for anything a container is to do
REPOSITORIES = {
    "WEBUI": "AUTOMATIC1111/stable-diffusion-webui",
    "ASSETS": "AUTOMATIC1111/stable-diffusion-webui-assets",
    "STABLE_DIFFUSION": "w-e-w/stablediffusion",
    "STABLE_DIFFUSION_XL": "Stability-AI/generative-models",
    "K_DIFFUSION": "crowsonkb/k-diffusion",
    "BLIP": "salesforce/BLIP",
}


def main(arguments: list[str]) -> None:
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode:
        say("no Docker engine answers here: nothing was built, nothing was tested")
        return
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        mirror = running.enter_context(mirrored(Path(folder) / "mirror"))
        sandbox = Sandbox(Path(folder) / "sandbox")
        running.enter_context(sandbox.running())
        build = functools.partial(built, mirror=[*mirror, *arguments])

        layers = build(CHECKOUT)
        say_sizes()
        a_change_of_the_handler_is_one_layer(layers, build, Path(folder) / "changed")
        build(CHECKOUT)
        a_job_and_a_stop(sandbox)
        a_webui_that_is_killed_for_good(sandbox)


@contextlib.contextmanager
def mirrored(folder: Path) -> Iterator[list[str]]:
    """Serve the stand-ins; the build arguments that name them."""
    make_mirror.make(folder)
    files = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    threading.Thread(target=files.serve_forever, daemon=True).start()
    port = free_port()
    git = subprocess.Popen(
        ["git", "daemon", "--listen=127.0.0.1", f"--port={port}", "--export-all", f"--base-path={folder}", str(folder)],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    values = {
        "CLIP_PACKAGE": f"http://127.0.0.1:{files.server_port}/CLIP.zip",
        "TORCH_INDEX_URL": "",
        "BAKE_TOKENIZER": "0",
    }
    for name, repository in REPOSITORIES.items():
        bare = folder / f"{repository}.git"
        values[f"{name}_REPO"] = f"git://127.0.0.1:{port}/{repository}.git"
        values[f"{name}_COMMIT"] = output("git", "-C", str(bare), "rev-parse", "main")
    if base := os.environ.get("BASE_IMAGE"):
        values["BASE_IMAGE"] = base
    try:
        yield [word for name, value in values.items() for word in ("--build-arg", f"{name}={value}")]
    finally:
        os.killpg(git.pid, 15)
        git.wait()
        files.shutdown()
        files.server_close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def built(context: Path, *, mirror: list[str]) -> list[str]:
    """Build the image, and return its layers."""
    began = time.monotonic()
    done = subprocess.run(
        ["docker", "build", "--network", "host", "--progress", "plain", "-t", TAG, *mirror, str(context)],
        env={**os.environ, "DOCKER_BUILDKIT": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"the build failed:\n{done.stderr[-8000:]}")
    say(f"built in {time.monotonic() - began:.1f} s")
    layers: list[str] = json.loads(output("docker", "image", "inspect", TAG, "--format", "{{json .RootFS.Layers}}"))
    return layers


def say_sizes() -> None:
    for line in output("docker", "history", TAG, "--format", "{{.Size}}\t{{.CreatedBy}}").splitlines():
        size, _, made_by = line.partition("\t")
        if size != "0B":
            say(f"  {size:>8}  {made_by[:60]}")


def a_change_of_the_handler_is_one_layer(before: list[str], build: Any, context: Path) -> None:
    context.mkdir()
    for part in (*PARTS, "requirements.txt", "start.sh"):
        source = CHECKOUT / part
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, context / part)
    with (context / "handler.py").open("a", encoding="utf-8") as handler:
        handler.write("# changed\n")

    after = build(context)

    changed = [number for number, (one, other) in enumerate(zip(before, after, strict=True)) if one != other]
    expect(len(changed) == 1, f"a change of handler.py changes the layers {changed} of {len(after)}")


def a_job_and_a_stop(sandbox: Sandbox) -> None:
    with container(sandbox) as (name, api):
        job = json.loads((CHECKOUT / "test_input.json").read_bytes())
        answer = ask(f"{api}/runsync", job)
        expect(answer["status"] == "COMPLETED", f"the job ended {answer}")
        expect(answer["output"]["worker"]["loras"][0]["loaded"], "the LoRA is not in the picture")
        say(f"a job: {answer['output']['worker']['timings']}")

        began = time.monotonic()
        output("docker", "stop", name)

        say(f"docker stop: {time.monotonic() - began:.2f} s, exit status {status_of(name)}")
        expect(status_of(name) == 143, "the exit status is not 143")


def a_webui_that_is_killed_for_good(sandbox: Sandbox) -> None:
    with container(sandbox, WEBUI_RESTARTS="0") as (name, _):
        output("docker", "exec", name, "bash", "-c", 'kill -KILL "$(cat /tmp/webui.state)"')
        began = time.monotonic()

        wait_for(lambda: health_of(name) == "unhealthy", f"{name} to become unhealthy")

        say(f"the health check is red {time.monotonic() - began:.1f} s after the WebUI was killed for good")


@contextlib.contextmanager
def container(sandbox: Sandbox, **environment: str) -> Iterator[tuple[str, str]]:
    """A container of the image that is ready: its name, and where the SDK's API listens."""
    name = f"a1111-worker-image-test-{os.getpid()}"
    port = free_port()
    told = sandbox.environment() | environment | {"ALLOW_CPU": "1", "WEBUI_URL": f"http://127.0.0.1:{free_port()}"}
    for own in ("MODELS_DIR", "MODEL_SOURCES", "WEBUI_MODELS_DIR"):
        told.pop(own)
    variables = [word for item in told.items() for word in ("--env", "=".join(item))]
    health = ["--health-interval", "1s", "--health-start-period", "60s", "--health-retries", "2"]
    began = time.monotonic()
    output("docker", "run", "--detach", "--name", name, "--network", "host", *health, *variables, TAG,
           "--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port", str(port))  # fmt: skip
    try:
        api = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(f"{api}/docs"), f"{name} to be ready")
        say(f"docker run to ready: {time.monotonic() - began:.1f} s")
        wait_for(lambda: health_of(name) == "healthy", f"{name} to be healthy")
        yield name, api
    except BaseException:
        say(output("docker", "logs", "--tail", "60", name))
        raise
    finally:
        output("docker", "rm", "--force", name)


def status_of(name: str) -> int:
    return int(output("docker", "inspect", name, "--format", "{{.State.ExitCode}}"))


def health_of(name: str) -> str:
    return output("docker", "inspect", name, "--format", "{{.State.Health.Status}}")


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except (urllib.error.URLError, OSError):
        return False
    return True


def ask(url: str, body: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return json.load(answer)


def wait_for(holds: Any, what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE:.0f} s for {what}")
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def output(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])} failed: {done.stdout[-2000:]}")
    return done.stdout.strip()


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        sys.exit(f"image-test: {otherwise}")


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])

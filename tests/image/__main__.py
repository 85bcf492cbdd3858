"""Build the image with stand-ins for A1111 and its helpers, run it, send it a job, break it, stop it.

    python -m tests.image [ARGUMENTS OF docker build]

It needs a Docker engine with BuildKit, and port 8000 of this machine. Without an engine it does nothing, and prints
that. Everything else comes from this checkout, the distribution's archive and PyPI. BASE_IMAGE in the environment names
another base image. It prints measurements.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sandbox.__main__ import Sandbox
from sandbox.models import sdxl_checkpoint
from tests.image import make_mirror
from tests.support import free_port, wait_until

CHECKOUT = Path(__file__).parent.parent.parent
SENT = re.findall(r"(?m)^!(.+)$", (CHECKOUT / ".dockerignore").read_text(encoding="utf-8"))
BUILD_FILES = ("Dockerfile", ".dockerignore", *SENT)
TAG = "a1111-worker:image-test"
KEY = "the-callers-key"
TIMEOUT = 120.0  # seconds for anything that a container has to do
REPOSITORIES = {
    "WEBUI": "AUTOMATIC1111/stable-diffusion-webui",
    "ASSETS": "AUTOMATIC1111/stable-diffusion-webui-assets",
    "STABLE_DIFFUSION": "w-e-w/stablediffusion",
    "STABLE_DIFFUSION_XL": "Stability-AI/generative-models",
    "K_DIFFUSION": "crowsonkb/k-diffusion",
    "BLIP": "salesforce/BLIP",
    "CONTROLNET": "Mikubill/sd-webui-controlnet",
    "ADETAILER": "Bing-su/adetailer",
}


def main(arguments: list[str]) -> None:
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode:
        log("no Docker engine answers here: nothing was built, nothing was tested")
        return
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        mirror, pins = stack.enter_context(serve_mirror(Path(folder) / "mirror"))
        context = make_context(Path(folder) / "context", pins)
        sandbox = Sandbox(Path(folder) / "sandbox")
        stack.enter_context(sandbox.running())
        build = functools.partial(build_image, context, mirror=[*mirror, *arguments])

        layers = build()
        print_layer_sizes()
        check_that_a_new_handler_is_one_layer(layers, build, context)
        build()
        check_a_job_and_a_stop(sandbox)
        check_another_user_and_a_read_only_disk(sandbox)
        check_a_webui_that_is_killed_for_good(sandbox)
        check_that_a_job_on_runpod_hears_that_there_is_no_gpu(sandbox)
        check_a_baked_checkpoint_of_another_host(sandbox, build)
        check_the_extensions(sandbox, build)
        check_that_a_file_with_other_bytes_ends_the_build(build, context)


@contextlib.contextmanager
def serve_mirror(folder: Path) -> Iterator[tuple[list[str], str]]:
    """Serve the stand-ins, and yield the build arguments and the pins.toml that name them."""
    make_mirror.make(folder)
    files = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_QuietFiles, directory=str(folder)))
    threading.Thread(target=files.serve_forever, daemon=True).start()
    port = free_port()
    git = subprocess.Popen(
        ["git", "daemon", "--listen=127.0.0.1", f"--port={port}", "--export-all", f"--base-path={folder}", str(folder)],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    values = {
        "CLIP_PACKAGE": f"http://127.0.0.1:{files.server_port}/CLIP.zip",
        "WEBUI_LOCK": "pypi",
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
        pins = make_mirror.make_pins(folder, f"http://127.0.0.1:{files.server_port}")
        yield [word for name, value in values.items() for word in ("--build-arg", f"{name}={value}")], pins
    finally:
        os.killpg(git.pid, 15)
        git.wait()
        files.shutdown()
        files.server_close()


class _QuietFiles(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def make_context(folder: Path, pins: str) -> Path:
    """This checkout's files for the build, with another image/pins.toml."""
    folder.mkdir()
    for name in BUILD_FILES:
        source = CHECKOUT / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, folder / name)
    (folder / "image" / "pins.toml").write_text(pins, encoding="utf-8")
    return folder


def run_build(context: Path, *arguments: str, tag: str = TAG) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["docker", "build", "--network", "host", "--progress", "plain", "-t", tag, *arguments, str(context)],
        env={**os.environ, "DOCKER_BUILDKIT": "1"},
        capture_output=True,
        text=True,
    )


def build_image(context: Path, *arguments: str, mirror: list[str], tag: str = TAG) -> list[str]:
    """Build the image, and return its layers."""
    began = time.monotonic()
    done = run_build(context, *mirror, *arguments, tag=tag)
    if done.returncode:
        sys.exit(f"the build failed:\n{done.stderr[-8000:]}")
    log(f"built in {time.monotonic() - began:.1f} s")
    for line in re.findall(r"(launch\.py answers after .*)", done.stderr):
        log(f"smoke test: {line}")
    layers: list[str] = json.loads(output("docker", "image", "inspect", tag, "--format", "{{json .RootFS.Layers}}"))
    return layers


def print_layer_sizes() -> None:
    for line in output("docker", "history", TAG, "--format", "{{.Size}}\t{{.CreatedBy}}").splitlines():
        size, _, made_by = line.partition("\t")
        if size != "0B":
            log(f"  {size:>8}  {made_by[:60]}")


def check_that_a_new_handler_is_one_layer(before: list[str], build: Any, context: Path) -> None:
    handler = context / "handler.py"
    text = handler.read_text(encoding="utf-8")
    handler.write_text(f"{text}# changed\n", encoding="utf-8")

    after = build()

    handler.write_text(text, encoding="utf-8")
    changed = [number for number, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    expect(len(changed) == 1, f"a change of handler.py changes the layers {changed} of {len(after)}")


def check_a_job_and_a_stop(sandbox: Sandbox) -> None:
    with container(sandbox) as (name, api):
        job = json.loads((CHECKOUT / "test_input.json").read_bytes())
        job["input"] |= {"enable_hr": True, "hr_upscaler": "R-ESRGAN 4x+", "denoising_strength": 0.5}
        answer = ask(f"{api}/runsync", job)
        expect(answer["status"] == "COMPLETED", f"the job ended with {answer}")
        expect(answer["output"]["worker"]["loras"][0]["loaded"], "the LoRA is not in the picture")
        log(f"a job: {answer['output']['worker']['timings']}")

        began = time.monotonic()
        output("docker", "stop", name)

        log(f"docker stop: {time.monotonic() - began:.2f} s, exit status {status_of(name)}")
        expect(status_of(name) == 143, "the exit status is not 143")
        lines = output("docker", "logs", name)
        expect("sd_model_checkpoint" in lines, "the WebUI's settings do not name the checkpoint")
        expect("/progress" not in lines, "looks at the progress are in the log")


def check_another_user_and_a_read_only_disk(sandbox: Sandbox) -> None:
    options = ("--user", "1000:1000", "--read-only", "--tmpfs", "/tmp")
    with container(sandbox, *options, MODELS_DIR="/tmp/models") as (name, api):
        answer = ask(f"{api}/runsync", json.loads((CHECKOUT / "test_input.json").read_bytes()))
        expect(answer["status"] == "COMPLETED", f"the job of another user ended with {answer}")
        output("docker", "stop", name)
        expect(status_of(name) == 143, "the exit status of another user's container is not 143")
        log(f"{' '.join(options)}: a job, and a stop")


def check_that_a_job_on_runpod_hears_that_there_is_no_gpu(sandbox: Sandbox) -> None:
    settings = sandbox.environment() | sandbox.queue_environment()
    for variable in ("MODELS_DIR", "MODEL_SOURCES", "WEBUI_MODELS_DIR", "WEBUI_URL"):
        settings.pop(variable)
    with running(TAG, settings):
        job = sandbox.runpod.submit(json.loads((CHECKOUT / "test_input.json").read_bytes())["input"])
        answer = sandbox.runpod.wait(job, timeout=TIMEOUT)
    expect("no GPU found" in answer.get("error", ""), f"the job on a machine without a GPU ended with {answer}")
    log(f"a job on RunPod without a GPU: {answer['error']}")


def check_a_baked_checkpoint_of_another_host(sandbox: Sandbox, build: Any) -> None:
    site = Path(sandbox.folder) / "another-host"
    url = sandbox.civitai.storage.publish(
        sdxl_checkpoint(site / "other.safetensors", 7, 3_000_000), "/other.safetensors"
    )
    origin = "/".join(url.split("/")[:3])
    given = {
        "BAKE_CHECKPOINT": "1",
        "CHECKPOINT_URL": url,
        "CHECKPOINT_FILE": "other.safetensors",
        "CHECKPOINT_NAME": 'The "Other" One',
        "MODEL_HOSTS": origin,
        "STORAGE_HOSTS": origin,
    }
    tag = f"{TAG}-baked"
    build(*(word for item in given.items() for word in ("--build-arg", "=".join(item))), tag=tag)
    nowhere = {"MODEL_HOSTS": "", "CIVITAI_URL": "http://127.0.0.1:9", "LOG_FORMAT": "json"}

    with container(sandbox, tag=tag, **nowhere) as (name, api):
        answer = ask(f"{api}/runsync", {"input": {"prompt": "a lighthouse", "steps": 2, "width": 64, "height": 64}})
        expect(answer["output"]["worker"]["checkpoint"]["name"] == given["CHECKPOINT_NAME"], f"it drew {answer}")
        lines = output("docker", "logs", name).splitlines()
        objects = [json.loads(line) for line in lines]
        expect(all({"time", "level", "source", "message"} <= set(line) for line in objects), "a log line lacks a key")
        log(f"a baked checkpoint of another host: a job; {len(lines)} lines of JSON")


def check_the_extensions(sandbox: Sandbox, build: Any) -> None:
    tag = f"{TAG}-extensions"
    build("--build-arg", "EXTENSIONS=controlnet adetailer", "--build-arg", "CONTROLNET_ANNOTATORS=hed", tag=tag)

    with container(sandbox, tag=tag) as (name, api):
        report = output("docker", "exec", name, "cat", "/opt/smoke/webui")
        answer = ask(f"{api}/runsync", json.loads((CHECKOUT / "test_input.json").read_bytes()))
        expect(answer["status"] == "COMPLETED", f"the job beside the extensions ended with {answer}")
    for package in ("ultralytics", "controlnet-aux", "protobuf 4"):
        expect(f"\n{package}" in f"\n{report}", f"{package} is not in the smoke test's report")
    log("extensions: their scripts are loaded, and a job runs beside them")


def check_that_a_file_with_other_bytes_ends_the_build(build: Any, context: Path) -> None:
    pins = context / "image" / "pins.toml"
    text = pins.read_text(encoding="utf-8")
    pins.write_text(re.sub(r'sha256 = "\w{64}"', f'sha256 = "{"0" * 64}"', text), encoding="utf-8")

    done = run_build(context, *build.keywords["mirror"], tag=f"{TAG}-never")

    expect(done.returncode != 0, "a file with other bytes was built in")
    (line,) = set(re.findall(r"pins: .* has the SHA-256 .*", done.stderr))
    log(f"a file with other bytes: {line[:100]}")


def check_a_webui_that_is_killed_for_good(sandbox: Sandbox) -> None:
    with container(sandbox, WEBUI_RESTARTS="0") as (name, _):
        output("docker", "exec", name, "bash", "-c", 'kill -KILL "$(cat /tmp/webui.state)"')
        began = time.monotonic()

        wait_until(lambda: health_of(name) == "unhealthy", f"{name} to become unhealthy", seconds=TIMEOUT)

        log(f"the container is unhealthy {time.monotonic() - began:.1f} s after the WebUI was killed for good")


@contextlib.contextmanager
def container(sandbox: Sandbox, *options: str, tag: str = TAG, **environment: str) -> Iterator[tuple[str, str]]:
    """A ready container of the image, as an operator runs it off RunPod: its name, and its local endpoint's address."""
    settings = sandbox.environment()
    for variable in ("MODELS_DIR", "MODEL_SOURCES", "WEBUI_MODELS_DIR"):
        settings.pop(variable)
    settings |= {"ALLOW_CPU": "1", "LOCAL_API_KEY": KEY, "WEBUI_URL": f"http://127.0.0.1:{free_port()}", **environment}
    began = time.monotonic()
    with running(tag, settings, options=options) as name:
        url = "http://127.0.0.1:8000"  # the container has the host's network
        wait_until(lambda: has_worker(url), f"{name} to be ready", seconds=TIMEOUT)
        log(f"docker run to ready: {time.monotonic() - began:.1f} s")
        wait_until(lambda: health_of(name) == "healthy", f"{name} to be healthy", seconds=TIMEOUT)
        yield name, url


@contextlib.contextmanager
def running(tag: str, environment: Mapping[str, str], *, options: Sequence[str] = ()) -> Iterator[str]:
    """A container, by its name. It is removed at the end; if a check fails, its last lines are printed."""
    name = f"a1111-worker-image-test-{os.getpid()}"
    variables = [word for item in environment.items() for word in ("--env", "=".join(item))]
    health = ["--health-interval", "1s", "--health-start-period", "60s", "--health-retries", "2"]
    output("docker", "run", "--detach", "--name", name, "--network", "host", *health, *options, *variables, tag)
    try:
        yield name
    except BaseException:
        log(output("docker", "logs", "--tail", "60", name))
        raise
    else:
        expect(KEY not in output("docker", "logs", name), "the callers' key is in the log")
    finally:
        output("docker", "rm", "--force", name)


def status_of(name: str) -> int:
    return int(output("docker", "inspect", name, "--format", "{{.State.ExitCode}}"))


def health_of(name: str) -> str:
    return output("docker", "inspect", name, "--format", "{{.State.Health.Status}}")


def has_worker(api: str) -> bool:
    """Whether the local endpoint answers, and its worker asks for jobs."""
    try:
        return bool(ask(f"{api}/health")["workers"]["ready"])
    except OSError:
        return False


def ask(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        return json.load(answer)


def output(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])} failed: {done.stdout[-2000:]}")
    return done.stdout.strip()


def expect(condition: bool, failure: str) -> None:
    if not condition:
        sys.exit(f"image-test: {failure}")


def log(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])

"""Every service that the worker talks to, on loopback.

    python -m sandbox                   starts them and prints their URLs and what to export; ends at Ctrl-C
    python -m sandbox -- COMMAND …      starts them, runs COMMAND against them, ends with COMMAND's status
    … --worker -- COMMAND …             besides starts a worker on the queue; COMMAND finds the queue's URL in A1111_URL

Files are made once, under `.sandbox/civitai`, and reused. `.sandbox/models` is the worker's cache.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from a1111_worker.catalog import CHECKPOINT_NAME, LORAS
from sandbox.civitai import SandboxCivitAI
from sandbox.huggingface import SandboxHuggingFace
from sandbox.models import sdxl_checkpoint, sdxl_lora
from sandbox.runpod import SandboxRunPod
from sandbox.webui import SandboxWebUI

KEY = "sandbox"
CHECKPOINT_VERSION = 1590699
_RUNPOD_SETTINGS = ("RUNPOD_DEBUG_LEVEL", "RUNPOD_LOG_LEVEL", "RUNPOD_INIT_TIMEOUT")


@dataclass(frozen=True)
class _SampleModel:
    """The file that the sandbox serves for a version of CivitAI."""

    file: str
    base_model: str
    megabytes: float
    model_id: int | None = None
    file_id: int | None = None
    trained_words: tuple[str, ...] = ()


_SAMPLES = {
    135867: _SampleModel("add-detail-xl.safetensors", "SDXL 1.0", 6, model_id=122359, file_id=99264),
    294259: _SampleModel("hand detail FLUX & XL.safetensors", "SDXL 1.0", 4),
    348625: _SampleModel("boringRealism_primaryV3.safetensors", "SDXL 1.0", 8, trained_words=("boring",)),
    348837: _SampleModel("boringRealism_primaryV4.safetensors", "SDXL 1.0", 8, trained_words=("boring",)),
    1051156: _SampleModel("epiCRealismXL-KiSS_Enhancer_Lora.safetensors", "SDXL 1.0", 5),
    1242203: _SampleModel("Dramatic Lighting Slider.safetensors", "Pony", 2, model_id=1105685),
    1253021: _SampleModel("Pony Realism Slider.safetensors", "Pony", 2),
    1594293: _SampleModel("amateur style slider.safetensors", "Pony", 2),
    1681921: _SampleModel("RealSkin_xxXL_v1.safetensors", "Illustrious", 3, model_id=1486921),
}


class Sandbox:
    """The servers together, and the settings with which a worker uses them."""

    def __init__(self, folder: Path, *, port: int = 0, version: str = "1.10.1", step_seconds: float = 0.05) -> None:
        """`port` is the first of six ports; 0: six free ones."""
        ports = [port + number if port else 0 for number in range(6)]
        self.folder = folder.absolute()
        self.webui = SandboxWebUI(
            self.folder / "webui-models",
            version=version,
            port=ports[0],
            step_seconds=step_seconds,
            switch_seconds=1.0,
        )
        self.civitai = SandboxCivitAI(key=KEY, port=ports[1], storage_port=ports[2])
        self.runpod = SandboxRunPod(port=ports[3], long_poll=2.0)  # a worker that is told to stop ends after that
        self.hub = SandboxHuggingFace(token=KEY, port=ports[4], storage_port=ports[5])

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        stock(self.civitai, self.folder / "civitai")
        style = _make_once(self.folder / "huggingface" / "style.safetensors", sdxl_lora, 1, 2)
        self.hub.add("sandbox/loras", style.name, style)
        for name in ("Stable-diffusion", "Lora", "VAE"):
            (self.folder / "webui-models" / name).mkdir(parents=True, exist_ok=True)
        with self.civitai, self.hub, self.webui, self.runpod:
            yield

    def environment(self) -> dict[str, str]:
        """The settings with which a worker uses these servers."""
        origins = f"{self.civitai.url},{self.civitai.storage.url}"
        return {
            "WEBUI_URL": self.webui.url,
            "CIVITAI_URL": self.civitai.url,
            "CIVITAI_API_KEY": KEY,
            "HF_ENDPOINT": self.hub.url,
            "MODEL_HOSTS": origins,
            "STORAGE_HOSTS": f"{origins},{self.hub.storage.url}",
            "MODELS_DIR": str(self.folder / "models"),
            "WEBUI_MODELS_DIR": str(self.folder / "webui-models"),
            "MODEL_SOURCES": "",
        }

    @property
    def endpoint_url(self) -> str:
        """Where callers send jobs: /run, /status and the others are below it."""
        return f"{self.runpod.url}/v2/{self.runpod.endpoint}"

    def queue_environment(self) -> dict[str, str]:
        """The settings with which the SDK takes jobs from this queue."""
        return {name: value for name, value in self.runpod.worker_env().items() if name.startswith("RUNPOD_")}


def stock(civitai: SandboxCivitAI, folder: Path) -> None:
    """Serve the checkpoint and the LoRAs of the catalog, as small files that are made only once."""
    checkpoint = _make_once(folder / "jibMixIllustrious_v20.safetensors", sdxl_checkpoint, CHECKPOINT_VERSION, 32)
    civitai.add(
        CHECKPOINT_VERSION,
        checkpoint,
        name=CHECKPOINT_NAME,
        version_name="v2.0",
        base_model="Illustrious",
        model_type="Checkpoint",
        size="pruned",
        fp="fp16",
    )
    for lora in LORAS:
        sample = _SAMPLES[lora.version_id]
        civitai.add(
            lora.version_id,
            _make_once(folder / sample.file, sdxl_lora, lora.version_id, sample.megabytes),
            name=lora.title,
            base_model=sample.base_model,
            model_id=sample.model_id,
            file_id=sample.file_id,
            trained_words=sample.trained_words,
        )


def _make_once(path: Path, make: Callable[[Path, int, int], Path], seed: int, megabytes: float) -> Path:
    """Write the file unless it exists. It appears complete: an interrupted start leaves no partial file at its path."""
    size = int(megabytes * 1e6)
    if not path.exists() or path.stat().st_size != size:
        part = path.with_name(f".{os.getpid()}") / path.name  # same name: it is in the metadata of a LoRA
        make(part, seed, size).replace(path)
        part.parent.rmdir()
    return path


@contextlib.contextmanager
def worker(sandbox: Sandbox) -> Iterator[None]:
    """A worker that takes the queue's jobs until the block ends. Its log goes to standard error."""
    environment = _without_runpod(os.environ) | sandbox.environment() | sandbox.queue_environment()
    process = subprocess.Popen(  # noqa: S603 — ours; in its own session: Ctrl-C ends the command first, then this
        [sys.executable, str(Path(__file__).parent.parent / "handler.py")],
        env={"RUNPOD_DEBUG_LEVEL": "WARN", **environment},
        stdout=sys.stderr,
        start_new_session=True,
    )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run(sandbox: Sandbox, command: Sequence[str]) -> int:
    """Run a command against the sandbox and forward signals to it. Its status; 128 + n if signal n ended it."""
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if child is None:
            early.append(number)
        else:
            child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, forward)
    try:  # in its own session: so Ctrl-C on a terminal reaches it only once, forwarded from here
        child = subprocess.Popen(  # noqa: S603 — the developer's own command
            command,
            env=_without_runpod(os.environ) | sandbox.environment() | {"A1111_URL": sandbox.endpoint_url},
            start_new_session=True,
        )
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    for signalled in early:
        child.send_signal(signalled)
    status = child.wait()
    return status if status >= 0 else 128 - status


def _without_runpod(environ: Mapping[str, str]) -> dict[str, str]:
    """Without RunPod's variables, even on RunPod: then the SDK runs its local test."""
    return {
        name: value for name, value in environ.items() if not name.startswith("RUNPOD_") or name in _RUNPOD_SETTINGS
    }


def _curl(command: Sequence[str]) -> str:
    """A shell command that sends the local endpoint a job and saves its picture."""
    port = next((after for word, after in itertools.pairwise(command) if word == "--port"), "8000")
    picture = "base64.b64decode(json.load(sys.stdin)['output']['images'][0])"
    save = f"import base64, json, sys; sys.stdout.buffer.write({picture})"
    ask = f"curl -s http://127.0.0.1:{port}/runsync -H 'Content-Type: application/json' -d @test_input.json"
    return f'{ask} | python3 -c "{save}" >picture.png'


def _print_urls(sandbox: Sandbox) -> None:
    print(f"WebUI    {sandbox.webui.url}")
    print(f"CivitAI  {sandbox.civitai.url} (files on {sandbox.civitai.storage.url})")
    print(f"Hub      {sandbox.hub.url} (as Hugging Face: hf:sandbox/loras/style.safetensors)")
    print(f"RunPod   {sandbox.runpod.url}/v2/{sandbox.runpod.endpoint}/run")
    print("\n# for a worker that uses them:")
    for name, value in sandbox.environment().items():
        print(f"export {name}={shlex.quote(value)}")
    print("\n# and if it takes its jobs from this queue:")
    for name, value in sandbox.queue_environment().items():
        print(f"export {name}={shlex.quote(value)}")
    print(flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    ours, command = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(
        prog="python -m sandbox", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(".sandbox"), help="where to keep files (.sandbox)")
    parser.add_argument("--port", type=int, help="the first of six ports (default: 3100; with a command: free ports)")
    parser.add_argument("--webui-version", choices=("1.9.3", "1.10.1"), default="1.10.1")
    parser.add_argument("--worker", action="store_true", help="start a worker on the queue, for the command")
    parser.add_argument("--step-seconds", type=float, default=0.05, help="duration of a sampling step (0.05)")
    options = parser.parse_args(ours)
    default_port = 0 if command else 3100
    port = default_port if options.port is None else options.port
    try:
        sandbox = Sandbox(options.folder, port=port, version=options.webui_version, step_seconds=options.step_seconds)
    except OSError as error:
        print(f"ports {port} to {port + 5}: {error.strerror} (choose others with --port)", file=sys.stderr)
        return 1
    with sandbox.running():
        if command:
            if "local_queue" in command:
                print(f"Try, from another terminal:\n  {_curl(command)}\n", flush=True)
            with worker(sandbox) if options.worker else contextlib.nullcontext():
                return run(sandbox, command)
        with contextlib.suppress(KeyboardInterrupt):
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            _print_urls(sandbox)
            signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())

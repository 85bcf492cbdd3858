"""What a GPU really does with this worker: `make gpu-check`, or python -m benchmarks.gpu_check [--quick] [--json FILE]

In the image, on a machine with a GPU (nothing else may use it meanwhile):

    docker run --rm --gpus all -e CIVITAI_API_KEY -v "$PWD":/checkout -w /checkout \\
        --entrypoint /opt/worker/bin/python IMAGE -m benchmarks.gpu_check

If a WebUI answers at WEBUI_URL, it is used as it is (WEBUI_MODELS_DIR is the folder that it was started with). If none
does, start.sh is run, with this check in the place of handler.py. The parts of the worker are the real ones: the boot,
the switch to the checkpoint and its verification, an image with and without a LoRA, an out-of-memory on purpose and a
job after it, times and VRAM. OUTPUT_DIR keeps the images.

If /sdapi/v1/memory has no CUDA, no figure is a GPU's: the table says so, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import requests

from a1111_worker import logs
from a1111_worker.catalog import LORAS
from a1111_worker.config import Config
from a1111_worker.context import Deadline, JobContext
from a1111_worker.errors import WorkerError
from benchmarks.report import Row, show
from handler import Worker

ROOT = Path(__file__).resolve().parent.parent
BEGAN = "GPU_CHECK_BEGAN"  # when start.sh was started, on the monotonic clock
BOOT_SECONDS = 3600.0  # with a slow connection the checkpoint takes long
HUGE = {"width": 2048, "height": 2048, "batch_size": 256, "steps": 1}  # 20 GB and more for each tensor of the UNet
GB = 1e9


class CheckFailed(Exception):
    """A job that every later step needs returned no image."""


@dataclass(frozen=True)
class Backend:
    """What answers at the WebUI's address, and whether it computes on a GPU."""

    server: str
    cuda: Mapping[str, Any] | None

    @property
    def is_sandbox(self) -> bool:
        return self.server.startswith("BaseHTTP")  # A1111 is served by uvicorn

    @property
    def is_gpu(self) -> bool:
        return self.cuda is not None and not self.is_sandbox

    @property
    def name(self) -> str:
        if self.is_sandbox:
            return "the SANDBOX: no model, no GPU, and no figure below says anything about one"
        if not self.is_gpu:
            return "A1111 without CUDA: no figure below is a GPU's"
        return f"A1111 on {gpu_name()}"

    @property
    def kind(self) -> str:
        return "GPU" if self.is_gpu else "sandbox" if self.is_sandbox else "CPU"

    def qualify(self, figure: str) -> str:
        """A figure, with a note if it is not a GPU's."""
        return figure if self.is_gpu else f"{figure} ({self.kind}, not a GPU)"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="512² and 8 steps instead of 1024² and 25")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logs.configure("INFO", "text")
    url = os.environ.get("WEBUI_URL", "http://127.0.0.1:3000").rstrip("/")
    if options.inside or answers(url):
        rows, is_gpu = measure(options.quick)
    else:
        rows, is_gpu = in_a_container(options.quick)
    if options.json:
        result = {"gpu": is_gpu, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(result, indent=2, ensure_ascii=False), encoding="utf-8")
    if not options.inside:
        show("GPU check", rows)
        if not is_gpu:
            print("\nThis was not a GPU: nothing above may be quoted as one's.")
    return 0 if is_gpu and all(row.met is not False for row in rows) else 1


def in_a_container(quick: bool) -> tuple[list[Row], bool]:
    """start.sh with this check in the worker's place. So the boot is measured too."""
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        stand_in, result = Path(folder) / "handler.py", Path(folder) / "rows.json"
        stand_in.write_text(
            f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
            "from benchmarks.gpu_check import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
        )
        began = {BEGAN: str(time.monotonic())}
        python = {"WORKER_DIR": folder, "WORKER_PYTHON": sys.executable}
        arguments = ["--inside", "--json", str(result), *(["--quick"] if quick else [])]
        subprocess.run([str(ROOT / "start.sh"), *arguments], env={**os.environ, **python, **began})
        if not result.exists():
            return [Row("the check", "start.sh or the check ended early: its log is above", "a table", False)], False
        found = json.loads(result.read_bytes())
        return [Row(**row) for row in found["rows"]], found["gpu"]


def measure(quick: bool) -> tuple[list[Row], bool]:
    """Everything, with one worker; what fails is a row, and what needs it is left out."""
    config = Config.from_env({**os.environ, "WARMUP": "0", "MAX_IMAGES": "1000", "MAX_PIXELS": str(1 << 28)})
    worker = Worker(config)
    check = Check(worker, config.webui_url, quick)
    rows: list[Row] = []
    try:
        for row in check.rows():
            rows.append(row)
            print(f"{row.work}: {row.measured}", flush=True)
    except (WorkerError, CheckFailed) as error:
        reason = f"{error.code}: {error.message}" if isinstance(error, WorkerError) else str(error)
        rows.append(Row("the check could not go on", reason, "a table", False))
    finally:
        check.close()
        worker.close()
    return rows, check.backend is not None and check.backend.is_gpu


class Check:
    """The steps of the check, with one worker."""

    def __init__(self, worker: Worker, url: str, quick: bool) -> None:
        self._worker = worker
        self._url = url
        self._loop = asyncio.new_event_loop()
        self._body = {
            "prompt": "an old fisherman mending a net, harbour at dawn, detailed",
            "negative_prompt": "blurry, low quality",
            "seed": 42,
            "steps": 8 if quick else 25,
            "width": 512 if quick else 1024,
            "height": 512 if quick else 1024,
        }
        self._jobs = 0
        self.backend: Backend | None = None

    def close(self) -> None:
        self._loop.close()

    def rows(self) -> Iterator[Row]:
        deadline = Deadline(BOOT_SECONDS, what="the check")
        began, since = time.monotonic(), "the check's start"
        if BEGAN in os.environ:
            began, since = float(os.environ[BEGAN]), "the start of start.sh"
        self._worker.readiness.wait_until_up(deadline)
        up = time.monotonic() - began
        self.backend = backend = backend_at(self._url)
        yield Row("what answers", backend.name)
        yield Row(f"the WebUI answers, from {since}", backend.qualify(f"{up:.1f} s"))
        yield from self._checkpoint(deadline, backend)
        yield from self._times(backend)
        yield vram_row("VRAM after these jobs", backend_at(self._url))
        yield from self._lora(backend)
        yield from self._out_of_memory(backend)

    def _checkpoint(self, deadline: Deadline, backend: Backend) -> Iterator[Row]:
        began = time.monotonic()
        model = self._worker.models.prepare_checkpoint(JobContext(deadline))
        how = "downloaded" if model.downloaded else "was on disk"
        yield Row("the checkpoint on disk, verified", f"{time.monotonic() - began:.1f} s, {model.file}, {how}")
        began = time.monotonic()
        self._worker.readiness.prepare(model, JobContext(deadline))
        goal = f"sha256 {model.sha256[:12]}…, in the WebUI too"
        yield Row("the switch to it, verified", backend.qualify(f"{time.monotonic() - began:.1f} s"), goal, True)

    def _times(self, backend: Backend) -> Iterator[Row]:
        size = f"{self._body['width']}², {self._body['steps']} steps"
        seconds, _ = self._image()
        yield Row(f"a job of {size}, the first after the switch", backend.qualify(f"{seconds:.2f} s"))
        warm = [self._image()[0] for _ in range(3)]
        yield Row(f"a job of {size}, warm (median of 3)", backend.qualify(f"{statistics.median(warm):.2f} s"))

    def _lora(self, backend: Backend) -> Iterator[Row]:
        lora = LORAS[0]
        work = f"the same picture with and without {lora.title} × {lora.scale:g}"
        _, without = self._image()
        _, again = self._image()
        answer, _ = self._job(loras=[{"version_id": lora.version_id}])
        if "error" in answer:
            yield Row(work, str(answer["error"]), "they differ", False)
            return
        noise, effect = difference(without, again), difference(without, image_of(answer))
        measured = f"mean difference {effect:.2f} of 255, beside {noise:.2f} between two runs without it"
        loaded = bool(answer["worker"]["loras"][0]["loaded"])
        yield Row(work, backend.qualify(measured), "they differ", loaded and effect > 4 * noise and effect > 0.5)

    def _out_of_memory(self, backend: Backend) -> Iterator[Row]:
        huge = f"{HUGE['batch_size']} pictures of {HUGE['width']}² at once"
        if not backend.is_gpu and not backend.is_sandbox:
            yield Row(f"out of memory on purpose: {huge}", "not tried: without CUDA it would take the machine's own")
            return
        answer, seconds = self._job(**HUGE)
        code = str(answer.get("code", "a result"))
        yield Row(
            f"out of memory on purpose: {huge}",
            backend.qualify(f"{code} after {seconds:.1f} s"),
            "OUT_OF_MEMORY",
            code == "OUT_OF_MEMORY",
        )
        answer, seconds = self._job()
        ended = str(answer.get("error", f"a picture after {seconds:.2f} s"))
        yield Row("the next job", backend.qualify(ended), "a picture", "error" not in answer)
        yield vram_row("VRAM after that", backend_at(self._url))

    def _image(self) -> tuple[float, bytes]:
        """Seconds, and the PNG."""
        answer, seconds = self._job()
        if "error" in answer:
            raise CheckFailed(answer["error"])
        return seconds, image_of(answer)

    def _job(self, **more: Any) -> tuple[dict[str, Any], float]:
        """A whole job's answer, and its seconds."""
        self._jobs += 1
        job = {"id": f"sync-gpu-check-{self._jobs}", "input": {**self._body, **more}}
        began = time.monotonic()
        answer = self._loop.run_until_complete(self._worker.handle(job))
        return answer, time.monotonic() - began


def answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/sdapi/v1/sd-models", timeout=5).status_code == 200
    except requests.RequestException:
        return False


def backend_at(url: str) -> Backend:
    """What answers there now, and its memory."""
    answer = requests.get(f"{url}/sdapi/v1/memory", timeout=30)
    return Backend(answer.headers.get("server", ""), cuda_of(answer.json()))


def cuda_of(memory: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The GPU's part of /sdapi/v1/memory; without one it is {"error": "unavailable"}."""
    cuda = memory.get("cuda")
    return cuda if isinstance(cuda, dict) and isinstance(cuda.get("system"), dict) else None


def vram_row(work: str, backend: Backend) -> Row:
    """Bytes of the GPU's memory, as A1111 1.10.1 returns them: of the whole card, and of its own process at most."""
    if not backend.is_gpu or backend.cuda is None:
        return Row(work, "nothing to measure: /sdapi/v1/memory knows of no CUDA")
    system, reserved = backend.cuda["system"], backend.cuda.get("reserved", {})
    most = f", reserved by the WebUI at most {reserved['peak'] / GB:.1f} GB" if "peak" in reserved else ""
    return Row(work, f"{system['used'] / GB:.1f} of {system['total'] / GB:.1f} GB in use{most}")


def gpu_name() -> str:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "a GPU (no nvidia-smi here to name it)"
    return output.splitlines()[0].replace(", ", ", driver ")


def image_of(answer: Mapping[str, Any]) -> bytes:
    return base64.b64decode(answer["images"][0])


def difference(one: bytes, other: bytes) -> float:
    """The mean difference of two PNGs, pixel by pixel and channel by channel: 0 to 255."""
    from PIL import Image, ImageChops, ImageStat

    first, second = (Image.open(io.BytesIO(png)).convert("RGB") for png in (one, other))
    return statistics.fmean(ImageStat.Stat(ImageChops.difference(first, second)).mean)


if __name__ == "__main__":
    sys.exit(main())

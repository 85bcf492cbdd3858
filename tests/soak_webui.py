"""Runs in place of A1111's launch.py during `make soak`: the sandbox's WebUI, which fails as the job's prompt says.

The prompt of a job ends with `soak <number> <fault>`. A fault happens only once, even if the job is sent again or this
process is restarted meanwhile. Files in SOAK_FOLDER keep the state between processes:

    struck-<number>   the fault of this job has happened
    next-fault        the fault of the next process
    journal           a line per event: `<monotonic seconds> <event> <job or ->`
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sandbox.server import Exchange
from sandbox.webui import CannedAnswer, SandboxWebUI, WebUIFault

ROOT = Path(__file__).resolve().parent.parent

STEP_SECONDS = 0.02
SWITCH_SECONDS = 0.5
IMAGE_BYTES = 300_000

# Faults of a txt2img that the sandbox's WebUI itself has.
TXT2IMG_FAULTS: Mapping[str, WebUIFault | CannedAnswer] = {
    "hang": WebUIFault.HANG,
    "oom": WebUIFault.OUT_OF_MEMORY,
    "nan": WebUIFault.NANS,
    "black": WebUIFault.BLACK,
    "no-images": WebUIFault.NO_IMAGES,
    "502": WebUIFault.BAD_GATEWAY,
    "html": CannedAnswer(200, b"<html><body>Bad things happen</body></html>", "text/html"),
    "half": WebUIFault.CUT,
    "404": WebUIFault.NOT_FOUND,
    "reset": WebUIFault.RESET,
    "other-checkpoint": WebUIFault.OTHER_CHECKPOINT,
}
# Faults that end this process during a generation.
PROCESS_FAULTS = ("die-during", "die-in-switch", "die-in-boot", "switch-fails")
# Faults that continue in the next process.
NEXT_PROCESS_FAULTS = ("die-in-switch", "die-in-boot", "switch-fails")


class SoakedWebUI(SandboxWebUI):
    """`folder` is SOAK_FOLDER. `fault` is the fault of this process, one of NEXT_PROCESS_FAULTS, or empty."""

    def __init__(self, models: Path, folder: Path, fault: str, port: int, checkpoint: str | None) -> None:
        super().__init__(
            models,
            port=port,
            # A process that must fail in its switch must not have loaded the checkpoint before.
            initial_checkpoint=None if fault else checkpoint,
            step_seconds=STEP_SECONDS,
            switch_seconds=SWITCH_SECONDS,
            image_bytes=IMAGE_BYTES,
        )
        self._folder = folder
        self._fault = fault
        if fault == "switch-fails":
            self.misshapen_models |= {path.stem for path in (models / "Stable-diffusion").iterdir()}

    def answer(self, exchange: Exchange) -> None:
        asked = exchange.asked
        if asked.path == "/sdapi/v1/txt2img":
            self._generate_with_fault(exchange)
            return
        if self._fault == "die-in-switch" and asked.path == "/sdapi/v1/reload-checkpoint":
            self._after(SWITCH_SECONDS / 2, lambda: self._kill_itself("free-death", "-"))
        super().answer(exchange)

    def _generate_with_fault(self, exchange: Exchange) -> None:
        number, fault = parse_prompt(exchange.asked.json())
        self._note("began", number)
        if fault and not self._happens_now(number):
            fault = ""
        if fault in TXT2IMG_FAULTS:
            self.fail_next.append(TXT2IMG_FAULTS[fault])
        elif fault in PROCESS_FAULTS:
            if fault in NEXT_PROCESS_FAULTS:
                (self._folder / "next-fault").write_text(fault)
            self.fail_next.append(WebUIFault.HANG)  # so no answer comes before the timer, however late it is
            self._after(0.1, lambda: self._kill_itself("death", number))
        elif fault == "silent":
            self.fail_next.append(WebUIFault.HANG)
            self._after(0.1, lambda: os.kill(os.getpid(), signal.SIGSTOP))
        elif fault == "poisoned":
            self.process.model.is_broken = True
        super().answer(exchange)
        self._note("answered", number)
        if fault == "die-after":
            self._kill_itself("free-death", number)

    def _happens_now(self, number: str) -> bool:
        """Whether the fault of this job has not happened before."""
        try:
            (self._folder / f"struck-{number}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _after(self, seconds: float, do: Callable[[], object]) -> None:
        timer = threading.Timer(seconds, do)
        timer.daemon = True
        timer.start()

    def _kill_itself(self, event: str, number: str) -> None:
        self._note(event, number)
        os.kill(os.getpid(), signal.SIGKILL)

    def _note(self, event: str, number: str) -> None:
        note(self._folder, event, number)


def note(folder: Path, event: str, number: str = "-") -> None:
    """Write a line of the journal."""
    with (folder / "journal").open("a") as journal:
        journal.write(f"{time.monotonic():.3f} {event} {number}\n")


def parse_prompt(body: Mapping[str, Any]) -> tuple[str, str]:
    """The number of the job and its fault. For the worker's own warm-up: `-` and an empty fault."""
    found = re.search(r"soak (\d+) ?([a-z0-9-]*)", str(body.get("prompt")))
    return (found[1], found[2]) if found else ("-", "")


def launch_py(folder: Path) -> str:
    """The text of a launch.py that runs `main` with SOAK_FOLDER set: start.sh gives the WebUI few variables."""
    given = {"SOAK_FOLDER": str(folder), "PYTHONPATH": str(ROOT)}
    return (
        "import os, sys\n\n"
        'if "SOAK_FOLDER" not in os.environ:\n'
        f"    os.execve(sys.executable, [sys.executable, *sys.argv], {{**os.environ, **{given}}})\n"
        "from tests.soak_webui import main\n\n"
        "main()\n"
    )


def main() -> None:
    """Serve like A1111, with the arguments of start.sh. Arguments without a meaning here are ignored."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ckpt-dir", type=Path, required=True)
    parser.add_argument("--ckpt", type=Path)
    arguments, _ = parser.parse_known_args()
    folder = Path(os.environ["SOAK_FOLDER"])
    next_fault = folder / "next-fault"
    fault = next_fault.read_text() if next_fault.exists() else ""
    next_fault.unlink(missing_ok=True)
    if fault == "die-in-boot":
        note(folder, "death")
        sys.exit(1)
    checkpoint = arguments.ckpt.name if arguments.ckpt else None
    webui = SoakedWebUI(arguments.ckpt_dir.parent, folder, fault, arguments.port, checkpoint)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with webui:
        note(folder, "up")
        sys.stdout.write(json.dumps({"listening": webui.url, "fault": fault or "none"}) + "\n")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()

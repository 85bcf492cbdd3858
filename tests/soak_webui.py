"""Stands where A1111's launch.py stands while `make soak` runs: the sandbox's WebUI, failing as a job's prompt says.

The prompt of a job ends with `soak <number> <fault>`. A fault strikes once, however often the job is sent and however
often this process was started again meanwhile: what has struck is a file in SOAK_FOLDER. So are what the next life of
this process is to do, and the journal: `<monotonic seconds> <what> <job or ->`, a line an event.
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
from sandbox.webui import Canned, Fault, WebUI

ROOT = Path(__file__).resolve().parent.parent

STEP_SECONDS = 0.02
SWITCH_SECONDS = 0.5
IMAGE_BYTES = 300_000

# Ends of a txt2img that the sandbox's WebUI knows itself.
ENDS: Mapping[str, Fault | Canned] = {
    "hang": Fault.HANG,
    "oom": Fault.OUT_OF_MEMORY,
    "nan": Fault.NANS,
    "black": Fault.BLACK,
    "no-images": Fault.NO_IMAGES,
    "502": Fault.BAD_GATEWAY,
    "html": Canned(200, b"<html><body>Bad things happen</body></html>", "text/html"),
    "half": Fault.CUT,
    "404": Fault.NOT_FOUND,
    "reset": Fault.RESET,
    "other-checkpoint": Fault.OTHER_CHECKPOINT,
}
# What this process does in the middle of a generation.
DEATHS = ("die-during", "die-in-switch", "die-in-boot", "switch-fails")
# What the next life does instead of starting well.
NEXT_LIVES = ("die-in-switch", "die-in-boot", "switch-fails")


class SoakedWebUI(WebUI):
    """`folder` is SOAK_FOLDER, `life` one of NEXT_LIVES or empty."""

    def __init__(self, models: Path, folder: Path, life: str, port: int, checkpoint: str | None) -> None:
        super().__init__(
            models,
            port=port,
            # A life that is to fail in its switch needs one.
            initial_checkpoint=None if life else checkpoint,
            step_seconds=STEP_SECONDS,
            switch_seconds=SWITCH_SECONDS,
            image_bytes=IMAGE_BYTES,
        )
        self._folder = folder
        self._life = life
        if life == "switch-fails":
            self.misshapen_models |= {path.stem for path in (models / "Stable-diffusion").iterdir()}

    def answer(self, exchange: Exchange) -> None:
        asked = exchange.asked
        if asked.path == "/sdapi/v1/txt2img":
            self._generate(exchange)
            return
        if self._life == "die-in-switch" and asked.method == "POST" and b"sd_model_checkpoint" in asked.body:
            self._soon(SWITCH_SECONDS / 2, lambda: self._die("free-death", "-"))
        super().answer(exchange)

    def _generate(self, exchange: Exchange) -> None:
        number, fault = what_is_asked(exchange.asked.json())
        self._note("began", number)
        if fault and not self._strikes(number):
            fault = ""
        if fault in ENDS:
            self.fail_next.append(ENDS[fault])
        elif fault in DEATHS:
            if fault in NEXT_LIVES:
                (self._folder / "next-life").write_text(fault)
            self.fail_next.append(Fault.HANG)  # it never comes to an answer first, however late the timer is
            self._soon(0.1, lambda: self._die("death", number))
        elif fault == "silent":
            self.fail_next.append(Fault.HANG)
            self._soon(0.1, lambda: os.kill(os.getpid(), signal.SIGSTOP))
        elif fault == "poisoned":
            self.process.broken = True
        super().answer(exchange)
        self._note("answered", number)
        if fault == "die-after":
            self._die("free-death", number)

    def _strikes(self, number: str) -> bool:
        try:
            (self._folder / f"struck-{number}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _soon(self, seconds: float, do: Callable[[], object]) -> None:
        timer = threading.Timer(seconds, do)
        timer.daemon = True
        timer.start()

    def _die(self, what: str, number: str) -> None:
        self._note(what, number)
        os.kill(os.getpid(), signal.SIGKILL)

    def _note(self, what: str, number: str) -> None:
        note(self._folder, what, number)


def note(folder: Path, what: str, number: str = "-") -> None:
    """A line of the journal."""
    with (folder / "journal").open("a") as journal:
        journal.write(f"{time.monotonic():.3f} {what} {number}\n")


def what_is_asked(body: Mapping[str, Any]) -> tuple[str, str]:
    """The number of the job and its fault, from the prompt; `-` and nothing for the worker's own warm-up."""
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
    """Serve as A1111 does with the arguments that start.sh gives; those that mean nothing here are not looked at."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ckpt-dir", type=Path, required=True)
    parser.add_argument("--ckpt", type=Path)
    asked, _ = parser.parse_known_args()
    folder = Path(os.environ["SOAK_FOLDER"])
    next_life = folder / "next-life"
    life = next_life.read_text() if next_life.exists() else ""
    next_life.unlink(missing_ok=True)
    if life == "die-in-boot":
        note(folder, "death")
        sys.exit(1)
    checkpoint = asked.ckpt.name if asked.ckpt else None
    webui = SoakedWebUI(asked.ckpt_dir.parent, folder, life, asked.port, checkpoint)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with webui:
        note(folder, "up")
        sys.stdout.write(json.dumps({"listening": webui.url, "life": life or "a good one"}) + "\n")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()

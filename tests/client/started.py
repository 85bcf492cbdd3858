"""`make gateway` as a process: the sandbox, its queue, a real worker, and the gateway."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT, wait_until


class Started:
    """`make gateway` in a folder of its own, on a free port."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "log"
        inherited = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        gateway = [sys.executable, "-m", "a1111_client", "serve", "--refresh", "--port", "0"]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sandbox", "--folder", str(folder / "sandbox"), "--worker", "--", *gateway],
                cwd=ROOT,
                env={**inherited, "HOME": str(folder), "RUNPOD_API_KEY": "rpa_NOT-FOR-THIS"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.url = wait_until(self._find_url, "the gateway's address", seconds=90)

    def _find_url(self) -> str:
        assert self.process.poll() is None, self.log()
        return next(
            (line.split()[4].rstrip(",") for line in self.log().splitlines() if "A1111's API is at" in line), ""
        )

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def interrupt(self) -> int:
        """Ctrl-C, and the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(40)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(40)

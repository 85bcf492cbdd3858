"""The worker's process: a command whose RunPod SDK takes its jobs from this queue."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

KEPT = ("RUNPOD_DEBUG_LEVEL", "RUNPOD_LOG_LEVEL", "RUNPOD_INIT_TIMEOUT", "RUNPOD_PING_INTERVAL")
"""RunPod's variables that an operator may set here. All others are the platform's, or RunPod's key."""


def worker_environment(
    environ: Mapping[str, str], url: str, key: str, worker: str, *, query: str = "gpu=local"
) -> dict[str, str]:
    """The environment with which the SDK takes jobs from the queue at `url` (runpod 1.12).

    The caller's key and RunPod's own are not in it. The SDK's checks of the machine are those of RunPod's platform (its
    network, its drivers), so they are off.
    """
    kept = {
        name: value
        for name, value in environ.items()
        if name != "LOCAL_API_KEY" and (not name.startswith("RUNPOD_") or name in KEPT)
    }
    return {
        **kept,
        "RUNPOD_WEBHOOK_GET_JOB": f"{url}/job-take/$ID?{query}",  # the SDK appends `&…`
        "RUNPOD_WEBHOOK_POST_OUTPUT": f"{url}/job-done/$RUNPOD_POD_ID/$ID?{query}",
        "RUNPOD_WEBHOOK_POST_STREAM": f"{url}/job-stream/$RUNPOD_POD_ID/$ID?{query}",
        "RUNPOD_WEBHOOK_PING": f"{url}/ping/$RUNPOD_POD_ID?{query}",
        "RUNPOD_AI_API_KEY": key,
        "RUNPOD_POD_ID": worker,
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        "RUNPOD_SKIP_GPU_CHECK": "true",
        "RUNPOD_DEBUG_LEVEL": kept.get("RUNPOD_DEBUG_LEVEL") or "INFO",  # the SDK's default, DEBUG, logs results
    }


def new_key() -> str:
    """A key for the worker's side of the queue."""
    return secrets.token_urlsafe(32)


class WorkerProcess:
    """A command that runs until it ends by itself or is stopped.

    It has a process group of its own: so Ctrl-C on a terminal reaches only the queue, which sends TERM once.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start it. OSError if it cannot be started."""
        self._home = tempfile.TemporaryDirectory(prefix="local-queue-")
        environment = dict(environment)
        if setpriv := shutil.which("setpriv"):  # of util-linux
            # If the queue is killed, the SDK would ask it for ever: thousands of times a second, each with a line in
            # the log (1.12).
            command = [setpriv, "--pdeathsig", "TERM", *command]
        # With this file the SDK sends the key in it, RunPod's own, and not RUNPOD_AI_API_KEY (1.12, http_client.py).
        if (Path(environment.get("HOME") or "~").expanduser() / ".runpod" / "config.toml").exists():
            environment["HOME"] = self._home.name
        try:
            self._process = subprocess.Popen(  # noqa: S603 - the operator's own command
                command, env=environment, start_new_session=True
            )
        except OSError:
            self._home.cleanup()
            raise

    def stop(self) -> None:
        """TERM: a job that runs may finish within the worker's SHUTDOWN_GRACE."""
        if self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """End it at once, with everything that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for its end. Its exit status; 128 + n if signal n ended it."""
        status = self._process.wait()
        self.kill()  # the SDK's ping process outlives a worker that was killed (runpod 1.12)
        self._home.cleanup()
        return status if status >= 0 else 128 - status

"""What RunPod's /status shows of a running job: at most one look a second, in order, none after the answer.

The SDK's own `progress_update` opens a thread and a connection for each call, and neither keeps their order nor waits
for the last one (runpod 1.12): an update that arrives after the answer re-opens a finished job. So a job has one sender
here: it keeps the newest look alone, has one request in flight, and `close` returns when none is.
"""

from __future__ import annotations

import json
import logging
import threading
from typing import Any

import requests

from a1111_worker.domain import Progress

log = logging.getLogger(__name__)


class StatusPage:
    """RunPod's job-done address (with `$ID` in it) and the key it wants; `None` for a run without RunPod.

    `interval` and `timeout` are seconds.
    """

    def __init__(self, url: str | None, key: str = "", *, interval: float = 1.0, timeout: float = 3.0) -> None:
        self._url = url
        self._interval = interval
        self._timeout = timeout
        self._session = requests.Session()
        self._session.trust_env = False
        # As the SDK sends them (runpod 1.12, rp_http.py).
        self._session.headers.update(
            {"Authorization": key, "charset": "utf-8", "Content-Type": "application/x-www-form-urlencoded"}
        )

    def of(self, job_id: str) -> JobStatus:
        """The status of one job; close it before the job's answer leaves."""
        return JobStatus(self, job_id)

    def send(self, job_id: str, look: dict[str, Any]) -> None:
        """Show one look, and return when RunPod has it or cannot be told. Never raises: a look is not worth a job."""
        if not self._url:
            return
        body = json.dumps({"status": "IN_PROGRESS", "output": look}, allow_nan=False)
        url = self._url.replace("$ID", job_id) + "&isStream=false"
        try:
            answer = self._session.post(
                url, data=body.encode(), headers={"X-Request-ID": job_id}, timeout=self._timeout, allow_redirects=False
            )
            answer.raise_for_status()
        except (requests.RequestException, ValueError) as error:
            log.warning("the progress of job %s was not taken: %s", job_id, type(error).__name__)

    def close(self) -> None:
        """Let the connection go."""
        self._session.close()

    @property
    def interval(self) -> float:
        return self._interval

    @property
    def is_shown(self) -> bool:
        return bool(self._url)


class JobStatus:
    """The looks at one job. `report` may be called from any thread; after `close` nothing is sent any more."""

    def __init__(self, page: StatusPage, job_id: str) -> None:
        self._page = page
        self._job_id = job_id
        self._lock = threading.Condition()
        self._newest: Progress | None = None
        self._closed = False
        self._sender: threading.Thread | None = None

    def report(self, progress: Progress) -> None:
        """Show this look next; an older one that nobody has seen yet is dropped. Returns at once."""
        if not self._page.is_shown:
            return
        with self._lock:
            if self._closed:
                return
            self._newest = progress
            self._lock.notify_all()
            if self._sender is None:
                self._sender = threading.Thread(target=self._send_all, daemon=True, name=f"progress-{self._job_id}")
                self._sender.start()

    @property
    def is_sending(self) -> bool:
        """Whether there is anything to wait for in `close`."""
        return self._sender is not None

    def stop(self) -> None:
        """Begin no further request, and do not wait for the one in flight. Returns at once, from any thread."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()

    def close(self) -> None:
        """End it: a look nobody has seen is dropped, one in flight is waited for. Idempotent."""
        self.stop()
        if self._sender is not None:
            self._sender.join()

    def _send_all(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._closed or self._newest is not None)
                if self._closed or self._newest is None:
                    return
                progress, self._newest = self._newest, None
            self._page.send(self._job_id, as_output(progress))
            with self._lock:
                self._lock.wait_for(lambda: self._closed, timeout=self._page.interval)


def as_output(progress: Progress) -> dict[str, Any]:
    """A look as `/status` shows it under `output`."""
    output: dict[str, Any] = {"stage": progress.stage.value}
    if progress.percent is not None:
        output["percent"] = round(min(100.0, max(0.0, progress.percent)), 1)
    if progress.detail:
        output["detail"] = progress.detail
    if progress.eta_s is not None:
        output["eta_s"] = round(max(0.0, progress.eta_s), 1)
    return {**output, **progress.facts}

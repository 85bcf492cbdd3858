"""What RunPod's /status shows of a running job: progress at most once a second, in order, and none after the answer.

The SDK's own `progress_update` opens a thread and a connection for each call. It does not keep the order of the calls,
and nothing waits for the last one (runpod 1.12): progress that arrives after the answer re-opens a finished job. So
here a job has one sender. It keeps only the newest progress, and has one request in flight at most. `close` waits for
that request.
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
    """RunPod's job-done address (with `$ID` in it) and the key for it. Without an address nothing is sent.

    `interval` (between two requests for a job) and `timeout` are seconds.
    """

    def __init__(self, url: str | None, key: str = "", *, interval: float = 1.0, timeout: float = 3.0) -> None:
        self.interval = interval
        self._url = url
        self._timeout = timeout
        self._session = requests.Session()
        self._session.trust_env = False
        # As the SDK sends them (runpod 1.12, rp_http.py).
        self._session.headers.update(
            {"Authorization": key, "charset": "utf-8", "Content-Type": "application/x-www-form-urlencoded"}
        )

    @property
    def has_url(self) -> bool:
        return bool(self._url)

    def job_status(self, job_id: str) -> JobStatus:
        """The status of one job. Close it before the job's answer leaves."""
        return JobStatus(self, job_id)

    def post(self, job_id: str, progress: Progress) -> None:
        """Send progress; return when RunPod has it or the request failed. Never raises: progress is not worth a job."""
        if not self._url:
            return
        url = self._url.replace("$ID", job_id) + "&isStream=false"
        try:
            body = json.dumps({"status": "IN_PROGRESS", "output": format_progress(progress)}, allow_nan=False)
            answer = self._session.post(
                url, data=body.encode(), headers={"X-Request-ID": job_id}, timeout=self._timeout, allow_redirects=False
            )
            answer.raise_for_status()
        except (requests.RequestException, ValueError) as error:
            log.warning("the progress of job %s was not taken: %s", job_id, type(error).__name__)

    def close(self) -> None:
        """Close the connections."""
        self._session.close()


class JobStatus:
    """The progress of one job. `report` may be called from any thread. After `close` nothing is sent."""

    def __init__(self, page: StatusPage, job_id: str) -> None:
        self._page = page
        self._job_id = job_id
        self._changed = threading.Condition()
        self._newest: Progress | None = None
        self._is_closed = False
        self._sender: threading.Thread | None = None

    @property
    def is_sending(self) -> bool:
        """Whether `close` may have to wait."""
        return self._sender is not None

    def report(self, progress: Progress) -> None:
        """Send this next. Older progress that was not sent yet is dropped. Returns at once."""
        if not self._page.has_url:
            return
        with self._changed:
            if self._is_closed:
                return
            self._newest = progress
            self._changed.notify_all()
            if self._sender is None:
                self._sender = threading.Thread(target=self._send_all, daemon=True, name=f"progress-{self._job_id}")
                self._sender.start()

    def stop(self) -> None:
        """Begin no further request, and do not wait for the one in flight. Returns at once, from any thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """Drop progress that was not sent yet, and wait for the request in flight. Idempotent."""
        self.stop()
        if self._sender is not None:
            self._sender.join()

    def _send_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._newest is not None)
                if self._is_closed or self._newest is None:
                    return
                progress, self._newest = self._newest, None
            self._page.post(self._job_id, progress)
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed, timeout=self._page.interval)


def format_progress(progress: Progress) -> dict[str, Any]:
    """Progress as `/status` shows it under `output`."""
    output: dict[str, Any] = {"stage": progress.stage.value}
    if progress.percent is not None:
        output["percent"] = round(min(100.0, max(0.0, progress.percent)), 1)
    if progress.detail:
        output["detail"] = progress.detail
    if progress.eta_s is not None:
        output["eta_s"] = round(max(0.0, progress.eta_s), 1)
    return {**output, **progress.facts}

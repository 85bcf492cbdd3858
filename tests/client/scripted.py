"""A worker that answers as its test says, on a real queue, and a gateway on a real port: no process is started."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx
import uvicorn

from a1111_client.endpoint import Endpoint, Timings
from a1111_client.gateway.app import create_app
from a1111_client.gateway.guard import Access, parse_access
from a1111_client.gateway.runner import Runner
from a1111_client.snapshot import Snapshot, SnapshotStore
from sandbox.draw import encode, picture
from sandbox.runpod import SandboxRunPod

QUICK = Timings(
    quick=0.01, young=0.5, slow=0.02, queue_look=0.05, request=5.0, pause=0.01, pause_most=0.05, patience=0.4
)
KEY = "rpa_THE-KEY-OF-RUNPOD"

PNG = base64.b64encode(encode(picture("a test", 64, 64), "a test", "png")).decode()
CHECKPOINT = "house.safetensors"
SHA256 = "ab" * 32

Work = Callable[["Taken"], Any]


def models_answer(**changes: Any) -> dict[str, Any]:
    """What a worker answers to a `models` task."""
    return {
        "fingerprint": "00000000000000aa",
        "versions": {"worker": "0.1.0", "webui": "1.10.1"},
        "tasks": ["txt2img"],
        "checkpoints": [
            {"name": "House", "file": CHECKPOINT, "sha256": SHA256, "default": True, "loaded": True, "cached": True},
            {"name": "Garden", "file": "garden.safetensors", "sha256": "cd" * 32, "default": False},
        ],
        "cached": {"loras": [{"name": "Fog", "file": "fog_1.safetensors", "tag": "fog_1"}], "vaes": [{"file": "v.pt"}]},
        "catalog": [{"name": "Detail", "version_id": 1, "scale": 1.0, "file": "detail.safetensors"}],
        "webui": {
            "prompt-styles": [{"name": "noir", "prompt": "noir", "negative_prompt": ""}],
            "loras": [{"name": "mist_2", "alias": "my-mist", "path": "mist_2.safetensors", "metadata": {}}],
        },
        "options": {
            "CLIP_stop_at_last_layers": 1,
            "sd_vae": "Automatic",
            "eta_noise_seed_delta": 0,
            "face_restoration_model": "CodeFormer",
        },
        "limits": {"max_steps": 150},
        **changes,
    }


def picture_answer(given: dict[str, Any], **worker: Any) -> dict[str, Any]:
    """What a worker answers to a txt2img job."""
    info = {"seed": 42, "all_seeds": [42], "infotexts": ["a test"], "prompt": given.get("prompt", "")}
    answer = {
        "images": [PNG] * (given.get("n_iter", 1) * given.get("batch_size", 1)),
        "parameters": {},
        "info": json.dumps(info),
        "worker": {"lists": "00000000000000aa", "delivery": {"mode": "inline", "urls": []}, **worker},
    }
    if "models" in given.get("include", ()):
        answer["models"] = models_answer()
    return answer


class Closable(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=Closable)


class Taken:
    """A job that the worker has taken."""

    def __init__(self, worker: ScriptedWorker, job: dict[str, Any]) -> None:
        self._worker = worker
        self.id = str(job["id"])
        self.given: dict[str, Any] = job["input"]
        self.policy = job.get("policy")

    def report(self, **progress: Any) -> None:
        """Show progress in /status."""
        self._worker.post(self.id, {"status": "IN_PROGRESS", "output": progress})

    def wait_for(self, event: threading.Event) -> None:
        assert event.wait(20)


class ScriptedWorker:
    """Takes one job after another, and answers with what `work` returns: an answer, a failure with `error`, or None."""

    def __init__(self, queue: SandboxRunPod, work: Work = lambda taken: picture_answer(taken.given)) -> None:
        self.work = work
        self.taken: list[Taken] = []
        self._queue = queue
        self._base = f"{queue.url}/v2/{queue.endpoint}"
        self._http = httpx.Client(headers={"Authorization": queue.worker_key}, timeout=20, trust_env=False)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._stopped = False

    @property
    def inputs(self) -> list[dict[str, Any]]:
        """The inputs of all jobs so far."""
        return [taken.given for taken in self.taken]

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped = True
        if self._thread.is_alive():
            self._thread.join(20)
        self._http.close()

    def post(self, job_id: str, body: dict[str, Any]) -> None:
        self._http.post(f"{self._base}/job-done/pod/{job_id}?gpu=x&isStream=false", content=json.dumps(body))

    def _run(self) -> None:
        while not self._stopped:
            response = self._http.get(f"{self._base}/job-take/pod?gpu=x")
            if response.status_code != httpx.codes.OK:
                continue
            taken = Taken(self, response.json())
            self.taken.append(taken)
            answer = self.work(taken)
            if answer is not None:
                failed = isinstance(answer, dict) and "error" in answer
                self.post(taken.id, {"error": answer.pop("error"), "output": answer} if failed else {"output": answer})


class Desk:
    """A gateway on a port of its own, its queue, and its worker."""

    def __init__(self, folder: Path, queue: SandboxRunPod, *, access: Access | None = None, key: str = KEY) -> None:
        self.queue = queue
        self.worker = ScriptedWorker(queue)
        self.snapshots = SnapshotStore(folder)
        self.endpoint_url = f"{queue.url}/v2/{queue.endpoint}"
        self._access = access or parse_access(host="127.0.0.1")
        self._key = key
        self._opened: list[Closable] = []
        self._server: uvicorn.Server
        self._thread: threading.Thread

    @property
    def url(self) -> str:
        return self.http.base_url.__str__().rstrip("/")

    def start(self) -> None:
        runner = Runner(Endpoint(self.endpoint_url, self._key, timings=QUICK), self.snapshots)
        app = create_app(runner, self._access)
        self.gateway = app.state.gateway
        config = uvicorn.Config(app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            self._thread.join(0.005)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False)

    def stop(self) -> None:
        for opened in (self.http, *self._opened):
            opened.close()
        self._server.should_exit = True
        self._thread.join(20)

    def closed_with_it(self, opened: T) -> T:
        """The same object. Its `close` is called when the desk stops."""
        self._opened.append(opened)
        return opened

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.http.get(f"/sdapi/v1/{path}", **more)

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        return self.http.post(f"/sdapi/v1/{path}", **({} if body is None else {"json": body}), **more)


@contextlib.contextmanager
def desk(
    folder: Path, *, access: Access | None = None, asleep: bool = False, known: bool = True, timeout: float = 600.0
) -> Iterator[Desk]:
    """A Desk that runs. `asleep`: its worker is not started. `known`: the endpoint has been asked for its lists.

    `timeout`: seconds after which RunPod ends a job.
    """
    with SandboxRunPod(long_poll=0.2, client_key=KEY, execution_timeout=timeout) as queue:
        made = Desk(folder, queue, access=access)
        if known:
            made.snapshots.save(made.endpoint_url, Snapshot(models_answer()))
        made.start()
        if not asleep:
            made.worker.start()
        try:
            yield made
        finally:
            made.stop()
            made.worker.stop()

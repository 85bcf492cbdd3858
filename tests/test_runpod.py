"""The worker under the real SDK: a subprocess that takes its jobs from the sandbox's queue."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox.runpod import SandboxRunPod
from sandbox.webui import WebUIFault
from tests.images import gradient, open_base64, png_bytes, to_base64
from tests.support import DETAIL, ROOT, SMALL, World, free_port, wait_until, world


class Endpoint:
    """A RunPod endpoint with one worker: the real handler.py, started as the image starts it."""

    def __init__(self, it: World, queue: SandboxRunPod, log: Path) -> None:
        self.world = it
        self.queue = queue
        self._log = log
        origins = f"{it.civitai.url},{it.civitai.storage.url}"
        self.environ = queue.worker_env(
            WEBUI_URL=it.webui.url,
            CIVITAI_URL=it.civitai.url,
            CIVITAI_API_KEY="the-key",
            STORAGE_HOSTS=origins,
            MODEL_HOSTS=origins,
            MODELS_DIR=str(it.models_dir),
            WEBUI_MODELS_DIR=str(it.webui_models),
            MODEL_SOURCES="",
            WARMUP="0",
            WORKER_STATE_FILE=str(it.folder / "worker.state"),
        )

    def start(self, **settings: str) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "handler.py"],
                cwd=ROOT,
                env={**self.environ, **settings},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self) -> int:
        """TERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def run(self, sync: bool = False, **given: Any) -> dict[str, Any]:
        """What /status returns for a job in the end."""
        job_id = self.queue.submit({"prompt": "a lighthouse", **SMALL, **given}, sync=sync)
        return self.queue.wait(job_id, timeout=30)


@contextlib.contextmanager
def endpoint(folder: Path, **settings: str) -> Iterator[Endpoint]:
    with world(folder, boot=False) as it, SandboxRunPod(long_poll=0.5) as queue:
        its = Endpoint(it, queue, folder / "worker.log")
        its.start(**settings)
        try:
            yield its
        finally:
            its.kill()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with endpoint(tmp_path_factory.mktemp("live")) as it:
        yield it


def test_a_job_ends_completed_with_its_image_and_the_worker_block(live: Endpoint) -> None:
    status = live.run(loras=[{"version_id": DETAIL}])

    assert status["status"] == "COMPLETED", status
    assert len(status["output"]["images"]) == 1
    assert status["output"]["worker"]["loras"][0]["loaded"] is True


def test_a_failed_job_ends_failed_with_all_its_keys(live: Endpoint) -> None:
    status = live.run(steps=0)

    assert status["status"] == "FAILED"
    assert status["error"].startswith("INVALID_REQUEST: steps: must be")
    assert status["output"]["code"] == "INVALID_REQUEST"
    assert status["output"]["retryable"] is False


# A caller that uses RunPod's own Python client. It prints what the client shows of a failed job.
CLIENT = """
import json, os, runpod
runpod.api_key = "a-key"
endpoint = runpod.Endpoint(os.environ["RUNPOD_ENDPOINT_ID"])
job = {"input": {"prompt": "a lighthouse", "steps": 0, "loras": [{"name": "nobody", "scale": "x"}]}}
waiting = endpoint.run(job)
print(json.dumps([endpoint.run_sync(job), waiting.output(timeout=60), waiting.status()]))
"""


def test_runpods_own_client_shows_why_a_job_failed(live: Endpoint) -> None:
    environ = {
        **{name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ},
        "RUNPOD_ENDPOINT_ID": live.queue.endpoint,
        "RUNPOD_ENDPOINT_BASE_URL": f"{live.queue.url}/v2",
    }

    done = subprocess.run([sys.executable, "-c", CLIENT], env=environ, capture_output=True, text=True, timeout=90)

    assert done.returncode == 0, done.stderr
    of_runsync, of_run, status = json.loads(done.stdout.splitlines()[-1])
    assert status == "FAILED"
    for shown in (of_runsync, of_run):
        assert "error" not in shown  # the client loses it
        assert shown["message"].startswith("steps: must be a whole number from 1 to 150")
        assert [complaint["path"] for complaint in shown["complaints"]] == ["steps", "loras[0].scale"]
        assert (shown["code"], shown["retryable"]) == ("INVALID_REQUEST", False)


def test_a_result_of_five_megabytes_arrives(live: Endpoint) -> None:
    live.world.webui.image_bytes = 4_000_000

    status = live.run()
    live.world.webui.image_bytes = None

    assert status["status"] == "COMPLETED"
    assert len(json.dumps(status["output"])) > 5_000_000


def test_two_jobs_in_a_row_are_both_done(live: Endpoint) -> None:
    first = live.queue.submit({"prompt": "one", **SMALL})
    second = live.queue.submit({"prompt": "two", **SMALL})

    done = [live.queue.wait(job, timeout=30)["status"] for job in (first, second)]

    assert done == ["COMPLETED", "COMPLETED"]


def test_progress_is_shown_in_order_and_never_after_the_answer(live: Endpoint) -> None:
    live.world.webui.step_seconds = 0.05

    job = live.queue.submit({"prompt": "slow", **SMALL, "steps": 60})
    live.queue.wait(job, timeout=30)
    live.world.webui.step_seconds = 0.0

    reported = live.queue.progress_of(job)
    percents = [progress["percent"] for progress in reported if progress["stage"] == "generate"]
    assert percents and percents == sorted(percents)
    assert live.queue.late_progress == []


def test_an_img2img_is_cancelled_in_the_middle_and_the_one_in_flight_beside_it_is_whole(live: Endpoint) -> None:
    body = {"task": "img2img", "init_images": [to_base64(png_bytes(gradient()))], "denoising_strength": 1, **SMALL}
    live.world.webui.step_seconds = 0.02
    cancelled = live.queue.submit({"prompt": "slow", **body, "steps": 150})
    live.queue.wait(cancelled, timeout=30, until=lambda job: bool(job.progress))
    following = live.queue.submit({"prompt": "a lighthouse", **body})

    live.queue.cancel(cancelled)

    output = live.queue.wait(following, timeout=30)["output"]
    live.world.webui.step_seconds = 0.0
    assert open_base64(output["images"][0]).size == (64, 64)
    assert output["parameters"]["init_images"] is None
    assert live.queue.status(cancelled)["status"] == "CANCELLED"


def test_a_picture_is_enlarged_while_another_job_is_in_flight(live: Endpoint) -> None:
    live.world.webui.step_seconds = 0.02
    slow = live.queue.submit({"prompt": "slow", **SMALL, "steps": 50})
    live.queue.wait(slow, timeout=30, until=lambda job: bool(job.progress))

    body = {"task": "upscale", "image": to_base64(png_bytes(gradient())), "upscaler_1": "Lanczos"}
    enlarged = live.queue.wait(live.queue.submit(body), timeout=30)
    live.world.webui.step_seconds = 0.0

    assert open_base64(enlarged["output"]["images"][0]).size == (192, 128)
    assert live.queue.wait(slow, timeout=30)["status"] == "COMPLETED"


def test_a_cancelled_job_is_interrupted_and_the_next_one_is_whole(live: Endpoint) -> None:
    live.world.webui.step_seconds = 0.05
    cancelled = live.queue.submit({"prompt": "slow", **SMALL, "steps": 150})
    live.queue.wait(cancelled, timeout=30, until=lambda job: bool(job.progress))

    live.queue.cancel(cancelled)
    after = live.run(steps=2)
    live.world.webui.step_seconds = 0.0

    assert after["status"] == "COMPLETED"
    assert live.queue.status(cancelled)["status"] == "CANCELLED"
    assert live.queue.late_results == []
    assert "/sdapi/v1/interrupt" in [asked.path for asked in live.world.webui.asked]


def test_a_job_with_a_short_policy_is_answered_before_runpod_ends_it(live: Endpoint) -> None:
    live.world.webui.fail_next = [WebUIFault.HANG]  # it takes all of the time that the worker waits for an interrupt

    job = live.queue.submit({"prompt": "slow", **SMALL}, policy={"executionTimeout": 5_000})
    status = live.queue.wait(job, timeout=30)
    live.world.webui.release()

    assert status["status"] == "FAILED", status
    assert status["output"]["code"] == "JOB_TIMEOUT"
    assert live.queue.late_results == []


def test_nothing_of_a_prompt_is_in_the_log(live: Endpoint) -> None:
    live.run(prompt="a very private lighthouse")

    assert "private" not in live.log()


def test_stopped_by_term_an_idle_worker_ends_with_0_and_holds_nothing(tmp_path: Path) -> None:
    with endpoint(tmp_path) as it:
        it.run()

        assert it.stop() == 0
        assert [path for path in it.world.models_dir.rglob(".holds/*") if path.is_file()] == []


def test_stopped_by_term_the_running_job_is_finished_first(tmp_path: Path) -> None:
    with endpoint(tmp_path) as it:
        it.world.webui.step_seconds = 0.02
        job = it.queue.submit({"prompt": "slow", **SMALL, "steps": 100})
        it.queue.wait(job, timeout=30, until=lambda seen: bool(seen.progress))

        status = it.stop()

        assert status == 0
        assert it.queue.status(job)["status"] == "COMPLETED"


def test_stopped_by_term_a_job_too_long_for_the_grace_is_cancelled_with_an_answer(tmp_path: Path) -> None:
    with endpoint(tmp_path, SHUTDOWN_GRACE="1", JOBS_IN_FLIGHT="2") as it:
        it.world.webui.step_seconds = 0.1
        running = it.queue.submit({"prompt": "slow", **SMALL, "steps": 150})
        waiting = it.queue.submit({"prompt": "slow too", **SMALL, "steps": 150})
        for job in (running, waiting):
            it.queue.wait(job, timeout=30, until=lambda seen: bool(seen.progress))

        status = it.stop()

        assert status == 0
        answers = [it.queue.status(job) for job in (running, waiting)]
        assert [answer["output"]["code"] for answer in answers] == ["JOB_CANCELLED", "JOB_CANCELLED"]
        assert [answer["output"]["retryable"] for answer in answers] == [True, True]


def children_of(pid: int) -> list[int]:
    """The processes whose parent has this pid, without those that have ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(folder.name))
    return found


def health_of(state_file: Path) -> dict[str, Any]:
    """What the worker has written for the health check; nothing yet: an empty object."""
    try:
        found: dict[str, Any] = json.loads(state_file.read_bytes())
    except FileNotFoundError:
        return {}
    return found


def test_the_health_says_that_the_sdks_ping_process_lives(tmp_path: Path) -> None:
    state_file = tmp_path / "worker.state.json"
    with endpoint(tmp_path, WORKER_STATE_FILE=str(state_file)) as it:
        it.queue.wait_for_worker()

        wait_until(lambda: health_of(state_file).get("ping") == "up", "the ping process")
        assert len(children_of(it.process.pid)) == 1
        assert health_of(state_file)["state"] == "ready"


@pytest.mark.slow  # the health is written every 10 s
def test_the_health_says_that_the_sdks_ping_process_has_died(tmp_path: Path) -> None:
    state_file = tmp_path / "worker.state.json"
    with endpoint(tmp_path, WORKER_STATE_FILE=str(state_file)) as it:
        wait_until(lambda: health_of(state_file).get("ping") == "up", "the ping process")
        (ping,) = children_of(it.process.pid)

        os.kill(ping, signal.SIGKILL)
        wait_until(lambda: health_of(state_file)["ping"] == "down", "the next heartbeat")

        assert it.run()["status"] == "COMPLETED"  # jobs still come and go
        assert "the SDK's ping process has died (status -9)" in it.log()


def test_a_worker_that_cannot_boot_answers_the_jobs_that_wait(tmp_path: Path) -> None:
    with world(tmp_path, boot=False) as it, SandboxRunPod(long_poll=0.5) as queue:
        it.webui.crash()
        its = Endpoint(it, queue, tmp_path / "worker.log")
        job = queue.submit({"prompt": "a lighthouse"})
        its.start(WEBUI_READY_TIMEOUT="0.2")
        try:
            status = queue.wait(job, timeout=30)
        finally:
            its.kill()

    assert status["status"] == "FAILED"
    assert status["error"].startswith("WEBUI_NOT_READY")
    assert queue.jobs[job].stop_pod is True


def test_a_boot_that_fails_for_any_reason_answers_the_jobs_that_the_worker_is_not_ready(tmp_path: Path) -> None:
    with world(tmp_path, boot=False) as it, SandboxRunPod(long_poll=0.5) as queue:
        its = Endpoint(it, queue, tmp_path / "worker.log")
        job = queue.submit({"prompt": "a lighthouse"})
        its.start(CIVITAI_API_KEY="")
        try:
            status = queue.wait(job, timeout=30)
        finally:
            its.kill()

    assert status["error"].startswith("WEBUI_NOT_READY: this worker could not start: MODEL_ACCESS_DENIED")
    assert "CIVITAI_API_KEY" in status["output"]["hint"]
    assert queue.jobs[job].stop_pod is True


def test_a_cache_that_cannot_be_created_ends_no_worker(tmp_path: Path) -> None:
    no_folder = tmp_path / "a file"
    no_folder.touch()

    with endpoint(tmp_path, MODELS_DIR=str(no_folder / "models")) as it:
        status = it.run(loras=[{"version_id": DETAIL}])

    assert status["status"] == "COMPLETED", status
    assert status["output"]["worker"]["loras"][0]["loaded"] is True


def test_a_webui_folder_that_cannot_be_written_answers_the_jobs_that_wait(tmp_path: Path) -> None:
    no_folder = tmp_path / "a file"
    no_folder.touch()

    with endpoint(tmp_path, WEBUI_MODELS_DIR=str(no_folder / "webui-models")) as it:
        status = it.run()

        assert status["error"].startswith(
            "WEBUI_NOT_READY: this worker could not start: VOLUME_FAILED: the WebUI's folder"
        )
        assert "WEBUI_MODELS_DIR" in status["output"]["hint"]
        assert "Traceback" not in it.log()
        assert it.world.civitai.links_given == 0  # nothing was downloaded for it


def test_the_local_api_answers_too(tmp_path: Path) -> None:
    import requests

    port = free_port()
    with world(tmp_path, boot=False) as it, SandboxRunPod() as queue:
        its = Endpoint(it, queue, tmp_path / "worker.log")
        environ = {name: value for name, value in its.environ.items() if not name.startswith("RUNPOD_WEBHOOK")}
        process = subprocess.Popen(
            [sys.executable, "handler.py", "--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port", str(port)],
            cwd=ROOT,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        serving = threading.Event()
        lines: list[str] = []

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if "Uvicorn running" in line:
                    serving.set()

        reader = threading.Thread(target=read)
        reader.start()
        try:
            assert serving.wait(30), "".join(lines)
            answer = requests.post(
                f"http://127.0.0.1:{port}/runsync", json={"input": {"prompt": "a lighthouse", **SMALL}}, timeout=30
            ).json()
        finally:
            process.terminate()
            process.wait()
            reader.join()
            assert process.stdout is not None
            process.stdout.close()

    assert answer["status"] == "COMPLETED"
    assert answer["output"]["worker"]["checkpoint"]["file"] == "jib_mix_illustrious_realistic_v2.safetensors"


BUCKET = {
    "BUCKET_ENDPOINT_URL": "http://127.0.0.1:9",  # nothing listens there
    "BUCKET_ACCESS_KEY_ID": "the-key-id",
    "BUCKET_SECRET_ACCESS_KEY": "secret-access-key",
    "BUCKET_NAME": "results",
}

# a setting that boto3 refuses, and the line that the start ends with
UNUSABLE_BUCKETS = [
    (
        {"BUCKET_ENDPOINT_URL": "https://my_bucket.example.com"},
        "BUCKET_ENDPOINT_URL='https://my_bucket.example.com': takes an origin whose host is a name of letters, digits, "
        "`-` and `.`, or an address",
    ),
    (
        {"BUCKET_REGION": "eu-"},
        "BUCKET_REGION='eu-': takes a region such as eu-central-1: letters, digits and `-`, no `-` at either end, and "
        "not digits alone",
    ),
]


@pytest.mark.parametrize("is_on_runpod", [True, False])
@pytest.mark.parametrize(("setting", "line"), UNUSABLE_BUCKETS)
def test_a_bucket_setting_that_can_never_work_ends_the_start_with_one_line(
    tmp_path: Path, setting: dict[str, str], line: str, is_on_runpod: bool
) -> None:
    with world(tmp_path, boot=False) as it, SandboxRunPod(long_poll=0.5) as queue:
        environ = {**Endpoint(it, queue, tmp_path / "worker.log").environ, **BUCKET, **setting}
        if not is_on_runpod:
            environ = {name: value for name, value in environ.items() if not name.startswith("RUNPOD_")}

        done = subprocess.run(
            [sys.executable, "handler.py"], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=30
        )

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == line
    assert "Traceback" not in done.stderr and BUCKET["BUCKET_SECRET_ACCESS_KEY"] not in done.stdout + done.stderr


def test_a_bucket_that_cannot_be_prepared_is_a_warning_and_fails_the_jobs_that_use_it(tmp_path: Path) -> None:
    with endpoint(tmp_path, **BUCKET, AWS_PROFILE="nobody") as it:  # boto3 reads that, and finds no such profile
        failed = it.run(output={"delivery": "bucket"})
        without = it.run()

        assert "the client for the bucket cannot be built (ProfileNotFound)" in it.log()
        assert "Traceback" not in it.log()

    assert failed["error"].startswith("DELIVERY_FAILED: the client for the bucket cannot be built (ProfileNotFound)")
    assert failed["output"]["retryable"] is True
    assert without["status"] == "COMPLETED"


def test_a_bucket_that_cannot_be_reached_keeps_no_worker_from_its_boot(tmp_path: Path) -> None:
    with endpoint(tmp_path, **BUCKET) as it:
        without = it.run()
        failed = it.run(output={"delivery": "bucket"})

    assert without["status"] == "COMPLETED"
    assert failed["error"].startswith("DELIVERY_FAILED: the bucket cannot be reached")

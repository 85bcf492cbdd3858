"""`a1111 deploy` and `a1111 endpoint …`, as a shell runs them, against RunPod's schema and a queue with a worker."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import typer
from typer.testing import CliRunner, Result

from a1111_client.cli import app
from sandbox.runpod import SandboxRunPod
from tests.client.runpod_platform import KEY, RunPodPlatform, worker
from tests.support import ROOT
from tests.test_docs import DOCS, table

HEALTH = {
    "health": {"gpu": {"name": "NVIDIA L4"}, "versions": {"worker": "0.1.0", "webui": "1.10.1"}},
    "worker": {"warnings": []},
}
DEPLOY = ("deploy", "--image", "you/a1111-worker:1")


class Account:
    """An account at RunPod: the management API, and the queue of the first endpoint that is made."""

    def __init__(self, folder: Path) -> None:
        self.queue = SandboxRunPod(long_poll=0.05, endpoint="ep1", client_key=KEY)
        self.platform = RunPodPlatform(f"{self.queue.url}/v2")
        self.environment = {
            "RUNPOD_API_KEY": KEY,
            "RUNPOD_API_BASE_URL": self.platform.url,
            "RUNPOD_ENDPOINT_BASE_URL": f"{self.queue.url}/v2",
            "XDG_CONFIG_HOME": str(folder),
            "COLUMNS": "200",
        }

    def run(self, *words: str, **environment: str) -> Result:
        result = CliRunner().invoke(app, [*words], env={**self.environment, **environment})
        assert KEY not in result.output
        return result

    @contextlib.contextmanager
    def answering(self, answer: dict[str, Any]) -> Iterator[None]:
        """A worker that gives each job this answer."""
        env, over = self.queue.worker_env("w1"), threading.Event()

        def work() -> None:
            with requests.Session() as session:
                session.headers["Authorization"] = env["RUNPOD_AI_API_KEY"]
                while not over.is_set():
                    taken = session.get(env["RUNPOD_WEBHOOK_GET_JOB"].replace("$ID", "w1"))
                    if taken.status_code == 200:
                        done = env["RUNPOD_WEBHOOK_POST_OUTPUT"].replace("$RUNPOD_POD_ID", "w1")
                        session.post(done.replace("$ID", taken.json()["id"]), json=answer)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


@pytest.fixture
def account(tmp_path: Path) -> Iterator[Account]:
    it = Account(tmp_path)
    with it.platform, it.queue:
        yield it
    assert it.platform.invalid == []


def test_deploy_shows_creates_sends_a_health_job_and_says_how_to_use_it(account: Account) -> None:
    with account.answering({"output": HEALTH}):
        result = account.run(
            *DEPLOY,
            "--volume",
            "50",
            "--datacenter",
            "EU-RO-1",
            "--secret",
            "CIVITAI_API_KEY",
            "--workers",
            "0:2",
            "--yes",
        )

    assert result.exit_code == 0, result.output
    assert "at most $2.24 an hour" in result.output and "$3.50 a month" in result.output
    assert "these secrets must be there: CIVITAI_API_KEY: https://console.runpod.io/user/secrets" in result.output
    assert "healthy: NVIDIA L4, worker 0.1.0, WebUI 1.10.1" in result.output
    assert "export RUNPOD_ENDPOINT_ID=ep1" in result.output and "a1111 serve" in result.output
    (made,) = account.platform.endpoints.values()
    assert made["env"]["CIVITAI_API_KEY"] == "{{ RUNPOD_SECRET_CIVITAI_API_KEY }}"
    (job,) = account.queue.jobs.values()
    assert job.status == "COMPLETED"


def test_deploy_creates_nothing_if_it_cannot_be(account: Account) -> None:
    result = account.run(*DEPLOY, "--gpu", "NOPE", "--volume", "50", "--yes")

    assert result.exit_code == 1
    assert "CANNOT_DEPLOY: " in result.output and "no pool NOPE" in result.output and "--datacenter" in result.output
    assert account.platform.changes() == []


@pytest.mark.parametrize(
    "words",
    [
        ("--workers", "3"),
        ("--secret", "CIVITAI_API_KEY=abc-def"),
        ("--env", "CIVITAI_API_KEY=abc-def"),
        ("--env", "JOB_TIMEOUT=soon"),
        ("--volume", "5"),
    ],
)
def test_a_bad_option_is_said_before_runpod_is_asked(account: Account, words: tuple[str, str]) -> None:
    result = account.run(*DEPLOY, *words, "--yes")

    assert result.exit_code == 2
    assert "BAD_OPTION" in result.output and "abc-def" not in result.output
    assert account.platform.asked == []


def test_without_a_terminal_and_without_yes_nothing_is_created(account: Account) -> None:
    result = account.run(*DEPLOY)

    assert result.exit_code == 2 and "use --yes" in result.output
    assert account.platform.changes() == []


@pytest.mark.parametrize("reply", [b"n\n", b"\n"])
def test_on_a_terminal_no_is_the_default(account: Account, reply: bytes) -> None:
    terminal, other = pty.openpty()
    os.write(terminal, reply)
    environ = {"PATH": os.environ["PATH"], **account.environment}
    command = [sys.executable, "-m", "a1111_client", *DEPLOY]

    done = subprocess.run(command, cwd=ROOT, env=environ, stdin=other, capture_output=True, text=True, timeout=60)
    os.close(terminal)
    os.close(other)

    assert done.returncode == 1, done.stderr
    assert "Create it?" in done.stdout + done.stderr
    assert account.platform.changes() == []


def test_a_first_job_that_fails_leaves_the_endpoint_and_says_what_to_look_at(account: Account) -> None:
    with account.answering({"error": "WEBUI_NOT_READY: no GPU found", "output": {"code": "WEBUI_NOT_READY"}}):
        result = account.run(*DEPLOY, "--yes")

    assert result.exit_code == 1
    assert "WEBUI_NOT_READY: the endpoint ep1 is there, and its first job failed" in result.output
    assert "a1111 endpoint logs ep1" in result.output and "a1111 endpoint delete ep1" in result.output
    assert list(account.platform.endpoints) == ["ep1"]


def test_a_wrong_key_is_said_and_not_shown(account: Account) -> None:
    result = account.run("endpoint", "show", RUNPOD_API_KEY="rpa_another-key")

    assert result.exit_code == 1
    assert "ENDPOINT_REFUSED: the API key is not known" in result.output and "another-key" not in result.output


def test_without_a_key_nothing_is_asked(account: Account) -> None:
    result = account.run("endpoint", "show", RUNPOD_API_KEY="")

    assert result.exit_code == 2 and "a1111 login" in result.output
    assert account.platform.asked == []


@pytest.fixture
def deployed(account: Account) -> Account:
    with account.answering({"output": HEALTH}):
        words = ("--volume", "10", "--datacenter", "EU-RO-1", "--env", "MAX_STEPS=50", "--yes")
        assert account.run(*DEPLOY, *words).exit_code == 0
    return account


def test_show_lists_all_and_shows_one_without_secrets(deployed: Account) -> None:
    deployed.platform.endpoints["ep1"]["env"]["CIVITAI_API_KEY"] = "a-raw-key"

    listed, one = deployed.run("endpoint", "show"), deployed.run("endpoint", "show", "ep1")
    as_json = deployed.run("endpoint", "show", "--json", RUNPOD_ENDPOINT_ID="ep1")

    assert listed.output == "ep1  a1111  0:3 workers  ADA_24, AMPERE_24\n"
    assert "MAX_STEPS=50" in one.output and "volumes vol1" in one.output
    assert json.loads(as_json.output)["env"]["MAX_STEPS"] == "50"
    assert "a-raw-key" not in one.output + as_json.output


def test_workers_and_logs_are_shown(deployed: Account) -> None:
    deployed.platform.workers = [worker("w1"), worker("w2", "IDLE", isStale=True)]
    deployed.platform.log_goes_on = False
    deployed.platform.log_lines = {"w1": ["ready for jobs"], "w2": ["one", "two"]}

    workers = deployed.run("endpoint", "workers", "ep1")
    logs = deployed.run("endpoint", "logs", "ep1", "--tail", "1")
    follow = deployed.run("endpoint", "logs", "ep1", "--follow")

    assert workers.output.splitlines() == [
        "w1  RUNNING  NVIDIA L4  EU-RO-1  2 min",
        "w2  IDLE  NVIDIA L4  EU-RO-1  2 min  old release",
        "1 running, 1 idle",
    ]
    assert [line.split("  ")[-1] for line in logs.output.splitlines()] == ["ready for jobs", "two"]
    assert follow.exit_code == 2 and "--worker w1 or w2" in follow.output


def test_an_endpoint_without_workers_has_no_log(deployed: Account) -> None:
    result = deployed.run("endpoint", "logs", "ep1")

    assert result.exit_code == 0 and "no worker runs" in result.output


def test_update_changes_what_is_said_and_what_belongs_to_it(deployed: Account) -> None:
    result = deployed.run("endpoint", "update", "ep1", "--env", "JOBS_IN_FLIGHT=4", "--workers", "1:2", "--yes")
    again = deployed.run("endpoint", "update", "ep1", "--env", "JOBS_IN_FLIGHT=4", "--workers", "1:2", "--yes")

    endpoint = deployed.platform.endpoints["ep1"]
    assert result.exit_code == 0, result.output
    assert endpoint["scaling"] == {"type": "REQUEST_COUNT", "requestCount": 4}
    assert endpoint["workers"] == {"min": 1, "max": 2}
    assert (endpoint["env"]["JOBS_IN_FLIGHT"], endpoint["env"]["MAX_STEPS"]) == ("4", "50")
    assert again.output == "nothing changes\n"


def test_delete_asks_and_keeps_the_volume(deployed: Account) -> None:
    refused = deployed.run("endpoint", "delete", "ep1")
    deleted = deployed.run("endpoint", "delete", "ep1", "--yes")

    assert refused.exit_code == 2 and "use --yes" in refused.output
    assert deleted.exit_code == 0 and "its volume vol1 is kept, and costs money" in deleted.output
    assert deployed.platform.endpoints == {} and list(deployed.platform.volumes) == ["vol1"]


def test_the_page_describes_every_option_of_deploy_with_its_default() -> None:
    rows = table(DOCS / "deploy.md", "An endpoint", "option")
    command = typer.main.get_command(app).commands["deploy"]  # type: ignore[attr-defined] # a group has commands
    options = {param.opts[0]: param.default for param in command.params}

    assert set(rows) == set(options)
    for name, default in options.items():
        if isinstance(default, str) and default:
            assert rows[name][0] == f"`{default}`", name

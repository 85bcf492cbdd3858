"""The commands that use an endpoint, with a scripted worker behind the sandbox's queue."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from a1111_client.batch import left_to_do, read_jobs
from a1111_client.cli import app
from a1111_client.commands import parse_lora
from a1111_client.endpoint import JobState
from a1111_client.terminal import describe
from sandbox.runpod import CANCELLED, SandboxRunPod
from tests.client.scripted import KEY, PNG, ScriptedWorker, Taken, models_answer, picture_answer
from tests.support import ROOT, wait_until


class Shell:
    """A shell whose endpoint is the sandbox's queue."""

    def __init__(self, folder: Path, queue: SandboxRunPod, worker: ScriptedWorker) -> None:
        self.folder = folder
        self.queue = queue
        self.worker = worker
        self.environ = {
            "A1111_URL": f"{queue.url}/v2/{queue.endpoint}",
            "LOCAL_API_KEY": KEY,
            "XDG_DATA_HOME": str(folder / "data"),
            "XDG_CONFIG_HOME": str(folder / "config"),
            "RUNPOD_API_KEY": "rpa_NOT-FOR-THIS",
            "COLUMNS": "200",
        }

    def run(self, *words: object, **more: Any) -> Result:
        return CliRunner().invoke(app, [str(word) for word in words], env=self.environ, **more)

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    with SandboxRunPod(long_poll=0.2, client_key=KEY) as queue:
        worker = ScriptedWorker(queue, lambda taken: picture_answer(taken.given, seeds=[42, 43, None], warnings=["w"]))
        worker.start()
        yield Shell(tmp_path, queue, worker)
        worker.stop()


def test_draw_names_files_by_seed_and_never_writes_over_one(shell: Shell) -> None:
    out = shell.folder / "out"

    first = shell.run("draw", "a lighthouse", "--out", out, "--n", 3, "--sheet")
    second = shell.run("draw", "a lighthouse", "--out", out)

    assert first.exit_code == second.exit_code == 0, first.output
    assert [Path(line).name for line in first.stdout.split()] == ["42.png", "43.png", "grid.png", "sheet.png"]
    assert second.stdout.split() == [str(out / "42-2.png")]
    assert (out / "42.png").read_bytes() == base64.b64decode(PNG)
    assert "a1111: w" in first.stderr


def test_draw_says_no_more_than_it_was_told(shell: Shell) -> None:
    shell.run("draw", "a lighthouse", "--out", shell.folder)
    shell.run(
        *("draw", "a lighthouse", "--out", shell.folder, "--negative", "fog", "--lora", "detail_tweaker_xl:1.2"),
        *("--steps", 20, "--width", 512, "--height", 768, "--cfg", 6.5, "--sampler", "Euler a", "--seed", 7),
        *("--checkpoint", "Garden", "--n", 2, "--field", "tiling=true", "--field", "vae=v.pt"),
    )

    assert shell.worker.inputs == [
        {"prompt": "a lighthouse"},
        {
            "prompt": "a lighthouse",
            "negative_prompt": "fog",
            "loras": [{"name": "detail_tweaker_xl", "scale": 1.2}],
            "steps": 20,
            "width": 512,
            "height": 768,
            "cfg_scale": 6.5,
            "sampler_name": "Euler a",
            "seed": 7,
            "checkpoint": "Garden",
            "n_iter": 2,
            "tiling": True,
            "vae": "v.pt",
        },
    ]


def test_draw_begins_with_a_picture(shell: Shell) -> None:
    photo = shell.file("photo.png", base64.b64decode(PNG))

    done = shell.run("draw", "x", "--init", photo, "--mask", photo, "--strength", 0.4, "--out", shell.folder)

    assert done.exit_code == 0, done.output
    assert shell.worker.inputs == [
        {"prompt": "x", "task": "img2img", "init_images": [PNG], "mask": PNG, "denoising_strength": 0.4}
    ]


def test_draw_tells_programs_what_the_worker_told(shell: Shell) -> None:
    done = shell.run("draw", "x", "--out", shell.folder, "--json", "-")

    told = json.loads(done.stdout)
    assert "images" not in told
    assert (told["worker"]["seeds"][0], told["files"]) == (42, [str(shell.folder / "42.png")])


FAILURES = [
    (False, 1),
    (True, 3),  # a script may try the same again
]


@pytest.mark.parametrize(("retryable", "status"), FAILURES)
def test_a_failure_is_the_code_the_sentence_and_the_hint(shell: Shell, retryable: bool, status: int) -> None:
    failure = {"code": "VOLUME_FULL", "message": "no room", "hint": "make some", "retryable": retryable}
    shell.worker.work = lambda taken: {"error": "x", **failure}

    for_people, for_programs = shell.run("draw", "x"), shell.run("draw", "x", "--json", "-")

    assert for_people.exit_code == for_programs.exit_code == status
    assert for_people.stderr == "a1111: VOLUME_FULL: no room\n  make some\n"
    assert json.loads(for_programs.stdout) == {"error": "VOLUME_FULL: no room", **failure}


WRONG: list[tuple[tuple[str, ...], str]] = [
    (("draw", "x", "--mask", "photo.png"), "--mask needs --init"),
    (("draw", "x", "--init", "nothing.png"), "nothing.png: No such file or directory"),
    (("draw", "x", "--field", "tiling"), "must be NAME=JSON"),
    (("draw", "x", "--out", "/dev/null/pictures"), "--out /dev/null/pictures: Not a directory"),
    (("upscale", __file__), "the bytes are no picture"),
    (("batch", "/"), "/: Is a directory"),
    (("batch", "nothing.jsonl"), "nothing.jsonl: No such file or directory"),
    (("cancel", "a-job", "../run"), "no id of a job: '../run'"),
    (("draw", "x", "--url", "ftp://x"), "--url takes an address"),
    (("draw", "x", "--url", "", "--endpoint", ""), "no endpoint is named"),
    (("draw", "x", "--url", "", "--endpoint", "../x"), "--endpoint takes the id"),
]


@pytest.mark.parametrize(("words", "reason"), WRONG)
def test_wrong_options_end_with_status_2_and_send_nothing(shell: Shell, words: tuple[str, ...], reason: str) -> None:
    done = shell.run(*words)

    assert done.exit_code == 2
    assert reason in done.stderr
    assert shell.queue.jobs == {}


def test_runpods_key_does_not_go_to_an_endpoint_elsewhere(shell: Shell) -> None:
    shell.run("health")

    (asked,) = (asked for asked in shell.queue.asked if asked.path.endswith("/health"))
    assert asked.headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_or_a_closed_terminal_cancels_the_job_on_runpod(tmp_path: Path, number: signal.Signals) -> None:
    with SandboxRunPod(long_poll=0.2, client_key=KEY) as queue:
        shell = Shell(tmp_path, queue, ScriptedWorker(queue))
        process = subprocess.Popen(
            [sys.executable, "-m", "a1111_client", "draw", "a lighthouse"],
            cwd=ROOT,
            env={**os.environ, **shell.environ},
            stderr=subprocess.PIPE,
            text=True,
        )
        job = wait_until(lambda: next(iter(queue.jobs.values()), None), "a job")
        wait_until(lambda: [asked for asked in queue.asked if "/status/" in asked.path], "the first question")
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
        shell.worker.stop()

        assert (process.returncode, job.status) == (130, CANCELLED)
        assert said == f"a1111: job {job.id} is cancelled\na1111: stopped\n"


def test_a_file_that_cannot_be_written_is_said_after_the_pictures_are_saved(shell: Shell) -> None:
    done = shell.run("draw", "x", "--out", shell.folder, "--json", "/dev/null/told.json")

    assert done.exit_code == 1
    assert done.stderr.endswith("a1111: NOT_SAVED: --json /dev/null/told.json: Not a directory\n")
    assert [Path(line).exists() for line in done.stdout.splitlines()] == [True]


def test_a_picture_whose_name_is_no_unicode_is_upscaled_under_its_name(shell: Shell) -> None:
    photo = Path(os.fsdecode(bytes(shell.file("photo.png", base64.b64decode(PNG))).replace(b"photo", b"ph\xffto")))
    (shell.folder / "photo.png").rename(photo)

    done = subprocess.run(
        [sys.executable, "-m", "a1111_client", "upscale", photo, "--out", shell.folder],
        cwd=ROOT,
        env={**os.environ, **shell.environ},
        capture_output=True,
        timeout=60,
    )

    larger = photo.with_name(f"{photo.stem}-x2.png")
    assert (done.stdout, larger.exists()) == (os.fsencode(larger) + b"\n", True), done.stderr


def test_upscale_names_files_after_the_old_ones(shell: Shell) -> None:
    photos = [shell.file(f"{name}.png", base64.b64decode(PNG)) for name in ("a", "b")]
    shell.worker.work = lambda taken: {"images": [PNG, PNG], "html_info": "", "worker": {}}

    done = shell.run("upscale", *photos, "--by", 4, "--out", shell.folder)

    assert [Path(line).name for line in done.stdout.split()] == ["a-x4.png", "b-x4.png"]
    (given,) = shell.worker.inputs
    assert (given["task"], given["upscaling_resize"], given["upscaler_1"]) == ("upscale", 4.0, "R-ESRGAN 4x+")


def test_a_batch_goes_on_where_it_stopped(shell: Shell) -> None:
    jobs = shell.file("jobs.jsonl", '{"prompt": "one"}\n\n{"input": {"prompt": "two"}}\n{"prompt": "three"}\n')

    def work(taken: Taken) -> Any:
        if taken.given["prompt"] == "two" and len(shell.worker.inputs) <= 3:
            return {"error": "x", "code": "WEBUI_LOST", "message": "it died", "retryable": True}
        return picture_answer(taken.given, seeds=[7])

    shell.worker.work = work
    first = shell.run("batch", jobs, "--at-once", 2, "--out", shell.folder / "out")
    second = shell.run("batch", jobs, "--out", shell.folder / "out")
    third = shell.run("batch", jobs, "--out", shell.folder / "out")

    assert (first.exit_code, second.exit_code, third.exit_code) == (1, 0, 0)
    assert first.stdout.startswith("2 of 3 are done") and third.stdout.startswith("3 of 3 are done")
    assert sorted(given["prompt"] for given in shell.worker.inputs) == ["one", "three", "two", "two"]
    results = [json.loads(line) for line in (shell.folder / "jobs.results.jsonl").read_text().splitlines()]
    assert sorted((result["line"], result.get("code", "")) for result in results) == [
        *((1, ""), (3, ""), (3, "WEBUI_LOST"), (4, ""))
    ]
    assert sorted(path.name for path in (shell.folder / "out").iterdir()) == ["7-2.png", "7-3.png", "7.png"]


def test_a_batch_names_every_line_that_is_no_job(shell: Shell) -> None:
    jobs = shell.file("jobs.jsonl", '{"prompt": "one"}\n[]\nnonsense\n')

    done = shell.run("batch", jobs)

    assert (done.exit_code, "line 2, line 3: must be a JSON object" in done.stderr) == (2, True)
    assert shell.queue.jobs == {}


def test_a_batch_takes_what_editors_and_json_write_and_fails_only_the_line_that_cannot_be_sent(shell: Shell) -> None:
    lines = ['\ufeff{"prompt": "one"}', '{"prompt": "two\u2028lines"}\r', '{"prompt": "x", "cfg_scale": NaN}']
    jobs = shell.file("jobs.jsonl", "\n".join(lines))

    done = shell.run("batch", jobs, "--out", shell.folder / "out")

    assert (done.exit_code, done.stdout[:16]) == (1, "2 of 3 are done;")
    assert sorted(given["prompt"] for given in shell.worker.inputs) == ["one", "two\u2028lines"]
    results = [json.loads(line) for line in (shell.folder / "jobs.results.jsonl").read_text().split("\n")[:-1]]
    assert sorted((result["line"], result.get("code", "")) for result in results) == [
        *((1, ""), (2, ""), (3, "INVALID_REQUEST"))
    ]


def test_a_batch_that_is_no_text_is_refused(shell: Shell) -> None:
    done = shell.run("batch", shell.file("jobs.jsonl", b'{"prompt": "\xff"}'))

    assert (done.exit_code, "is not UTF-8" in done.stderr) == (2, True)


def test_the_result_after_a_torn_one_is_not_lost(shell: Shell) -> None:
    jobs = shell.file("jobs.jsonl", '{"prompt": "one"}')
    shell.file("jobs.results.jsonl", '{"line": 1, "job": "3f')

    runs = [shell.run("batch", jobs, "--out", shell.folder / "out") for _ in range(2)]

    assert [done.exit_code for done in runs] == [0, 0]
    assert len(shell.worker.inputs) == 1


def test_two_equal_lines_are_two_jobs_and_a_torn_result_is_none() -> None:
    jobs = read_jobs('{"prompt": "x"}\n{"prompt": "x"}')
    result = json.dumps({"job": jobs[0].key, "files": ["x.png"]})

    assert [job.line for job in left_to_do(jobs, f"{result}\n{result[:20]}")] == [2]


LONG: dict[str, Any] = {
    "name": "Fog [bold] :smile:",
    "version_id": 1,
    "scale": 1.0,
    "file": f"{'long_' * 20}.safetensors",
}


def test_models_asks_once_and_then_shows_what_it_knows(shell: Shell) -> None:
    shell.worker.work = lambda taken: {"models": models_answer(), "worker": {}}

    first, second = shell.run("models"), shell.run("models", "--json")
    shell.worker.work = lambda taken: {"models": models_answer(catalog=[LONG]), "worker": {}}
    shell.environ["COLUMNS"] = "40"
    piped = shell.run("models", "--refresh")

    assert LONG["name"] in piped.stdout and LONG["file"] in piped.stdout  # whole, for grep and cut
    assert "house.safetensors" in first.stdout and "fog_1.safetensors" in first.stdout
    assert json.loads(second.stdout) == models_answer()
    assert [given["task"] for given in shell.worker.inputs] == ["models", "models"]


def test_prefetch_tells_what_was_fetched_and_what_was_not(shell: Shell) -> None:
    entries = [
        {"name": "Detail", "file": "detail.safetensors", "downloaded": True},
        {"name": "nobody", "code": "MODEL_NOT_FOUND", "message": "no such model"},
    ]
    shell.worker.work = lambda taken: {"prefetch": {"loras": entries}, "worker": {}}

    done = shell.run("prefetch", "135867", "https://civitai.com/models/1", "nobody")

    assert done.exit_code == 1
    assert done.stdout == "Detail: detail.safetensors fetched\nnobody: MODEL_NOT_FOUND: no such model\n"
    loras = [{"version_id": 135867}, {"url": "https://civitai.com/models/1"}, {"name": "nobody"}]
    assert shell.worker.inputs == [{"task": "prefetch", "loras": loras}]


def test_health_asks_runpod_and_only_if_told_a_worker(shell: Shell) -> None:
    shell.worker.work = lambda taken: {"health": {"uptime_s": 5}, "worker": {}}

    counted, asked = shell.run("health", "--json"), shell.run("health", "--worker")

    assert "inQueue" in json.loads(counted.stdout)["jobs"]
    assert "uptime_s" in asked.stdout
    assert [given["task"] for given in shell.worker.inputs] == ["health"]


def test_cancel_ends_each_job_that_is_there(tmp_path: Path) -> None:
    with SandboxRunPod(long_poll=0.2, client_key=KEY) as queue:
        shell = Shell(tmp_path, queue, ScriptedWorker(queue))
        job_id = queue.submit({})

        done = shell.run("cancel", "gone", job_id)
        shell.worker.stop()

    assert (done.exit_code, done.stdout) == (1, f"{job_id} CANCELLED\n")
    assert done.stderr.startswith("a1111: gone: JOB_LOST: ")


def test_login_keeps_the_key_for_its_owner_alone_and_does_not_show_it(shell: Shell) -> None:
    done, bad = shell.run("login", input="  rpa_MY-KEY-123\n"), shell.run("login", input="two words\n")

    (file,) = (shell.folder / "config").rglob("runpod-key")
    assert (done.exit_code, bad.exit_code) == (0, 2)
    assert file.read_text() == "rpa_MY-KEY-123\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "rpa_MY-KEY" not in done.output and "two words" not in bad.output


LORAS = [
    ("detail_tweaker_xl", {"name": "detail_tweaker_xl"}),
    ("detail_tweaker_xl:1.2", {"name": "detail_tweaker_xl", "scale": 1.2}),
    ("slider:-2", {"name": "slider", "scale": -2.0}),
    ("135867:0.8", {"version_id": 135867, "scale": 0.8}),
    ("urn:air:sdxl:lora:civitai:122359@135867", {"version_id": 135867}),
    ("civitai:122359@135867", {"version_id": 135867}),
    ("urn:air:sdxl:lora:civitai:122359@135867:0.5", {"version_id": 135867, "scale": 0.5}),
    ("https://civitai.com/models/122359", {"url": "https://civitai.com/models/122359"}),
    (
        "https://civitai.com/models/1?modelVersionId=2:0.5",
        {"url": "https://civitai.com/models/1?modelVersionId=2", "scale": 0.5},
    ),
]


@pytest.mark.parametrize(("text", "entry"), LORAS)
def test_a_lora_is_written_as_people_find_it(text: str, entry: dict[str, Any]) -> None:
    assert parse_lora(text) == entry


@pytest.mark.parametrize(
    ("state", "shown"),
    [
        (JobState("IN_QUEUE"), "a worker is starting"),
        (
            JobState("IN_PROGRESS", {"stage": "models", "detail": "Detail", "mb_per_s": 80.5}),
            "models, Detail, 80.5 MB/s",
        ),
        (JobState("IN_PROGRESS", {"stage": "generate", "detail": "step 2 of 20"}), "generate, step 2 of 20"),
    ],
)
def test_what_a_job_does_is_said_in_a_few_words(state: JobState, shown: str) -> None:
    assert describe(state, "a worker is starting") == shown


def test_a_sheet_shows_all_pictures(shell: Shell) -> None:
    shell.run("draw", "x", "--n", 3, "--sheet", "--out", shell.folder)

    sheet = Image.open(io.BytesIO((shell.folder / "sheet.png").read_bytes()))
    assert sheet.width >= 2 * 64 and sheet.height >= 2 * 64

"""`python model_manager.py …`, as a person, a Dockerfile or a volume's warm-up calls it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import model_manager
from a1111_worker import catalog
from a1111_worker.config import Config
from a1111_worker.context import JobContext
from a1111_worker.domain import ModelKind
from a1111_worker.errors import WorkerError
from sandbox.civitai import REGION_BLOCKED
from sandbox.models import sdxl_lora, sha256_of
from tests.fleet import DETAIL, KEY, Fleet, lora, soon, timings
from tests.support import ROOT

MB = 1_000_000


class Shell(Fleet):
    """A fleet's folder with the command line in front."""

    def environ(self, **more: str) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "MODELS_DIR": str(self.models),
            "MODEL_SOURCES": "",
            "WEBUI_MODELS_DIR": str(self.folder / "shell/webui"),
            "CIVITAI_URL": self.civitai.url,
            "STORAGE_HOSTS": self.civitai.storage.url,
            "CIVITAI_API_KEY": KEY,
            **more,
        }

    def run(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "model_manager.py"), *arguments]
        return subprocess.run(command, env=self.environ(**more), capture_output=True, text=True, timeout=60)

    def run_json(self, *arguments: str, **more: str) -> Any:
        done = self.run(*arguments, "--json", **more)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path)
    with shell:
        yield shell


def test_fetch_prints_what_is_there_now_and_what_is_not(shell: Shell) -> None:
    served = shell.serve(77, name="Snow")

    shell.serve(78)
    shell.civitai.versions[78].usage_control = "Generation"

    done = shell.run(
        "fetch", "https://civitai.com/api/download/models/77?type=Model", "civitai:5@78", "nobody", "ftp://x"
    )

    assert done.returncode == 1
    assert done.stdout.splitlines() == [f"Snow_77.safetensors  0.0 MB  sha256 {sha256_of(served)[:12]}…  fetched"]
    codes = {line.split(": ")[0]: line.split(": ")[1] for line in done.stderr.splitlines()}
    assert list(codes) == ["ftp://x", "civitai:5@78", "nobody"]
    assert (codes["civitai:5@78"], codes["nobody"]) == ("MODEL_ACCESS_DENIED", "MODEL_NOT_FOUND")
    assert "Traceback" not in done.stderr


def test_fetch_again_prints_that_it_was_there(shell: Shell) -> None:
    shell.serve(77, name="Snow")
    first, second = shell.run_json("fetch", "77"), shell.run_json("fetch", "77")

    assert [model["downloaded"] for model in (*first["models"], *second["models"])] == [True, False]
    assert second["failed"] == {}


def test_prefetch_fetches_the_checkpoint_and_the_catalog(shell: Shell) -> None:
    shell.serve_checkpoint(size=3 * MB)
    for known in catalog.LORAS:
        shell.serve(known.version_id)

    document = shell.run_json("prefetch")

    files = [model["file"] for model in document["models"]]
    assert files == [catalog.CHECKPOINT_FILE, *(known.file for known in catalog.LORAS)]
    assert not (shell.folder / "shell/webui").exists()  # a command shows nothing to any WebUI


def test_prefetch_makes_a_folder_of_the_checkpoint_and_named_loras(shell: Shell, tmp_path: Path) -> None:
    shell.serve_checkpoint()
    shell.serve(DETAIL)
    shell.run("fetch", str(DETAIL))  # another folder has it: it does not count
    made = tmp_path / "made"

    done = shell.run(
        *("prefetch", "checkpoint", "detail_tweaker_xl", "--models-dir", str(made)), MODEL_SOURCES=str(shell.models)
    )
    again = shell.run("prefetch", "no such LoRA!", "--models-dir", str(made))

    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in made.rglob("*.safetensors")) == [
        "detail_tweaker_xl.safetensors",
        "jib_mix_illustrious_realistic_v2.safetensors",
    ]
    assert len(list(made.rglob("*.safetensors.json"))) == 2
    assert again.returncode == 1 and "no such LoRA!" in again.stderr


def test_prefetch_prints_what_could_not_be_fetched(shell: Shell) -> None:
    shell.serve(DETAIL)
    shell.run("fetch", str(DETAIL))
    shell.civitai.fail(REGION_BLOCKED, times=None, on="/api/")

    done = shell.run("prefetch")

    assert done.returncode == 1
    assert "detail_tweaker_xl.safetensors" in done.stdout
    assert done.stderr.count("MODEL_ACCESS_DENIED") == len(catalog.LORAS)  # eight of the catalog, and the checkpoint


def test_list_prints_what_is_there_and_how_often_it_was_used(shell: Shell) -> None:
    shell.serve(77, name="Snow")
    shell.put("by hand.safetensors", 1)
    worker = shell.start(checkpoint=None)
    for _ in range(3):
        with worker.hold([lora(77)], JobContext(soon())):
            pass

    with worker.hold([lora(77)], JobContext(soon())):
        rows, text = shell.run_json("list"), shell.run("list").stdout

    by_file = {row["file"]: row for row in rows}
    assert sorted(by_file) == ["Snow_77.safetensors", "by hand.safetensors"]
    assert (by_file["Snow_77.safetensors"]["uses"], by_file["Snow_77.safetensors"]["version_id"]) == (4, 77)
    assert by_file["Snow_77.safetensors"]["keep"] == "in use"
    assert by_file["by hand.safetensors"]["sha256"] is None  # nobody has read it yet
    assert "Snow_77.safetensors  (in use)" in text
    (line,) = (line for line in text.splitlines() if "Snow_77" in line)
    since = text.index("SINCE")
    assert line[since : since + 20] == by_file["Snow_77.safetensors"]["downloaded_at"]
    assert text.splitlines()[-1].startswith("2 models, ")


@pytest.mark.parametrize("read_as", [None, ModelKind.LORA])
def test_a_file_of_a_flat_source_is_listed_once(shell: Shell, read_as: ModelKind | None) -> None:
    sdxl_lora(shell.folder / "flat/style.safetensors", 3)
    if read_as is not None:
        shell.run_json("fetch", "style", MODEL_SOURCES=str(shell.folder / "flat"))

    rows = shell.run_json("list", MODEL_SOURCES=str(shell.folder / "flat"))

    assert [row["file"] for row in rows] == ["style.safetensors"]
    assert read_as is None or rows[0]["kind"] == read_as.value


def test_verify_finds_what_is_damaged_and_repair_fetches_it_again(shell: Shell) -> None:
    served = shell.serve(77, name="Snow")
    shell.serve_checkpoint(size=3 * MB)
    shell.run("prefetch", "checkpoint")
    shell.run("fetch", "77")
    shell.put("good.safetensors", 1)
    (shell.loras / "html.safetensors").write_text("<html>")
    model = shell.loras / "Snow_77.safetensors"
    shell.serve(78, name="Rain")
    shell.run("fetch", "78")
    (shell.loras / "Rain_78.safetensors").write_bytes(b"cut short")
    for path in (model, shell.models / "checkpoints" / catalog.CHECKPOINT_FILE):
        with path.open("r+b") as file:
            file.seek(-5, os.SEEK_END)
            file.write(b"xxxxx")

    found = shell.run("verify")
    repaired = shell.run("verify", "--repair")
    after = shell.run("verify", "--json")

    assert found.returncode == 1
    assert {line.split(":")[0] for line in found.stdout.splitlines()} == {
        f"BAD checkpoint {catalog.CHECKPOINT_FILE}",
        "BAD lora       Snow_77.safetensors",
        "BAD lora       Rain_78.safetensors",
        "ok  lora       good.safetensors",
        "BAD lora       html.safetensors",
    }
    assert repaired.returncode == 1  # one file could not be fetched again
    assert "removed" in repaired.stdout
    assert after.returncode == 0
    assert sorted(result["file"] for result in json.loads(after.stdout)) == sorted(
        [catalog.CHECKPOINT_FILE, "Snow_77.safetensors", "Rain_78.safetensors", "good.safetensors"]
    )
    assert sha256_of(model) == sha256_of(served)


def test_evict_makes_the_cache_small_enough_or_fails(shell: Shell) -> None:
    for number in (1, 2, 3):
        shell.serve(number, size=MB)
    worker = shell.start(checkpoint=None)
    with worker.hold([lora(2), lora(3), lora(1)], JobContext(soon())):
        pass

    with worker.hold([lora(1)], JobContext(soon())):
        cannot = shell.run("evict", "--to-gb", "0")
        can = shell.run_json("evict", "--to-gb", "0.001")

    assert cannot.returncode == 1
    assert "VOLUME_FULL" in cannot.stderr
    assert sorted(gone["file"] for gone in can) == ["Model-2_2.safetensors", "Model-3_3.safetensors"]
    assert shell.models_there() == ["Model-1_1.safetensors"]


def test_evict_never_removes_the_checkpoint_though_nobody_uses_it(shell: Shell) -> None:
    shell.serve_checkpoint()
    shell.serve(1)
    shell.run("prefetch", "checkpoint")
    shell.run("fetch", "1")

    cannot = shell.run("evict", "--to-gb", "0.001")
    can = shell.run_json("evict", "--to-gb", "0.003")

    assert (cannot.returncode, "VOLUME_FULL" in cannot.stderr) == (1, True)
    assert [row["kind"] for row in can] == ["lora"]
    assert (shell.models / "checkpoints" / catalog.CHECKPOINT_FILE).exists()


def test_remove_removes_a_model_unless_it_is_in_use_or_not_there(shell: Shell) -> None:
    shell.serve(1)
    shell.put("mine.safetensors", 1)
    worker = shell.start(checkpoint=None)

    with worker.hold([lora(1)], JobContext(soon())):
        removed = shell.run("remove", "mine")
        in_use = shell.run("remove", "Model-1_1.safetensors")
        unknown = shell.run("remove", "../loras/mine")

    assert (removed.returncode, removed.stdout) == (0, "removed lora mine.safetensors\n")
    assert (in_use.returncode, "in use" in in_use.stderr) == (1, True)
    assert (unknown.returncode, "there is no" in unknown.stderr) == (1, True)
    assert shell.models_there() == ["Model-1_1.safetensors"]


def test_remove_removes_what_it_can_and_prints_what_it_cannot(shell: Shell) -> None:
    shell.put("a.safetensors", 1)
    shell.put("b.safetensors", 2)

    done = shell.run("remove", "a", "nobody", "b", "--json")

    assert done.returncode == 1
    assert [row["file"] for row in json.loads(done.stdout)] == ["a.safetensors", "b.safetensors"]
    assert "there is no nobody.safetensors" in done.stderr
    assert shell.models_there() == []


HOLDER = """
import sys, threading
from pathlib import Path
from a1111_worker.context import JobContext
from tests.fleet import lora, manager, soon

with manager(Path(sys.argv[1]), *sys.argv[2:], name="holder", checkpoint=None) as worker:
    with worker.hold([lora(1)], JobContext(soon())):
        print("held", flush=True)
        threading.Event().wait()
"""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["remove", "Model-1_1"], "removed lora Model-1_1.safetensors"),
        (["evict", "--to-gb", "0"], "removed lora Model-1_1.safetensors"),
        (["verify", "--repair"], "Model-1_1.safetensors: damaged"),
    ],
    ids=["remove", "evict", "repair"],
)
@pytest.mark.parametrize("lives", [True, False], ids=["by a living worker", "by a dead one"])
def test_a_model_stays_in_use_as_long_as_its_user_lives(
    shell: Shell, arguments: list[str], says: str, lives: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    served = shell.serve(1)
    model = shell.loras / "Model-1_1.safetensors"
    command = [sys.executable, "-c", HOLDER, str(shell.folder), shell.civitai.url, shell.civitai.storage.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        if not lives:
            holder.kill()
            holder.wait()
        with model.open("r+b") as file:
            file.truncate(1000)
        options = model_manager._parser().parse_args(arguments)
        # As a command has it, but for the minute after which silence is death.
        manager = shell.start(checkpoint=None, timings=timings(heartbeat=10.0, stale_after=60.0 if lives else 1.0))

        try:
            status = model_manager._Command(manager, Config.from_env({}), options, soon()).run()
        except WorkerError:
            status = 1
        holder.kill()

    assert status == (1 if lives else 0)
    assert (model.exists() and model.stat().st_size == 1000) is lives
    if not lives:
        assert says in capsys.readouterr().out
        assert not model.exists() or sha256_of(model) == sha256_of(served)


def test_paths_prints_where_everything_lies(shell: Shell) -> None:
    document = shell.run_json("paths")

    assert document["models_dir"] == str(shell.models)
    kinds = [kind.folder for kind in ModelKind]
    assert document["written_to"] == {kind: str(shell.models / kind) for kind in kinds}
    assert document["free"] > 0


def test_a_stopped_command_prints_so_and_the_next_one_goes_on(shell: Shell) -> None:
    shell.serve(77, size=4 * MB)
    shell.civitai.storage.rate = 2 * MB
    command = [sys.executable, str(ROOT / "model_manager.py"), "fetch", "77"]
    with subprocess.Popen(command, env=shell.environ(), stderr=subprocess.PIPE, text=True) as process:
        shell.civitai.storage.at(2 * MB, lambda: process.send_signal(signal.SIGINT))
        _, errors = process.communicate(timeout=30)
    sent = shell.civitai.storage.bytes_sent
    shell.civitai.storage.rate = None

    again = shell.run("fetch", "77")

    assert process.returncode == 130
    assert errors == "stopped; what has arrived stays, and the next run goes on with it\n"
    assert again.returncode == 0
    assert shell.civitai.storage.bytes_sent - sent < 3 * MB
    assert shell.debris() == []


@pytest.mark.parametrize(
    ("arguments", "settings", "status", "says"),
    [
        (["--help"], {}, 0, "A REFERENCE is a CivitAI URL"),
        (["fetch", "--help"], {}, 0, "--kind"),
        ([], {}, 2, "COMMAND"),
        (["fetch", "1" * 5000], {}, 1, "11111"),
        (["evict", "--to-gb", "many"], {}, 2, "--to-gb"),
        (["list"], {"MODEL_CACHE_LIMIT_GB": "lots"}, 1, "MODEL_CACHE_LIMIT_GB='lots'"),
        (["list"], {"MODEL_HOSTS": "https://host:99999"}, 1, "MODEL_HOSTS='https://host:99999'"),
        (["list"], {"CIVITAI_URL": "http://10.0.0.5:8080"}, 1, "CIVITAI_URL='http://10.0.0.5:8080'"),
        (["list"], {"CHECKPOINT_URL": "http://10.0.0.1/x", "CHECKPOINT_FILE": "x.safetensors"}, 1, "CHECKPOINT_URL"),
    ],
    ids=[
        "help",
        "help of one",
        "nothing",
        "endless",
        "no number",
        "bad setting",
        "bad host",
        "bad API",
        "bad checkpoint",
    ],
)
def test_a_first_command_is_understood_or_explained(
    shell: Shell, arguments: list[str], settings: dict[str, str], status: int, says: str
) -> None:
    done = shell.run(*arguments, **settings)

    assert done.returncode == status
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr

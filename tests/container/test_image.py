"""The image's files compared with one another and with the code: they must agree."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import a1111_worker
from a1111_worker import catalog
from a1111_worker.config import SETTINGS, Config, default_models_dir
from a1111_worker.context import Deadline, JobContext
from a1111_worker.domain import ModelKind
from a1111_worker.models.sidecars import ModelRecord
from a1111_worker.request.fields import Limits
from image import pins
from model_manager import open_manager
from sandbox.models import sdxl_checkpoint
from tests.image.make_mirror import REPOSITORIES
from tests.support import ROOT, parse_generation

NAMES = {setting.name for setting in SETTINGS}


class Dockerfile:
    """A Dockerfile's instructions, as far as the tests ask for them."""

    def __init__(self, path: Path) -> None:
        self.text = path.read_text(encoding="utf-8")
        lines = re.sub(r"\\\n\s*", " ", re.sub(r"(?m)^\s*#.*\n", "", self.text)).splitlines()
        self.instructions = [line.split(maxsplit=1) for line in lines if re.match(r"[A-Z]+ ", line)]
        self.args: dict[str, set[str]] = {}
        for name, _, default in (given.partition("=") for given in self.all("ARG")):
            self.args.setdefault(name, set()).add(default)
        final = lines[max(i for i, line in enumerate(lines) if line.startswith("FROM ")) :]
        self.environment = {
            name: value.strip('"')
            for line in final
            if line.startswith("ENV ")
            for name, value in re.findall(r"(\w+)=(\"[^\"]*\"|\S*)", line[4:])
        }
        self.stages = [given.split(" AS ")[1] for given in self.all("FROM")]

    def all(self, instruction: str) -> list[str]:
        return [given for word, given in self.instructions if word == instruction]

    def arg(self, name: str) -> str:
        (default,) = self.args[name]
        return default


DOCKERFILE = Dockerfile(ROOT / "Dockerfile")
PINS_OF_FILES = pins.read_pins(pins.PINS.read_text(encoding="utf-8"))


def yaml_of(path: str) -> Any:
    return importlib.import_module("yaml").safe_load((ROOT / path).read_text(encoding="utf-8"))


def json_of(path: str) -> Any:
    return json.loads((ROOT / path).read_bytes())


def start_sh_settings(**environment: str) -> dict[str, str]:
    """The settings of start.sh in an environment, after `set_defaults`."""
    variables = r"""declare -p | sed -nE 's/^declare -[-rx]+ (\w+)="(.*)"$/\1=\2/p'"""
    done = subprocess.run(
        ["bash", "-c", f"source {ROOT / 'start.sh'}; set_defaults; {variables}"],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


# The Dockerfile

PINS = {
    "BASE_IMAGE": "ubuntu:22.04",
    "PYTHON": "python3.10",
    "WEBUI_COMMIT": "82a973c04367123ae98bd9abdf80d9eda9b910e2",  # v1.10.1
    "STABLE_DIFFUSION_REPO": "https://github.com/w-e-w/stablediffusion.git",  # Stability-AI's is gone
    "WEBUI_LOCK": "cu128",
    "TORCH_INDEX_URL": "https://download.pytorch.org/whl/cu128",
    "BAKE_CHECKPOINT": "0",
    "BAKE_TOKENIZER": "1",
    "BAKE_UPSCALERS": "1",
    "EXTENSIONS": "",
    "CONTROLNET_ANNOTATORS": "",
    "SMOKE_TEST": "1",
    "VERSION": a1111_worker.__version__,
}


@pytest.mark.parametrize(("name", "default"), PINS.items())
def test_the_pinned_versions_are_those_that_are_known_to_work(name: str, default: str) -> None:
    assert DOCKERFILE.arg(name) == default


def test_an_argument_that_several_stages_take_has_one_default() -> None:
    assert {name: defaults for name, defaults in DOCKERFILE.args.items() if len(defaults) > 1} == {}


def test_every_repository_is_pinned_to_a_whole_commit() -> None:
    repositories = [name.removesuffix("_REPO") for name in DOCKERFILE.args if name.endswith("_REPO")]

    commits = {name: DOCKERFILE.arg(f"{name}_COMMIT") for name in repositories}

    assert len(commits) == 8
    assert all(re.fullmatch(r"[0-9a-f]{40}", commit) for commit in commits.values())
    assert re.search(r"@[0-9a-f]{40}$", DOCKERFILE.arg("CLIP_PACKAGE"))


def test_every_address_is_a_build_argument() -> None:
    arguments = {default for defaults in DOCKERFILE.args.values() for default in defaults}

    code = "\n".join(line for line in DOCKERFILE.text.splitlines() if not line.lstrip().startswith("#"))
    addresses = set(re.findall(r"(?:git\+)?https?://[^\s\"']+", code))

    assert addresses <= arguments
    assert not re.search(r"(?im)^#\s*syntax\s*=", DOCKERFILE.text)  # it would have to be downloaded
    assert [
        given for given in DOCKERFILE.all("FROM") if given.split()[0] not in ("${BASE_IMAGE}", *DOCKERFILE.stages)
    ] == []


def test_every_repository_has_a_stand_in_for_the_build_without_github() -> None:
    addresses = [DOCKERFILE.arg(name) for name in DOCKERFILE.args if name.endswith(("_REPO", "CLIP_PACKAGE"))]

    names = {re.sub(r"^.*github\.com/|\.git(@.*)?$", "", address) for address in addresses}

    assert names == set(REPOSITORIES)


def test_only_the_worker_is_copied_into_the_image() -> None:
    copied = [given.split()[:-1] for given in DOCKERFILE.all("COPY") if "--from=" not in given]
    sources = {source for words in copied for source in words if not source.startswith("--")}
    sources = {source.replace("${WEBUI_LOCK}", DOCKERFILE.arg("WEBUI_LOCK")) for source in sources}

    assert {source for source in sources if not source.startswith(("image/", "locks/"))} == {
        *("a1111_worker", "handler.py", "local_queue", "model_manager.py", "start.sh")
    }
    assert all((ROOT / source).exists() for source in sources)
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"}
    assert sent == {source.split("/")[0] for source in sources}
    assert (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()[1] == "*"


def test_the_image_contains_no_secret() -> None:
    secrets = {setting.name for setting in SETTINGS if setting.secret}

    named = {*DOCKERFILE.args, *DOCKERFILE.environment}

    assert not secrets & named
    assert {name for name in named if re.search("KEY|SECRET|PASSWORD|CREDENTIAL", name)} == set()
    assert "--mount=type=secret,id=civitai_api_key" in DOCKERFILE.text


def test_the_image_sets_only_variables_that_are_read() -> None:
    platform = {"NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "PYTHONUNBUFFERED"}
    sdk = {"RUNPOD_DEBUG_LEVEL", "RUNPOD_MIN_DISK_PERCENT"}
    start_sh = {"WEBUI_DIR", "WEBUI_PYTHON", "WORKER_DIR", "WORKER_PYTHON"}

    assert set(DOCKERFILE.environment) <= NAMES | platform | sdk | start_sh


def test_the_sdk_logs_no_prompts_and_survives_its_import() -> None:
    assert DOCKERFILE.environment["RUNPOD_DEBUG_LEVEL"] == "INFO"  # WARNING would crash it, DEBUG logs results


def test_the_tokenizer_is_read_only_from_the_image() -> None:
    start_sh = (ROOT / "start.sh").read_text(encoding="utf-8")
    (home,) = re.findall(r"\{WEBUI_HF_HOME:-(.*)\}", start_sh)

    assert f"mkdir -p {home}" in DOCKERFILE.text
    assert "HF_HUB_OFFLINE=1" in start_sh
    assert not {name for name in DOCKERFILE.environment if name.startswith("HF_")}  # the worker has a client of its own


def test_the_defaults_of_the_image_are_a_valid_configuration() -> None:
    config = Config.from_env(DOCKERFILE.environment)

    assert config.checkpoint_file == catalog.CHECKPOINT_FILE


def test_a_baked_checkpoint_leaves_nothing_in_the_environment_that_a_start_could_fail_on() -> None:
    """A URL of another host needs MODEL_HOSTS too. start.sh reads `baked-checkpoint` instead."""
    assert {name for name in DOCKERFILE.environment if name.startswith(("CHECKPOINT_", "MODEL_HOSTS"))} == set()


def test_what_the_build_writes_beside_a_baked_checkpoint_makes_it_the_workers_own(tmp_path: Path) -> None:
    url = "https://models.example.com/files/other.safetensors"
    build = {"CHECKPOINT_URL": url, "CHECKPOINT_FILE": "other.safetensors", "CHECKPOINT_NAME": "An Other = 1"}
    checkpoint = sdxl_checkpoint(tmp_path / "models" / "checkpoints" / "other.safetensors", 1, 3_000_000)
    sha256 = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    # As of a download from CivitAI: its version is not that of the default checkpoint.
    known = ModelRecord(
        ModelKind.CHECKPOINT, "Other", checkpoint.name, sha256, checkpoint.stat().st_size, version_id=4711
    )
    checkpoint.with_name("other.safetensors.json").write_bytes(known.to_json())
    arguments = [sys.executable, str(ROOT / "image" / "baked.py"), str(checkpoint.parent)]

    written = subprocess.run(
        arguments,
        env={**build, "MODEL_HOSTS": "models.example.com", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (tmp_path / "models" / "baked-checkpoint").write_text(written, encoding="utf-8")
    run_time = {"MODEL_SOURCES": str(tmp_path / "models"), "MODELS_DIR": str(tmp_path / "volume")}
    config = Config.from_env(start_sh_settings(**run_time, WEBUI_MODELS_DIR=str(tmp_path / "shown")))
    with open_manager(config) as manager:
        model = manager.prepare_checkpoint(JobContext(Deadline(10.0)))

    assert (model.name, model.sha256, model.downloaded) == (build["CHECKPOINT_NAME"], sha256, False)


def test_the_container_starts_with_start_sh_and_stops_by_term() -> None:
    (entrypoint,) = DOCKERFILE.all("ENTRYPOINT")

    assert json.loads(entrypoint) == [f"{DOCKERFILE.environment['WORKER_DIR']}/start.sh"]
    assert os.access(ROOT / "start.sh", os.X_OK)
    assert DOCKERFILE.all("STOPSIGNAL") == ["SIGTERM"]
    assert DOCKERFILE.all("EXPOSE") == ["8000"]  # the SDK's API; never the WebUI's


def test_the_worker_and_the_webui_are_where_start_sh_looks() -> None:
    names = ("WEBUI_DIR", "WEBUI_PYTHON", "WORKER_DIR", "WORKER_PYTHON", "WEBUI_STATE_FILE")

    defaults = start_sh_settings()

    assert {name: defaults[name] for name in names} == {name: DOCKERFILE.environment[name] for name in names}


# start.sh and the worker


def test_start_sh_and_the_worker_have_the_same_defaults() -> None:
    config = Config.from_env({})

    defaults = start_sh_settings()

    assert defaults["WEBUI_URL"] == config.webui_url
    assert defaults["WEBUI_MODELS_DIR"] == str(config.webui_models_dir)
    assert defaults["CHECKPOINT_FILE"] == config.checkpoint_file
    assert defaults["MODEL_SOURCES"] == ":".join(map(str, config.model_sources))
    assert float(defaults["SHUTDOWN_GRACE"]) == config.shutdown_grace
    assert defaults["MODELS_DIR"] == str(Path(defaults["WORKER_DIR"]) / default_models_dir(Path("/")))


def test_an_empty_list_of_sources_means_none_to_start_sh_and_to_the_worker() -> None:
    assert start_sh_settings(MODEL_SOURCES="")["MODEL_SOURCES"] == ""
    assert Config.from_env({"MODEL_SOURCES": ""}).model_sources == ()


def test_what_only_start_sh_reads_is_among_the_settings() -> None:
    text = (ROOT / "start.sh").read_text(encoding="utf-8")

    for setting in SETTINGS:
        if setting.reader == "start.sh":
            assert setting.name in text


def test_worker_and_webui_end_before_docker_kills_them() -> None:
    docker_stop = 10

    assert float(start_sh_settings()["SHUTDOWN_GRACE"]) + float(start_sh_settings()["WEBUI_GRACE"]) < docker_stop


# The health check

HEALTH: list[tuple[str | None, str | None, int, str]] = [
    # the worker's state file, start.sh's, status, a part of its output
    ('{"state": "ready", "heartbeat": NOW, "webui": "up"}', "123", 0, "ready"),
    ('{"state": "ready", "heartbeat": NOW, "webui": "down"}', "123", 0, "ready"),  # being restarted
    ('{"state": "ready", "heartbeat": NOW, "webui": "up"}', None, 0, "ready"),  # somebody else's WebUI
    ('{"state": "booting", "heartbeat": NOW, "webui": "down"}', "123", 1, "booting"),
    ('{"state": "broken", "heartbeat": NOW, "webui": "down"}', "123", 1, "broken"),
    ('{"state": "ready", "heartbeat": NOW, "webui": "down"}', "failed: it ended", 1, "given up"),
    ('{"state": "ready", "heartbeat": NOW, "webui": "up", "ping": "up"}', "123", 0, "ready"),
    ('{"state": "ready", "heartbeat": NOW, "webui": "up", "ping": "none"}', "123", 0, "ready"),  # off RunPod
    ('{"state": "ready", "heartbeat": NOW, "webui": "up", "ping": "down"}', "123", 1, "ping process has ended"),
    ('{"state": "ready", "heartbeat": 1, "webui": "up"}', "123", 1, "last heartbeat"),
    (None, "123", 1, "cannot be read"),  # not started yet
    ('{"state": "rea', "123", 1, "cannot be read"),
    ("[]", "123", 1, "cannot be read"),
    ('{"state": "ready"}', "123", 1, "cannot be read"),
    ("\udcff", "123", 1, "cannot be read"),
]


@pytest.mark.parametrize(("worker", "webui", "status", "printed"), HEALTH)
def test_the_health_check_is_red_when_no_job_can_be_taken(
    tmp_path: Path, worker: str | None, webui: str | None, status: int, printed: str
) -> None:
    environment = {"WORKER_STATE_FILE": str(tmp_path / "worker"), "WEBUI_STATE_FILE": str(tmp_path / "webui")}
    if worker is not None:
        text = worker.replace("NOW", str(time.time()))
        (tmp_path / "worker").write_text(text, encoding="utf-8", errors="surrogateescape")
    if webui is not None:
        (tmp_path / "webui").write_text(f"{webui}\n", encoding="utf-8")

    done = subprocess.run(
        [sys.executable, "-IS", ROOT / "image" / "healthcheck.py"], env=environment, capture_output=True, text=True
    )

    assert done.returncode == status
    assert printed in done.stdout
    assert done.stderr == ""


def test_the_health_check_runs_what_was_copied() -> None:
    (check,) = DOCKERFILE.all("HEALTHCHECK")

    command = json.loads(check[check.index("[") :])

    assert command[0] == DOCKERFILE.environment["WORKER_PYTHON"]
    assert command[-1] == f"{DOCKERFILE.environment['WORKER_DIR']}/healthcheck.py"
    assert "image/healthcheck.py" in DOCKERFILE.text
    assert {"WORKER_STATE_FILE", "WEBUI_STATE_FILE"} <= set(DOCKERFILE.environment)


def test_the_smoke_test_of_the_worker_passes_here() -> None:
    done = subprocess.run([sys.executable, ROOT / "image" / "smoke.py", "worker", ROOT], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"runpod \S+\n", done.stdout)


def test_the_smoke_test_fails_if_a_module_is_missing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "image" / "smoke.py", "worker", tmp_path], capture_output=True, text=True
    )

    assert done.returncode != 0


LAUNCH = """\
import http.server, sys

class API(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        scripts = b'{"txt2img": ["Refiner", "ControlNet"]}'
        answers = {"/sdapi/v1/options": b'{"sd_model_checkpoint": null}', "/sdapi/v1/scripts": scripts}
        self.send_response(200 if self.path in answers else 404)
        self.end_headers()
        self.wfile.write(answers[self.path])

if "--use-cpu" in sys.argv:
    port = int(sys.argv[sys.argv.index("--port") + 1])
    http.server.HTTPServer(("127.0.0.1", port), API).serve_forever()
"""


class WebUIEnvironment:
    """A folder that has for the smoke test what A1111's has, and the installed packages of its environment."""

    def __init__(self, folder: Path) -> None:
        self.app = folder / "app"
        self.site = folder / "site"
        for helper in ("ldm", "sgm", "k_diffusion", "modules"):
            self.write(self.app / helper / "__init__.py", "")
        self.write(
            self.app / "modules/cache.py",
            "class Cache(dict):\n    def close(self): pass\n\none = Cache()\n\ndef cache(name): return one\n",
        )
        self.write(self.app / "requirements_versions.txt", "a-package==1.0.0  # a comment\n")
        self.write(self.app / "launch.py", LAUNCH)
        for name in ("torchvision", "xformers", "clip"):
            self.install(name, f"{name}/__init__.py")

    def install(self, name: str, *files: str, listed: str | None = None, text: str = "") -> None:
        """Install a package as an installer does. `listed` is its own list of modules: not every wheel has one."""
        info = f"{name.replace('-', '_')}-1.0.dist-info"
        self.write(self.site / info / "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        if listed is not None:
            self.write(self.site / info / "top_level.txt", listed)
        for file in files:
            self.write(self.site / file, text)
        self.write(self.site / info / "RECORD", "".join(f"{file},,\n" for file in (*files, f"{info}/METADATA")))

    def smoke(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, ROOT / "image" / "smoke.py", "webui", ROOT / "start.sh", self.app.parent / "locks"],
            cwd=self.app,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(self.site), **environment},
            capture_output=True,
            text=True,
        )

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


# a package's files, and its own list of modules
WHEELS: list[tuple[tuple[str, ...], str | None]] = [
    (("a_module/__init__.py", "a_module/part.py"), "a_module\n"),
    (("a_module/__init__.py", "a_module/part.py"), None),  # fastapi, gradio, httpx, numpy, safetensors
    (("a_module.py",), None),
    (("../../bin/a-script.py", "a_module.py"), None),
]


@pytest.mark.parametrize(("files", "listed"), WHEELS)
def test_the_smoke_test_imports_the_modules_of_a_requirement(
    tmp_path: Path, files: tuple[str, ...], listed: str | None
) -> None:
    environment = WebUIEnvironment(tmp_path / "webui")

    environment.install("a-package", *files, listed=listed)
    good = environment.smoke()
    environment.install("a-package", *files, listed=listed, text="raise ImportError('broken')\n")
    bad = environment.smoke()

    assert good.returncode == 0, good.stderr
    assert good.stdout.splitlines() == ["a-package 1.0", "torchvision 1.0", "xformers 1.0", "clip 1.0"]
    assert bad.returncode != 0 and "ImportError: broken" in bad.stderr


def test_the_smoke_test_fails_if_a_requirement_has_another_version(tmp_path: Path) -> None:
    environment = WebUIEnvironment(tmp_path)
    environment.install("a-package", "a_module.py")
    environment.write(environment.app / "requirements_versions.txt", "a-package==1.0.1\n")

    done = environment.smoke()

    assert done.returncode == 1
    assert "a-package is 1.0, not 1.0.1" in done.stderr


# launch.py, whether the build goes on
LAUNCHES = [
    (LAUNCH, True),
    ("raise ImportError('broken')\n", False),  # every import of the packages worked
    (LAUNCH.replace("200 if", "500 if"), False),
]


@pytest.mark.parametrize(("launch", "passes"), LAUNCHES)
def test_the_smoke_test_starts_the_webui_and_asks_for_its_options(tmp_path: Path, launch: str, passes: bool) -> None:
    environment = WebUIEnvironment(tmp_path)
    environment.install("a-package", "a_module.py")
    environment.write(environment.app / "launch.py", launch)

    done = environment.smoke()

    assert (done.returncode == 0) is passes, done.stderr
    assert ("launch.py answers after" in done.stderr) is passes  # not in the report, which is a layer: no times in it
    assert ("launch.py does not answer" in done.stderr) is not passes


# which extensions, the version of a package that replaces A1111's, a part of the complaint
EXTENDED = [
    ("controlnet", "1.0", None),
    ("controlnet", "2.0", "a-package is 1.0, not 2.0"),
    ("controlnet adetailer", "1.0", "adetailer could not be loaded"),
]


@pytest.mark.parametrize(("extensions", "version", "complaint"), EXTENDED)
def test_the_smoke_test_checks_what_extensions_need_and_that_they_are_loaded(
    tmp_path: Path, extensions: str, version: str, complaint: str | None
) -> None:
    environment = WebUIEnvironment(tmp_path / "webui")
    environment.install("a-package", "a_module.py")
    environment.write(environment.app / "requirements_versions.txt", "a-package==0.9\n")
    environment.write(
        environment.app.parent / "locks/controlnet.txt", f"a-package=={version} \\\n    --hash=sha256:0\n"
    )
    environment.write(environment.app.parent / "locks/adetailer.txt", "")

    alone = environment.smoke()
    done = environment.smoke(EXTENSIONS=extensions)

    assert "a-package is 1.0, not 0.9" in alone.stderr
    assert (done.returncode == 0) is (complaint is None), done.stderr
    assert complaint is None or complaint in done.stderr


def test_the_smoke_test_fails_if_a_requirement_has_no_modules(tmp_path: Path) -> None:
    environment = WebUIEnvironment(tmp_path)
    environment.install("a-package")

    done = environment.smoke()

    assert done.returncode == 1
    assert "a-package has no module" in done.stderr


# RunPod's Hub

POOLS: Mapping[str, tuple[float, int]] = {
    # compute capability, GB
    "AMPERE_16": (8.6, 16),
    "AMPERE_24": (8.6, 24),
    "AMPERE_48": (8.6, 48),
    "AMPERE_80": (8.0, 80),
    "ADA_24": (8.9, 24),
    "ADA_48_PRO": (8.9, 48),
    "ADA_80_PRO": (9.0, 80),
    "HOPPER_141": (9.0, 141),
}
CU128_RUNS_ON = (7.5, 12.0)  # sm_75 to sm_120
SDXL_NEEDS = 16  # GB of VRAM, with hires and a batch


def test_the_hub_gets_every_field_that_it_requires() -> None:
    hub = json_of(".runpod/hub.json")

    assert hub["type"] == "serverless"
    assert hub["category"] in {"audio", "embedding", "language", "video", "image"}
    assert {"title", "description"} <= set(hub)
    assert {"runsOn", "containerDiskInGb", "gpuCount", "gpuIds", "allowedCudaVersions", "env"} <= set(hub["config"])
    assert (hub["config"]["runsOn"], hub["config"]["gpuCount"]) == ("GPU", 1)
    for name in ("handler.py", "Dockerfile", "README.md"):
        assert (ROOT / name).exists()


def test_the_hubs_gpus_run_the_torch_that_is_pinned() -> None:
    for pool in json_of(".runpod/hub.json")["config"]["gpuIds"].split(","):
        capability, gigabytes = POOLS[pool]
        assert CU128_RUNS_ON[0] <= capability <= CU128_RUNS_ON[1]
        assert gigabytes >= SDXL_NEEDS


@pytest.mark.parametrize("path", [".runpod/hub.json", ".runpod/tests.json"])
def test_the_hosts_drivers_are_new_enough_for_the_torch_that_is_pinned(path: str) -> None:
    cuda = re.search(r"cu(\d+)(\d)$", DOCKERFILE.arg("TORCH_INDEX_URL"))

    allowed = [tuple(map(int, version.split("."))) for version in json_of(path)["config"]["allowedCudaVersions"]]

    assert cuda is not None and min(allowed) == (int(cuda[1]), int(cuda[2]))


def test_the_hubs_settings_exist_and_their_defaults_are_valid() -> None:
    items = json_of(".runpod/hub.json")["config"]["env"]

    environment = {}
    for item in items:
        asked = item["input"]
        assert item["key"] in NAMES
        assert asked["type"] in {"string", "number", "boolean", "huggingface"}
        assert asked["name"]
        assert asked["description"]
        assert asked.get("required") or "default" in asked
        default = asked.get("default", "")
        environment[item["key"]] = (
            asked["trueValue" if default else "falseValue"] if asked["type"] == "boolean" else str(default)
        )
        for option in asked.get("options", []):
            Config.from_env({item["key"]: option["value"]})
    assert Config.from_env(environment) == Config.from_env({})


def test_the_hubs_tests_pass_our_own_parser() -> None:
    tests = json_of(".runpod/tests.json")
    environment = {item["key"]: item["value"] for item in tests["config"]["env"]}

    config = Config.from_env(environment)

    assert set(environment) <= NAMES | {"RUNPOD_INIT_TIMEOUT"}
    assert "CIVITAI_API_KEY" not in environment  # a repository keeps no key: the tests' checkpoint needs none
    assert len({test["name"] for test in tests["tests"]}) == len(tests["tests"]) > 0
    for test in tests["tests"]:
        request = parse_generation(test["input"], Limits(config.max_steps, config.max_pixels, config.max_images))
        assert request.loras == ()
    assert tests["tests"][0]["timeout"] >= config.boot_timeout * 1000  # the first one waits for the boot


# docker-compose.yml and the workflows


def test_compose_has_a_profile_with_a_gpu_and_one_without() -> None:
    services = yaml_of("docker-compose.yml")["services"]

    profiles = {profile: name for name, service in services.items() for profile in service["profiles"]}

    assert profiles == {"gpu": "worker", "sandbox": "sandbox"}
    assert "command" not in services["worker"]  # then start.sh puts a queue in front of the worker
    (device,) = services["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert services["sandbox"]["build"]["target"] in DOCKERFILE.stages
    assert set(services["sandbox"]["build"]["args"]) <= set(DOCKERFILE.args)
    assert set(services["worker"]["environment"]) <= NAMES


def test_compose_opens_the_endpoint_only_on_this_machine_and_for_callers_with_the_key() -> None:
    services = yaml_of("docker-compose.yml")["services"]

    for service in services.values():
        assert service["ports"] == [f"127.0.0.1:8000:{DOCKERFILE.all('EXPOSE')[0]}"]
        assert service["environment"]["LOCAL_API_KEY"]
    assert services["worker"]["environment"]["LOCAL_API_HOST"] == "0.0.0.0"
    sandbox = json.loads(next(given for given in DOCKERFILE.all("CMD") if "sandbox" in given))
    assert sandbox[sandbox.index("--host") + 1] == "0.0.0.0"


def test_compose_waits_longer_than_start_sh() -> None:
    grace = yaml_of("docker-compose.yml")["services"]["worker"]["stop_grace_period"]

    assert float(grace.removesuffix("s")) > float(start_sh_settings()["SHUTDOWN_GRACE"]) + float(
        start_sh_settings()["WEBUI_GRACE"]
    )


def test_every_supported_python_is_checked() -> None:
    workflow = yaml_of(".github/workflows/check.yml")

    job = workflow["jobs"]["check"]

    assert job["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.12", "3.13"]
    assert any(step.get("run", "").startswith("make check") for step in job["steps"])


def test_the_image_is_pushed_on_a_tag_with_a_cache() -> None:
    workflow = yaml_of(".github/workflows/image.yml")

    builds = [
        step["with"] for step in workflow["jobs"]["image"]["steps"] if "build-push-action" in step.get("uses", "")
    ]

    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads `on` as true
    assert "mode=max" in builds[0]["cache-to"]
    assert [build["push"] for build in builds] == [True, True]
    arguments = [{line.split("=")[0] for line in build["build-args"].split() if "=" in line} for build in builds]
    assert arguments[1] - arguments[0] == {"EXTENSIONS"}  # once without, once with all that can be built
    assert arguments[1] <= set(DOCKERFILE.args)


def test_a_release_builds_those_extensions_whose_files_all_have_a_hash(tmp_path: Path) -> None:
    steps = yaml_of(".github/workflows/image.yml")["jobs"]["image"]["steps"]
    (step,) = (step["run"] for step in steps if "pins.py" in step.get("run", ""))
    (command,) = re.findall(r"image/pins\.py (buildable .*?)\)", step)

    done = subprocess.run(
        [sys.executable, ROOT / "image" / "pins.py", *command.split()], capture_output=True, text=True, check=True
    )

    unpinned = {word for pin in PINS_OF_FILES if pin.sha256 is None for word in pin.words}
    assert done.stdout.split() == [name for name in ("controlnet", "adetailer") if name not in unpinned]


def test_a_release_resolves_the_lists_for_cu128_before_it_builds_the_image() -> None:
    steps = yaml_of(".github/workflows/image.yml")["jobs"]["image"]["steps"]

    resolves = next(i for i, step in enumerate(steps) if "locks/lock.sh cu128" in step.get("run", ""))
    builds = next(i for i, step in enumerate(steps) if "build-push-action" in step.get("uses", ""))

    assert resolves < builds
    assert DOCKERFILE.arg("TORCH_INDEX_URL").startswith("https://")  # the step reads it from the Dockerfile
    assert "continue-on-error" not in steps[resolves]


def test_the_image_has_a_name_that_a_registry_takes_whoever_owns_the_repository(tmp_path: Path) -> None:
    text = (ROOT / ".github/workflows/image.yml").read_text(encoding="utf-8")
    (naming,) = (
        step["run"]
        for step in yaml_of(".github/workflows/image.yml")["jobs"]["image"]["steps"]
        if "IMAGE=ghcr.io" in step.get("run", "")
    )

    subprocess.run(
        ["bash", "-euo", "pipefail", "-c", naming],
        env={"GITHUB_REPOSITORY": "An-Owner/A1111-Worker", "GITHUB_ENV": str(tmp_path / "env")},
        check=True,
    )

    assert (tmp_path / "env").read_text(encoding="utf-8") == "IMAGE=ghcr.io/an-owner/a1111-worker\n"
    assert "github.repository" not in text and text.index("GITHUB_ENV") < text.index("env.IMAGE")

"""start.sh with real processes and signals; the WebUI, the worker and the GPU's tool are small programs on its PATH."""

from __future__ import annotations

import http.server
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from a1111_worker.config import Config
from tests.support import ROOT, wait_until

START = ROOT / "start.sh"
DEADLINE = 20.0  # seconds; only a failing test waits so long
TOOLS = (
    *("awk", "bash", "cat", "cp", "env", "ldconfig", "ln", "mkdir", "mv", "realpath", "rm", "sed", "setsid", "sleep"),
    *("timeout", "true"),
)

PROGRAM = """\
import json, os, signal, subprocess, sys, time, urllib.error, urllib.request

who = {"launch.py": "webui", "handler.py": "worker"}[os.path.basename(sys.argv[0])]
plan = os.environ.get(who.upper() + "_PLAN", "serve")

def record(what, **more):
    line = json.dumps({"who": who, "what": what, "pid": os.getpid(), **more}) + "\\n"
    with open(os.environ["EVENTS"], "a") as events:
        events.write(line)

def on_term(*_):
    record("TERM")
    if plan == "talk":
        for number in range(500):
            print("last words", number)
    if plan != "stubborn":
        record("end")
        sys.exit(0)

signal.signal(signal.SIGTERM, on_term)
child = subprocess.Popen(["sleep", "1000"]).pid if plan == "spawn" else None
try:
    state = open(os.environ.get("WEBUI_STATE_FILE", "/nowhere")).read().strip()
except OSError:
    state = None
if plan == "talk":
    print("hello")
    print('{"level": "INFO", "message": "one object a line"}')
record("start", arguments=sys.argv[1:], environment=dict(os.environ), folder=os.getcwd(), state=state, child=child)
if plan.startswith("download:"):
    for url in plan[9:].split(","):
        try:
            record("downloaded", url=url, answer=urllib.request.urlopen(url).read().decode())
        except urllib.error.URLError as error:
            record("refused", url=url, answer=str(error.reason))
if plan.startswith("exit:"):
    while who == "worker" and state and '"webui", "what": "start"' not in open(os.environ["EVENTS"]).read():
        time.sleep(0.005)
    sys.exit(int(plan[5:]))
while True:
    time.sleep(1000)
"""

QUEUE = """\
import os, sys

words = sys.argv[1:]
os.environ["QUEUE_ARGUMENTS"] = " ".join(words[:words.index("--")])
command = words[words.index("--") + 1:]
os.execv(command[0], command)
"""

PYTHON = """\
#!/usr/bin/env bash
set -a
. "${0%/bin/*}/plan" # what these programs do; the WebUI's environment has only what the allow-list lets pass
set +a
case "$*" in
  -c*xformers*) [[ "${XFORMERS:-yes}" == yes ]] ;;
  -c*torch*) [[ -n "${TORCH_CAPABILITY:-}" ]] && echo "$TORCH_CAPABILITY" ;;
  *) exec "$REAL_PYTHON" -S "$@" ;;
esac
"""


PLANNED = ("WEBUI_PLAN", "WORKER_PLAN", "XFORMERS", "TORCH_CAPABILITY")


class Container:
    """A folder that has for start.sh what the image has, and a run of start.sh in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.events_file = folder / "events"
        self.state_file = folder / "webui.state"
        self.models = folder / "models"
        self.webui_models = folder / "webui-models"
        for tool in TOOLS:
            found = shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
            assert found, f"these tests need {tool}"
            self.bin.mkdir(parents=True, exist_ok=True)
            (self.bin / tool).symlink_to(found)
        for name in ("webui/launch.py", "worker/handler.py"):
            (folder / name).parent.mkdir()
            (folder / name).write_text(PROGRAM, encoding="utf-8")
        (folder / "worker" / "local_queue.py").write_text(QUEUE, encoding="utf-8")
        self.program("python", PYTHON)
        self.gpu("8.9")
        self.program("ldconfig", "#!/usr/bin/env bash\n")
        self.environment = {
            "PATH": str(self.bin),
            "WEBUI_DIR": str(folder / "webui"),
            "WEBUI_PYTHON": str(self.bin / "python"),
            "WORKER_DIR": str(folder / "worker"),
            "WORKER_PYTHON": str(self.bin / "python"),
            "WEBUI_STATE_FILE": str(self.state_file),
            "WEBUI_MODELS_DIR": str(self.webui_models),
            "MODELS_DIR": str(self.models),
            "MODEL_SOURCES": str(folder / "source"),
            "CHECKPOINT_FILE": "the.safetensors",
            "SHUTDOWN_GRACE": "10",
            "WEBUI_RESTART_BACKOFF": "0.01",
        }
        self.process: subprocess.Popen[str] | None = None
        self.plan({})

    def plan(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Write what the programs do. Returns the rest of the environment."""
        plan = {"EVENTS": str(self.events_file), "REAL_PYTHON": sys.executable}
        plan |= {name: environment[name] for name in PLANNED if name in environment}
        lines = [f"{name}={shlex.quote(value)}\n" for name, value in plan.items()]
        (self.folder / "plan").write_text("".join(lines), encoding="utf-8")
        return {name: value for name, value in environment.items() if name not in PLANNED}

    def program(self, name: str, text: str) -> None:
        (self.bin / name).unlink(missing_ok=True)
        (self.bin / name).write_text(text, encoding="utf-8")
        (self.bin / name).chmod(0o755)

    def gpu(self, capabilities: str | None) -> None:
        """Set what nvidia-smi prints. None: it fails, as it does without a driver."""
        command = "exit 9" if capabilities is None else f"printf '{capabilities}\\n'"
        self.program("nvidia-smi", f"#!/usr/bin/env bash\n{command}\n")

    def start(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            # A background job of a shell ignores INT, and so do all processes that it starts, whatever they trap.
            ["env", "--default-signal=INT", str(START), *arguments],
            env=self.environment | self.plan(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def end(self) -> tuple[int, str, str]:
        """Wait until start.sh has ended. Returns its status, and what it wrote to stdout and stderr."""
        assert self.process
        output, errors = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, output, errors

    def run(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        self.start(*arguments, **environment)
        return self.end()

    def signal(self, number: int) -> None:
        assert self.process
        self.process.send_signal(number)

    def functions(self, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a script that has sourced start.sh."""
        return subprocess.run(
            ["bash", "-c", f"source {START}\nset_defaults\n{script}"],
            env=self.environment | self.plan(environment),
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )

    def events(self, who: str | None = None, what: str | None = None) -> list[dict[str, Any]]:
        lines = self.events_file.read_text(encoding="utf-8").splitlines() if self.events_file.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("}")]
        return [e for e in found if who in (None, e["who"]) and what in (None, e["what"])]

    def event(self, who: str, what: str, number: int = 1) -> dict[str, Any]:
        """Wait for the n-th event of its kind."""
        wait_until(lambda: len(self.events(who, what)) >= number, f"{what} of the {who}, number {number}")
        return self.events(who, what)[number - 1]

    def flags(self, **environment: str) -> list[str]:
        """The arguments that the WebUI would be started with."""
        done = self.functions('choose_gpu_flags && webui_flags "$(local_webui_port)"', **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.rstrip("\0").split("\0")

    def put_checkpoint(self, place: str, *, verified: bool = True) -> Path:
        path = self.folder / place / "the.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"weights")
        if verified:
            path.with_name(f"{path.name}.json").write_text("{}", encoding="utf-8")
        return path

    def clean(self) -> None:
        """End the processes that a test has left running."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.communicate(timeout=DEADLINE)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)  # the supervisor too, or it would start another WebUI
                self.process.wait()
        for event in self.events(what="start"):
            for pid in (event["pid"], event["child"]):
                if pid and is_alive(pid):
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Container]:
    container = Container(tmp_path)
    yield container
    container.clean()


def is_alive(pid: int) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def value_of(flags: list[str], flag: str) -> str:
    return flags[flags.index(flag) + 1]


def test_sourcing_it_runs_nothing(container: Container) -> None:
    done = subprocess.run(
        ["bash", "-c", f"source {START}; declare -F main"], env=container.environment, capture_output=True, text=True
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "main\n", "")
    assert container.events() == []


# The GPU

GPUS = [
    # nvidia-smi, xformers, torch, expected
    ("8.6", "yes", "", "--xformers"),  # Ampere
    ("9.0", "yes", "", "--xformers"),  # Hopper, the last one that A1111 lets xformers run on
    ("10.0", "yes", "", "--opt-sdp-attention"),  # Blackwell: --xformers would be ignored without a message
    ("12.0", "yes", "", "--opt-sdp-attention"),
    ("5.2", "yes", "", "--opt-sdp-attention"),  # Maxwell: too old for xformers
    ("8.9", "no", "", "--opt-sdp-attention"),  # an image without xformers
    ("8.6\\n12.0", "yes", "", "--xformers"),  # two: A1111 uses the first
    ("[N/A]", "yes", "7.5", "--xformers"),  # a driver that does not know compute_cap: torch is asked
    (None, "yes", "12.0", "--opt-sdp-attention"),  # nvidia-smi is broken, CUDA is not
]


@pytest.mark.parametrize(("printed", "xformers", "torch", "expected"), GPUS)
def test_the_gpu_decides_how_attention_is_computed(
    container: Container, printed: str | None, xformers: str, torch: str, expected: str
) -> None:
    container.gpu(printed)

    done = container.functions('choose_gpu_flags; echo "${gpu_flags[*]}"', XFORMERS=xformers, TORCH_CAPABILITY=torch)

    assert (done.returncode, done.stdout) == (0, f"{expected}\n")


@pytest.mark.parametrize("capabilities", [None, "no devices were found"])
def test_without_a_gpu_it_ends_with_1_and_one_clear_line(container: Container, capabilities: str | None) -> None:
    container.gpu(capabilities)

    status, output, errors = container.run()

    assert (status, output) == (1, "")
    assert len(errors.splitlines()) == 1
    assert "no GPU found" in errors
    assert "ALLOW_CPU=1" in errors
    assert container.events() == []


def test_on_runpod_the_worker_starts_without_a_gpu_and_can_tell_jobs_the_reason(container: Container) -> None:
    container.gpu(None)

    container.start(RUNPOD_WEBHOOK_GET_JOB="http://127.0.0.1:1/?x")
    worker = container.event("worker", "start")
    container.signal(signal.SIGTERM)
    status, _, errors = container.end()

    assert worker["state"].startswith("failed: no GPU found")
    assert container.events("webui") == []
    assert status == 143
    assert "start | given up on the WebUI: no GPU found" in errors


# the GPU's compute capability, the architectures in torch's build, whether torch runs on it
ARCHITECTURES = [
    ("7.0", "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", False),  # V100 and the cu128 build of 2.7.0
    ("7.0", "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90", True),  # V100 and PyPI's build (cu126)
    ("8.9", "sm_75 sm_80 sm_86 sm_90", True),  # code for 8.6 runs on 8.9
    ("12.0", "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90", False),  # Blackwell and PyPI's build
    ("12.0", "sm_80 compute_90", True),  # PTX is compiled for any later GPU
    ("8.0", "sm_86", False),
    ("10.3", "sm_100 sm_90a", True),
    ("9.0", "", True),  # nothing is known: it is tried
]


@pytest.mark.parametrize(("capability", "built", "runs"), ARCHITECTURES)
def test_a_gpu_that_torch_has_no_code_for_is_refused_with_the_reason(
    container: Container, capability: str, built: str, runs: bool
) -> None:
    container.gpu(capability)
    (container.folder / "architectures").write_text(f"{built}\n", encoding="utf-8")

    status, _, errors = container.run(WORKER_PLAN="exit:0")

    assert status == (0 if runs else 1)
    assert (f"torch in this image has no code for a GPU of compute capability {capability}" in errors) is not runs


def test_with_allow_cpu_it_starts_without_a_gpu(container: Container) -> None:
    container.gpu(None)

    flags = container.flags(ALLOW_CPU="1")

    assert " ".join(flags).find("--use-cpu all --no-half ") > 0
    assert "--skip-torch-cuda-test" in flags
    assert "--xformers" not in flags


def test_without_nvidia_smi_and_without_a_device_torch_is_not_imported(container: Container) -> None:
    if Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists():
        pytest.skip("this machine has a GPU")
    (container.bin / "nvidia-smi").unlink()

    done = container.functions("choose_gpu_flags", TORCH_CAPABILITY="8.6")

    assert done.returncode == 1


def test_with_a_gpu_only_the_vae_is_computed_at_full_precision(container: Container) -> None:
    flags = container.flags(ALLOW_CPU="1")  # it allows the CPU, it does not choose it

    assert "--no-half" not in flags
    assert "--no-half-vae" in flags


# What the WebUI is started with


def test_the_webui_is_started_with_its_flags(container: Container) -> None:
    container.put_checkpoint("models/checkpoints")

    container.run(WORKER_PLAN="exit:0", WEBUI_ARGS="--medvram-sdxl")

    assert container.event("webui", "start")["arguments"] == container.flags(WEBUI_ARGS="--medvram-sdxl")


WARNED_OF = {
    "--listen",  # every address
    "--share",
    "--api-server-stop",
    "--disable-safe-unpickle",
    "--enable-insecure-extension-access",
    "--no-hashing",  # without hashes neither checkpoint nor LoRA can be verified
    "--disable-nan-check",
    "--no-half",
}


def test_the_webui_listens_on_loopback_only(container: Container) -> None:
    flags = container.flags()

    assert {"--api", "--nowebui"} <= set(flags)
    assert value_of(flags, "--server-name") == "127.0.0.1"
    assert value_of(flags, "--port") == "3000"
    assert not WARNED_OF & set(flags)


def test_the_port_is_that_of_webui_url(container: Container) -> None:
    assert value_of(container.flags(WEBUI_URL="http://localhost:3456/"), "--port") == "3456"


@pytest.mark.parametrize("version", ["1.9.3", "1.10.1"])
def test_a1111_knows_every_flag(container: Container, version: str) -> None:
    known = json.loads((ROOT / "sandbox" / "data" / version / "cmd-flags.json").read_bytes())
    container.put_checkpoint("models/checkpoints")
    container.gpu(None)

    flags = container.flags(ALLOW_CPU="1")
    flags += container.functions(
        "attention_flag 8.9 yes; attention_flag 12.0 yes; echo --skip-load-model-at-start"
    ).stdout.split()

    asked = {flag.removeprefix("--").replace("-", "_") for flag in flags if flag.startswith("--")}
    assert asked <= set(known)


def test_the_webui_sees_the_folder_of_links(container: Container) -> None:
    flags = container.flags()

    folders = {
        "--ckpt-dir": "Stable-diffusion",
        "--lora-dir": "Lora",
        "--vae-dir": "VAE",
        "--esrgan-models-path": "ESRGAN",
    }
    for flag, folder in folders.items():
        assert value_of(flags, flag) == str(container.webui_models / folder)
        assert (container.webui_models / folder).is_dir()


def test_an_operators_own_upscalers_are_shown_at_each_start_of_the_webui(container: Container) -> None:
    ours, baked = container.models / "upscalers", container.folder / "source" / "upscalers"
    for file in (ours / "sharp.pth", baked / "sharp.pth", baked / "soft.pth", ours / "notes.txt", ours / "empty.pth"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"" if file.stem == "empty" else b"weights")
    shown = container.webui_models / "ESRGAN"

    container.flags()
    first = {link.name: link.readlink() for link in shown.iterdir()}
    (ours / "sharp.pth").unlink()
    (shown / "of_the_webui.pth").write_bytes(b"weights")
    container.flags()

    assert first == {"sharp.pth": ours / "sharp.pth", "soft.pth": baked / "soft.pth"}
    assert (shown / "sharp.pth").readlink() == baked / "sharp.pth"
    assert {file.name for file in shown.iterdir()} == {"sharp.pth", "soft.pth", "of_the_webui.pth"}


def test_flags_of_an_extension_are_given_only_if_it_is_there(container: Container) -> None:
    without = container.flags()
    (container.folder / "webui" / "extensions" / "adetailer").mkdir(parents=True)
    (container.folder / "webui" / "extensions" / "sd-webui-controlnet").mkdir()
    flags = container.flags()

    assert not [flag for flag in without if "controlnet" in flag or "ad-no" in flag]
    assert "--ad-no-huggingface" in flags
    assert value_of(flags, "--controlnet-dir") == str(container.webui_models / "ControlNet")
    annotators = Path(value_of(flags, "--controlnet-annotator-models-path"))
    assert annotators == container.folder / "webui" / "models" / "ControlNetAnnotators"
    assert annotators.is_dir()


def test_webui_args_come_last_and_are_split_at_spaces(container: Container) -> None:
    flags = container.flags(WEBUI_ARGS="--medvram-sdxl  --port 3333\n--loglevel=*")

    assert flags[-4:] == ["--medvram-sdxl", "--port", "3333", "--loglevel=*"]


@pytest.mark.parametrize(
    "place",
    [
        "models/checkpoints",  # the cache
        "source/checkpoints",  # baked into the image, or a volume that is only read
        "source/Stable-diffusion",
        "source",
    ],
)
def test_a_checkpoint_that_is_on_disk_is_loaded_at_once_under_the_workers_link(
    container: Container, place: str
) -> None:
    path = container.put_checkpoint(place)

    flags = container.flags()

    link = container.webui_models / "Stable-diffusion" / "the.safetensors"
    assert value_of(flags, "--ckpt") == str(link)
    assert "--skip-load-model-at-start" not in flags
    assert link.readlink() == path


def test_the_workers_own_link_is_left_as_it_is(container: Container) -> None:
    container.put_checkpoint("models/checkpoints")
    elsewhere = container.put_checkpoint("elsewhere")
    link = container.webui_models / "Stable-diffusion" / "the.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere)

    flags = container.flags()

    assert value_of(flags, "--ckpt") == str(link)
    assert link.readlink() == elsewhere


def test_if_the_checkpoint_is_not_on_disk_no_other_model_is_loaded_first(container: Container) -> None:
    flags = container.flags()

    assert "--skip-load-model-at-start" in flags
    assert "--ckpt" not in flags


def test_a_checkpoint_that_was_never_verified_is_not_shown_to_the_webui(container: Container) -> None:
    container.put_checkpoint("models/checkpoints", verified=False)

    flags = container.flags()

    assert "--skip-load-model-at-start" in flags
    assert list((container.webui_models / "Stable-diffusion").iterdir()) == []


def test_tcmalloc_is_preloaded_only_into_the_webui(container: Container) -> None:
    library = a_library()
    container.program("ldconfig", ldconfig_listing("/nowhere/libtcmalloc.so.4", library))

    container.run(WORKER_PLAN="exit:0")

    assert container.event("webui", "start")["environment"]["LD_PRELOAD"] == library
    assert "LD_PRELOAD" not in container.event("worker", "start")["environment"]


def test_the_webui_starts_without_tcmalloc_too(container: Container) -> None:
    container.program("ldconfig", ldconfig_listing("/nowhere/libtcmalloc.so.4"))

    container.run(WORKER_PLAN="exit:0")

    assert "LD_PRELOAD" not in container.event("webui", "start")["environment"]


def ldconfig_listing(*libraries: str) -> str:
    lines = "".join(f"\tlibtcmalloc_minimal.so.4 (libc6,x86-64) => {library}\n" for library in libraries)
    return f"#!/usr/bin/env bash\ncat <<'END'\n2 libs found in cache\n\tlibz.so.1 (libc6) => /libz.so.1\n{lines}END\n"


def a_library() -> str:
    """A library that can be preloaded on this machine."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    return next(words[-1] for words in map(str.split, maps.splitlines()) if "/libc.so" in words[-1])


GIVEN = {
    # a variable, whether the WebUI gets it
    "CIVITAI_API_KEY": False,
    "RUNPOD_AI_API_KEY": False,
    "RUNPOD_API_KEY": False,
    "BUCKET_SECRET_ACCESS_KEY": False,
    "HF_TOKEN": False,
    "HUGGING_FACE_HUB_TOKEN": False,
    "AWS_SECRET_ACCESS_KEY": False,
    "https_proxy": False,
    "COMMANDLINE_ARGS": False,  # A1111 would add these flags: --listen, for example
    "PYTHONPATH": False,
    "HOME": True,
    "LC_ALL": True,
    "LD_LIBRARY_PATH": True,
    "CUDA_VISIBLE_DEVICES": True,
    "NVIDIA_VISIBLE_DEVICES": True,
    "PYTORCH_CUDA_ALLOC_CONF": True,
    "HF_HOME": False,  # it has one of its own, with its tokenizer
}


def test_the_webui_gets_the_variables_that_it_needs_and_no_others(container: Container) -> None:
    given = {name: f"value of\n{name} = x" for name in GIVEN}

    container.run(WORKER_PLAN="exit:0", **given)

    webui = container.event("webui", "start")["environment"]
    assert given.items() <= container.event("worker", "start")["environment"].items()
    assert {name for name in given if webui.get(name) == given[name]} == {name for name in GIVEN if GIVEN[name]}
    known = {*given, "EVENTS", "REAL_PYTHON", *PLANNED, "PATH", "PYTHONUNBUFFERED", "no_proxy"}
    known |= {"http_proxy", "https_proxy", "HF_HUB_OFFLINE", "HF_HOME"}
    known |= {"PWD", "SHLVL", "_", "LC_CTYPE"}  # bash's and Python's
    assert set(webui) <= known


def test_every_variable_that_the_webui_gets_has_a_reason_on_the_page(container: Container) -> None:
    page = (ROOT / "docs" / "modules" / "startup-script.md").read_text(encoding="utf-8")
    section = page.split("## The WebUI's environment")[1].split("\n## ")[0]

    done = container.functions(r"""printf '%s\n' "${WEBUI_ENVIRONMENT[@]}" "${WEBUI_OFFLINE[@]%%=*}" """)

    described = set(
        re.findall(
            r"`([A-Za-z_*]+)`", "".join(line.split("|")[1] for line in section.splitlines() if line[:3] == "| `")
        )
    )
    assert described == {*done.stdout.split(), "HF_HOME", "PYTHONUNBUFFERED", "LD_PRELOAD"}


def test_downloads_of_the_webui_are_refused_at_once_and_this_machine_is_reached(container: Container) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Here) as here:
        threading.Thread(target=here.serve_forever, daemon=True).start()
        own = f"http://127.0.0.1:{here.server_port}/"
        urls = [own, "https://storage.example.com/x.pth", "http://storage.example.com/x.pth"]

        container.start(WEBUI_PLAN=f"download:{','.join(urls)}", https_proxy="http://127.0.0.1:1")
        container.event("webui", "refused", 2)
        here.shutdown()

    answers = {event["url"]: event["answer"] for event in container.events("webui") if "answer" in event}
    assert answers.pop(own) == "here"
    assert answers == dict.fromkeys(urls[1:], "[Errno 111] Connection refused")


class Here(http.server.BaseHTTPRequestHandler):
    """A server on this machine."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"here")

    def log_message(self, format: str, *args: Any) -> None:
        pass


# What the WebUI finds on its disk


def settings_of(container: Container, folder: str = "webui") -> Any:
    return json.loads((container.folder / folder / "config.json").read_text(encoding="utf-8"))


def test_the_webuis_settings_name_the_checkpoint_before_it_starts(container: Container) -> None:
    container.run(WORKER_PLAN="exit:0")

    assert settings_of(container) == {"sd_model_checkpoint": "the.safetensors"}
    assert sorted(path.name for path in (container.folder / "webui").iterdir()) == [
        *("config.json", "config_states", "launch.py")
    ]


def test_other_settings_of_the_webui_stay(container: Container) -> None:
    before = {"sd_model_checkpoint": "other.safetensors [abc]", "samples_save": False, "font": "größer"}
    (container.folder / "webui" / "config.json").write_text(json.dumps(before), encoding="utf-8")

    container.run(WORKER_PLAN="exit:0")

    assert settings_of(container) == before | {"sd_model_checkpoint": "the.safetensors"}


@pytest.mark.parametrize("text", ['{"half', "[]"])
def test_settings_that_cannot_be_read_are_left_alone_and_the_webui_starts(container: Container, text: str) -> None:
    (container.folder / "webui" / "config.json").write_text(text, encoding="utf-8")

    container.run(WORKER_PLAN="exit:0")

    assert (container.folder / "webui" / "config.json").read_text(encoding="utf-8") == text
    assert container.events("webui", "start")


def test_a_restarted_webui_finds_the_checkpoint_in_its_settings_again(container: Container) -> None:
    container.start()
    first = container.event("webui", "start")
    (container.folder / "webui" / "config.json").write_text('{"sd_model_checkpoint": "x"}', encoding="utf-8")

    os.kill(first["pid"], signal.SIGKILL)
    container.event("webui", "start", 2)

    assert settings_of(container) == {"sd_model_checkpoint": "the.safetensors"}


def test_a_webui_in_a_read_only_folder_writes_elsewhere_and_keeps_its_models_and_settings(container: Container) -> None:
    """WEBUI_DATA_DIR is what start.sh chooses by itself if the folder is read-only; root may write in any other."""
    upscaler = container.folder / "webui" / "models" / "ESRGAN" / "4x.pth"
    upscaler.parent.mkdir(parents=True)
    upscaler.write_bytes(b"weights")
    (container.folder / "webui" / "config.json").write_text('{"samples_save": false}', encoding="utf-8")
    (container.folder / "webui" / "styles.csv").write_text("name,prompt\n", encoding="utf-8")
    data = container.folder / "data"

    container.run(WORKER_PLAN="exit:0", WEBUI_DATA_DIR=str(data))

    assert value_of(container.event("webui", "start")["arguments"], "--data-dir") == str(data)
    assert (data / "models" / "ESRGAN" / "4x.pth").read_bytes() == b"weights"
    assert (data / "models" / "ESRGAN").is_dir() and not (data / "models" / "ESRGAN").is_symlink()
    assert (data / "styles.csv").read_text(encoding="utf-8") == "name,prompt\n"
    assert settings_of(container, "data") == {"samples_save": False, "sd_model_checkpoint": "the.safetensors"}
    assert settings_of(container) == {"samples_save": False}
    assert container.events("webui", "start")


def test_the_default_folder_of_the_webuis_data_is_its_own_unless_it_is_read_only(container: Container) -> None:
    own = container.functions('echo "$WEBUI_DATA_DIR"')
    read_only = container.functions('echo "$WEBUI_DATA_DIR"', WEBUI_DIR="/proc/sys")

    assert own.stdout == f"{container.folder / 'webui'}\n"
    assert read_only.stdout == "/tmp/webui-data\n"


# A checkpoint that is baked into the image


def baked(container: Container) -> dict[str, str]:
    """What the build writes beside a checkpoint that it bakes. Returns it as variables."""
    values = {
        "CHECKPOINT_FILE": "baked.safetensors",
        "CHECKPOINT_NAME": 'Somebody\'s "Model" = 2',
        "CHECKPOINT_SHA256": "ab" * 32,
    }
    (container.folder / "source").mkdir()
    (container.folder / "source" / "baked-checkpoint").write_text(
        "".join(f"{name}={value}\n" for name, value in values.items()), encoding="utf-8"
    )
    del container.environment["CHECKPOINT_FILE"]
    return values


def test_a_baked_checkpoint_is_the_default_of_webui_and_worker(container: Container) -> None:
    values = baked(container)

    container.run(WORKER_PLAN="exit:0")

    environment = container.event("worker", "start")["environment"]
    assert values.items() <= environment.items()
    assert "CHECKPOINT_URL" not in environment
    assert settings_of(container)["sd_model_checkpoint"] == values["CHECKPOINT_FILE"]
    assert Config.from_env(environment).checkpoint_sha256 == values["CHECKPOINT_SHA256"]


def test_an_operators_own_checkpoint_replaces_the_baked_one_as_a_whole(container: Container) -> None:
    baked(container)

    container.run(
        WORKER_PLAN="exit:0", CHECKPOINT_URL="https://civitai.com/models/1", CHECKPOINT_FILE="mine.safetensors"
    )

    environment = container.event("worker", "start")["environment"]
    assert environment["CHECKPOINT_FILE"] == "mine.safetensors"
    assert not {"CHECKPOINT_NAME", "CHECKPOINT_SHA256"} & set(environment)


# The worker

ARGUMENTS: list[tuple[list[str], Mapping[str, str], list[str]]] = [
    # given, environment, what handler.py gets
    ([], {"RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1:1/?x"}, []),  # RunPod's queue
    (["--test_input", '{"input": {}}'], {}, ["--test_input", '{"input": {}}']),  # whatever is asked for
    (["--rp_serve_api", "--rp_api_host", "0.0.0.0"], {}, ["--rp_serve_api", "--rp_api_host", "0.0.0.0"]),
]


@pytest.mark.parametrize(("given", "environment", "expected"), ARGUMENTS)
def test_arguments_go_to_the_handler(
    container: Container, given: list[str], environment: Mapping[str, str], expected: list[str]
) -> None:
    container.run(*given, WORKER_PLAN="exit:0", **environment)

    started = container.event("worker", "start")
    assert started["arguments"] == expected
    assert "QUEUE_ARGUMENTS" not in started["environment"]


@pytest.mark.parametrize(("environment", "host"), [({}, "127.0.0.1"), ({"LOCAL_API_HOST": "0.0.0.0"}, "0.0.0.0")])
def test_off_runpod_and_without_arguments_the_worker_is_behind_a_queue_of_its_own(
    container: Container, environment: Mapping[str, str], host: str
) -> None:
    container.run(WORKER_PLAN="exit:0", **environment)

    started = container.event("worker", "start")
    assert started["arguments"] == []
    assert started["environment"]["QUEUE_ARGUMENTS"] == f"--host {host} --port 8000"


def test_webui_and_worker_run_unbuffered_in_their_own_folder_and_process_group(container: Container) -> None:
    container.start()
    webui, worker = container.event("webui", "start"), container.event("worker", "start")

    groups = {os.getpgid(event["pid"]) for event in (webui, worker)}

    assert groups == {webui["pid"], worker["pid"]}
    assert (webui["folder"], worker["folder"]) == (str(container.folder / "webui"), str(container.folder / "worker"))
    assert {event["environment"]["PYTHONUNBUFFERED"] for event in (webui, worker)} == {"1"}


@pytest.mark.parametrize("status", [0, 3])
def test_the_container_ends_with_the_worker_and_its_status(container: Container, status: int) -> None:
    done, _, _ = container.run(WORKER_PLAN=f"exit:{status}")

    assert done == status
    assert not any(is_alive(event["pid"]) for event in container.events(what="start"))


def test_a_worker_that_is_killed_ends_the_container_too(container: Container) -> None:
    container.start()
    worker = container.event("worker", "start")
    container.event("webui", "start")

    os.kill(worker["pid"], signal.SIGKILL)
    status, _, _ = container.end()

    assert status == 128 + signal.SIGKILL
    assert container.events("webui", "TERM")


def test_the_workers_process_group_ends_with_the_worker(container: Container) -> None:
    container.start(WORKER_PLAN="spawn")
    worker = container.event("worker", "start")

    os.kill(worker["pid"], signal.SIGKILL)  # the SDK's ping process goes on reporting a healthy worker then
    container.end()

    assert not is_alive(worker["child"])


def test_a_webui_elsewhere_is_not_started_and_needs_no_gpu(container: Container) -> None:
    container.gpu(None)

    status, _, errors = container.run(WORKER_PLAN="exit:0", WEBUI_URL="http://10.0.0.7:3000")

    assert status == 0
    assert "http://10.0.0.7:3000" in errors
    assert container.events("webui") == []
    assert "WEBUI_STATE_FILE" not in container.event("worker", "start")["environment"]


# The supervisor


def test_the_pid_is_in_the_state_file_before_the_worker_starts(container: Container) -> None:
    container.state_file.write_text("4242\n", encoding="utf-8")  # left by an earlier start of this container

    container.start()
    webui, worker = container.event("webui", "start"), container.event("worker", "start")

    assert worker["state"] == str(webui["pid"])
    assert container.state_file.read_text(encoding="utf-8") == f"{webui['pid']}\n"
    assert [path.name for path in container.folder.glob("webui.state*")] == ["webui.state"]


def test_a_stale_state_file_of_the_worker_is_removed(container: Container) -> None:
    health = container.folder / "worker.state.json"
    health.write_text('{"state": "ready"}', encoding="utf-8")

    container.run(WORKER_PLAN="exit:0", WORKER_STATE_FILE=str(health))

    assert not health.exists()


def test_a_webui_that_ends_is_started_again_and_the_worker_does_not_notice(container: Container) -> None:
    container.start()
    first = container.event("webui", "start")
    container.event("worker", "start")

    os.kill(first["pid"], signal.SIGKILL)
    second = container.event("webui", "start", 2)

    wait_until(lambda: container.state_file.read_text(encoding="utf-8") == f"{second['pid']}\n", "the new pid")
    assert len(container.events("worker")) == 1


def test_processes_that_the_webui_left_behind_are_killed_before_it_starts_again(container: Container) -> None:
    container.start(WEBUI_PLAN="spawn")
    first = container.event("webui", "start")

    os.kill(first["pid"], signal.SIGKILL)
    container.event("webui", "start", 2)

    assert not is_alive(first["child"])


def test_a_webui_that_ends_too_often_is_not_started_again_and_the_worker_can_read_it(container: Container) -> None:
    container.start(WEBUI_PLAN="exit:0")

    wait_until(lambda: container.state_file.exists() and "failed" in container.state_file.read_text(), "failed")
    container.signal(signal.SIGTERM)
    status, _, errors = container.end()

    why = "it ended with status 0, after 3 restarts in 600 s"
    assert container.state_file.read_text(encoding="utf-8") == f"failed: {why}\n"
    assert len(container.events("webui", "start")) == 1 + 3
    assert status == 143  # the worker ran until TERM
    assert f"start | given up on the WebUI: {why}" in errors.splitlines()
    assert [line.split()[-2] for line in errors.splitlines() if "started again" in line] == ["0.01", "0.02", "0.04"]


def test_a_webui_that_was_killed_says_memory(container: Container) -> None:
    container.start(WEBUI_RESTARTS="0")
    webui = container.event("webui", "start")
    container.event("worker", "start")

    os.kill(webui["pid"], signal.SIGKILL)  # as the kernel does if the memory is full
    wait_until(lambda: "failed" in container.state_file.read_text(encoding="utf-8"), "failed")
    container.signal(signal.SIGTERM)
    _, _, errors = container.end()

    said = "ended with status 137 (killed: the memory was full, or it hung)"
    assert f"start | the WebUI (pid {webui['pid']}) {said}" in errors.splitlines()
    assert said in container.state_file.read_text(encoding="utf-8")


def test_a_webui_without_a_folder_of_models_is_not_started_and_the_worker_can_read_it(container: Container) -> None:
    (container.folder / "a file").touch()
    folder = container.folder / "a file" / "webui-models"

    container.start(WEBUI_MODELS_DIR=str(folder))
    worker = container.event("worker", "start")
    container.signal(signal.SIGTERM)
    status, _, errors = container.end()

    why = "the folders of WEBUI_MODELS_DIR or WEBUI_DATA_DIR cannot be made"
    assert worker["state"] == f"failed: {why}"
    assert container.events("webui") == []
    assert status == 143  # the worker ran until TERM, and could answer jobs
    assert f"start | given up on the WebUI: {why}" in errors.splitlines()


RESTARTS = [
    # hundredths of a second at which it was restarted, now, the delay
    ([], 100, "1"),
    ([100], 200, "2"),
    ([100, 200], 300, "4"),
    ([100, 200, 300], 400, None),  # three in the window already
    ([100, 200, 300], 60_100, "4"),  # the first of them left it a moment ago
    ([100, 200, 300], 60_099, None),
    ([100, 200, 300], 200_000, "1"),  # all of them long ago
]


@pytest.mark.parametrize(("restarts", "now", "delay"), RESTARTS)
def test_there_are_three_restarts_in_ten_minutes_and_the_delay_doubles(
    container: Container, restarts: list[int], now: int, delay: str | None
) -> None:
    script = f"restart_delay {now} {' '.join(map(str, restarts))}"

    done = container.functions(script, WEBUI_RESTART_BACKOFF="1")

    assert (done.returncode, done.stdout) == ((0, f"{delay}\n") if delay else (1, ""))


# The end


def test_term_goes_to_the_worker_first_and_to_the_webui_only_after_the_worker_has_ended(container: Container) -> None:
    container.start()
    container.event("webui", "start")
    container.event("worker", "start")

    container.signal(signal.SIGTERM)
    status, _, _ = container.end()

    assert status == 143
    order = [(event["who"], event["what"]) for event in container.events() if event["what"] != "start"]
    assert order == [("worker", "TERM"), ("worker", "end"), ("webui", "TERM"), ("webui", "end")]


def test_an_interrupt_from_a_terminal_ends_it_the_same_way_and_no_log_line_is_lost(container: Container) -> None:
    container.start(WORKER_PLAN="talk")
    container.event("webui", "start")
    container.event("worker", "start")

    assert container.process
    os.killpg(container.process.pid, signal.SIGINT)  # a terminal signals the whole group, the prefixing processes too
    status, output, _ = container.end()

    assert status == 130
    assert container.events("worker", "end")
    assert container.events("webui", "end")
    assert output.splitlines()[-1] == "worker | last words 499"


def test_a_worker_that_does_not_end_is_killed_when_the_grace_is_over(container: Container) -> None:
    container.start(WORKER_PLAN="stubborn", SHUTDOWN_GRACE="0.2")
    worker = container.event("worker", "start")
    container.event("webui", "start")

    container.signal(signal.SIGTERM)
    status, _, _ = container.end()

    assert status == 143
    assert container.events("worker", "TERM")
    assert not is_alive(worker["pid"])
    assert container.events("webui", "end")


@pytest.mark.parametrize("seconds", ["20", "20.5", "20 ", " 20", "20\n"])  # the worker reads all of these too
def test_blanks_around_the_grace_do_not_shorten_it(container: Container, seconds: str) -> None:
    done = container.functions('sleep 0.5 & wait_at_most "$SHUTDOWN_GRACE" $! && echo ended', SHUTDOWN_GRACE=seconds)

    assert (done.stdout, done.stderr) == ("ended\n", "")  # read as 0.2 s, the grace would have been over before


def test_a_webui_that_does_not_end_is_killed_and_bash_prints_nothing_about_it(container: Container) -> None:
    container.start(WEBUI_PLAN="stubborn")
    webui = container.event("webui", "start")
    container.event("worker", "start")

    container.signal(signal.SIGTERM)
    status, _, errors = container.end()

    assert status == 143
    assert [line for line in errors.splitlines() if not line.startswith("start | ")] == []
    assert container.events("webui", "TERM")
    assert not is_alive(webui["pid"])


def test_the_webui_of_a_killed_supervisor_is_killed_at_the_end(container: Container) -> None:
    container.start()
    webui = container.event("webui", "start")
    container.event("worker", "start")

    os.kill(int(Path(f"/proc/{webui['pid']}/stat").read_text(encoding="utf-8").split()[3]), signal.SIGKILL)
    container.signal(signal.SIGTERM)
    status, _, _ = container.end()

    assert status == 143
    wait_until(lambda: not is_alive(webui["pid"]), "the WebUI's end")


def test_term_ends_it_while_the_webui_waits_to_be_started_again(container: Container) -> None:
    container.start(WEBUI_PLAN="exit:1", WEBUI_RESTART_BACKOFF="1000")
    webui = container.event("webui", "start")
    container.event("worker", "start")
    wait_until(lambda: not is_alive(webui["pid"]), "the WebUI's end")

    container.signal(signal.SIGTERM)
    status, _, _ = container.end()

    assert status == 143
    assert len(container.events("webui", "start")) == 1


def test_a_term_while_the_gpu_is_identified_is_not_forgotten(container: Container) -> None:
    looking = container.folder / "looking"
    os.mkfifo(container.folder / "go")
    container.program(
        "nvidia-smi", f"#!/usr/bin/env bash\n: >{looking}\nread -r _ <{container.folder / 'go'}\necho 8.9\n"
    )
    container.start()
    wait_until(looking.exists, "nvidia-smi to start")

    container.signal(signal.SIGTERM)
    (container.folder / "go").write_text("\n", encoding="utf-8")
    status, _, _ = container.end()

    assert status == 143
    assert not container.state_file.exists()  # nothing was started after it


# The log


def test_every_line_names_its_process_and_the_last_lines_are_not_lost(container: Container) -> None:
    container.start(WORKER_PLAN="talk", WEBUI_PLAN="talk")
    container.event("webui", "start")
    container.event("worker", "start")

    container.signal(signal.SIGTERM)
    _, output, _ = container.end()

    lines = output.splitlines()
    for name in ("webui", "worker"):
        printed = [line.removeprefix(f"{name} | ") for line in lines if line.startswith(f"{name} | ")]
        assert printed == ["hello", *(f"last words {number}" for number in range(500))]


SLOW_READER = '    "$REAL_PYTHON" "$@"; sleep 0.2; echo written ;;'


@pytest.mark.parametrize(("webui", "logs"), [("http://127.0.0.1:3000", 2), ("http://10.0.0.7:3000", 1)])
def test_the_container_does_not_end_before_its_log_is_written(container: Container, webui: str, logs: int) -> None:
    # A slow reader.
    container.program("python", PYTHON.replace('case "$*" in', 'case "$*" in\n  *relay.py*)\n' + SLOW_READER))
    log = container.folder / "log"
    environment = container.environment | container.plan({"WORKER_PLAN": "exit:0", "WEBUI_URL": webui})
    with log.open("w") as file:
        subprocess.run([START], env=environment, stdout=file, start_new_session=True, timeout=DEADLINE, check=True)

    assert log.read_text(encoding="utf-8").count("written") == logs


def test_a_json_object_in_the_log_stays_as_it_is(container: Container) -> None:
    container.start(WORKER_PLAN="talk")
    container.event("worker", "start")

    container.signal(signal.SIGTERM)
    _, output, _ = container.end()

    assert '{"level": "INFO", "message": "one object a line"}' in output.splitlines()


def test_with_json_every_line_of_the_container_is_an_object(container: Container) -> None:
    container.start(WORKER_PLAN="talk", WEBUI_PLAN="talk", LOG_FORMAT="json")
    container.event("worker", "start")
    container.event("webui", "start")

    container.signal(signal.SIGTERM)
    _, output, errors = container.end()

    lines = [json.loads(line) for line in (output + errors).splitlines()]
    assert all({"time", "level", "source", "message"} <= set(line) for line in lines)
    assert {line["source"] for line in lines} == {"start", "webui", "worker"}
    assert next(line["message"] for line in lines if line["source"] == "worker") == "hello"


def test_a_message_of_start_sh_is_valid_json_whatever_is_in_it(container: Container) -> None:
    message = 'a "name" with a \\ and a \t tab, größer, 100%'

    done = container.functions(f"log ERROR {shlex.quote(message)}", LOG_FORMAT="JSON")

    found = json.loads(done.stderr)
    assert (found["level"], found["source"]) == ("ERROR", "start")
    assert found["message"] == message.replace("\t", " ")
    assert time.strptime(found["time"], "%Y-%m-%dT%H:%M:%SZ")

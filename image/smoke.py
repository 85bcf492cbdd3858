"""Tests whether the installed packages work. The Dockerfile runs it once in each environment. A failure ends the build.

    /opt/webui/bin/python smoke.py webui START_SH LOCKS   in A1111's folder: packages, versions, helpers, disk cache, a
                                                          boot; EXTENSIONS in the environment: they must be in it too
    /opt/worker/bin/python smoke.py worker FOLDER         the imports of a start

Its output is kept in the image: the versions of the packages.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

BOOT_SECONDS = 300.0  # a boot takes 25 to 55 s on two cores
BOOT = """
source "$1"
set_defaults
gpu_flags=("${CPU_FLAGS[@]}")
tcmalloc="$(find_tcmalloc)" || tcmalloc=''
trap 'kill_group "$webui"; exit' TERM
exec 3>&2
start_webui "$2" 3
wait_for_exit "$webui"
"""
NOT_IMPORTED = {"setuptools", "wheel"}
# A script of each extension: A1111 lists it only if its import has worked (1.10.1, modules/scripts.py).
SCRIPTS = {"controlnet": "controlnet", "adetailer": "adetailer"}


def main() -> None:
    {"webui": check_webui, "worker": check_worker}[sys.argv[1]]()


def check_webui() -> None:
    """Fail if A1111 cannot start, or cannot load its first model."""
    start_sh, locks = sys.argv[2], Path(sys.argv[3])
    extensions = os.environ.get("EXTENSIONS", "").split()
    replaced = {name: version for extension in extensions for name, version in locked(locks / f"{extension}.txt")}
    for requirement in Path("requirements_versions.txt").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\s*([A-Za-z0-9_.-]+)(?:==([^\s;#]+))?", requirement):
            check_package(match[1], replaced.get(match[1].lower(), match[2]))
    for name, version in replaced.items():
        found = importlib.metadata.version(name)
        expect(found == version, f"{name} is {found}, not {version}")
        print_version(name, found)
    for name in ("torchvision", "xformers", "clip"):
        check_package(name)
    check_disk_cache()
    for helper in ("ldm", "sgm", "k_diffusion"):  # `modules.paths`, imported above, has found where they are
        expect(importlib.util.find_spec(helper) is not None, f"A1111 does not find {helper} in its repositories")
    if os.environ.get("BAKE_TOKENIZER") == "1":  # offline now
        importlib.import_module("tokenizer").load()
    check_boot(start_sh, {SCRIPTS[extension] for extension in extensions})


def check_worker() -> None:
    """Fail if the worker cannot start."""
    sys.path.insert(0, sys.argv[2])
    for name in ("handler", "model_manager", "local_queue.__main__"):
        importlib.import_module(name)
    print_version("runpod", importlib.metadata.version("runpod"))


def check_package(name: str, wanted: str | None = None) -> None:
    """Fail if a package is not there, is not the version that A1111 wants, or cannot be imported."""
    found = importlib.metadata.version(name)
    expect(wanted is None or without_zeros(found) == without_zeros(wanted), f"{name} is {found}, not {wanted}")
    if name.lower() not in NOT_IMPORTED:
        modules = modules_of(importlib.metadata.distribution(name))
        expect(bool(modules), f"{name} has no module")
        for module in modules:
            importlib.import_module(module)
    print_version(name, found)


def locked(path: Path) -> list[tuple[str, str]]:
    """The packages of a list in locks/, and their versions."""
    return re.findall(r"(?m)^([a-z0-9._-]+)==(\S+)", path.read_text(encoding="utf-8"))


def without_zeros(version: str) -> str:
    """0.15.0 and 0.15 are one version (PEP 440)."""
    return re.sub(r"(\.0)+$", "", version)


def modules_of(distribution: importlib.metadata.Distribution) -> list[str]:
    """The modules of a distribution: those in its own list, or, if it has no list, those among its files.

    `packages_distributions` of Python 3.10 reads only the list, and half of today's wheels have none.
    """
    listed = (distribution.read_text("top_level.txt") or "").split()
    found = [file.parts[0].removesuffix(".py") for file in distribution.files or () if file.suffix == ".py"]
    return sorted({module for module in listed or found if module.isidentifier()})


def check_disk_cache() -> None:
    """Fail if A1111's own disk cache loses a key. With some builds of SQLite it fails, and the API answers 404."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SD_WEBUI_CACHE_DIR"] = folder
        sys.argv = [sys.argv[0]]  # A1111 parses it at import
        sys.path.insert(0, str(Path.cwd()))
        cache = importlib.import_module("modules.cache").cache
        cache("smoke")["key"] = {"mtime": 1.5}
        expect(cache("smoke")["key"] == {"mtime": 1.5}, "A1111's disk cache does not keep a key")
        cache("smoke").close()


def check_boot(start_sh: str, scripts: set[str]) -> None:
    """Fail if launch.py does not answer as an API, or without these scripts.

    It is started by start.sh's own function for a machine without a GPU.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "WEBUI_DIR": str(Path.cwd()),
            "WEBUI_PYTHON": sys.executable,
            "WORKER_PYTHON": sys.executable,
            "WEBUI_DATA_DIR": folder,
            "WEBUI_MODELS_DIR": f"{folder}/shown",
            "WEBUI_STATE_FILE": f"{folder}/state",
        }
        began = time.monotonic()
        with subprocess.Popen(
            ["bash", "-c", BOOT, "smoke", start_sh, str(port)], env={**os.environ, **settings}, stdout=sys.stderr
        ) as process:
            api = f"http://127.0.0.1:{port}/sdapi/v1"
            answered = wait_for_options(f"{api}/options", process)
            missing = scripts - listed_scripts(f"{api}/scripts") if answered and scripts else set()
            process.terminate()
    expect(answered, "launch.py does not answer /sdapi/v1/options; its own lines are above")
    expect(not missing, f"{', '.join(sorted(missing))} could not be loaded; the WebUI's own lines are above")
    sys.stderr.write(f"launch.py answers after {time.monotonic() - began:.0f} s\n")


def wait_for_options(url: str, process: subprocess.Popen[bytes]) -> bool:
    """Whether the process answers before it ends or the time is up."""
    until = time.monotonic() + BOOT_SECONDS
    while process.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return b"sd_model_checkpoint" in answer.read()
        except urllib.error.HTTPError as error:
            sys.stderr.write(f"{url}: {error}\n")
            return False
        except OSError:  # nothing listens yet
            time.sleep(0.2)
    return False


def listed_scripts(url: str) -> set[str]:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return {str(name).lower() for name in json.load(answer)["txt2img"]}


def expect(condition: bool, failure: str) -> None:
    if not condition:
        sys.exit(f"smoke test: {failure}")


def print_version(name: str, version: str) -> None:
    sys.stdout.write(f"{name} {version}\n")


if __name__ == "__main__":
    main()

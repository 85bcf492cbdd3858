"""Tests whether the installed packages work. The Dockerfile runs it once in each environment. A failure ends the build.

    /opt/webui/bin/python smoke.py webui            in A1111's folder: packages, versions, helpers, disk cache
    /opt/worker/bin/python smoke.py worker FOLDER   the imports of a start

Its output is kept in the image: the versions of the packages.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import tempfile
from pathlib import Path

NOT_IMPORTED = {"setuptools", "wheel"}


def main() -> None:
    {"webui": check_webui, "worker": check_worker}[sys.argv[1]]()


def check_webui() -> None:
    """Fail if A1111 cannot start, or cannot load its first model."""
    for name in ("torch", "torchvision", "xformers"):
        expected = os.environ[f"{name.upper()}_VERSION"]
        if expected:
            importlib.import_module(name)
            found = importlib.metadata.version(name)
            expect(found.split("+")[0] == expected, f"{name} is {found}, not {expected}")
            print_version(name, found)
    for requirement in Path("requirements_versions.txt").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\s*([A-Za-z0-9_.-]+)", requirement):
            check_package(match[1])
    check_package("clip")
    check_disk_cache()
    for helper in ("ldm", "sgm", "k_diffusion"):  # `modules.paths`, imported above, has found where they are
        expect(importlib.util.find_spec(helper) is not None, f"A1111 does not find {helper} in its repositories")
    if os.environ.get("BAKE_TOKENIZER") == "1":  # offline now
        importlib.import_module("tokenizer").load()


def check_worker() -> None:
    """Fail if the worker cannot start."""
    sys.path.insert(0, sys.argv[2])
    for name in ("handler", "model_manager"):
        importlib.import_module(name)
    print_version("runpod", importlib.metadata.version("runpod"))


def check_package(name: str) -> None:
    """Fail if a package is not there or cannot be imported."""
    if name.lower() not in NOT_IMPORTED:
        modules = modules_of(importlib.metadata.distribution(name))
        expect(bool(modules), f"{name} has no module")
        for module in modules:
            importlib.import_module(module)
    print_version(name, importlib.metadata.version(name))


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


def expect(condition: bool, failure: str) -> None:
    if not condition:
        sys.exit(f"smoke test: {failure}")


def print_version(name: str, version: str) -> None:
    sys.stdout.write(f"{name} {version}\n")


if __name__ == "__main__":
    main()

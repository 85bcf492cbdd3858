"""Does what was installed work? Run by the Dockerfile, once in each environment; a failure ends the build.

    /opt/webui/bin/python smoke.py webui            in A1111's folder: packages, versions, helpers, disk cache
    /opt/worker/bin/python smoke.py worker FOLDER   the imports of a start

What it prints is kept in the image: the versions that are in it.
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
    {"webui": webui, "worker": worker}[sys.argv[1]]()


def webui() -> None:
    """Raises where A1111 could not start, or would fail at its first model."""
    for name in ("torch", "torchvision", "xformers"):
        asked = os.environ[f"{name.upper()}_VERSION"]
        if asked:
            importlib.import_module(name)
            found = importlib.metadata.version(name)
            expect(found.split("+")[0] == asked, f"{name} is {found}, not {asked}")
            say(name, found)
    for requirement in Path("requirements_versions.txt").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\s*([A-Za-z0-9_.-]+)", requirement):
            package(match[1])
    package("clip")
    disk_cache_keeps_a_key()
    for helper in ("ldm", "sgm", "k_diffusion"):  # `modules.paths`, imported above, has found where they are
        expect(importlib.util.find_spec(helper) is not None, f"A1111 does not find {helper} in its repositories")
    if os.environ.get("BAKE_TOKENIZER") == "1":  # offline now
        importlib.import_module("tokenizer").load()


def worker() -> None:
    """Raises where the worker could not start."""
    sys.path.insert(0, sys.argv[2])
    for name in ("handler", "model_manager"):
        importlib.import_module(name)
    say("runpod", importlib.metadata.version("runpod"))


def package(name: str) -> None:
    """It is there and can be imported."""
    if name.lower() not in NOT_IMPORTED:
        modules = top_level(importlib.metadata.distribution(name))
        expect(bool(modules), f"{name} brings no module")
        for module in modules:
            importlib.import_module(module)
    say(name, importlib.metadata.version(name))


def top_level(distribution: importlib.metadata.Distribution) -> list[str]:
    """The modules that a distribution brings: as its own list has them, or as its files have where it brings no list.

    Python 3.10's own `packages_distributions` knows the list alone, and half of today's wheels have none.
    """
    listed = (distribution.read_text("top_level.txt") or "").split()
    found = [file.parts[0].removesuffix(".py") for file in distribution.files or () if file.suffix == ".py"]
    return sorted({module for module in listed or found if module.isidentifier()})


def disk_cache_keeps_a_key() -> None:
    """Through A1111's own module: with some builds of SQLite it fails, and the API answers 404."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SD_WEBUI_CACHE_DIR"] = folder
        sys.argv = [sys.argv[0]]  # A1111 parses it at import
        sys.path.insert(0, str(Path.cwd()))
        cache = importlib.import_module("modules.cache").cache
        cache("smoke")["key"] = {"mtime": 1.5}
        expect(cache("smoke")["key"] == {"mtime": 1.5}, "A1111's disk cache does not keep a key")
        cache("smoke").close()


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        sys.exit(f"smoke test: {otherwise}")


def say(name: str, version: str) -> None:
    sys.stdout.write(f"{name} {version}\n")


if __name__ == "__main__":
    main()

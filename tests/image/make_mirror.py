"""Stand-ins for the repositories that the Dockerfile fetches from GitHub, for a build without GitHub.

    python tests/image/make_mirror.py FOLDER

makes FOLDER/OWNER/NAME.git for each, with one branch, `main`. A1111's repository contains the sandbox's WebUI with
A1111's flags (launch.py beside this file), and asks for the packages that A1111 asks for. CLIP is a package that needs
pkg_resources to be built and to be run, as the real one does; it is also in CLIP.zip. The helpers are empty packages in
the folders in which A1111 looks for them. Stand-ins for the files of image/pins.toml are in FOLDER/files.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import tomlkit

HERE = Path(__file__).parent
CHECKOUT = HERE.parent.parent
PINS = CHECKOUT / "image" / "pins.toml"

# What A1111 asks for, as far as this checkout knows: the lines above torch.
REQUIREMENTS = (CHECKOUT / "requirements-webui.txt").read_text(encoding="utf-8").split("# torch")[0] + "torch\n"

PATHS = """\
import sys
from pathlib import Path

repositories = Path(__file__).parent.parent / "repositories"
for folder, module in (
    ("stable-diffusion-stability-ai", "ldm"),
    ("generative-models", "sgm"),
    ("k-diffusion", "k_diffusion"),
    ("BLIP", "models/blip.py"),
):
    assert (repositories / folder / module).exists(), f"no {module} in repositories/{folder}"
    sys.path.insert(0, str(repositories / folder))
"""

CACHE = """\
import os

import diskcache

from modules import paths

caches = {}


def cache(subsection):
    if subsection not in caches:
        caches[subsection] = diskcache.Cache(os.path.join(os.environ["SD_WEBUI_CACHE_DIR"], subsection))
    return caches[subsection]
"""

CLIP_SETUP = """\
import pkg_resources
from setuptools import setup

assert list(pkg_resources.parse_requirements("numpy"))
setup(name="clip", version="1.0", packages=["clip"])
"""

CONTROLNET_PRELOAD = """\
def preload(parser):
    parser.add_argument("--controlnet-dir")
    parser.add_argument("--controlnet-annotator-models-path")
"""

ADETAILER_PRELOAD = """\
def preload(parser):
    parser.add_argument("--ad-no-huggingface", action="store_true")
"""

REPOSITORIES: dict[str, dict[str, str]] = {
    "AUTOMATIC1111/stable-diffusion-webui": {
        "requirements_versions.txt": REQUIREMENTS,
        "CHANGELOG.md": "## 1.10.1\n",
        "modules/__init__.py": "",
        "modules/paths.py": PATHS,
        "modules/cache.py": CACHE,
    },
    "AUTOMATIC1111/stable-diffusion-webui-assets": {"README.md": "a stand-in\n"},
    "w-e-w/stablediffusion": {"ldm/__init__.py": ""},
    "Stability-AI/generative-models": {"sgm/__init__.py": ""},
    "crowsonkb/k-diffusion": {"k_diffusion/__init__.py": ""},
    "salesforce/BLIP": {"models/blip.py": ""},
    # They import what the extensions themselves import, so that the smoke test loads it.
    "Mikubill/sd-webui-controlnet": {
        "preload.py": CONTROLNET_PRELOAD,
        "scripts/controlnet.py": "import cv2, mediapipe, svglib.svglib, timm\n",
    },
    "Bing-su/adetailer": {
        "preload.py": ADETAILER_PRELOAD,
        "scripts/adetailer.py": "import cv2, mediapipe, rich, ultralytics\n",
    },
    "openai/CLIP": {"setup.py": CLIP_SETUP, "clip/__init__.py": "import pkg_resources\n"},
}


def make(target: Path) -> None:
    """Write every repository again."""
    for name, files in REPOSITORIES.items():
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder)
            for path, text in files.items():
                (tree / path).parent.mkdir(parents=True, exist_ok=True)
                (tree / path).write_text(text, encoding="utf-8")
            if name.endswith("/stable-diffusion-webui"):
                shutil.copy(HERE / "launch.py", tree)
                shutil.copytree(CHECKOUT / "sandbox", tree / "sandbox", ignore=shutil.ignore_patterns("__pycache__"))
            commit(tree, target / f"{name}.git")
            if name == "openai/CLIP":
                shutil.make_archive(str(target / "CLIP"), "zip", tree)


def make_pins(target: Path, address: str) -> str:
    """Write a stand-in for every file of image/pins.toml, and return a pins.toml that has them at `address`."""
    document = tomlkit.parse(PINS.read_text(encoding="utf-8"))
    for entry in document["file"]:
        path = entry["path"]
        content = f"a stand-in for {path}\n".encode()
        (target / "files" / path).parent.mkdir(parents=True, exist_ok=True)
        (target / "files" / path).write_bytes(content)
        entry["url"] = f"{address}/files/{path}"
        entry["sha256"] = hashlib.sha256(content).hexdigest()
    return tomlkit.dumps(document)


def commit(tree: Path, bare: Path) -> None:
    """Make a bare repository whose only commit is the tree. Equal trees give equal commits."""
    shutil.rmtree(bare, ignore_errors=True)
    bare.mkdir(parents=True)
    who = {f"GIT_{role}_{what}": "a1111-worker" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    when = {"GIT_AUTHOR_DATE": "2026-01-01T00:00:00Z", "GIT_COMMITTER_DATE": "2026-01-01T00:00:00Z"}

    def git(*arguments: str) -> None:
        subprocess.run(["git", *arguments], check=True, cwd=tree, env={**os.environ, **who, **when})

    git("init", "-q", "-b", "main")
    git("add", "-A")
    git("commit", "-q", "-m", "stand-in")
    git("clone", "-q", "--bare", ".", str(bare.absolute()))


if __name__ == "__main__":
    make(Path(sys.argv[1]))

"""locks/: what is installed, with versions and hashes, agrees with what was asked for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support import ROOT

LOCKS = ROOT / "locks"
ALL = sorted(LOCKS.glob("*.txt"))


def pins(lock: str) -> dict[str, set[str]]:
    """The versions of each package of a lock. There are several if versions of Python need different ones."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"(?m)^([\w.-]+)==([^ ;\\]+)", (LOCKS / f"{lock}.txt").read_text(encoding="utf-8")):
        found.setdefault(name, set()).add(version)
    return found


def asked_for(file: str) -> list[Requirement]:
    text = (ROOT / file).read_text(encoding="utf-8")
    if file == "pyproject.toml":
        (listed,) = re.findall(r"(?ms)^dependencies = \[\n(.*?)^\]", text)
        text = re.sub(r'(?m)^ *"(.*)",', r"\1", listed)
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-r")]


def test_the_locks_are_those_that_are_installed() -> None:
    assert [path.stem for path in ALL] == [
        *("adetailer", "client", "controlnet", "dev"),
        *("torch-cu128", "torch-pypi", "uv", "webui-cu128", "webui-pypi", "worker"),
    ]


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_package_has_a_version_and_a_hash_and_no_index_is_named(path: Path) -> None:
    text = re.sub(r"(?m)^#.*\n", "", path.read_text(encoding="utf-8"))

    for entry in re.split(r"(?m)^(?=\S)", text)[1:]:
        assert re.match(r"[\w.-]+==\S+( ; .*)? \\\n( +--hash=sha256:[0-9a-f]{64}( \\)?\n)+$", entry), entry
    assert "://" not in path.read_text(encoding="utf-8")


LISTS = [
    ("requirements.txt", ("worker",)),
    ("requirements.txt", ("dev",)),
    ("requirements-dev.txt", ("dev",)),
    ("pyproject.toml", ("client",)),
    ("pyproject.toml", ("dev",)),
    ("requirements-webui.txt", ("webui-pypi", "torch-pypi")),
    ("requirements-webui.txt", ("webui-cu128", "torch-cu128")),
    ("requirements-controlnet.txt", ("webui-cu128", "torch-cu128", "controlnet")),
    ("requirements-adetailer.txt", ("webui-cu128", "torch-cu128", "adetailer")),
]


@pytest.mark.parametrize(("asked", "locks"), LISTS)
def test_what_is_asked_for_is_locked(asked: str, locks: tuple[str, ...]) -> None:
    """A requirement that was changed without `make lock` fails here."""
    locked = {name: versions for lock in locks for name, versions in pins(lock).items()}

    wrong = [
        str(requirement)
        for requirement in asked_for(asked)
        if not any(map(requirement.specifier.contains, locked.get(canonicalize_name(requirement.name), ())))
    ]

    assert wrong == []


@pytest.mark.parametrize("lock", ["worker", "client"])
def test_developers_test_the_versions_that_others_get(lock: str) -> None:
    dev = pins("dev")

    assert {name: versions for name, versions in pins(lock).items() if dev.get(name) != versions} == {}


def test_the_worker_needs_nothing_of_the_clients_own() -> None:
    """So `make demo` and the image stay small."""
    assert not {"openai", "platformdirs", "webuiapi"} & set(pins("worker"))


def test_extensions_add_packages_and_replace_only_what_they_must() -> None:
    webui = {**pins("webui-cu128"), **pins("torch-cu128")}
    controlnet, adetailer = pins("controlnet"), pins("adetailer")

    replaced = {name for lock in (controlnet, adetailer) for name in lock if name in webui}

    assert replaced == {"protobuf", "timm"}  # mediapipe's and ControlNet's own needs
    assert {name for name in {*controlnet} & {*adetailer} if controlnet[name] != adetailer[name]} == set()


def test_the_two_builds_of_torch_differ_only_in_torch_and_nvidias_libraries() -> None:
    pypi, cu128 = pins("webui-pypi"), pins("webui-cu128")

    other = {name for name in {*pypi, *cu128} if pypi.get(name) != cu128.get(name)}

    assert other and all(name.startswith("nvidia-") for name in other)
    assert pypi.keys() == cu128.keys()
    assert pins("torch-pypi").keys() == pins("torch-cu128").keys() == {"torch", "torchvision", "xformers"}


@pytest.mark.parametrize("lock", ["webui-pypi", "webui-cu128", "controlnet", "adetailer"])
def test_what_only_takes_room_is_left_out_of_the_image(lock: str) -> None:
    assert not {"triton", "opencv-python", "opencv-contrib-python"} & set(pins(lock))


@pytest.mark.parametrize("lock", ["webui-pypi", "webui-cu128"])
def test_opencv_is_there_without_windows(lock: str) -> None:
    assert pins(lock)["opencv-python-headless"]

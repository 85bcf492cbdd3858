"""Imports point one way, and importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The line of packages: each imports from those before it. "" stands for the modules beside the packages.
PACKAGES = ["", "transfer", "models", "request", "webui", "delivery", "job"]

HTTP = {
    "transfer.egress",
    "transfer.connection",
    "models.civitai",
    "webui.client",
    "job.status",
}


def modules() -> dict[str, Path]:
    """Every module of the worker by its dotted name: `transfer.download`, `errors`, `handler`."""
    inside = ROOT / "a1111_worker"
    found = {
        ".".join(path.relative_to(inside).with_suffix("").parts): path
        for path in inside.rglob("*.py")
        if path.name != "__init__.py"
    }
    return {**found, "model_manager": ROOT / "model_manager.py", "handler": ROOT / "handler.py"}


MODULES = modules()


def place_of(module: str) -> int:
    """Where a module stands in the line: the two programs stand at its end."""
    if module in ("model_manager", "handler"):
        return len(PACKAGES) + (module == "handler")
    return PACKAGES.index(module.rpartition(".")[0])


def imports_of(path: Path) -> set[str]:
    """Every name that a module imports, dotted; those for type checkers alone included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def our_imports(module: str) -> set[str]:
    names = {name.removeprefix("a1111_worker.") for name in imports_of(MODULES[module])}
    return {name for name in names if name in MODULES} - {module}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_packages_import_along_the_line(module: str) -> None:
    wrong = {other for other in our_imports(module) if place_of(other) > place_of(module)}

    assert not wrong


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package or "root")
def test_no_imports_go_in_a_circle(package: str) -> None:
    left = {module: our_imports(module) for module in MODULES if place_of(module) == PACKAGES.index(package)}

    while left:
        free = {module for module, imports in left.items() if not imports & set(left)}
        assert free, f"these import one another: {sorted(left)}"
        left = {module: imports for module, imports in left.items() if module not in free}


def test_every_package_stands_in_the_line() -> None:
    folders = {path.parent.name for path in (ROOT / "a1111_worker").glob("*/__init__.py")}

    assert folders == set(PACKAGES) - {""}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_each_door_to_the_world_is_in_its_place(module: str) -> None:
    roots = {name.split(".")[0] for name in imports_of(MODULES[module])}

    assert "runpod" not in roots or module == "handler"
    assert not roots & {"requests", "urllib3"} or module in HTTP
    assert not roots & {"boto3", "botocore"} or module == "delivery.bucket"
    assert not roots & {"sandbox", "tests", "benchmarks"}


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"config", "handler", "model_manager"}))
def test_variables_are_known_to_config_alone(module: str) -> None:
    source = MODULES[module].read_text()

    assert "os.environ" not in source and "getenv" not in source


def test_importing_the_handler_imports_no_sdk_and_reads_no_environment() -> None:
    look = "import handler, sys; print('runpod' in sys.modules, 'boto3' in sys.modules, 'PIL' in sys.modules)"

    done = subprocess.run(
        [sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, env={"WARMUP": "not a flag"}, check=True
    )

    assert done.stdout.split() == ["False", "False", "False"]

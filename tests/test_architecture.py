"""Imports point one way, and importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the bottom up; a module imports from the layers below its own, and from nothing beside it.
LAYERS = [
    {"errors"},
    {"domain"},
    {
        "answers",
        "catalog",
        "logs",
        "lookout",
        "memory",
        "pictures",
        "prompt",
        "safetensors",
        "segments",
        "supervisor",
        "tally",
        "values",
    },
    {"hosts", "part", "samplers", "volume"},
    {"eviction", "fields", "leases", "line", "references", "registry"},
    {"civitai", "config", "delivery", "download", "library", "progress", "request", "webui"},
    {"arrival", "proof", "story"},
    {"composition", "manager"},
    {"readiness"},
    {"generation", "model_manager"},
    {"handler"},
]
HTTP = {"webui", "civitai", "download", "line", "progress", "hosts"}


def modules() -> dict[str, Path]:
    inside = {path.stem: path for path in (ROOT / "a1111_worker").glob("*.py") if path.stem != "__init__"}
    return {**inside, "model_manager": ROOT / "model_manager.py", "handler": ROOT / "handler.py"}


def layer_of(module: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if module in layer)


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def ours(path: Path) -> set[str]:
    names = {name.removeprefix("a1111_worker.").split(".")[0] for name in imports_of(path)}
    return names & set(modules())


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_downwards(module: str) -> None:
    wrong = {other for other in ours(modules()[module]) if layer_of(other) >= layer_of(module)}

    assert not wrong


@pytest.mark.parametrize("module", sorted(modules()))
def test_each_door_to_the_world_is_in_its_place(module: str) -> None:
    roots = {name.split(".")[0] for name in imports_of(modules()[module])}

    assert "runpod" not in roots or module == "handler"
    assert not roots & {"requests", "urllib3"} or module in HTTP
    assert not roots & {"boto3", "botocore"} or module == "delivery"
    assert not roots & {"sandbox", "tests", "benchmarks"}


@pytest.mark.parametrize("module", sorted(set(modules()) - {"config", "handler", "model_manager"}))
def test_variables_are_known_to_config_alone(module: str) -> None:
    source = modules()[module].read_text()

    assert "os.environ" not in source and "getenv" not in source


def test_importing_the_handler_imports_no_sdk_and_reads_no_environment() -> None:
    look = "import handler, sys; print('runpod' in sys.modules, 'boto3' in sys.modules, 'PIL' in sys.modules)"

    done = subprocess.run(
        [sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, env={"WARMUP": "not a flag"}, check=True
    )

    assert done.stdout.split() == ["False", "False", "False"]

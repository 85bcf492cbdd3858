"""Imports go one way, importing does nothing, and each package says what is in it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

WORKER = ROOT / "a1111_worker"

# The order of packages: each imports only from itself and from those before it. "" stands for the root modules.
PACKAGES = ["", "transfer", "models", "pictures", "request", "webui", "delivery", "job", "queries"]
PROGRAMS = ["model_manager", "handler"]

# The only modules that may use HTTP.
HTTP = {
    "transfer.egress",
    "transfer.connection",
    "models.civitai",
    "models.huggingface",
    "webui.client",
    "job.status",
}


def find_modules() -> dict[str, Path]:
    """Every module of the worker by its dotted name: `transfer.download`, `errors`, `handler`."""
    found = {
        ".".join(path.relative_to(WORKER).with_suffix("").parts): path
        for path in WORKER.rglob("*.py")
        if path.name != "__init__.py"
    }
    return {**found, **{program: ROOT / f"{program}.py" for program in PROGRAMS}}


MODULES = find_modules()


def rank_of(module: str) -> int:
    """Where a module stands in the order of packages. The programs stand at its end."""
    if module in PROGRAMS:
        return len(PACKAGES) + PROGRAMS.index(module)
    return PACKAGES.index(module.rpartition(".")[0])


def imports_of(path: Path) -> set[str]:
    """Every dotted name that a module imports, including those that only type checkers import."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def our_imports(module: str) -> set[str]:
    names = {name.removeprefix("a1111_worker.") for name in imports_of(MODULES[module])}
    return {name for name in names if name in MODULES} - {module}


def docstring_of(package: str) -> str:
    source = (WORKER / package / "__init__.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source), clean=False) or ""


def listed_in(package: str) -> list[str]:
    """The names that a package's docstring lists: four spaces, the name, two spaces or more, what it is for."""
    return re.findall(r"^ {4}(\w+) {2,}\S", docstring_of(package), re.MULTILINE)


every_module = pytest.mark.parametrize("module", sorted(MODULES))
every_package = pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package or "root")


@every_module
def test_a_module_imports_only_from_its_own_package_and_those_before_it(module: str) -> None:
    wrong = {other for other in our_imports(module) if rank_of(other) > rank_of(module)}

    assert not wrong


@every_package
def test_no_imports_go_in_a_circle(package: str) -> None:
    left = {module: our_imports(module) for module in MODULES if rank_of(module) == PACKAGES.index(package)}

    while left:
        free = {module for module, imports in left.items() if not imports & set(left)}
        assert free, f"these import one another: {sorted(left)}"
        left = {module: imports for module, imports in left.items() if module not in free}


def test_every_package_has_its_place_in_the_order() -> None:
    folders = {path.parent.name for path in WORKER.glob("*/__init__.py")}

    assert folders == set(PACKAGES) - {""}


def test_the_import_rule_that_is_written_down_is_the_one_that_is_tested() -> None:
    (rule,) = re.findall(r"^Imports go one way:\n(.*)$", docstring_of(""), re.MULTILINE)

    assert rule.split(" ← ") == ["root modules", *PACKAGES[1:], *PROGRAMS]


@every_package
def test_a_package_lists_exactly_its_modules(package: str) -> None:
    modules = [path.stem for path in (WORKER / package).glob("*.py") if path.stem != "__init__"]
    packages = [] if package else PACKAGES[1:]

    assert sorted(listed_in(package)) == sorted([*modules, *packages])


@every_package
def test_the_init_of_a_package_imports_nothing_but_the_check_of_pythons_version(package: str) -> None:
    assert imports_of(WORKER / package / "__init__.py") <= {"sys"}


@every_module
def test_only_their_own_modules_use_runpod_http_and_boto3(module: str) -> None:
    roots = {name.split(".")[0] for name in imports_of(MODULES[module])}

    assert "runpod" not in roots or module == "handler"
    assert not roots & {"requests", "urllib3"} or module in HTTP
    assert not roots & {"boto3", "botocore"} or module == "delivery.bucket"
    assert not roots & {"sandbox", "tests", "benchmarks"}


@pytest.mark.parametrize("module", sorted(set(MODULES) - set(PROGRAMS)))
def test_only_the_programs_read_the_environment(module: str) -> None:
    source = MODULES[module].read_text(encoding="utf-8")

    assert "os.environ" not in source and "getenv" not in source


# Programs that know one another only by what they send. Each may import itself and, of the others, what stands here.
APART: dict[str, set[str]] = {
    "a1111_client": set(),
    "a1111_worker": set(),
    "local_queue": set(),
    "sandbox": {"a1111_worker", "local_queue"},
    "image": {"a1111_worker", "model_manager"},
}
OURS = {*APART, *PROGRAMS, "tests", "benchmarks"}


@pytest.mark.parametrize("package", APART)
def test_the_client_the_worker_and_the_sandbox_do_not_import_one_another(package: str) -> None:
    roots = {name.split(".")[0] for path in (ROOT / package).rglob("*.py") for name in imports_of(path)}

    assert roots & OURS <= {package, *APART[package]}


@pytest.mark.parametrize(
    "package",
    sorted(path.parent for name in ("a1111_client", "local_queue") for path in (ROOT / name).rglob("__init__.py")),
    ids=lambda package: str(package.relative_to(ROOT)),
)
def test_a_package_of_the_client_and_of_the_queue_lists_exactly_what_is_in_it(package: Path) -> None:
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8")), clean=False) or ""

    modules = {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}
    packages = {path.parent.name for path in package.glob("*/__init__.py")}

    assert set(re.findall(r"^ {4}(\w+) {2,}\S", docstring, re.MULTILINE)) == modules | packages
    assert imports_of(package / "__init__.py") == set()


def test_importing_the_handler_imports_no_sdk_and_reads_no_environment() -> None:
    script = "import handler, sys; print('runpod' in sys.modules, 'boto3' in sys.modules, 'PIL' in sys.modules)"

    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"WARMUP": "not a flag"},
        check=True,
    )

    assert done.stdout.split() == ["False", "False", "False"]

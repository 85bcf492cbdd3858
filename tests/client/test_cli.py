"""The command `a1111`, as a shell runs it."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import a1111_client
import a1111_worker
from a1111_client.cli import app
from tests.client.test_infotext import picture
from tests.support import ROOT

RUNNER = CliRunner()
TEXT = "a lighthouse\nNegative prompt: fog\nSteps: 2, Sampler: Euler, Seed: 5"


def test_the_client_and_the_worker_have_one_version() -> None:
    assert a1111_client.__version__ == a1111_worker.__version__
    assert RUNNER.invoke(app, ["--version"]).stdout.strip() == a1111_client.__version__


def test_every_package_of_the_client_is_installed_with_it() -> None:
    (packages,) = re.findall(r"(?m)^packages = (\[.*\])$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))

    there = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "a1111_client").rglob("__init__.py")}

    assert set(ast.literal_eval(packages)) == there


def test_info_shows_what_a_picture_carries(tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(picture("png", TEXT))

    shown, as_json = RUNNER.invoke(app, ["info", str(file)]), RUNNER.invoke(app, ["info", str(file), "--json"])

    assert shown.stdout.strip() == TEXT
    assert json.loads(as_json.stdout)["Seed"] == "5"


@pytest.mark.parametrize(
    ("content", "reason", "status"),
    [
        (None, "No such file or directory", 2),
        (b"not a picture", "the bytes are no picture", 2),
        (picture("png", ""), "carries no settings of A1111", 1),
    ],
)
def test_info_says_why_it_shows_nothing(tmp_path: Path, content: bytes | None, reason: str, status: int) -> None:
    file = tmp_path / "picture.png"
    if content is not None:
        file.write_bytes(content)

    done = RUNNER.invoke(app, ["info", str(file)])

    assert (done.exit_code, done.stdout) == (status, "")
    assert done.stderr == f"a1111: {file}: {reason}\n"

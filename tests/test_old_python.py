"""An older Python is told what is needed, in one line."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

TOO_OLD = "a1111-worker needs Python 3.10 or newer, and this is Python 3.9\n"


@pytest.mark.parametrize("program", ["handler", "model_manager", "sandbox.__main__"])
def test_a_python_that_is_too_old_ends_with_one_line(program: str) -> None:
    """This Python says that it is 3.9: CI has no older one."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.version_info = (3, 9, 18); import {program}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    assert (done.returncode, done.stdout, done.stderr) == (1, "", TOO_OLD)
    path = ROOT / f"{program.replace('.', '/')}.py"
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 9))  # else 3.9 would print a syntax error


def test_make_says_what_is_needed_before_it_makes_anything(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 9, 18); $2"\n')
    old.chmod(0o755)

    done = subprocess.run(
        ["make", "--always-make", "demo", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 2
    assert f"needs Python 3.10 or newer, and {old} is 3.9" in done.stderr
    assert not (tmp_path / "venv").exists()

"""The fixtures of the package's tests."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.storage import SandboxStorage
from tests.transfer.download_setup import DownloadSetup, download_setup


@pytest.fixture
def download(tmp_path: Path) -> Iterator[DownloadSetup]:
    with SandboxStorage() as storage:
        yield download_setup(tmp_path, storage)


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """No test may leave a thread or an open file of a download."""
    files = set(_open_parts())

    yield

    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("download-")]
    assert set(_open_parts()) <= files


def _open_parts() -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):  # noqa: PTH208 - numbers, some gone by the next line
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{number}"))  # noqa: PTH115 - what it leads to need not exist
    return [name for name in found if name.endswith(".part")]

"""The fixtures that several files of the client's tests use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.client.started import Started


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """A gateway in front of the sandbox's queue and a real worker."""
    its = Started(tmp_path_factory.mktemp("gateway"))
    try:
        yield its
    finally:
        its.kill()

"""A storage with one file in it, and a small version of the engine that downloads it."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from pathlib import Path
from typing import Any

import pytest

from a1111_worker.context import Deadline, JobContext
from a1111_worker.transfer.download import Downloader, Fetched, OnBytes, Source
from a1111_worker.transfer.egress import EgressPolicy
from a1111_worker.transfer.ranges import MiB, Tuning
from sandbox.storage import SandboxStorage

KiB = 1024
SIZE = 2 * MiB + 12_345

# Every period is short and every range is small, so that a file of two MiB is a large one.
QUICK = Tuning(
    min_range_bytes=64 * KiB,
    max_range_bytes=256 * KiB,
    min_steal_bytes=16 * KiB,
    buffer_bytes=32 * KiB,
    remember_bytes=128 * KiB,
    remember_seconds=0.05,
    stall_seconds=0.3,
    patience_seconds=1.0,
    longest_step=0.3,
    pause=0.01,
    pause_most=0.02,
    retry_after_most=0.05,
    busy_seconds=0.3,
    poll_seconds=0.01,
)

# If a connection's range is stolen, the bytes that were on their way to it come twice. So tests that count the bytes
# steal none.
EXACT = dataclasses.replace(QUICK, min_steal_bytes=SIZE)

# A process that fetches a URL to a path. The third argument is its Tuning as JSON; a fourth, its seconds.
FETCH = """
import json, sys
from pathlib import Path
from a1111_worker.context import Deadline, JobContext
from a1111_worker.transfer.download import Downloader, Source
from a1111_worker.transfer.egress import EgressPolicy
from a1111_worker.transfer.ranges import Tuning
origin = "/".join(sys.argv[1].split("/")[:3])
downloader = Downloader(EgressPolicy([origin]), Tuning(**json.loads(sys.argv[3])))
context = JobContext(Deadline(*map(float, sys.argv[4:])))
downloader.fetch(Source("a model", lambda: sys.argv[1]), Path(sys.argv[2]), context)
"""


class Links:
    """Signs links to one file of a storage, and counts them."""

    def __init__(self, storage: SandboxStorage, key: str) -> None:
        self._storage = storage
        self._key = key
        self.count = 0

    def __call__(self) -> str:
        self.count += 1
        return self._storage.sign(self._key)


@dataclasses.dataclass
class DownloadSetup:
    """A storage with one file in it, and a folder to download it to."""

    storage: SandboxStorage
    folder: Path
    content: bytes = dataclasses.field(repr=False)
    key: str
    links: Links

    @property
    def part(self) -> Path:
        return self.folder / "model.part"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def fetch(
        self,
        tuning: Tuning = QUICK,
        *,
        deadline: Deadline | None = None,
        on_bytes: OnBytes | None = None,
        policy: EgressPolicy | None = None,
        **source: Any,
    ) -> Fetched:
        """Download the file. `source` overrides the fields of its Source."""
        source = {"label": "a model", "link": self.links, **source}
        downloader = Downloader(policy or EgressPolicy([self.storage.url]), tuning)
        return downloader.fetch(Source(**source), self.part, JobContext(deadline or Deadline(60)), on_bytes)

    def assert_whole(self, fetched: Fetched) -> None:
        """The part has exactly the file's bytes, and its size and hash are reported."""
        part = self.part.read_bytes()
        if part != self.content:
            pairs = enumerate(zip(part, self.content, strict=False))
            differs_at = next((at for at, (here, there) in pairs if here != there), min(len(part), len(self.content)))
            pytest.fail(f"the part has {len(part):,} bytes of {len(self.content):,}, and differs at {differs_at:,}")
        if (fetched.size, fetched.sha256) != (len(self.content), self.sha256):
            pytest.fail(f"{fetched} is reported of {len(self.content):,} bytes with the SHA-256 {self.sha256}")

    def replace_content(self, content: bytes, *, at: int = 0) -> None:
        """Have other bytes in the storage, under the same links, as soon as it has sent `at` bytes."""
        self.content = content
        newer = self.folder.parent / "newer.safetensors"
        newer.write_bytes(content)
        if at:
            self.storage.at(at, lambda: self.storage.replace(self.key, newer))
        else:
            self.storage.replace(self.key, newer)


def download_setup(tmp_path: Path, storage: SandboxStorage, size: int = SIZE) -> DownloadSetup:
    block = random.Random(size).randbytes(min(size, 8 * MiB))
    content = (block * (size // len(block) + 1))[:size] if size else b""
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    key = storage.put(file)
    folder = tmp_path / "cache"
    folder.mkdir()
    return DownloadSetup(storage, folder, content, key, Links(storage, key))

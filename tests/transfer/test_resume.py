"""What a download leaves on disk, and how the next one goes on with it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from a1111_worker.context import Deadline
from a1111_worker.errors import JobCancelled, ModelRejected, VolumeFailed
from a1111_worker.transfer.partial_file import PartialFile, ranges_file
from a1111_worker.transfer.ranges import MiB
from sandbox.storage import SandboxStorage, ServerFault
from tests.support import ROOT
from tests.transfer.download_setup import EXACT, FETCH, QUICK, SIZE, DownloadSetup, download_setup


def test_a_complete_part_is_hashed_again_without_a_request(download: DownloadSetup) -> None:
    download.fetch(sha256=download.sha256)
    asked = len(download.storage.asked)

    fetched = download.fetch(sha256=download.sha256)

    download.assert_whole(fetched)
    assert (fetched.received, fetched.resumed) == (0, SIZE)
    assert len(download.storage.asked) == asked
    assert download.links.count == 1


def cut_short(download: DownloadSetup, **options: Any) -> None:
    """Leave about half of the file behind."""
    deadline = Deadline(60)
    download.storage.rate = 1e6
    download.storage.at(download.storage.bytes_sent + SIZE // 2, deadline.cancel)
    with pytest.raises(JobCancelled):
        download.fetch(deadline=deadline, **options)
    download.storage.rate = None


def test_the_log_tells_what_an_earlier_download_left_from_what_is_received(
    download: DownloadSetup, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    cut_short(download)
    new = caplog.text
    caplog.clear()

    download.fetch()

    assert "on disk already" not in new
    assert "MB of it are on disk already, from an earlier download" in caplog.text
    assert "MB received in" in caplog.text and "all 2.1 MB are on disk" in caplog.text


def test_what_is_there_is_saved_at_the_end_even_if_it_was_never_saved_before(download: DownloadSetup) -> None:
    cut_short(download, tuning=dataclasses.replace(QUICK, remember_bytes=SIZE * 2, remember_seconds=60))

    fetched = download.fetch()

    download.assert_whole(fetched)
    assert fetched.resumed > 0


@pytest.mark.parametrize(
    "spoil_state",
    [
        lambda download: ranges_file(download.part).unlink(),
        lambda download: ranges_file(download.part).write_text(""),
        lambda download: ranges_file(download.part).write_text('{"version": 1, "size": 20'),
        lambda download: ranges_file(download.part).write_text("[]"),
        lambda download: ranges_file(download.part).write_text(
            '{"version": 1, "size": -1, "etag": null, "sha256": null}'
        ),
        lambda download: _edit(download, version=2),  # from the future
        lambda download: _edit(download, done=[[0, SIZE * 2]]),
        lambda download: _edit(download, done=[[9, 5]]),
        lambda download: _edit(download, done=[["0", "5"]]),
        lambda download: _edit(download, size=SIZE + 5),  # of another file
        lambda download: _edit(download, etag='"another"'),
        lambda download: os.truncate(download.part, 10),
        lambda download: _edit(
            download, boot="another"
        ),  # the machine was restarted, and no hash is known that could decide
    ],
)
def test_after_a_saved_state_that_is_wrong_the_download_starts_over(
    download: DownloadSetup, spoil_state: Callable[[DownloadSetup], object]
) -> None:
    cut_short(download)
    spoil_state(download)

    fetched = download.fetch()

    download.assert_whole(fetched)
    assert fetched.resumed == 0


def _edit(download: DownloadSetup, **fields: Any) -> None:
    saved = json.loads(ranges_file(download.part).read_text())
    ranges_file(download.part).write_text(json.dumps({**saved, **fields}))


@pytest.mark.parametrize("options", [{"sha256": "ab" * 32}, {"size": SIZE + 1}])
def test_a_part_of_another_file_is_not_resumed(download: DownloadSetup, options: dict[str, Any]) -> None:
    cut_short(download, sha256=download.sha256)
    download.storage.asked.clear()

    with contextlib.suppress(ModelRejected):  # because of the other size
        download.fetch(**options)

    assert download.storage.asked[0].headers["range"].startswith("bytes=0-")


def test_bytes_that_were_there_before_are_hashed_too(download: DownloadSetup) -> None:
    cut_short(download, sha256=download.sha256)
    with download.part.open("r+b") as part:
        part.write(b"\x00" * 100)  # a crash of the machine lost them

    fetched = download.fetch(sha256=download.sha256)

    assert fetched.resumed > 0
    assert fetched.sha256 == hashlib.sha256(download.part.read_bytes()).hexdigest() != download.sha256


def test_a_part_from_before_a_restart_of_the_machine_is_resumed_if_the_hash_is_known(download: DownloadSetup) -> None:
    cut_short(download, sha256=download.sha256)
    _edit(download, boot="another")

    fetched = download.fetch(sha256=download.sha256)

    download.assert_whole(fetched)
    assert fetched.resumed > 0


def test_a_file_that_was_replaced_since_then_starts_over(download: DownloadSetup) -> None:
    cut_short(download)
    download.replace_content(random.Random(2).randbytes(SIZE))

    fetched = download.fetch()

    download.assert_whole(fetched)
    assert fetched.resumed == 0


def test_a_longer_part_that_was_there_before_is_cut_to_the_files_size(download: DownloadSetup) -> None:
    download.part.write_bytes(b"x" * (SIZE * 2))

    fetched = download.fetch()

    download.assert_whole(fetched)


# Run in a process of its own, since the limit is the process's.
_WITH_LIMIT = """
import resource, sys
from pathlib import Path
from a1111_worker.context import JobContext
from a1111_worker.transfer.download import Downloader, Source
from a1111_worker.errors import VolumeFull
from a1111_worker.transfer.egress import EgressPolicy
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
origin = "/".join(sys.argv[1].split("/")[:3])
try:
    Downloader(EgressPolicy([origin])).fetch(Source("a model", lambda: sys.argv[1]), Path(sys.argv[2]), JobContext())
except VolumeFull as error:
    print(error.code, error.message)
"""


@pytest.mark.parametrize(
    ("framing", "is_left"),
    [
        ("length", False),  # the size is known: the part is removed before a byte is written
        ("chunked", True),  # it is unknown: a lack of room shows while writing
    ],
)
def test_a_full_disk_is_explained_in_words(download: DownloadSetup, framing: Any, is_left: bool) -> None:
    download.storage.fail(ServerFault(whole=True, framing=framing), times=None)
    command = [sys.executable, "-c", _WITH_LIMIT, download.storage.sign(download.key), str(download.part), "1000000"]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)

    assert done.stdout.startswith("VOLUME_FULL a model: there is no room"), done.stderr
    assert str(download.folder) not in done.stdout
    assert download.part.exists() is is_left


def test_a_missing_folder_is_a_volume_that_cannot_be_used(download: DownloadSetup) -> None:
    download.folder.rmdir()

    with pytest.raises(VolumeFailed, match="cannot be used"):
        download.fetch()


def test_a_symbolic_link_in_place_of_a_part_is_not_followed(download: DownloadSetup, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("mine")
    download.part.symlink_to(target)

    with pytest.raises(VolumeFailed):
        download.fetch()

    assert target.read_text() == "mine"


# --- killed at any moment


@pytest.mark.parametrize("kills", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_a_download_that_is_killed_at_random_moments_goes_on_where_it_was(download: DownloadSetup, kills: int) -> None:
    download.storage.total_rate = 8e6
    seed = random.Random(kills)
    lost_before = 0
    for _ in range(kills):
        tuning = json.dumps(dataclasses.asdict(QUICK))
        command = [sys.executable, "-c", FETCH, download.storage.sign(download.key), str(download.part), tuning]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)

        def kill(process: subprocess.Popen[bytes] = process) -> None:
            process.send_signal(signal.SIGKILL)

        download.storage.at(download.storage.bytes_sent + seed.randrange(1, 2 * SIZE // kills), kill)
        process.wait(60)
        if process.stdout:
            process.stdout.close()
        # Sent, but not saved: at most a range and a buffer of each connection.
        lost = download.storage.bytes_sent - _saved_bytes(download)
        assert lost - lost_before <= 16 * (QUICK.max_range_bytes + QUICK.buffer_bytes)
        lost_before = max(lost_before, lost)
    download.storage.total_rate = None

    fetched = download.fetch(EXACT)

    download.assert_whole(fetched)
    assert fetched.received == SIZE - fetched.resumed


def _saved_bytes(download: DownloadSetup) -> int:
    """How many bytes are there, as the next download sees it."""
    part = PartialFile(download.part)
    try:
        saved = part.load_state()
    finally:
        part.close()
    return sum(end - start for start, end in saved.done) if saved else 0


# The most memory that the process had, beyond a process that has only imported the same modules.
_PEAK = """
import re, subprocess
look = "print(re.search(r'VmHWM:\\\\s+(\\\\d+)', open('/proc/self/status').read())[1])"
imports = "import a1111_worker.transfer.download, re; " + look
idle = int(subprocess.run([sys.executable, "-c", imports], stdout=subprocess.PIPE, check=True).stdout)
print((int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) - idle) * 1024)
"""


@pytest.mark.slow
def test_memory_stays_small_whatever_the_size(tmp_path: Path) -> None:
    with SandboxStorage() as storage:
        download = download_setup(tmp_path, storage, 400 * MiB)
        command = [sys.executable, "-c", FETCH + _PEAK, storage.sign(download.key), str(download.part), "{}"]

        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True)

        assert int(done.stdout) < 64 * MiB

"""From a link to bytes on disk, over lines that break in every way."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import hashlib
import http.client
import json
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from a1111_worker.context import Deadline
from a1111_worker.errors import (
    DownloadFailed,
    JobCancelled,
    JobTimeout,
    ModelError,
    ModelNotFound,
    ModelRejected,
    PartialFileLost,
    VolumeFull,
)
from a1111_worker.transfer.connection import Body, Busy, Changed, Gone, Hiccup, LinkRefused, Unranged, judge
from a1111_worker.transfer.download import Downloader, Fetched
from a1111_worker.transfer.egress import EgressPolicy
from a1111_worker.transfer.partial_file import PartialFile, PartialFileState, ranges_file
from a1111_worker.transfer.ranges import (
    ByteRange,
    ByteRanges,
    ConcurrencyTuner,
    MiB,
    Patience,
    Tuning,
    Want,
    longest_piece,
    piece_size,
    shares,
    too_slow,
)
from sandbox.server import Exchange, Server
from sandbox.storage import (
    CUT,
    HTML_PAGE,
    RESET,
    SILENCE,
    SLOW_DOWN,
    STORE_ERROR,
    Fault,
    Storage,
)

ROOT = Path(__file__).parent.parent.parent
KiB = 1024
SIZE = 2 * MiB + 12_345

# The engine in miniature: every period short, every piece small, so that a file of two MiB is a large one.
QUICK = Tuning(
    start=4,
    piece_least=64 * KiB,
    piece_most=256 * KiB,
    steal_least=16 * KiB,
    small=64 * KiB,
    buffer=64 * KiB,
    flush=32 * KiB,
    remember_bytes=128 * KiB,
    remember_seconds=0.05,
    stall_seconds=0.3,
    patience_seconds=1.0,
    pause=0.01,
    pause_most=0.02,
    retry_after_most=0.05,
    settle=0.05,
    grow_again=0.3,
    tick=0.01,
)

# A half that is taken from a connection costs what was on its way to it: none are where bytes are counted.
EXACT = dataclasses.replace(QUICK, steal_least=SIZE)


class Source:
    """A storage's links to one of its files, counted."""

    def __init__(self, storage: Storage, key: str) -> None:
        self._sign: Callable[[], str] = lambda: storage.sign(key)
        self.asked: list[bool] = []

    def link(self, *, renew: bool) -> str:
        self.asked.append(renew)
        return self._sign()


class Fixed:
    """Always the same URL."""

    def __init__(self, url: str) -> None:
        self.url = url

    def link(self, *, renew: bool) -> str:
        return self.url


@dataclasses.dataclass
class World:
    """A storage with one file in it, and somewhere to put it."""

    storage: Storage
    folder: Path
    content: bytes = dataclasses.field(repr=False)
    key: str
    source: Source

    @property
    def part(self) -> Path:
        return self.folder / "model.part"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def fetch(self, tuning: Tuning = QUICK, **options: Any) -> Fetched:
        options.setdefault("deadline", Deadline(60))
        options.setdefault("source", self.source)
        return Downloader(EgressPolicy([self.storage.url]), tuning).fetch(part=self.part, **options)

    def is_right(self, fetched: Fetched) -> bool:
        return (
            self.part.read_bytes() == self.content
            and fetched.size == len(self.content)
            and fetched.sha256 in (None, self.sha256)
        )


def make_world(tmp_path: Path, storage: Storage, size: int = SIZE) -> World:
    block = random.Random(size).randbytes(min(size, 8 * MiB))
    content = (block * (size // len(block) + 1))[:size] if size else b""
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    key = storage.put(file)
    folder = tmp_path / "cache"
    folder.mkdir()
    return World(storage, folder, content, key, Source(storage, key))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with Storage() as storage:
        yield make_world(tmp_path, storage)


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


# --- a line as it should be


def test_a_file_arrives_whole_and_hashed_over_several_connections_with_one_link(world: World) -> None:
    fetched = world.fetch(EXACT)

    assert world.is_right(fetched)
    assert fetched.sha256 == world.sha256
    assert fetched.received == SIZE
    assert fetched.connections > 1
    assert world.source.asked == [False]


@pytest.mark.parametrize(
    ("size", "connections"),
    [
        (1, 1),
        (64 * KiB, 1),
        (200 * KiB, 2),  # up to four times the smallest
        (SIZE, 4),
    ],
)
def test_how_many_connections_a_file_begins_with(tmp_path: Path, size: int, connections: int) -> None:
    with Storage() as storage:
        world = make_world(tmp_path, storage, size)

        fetched = world.fetch(dataclasses.replace(QUICK, connections=4), size=size)

    assert world.is_right(fetched)
    assert fetched.connections <= connections
    assert storage.peak_connections <= connections


@pytest.mark.parametrize("size", [1, 2, 64 * KiB - 1, 64 * KiB, 64 * KiB + 1, 320 * KiB, MiB + 1])
def test_any_size_arrives(tmp_path: Path, size: int) -> None:
    with Storage() as storage:
        world = make_world(tmp_path, storage, size)

        fetched = world.fetch(EXACT)

        assert world.is_right(fetched)
        assert fetched.received == size


def test_backblaze_without_etags_is_read_in_ranges_too(tmp_path: Path) -> None:
    with Storage(form="b2") as storage:
        world = make_world(tmp_path, storage)

        fetched = world.fetch()

    assert world.is_right(fetched)
    assert len(storage.ranges) > 1 and None not in storage.ranges


def test_what_is_asked_for_names_the_worker_and_refuses_compression(world: World) -> None:
    world.fetch()

    for asked in world.storage.asked:
        assert asked.method == "GET"
        assert asked.headers["user-agent"].startswith("a1111-worker/")
        assert asked.headers["accept-encoding"] == "identity"
        assert "authorization" not in asked.headers


def test_progress_grows_to_the_end_and_is_told_by_one_thread(world: World) -> None:
    told: list[tuple[int, int | None, int]] = []
    world.storage.line_rate = 4e6

    world.fetch(on_progress=lambda done, total: told.append((done, total, threading.get_ident())))

    assert told[-1][:2] == (SIZE, SIZE)
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert {thread for _, _, thread in told} == {threading.get_ident()}


def test_a_listener_that_fails_does_not_break_the_download(world: World, caplog: pytest.LogCaptureFixture) -> None:
    def listen(done: int, total: int | None) -> None:
        raise RuntimeError("no ear")

    fetched = world.fetch(on_progress=listen)

    assert world.is_right(fetched)
    assert "could not be told" in caplog.text


def test_the_log_names_the_host_and_never_the_signed_link(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    world.storage.reset_after = [1000]

    world.fetch(label="'Detail Tweaker XL'")

    assert "'Detail Tweaker XL'" in caplog.text
    assert world.storage.url in caplog.text
    assert "X-Amz" not in caplog.text
    assert world.key not in caplog.text


def test_without_a_proof_nothing_is_hashed(world: World) -> None:
    fetched = world.fetch(prove=False)

    assert world.is_right(fetched)
    assert fetched.sha256 is None


# --- lines that break: the right file in the end, by the same download


def spoil(world: World, spoiling: Callable[[Storage], None]) -> Fetched:
    spoiling(world.storage)
    return world.fetch()


def fails(fault: Fault, times: int | None = 1) -> Callable[[Storage], None]:
    return lambda storage: storage.fail(fault, times=times)


def sets(**knobs: Any) -> Callable[[Storage], None]:
    def spoiling(storage: Storage) -> None:
        for name, value in knobs.items():
            setattr(storage, name, value)

    return spoiling


@pytest.mark.parametrize(
    "spoiling",
    [
        fails(RESET),  # before an answer
        fails(CUT),
        fails(SILENCE),  # until the read times out
        fails(STORE_ERROR),
        fails(STORE_ERROR, 3),
        fails(Fault(status=522, body=b"<html>", headers={"content-type": "text/html"})),  # Cloudflare's own page
        fails(SLOW_DOWN),
        fails(Fault(status=429, headers={"retry-after": "3600"})),  # asked too much: capped
        fails(Fault(status=408)),
        sets(cut_after=[0, 1, 1000, 200_000]),  # FIN
        sets(reset_after=[0, 1, 1000, 200_000]),  # RST
        sets(stall_after=[0, 1000, 100_000]),  # nothing comes any more
        sets(trickle=[1.0, 50.0]),  # so little that no timeout strikes
        sets(reset_every=300_000),
        sets(max_connections=1),  # 503 for every other
        sets(max_connections=3),
        fails(Fault(missing=100)),  # a length that does not fit the range
        fails(Fault(extra=100)),  # more bytes than the range: not taken for the next answer
        fails(Fault(shift=1000)),  # another range than the one asked for
        fails(Fault(content_range="bytes 5-99/100")),
        fails(Fault(content_range="nonsense")),
        sets(latency=0.02),
    ],
)
def test_a_line_that_breaks_costs_time_and_never_a_byte(world: World, spoiling: Callable[[Storage], None]) -> None:
    fetched = spoil(world, spoiling)

    assert world.is_right(fetched)
    assert world.source.asked == [False]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(whole=True),  # Range is not offered: 200 and everything
        Fault(whole=True, framing="chunked"),
        Fault(whole=True, framing="close"),  # and nobody says how long it is
        Fault(content_range=f"bytes 0-{64 * KiB - 1}/*"),  # how long the whole is stays open: asked without a range
        Fault(status=416),
    ],
)
def test_a_server_without_ranges_is_read_in_one_stream(world: World, fault: Fault) -> None:
    world.storage.fail(fault, times=None if fault.whole else 1)

    fetched = world.fetch()

    assert world.is_right(fetched)
    assert fetched.connections == 1


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_stream_that_is_cut_begins_again(world: World, framing: Any) -> None:
    world.storage.fail(Fault(whole=True, framing=framing, cut_after=500_000), times=2)
    world.storage.fail(Fault(whole=True, framing=framing), times=None)

    fetched = world.fetch()

    assert world.is_right(fetched)
    assert len(world.storage.ranges) == 3


def test_ranges_in_chunks_are_ranges(world: World) -> None:
    world.storage.fail(Fault(framing="chunked"), times=None)

    fetched = world.fetch(EXACT)

    assert world.is_right(fetched)
    assert len(world.storage.ranges) > 1 and None not in world.storage.ranges
    assert fetched.received == SIZE


def test_a_server_that_forgets_ranges_for_once_costs_one_answer(world: World) -> None:
    world.fetch(deadline=Deadline(60))
    world.part.unlink()
    ranges_file(world.part).unlink()
    answers = len(world.storage.ranges)
    world.storage.at(world.storage.bytes_sent + 600_000, lambda: world.storage.fail(Fault(whole=True)))

    fetched = world.fetch()

    assert world.is_right(fetched)
    assert fetched.received < 2 * SIZE
    assert len(world.storage.ranges) > answers


def test_a_file_that_is_replaced_midway_is_never_mixed(world: World, tmp_path: Path) -> None:
    world.storage.rate = 4e6
    newer = tmp_path / "newer.safetensors"
    world.content = random.Random(2).randbytes(SIZE)
    newer.write_bytes(world.content)
    world.storage.at(SIZE // 2, lambda: world.storage.replace(world.key, newer))

    fetched = world.fetch()

    assert world.is_right(fetched)


def test_a_file_that_is_replaced_by_a_shorter_one_is_never_mixed(tmp_path: Path) -> None:
    with Storage(form="b2") as storage:  # no ETag: the size tells
        world = make_world(tmp_path, storage)
        newer = tmp_path / "newer.safetensors"
        world.content = random.Random(2).randbytes(SIZE - 1000)
        newer.write_bytes(world.content)
        storage.at(SIZE // 2, lambda: storage.replace(world.key, newer))

        fetched = world.fetch()

        assert world.is_right(fetched)


def test_a_file_that_never_stays_the_same_fails(world: World) -> None:
    def changing() -> None:
        world.storage.replace(world.key, world.folder.parent / "model.safetensors")
        world.storage.at(world.storage.bytes_sent + 100_000, changing)

    world.storage.at(100_000, changing)

    with pytest.raises(DownloadFailed, match="changed while it was downloaded"):
        world.fetch()


def test_a_flipped_byte_shows_in_the_hash(world: World) -> None:
    world.storage.flip_at = [SIZE // 2]

    fetched = world.fetch(sha256=world.sha256)

    assert fetched.size == SIZE
    assert fetched.sha256 == hashlib.sha256(world.part.read_bytes()).hexdigest() != world.sha256


@pytest.mark.parametrize("sixteenth", range(16))
def test_a_reset_at_every_sixteenth_of_the_file_is_not_noticed(world: World, sixteenth: int) -> None:
    world.storage.reset_at = [SIZE * sixteenth // 16]

    fetched = world.fetch()

    assert world.is_right(fetched)
    assert fetched.received <= SIZE * 1.05
    assert world.source.asked == [False]


def test_a_slow_connection_is_relieved_by_the_others(world: World) -> None:
    world.storage.trickle = [None, 20_000.0]  # below the others, above the least there may be

    fetched = world.fetch(dataclasses.replace(QUICK, stall_seconds=60, patience_seconds=60))

    assert world.is_right(fetched)


def test_more_connections_are_opened_where_each_is_slow(world: World) -> None:
    world.storage.rate = 250_000

    fetched = world.fetch(dataclasses.replace(QUICK, min_speed=1.0))

    assert world.is_right(fetched)
    assert fetched.connections == 16


def test_no_more_connections_than_allowed_serve_all_files_together(tmp_path: Path) -> None:
    with Storage() as storage:
        storage.rate = 1e6
        keys = []
        for number in range(5):
            file = tmp_path / f"{number}.safetensors"
            file.write_bytes(random.Random(number).randbytes(600_000))
            keys.append((file, storage.put(file)))
        downloader = Downloader(EgressPolicy([storage.url]), dataclasses.replace(QUICK, connections=6))
        fetched: dict[Path, Fetched] = {}

        def fetch(file: Path, key: str) -> None:
            part = file.with_suffix(".part")
            fetched[file] = downloader.fetch(Source(storage, key), part, deadline=Deadline(60))

        threads = [threading.Thread(target=fetch, args=pair) for pair in keys]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert [file.with_suffix(".part").read_bytes() == file.read_bytes() for file, _ in keys] == [True] * 5
    assert len(fetched) == 5
    # The server notices an end a moment later than the next one begins; without the limit there would be 20 and more.
    assert storage.peak_connections <= 6 + 2


def test_a_file_that_is_only_prepared_gives_way(tmp_path: Path) -> None:
    with Storage() as storage:
        storage.rate = 500_000
        world = make_world(tmp_path, storage)
        urgent = tmp_path / "urgent.safetensors"
        urgent.write_bytes(random.Random(7).randbytes(600_000))
        urgent_key = storage.put(urgent)
        downloader = Downloader(
            EgressPolicy([storage.url]), dataclasses.replace(QUICK, connections=4, min_speed=1, stall_seconds=60)
        )
        order: list[str] = []
        flows = threading.Event()

        def prepare() -> None:
            downloader.fetch(
                world.source,
                world.part,
                deadline=Deadline(60),
                foreground=lambda: False,
                on_progress=lambda done, total: flows.set() if done else None,
            )
            order.append("prepared")

        thread = threading.Thread(target=prepare)
        thread.start()
        flows.wait()
        fetched = downloader.fetch(Source(storage, urgent_key), tmp_path / "urgent.part", deadline=Deadline(60))
        order.append("urgent")
        thread.join()

    assert order == ["urgent", "prepared"]
    assert fetched.connections == 4
    assert world.part.read_bytes() == world.content


@dataclasses.dataclass
class Race:
    """Two files over one downloader, the second one begun when the first one flows."""

    storage: Storage
    folder: Path
    tuning: Tuning
    finished: list[str] = dataclasses.field(default_factory=list)

    def run(
        self, sizes: tuple[int, int], foreground: tuple[Callable[[], bool], Callable[[], bool]], **listens: Any
    ) -> None:
        downloader = Downloader(EgressPolicy([self.storage.url]), self.tuning)
        flows = threading.Event()

        def fetch(number: int) -> None:
            file = self.folder / f"{number}.safetensors"
            file.write_bytes(random.Random(number).randbytes(sizes[number]))
            part = file.with_suffix(".part")

            def listen(done: int, total: int | None) -> None:
                if done:
                    flows.set()
                    listens.get("second" if number else "first", lambda: None)()

            downloader.fetch(
                Source(self.storage, self.storage.put(file)),
                part,
                deadline=Deadline(60),
                foreground=foreground[number],
                on_progress=listen,
            )
            assert part.read_bytes() == file.read_bytes()
            self.finished.append("second" if number else "first")

        first = threading.Thread(target=fetch, args=(0,))
        first.start()
        flows.wait()
        fetch(1)
        first.join()


def test_a_file_gives_its_connections_beyond_its_share_to_another_one_at_once(tmp_path: Path) -> None:
    with Storage() as storage:
        storage.rate = 500_000
        # Four pieces are all of it: nobody comes to the end of one before the file is there.
        tuning = dataclasses.replace(EXACT, connections=4, piece_least=SIZE // 4, piece_most=SIZE, stall_seconds=60)
        race = Race(storage, tmp_path, dataclasses.replace(tuning, min_speed=1))

        race.run((SIZE, 400_000), (lambda: True, lambda: True))

    assert race.finished == ["second", "first"]


def test_whose_turn_it_is_may_change_while_files_are_on_their_way(tmp_path: Path) -> None:
    with Storage() as storage:
        storage.rate = 500_000
        tuning = dataclasses.replace(QUICK, connections=1, min_speed=1, stall_seconds=60)
        race, turn = Race(storage, tmp_path, tuning), threading.Event()

        race.run((600_000, SIZE), (turn.is_set, lambda: not turn.is_set()), second=turn.set)

    assert race.finished == ["first", "second"]


# --- links


def test_a_link_that_expires_midway_is_asked_for_again(world: World) -> None:
    world.storage.at(100_000, world.storage.expire_links)

    fetched = world.fetch(EXACT)

    assert world.is_right(fetched)
    assert world.source.asked == [False, True]


def test_a_link_that_is_never_good_is_asked_for_three_more_times(world: World) -> None:
    world.storage.link_life = -1

    with pytest.raises(DownloadFailed, match="403"):
        world.fetch()

    assert world.source.asked == [False, True, True, True]


@pytest.mark.parametrize("status", [400, 401, 403])
def test_a_link_refused_in_any_way_is_asked_for_again(world: World, status: int) -> None:
    world.storage.fail(Fault(status=status))

    fetched = world.fetch()

    assert world.is_right(fetched)
    assert world.source.asked == [False, True]


def test_an_old_link_is_not_used_for_another_request(world: World) -> None:
    world.storage.rate = 2e6

    fetched = world.fetch(dataclasses.replace(QUICK, link_age=0.1))

    assert world.is_right(fetched)
    assert True in world.source.asked


@pytest.mark.parametrize("status", [404, 410])
def test_a_file_that_is_gone_from_the_storage_is_asked_for_once_more(world: World, status: int) -> None:
    world.storage.fail(Fault(status=status), times=None)

    with pytest.raises(ModelNotFound, match="gone"):
        world.fetch()

    assert world.source.asked == [False, True]


def test_what_the_source_of_links_raises_is_what_the_caller_gets(world: World) -> None:
    class Refusing:
        def link(self, *, renew: bool) -> str:
            raise ModelNotFound("nobody knows it")

    with pytest.raises(ModelNotFound, match="nobody knows it"):
        world.fetch(source=Refusing())


def test_a_redirect_is_followed_once_and_then_known(world: World) -> None:
    target = world.storage.sign(world.key)
    with Elsewhere(target) as elsewhere:
        policy = EgressPolicy([world.storage.url, elsewhere.url])

        fetched = Downloader(policy, QUICK).fetch(Fixed(f"{elsewhere.url}/file"), world.part, deadline=Deadline(60))

    assert world.is_right(fetched)
    assert len(elsewhere.asked) == 1


class Elsewhere(Server):
    """Leads every request to one place."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target

    def answer(self, exchange: Exchange) -> None:
        exchange.send(302, headers={"location": self.target})


@pytest.mark.parametrize(
    "target",
    ["http://169.254.169.254/latest", "http://127.0.0.1:1/", "https://evil.example/x", "file:///etc/passwd", "/again"],
)
def test_a_redirect_to_where_it_may_not_go_is_rejected(world: World, target: str) -> None:
    with Elsewhere(target) as elsewhere, pytest.raises(ModelRejected) as caught:
        Downloader(EgressPolicy([elsewhere.url]), QUICK).fetch(
            Fixed(f"{elsewhere.url}/again"), world.part, deadline=Deadline(60)
        )

    assert "latest" not in caught.value.message
    assert not caught.value.retryable


# --- what cannot be had


@pytest.mark.parametrize(
    ("spoiling", "error", "sentence"),
    [
        (fails(HTML_PAGE, None), ModelRejected, "web page"),
        (fails(Fault(framing="gzip"), None), DownloadFailed, "compressed"),
        (fails(Fault(status=418), None), DownloadFailed, "418"),
        (fails(STORE_ERROR, None), DownloadFailed, "500"),
        (fails(SLOW_DOWN, None), DownloadFailed, "busy"),
        (fails(RESET, None), DownloadFailed, "broke"),
        (fails(SILENCE, None), DownloadFailed, "silent|kB came"),
        (fails(Fault(stall_after=0), None), DownloadFailed, "kB came|early|silent|broke"),
        (fails(Fault(rate=1.0), None), DownloadFailed, "kB came|early"),  # a byte a second, for ever
        (fails(Fault(cut_after=1), None), DownloadFailed, "early|kB came"),
        (fails(Fault(shift=1), None), DownloadFailed, "another part"),
        (fails(Fault(whole=True, framing="length", cut_after=5000), None), DownloadFailed, "early"),
    ],
)
def test_a_line_that_never_works_fails_in_words(
    world: World, spoiling: Callable[[Storage], None], error: type[ModelError], sentence: str
) -> None:
    with pytest.raises(error, match=sentence) as caught:
        spoil(world, spoiling)

    assert type(caught.value) is error
    assert str(world.folder) not in caught.value.message
    assert "X-Amz" not in caught.value.message


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1, 1])
def test_a_file_of_another_size_is_rejected_before_its_bytes(world: World, size: int) -> None:
    with pytest.raises(ModelRejected, match=f"{SIZE:,} bytes where it should have {size:,}"):
        world.fetch(size=size)

    assert len(world.storage.asked) == 1


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1])
def test_a_stream_of_another_size_is_not_accepted(world: World, size: int) -> None:
    world.storage.fail(Fault(whole=True, framing="close"), times=None)

    with pytest.raises((ModelRejected, DownloadFailed), match=r"more bytes|early"):
        world.fetch(size=size)


def test_a_file_beyond_the_largest_is_rejected_before_its_bytes(world: World) -> None:
    with pytest.raises(ModelRejected, match="too large"):
        world.fetch(dataclasses.replace(QUICK, max_size=SIZE - 1))

    assert len(world.storage.asked) == 1


def test_a_stream_without_an_end_stops_at_the_largest(world: World) -> None:
    world.storage.fail(Fault(whole=True, framing="chunked"), times=None)

    with pytest.raises(ModelRejected, match="more bytes"):
        world.fetch(dataclasses.replace(QUICK, max_size=500_000))

    assert world.part.stat().st_size <= 500_000


def test_an_empty_file_is_rejected(tmp_path: Path) -> None:
    with Storage() as storage:
        world = make_world(tmp_path, storage, 0)

        with pytest.raises(ModelRejected, match="empty"):
            world.fetch()


def test_a_host_without_an_address_fails_in_words(world: World) -> None:
    policy = EgressPolicy(["https://nowhere.invalid"])

    with pytest.raises(DownloadFailed, match=r"no address|connection failed"):
        Downloader(policy, QUICK).fetch(Fixed("https://nowhere.invalid/x"), world.part, deadline=Deadline(60))


# --- the end of time, and cancellation


def test_a_cancelled_download_stops_and_keeps_what_it_has(world: World) -> None:
    world.storage.rate = 300_000
    deadline = Deadline(60)
    world.storage.at(SIZE // 3, deadline.cancel)

    with pytest.raises(JobCancelled):
        world.fetch(deadline=deadline)
    world.storage.rate = None
    fetched = world.fetch(EXACT)

    assert world.is_right(fetched)
    assert fetched.resumed > 0
    assert fetched.resumed + fetched.received == SIZE


def test_what_is_there_is_remembered_at_the_end_whenever_that_was_last_done(world: World) -> None:
    cut_short(world, tuning=dataclasses.replace(QUICK, remember_bytes=SIZE * 2, remember_seconds=60))

    fetched = world.fetch()

    assert world.is_right(fetched)
    assert fetched.resumed > 0


@pytest.mark.parametrize(
    "spoiling",
    [fails(SILENCE, None), sets(stall_after=[0] * 99), sets(latency=30.0), fails(Fault(status=503), None)],
)
def test_a_download_that_waits_is_cancelled_too(world: World, spoiling: Callable[[Storage], None]) -> None:
    patient = dataclasses.replace(QUICK, stall_seconds=60, patience_seconds=60, pause=30, pause_most=30, tick=60)
    deadline = Deadline(60)
    spoiling(world.storage)

    def cancel_when_asked() -> None:
        while not world.storage.asked:
            threading.Event().wait(0.005)
        deadline.cancel()

    thread = threading.Thread(target=cancel_when_asked)
    thread.start()
    with pytest.raises(JobCancelled):
        world.fetch(patient, deadline=deadline)
    thread.join()


def test_a_download_ends_when_its_time_is_up(world: World) -> None:
    world.storage.rate = 10_000

    with pytest.raises(JobTimeout):
        world.fetch(dataclasses.replace(QUICK, min_speed=1), deadline=Deadline(0.3))


def test_a_download_that_begins_cancelled_asks_for_nothing(world: World) -> None:
    deadline = Deadline(60)
    deadline.cancel()

    with pytest.raises(JobCancelled):
        world.fetch(deadline=deadline)

    assert not world.storage.asked


# --- the disk, and what is remembered there


def test_a_complete_part_is_proven_again_without_asking_anybody(world: World) -> None:
    world.fetch(sha256=world.sha256)
    asked = len(world.storage.asked)

    fetched = world.fetch(sha256=world.sha256)

    assert world.is_right(fetched)
    assert (fetched.received, fetched.resumed) == (0, SIZE)
    assert len(world.storage.asked) == asked
    assert world.source.asked == [False]


def cut_short(world: World, **options: Any) -> None:
    """Leave half of the file behind."""
    deadline = Deadline(60)
    world.storage.rate = 1e6
    world.storage.at(world.storage.bytes_sent + SIZE // 2, deadline.cancel)
    with pytest.raises(JobCancelled):
        world.fetch(deadline=deadline, **options)
    world.storage.rate = None


@pytest.mark.parametrize(
    "spoil_memory",
    [
        lambda world: ranges_file(world.part).unlink(),
        lambda world: ranges_file(world.part).write_text(""),
        lambda world: ranges_file(world.part).write_text('{"version": 1, "size": 20'),
        lambda world: ranges_file(world.part).write_text("[]"),
        lambda world: ranges_file(world.part).write_text('{"version": 1, "size": -1, "etag": null, "sha256": null}'),
        lambda world: _edit(world, version=2),  # from the future
        lambda world: _edit(world, done=[[0, SIZE * 2]]),
        lambda world: _edit(world, done=[[9, 5]]),
        lambda world: _edit(world, done=[["0", "5"]]),
        lambda world: _edit(world, size=SIZE + 5),  # of another file
        lambda world: _edit(world, etag='"another"'),
        lambda world: os.truncate(world.part, 10),
        lambda world: _edit(world, boot="another"),  # the machine was restarted, and no hash will tell
    ],
)
def test_what_is_remembered_wrongly_is_fetched_again(world: World, spoil_memory: Callable[[World], object]) -> None:
    cut_short(world)
    spoil_memory(world)

    fetched = world.fetch()

    assert world.is_right(fetched)
    assert fetched.resumed == 0


def _edit(world: World, **fields: Any) -> None:
    memory = json.loads(ranges_file(world.part).read_text())
    ranges_file(world.part).write_text(json.dumps({**memory, **fields}))


@pytest.mark.parametrize("options", [{"sha256": "ab" * 32}, {"size": SIZE + 1}])
def test_a_part_of_another_file_is_not_gone_on_with(world: World, options: dict[str, Any]) -> None:
    cut_short(world, sha256=world.sha256)
    world.storage.asked.clear()

    with contextlib.suppress(ModelRejected):  # the other size
        world.fetch(**options)

    assert world.storage.asked[0].headers["range"].startswith("bytes=0-")


def test_bytes_that_were_there_before_are_checked_by_the_hash(world: World) -> None:
    cut_short(world, sha256=world.sha256)
    with world.part.open("r+b") as part:
        part.write(b"\x00" * 100)  # a crash of the machine took them

    fetched = world.fetch(sha256=world.sha256)

    assert fetched.resumed > 0
    assert fetched.sha256 == hashlib.sha256(world.part.read_bytes()).hexdigest() != world.sha256


def test_where_a_hash_will_tell_a_part_of_another_machine_is_gone_on_with(world: World) -> None:
    cut_short(world, sha256=world.sha256)
    _edit(world, boot="another")

    fetched = world.fetch(sha256=world.sha256)

    assert world.is_right(fetched)
    assert fetched.resumed > 0


def test_another_file_on_resuming_starts_over(world: World, tmp_path: Path) -> None:
    cut_short(world)
    newer = tmp_path / "newer.safetensors"
    world.content = random.Random(2).randbytes(SIZE)
    newer.write_bytes(world.content)
    world.storage.replace(world.key, newer)

    fetched = world.fetch()

    assert world.is_right(fetched)
    assert fetched.resumed == 0


def test_a_longer_file_that_was_there_before_leaves_nothing_behind(world: World) -> None:
    world.part.write_bytes(b"x" * (SIZE * 2))

    fetched = world.fetch()

    assert world.is_right(fetched)


def test_room_for_the_whole_file_is_taken_before_its_first_byte(world: World) -> None:
    seen: list[int] = []
    world.storage.rate = 1e6

    world.fetch(on_progress=lambda done, total: seen.append(world.part.stat().st_blocks * 512))

    assert seen[0] >= SIZE


@pytest.mark.parametrize(
    "change",
    [
        lambda part: part.forget(),
        lambda part: part.settle(1),
        lambda part: part.truncate(1),
        lambda part: part.write(memoryview(b"wrong"), 0),
    ],
    ids=["forget", "settle", "truncate", "write"],
)
def test_a_part_that_was_taken_over_is_not_touched(tmp_path: Path, change: Callable[[PartialFile], None]) -> None:
    part, model = PartialFile(tmp_path / "model.part"), tmp_path / "model.safetensors"
    part.write(memoryview(b"a proven model"), 0)
    part.path.rename(model)

    with pytest.raises(PartialFileLost):
        change(part)

    assert model.read_bytes() == b"a proven model"
    part.close()


# --- run in a process of its own, since the limit is the process's
_WITH_LIMIT = """
import resource, sys
from pathlib import Path
from a1111_worker.context import Deadline
from a1111_worker.transfer.download import Downloader
from a1111_worker.errors import VolumeFull
from a1111_worker.transfer.egress import EgressPolicy
class Source:
    def link(self, *, renew): return sys.argv[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
origin = "/".join(sys.argv[1].split("/")[:3])
try:
    Downloader(EgressPolicy([origin])).fetch(Source(), Path(sys.argv[2]), deadline=Deadline(60))
except VolumeFull as error:
    print(error.code, error.message)
"""


@pytest.mark.parametrize(
    ("framing", "left"),
    [
        ("length", False),  # the size is known: not a byte is written
        ("chunked", True),  # it is not: found out while writing
    ],
)
def test_a_full_disk_is_said_in_words(world: World, framing: Any, left: bool) -> None:
    world.storage.fail(Fault(whole=True, framing=framing), times=None)
    command = [sys.executable, "-c", _WITH_LIMIT, world.storage.sign(world.key), str(world.part), "1000000"]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)

    assert done.stdout.startswith("VOLUME_FULL a model: there is no room"), done.stderr
    assert str(world.folder) not in done.stdout
    assert world.part.exists() is left


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS])
def test_what_a_disk_refuses_is_a_full_volume_to_the_caller(number: int) -> None:
    from a1111_worker.transfer.partial_file import _refused

    refused = _refused(OSError(number, os.strerror(number)), 6_938_041_234)

    assert refused.code == "VOLUME_FULL"
    assert ("6,938 MB" in refused.message) is (number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


def test_a_folder_that_is_not_there_is_a_volume_that_cannot_be_written(world: World) -> None:
    world.folder.rmdir()

    with pytest.raises(VolumeFull, match="cannot be written"):
        world.fetch()


def test_a_link_in_the_place_of_a_part_is_not_followed(world: World, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("mine")
    world.part.symlink_to(target)

    with pytest.raises(VolumeFull):
        world.fetch()

    assert target.read_text() == "mine"


# --- killed at any moment
_FETCH = """
import json, sys
from pathlib import Path
from a1111_worker.context import Deadline
from a1111_worker.transfer.download import Downloader
from a1111_worker.transfer.egress import EgressPolicy
from a1111_worker.transfer.ranges import Tuning
class Source:
    def link(self, *, renew): return sys.argv[1]
origin = "/".join(sys.argv[1].split("/")[:3])
downloader = Downloader(EgressPolicy([origin]), Tuning(**json.loads(sys.argv[3])))
downloader.fetch(Source(), Path(sys.argv[2]), deadline=Deadline(60))
"""


@pytest.mark.parametrize("kills", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_goes_on_where_it_was(world: World, kills: int) -> None:
    world.storage.line_rate = 8e6
    seed = random.Random(kills)
    sent_before = 0
    for _ in range(kills):
        killed = threading.Event()
        tuning = json.dumps(dataclasses.asdict(QUICK))
        command = [sys.executable, "-c", _FETCH, world.storage.sign(world.key), str(world.part), tuning]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)

        def kill(process: subprocess.Popen[bytes] = process, killed: threading.Event = killed) -> None:
            process.send_signal(signal.SIGKILL)
            killed.set()

        world.storage.at(world.storage.bytes_sent + seed.randrange(1, 2 * SIZE // kills), kill)
        process.wait(60)
        if process.stdout:
            process.stdout.close()
        memory = _memory(world)
        present = memory.present if memory else 0
        # What is sent and not remembered: at most a segment and a buffer of each connection.
        lost = world.storage.bytes_sent - present
        assert lost - sent_before <= 16 * (QUICK.piece_most + QUICK.buffer)
        sent_before = max(sent_before, lost)
    world.storage.line_rate = None

    fetched = world.fetch(EXACT)

    assert world.is_right(fetched)
    assert fetched.received == SIZE - fetched.resumed


def _memory(world: World) -> PartialFileState | None:
    part = PartialFile(world.part)
    try:
        return part.recall()
    finally:
        part.close()


# --- TLS, as it is outside


class Tunnel:
    """TLS in front of a server: what comes in goes on, both ways."""

    def __init__(self, folder: Path, target: str) -> None:
        self.ca = _certificate(folder)
        try:
            socket.getaddrinfo("localhost", None)
        except OSError:
            pytest.skip("localhost, which the certificate names, has no address here")
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(self.ca, folder / "key.pem")
        self._port = int(target.rpartition(":")[2])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://localhost:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Tunnel:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._listener.accept()[0],), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        with (
            contextlib.suppress(OSError),
            self._context.wrap_socket(plain, server_side=True) as outside,
            socket.create_connection(("127.0.0.1", self._port)) as inside,
        ):
            back = threading.Thread(target=_pump, args=(inside, outside), daemon=True)
            back.start()
            _pump(outside, inside)
            back.join()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(64 * KiB):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _certificate(folder: Path) -> Path:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    path = folder / "ca.pem"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return path


def test_over_tls_it_arrives_and_is_cancelled_as_well(world: World, tmp_path: Path) -> None:
    with Tunnel(tmp_path, world.storage.url) as tunnel:
        world.storage.public_url = tunnel.url
        downloader = Downloader(EgressPolicy([tunnel.url], ca_file=str(tunnel.ca)), QUICK)
        deadline = Deadline(60)
        world.storage.rate = 300_000
        world.storage.at(SIZE // 2, deadline.cancel)

        with pytest.raises(JobCancelled):
            downloader.fetch(world.source, world.part, deadline=deadline)
        world.storage.rate = None
        world.storage.reset_after = [100_000]
        fetched = downloader.fetch(world.source, world.part, deadline=Deadline(60))

    assert world.is_right(fetched)
    assert fetched.resumed > 0


def test_a_certificate_that_nobody_vouches_for_is_refused(world: World, tmp_path: Path) -> None:
    with Tunnel(tmp_path, world.storage.url) as tunnel:
        world.storage.public_url = tunnel.url

        with pytest.raises(DownloadFailed, match="no valid certificate"):
            Downloader(EgressPolicy([tunnel.url]), QUICK).fetch(world.source, world.part, deadline=Deadline(60))

    assert not world.storage.asked


# --- bookkeeping


@given(
    size=st.integers(1, 10_000),
    cuts=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 10_000)), max_size=8),
)
def test_what_is_done_and_what_is_missing_are_the_whole(size: int, cuts: list[tuple[int, int]]) -> None:
    done = [(min(a, b, size), min(max(a, b), size)) for a, b in cuts]

    ranges = ByteRanges(size, done)

    covered = {byte for start, end in done for byte in range(start, end)}
    assert ranges.left == size - len(covered)
    assert {byte for start, end in ranges.done() for byte in range(start, end)} == covered
    assert ranges.front == next((byte for byte in range(size) if byte not in covered), size)


class Workers(RuleBasedStateMachine):
    """Connections that take, steal, advance, give up in any order: no byte is lost, and none has two owners."""

    SIZE = 5_000

    def __init__(self) -> None:
        super().__init__()
        self.ranges = ByteRanges(self.SIZE)
        self.spans: list[ByteRange] = []
        self.written: set[int] = set()

    @rule(piece=st.integers(1, 2_000))
    def take(self, piece: int) -> None:
        span = self.ranges.take(piece)
        if span is None:
            assert self.ranges.free == 0
        else:
            assert span.left <= piece + piece // 4
            self.spans.append(span)

    @rule(least=st.integers(1, 500))
    def steal(self, least: int) -> None:
        largest = max((span.left for span in self.spans), default=0)

        span = self.ranges.steal(least)

        assert (span is not None) is (largest >= 2 * least)
        if span is not None:
            assert span.left >= least
            self.spans.append(span)

    @precondition(lambda self: self.spans)
    @rule(data=st.data(), count=st.integers(1, 700))
    def advance(self, data: st.DataObject, count: int) -> None:
        span = data.draw(st.sampled_from(self.spans))
        fresh = range(span.at, min(span.at + count, span.end))
        assert not self.written & set(fresh)

        self.ranges.advance(span, count)

        self.written |= set(fresh)
        if not span.left:
            self.spans.remove(span)

    @precondition(lambda self: self.spans)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        span = data.draw(st.sampled_from(self.spans))
        self.spans.remove(span)

        self.ranges.release(span)

    @invariant()
    def every_byte_is_there_or_missing_once(self) -> None:
        assert self.ranges.left == self.SIZE - len(self.written)
        assert {byte for start, end in self.ranges.done() for byte in range(start, end)} == self.written
        assert self.ranges.free == self.ranges.left - sum(span.left for span in self.spans)
        assert self.ranges.front == next((byte for byte in range(self.SIZE) if byte not in self.written), self.SIZE)


TestWorkers = Workers.TestCase
TestWorkers.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_pieces_are_taken_in_order_so_that_the_front_moves() -> None:
    ranges = ByteRanges(100)

    first, second = ranges.take(30), ranges.take(30)
    assert first and second
    ranges.advance(first, 10)
    ranges.release(first)
    again = ranges.take(30)

    assert again and (again.at, again.end) == (10, 30)
    assert ranges.front == 10


@given(
    limit=st.integers(1, 32),
    wants=st.lists(st.builds(Want, st.integers(0, 20), st.booleans()), max_size=12),
)
def test_connections_are_shared_fairly_and_never_more_than_there_are(limit: int, wants: list[Want]) -> None:
    given_ = shares(limit, wants)

    assert sum(given_) == min(limit, sum(want.lines for want in wants if want.foreground)) + min(
        max(0, limit - sum(want.lines for want in wants if want.foreground)),
        sum(want.lines for want in wants if not want.foreground),
    )
    for mine, want in zip(given_, wants, strict=True):
        assert 0 <= mine <= want.lines
        for theirs, other in zip(given_, wants, strict=True):
            if want.foreground is other.foreground and mine < want.lines:
                assert theirs <= mine + 1
            if want.foreground and not other.foreground and mine < want.lines:
                assert theirs == 0


@pytest.mark.parametrize(
    ("limit", "wants", "expected"),
    [
        (16, [Want(8, True)], [8]),
        (16, [Want(8, True)] * 9, [2, 2, 2, 2, 2, 2, 2, 1, 1]),  # nine LoRAs
        (16, [Want(1, True), Want(16, True)], [1, 15]),  # what one does not want goes to the other
        (16, [Want(16, False), Want(8, True)], [8, 8]),
        (16, [Want(16, False), Want(16, True)], [0, 16]),
        (2, [Want(4, True)] * 3, [1, 1, 0]),
    ],
)
def test_who_gets_how_many_connections(limit: int, wants: list[Want], expected: list[int]) -> None:
    assert shares(limit, wants) == expected


@pytest.mark.parametrize(
    ("free", "lines", "expected"),
    [
        (6_900_000_000, 16, 64 * MiB),  # few requests while there is much
        (512 * MiB, 16, 32 * MiB),
        (128 * MiB, 16, 8 * MiB),  # and small ones at the end
        (1, 16, 8 * MiB),
        (1024 * MiB, 0, 64 * MiB),
    ],
)
def test_how_much_one_request_asks_for(free: int, lines: int, expected: int) -> None:
    assert piece_size(free, lines, 8 * MiB, 64 * MiB) == expected


@pytest.mark.parametrize(
    ("backlog", "hash_speed", "rate", "expected"),
    [
        (0, 0.0, 320e6, 8 * MiB),  # nobody knows yet: the front shall move
        (0, 1e9, 0.0, 8 * MiB),
        (0, 1e9, 320e6, 64 * MiB),  # the hash catches up whatever comes
        (0, 300e6, 320e6, 8 * MiB),  # it has nothing to do: small pieces
        (320 * MiB, 320e6, 320e6, 20 * MiB),  # it has work for as long as a piece takes
        (9000 * MiB, 300e6, 320e6, 64 * MiB),
    ],
)
def test_a_piece_lasts_no_longer_than_the_hash_has_work(
    backlog: int, hash_speed: float, rate: float, expected: int
) -> None:
    assert longest_piece(backlog, hash_speed, rate, 16, 8 * MiB, 64 * MiB) == expected


def grow(rates: dict[int, float], *, start: int = 8, most: int = 16) -> int:
    """Where a download ends up whose rate is what `rates` says for a number of connections."""
    growth = ConcurrencyTuner(start, most, settle=1.0, again=1000.0)
    received, now = 0.0, 0.0
    for _ in range(100):
        lines = growth.observe(now, int(received), growth.lines)
        now += 0.5
        received += 0.5 * rates[lines]
    return growth.lines


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({8: 160e6, 16: 320e6}, 16),  # each connection is slow: more of them
        ({8: 160e6, 16: 170e6}, 8),  # the line is full
        ({8: 160e6, 16: 100e6}, 8),  # more make it worse
        ({8: 900e6, 16: 1800e6}, 8),  # fast enough as it is: more would only cost CPU
    ],
)
def test_connections_grow_only_while_that_helps(rates: dict[int, float], expected: int) -> None:
    assert grow(rates) == expected


def test_growth_waits_until_all_connections_flow() -> None:
    growth = ConcurrencyTuner(4, 16, settle=1.0)

    for second in range(10):
        growth.observe(float(second), second * 1000, flowing=3)

    assert growth.lines == 4


def test_connections_that_fail_together_are_one_failure() -> None:
    patience = Patience(tries=3, base=1.0, most=10.0)

    together = [patience.failed(5.0) for _ in range(16)]

    assert together == [True] * 16
    assert patience.failures == 1
    assert 6.0 <= patience.until <= 8.0


def test_patience_ends_and_is_new_after_progress() -> None:
    patience = Patience(tries=3, base=1.0, most=2.0)

    first = patience.failed(0.0), patience.failed(10.0)
    patience.progressed()
    second = patience.failed(20.0), patience.failed(30.0), patience.failed(40.0)

    assert first == (True, True)
    assert second == (True, True, False)


def test_a_server_that_says_how_long_is_waited_for() -> None:
    patience = Patience(tries=3, base=0.1, most=0.2)

    patience.failed(100.0, at_least=30.0)

    assert patience.until == 130.0


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ([], []),
        ([50.0], [True]),  # a connection alone has to bring it all
        ([150.0], [False]),
        ([60.0, 60.0], [False, False]),  # together they bring enough
        ([0.0, 1e6], [True, False]),
        ([5e6, 5e6, 5e6, 4e5], [False, False, False, True]),  # far behind the others
        ([5e6, 5e6, 5e6, 6e5], [False, False, False, False]),
        ([10.0] * 16, [False] * 16),  # they are all slow: it is the line
    ],
)
def test_which_connections_are_replaced(speeds: list[float], expected: list[bool]) -> None:
    assert too_slow(speeds, least=100.0) == expected


def headers(**given: str) -> http.client.HTTPMessage:
    message = http.client.HTTPMessage()
    for name, value in given.items():
        message[name.replace("_", "-")] = value
    return message


@pytest.mark.parametrize(
    ("status", "answer", "start", "end", "expected"),
    [
        (206, {"Content_Range": "bytes 10-19/100"}, 10, 20, Body(10, 20, 100, None, True)),
        (206, {"Content_Range": "bytes 10-14/100"}, 10, 20, Body(10, 15, 100, None, True)),  # less than asked for
        (206, {"Content_Range": "bytes 0-9/*", "ETag": '"a"'}, 0, 20, Body(0, 10, None, '"a"', True)),
        (206, {"Content_Range": "bytes 0-9/100", "ETag": 'W/"a"'}, 0, 20, Body(0, 10, 100, None, True)),  # weak
        (200, {"Content_Length": "100"}, 10, 20, Body(0, 100, 100, None, False)),
        (200, {"Transfer_Encoding": "chunked", "Content_Length": "9"}, 0, 20, Body(0, None, None, None, False)),
        (200, {}, 0, None, Body(0, None, None, None, False)),
        (206, {"Content_Range": "bytes 11-19/100"}, 10, 20, Hiccup),
        (206, {"Content_Range": "bytes 10-20/100"}, 10, 20, Hiccup),  # more than asked for
        (206, {"Content_Range": "bytes 10-19/15"}, 10, 20, Hiccup),
        (206, {"Content_Range": "bytes 10-19/100", "Content_Length": "9"}, 10, 20, Hiccup),
        (206, {"Content_Type": "multipart/byteranges; boundary=x"}, 10, 20, Hiccup),
        (206, {"Content_Range": "bytes 0-9/100"}, 0, None, Hiccup),  # nobody asked for a part
        (200, {"Content_Encoding": "gzip"}, 0, 20, DownloadFailed),
        (200, {"Content_Type": "text/html; charset=utf-8"}, 0, 20, ModelRejected),
        (416, {"Content_Range": "bytes */0"}, 0, 20, ModelRejected),
        (416, {}, 0, 20, Unranged),
        (416, {"Content_Range": "bytes */50"}, 60, 80, Changed),
        (400, {}, 0, 20, LinkRefused),
        (401, {}, 0, 20, LinkRefused),
        (403, {}, 0, 20, LinkRefused),
        (404, {}, 0, 20, Gone),
        (410, {}, 0, 20, Gone),
        (408, {}, 0, 20, Hiccup),
        (500, {}, 0, 20, Hiccup),
        (520, {"Content_Type": "text/html"}, 0, 20, Hiccup),  # Cloudflare's page is not the file's
        (429, {}, 0, 20, Busy),
        (503, {"Retry_After": "7"}, 0, 20, Busy),
        (204, {}, 0, 20, DownloadFailed),
        (418, {}, 0, 20, DownloadFailed),
    ],
)
def test_what_an_answer_means(
    status: int, answer: dict[str, str], start: int, end: int | None, expected: Body | type[Exception]
) -> None:
    try:
        found: object = judge(status, headers(**answer), start, end)
    except Exception as error:
        found = type(error)

    assert found == expected


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        ("7", 7.0, 7.0),
        ("soon", 0.0, 0.0),
        ("-5", 0.0, 0.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0, 0.0),  # past
        ("Wed, 21 Oct 2099 07:28:00 GMT", 1e8, 1e11),
    ],
)
def test_how_long_a_busy_storage_asks_to_wait(text: str, least: float, most: float) -> None:
    with pytest.raises(Busy) as caught:
        judge(503, headers(Retry_After=text), 0, 1)

    assert least <= caught.value.retry_after <= most


# What the process had at most, over what a process has that has only just imported all this.
_PEAK = """
import re, subprocess
look = "print(re.search(r'VmHWM:\\\\s+(\\\\d+)', open('/proc/self/status').read())[1])"
imports = "import a1111_worker.transfer.download, re; " + look
idle = int(subprocess.run([sys.executable, "-c", imports], stdout=subprocess.PIPE, check=True).stdout)
print((int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) - idle) * 1024)
"""


@pytest.mark.slow
def test_memory_stays_small_whatever_the_size(tmp_path: Path) -> None:
    with Storage() as storage:
        world = make_world(tmp_path, storage, 400 * MiB)
        command = [sys.executable, "-c", _FETCH + _PEAK, storage.sign(world.key), str(world.part), "{}"]

        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True)

        assert int(done.stdout) < 64 * MiB

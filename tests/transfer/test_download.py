"""From a link to bytes on disk, over networks that break in every way."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import itertools
import random
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from a1111_worker.context import Deadline, JobContext
from a1111_worker.errors import DownloadFailed, JobCancelled, JobTimeout, ModelError, ModelNotFound, ModelRejected
from a1111_worker.transfer.download import Downloader, Fetched, Source
from a1111_worker.transfer.egress import EgressPolicy
from a1111_worker.transfer.partial_file import ranges_file
from a1111_worker.transfer.ranges import MiB, Tuning
from sandbox.server import Exchange, Server
from sandbox.storage import CUT, HTML_PAGE, RESET, SILENCE, SLOW_DOWN, STORE_ERROR, SandboxStorage, ServerFault
from tests.transfer.download_setup import EXACT, QUICK, SIZE, DownloadSetup, KiB, Links, download_setup

# --- a network as it should be


def test_a_file_is_fetched_over_several_connections_with_one_link_and_hashed(download: DownloadSetup) -> None:
    fetched = download.fetch(EXACT)

    download.assert_whole(fetched)
    assert fetched.sha256 == download.sha256
    assert fetched.received == SIZE
    assert fetched.connections > 1
    assert download.links.count == 1


@pytest.mark.parametrize(
    ("size", "connections"),
    [
        (1, 1),
        (64 * KiB, 1),
        (200 * KiB, 3),  # each connection has 64 KiB to fetch, the last one a little more
        (SIZE, 16),
    ],
)
@pytest.mark.parametrize("is_size_known", [True, False])
def test_how_many_connections_a_file_has(tmp_path: Path, size: int, connections: int, is_size_known: bool) -> None:
    with SandboxStorage() as storage:
        download = download_setup(tmp_path, storage, size)
        storage.rate = 2 * size / connections  # slow enough that all of them are at work together

        fetched = download.fetch(
            dataclasses.replace(EXACT, min_speed=1, stall_seconds=60, max_range_bytes=64 * KiB),
            size=size if is_size_known else None,
        )

    download.assert_whole(fetched)
    assert fetched.connections == connections
    assert storage.peak_connections == connections


@pytest.mark.parametrize("size", [1, 2, 64 * KiB - 1, 64 * KiB, 64 * KiB + 1, 320 * KiB, MiB + 1])
def test_a_file_of_any_size_is_fetched(tmp_path: Path, size: int) -> None:
    with SandboxStorage() as storage:
        download = download_setup(tmp_path, storage, size)

        fetched = download.fetch(EXACT)

        download.assert_whole(fetched)
        assert fetched.received == size


def test_backblaze_which_has_no_etags_is_read_in_ranges_too(tmp_path: Path) -> None:
    with SandboxStorage(form="b2") as storage:
        download = download_setup(tmp_path, storage)

        fetched = download.fetch()

    download.assert_whole(fetched)
    assert len(storage.ranges) > 1 and None not in storage.ranges


def test_every_request_names_the_worker_and_refuses_compression(download: DownloadSetup) -> None:
    download.fetch()

    for asked in download.storage.asked:
        assert asked.method == "GET"
        assert asked.headers["user-agent"].startswith("a1111-worker/")
        assert asked.headers["accept-encoding"] == "identity"
        assert "authorization" not in asked.headers


def test_progress_only_grows_and_is_reported_by_one_thread(download: DownloadSetup) -> None:
    reports: list[tuple[int, int | None, int]] = []
    download.storage.total_rate = 4e6

    download.fetch(on_bytes=lambda done, total: reports.append((done, total, threading.get_ident())))

    assert reports[-1][:2] == (SIZE, SIZE)
    assert [done for done, _, _ in reports] == sorted(done for done, _, _ in reports)
    assert {thread for _, _, thread in reports} == {threading.get_ident()}


def test_a_listener_that_fails_does_not_break_the_download(
    download: DownloadSetup, caplog: pytest.LogCaptureFixture
) -> None:
    def listen(done: int, total: int | None) -> None:
        raise RuntimeError("a bug of the listener")

    fetched = download.fetch(on_bytes=listen)

    download.assert_whole(fetched)
    assert "could not be reported" in caplog.text


def test_the_log_names_the_storage_and_never_the_signed_link(
    download: DownloadSetup, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    download.storage.reset_after = [1000]

    download.fetch(label="'Detail Tweaker XL'")

    assert "'Detail Tweaker XL'" in caplog.text
    assert download.storage.url in caplog.text
    assert "X-Amz" not in caplog.text
    assert download.key not in caplog.text


# --- networks that break: the right file in the end, by the same download

DIGITS = "9" * 5_000
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def fetch_from_a_bad_storage(download: DownloadSetup, misbehave: Callable[[SandboxStorage], None]) -> Fetched:
    misbehave(download.storage)
    return download.fetch()


def fails(fault: ServerFault, times: int | None = 1) -> Callable[[SandboxStorage], None]:
    return lambda storage: storage.fail(fault, times=times)


def sends(answer: bytes) -> Callable[[SandboxStorage], None]:
    """Every answer is these bytes, then FIN."""

    def send(exchange: Exchange) -> bool:
        exchange.write(answer)
        exchange.cut()
        return True

    return lambda storage: storage.before.append(send)


def sets(**knobs: Any) -> Callable[[SandboxStorage], None]:
    def misbehave(storage: SandboxStorage) -> None:
        for name, value in knobs.items():
            setattr(storage, name, value)

    return misbehave


@pytest.mark.parametrize(
    "misbehave",
    [
        fails(RESET),  # before an answer
        fails(CUT),
        fails(SILENCE),  # until the read times out
        fails(STORE_ERROR),
        fails(STORE_ERROR, 3),
        fails(ServerFault(status=522, body=b"<html>", headers={"content-type": "text/html"})),  # Cloudflare's own page
        fails(SLOW_DOWN),
        fails(ServerFault(status=429, headers={"retry-after": "3600"})),  # a longer pause than it is given
        fails(ServerFault(status=408)),
        sets(cut_after=[0, 1, 1000, 200_000]),  # FIN
        sets(reset_after=[0, 1, 1000, 200_000]),  # RST
        sets(stall_after=[0, 1000, 100_000]),  # nothing comes any more
        sets(trickle=[1.0, 50.0]),  # a few bytes now and then, so that no read times out
        sets(reset_every=300_000),
        sets(max_connections=1),  # 503 for every other
        sets(max_connections=3),
        fails(ServerFault(missing=100)),  # a length that does not fit the range
        fails(ServerFault(extra=100)),  # more bytes than the range: they are not part of the next answer
        fails(ServerFault(shift=1000)),  # another range than the one asked for
        fails(ServerFault(content_range="bytes 5-99/100")),
        fails(ServerFault(content_range="nonsense")),
        sets(latency=0.02),
    ],
)
def test_a_network_that_breaks_costs_time_but_no_bytes(
    download: DownloadSetup, misbehave: Callable[[SandboxStorage], None]
) -> None:
    fetched = fetch_from_a_bad_storage(download, misbehave)

    download.assert_whole(fetched)
    assert download.links.count == 1


@pytest.mark.parametrize(
    "fault",
    [
        ServerFault(whole=True),  # it ignores Range: 200 and the whole file
        ServerFault(whole=True, framing="chunked"),
        ServerFault(whole=True, framing="close"),  # and it does not say how long that is
        ServerFault(
            content_range=f"bytes 0-{64 * KiB - 1}/*"
        ),  # it does not say how long the file is: it is requested without a range
        ServerFault(status=416),
    ],
)
def test_a_server_without_ranges_is_read_in_one_stream(download: DownloadSetup, fault: ServerFault) -> None:
    download.storage.fail(fault, times=None if fault.whole else 1)

    fetched = download.fetch()

    download.assert_whole(fetched)
    assert fetched.connections == 1


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_stream_without_ranges_that_is_cut_starts_over(download: DownloadSetup, framing: Any) -> None:
    download.storage.fail(ServerFault(whole=True, framing=framing, cut_after=500_000), times=2)
    download.storage.fail(ServerFault(whole=True, framing=framing), times=None)

    fetched = download.fetch()

    download.assert_whole(fetched)
    assert len(download.storage.ranges) == 3


def test_ranges_may_come_in_chunks(download: DownloadSetup) -> None:
    download.storage.fail(ServerFault(framing="chunked"), times=None)

    fetched = download.fetch(EXACT)

    download.assert_whole(fetched)
    assert len(download.storage.ranges) > 1 and None not in download.storage.ranges
    assert fetched.received == SIZE


def test_a_chunk_of_a_negative_size_is_no_error_of_ours(tmp_path: Path) -> None:
    with SandboxStorage() as storage:
        download = download_setup(tmp_path, storage, 10)
        head = b"HTTP/1.1 206 Part\r\nContent-Range: bytes 0-9/10\r\nTransfer-Encoding: chunked\r\n\r\n"
        sends(head + b"a\r\n" + download.content + b"\r\n-5\r\nmore")(storage)

        fetched = download.fetch()

        download.assert_whole(fetched)


def test_a_server_that_ignores_ranges_once_costs_one_answer(download: DownloadSetup) -> None:
    download.fetch(deadline=Deadline(60))
    download.part.unlink()
    ranges_file(download.part).unlink()
    answers = len(download.storage.ranges)
    download.storage.at(download.storage.bytes_sent + 600_000, lambda: download.storage.fail(ServerFault(whole=True)))

    fetched = download.fetch()

    download.assert_whole(fetched)
    assert fetched.received < 2 * SIZE
    assert len(download.storage.ranges) > answers


def replace_midway(download: DownloadSetup, content: bytes) -> None:
    """Have other bytes in the storage from the fifth request on: the file takes eight at least."""

    requests = itertools.count(1)

    def replace(exchange: Exchange) -> bool:
        if next(requests) == 5:
            download.replace_content(content)
        return False

    download.storage.before.append(replace)


def test_a_file_that_is_replaced_midway_is_never_mixed(download: DownloadSetup) -> None:
    replace_midway(download, random.Random(2).randbytes(SIZE))

    fetched = download.fetch()

    download.assert_whole(fetched)


def test_a_file_that_is_replaced_by_a_shorter_one_is_never_mixed(tmp_path: Path) -> None:
    with SandboxStorage(form="b2") as storage:  # no ETag: only the size shows it
        download = download_setup(tmp_path, storage)
        replace_midway(download, random.Random(2).randbytes(SIZE - 1000))

        fetched = download.fetch()

        download.assert_whole(fetched)


def test_a_file_that_changes_again_and_again_fails(download: DownloadSetup) -> None:
    def change_again() -> None:
        download.storage.replace(download.key, download.folder.parent / "model.safetensors")
        download.storage.at(download.storage.bytes_sent + 100_000, change_again)

    download.storage.at(100_000, change_again)

    with pytest.raises(DownloadFailed, match="changed while it was downloaded"):
        download.fetch()


def test_a_flipped_byte_shows_in_the_hash(download: DownloadSetup) -> None:
    download.storage.flip_at = [SIZE // 2]

    fetched = download.fetch(sha256=download.sha256)

    assert fetched.size == SIZE
    assert fetched.sha256 == hashlib.sha256(download.part.read_bytes()).hexdigest() != download.sha256


@pytest.mark.parametrize("sixteenth", range(16))
def test_after_a_reset_at_any_sixteenth_of_the_file_no_byte_is_fetched_twice(
    download: DownloadSetup, sixteenth: int
) -> None:
    download.storage.reset_at = [SIZE * sixteenth // 16]

    fetched = download.fetch(EXACT)

    download.assert_whole(fetched)
    assert fetched.received == SIZE
    assert download.links.count == 1


def test_the_range_of_a_slow_connection_is_stolen_by_the_others(download: DownloadSetup) -> None:
    download.storage.trickle = [None, 20_000.0]  # slower than the others, but not too slow

    fetched = download.fetch(dataclasses.replace(QUICK, stall_seconds=60, patience_seconds=60))

    download.assert_whole(fetched)


def test_all_files_together_use_no_more_connections_than_the_limit(tmp_path: Path) -> None:
    with SandboxStorage() as storage:
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
            fetched[file] = downloader.fetch(Source(file.name, Links(storage, key)), part, JobContext(Deadline(60)))

        threads = [threading.Thread(target=fetch, args=pair) for pair in keys]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert [file.with_suffix(".part").read_bytes() == file.read_bytes() for file, _ in keys] == [True] * 5
    assert len(fetched) == 5
    # The server notices the end of a connection a moment after the next one has begun. Without the limit there would be
    # 20 and more.
    assert storage.peak_connections <= 6 + 2


def test_a_file_that_is_only_prepared_gives_its_connections_to_an_urgent_one(tmp_path: Path) -> None:
    with SandboxStorage() as storage:
        storage.rate = 500_000
        download = download_setup(tmp_path, storage)
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
                Source("a model", download.links),
                download.part,
                JobContext(Deadline(60), is_next=lambda: False),
                lambda done, total: flows.set() if done else None,
            )
            order.append("prepared")

        thread = threading.Thread(target=prepare)
        thread.start()
        flows.wait()
        source = Source("an urgent model", Links(storage, urgent_key))
        fetched = downloader.fetch(source, tmp_path / "urgent.part", JobContext(Deadline(60)))
        order.append("urgent")
        thread.join()

    assert order == ["urgent", "prepared"]
    assert fetched.connections == 4
    assert download.part.read_bytes() == download.content


@dataclasses.dataclass
class Race:
    """Two files over one downloader. The second one begins when bytes of the first one have come."""

    storage: SandboxStorage
    folder: Path
    tuning: Tuning
    finished: list[str] = dataclasses.field(default_factory=list)

    def run(
        self, sizes: tuple[int, int], is_next: tuple[Callable[[], bool], Callable[[], bool]], **on_bytes: Any
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
                    on_bytes.get("second" if number else "first", lambda: None)()

            source = Source(file.name, Links(self.storage, self.storage.put(file)))
            downloader.fetch(source, part, JobContext(Deadline(60), is_next=is_next[number]), listen)
            assert part.read_bytes() == file.read_bytes()
            self.finished.append("second" if number else "first")

        first = threading.Thread(target=fetch, args=(0,))
        first.start()
        flows.wait()
        fetch(1)
        first.join()


def test_a_file_gives_its_connections_beyond_its_share_to_another_one_at_once(tmp_path: Path) -> None:
    with SandboxStorage() as storage:
        storage.rate = 500_000
        # It has only four ranges: no connection ends one of them before the file is there.
        tuning = dataclasses.replace(
            EXACT, connections=4, min_range_bytes=SIZE // 4, max_range_bytes=SIZE, stall_seconds=60
        )
        race = Race(storage, tmp_path, dataclasses.replace(tuning, min_speed=1))

        race.run((SIZE, 400_000), (lambda: True, lambda: True))

    assert race.finished == ["second", "first"]


def test_which_job_is_next_may_change_while_its_files_are_fetched(tmp_path: Path) -> None:
    with SandboxStorage() as storage:
        storage.rate = 500_000
        tuning = dataclasses.replace(QUICK, connections=1, min_speed=1, stall_seconds=60)
        race, is_second_fetched = Race(storage, tmp_path, tuning), threading.Event()

        race.run(
            (600_000, SIZE),
            (is_second_fetched.is_set, lambda: not is_second_fetched.is_set()),
            second=is_second_fetched.set,
        )

    assert race.finished == ["first", "second"]


# --- links


def test_a_link_that_expires_midway_is_renewed(download: DownloadSetup) -> None:
    download.storage.at(100_000, download.storage.expire_links)

    fetched = download.fetch(EXACT)

    download.assert_whole(fetched)
    assert download.links.count == 2


def test_a_link_that_is_always_refused_is_renewed_three_times(download: DownloadSetup) -> None:
    download.storage.link_life = -1

    with pytest.raises(DownloadFailed, match="403"):
        download.fetch()

    assert download.links.count == 4


@pytest.mark.parametrize("status", [400, 401, 403])
def test_a_link_refused_in_any_way_is_renewed(download: DownloadSetup, status: int) -> None:
    download.storage.fail(ServerFault(status=status))

    fetched = download.fetch()

    download.assert_whole(fetched)
    assert download.links.count == 2


def test_an_old_link_is_not_used_for_another_request(download: DownloadSetup) -> None:
    download.storage.rate = 250_000

    fetched = download.fetch(dataclasses.replace(QUICK, link_seconds=0.1))

    download.assert_whole(fetched)
    assert download.links.count > 1


@pytest.mark.parametrize("status", [404, 410])
def test_a_file_that_is_gone_from_the_storage_is_tried_with_one_more_link(download: DownloadSetup, status: int) -> None:
    download.storage.fail(ServerFault(status=status), times=None)

    with pytest.raises(ModelNotFound, match="gone"):
        download.fetch()

    assert download.links.count == 2


def test_an_error_of_the_source_of_links_is_raised(download: DownloadSetup) -> None:
    def refuse() -> str:
        raise ModelNotFound("it does not exist")

    with pytest.raises(ModelNotFound, match="it does not exist"):
        download.fetch(link=refuse)


def test_a_redirect_is_followed_once_and_then_remembered(download: DownloadSetup) -> None:
    target = download.storage.sign(download.key)
    with Redirector(target) as redirector:
        policy = EgressPolicy([download.storage.url, redirector.url])

        fetched = download.fetch(policy=policy, link=lambda: f"{redirector.url}/file")

    download.assert_whole(fetched)
    assert len(redirector.asked) == 1


class Redirector(Server):
    """Redirects every request to one URL."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target

    def answer(self, exchange: Exchange) -> None:
        exchange.send(302, headers={"location": self.target})


@pytest.mark.parametrize(
    "target",
    ["http://169.254.169.254/latest", "http://127.0.0.1:1/", "https://evil.example/x", "file:///etc/passwd", "/again"],
)
def test_a_redirect_to_an_origin_that_is_not_allowed_is_rejected(download: DownloadSetup, target: str) -> None:
    with Redirector(target) as redirector, pytest.raises(ModelRejected) as caught:
        download.fetch(policy=EgressPolicy([redirector.url]), link=lambda: f"{redirector.url}/again")

    assert "latest" not in caught.value.message
    assert not caught.value.retryable


# --- files that cannot be fetched


@pytest.mark.parametrize(
    ("misbehave", "error", "words"),
    [
        (fails(HTML_PAGE, None), ModelRejected, "web page"),
        (fails(ServerFault(framing="gzip"), None), DownloadFailed, "compressed"),
        (fails(ServerFault(status=418), None), DownloadFailed, "418"),
        (fails(STORE_ERROR, None), DownloadFailed, "500"),
        (fails(SLOW_DOWN, None), DownloadFailed, "busy"),
        (fails(RESET, None), DownloadFailed, "broke"),
        (fails(SILENCE, None), DownloadFailed, "silent|kB came"),
        (fails(ServerFault(stall_after=0), None), DownloadFailed, "kB came|early|silent|broke"),
        (fails(ServerFault(rate=1.0), None), DownloadFailed, "kB came|early"),  # a byte a second, forever
        (fails(ServerFault(cut_after=1), None), DownloadFailed, "early|kB came"),
        (fails(ServerFault(shift=1), None), DownloadFailed, "another part"),
        (fails(ServerFault(whole=True, framing="length", cut_after=5000), None), DownloadFailed, "early"),
        # more digits than Python converts
        (fails(ServerFault(200, b"x", {"content-length": DIGITS}), None), DownloadFailed, "a length that is no number"),
        (fails(ServerFault(content_range=f"bytes 0-{DIGITS}/{DIGITS}"), None), DownloadFailed, "which part"),
        (fails(ServerFault(503, headers={"retry-after": DIGITS}), None), DownloadFailed, "busy"),
        (sends(CHUNKED + f"{DIGITS}\r\n".encode()), DownloadFailed, "failed|kB came"),
    ],
)
def test_a_network_that_never_works_fails_in_words(
    download: DownloadSetup, misbehave: Callable[[SandboxStorage], None], error: type[ModelError], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        fetch_from_a_bad_storage(download, misbehave)

    assert type(caught.value) is error
    assert str(download.folder) not in caught.value.message
    assert "X-Amz" not in caught.value.message


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1, 1])
def test_a_file_of_another_size_is_rejected_before_its_bytes(download: DownloadSetup, size: int) -> None:
    with pytest.raises(ModelRejected, match=f"{SIZE:,} bytes instead of {size:,}"):
        download.fetch(size=size)

    assert len(download.storage.asked) == 1


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1])
def test_a_stream_of_another_size_is_not_accepted(download: DownloadSetup, size: int) -> None:
    download.storage.fail(ServerFault(whole=True, framing="close"), times=None)

    with pytest.raises((ModelRejected, DownloadFailed), match=r"more bytes|early"):
        download.fetch(size=size)


def test_a_file_above_the_size_limit_is_rejected_before_its_bytes(download: DownloadSetup) -> None:
    with pytest.raises(ModelRejected, match="too large"):
        download.fetch(dataclasses.replace(QUICK, max_file_bytes=SIZE - 1))

    assert len(download.storage.asked) == 1


def test_a_stream_without_an_end_stops_at_the_size_limit(download: DownloadSetup) -> None:
    download.storage.fail(ServerFault(whole=True, framing="chunked"), times=None)

    with pytest.raises(ModelRejected, match="more bytes"):
        download.fetch(dataclasses.replace(QUICK, max_file_bytes=500_000))

    assert download.part.stat().st_size <= 500_000


def test_an_empty_file_is_rejected(tmp_path: Path) -> None:
    with SandboxStorage() as storage:
        download = download_setup(tmp_path, storage, 0)

        with pytest.raises(ModelRejected, match="empty"):
            download.fetch()


def test_a_host_without_an_address_fails_in_words(download: DownloadSetup) -> None:
    policy = EgressPolicy(["https://nowhere.invalid"])

    with pytest.raises(DownloadFailed, match=r"no address|connection failed"):
        download.fetch(policy=policy, link=lambda: "https://nowhere.invalid/x")


# --- deadlines and cancellation


def test_a_cancelled_download_stops_and_keeps_what_it_has(download: DownloadSetup) -> None:
    download.storage.rate = 300_000
    deadline = Deadline(60)
    download.storage.at(SIZE // 3, deadline.cancel)

    with pytest.raises(JobCancelled):
        download.fetch(deadline=deadline)
    download.storage.rate = None
    fetched = download.fetch(EXACT)

    download.assert_whole(fetched)
    assert fetched.resumed > 0
    assert fetched.resumed + fetched.received == SIZE


@pytest.mark.parametrize(
    "misbehave",
    [fails(SILENCE, None), sets(stall_after=[0] * 99), sets(latency=30.0), fails(ServerFault(status=503), None)],
)
def test_a_download_that_waits_is_cancelled_too(
    download: DownloadSetup, misbehave: Callable[[SandboxStorage], None]
) -> None:
    patient = dataclasses.replace(
        QUICK, stall_seconds=60, patience_seconds=60, pause=30, pause_most=30, poll_seconds=60
    )
    deadline = Deadline(60)
    misbehave(download.storage)

    def cancel_when_asked() -> None:
        while not download.storage.asked:
            threading.Event().wait(0.005)
        deadline.cancel()

    thread = threading.Thread(target=cancel_when_asked)
    thread.start()
    with pytest.raises(JobCancelled):
        download.fetch(patient, deadline=deadline)
    thread.join()


def test_a_download_ends_at_its_deadline(download: DownloadSetup) -> None:
    download.storage.rate = 10_000

    with pytest.raises(JobTimeout):
        download.fetch(dataclasses.replace(QUICK, min_speed=1), deadline=Deadline(0.3))


def test_a_download_that_is_cancelled_before_it_begins_sends_no_request(download: DownloadSetup) -> None:
    deadline = Deadline(60)
    deadline.cancel()

    with pytest.raises(JobCancelled):
        download.fetch(deadline=deadline)

    assert not download.storage.asked


# --- TLS


class TlsProxy:
    """TLS in front of a server: it passes on what comes, both ways."""

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

    def __enter__(self) -> TlsProxy:
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


def test_a_file_is_fetched_and_cancelled_over_tls_too(download: DownloadSetup, tmp_path: Path) -> None:
    with TlsProxy(tmp_path, download.storage.url) as proxy:
        download.storage.public_url = proxy.url
        policy = EgressPolicy([proxy.url], ca_file=str(proxy.ca))
        deadline = Deadline(60)
        download.storage.rate = 300_000
        download.storage.at(SIZE // 2, deadline.cancel)

        with pytest.raises(JobCancelled):
            download.fetch(policy=policy, deadline=deadline)
        download.storage.rate = None
        download.storage.reset_after = [100_000]
        fetched = download.fetch(policy=policy)

    download.assert_whole(fetched)
    assert fetched.resumed > 0


def test_a_certificate_of_no_known_authority_is_refused(download: DownloadSetup, tmp_path: Path) -> None:
    with TlsProxy(tmp_path, download.storage.url) as proxy:
        download.storage.public_url = proxy.url

        with pytest.raises(DownloadFailed, match="no valid certificate"):
            download.fetch(policy=EgressPolicy([proxy.url]))

    assert not download.storage.asked

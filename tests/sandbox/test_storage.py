"""The sandbox's storage, asked as a client asks it: ranges, links, and bodies that go wrong."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests

from sandbox import models
from sandbox.civitai import SandboxCivitAI
from sandbox.storage import SandboxStorage, ServerFault
from tests.sandbox.client import BEARER, SIZE, get, link


@pytest.fixture
def storage() -> Iterator[SandboxStorage]:
    with SandboxStorage() as server:
        yield server


RANGES = [
    # Range → status, Content-Range, bytes
    ("bytes=0-", 206, "bytes 0-9/10", b"0123456789"),
    ("bytes=2-4", 206, "bytes 2-4/10", b"234"),
    ("bytes=2-99", 206, "bytes 2-9/10", b"23456789"),
    ("bytes=-3", 206, "bytes 7-9/10", b"789"),
    ("bytes=9-9", 206, "bytes 9-9/10", b"9"),
    ("bytes=10-", 416, "bytes */10", None),
    ("bytes=4-2", 200, None, b"0123456789"),  # an invalid range is ignored
    ("bytes=0-1,3-4", 200, None, b"0123456789"),  # several ranges are not supported
    ("lines=0-1", 200, None, b"0123456789"),
    (None, 200, None, b"0123456789"),
]


@pytest.mark.parametrize(("requested", "status", "content_range", "data"), RANGES)
def test_a_range_is_served_refused_or_ignored(
    storage: SandboxStorage,
    tmp_path: Path,
    requested: str | None,
    status: int,
    content_range: str | None,
    data: bytes | None,
) -> None:
    path = tmp_path / "digits.bin"
    path.write_bytes(b"0123456789")

    answer = get(storage.publish(path), **({"Range": requested} if requested else {}))

    assert answer.status_code == status
    assert answer.headers.get("Content-Range") == content_range
    assert data is None or answer.content == data
    assert storage.ranges == [requested]


def test_if_range_distinguishes_two_versions_of_a_file(civitai: SandboxCivitAI, tmp_path: Path) -> None:
    url = link(civitai)
    first = get(url, Range="bytes=0-9")
    etag = first.headers["ETag"]
    same = get(url, **{"Range": "bytes=10-19", "If-Range": etag})

    other = models.sdxl_lora(tmp_path / "other.safetensors", 9, SIZE)
    civitai.replace(135867, other)
    changed = get(url, **{"Range": "bytes=10-19", "If-Range": etag})
    matched = get(url, **{"If-Match": etag})

    assert same.status_code == 206
    assert (changed.status_code, changed.content) == (200, other.read_bytes())
    assert changed.headers["ETag"] != etag
    assert matched.status_code == 412
    described = get(f"{civitai.url}/api/v1/model-versions/135867").json()["files"][0]["hashes"]["SHA256"]
    assert described != hashlib.sha256(other.read_bytes()).hexdigest().upper()  # CivitAI still describes the first


def test_r2_sends_an_etag_and_a_name(civitai: SandboxCivitAI) -> None:
    answer = get(link(civitai))

    assert answer.headers["ETag"].startswith('"')
    assert answer.headers["Content-Disposition"] == 'attachment; filename="add-detail-xl.safetensors"'
    assert answer.headers["Accept-Ranges"] == "bytes"


def test_b2_sends_a_file_id_and_no_etag(lora: Path) -> None:
    with SandboxCivitAI(form="b2") as civitai:
        civitai.add(135867, lora)
        url = link(civitai)

        answer = get(url)

        assert urlsplit(url).path.startswith("/file/civitai-modelfiles/model/")
        assert "Authorization=3_" in url
        assert "ETag" not in answer.headers
        assert "x-bz-file-id" in answer.headers
        assert get(url, **{"Range": "bytes=0-1", "If-Range": '"x"'}).status_code == 200


LINK_REFUSALS = [
    # form, method, what happens to the link → status, code
    ("r2", "HEAD", "nothing", 403, ""),
    ("r2", "GET", "expired", 403, "ExpiredRequest"),
    ("r2", "GET", "forged", 403, "SignatureDoesNotMatch"),
    ("b2", "GET", "expired", 401, "expired_auth_token"),
    ("b2", "GET", "forged", 401, "bad_auth_token"),
]


@pytest.mark.parametrize(("form", "method", "event", "status", "code"), LINK_REFUSALS)
def test_an_invalid_link_is_refused(lora: Path, form: Any, method: str, event: str, status: int, code: str) -> None:
    with SandboxCivitAI(form=form) as civitai:
        civitai.add(135867, lora)
        url = link(civitai)
        if event == "expired":
            civitai.storage.expire_links()
        if event == "forged":
            url = url.replace("Signature=", "Signature=0").replace("Authorization=3", "Authorization=4")

        answer = requests.request(method, url)

        assert answer.status_code == status
        assert code in answer.text
        assert get(link(civitai)).status_code == 200


def test_links_expire(civitai: SandboxCivitAI) -> None:
    civitai.storage.link_life = 0.0

    assert get(link(civitai)).status_code == 403


@pytest.mark.parametrize(
    "headers", [BEARER, {"X-Key": "the-key"}, {"X-Key": "Bearer the-key"}, {"Cookie": "session=1"}]
)
def test_a_credential_sent_to_the_storage_is_refused_and_remembered(
    civitai: SandboxCivitAI, headers: dict[str, str]
) -> None:
    url = link(civitai)

    answer = get(url, **headers)

    assert answer.status_code == 400
    assert civitai.storage.keys_seen == list(headers.values())


def test_a_file_name_from_the_uploader_never_breaks_a_header(civitai: SandboxCivitAI, lora: Path) -> None:
    civitai.add(7, lora, file_name="../ü 😀\r\nX: y.safetensors")

    answer = get(get(civitai.download_url(7), **BEARER).headers["Location"])

    assert answer.status_code == 200
    assert "X" not in answer.headers


# Bodies that go wrong: what a client receives over a plain connection


def receive(url: str, headers: dict[str, str] | None = None) -> tuple[http.client.HTTPResponse, bytes, str]:
    """The answer, the bytes that were received, and the end: whole, short or reset."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=10)
    connection.request("GET", f"{parts.path}?{parts.query}", headers=headers or {})
    answer, data = connection.getresponse(), bytearray()
    try:
        while piece := answer.read1(65536):
            data += piece
        length = answer.headers.get("Content-Length")
        end = "short" if length is not None and int(length) > len(data) else "whole"
    except http.client.IncompleteRead:
        end = "short"
    except ConnectionResetError:
        end = "reset"
    finally:
        connection.close()
    return answer, bytes(data), end


ENDS: list[tuple[str, list[int | None], int, str]] = [
    # list of faults, its entries → bytes that are received, end
    ("cut_after", [100_000], 100_000, "short"),
    ("cut_after", [0], 0, "short"),
    ("cut_after", [None], SIZE, "whole"),
    ("reset_after", [100_000], 100_000, "reset"),
    ("cut_at", [123_456], 123_456, "short"),
    ("reset_at", [123_456], 123_456, "reset"),
]


@pytest.mark.parametrize(("name", "entries", "received", "end"), ENDS)
def test_a_body_ends_at_the_requested_byte_and_only_once(
    civitai: SandboxCivitAI, lora: Path, name: str, entries: list[int | None], received: int, end: str
) -> None:
    setattr(civitai.storage, name, entries)
    url = link(civitai)

    _, first, first_end = receive(url)
    _, second, second_end = receive(url)

    assert (len(first), first_end) == (received, end)
    assert lora.read_bytes().startswith(first)
    assert (second, second_end) == (lora.read_bytes(), "whole")


def test_a_fault_at_a_byte_of_the_file_happens_in_the_range_that_reaches_it(civitai: SandboxCivitAI) -> None:
    civitai.storage.cut_at = [50_000]
    url = link(civitai)

    _, before, before_end = receive(url, {"Range": "bytes=0-49999"})
    _, through, through_end = receive(url, {"Range": "bytes=40000-60000"})

    assert (len(before), before_end) == (50_000, "whole")
    assert (len(through), through_end) == (10_000, "short")


def test_a_flipped_byte_is_the_only_difference(civitai: SandboxCivitAI, lora: Path) -> None:
    civitai.storage.flip_at = [200_000]
    url, true = link(civitai), lora.read_bytes()

    _, data, end = receive(url)

    assert end == "whole"
    assert [at for at in range(SIZE) if data[at] != true[at]] == [200_000]
    assert receive(url)[1] == true


BODIES: list[tuple[ServerFault, int, int, str]] = [
    # fault of the answer to bytes=1000-1999 → status, bytes that are received, Content-Range
    (ServerFault(missing=10), 206, 990, f"bytes 1000-1999/{SIZE}"),
    (ServerFault(extra=10), 206, 1010, f"bytes 1000-1999/{SIZE}"),
    (ServerFault(shift=5), 206, 1000, f"bytes 1005-2004/{SIZE}"),
    (ServerFault(content_range="bytes 0-999/1000"), 206, 1000, "bytes 0-999/1000"),
    (ServerFault(whole=True), 200, SIZE, "None"),
    (ServerFault(framing="close"), 206, 1000, f"bytes 1000-1999/{SIZE}"),
    (ServerFault(framing="chunked"), 206, 1000, f"bytes 1000-1999/{SIZE}"),
]


@pytest.mark.parametrize(("fault", "status", "received", "content_range"), BODIES)
def test_a_body_is_wrong_as_requested(
    civitai: SandboxCivitAI, fault: ServerFault, status: int, received: int, content_range: str
) -> None:
    civitai.storage.fail(fault)

    answer, data, end = receive(link(civitai), {"Range": "bytes=1000-1999"})

    assert (answer.status, len(data), end) == (status, received, "whole")
    assert str(answer.headers["Content-Range"]) == content_range


def test_a_shifted_range_has_the_bytes_of_its_content_range(civitai: SandboxCivitAI, lora: Path) -> None:
    civitai.storage.fail(ServerFault(shift=5))

    _, data, _ = receive(link(civitai), {"Range": "bytes=1000-1999"})

    assert data == lora.read_bytes()[1005:2005]


def test_other_framings_have_no_length_of_the_file(civitai: SandboxCivitAI, lora: Path) -> None:
    url = link(civitai)
    for framing in ("close", "chunked", "gzip"):
        civitai.storage.fail(ServerFault(framing=framing))

    close, chunked, packed = receive(url), receive(url), receive(url)

    assert (close[0].headers["Content-Length"], close[1]) == (None, lora.read_bytes())
    assert (chunked[0].headers["Transfer-Encoding"], chunked[1]) == ("chunked", lora.read_bytes())
    assert packed[0].headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(packed[1]) == lora.read_bytes()


def test_a_cut_body_without_a_length_looks_whole(civitai: SandboxCivitAI) -> None:
    civitai.storage.fail(ServerFault(framing="close", cut_after=100_000))

    _, data, end = receive(link(civitai))

    assert (len(data), end) == (100_000, "whole")


def test_an_etag_can_change_from_one_answer_to_the_next(civitai: SandboxCivitAI) -> None:
    url = link(civitai)
    civitai.storage.fail(ServerFault(etag='"other"'))

    other, own = get(url), get(url)

    assert (other.headers["ETag"], other.content) == ('"other"', own.content)
    assert own.headers["ETag"] != '"other"'


@pytest.mark.parametrize("stall", [{"stall_after": [100_000]}, {"stall_at": [100_000]}])
def test_a_stalled_answer_is_silent_and_keeps_the_connection(civitai: SandboxCivitAI, stall: dict[str, Any]) -> None:
    for name, entries in stall.items():
        setattr(civitai.storage, name, entries)

    with pytest.raises(requests.ConnectionError, match="timed out"):
        requests.get(link(civitai), timeout=0.1)


def test_a_stopped_server_ends_a_stall(lora: Path) -> None:
    civitai = SandboxCivitAI()
    civitai.start()
    civitai.add(135867, lora)
    civitai.storage.stall_after = [100_000]
    stalled, ended = threading.Event(), list[str]()
    civitai.storage.at(100_000, stalled.set)
    client = threading.Thread(target=lambda: ended.append(receive(link(civitai))[2]))
    client.start()
    stalled.wait(10)

    civitai.stop()
    client.join(10)

    assert ended in (["short"], ["reset"])


# Speed: the shortest time that a slow answer may take, never the longest


def download_seconds(url: str) -> float:
    began = time.monotonic()
    assert receive(url)[2] == "whole"
    return time.monotonic() - began


@pytest.mark.parametrize(
    "slow", [{"rate": 1_500_000.0}, {"total_rate": 1_500_000.0}, {"trickle": [1_500_000.0]}, {"latency": 0.2}]
)
def test_an_answer_is_no_faster_than_requested(civitai: SandboxCivitAI, slow: dict[str, Any]) -> None:
    url = link(civitai)
    for name, value in slow.items():
        setattr(civitai.storage, name, value)

    assert download_seconds(url) >= 0.19  # 300 kB at 1.5 MB/s


def test_answers_share_the_total_rate(civitai: SandboxCivitAI) -> None:
    url = link(civitai)
    civitai.storage.total_rate = 3_000_000.0
    began = time.monotonic()

    clients = [threading.Thread(target=receive, args=(url,)) for _ in range(2)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(10)

    assert time.monotonic() - began >= 0.19


def test_too_many_connections_get_a_slow_down(civitai: SandboxCivitAI) -> None:
    url, storage = link(civitai), civitai.storage
    storage.max_connections, storage.stall_after = 1, [1000]
    parts = urlsplit(url)
    with socket.create_connection(("127.0.0.1", parts.port or 0)) as first:
        first.sendall(f"GET {parts.path}?{parts.query} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        first.recv(1)

        second = get(url)

    assert (second.status_code, "SlowDown" in second.text) == (503, True)
    assert storage.peak_connections == 1


def test_resets_come_at_intervals_in_the_bytes_of_all_answers(civitai: SandboxCivitAI) -> None:
    url = link(civitai)
    civitai.storage.reset_every = 200_000

    first, second = (receive(url, {"Range": f"bytes={start}-"}) for start in (0, 200_000))
    civitai.storage.wait_until_idle()
    third = receive(url)

    assert (len(first[1]), first[2]) == (200_000, "reset")
    assert (len(second[1]), second[2]) == (100_000, "whole")
    assert (len(third[1]), third[2]) == (100_000, "reset")


def test_a_callback_runs_once_in_the_middle_of_a_body(civitai: SandboxCivitAI) -> None:
    url, storage, at = link(civitai), civitai.storage, list[int]()
    storage.at(150_000, storage.expire_links)
    storage.at(150_000, lambda: at.append(storage.bytes_sent))

    under_way, after = receive(url), receive(url)

    assert (under_way[2], len(under_way[1])) == ("whole", SIZE)
    assert after[0].status == 403
    assert at == [150_000]


def test_counters_count_what_was_requested(civitai: SandboxCivitAI) -> None:
    url, storage = link(civitai), civitai.storage
    path = urlsplit(url).path
    session = requests.Session()
    for byte_range in ("bytes=0-999", "bytes=1000-1999"):
        session.get(url, headers={"Range": byte_range})
    receive(url)

    storage.wait_until_idle()
    assert storage.bytes_sent == storage.sent[path] == 2000 + SIZE
    assert storage.connections == {path: 2}
    assert storage.ranges == ["bytes=0-999", "bytes=1000-1999", None]
    assert get(f"{civitai.url}/_counters").json()["links_given"] == 1

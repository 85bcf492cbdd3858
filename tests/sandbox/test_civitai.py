"""The sandbox's CivitAI and its storage, asked as a client asks them; and the files that are served in the tests."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from safetensors import safe_open

from sandbox import models
from sandbox.civitai import (
    CLOUDFLARE_522,
    CUT,
    FORBIDDEN,
    REGION_BLOCKED,
    RESET,
    SERVER_ERROR,
    SILENCE,
    TOO_MANY,
    CivitAI,
    Fault,
    HostedVersion,
    Storage,
    redirect,
    too_many,
)

SIZE = 300_000
BEARER = {"Authorization": "Bearer the-key"}


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.sdxl_lora(tmp_path_factory.mktemp("models") / "add-detail-xl.safetensors", 1, SIZE)


@pytest.fixture
def civitai(lora: Path) -> Iterator[CivitAI]:
    with CivitAI(key="the-key") as server:
        server.add(135867, lora, name="Detail Tweaker XL", model_id=122359, file_id=99264, trained_words=["detail"])
        yield server


@pytest.fixture
def storage() -> Iterator[Storage]:
    with Storage() as server:
        yield server


def get(url: str, **headers: str) -> requests.Response:
    """One GET, as a client that follows no redirects and sends nothing by itself."""
    own = {"Accept-Encoding": "identity", "User-Agent": "a-client/1"}
    return requests.get(url, headers=own | headers, allow_redirects=False, timeout=10)


def link(civitai: CivitAI) -> str:
    return get(civitai.download_url(135867), **BEARER).headers["Location"]


# Files


MAKERS: list[tuple[Callable[..., Path], str, tuple[int, ...]]] = [
    # what makes it, a tensor that tells the architecture, its shape
    (models.sdxl_checkpoint, "conditioner.embedders.1.model.ln_final.weight", (1280,)),
    (
        models.sdxl_checkpoint,
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
        (640, 2048),
    ),
    (models.sd15_checkpoint, "cond_stage_model.transformer.text_model.final_layer_norm.weight", (768,)),
    (
        models.sd15_checkpoint,
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        (320, 768),
    ),
    (models.sdxl_lora, "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight", (4, 2048)),
    (models.sdxl_lora, "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight", (1280, 4)),
    (
        models.sd15_lora,
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight",
        (4, 768),
    ),
]


@pytest.mark.parametrize(("make", "tensor", "shape"), MAKERS)
@pytest.mark.parametrize("size", [None, 3_333_333])
def test_models_are_what_safetensors_itself_can_read(
    tmp_path: Path, make: Callable[..., Path], tensor: str, shape: tuple[int, ...], size: int | None
) -> None:
    path = make(tmp_path / "model.safetensors", 1, size)

    with safe_open(path, "np") as file:
        assert tuple(file.get_slice(tensor).get_shape()) == shape
        assert "modelspec.architecture" in file.metadata()
    assert size is None or path.stat().st_size == size


def test_a_seed_decides_every_byte_of_a_model(tmp_path: Path) -> None:
    one, same, other = (models.sdxl_lora(tmp_path / str(n) / "x.safetensors", seed) for n, seed in enumerate((1, 1, 2)))

    assert one.read_bytes() == same.read_bytes()
    assert models.tensor_hash(one) != models.tensor_hash(other)


def test_a_model_that_carries_its_hash_carries_the_true_one(tmp_path: Path) -> None:
    path = models.sdxl_lora(tmp_path / "x.safetensors", 1, 100_000, hashed=True, ss_output_name="other")

    with safe_open(path, "np") as file:
        assert file.metadata()["sshs_model_hash"] == models.tensor_hash(path)
        assert file.metadata()["ss_output_name"] == "other"


def test_a_size_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too few"):
        models.sdxl_lora(tmp_path / "x.safetensors", 1, 1000)


# Metadata


def test_a_versions_metadata_tells_its_file(civitai: CivitAI, lora: Path) -> None:
    answer = get(f"{civitai.url}/api/v1/model-versions/135867").json()

    file = answer["files"][0]
    sha256 = hashlib.sha256(lora.read_bytes()).hexdigest().upper()
    assert (answer["id"], answer["modelId"], answer["baseModel"]) == (135867, 122359, "SDXL 1.0")
    assert answer["trainedWords"] == ["detail"]
    assert answer["air"] == "urn:air:sdxl:lora:civitai:122359@135867"
    assert (file["id"], file["sizeKB"] * 1024, file["primary"]) == (99264, SIZE, True)
    assert file["metadata"] == {"format": "SafeTensor", "size": None, "fp": None}
    assert (file["hashes"]["SHA256"], file["hashes"]["AutoV2"]) == (sha256, sha256[:10])
    assert file["hashes"]["AutoV3"] == models.tensor_hash(lora)[:12].upper()
    assert (file["pickleScanResult"], file["virusScanResult"]) == ("Success", "Success")
    assert file["downloadUrl"] == civitai.download_url(135867)


def test_a_models_versions_come_newest_first(civitai: CivitAI, lora: Path) -> None:
    civitai.add(200000, lora, model_id=122359)

    answer = get(f"{civitai.url}/api/v1/models/122359").json()

    assert [version["id"] for version in answer["modelVersions"]] == [200000, 135867]


def test_mini_tells_one_file(civitai: CivitAI, lora: Path) -> None:
    civitai.add(135867, lora, file_id=5, file_name="other.safetensors")

    mini = get(f"{civitai.url}/api/v1/model-versions/mini/135867?modelFileId=5").json()

    assert (mini["fileName"], mini["requireAuth"]) == ("other.safetensors", True)
    assert mini["downloadUrls"] == [civitai.download_url(135867, fileId=5)]


@pytest.mark.parametrize("name", ["SHA256", "AutoV2", "AutoV3", "CRC32"])
def test_a_hash_finds_the_oldest_version_that_has_it(civitai: CivitAI, lora: Path, name: str) -> None:
    civitai.add(200000, lora)
    wanted = get(f"{civitai.url}/api/v1/model-versions/135867").json()["files"][0]["hashes"][name]

    found = get(f"{civitai.url}/api/v1/model-versions/by-hash/{wanted.lower()}").json()
    batch = requests.post(f"{civitai.url}/api/v1/model-versions/by-hash", json=[wanted, "00"]).json()

    assert found["id"] == 135867
    assert [version["id"] for version in batch] == [135867]


METADATA_REFUSALS = [
    # path, method, status
    ("model-versions/1", "GET", 404),
    ("model-versions/mini/1", "GET", 404),
    ("model-versions/by-hash/00", "GET", 404),
    ("models/1", "GET", 404),
    ("model-versions/x", "GET", 400),
    ("model-versions/135867", "HEAD", 405),
]


@pytest.mark.parametrize(("path", "method", "status"), METADATA_REFUSALS)
def test_metadata_refuses(civitai: CivitAI, path: str, method: str, status: int) -> None:
    answer = requests.request(method, f"{civitai.url}/api/v1/{path}")

    assert answer.status_code == status


SAID: list[tuple[str, Any, Callable[[dict[str, Any]], Any], Any]] = [
    # field of the file, its value → what the metadata say
    ("sha256", "", lambda file: file["hashes"], {}),  # not scanned yet
    ("sha256", "ab" * 32, lambda file: file["hashes"], {"AutoV2": "ABABABABAB", "SHA256": "AB" * 32}),
    ("size_kb", 1.5, lambda file: file["sizeKB"], 1.5),
    ("pickle_scan", "Danger", lambda file: file["pickleScanResult"], "Danger"),
    ("virus_scan", "Pending", lambda file: file["virusScanResult"], "Pending"),
]


@pytest.mark.parametrize(("field", "value", "told", "expected"), SAID)
def test_metadata_say_what_they_are_told_to(
    civitai: CivitAI, field: str, value: Any, told: Callable[[dict[str, Any]], Any], expected: Any
) -> None:
    setattr(civitai.versions[135867].files[0], field, value)

    assert told(get(f"{civitai.url}/api/v1/model-versions/135867").json()["files"][0]) == expected


def test_an_archived_version_lists_no_files(civitai: CivitAI) -> None:
    civitai.versions[135867].archived = True

    answer = get(f"{civitai.url}/api/v1/model-versions/135867").json()

    assert answer["files"] == []
    assert get(civitai.download_url(135867), **BEARER).status_code == 410


# Links


def test_a_link_is_a_redirect_to_the_storage_that_nobody_may_keep(civitai: CivitAI, lora: Path) -> None:
    answer = get(civitai.download_url(135867, type="Model", format="SafeTensor"), **BEARER)

    assert answer.status_code == 307
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Location"].startswith(f"{civitai.storage.url}/model/")
    assert get(answer.headers["Location"]).content == lora.read_bytes()
    assert (civitai.links_given, civitai.resolves[135867]) == (1, 1)


def test_a_head_request_for_a_link_counts_as_a_download(civitai: CivitAI) -> None:
    requests.head(civitai.download_url(135867), headers=BEARER)

    assert civitai.links_given == 1


def is_(**fields: Any) -> Callable[[HostedVersion], None]:
    def change(version: HostedVersion) -> None:
        for name, value in fields.items():
            setattr(version, name, value)

    return change


REFUSALS: list[tuple[Callable[[HostedVersion], None], str, dict[str, str], int, str]] = [
    # what the version is, query, headers → status, what the error names
    (is_(), "type=Lora", BEARER, 400, "Invalid"),
    (is_(), "format=Zip", BEARER, 400, "Invalid"),
    (is_(status="Unpublished"), "", BEARER, 404, "File not found"),
    (is_(), "size=full", BEARER, 404, "File not found"),  # the author's own words differ
    (is_(), "fp=fp16", BEARER, 404, "File not found"),
    (is_(), "fileId=1", BEARER, 404, "File not found"),
    (is_(archived=True), "", BEARER, 410, "archived"),
    (is_(usage_control="Generation"), "", BEARER, 401, "disabled downloads"),
    (is_(), "", {}, 401, "logged in"),
    (is_(), "", {"Authorization": "Bearer wrong"}, 401, "logged in"),
    (is_(), "token=the-key", {"Authorization": "Bearer wrong"}, 401, "logged in"),  # the header wins
    (is_(availability="EarlyAccess", early_access_ends="2031-05-05"), "", BEARER, 403, "2031-05-05"),
    (is_(availability="Private"), "", BEARER, 403, "do not have access"),
]


@pytest.mark.parametrize(("change", "query", "headers", "status", "says"), REFUSALS)
def test_a_link_is_refused(
    civitai: CivitAI,
    change: Callable[[HostedVersion], None],
    query: str,
    headers: dict[str, str],
    status: int,
    says: str,
) -> None:
    change(civitai.versions[135867])

    answer = get(f"{civitai.download_url(135867)}?{query}", **headers)

    assert answer.status_code == status
    assert answer.headers["Content-Type"] == "application/json"
    assert says in answer.text
    assert civitai.links_given == 0


@pytest.mark.parametrize("query", ["type=Model&format=SafeTensor", "fileId=99264", "token=the-key"])
def test_a_link_is_given(civitai: CivitAI, query: str) -> None:
    headers = {} if "token" in query else BEARER

    assert get(f"{civitai.download_url(135867)}?{query}", **headers).status_code == 307


def test_a_browser_without_a_key_is_led_to_the_login_page(civitai: CivitAI) -> None:
    led = get(civitai.download_url(135867), **{"User-Agent": "Mozilla/5.0 (X11) Chrome/140"})

    assert (led.status_code, urlsplit(led.headers["Location"]).path) == (307, "/login")
    page = get(civitai.url + led.headers["Location"])
    assert (page.status_code, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")


FAULTS = [
    (REGION_BLOCKED, 451, "REGION_BLOCKED"),
    (FORBIDDEN, 403, "Forbidden"),
    (TOO_MANY, 429, "unusual amount"),
    (too_many(7), 429, "unusual amount"),
    (SERVER_ERROR, 500, "error"),
    (CLOUDFLARE_522, 522, "<html>"),
    (redirect("http://10.0.0.1/x"), 307, ""),
]


@pytest.mark.parametrize(("fault", "status", "says"), FAULTS)
def test_a_fault_is_met_as_often_as_asked_and_where_asked(
    civitai: CivitAI, fault: Fault, status: int, says: str
) -> None:
    civitai.fail(fault, times=2, on="/api/download/")

    answers = [get(civitai.download_url(135867), **BEARER) for _ in range(3)]
    metadata = get(f"{civitai.url}/api/v1/model-versions/135867")

    assert [answer.status_code for answer in answers] == [status, status, 307]
    assert says in answers[0].text
    assert metadata.status_code == 200
    assert answers[0].headers.get("Retry-After") == ("7" if fault == too_many(7) else None)


def test_a_fault_without_number_lasts_until_it_is_healed(civitai: CivitAI) -> None:
    civitai.fail(SERVER_ERROR, times=None)

    assert [get(civitai.url + "/login").status_code for _ in range(3)] == [500, 500, 500]
    civitai.heal()
    assert get(civitai.url + "/login").status_code == 200


@pytest.mark.parametrize("fault", [CUT, RESET])
def test_a_connection_can_end_without_an_answer(civitai: CivitAI, fault: Fault) -> None:
    civitai.fail(fault)

    with pytest.raises(requests.ConnectionError):
        get(civitai.download_url(135867))


def test_silence_lasts_until_the_client_leaves(civitai: CivitAI) -> None:
    civitai.fail(SILENCE)

    with pytest.raises(requests.ReadTimeout):
        requests.get(civitai.url, timeout=0.05)


def test_twenty_redirects_lead_to_the_file_and_a_circle_to_itself(civitai: CivitAI) -> None:
    civitai.redirects = [20, -1]

    def hops() -> list[str]:
        url, seen = civitai.download_url(135867), list[str]()
        while len(seen) < 30 and (answer := get(url, **BEARER)).status_code == 307:
            url = answer.headers["Location"]
            seen.append(url)
            if url.startswith(civitai.storage.url):
                break
        return seen

    long, circle = hops(), hops()

    assert (len(long), len(set(long))) == (21, 21)
    assert long[-1].startswith(civitai.storage.url)
    assert (len(circle), len(set(circle))) == (30, 1)


def test_a_quota_is_a_number_of_links(civitai: CivitAI) -> None:
    civitai.quota = 1

    assert [get(civitai.download_url(135867), **BEARER).status_code for _ in range(2)] == [307, 429]


# The storage


RANGES = [
    # Range → status, Content-Range, the bytes
    ("bytes=0-", 206, "bytes 0-9/10", b"0123456789"),
    ("bytes=2-4", 206, "bytes 2-4/10", b"234"),
    ("bytes=2-99", 206, "bytes 2-9/10", b"23456789"),
    ("bytes=-3", 206, "bytes 7-9/10", b"789"),
    ("bytes=9-9", 206, "bytes 9-9/10", b"9"),
    ("bytes=10-", 416, "bytes */10", None),
    ("bytes=4-2", 200, None, b"0123456789"),  # nonsense is ignored
    ("bytes=0-1,3-4", 200, None, b"0123456789"),  # several at once are not offered
    ("lines=0-1", 200, None, b"0123456789"),
    (None, 200, None, b"0123456789"),
]


@pytest.mark.parametrize(("wanted", "status", "label", "data"), RANGES)
def test_ranges(
    storage: Storage, tmp_path: Path, wanted: str | None, status: int, label: str | None, data: bytes | None
) -> None:
    path = tmp_path / "digits.bin"
    path.write_bytes(b"0123456789")

    answer = get(storage.publish(path), **({"Range": wanted} if wanted else {}))

    assert answer.status_code == status
    assert answer.headers.get("Content-Range") == label
    assert data is None or answer.content == data
    assert storage.ranges == [wanted]


def test_if_range_keeps_two_versions_of_a_file_apart(civitai: CivitAI, tmp_path: Path) -> None:
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
    told = get(f"{civitai.url}/api/v1/model-versions/135867").json()["files"][0]["hashes"]["SHA256"]
    assert told != hashlib.sha256(other.read_bytes()).hexdigest().upper()  # CivitAI still describes the first


def test_r2_tells_an_etag_and_a_name(civitai: CivitAI) -> None:
    answer = get(link(civitai))

    assert answer.headers["ETag"].startswith('"')
    assert answer.headers["Content-Disposition"] == 'attachment; filename="add-detail-xl.safetensors"'
    assert answer.headers["Accept-Ranges"] == "bytes"


def test_b2_tells_a_file_id_and_no_etag(lora: Path) -> None:
    with CivitAI(form="b2") as civitai:
        civitai.add(135867, lora)
        url = link(civitai)

        answer = get(url)

        assert urlsplit(url).path.startswith("/file/civitai-modelfiles/model/")
        assert "Authorization=3_" in url
        assert "ETag" not in answer.headers
        assert "x-bz-file-id" in answer.headers
        assert get(url, **{"Range": "bytes=0-1", "If-Range": '"x"'}).status_code == 200


LINK_REFUSALS = [
    # form, method, what becomes of the link → status, code
    ("r2", "HEAD", "nothing", 403, ""),
    ("r2", "GET", "expired", 403, "ExpiredRequest"),
    ("r2", "GET", "forged", 403, "SignatureDoesNotMatch"),
    ("b2", "GET", "expired", 401, "expired_auth_token"),
    ("b2", "GET", "forged", 401, "bad_auth_token"),
]


@pytest.mark.parametrize(("form", "method", "fate", "status", "code"), LINK_REFUSALS)
def test_a_link_that_is_not_good_is_refused(
    lora: Path, form: Any, method: str, fate: str, status: int, code: str
) -> None:
    with CivitAI(form=form) as civitai:
        civitai.add(135867, lora)
        url = link(civitai)
        if fate == "expired":
            civitai.storage.expire_links()
        if fate == "forged":
            url = url.replace("Signature=", "Signature=0").replace("Authorization=3", "Authorization=4")

        answer = requests.request(method, url)

        assert answer.status_code == status
        assert code in answer.text
        assert get(link(civitai)).status_code == 200


def test_links_age(civitai: CivitAI) -> None:
    civitai.storage.link_life = 0.0

    assert get(link(civitai)).status_code == 403


@pytest.mark.parametrize(
    "headers", [BEARER, {"X-Key": "the-key"}, {"X-Key": "Bearer the-key"}, {"Cookie": "session=1"}]
)
def test_a_key_on_the_storage_is_refused_and_remembered(civitai: CivitAI, headers: dict[str, str]) -> None:
    url = link(civitai)

    answer = get(url, **headers)

    assert answer.status_code == 400
    assert civitai.storage.keys_seen == list(headers.values())


def test_names_from_the_uploader_never_break_a_header(civitai: CivitAI, lora: Path) -> None:
    civitai.add(7, lora, file_name="../ü 😀\r\nX: y.safetensors")

    answer = get(get(civitai.download_url(7), **BEARER).headers["Location"])

    assert answer.status_code == 200
    assert "X" not in answer.headers


# Bodies that go wrong: what arrives, over a bare connection


def receive(url: str, headers: dict[str, str] | None = None) -> tuple[http.client.HTTPResponse, bytes, str]:
    """The answer, the bytes that came, and how it ended: whole, short or reset."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=10)
    connection.request("GET", f"{parts.path}?{parts.query}", headers=headers or {})
    answer, data = connection.getresponse(), bytearray()
    try:
        while piece := answer.read1(65536):
            data += piece
        wanted = answer.headers.get("Content-Length")
        end = "short" if wanted is not None and int(wanted) > len(data) else "whole"
    except http.client.IncompleteRead:
        end = "short"
    except ConnectionResetError:
        end = "reset"
    finally:
        connection.close()
    return answer, bytes(data), end


ENDS: list[tuple[str, list[int | None], int, str]] = [
    # list, entries → bytes that arrive, end
    ("cut_after", [100_000], 100_000, "short"),
    ("cut_after", [0], 0, "short"),
    ("cut_after", [None], SIZE, "whole"),
    ("reset_after", [100_000], 100_000, "reset"),
    ("cut_at", [123_456], 123_456, "short"),
    ("reset_at", [123_456], 123_456, "reset"),
]


@pytest.mark.parametrize(("name", "entries", "arrives", "end"), ENDS)
def test_a_line_breaks_where_asked_and_once(
    civitai: CivitAI, lora: Path, name: str, entries: list[int | None], arrives: int, end: str
) -> None:
    setattr(civitai.storage, name, entries)
    url = link(civitai)

    _, first, first_end = receive(url)
    _, second, second_end = receive(url)

    assert (len(first), first_end) == (arrives, end)
    assert lora.read_bytes().startswith(first)
    assert (second, second_end) == (lora.read_bytes(), "whole")


def test_a_place_in_the_file_is_met_by_the_range_that_reaches_it(civitai: CivitAI) -> None:
    civitai.storage.cut_at = [50_000]
    url = link(civitai)

    _, before, before_end = receive(url, {"Range": "bytes=0-49999"})
    _, through, through_end = receive(url, {"Range": "bytes=40000-60000"})

    assert (len(before), before_end) == (50_000, "whole")
    assert (len(through), through_end) == (10_000, "short")


def test_a_flipped_byte_is_the_only_difference(civitai: CivitAI, lora: Path) -> None:
    civitai.storage.flip_at = [200_000]
    url, true = link(civitai), lora.read_bytes()

    _, data, end = receive(url)

    assert end == "whole"
    assert [place for place in range(SIZE) if data[place] != true[place]] == [200_000]
    assert receive(url)[1] == true


BODIES: list[tuple[Fault, int, int, str]] = [
    # fault of an answer to bytes=1000-1999 → status, bytes that arrive, Content-Range
    (Fault(missing=10), 206, 990, f"bytes 1000-1999/{SIZE}"),
    (Fault(extra=10), 206, 1010, f"bytes 1000-1999/{SIZE}"),
    (Fault(shift=5), 206, 1000, f"bytes 1005-2004/{SIZE}"),
    (Fault(content_range="bytes 0-999/1000"), 206, 1000, "bytes 0-999/1000"),
    (Fault(whole=True), 200, SIZE, "None"),
    (Fault(framing="close"), 206, 1000, f"bytes 1000-1999/{SIZE}"),
    (Fault(framing="chunked"), 206, 1000, f"bytes 1000-1999/{SIZE}"),
]


@pytest.mark.parametrize(("fault", "status", "arrives", "label"), BODIES)
def test_a_body_is_spoiled_as_asked(civitai: CivitAI, fault: Fault, status: int, arrives: int, label: str) -> None:
    civitai.storage.fail(fault)

    answer, data, end = receive(link(civitai), {"Range": "bytes=1000-1999"})

    assert (answer.status, len(data), end) == (status, arrives, "whole")
    assert str(answer.headers["Content-Range"]) == label


def test_a_shifted_range_carries_the_bytes_it_says(civitai: CivitAI, lora: Path) -> None:
    civitai.storage.fail(Fault(shift=5))

    _, data, _ = receive(link(civitai), {"Range": "bytes=1000-1999"})

    assert data == lora.read_bytes()[1005:2005]


def test_framing_leaves_no_length_to_trust(civitai: CivitAI, lora: Path) -> None:
    url = link(civitai)
    for framing in ("close", "chunked", "gzip"):
        civitai.storage.fail(Fault(framing=framing))

    close, chunked, packed = receive(url), receive(url), receive(url)

    assert (close[0].headers["Content-Length"], close[1]) == (None, lora.read_bytes())
    assert (chunked[0].headers["Transfer-Encoding"], chunked[1]) == ("chunked", lora.read_bytes())
    assert packed[0].headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(packed[1]) == lora.read_bytes()


def test_no_length_and_a_cut_look_like_a_whole_file(civitai: CivitAI) -> None:
    civitai.storage.fail(Fault(framing="close", cut_after=100_000))

    _, data, end = receive(link(civitai))

    assert (len(data), end) == (100_000, "whole")


def test_an_etag_can_change_from_one_answer_to_the_next(civitai: CivitAI) -> None:
    url = link(civitai)
    civitai.storage.fail(Fault(etag='"other"'))

    other, own = get(url), get(url)

    assert (other.headers["ETag"], other.content) == ('"other"', own.content)
    assert own.headers["ETag"] != '"other"'


@pytest.mark.parametrize("where", [{"stall_after": [100_000]}, {"stall_at": [100_000]}])
def test_a_stall_says_nothing_more_and_keeps_the_line(civitai: CivitAI, where: dict[str, Any]) -> None:
    for name, entries in where.items():
        setattr(civitai.storage, name, entries)

    with pytest.raises(requests.ConnectionError, match="timed out"), requests.get(link(civitai), timeout=0.1) as answer:
        answer.content  # noqa: B018 — reads it


def test_a_stopped_server_ends_a_stall(lora: Path) -> None:
    civitai = CivitAI()
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


# Speed: the least time that a slow line must take, never the most


def took(url: str) -> float:
    began = time.monotonic()
    assert receive(url)[2] == "whole"
    return time.monotonic() - began


@pytest.mark.parametrize(
    "slow", [{"rate": 1_500_000.0}, {"line_rate": 1_500_000.0}, {"trickle": [1_500_000.0]}, {"latency": 0.2}]
)
def test_a_line_is_no_faster_than_asked(civitai: CivitAI, slow: dict[str, Any]) -> None:
    url = link(civitai)
    for name, value in slow.items():
        setattr(civitai.storage, name, value)

    assert took(url) >= 0.19  # 300 kB at 1.5 MB/s


def test_a_common_line_is_shared(civitai: CivitAI) -> None:
    url = link(civitai)
    civitai.storage.line_rate = 3_000_000.0
    began = time.monotonic()

    clients = [threading.Thread(target=receive, args=(url,)) for _ in range(2)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(10)

    assert time.monotonic() - began >= 0.19


def test_too_many_connections_are_told_to_slow_down(civitai: CivitAI) -> None:
    url, storage = link(civitai), civitai.storage
    storage.max_connections, storage.stall_after = 1, [1000]
    parts = urlsplit(url)
    with socket.create_connection(("127.0.0.1", parts.port or 0)) as first:
        first.sendall(f"GET {parts.path}?{parts.query} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        first.recv(1)

        second = get(url)

    assert (second.status_code, "SlowDown" in second.text) == (503, True)
    assert storage.peak_connections == 1


def test_resets_come_every_so_many_bytes_of_all_answers(civitai: CivitAI) -> None:
    url = link(civitai)
    civitai.storage.reset_every = 200_000

    first, second = (receive(url, {"Range": f"bytes={start}-"}) for start in (0, 200_000))
    civitai.storage.settle()
    third = receive(url)

    assert (len(first[1]), first[2]) == (200_000, "reset")
    assert (len(second[1]), second[2]) == (100_000, "whole")
    assert (len(third[1]), third[2]) == (100_000, "reset")


def test_something_happens_midway_and_once(civitai: CivitAI) -> None:
    url, storage, at = link(civitai), civitai.storage, list[int]()
    storage.at(150_000, storage.expire_links)
    storage.at(150_000, lambda: at.append(storage.bytes_sent))

    under_way, after = receive(url), receive(url)

    assert (under_way[2], len(under_way[1])) == ("whole", SIZE)
    assert after[0].status == 403
    assert at == [150_000]


def test_counters_tell_what_was_asked(civitai: CivitAI) -> None:
    url, storage = link(civitai), civitai.storage
    path = urlsplit(url).path
    session = requests.Session()
    for wanted in ("bytes=0-999", "bytes=1000-1999"):
        session.get(url, headers={"Range": wanted})
    receive(url)

    storage.settle()
    assert storage.bytes_sent == storage.sent[path] == 2000 + SIZE
    assert storage.connections == {path: 2}
    assert storage.ranges == ["bytes=0-999", "bytes=1000-1999", None]
    assert get(f"{civitai.url}/_counters").json()["links_given"] == 1


# Processes


def test_civitai_runs_as_a_process_of_its_own(lora: Path) -> None:
    command = [sys.executable, "-m", "sandbox.civitai", f"7={lora}", "--unhashed"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdin
        where = json.loads(process.stdout.readline())

        answer = requests.get(f"{where['api']}/api/download/models/7")

        assert answer.content == lora.read_bytes()
        process.stdin.close()
        assert process.wait(10) == 0

"""The sandbox's CivitAI, asked as a client asks it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests

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
    HostedVersion,
    SandboxCivitAI,
    ServerFault,
    redirect,
    too_many,
)
from tests.sandbox.client import BEARER, SIZE, get

# Metadata


def test_the_metadata_of_a_version_describes_its_file(civitai: SandboxCivitAI, lora: Path) -> None:
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


def test_a_models_versions_come_newest_first(civitai: SandboxCivitAI, lora: Path) -> None:
    civitai.add(200000, lora, model_id=122359)

    answer = get(f"{civitai.url}/api/v1/models/122359").json()

    assert [version["id"] for version in answer["modelVersions"]] == [200000, 135867]


def test_mini_describes_one_file(civitai: SandboxCivitAI, lora: Path) -> None:
    civitai.add(135867, lora, file_id=5, file_name="other.safetensors")

    mini = get(f"{civitai.url}/api/v1/model-versions/mini/135867?modelFileId=5").json()

    assert (mini["fileName"], mini["requireAuth"]) == ("other.safetensors", True)
    assert mini["downloadUrls"] == [civitai.download_url(135867, fileId=5)]


@pytest.mark.parametrize("name", ["SHA256", "AutoV2", "AutoV3", "CRC32"])
def test_a_hash_finds_the_oldest_version_that_has_it(civitai: SandboxCivitAI, lora: Path, name: str) -> None:
    civitai.add(200000, lora)
    digest = get(f"{civitai.url}/api/v1/model-versions/135867").json()["files"][0]["hashes"][name]

    found = get(f"{civitai.url}/api/v1/model-versions/by-hash/{digest.lower()}").json()
    batch = requests.post(f"{civitai.url}/api/v1/model-versions/by-hash", json=[digest, "00"]).json()

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
def test_metadata_requests_that_are_refused(civitai: SandboxCivitAI, path: str, method: str, status: int) -> None:
    answer = requests.request(method, f"{civitai.url}/api/v1/{path}")

    assert answer.status_code == status


REPORTED: list[tuple[str, Any, Callable[[dict[str, Any]], Any], Any]] = [
    # field of the file, its value → a field of the metadata, its value
    ("sha256", "", lambda file: file["hashes"], {}),  # not scanned yet
    ("sha256", "ab" * 32, lambda file: file["hashes"], {"AutoV2": "ABABABABAB", "SHA256": "AB" * 32}),
    ("size_kb", 1.5, lambda file: file["sizeKB"], 1.5),
    ("pickle_scan", "Danger", lambda file: file["pickleScanResult"], "Danger"),
    ("virus_scan", "Pending", lambda file: file["virusScanResult"], "Pending"),
]


@pytest.mark.parametrize(("field", "value", "reported", "expected"), REPORTED)
def test_a_test_decides_what_the_metadata_report(
    civitai: SandboxCivitAI, field: str, value: Any, reported: Callable[[dict[str, Any]], Any], expected: Any
) -> None:
    setattr(civitai.versions[135867].files[0], field, value)

    assert reported(get(f"{civitai.url}/api/v1/model-versions/135867").json()["files"][0]) == expected


def test_an_archived_version_lists_no_files(civitai: SandboxCivitAI) -> None:
    civitai.versions[135867].archived = True

    answer = get(f"{civitai.url}/api/v1/model-versions/135867").json()

    assert answer["files"] == []
    assert get(civitai.download_url(135867), **BEARER).status_code == 410


# Links


def test_a_link_is_a_redirect_to_the_storage_that_no_cache_may_keep(civitai: SandboxCivitAI, lora: Path) -> None:
    answer = get(civitai.download_url(135867, type="Model", format="SafeTensor"), **BEARER)

    assert answer.status_code == 307
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Location"].startswith(f"{civitai.storage.url}/model/")
    assert get(answer.headers["Location"]).content == lora.read_bytes()
    assert (civitai.links_given, civitai.resolves[135867]) == (1, 1)


def test_a_head_request_for_a_link_counts_as_a_download(civitai: SandboxCivitAI) -> None:
    requests.head(civitai.download_url(135867), headers=BEARER)

    assert civitai.links_given == 1


def with_fields(**fields: Any) -> Callable[[HostedVersion], None]:
    def change(version: HostedVersion) -> None:
        for name, value in fields.items():
            setattr(version, name, value)

    return change


REFUSALS: list[tuple[Callable[[HostedVersion], None], str, dict[str, str], int, str]] = [
    # change of the version, query, headers → status, a part of the error
    (with_fields(), "type=Lora", BEARER, 400, "Invalid"),
    (with_fields(), "format=Zip", BEARER, 400, "Invalid"),
    (with_fields(status="Unpublished"), "", BEARER, 404, "File not found"),
    (with_fields(), "size=full", BEARER, 404, "File not found"),  # the file has no size
    (with_fields(), "fp=fp16", BEARER, 404, "File not found"),
    (with_fields(), "fileId=1", BEARER, 404, "File not found"),
    (with_fields(archived=True), "", BEARER, 410, "archived"),
    (with_fields(usage_control="Generation"), "", BEARER, 401, "disabled downloads"),
    (with_fields(), "", {}, 401, "logged in"),
    (with_fields(), "", {"Authorization": "Bearer wrong"}, 401, "logged in"),
    (
        with_fields(),
        "token=the-key",
        {"Authorization": "Bearer wrong"},
        401,
        "logged in",
    ),  # the header takes precedence
    (with_fields(availability="EarlyAccess", early_access_ends="2031-05-05"), "", BEARER, 403, "2031-05-05"),
    (with_fields(availability="Private"), "", BEARER, 403, "do not have access"),
]


@pytest.mark.parametrize(("change", "query", "headers", "status", "text"), REFUSALS)
def test_a_link_is_refused(
    civitai: SandboxCivitAI,
    change: Callable[[HostedVersion], None],
    query: str,
    headers: dict[str, str],
    status: int,
    text: str,
) -> None:
    change(civitai.versions[135867])

    answer = get(f"{civitai.download_url(135867)}?{query}", **headers)

    assert answer.status_code == status
    assert answer.headers["Content-Type"] == "application/json"
    assert text in answer.text
    assert civitai.links_given == 0


@pytest.mark.parametrize("query", ["type=Model&format=SafeTensor", "fileId=99264", "token=the-key"])
def test_a_link_is_given(civitai: SandboxCivitAI, query: str) -> None:
    headers = {} if "token" in query else BEARER

    assert get(f"{civitai.download_url(135867)}?{query}", **headers).status_code == 307


def test_a_browser_without_a_key_is_redirected_to_the_login_page(civitai: SandboxCivitAI) -> None:
    answer = get(civitai.download_url(135867), **{"User-Agent": "Mozilla/5.0 (X11) Chrome/140"})

    assert (answer.status_code, urlsplit(answer.headers["Location"]).path) == (307, "/login")
    page = get(civitai.url + answer.headers["Location"])
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


@pytest.mark.parametrize(("fault", "status", "text"), FAULTS)
def test_a_fault_happens_as_often_as_requested_and_only_on_its_path(
    civitai: SandboxCivitAI, fault: ServerFault, status: int, text: str
) -> None:
    civitai.fail(fault, times=2, on="/api/download/")

    answers = [get(civitai.download_url(135867), **BEARER) for _ in range(3)]
    metadata = get(f"{civitai.url}/api/v1/model-versions/135867")

    assert [answer.status_code for answer in answers] == [status, status, 307]
    assert text in answers[0].text
    assert metadata.status_code == 200
    assert answers[0].headers.get("Retry-After") == ("7" if fault == too_many(7) else None)


def test_a_fault_without_a_number_lasts_until_it_is_healed(civitai: SandboxCivitAI) -> None:
    civitai.fail(SERVER_ERROR, times=None)

    assert [get(civitai.url + "/login").status_code for _ in range(3)] == [500, 500, 500]
    civitai.heal()
    assert get(civitai.url + "/login").status_code == 200


@pytest.mark.parametrize("fault", [CUT, RESET])
def test_a_connection_can_close_without_an_answer(civitai: SandboxCivitAI, fault: ServerFault) -> None:
    civitai.fail(fault)

    with pytest.raises(requests.ConnectionError):
        get(civitai.download_url(135867))


def test_silence_lasts_until_the_client_leaves(civitai: SandboxCivitAI) -> None:
    civitai.fail(SILENCE)

    with pytest.raises(requests.ReadTimeout):
        requests.get(civitai.url, timeout=0.05)


def test_redirects_can_be_a_long_chain_or_a_circle(civitai: SandboxCivitAI) -> None:
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


def test_a_quota_is_a_number_of_links(civitai: SandboxCivitAI) -> None:
    civitai.quota = 1

    assert [get(civitai.download_url(135867), **BEARER).status_code for _ in range(2)] == [307, 429]


# Processes


def test_civitai_runs_as_a_separate_process(lora: Path) -> None:
    command = [sys.executable, "-m", "sandbox.civitai", f"7={lora}", "--unhashed"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdin
        urls = json.loads(process.stdout.readline())

        answer = requests.get(f"{urls['api']}/api/download/models/7")

        assert answer.content == lora.read_bytes()
        process.stdin.close()
        assert process.wait(10) == 0

"""The client of CivitAI's API: what it asks for, how often it tries, and that the key stays where it belongs."""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import pytest

from a1111_worker import __version__
from a1111_worker.context import Deadline
from a1111_worker.domain import ModelKind, ModelRef, RemoteFile
from a1111_worker.errors import (
    DownloadFailed,
    InvalidRequest,
    JobCancelled,
    JobTimeout,
    ModelAccessDenied,
    ModelError,
    ModelNotFound,
    ModelRejected,
    WorkerError,
)
from a1111_worker.models.civitai import CivitAI
from a1111_worker.models.sites import SiteTimings
from a1111_worker.transfer.egress import EgressPolicy
from sandbox import civitai as sandbox
from sandbox.models import sdxl_checkpoint, sdxl_lora, sha256_of
from sandbox.server import Exchange, Server

KEY = "0123456789abcdef-the-key"
LORA = ModelRef(ModelKind.LORA, version_id=135867)
QUICK = SiteTimings(connect=2.0, answer=2.0, shortest=0.0, longest=0.0, too_many=1.0)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[sandbox.SandboxCivitAI]:
    with sandbox.SandboxCivitAI(key=KEY) as service:
        service.add(
            135867,
            sdxl_lora(tmp_path / "add-detail-xl.safetensors"),
            name="Detail Tweaker XL",
            model_id=122359,
            file_id=99264,
            trained_words=("detail", " more "),
        )
        yield service


def client_of(
    *services: sandbox.SandboxCivitAI, key: str | None = KEY, timings: SiteTimings = QUICK, **options: Any
) -> CivitAI:
    urls = [service.url for service in services]
    policy = EgressPolicy([*urls, *(service.storage.url for service in services)])
    return CivitAI(policy=policy, urls=urls, key=key, timings=timings, **options)


def asked_of(server: Server) -> list[str]:
    return [
        asked.path + ("?" if asked.query else "") + "&".join(map("=".join, asked.query.items()))
        for asked in server.asked
    ]


def message_and_hint(error: WorkerError) -> str:
    return f"{error.message} | {error.hint}"


# -- describe ----------------------------------------------------------------------------------------------------------


def test_a_version_is_described_by_its_metadata(service: sandbox.SandboxCivitAI) -> None:
    path = service.versions[135867].files[0].path

    remote = client_of(service).describe(LORA, Deadline())

    assert remote == RemoteFile(
        url=f"{service.url}/api/download/models/135867?fileId=99264",
        name="Detail Tweaker XL",
        version_id=135867,
        file_id=99264,
        primary=True,
        size=path.stat().st_size,
        size_at_most=path.stat().st_size,
        sha256=sha256_of(path),
        base_model="SDXL 1.0",
        trained_words=("detail", "more"),
        file_name="add-detail-xl.safetensors",
    )


def test_a_name_that_repeats_the_key_is_shown_without_it(
    service: sandbox.SandboxCivitAI, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = sdxl_lora(tmp_path / "echo.safetensors")
    service.add(7, path, name=f"Look {KEY}", base_model=f"SDXL {KEY}", trained_words=(f"{KEY}{KEY}",))
    service.add(8, path, model_type=f"VAE {KEY}")
    client = client_of(service)
    caplog.set_level("DEBUG")

    remote = client.describe(ModelRef(ModelKind.LORA, version_id=7), Deadline())
    client.link(remote, Deadline())
    with pytest.raises(ModelRejected) as refused:
        client.describe(ModelRef(ModelKind.LORA, version_id=8), Deadline())

    assert remote.name == "Look [key]"
    assert KEY not in f"{remote} {message_and_hint(refused.value)} {caplog.text}"


def test_a_version_is_asked_for_once_while_it_is_cached(service: sandbox.SandboxCivitAI, tmp_path: Path) -> None:
    client, forgetful = client_of(service), client_of(service, cache_seconds=0.0)

    first = [client.describe(LORA, Deadline()) for _ in range(3)]
    at_first = service.metadata_asked
    second = [forgetful.describe(LORA, Deadline()) for _ in range(3)]

    assert (at_first, service.metadata_asked) == (1, 4)
    assert len({*first, *second}) == 1


def test_a_model_without_a_version_means_its_newest_version_with_a_warning(
    service: sandbox.SandboxCivitAI, tmp_path: Path
) -> None:
    older = service.add(99, sdxl_lora(tmp_path / "old.safetensors", seed=1), model_id=122359)
    older.published_at = "2023-01-01T00:00:00.000Z"

    remote = client_of(service).describe(ModelRef(ModelKind.LORA, model_id=122359), Deadline())

    assert remote.version_id == 135867
    assert "without a version: its newest version (135867)" in remote.warnings[0]


@pytest.mark.parametrize(
    ("kind", "listed", "fits"),
    [
        (ModelKind.LORA, "LORA", True),
        (ModelKind.LORA, "LoCon", True),
        (ModelKind.LORA, "DoRA", True),
        (ModelKind.CHECKPOINT, "Checkpoint", True),
        (ModelKind.LORA, "Checkpoint", False),
        (ModelKind.CHECKPOINT, "LORA", False),
        (ModelKind.LORA, "TextualInversion", False),
        (ModelKind.CHECKPOINT, "VAE", False),
    ],
)
def test_a_model_must_be_of_the_kind_that_was_asked_for(
    kind: ModelKind, listed: str, fits: bool, service: sandbox.SandboxCivitAI
) -> None:
    service.versions[135867].model_type = listed
    client, ref = client_of(service), ModelRef(kind, version_id=135867)

    if fits:
        assert client.describe(ref, Deadline()).version_id == 135867
    else:
        with pytest.raises(ModelRejected, match=f"CivitAI lists it as {listed}"):
            client.describe(ref, Deadline())


def test_a_version_that_may_not_be_downloaded_is_denied_before_a_link_is_asked_for(
    service: sandbox.SandboxCivitAI,
) -> None:
    service.versions[135867].usage_control = "Generation"

    with pytest.raises(ModelAccessDenied, match="has disabled its download"):
        client_of(service).describe(LORA, Deadline())

    assert service.links_given == 0


def test_an_archived_version_is_not_found(service: sandbox.SandboxCivitAI) -> None:
    service.versions[135867].archived = True

    with pytest.raises(ModelNotFound, match="archived"):
        client_of(service).describe(LORA, Deadline())


@pytest.mark.parametrize(
    "fault",
    [
        sandbox.SERVER_ERROR,
        sandbox.CLOUDFLARE_522,
        sandbox.HTML_PAGE,
        sandbox.RESET,
        sandbox.BAD_REQUEST,
        sandbox.ServerFault(200, b'{"id": 135867, "files": [', {"content-type": "application/json"}),
        sandbox.ServerFault(200, b"[" * 100_000, {"content-type": "application/json"}),
        sandbox.json_fault(200, ["no object"]),
        sandbox.json_fault(200, {"id": 4711, "files": []}),  # another version's metadata
        sandbox.redirect("http://127.0.0.1:9/elsewhere"),
    ],
)
def test_a_file_without_metadata_is_tried_with_a_warning(
    fault: sandbox.ServerFault, service: sandbox.SandboxCivitAI, caplog: pytest.LogCaptureFixture
) -> None:
    service.fail(fault, times=None, on="/api/v1/")
    ref = ModelRef(ModelKind.LORA, version_id=135867, size="full", fp="fp16", sha256="ab" * 32)
    client = client_of(service)

    remote = client.describe(ref, Deadline())

    assert remote.url == f"{service.url}/api/download/models/135867?type=Model&format=SafeTensor&size=full&fp=fp16"
    assert (remote.size, remote.sha256, remote.base_model, remote.file_id) == (None, "ab" * 32, None, None)
    assert remote.warnings == (
        "CivitAI could not be asked about CivitAI version 135867: only the file itself was checked",
    )
    assert "tried without it" in caplog.text


def test_a_file_without_metadata_is_selected_by_its_variant_filter(
    service: sandbox.SandboxCivitAI, tmp_path: Path
) -> None:
    service.add(135867, sdxl_lora(tmp_path / "b.safetensors", seed=2), size="pruned", fp="fp16", file_id=7)
    service.fail(sandbox.SERVER_ERROR, times=None, on="/api/v1/")
    client = client_of(service)

    links = [
        client.link(client.describe(ref, Deadline()), Deadline())
        for ref in (
            LORA,
            dataclasses.replace(LORA, size="pruned", fp="fp16"),
            dataclasses.replace(LORA, file_id=7),
        )
    ]

    assert ["add-detail-xl" in link for link in links] == [True, False, False]


def test_if_no_file_fits_the_variant_filter_any_model_file_of_the_version_is_taken(
    service: sandbox.SandboxCivitAI,
) -> None:
    service.fail(sandbox.SERVER_ERROR, times=None, on="/api/v1/")
    client = client_of(service)
    ref = dataclasses.replace(LORA, size="pruned", fp="fp32")  # which it does not have

    link = client.link(client.describe(ref, Deadline()), Deadline())

    assert "add-detail-xl" in link


def test_a_model_without_a_version_needs_metadata(service: sandbox.SandboxCivitAI) -> None:
    service.fail(sandbox.SERVER_ERROR, times=None, on="/api/v1/")

    with pytest.raises(DownloadFailed, match=r"CivitAI failed when it was asked for CivitAI model 122359 \(500\)"):
        client_of(service).describe(ModelRef(ModelKind.LORA, model_id=122359), Deadline())


def test_a_file_of_another_host_is_its_url(service: sandbox.SandboxCivitAI) -> None:
    client = CivitAI(policy=EgressPolicy([service.url, "https://cdn.example.com"]), urls=[service.url], key=KEY)
    ref = ModelRef(ModelKind.LORA, url="https://cdn.example.com/a/My%20style.safetensors?v=2", sha256="cd" * 32)

    remote = client.describe(ref, Deadline())

    assert remote == RemoteFile(url=ref.url or "", name="My style", sha256="cd" * 32, file_name="My style.safetensors")
    assert client.link(remote, Deadline()) == ref.url
    assert service.asked == []


def test_a_url_of_a_host_that_is_not_listed_is_the_caller_s_error(service: sandbox.SandboxCivitAI) -> None:
    ref = ModelRef(ModelKind.LORA, url="https://evil.example.com/a.safetensors?sig=secret")

    with pytest.raises(InvalidRequest, match=r"https://evil\.example\.com is not among") as refused:
        client_of(service).describe(ref, Deadline())

    assert "secret" not in message_and_hint(refused.value)


def test_a_bare_name_is_not_looked_up_on_civitai(service: sandbox.SandboxCivitAI) -> None:
    with pytest.raises(ModelNotFound, match="'some style' is neither"):
        client_of(service).describe(ModelRef(ModelKind.LORA, name="some style"), Deadline())


# -- link --------------------------------------------------------------------------------------------------------------


def test_a_link_leads_to_the_storage_and_the_key_is_sent_only_to_the_api(service: sandbox.SandboxCivitAI) -> None:
    client = client_of(service)

    link = client.link(client.describe(LORA, Deadline()), Deadline())

    assert link.startswith(f"{service.storage.url}/")
    assert "X-Amz-Signature" in link
    assert asked_of(service) == ["/api/v1/model-versions/135867", "/api/download/models/135867?fileId=99264"]
    assert {asked.method for asked in service.asked} == {"GET"}
    assert {asked.headers["authorization"] for asked in service.asked} == {f"Bearer {KEY}"}
    assert {asked.headers["user-agent"] for asked in service.asked} == {f"a1111-worker/{__version__}"}
    assert {asked.headers["accept-encoding"] for asked in service.asked} == {"identity"}
    assert service.storage.asked == []


def test_without_a_key_none_is_sent(service: sandbox.SandboxCivitAI) -> None:
    service.key = None
    client = client_of(service, key=None)

    client.link(client.describe(LORA, Deadline()), Deadline())

    assert not any("authorization" in asked.headers for asked in service.asked)


def test_a_link_is_never_cached(service: sandbox.SandboxCivitAI) -> None:
    client = client_of(service)
    remote = client.describe(LORA, Deadline())

    links = {client.link(remote, Deadline()) for _ in range(3)}

    assert len(links) == 3
    assert service.links_given == 3


def test_redirects_between_the_api_s_own_origins_are_followed_with_the_key(
    service: sandbox.SandboxCivitAI, tmp_path: Path
) -> None:
    with sandbox.SandboxCivitAI(key=KEY, storage=service.storage) as red:
        red.versions = service.versions
        service.redirects = [2]
        client = client_of(service, red)
        remote = client.describe(LORA, Deadline())
        first = client.link(remote, Deadline())
        service.fail(sandbox.redirect(f"{red.url}/api/download/models/135867?fileId=99264"), on="/api/download/")
        second = client.link(remote, Deadline())

        assert {link.partition("?")[0] for link in (first, second)} == {first.partition("?")[0]}
        assert red.asked[-1].headers["authorization"] == f"Bearer {KEY}"
        assert service.links_given + red.links_given == 2


# What CivitAI answers to a download → the error, its sentence or hint, how often one origin is asked.
LINK_REFUSALS: dict[str, tuple[sandbox.ServerFault, type[ModelError], str, int]] = {
    "400": (sandbox.BAD_REQUEST, DownloadFailed, "did not understand", 1),
    "401, a wrong key": (sandbox.LOGIN_REQUIRED, ModelAccessDenied, "refused the worker's API key", 1),
    "401, downloads disabled": (sandbox.DOWNLOADS_DISABLED, ModelAccessDenied, "has disabled its download", 1),
    "403, black list": (sandbox.FORBIDDEN, ModelAccessDenied, "refuses to serve", 1),
    "403, a page of Cloudflare's": (sandbox.html_fault(403, "Just a moment"), ModelAccessDenied, "refuses to serve", 1),
    "403, early access": (sandbox.EARLY_ACCESS, ModelAccessDenied, "is in early access until 2027-01-31", 1),
    "403, early access without a date": (
        sandbox.json_fault(403, {"error": "Early Access", "deadline": "<b>"}),
        ModelAccessDenied,
        r"is in early access \|",
        1,
    ),
    "403, private": (sandbox.PRIVATE, ModelAccessDenied, "is private", 1),
    "404": (sandbox.NOT_FOUND, ModelNotFound, r"does not have 'Detail Tweaker XL' \(version 135867\)", 3),
    "410": (sandbox.ARCHIVED, ModelNotFound, "archived", 1),
    "418": (sandbox.json_fault(418, {}), DownloadFailed, r"not understood.*418", 1),
    "451": (sandbox.REGION_BLOCKED, ModelAccessDenied, "United Kingdom and Australia", 1),
    "500": (sandbox.SERVER_ERROR, DownloadFailed, r"CivitAI failed .*\(500\)", 4),
    "522": (sandbox.CLOUDFLARE_522, DownloadFailed, r"CivitAI failed .*\(522\)", 4),
    "408": (sandbox.json_fault(408, {}), DownloadFailed, r"CivitAI failed .*\(408\)", 4),
    "200, a page": (sandbox.HTML_PAGE, DownloadFailed, "not what was asked for", 3),
    "200, JSON": (sandbox.json_fault(200, {"url": "…"}), DownloadFailed, "not what was asked for", 3),
    "200, a page of 9 MB": (
        sandbox.ServerFault(200, b"x" * 9_000_000, {"content-type": "text/plain"}),
        DownloadFailed,
        "not what was asked for",
        3,
    ),
    "RST": (sandbox.RESET, DownloadFailed, "no connection to CivitAI", 3),
    "FIN": (sandbox.CUT, DownloadFailed, "no connection to CivitAI", 3),
    "half a refusal": (
        sandbox.ServerFault(404, b"{", {"content-length": "9", "connection": "close"}),
        DownloadFailed,
        "no connection to CivitAI",
        3,
    ),
    "to the login page": (
        sandbox.redirect("/login?reason=download-auth"),
        ModelAccessDenied,
        "refused the worker's",
        1,
    ),
    "a redirect without a place": (sandbox.ServerFault(307), DownloadFailed, "not understood", 1),
}


@pytest.mark.parametrize(("fault", "error", "sentence", "asks"), LINK_REFUSALS.values(), ids=LINK_REFUSALS)
def test_every_refusal_of_a_download_has_its_error(
    fault: sandbox.ServerFault, error: type[ModelError], sentence: str, asks: int, service: sandbox.SandboxCivitAI
) -> None:
    client = client_of(service)
    remote = client.describe(LORA, Deadline())
    service.fail(fault, times=None, on="/api/download/")

    with pytest.raises(ModelError) as refused:
        client.link(remote, Deadline())

    assert type(refused.value) is error
    assert re.search(sentence, message_and_hint(refused.value))
    assert "Detail Tweaker XL" in message_and_hint(refused.value) or "451" in message_and_hint(refused.value)
    assert not re.search(r"<|fileId|\?|login|/tmp", message_and_hint(refused.value))
    assert KEY not in message_and_hint(refused.value)
    assert sum(asked.path.startswith("/api/download/") for asked in service.asked) == asks


def test_a_download_that_needs_a_key_says_which_setting_it_is(service: sandbox.SandboxCivitAI) -> None:
    client = client_of(service, key=None)
    remote = client.describe(LORA, Deadline())

    with pytest.raises(ModelAccessDenied, match="to logged-in users only") as refused:
        client.link(remote, Deadline())

    assert "CIVITAI_API_KEY" in (refused.value.hint or "")


def test_a_refused_key_has_another_message_than_a_missing_one(service: sandbox.SandboxCivitAI) -> None:
    client = client_of(service, key="another-key")
    remote = client.describe(LORA, Deadline())

    with pytest.raises(ModelAccessDenied, match="refused the worker's API key") as refused:
        client.link(remote, Deadline())

    assert "another-key" not in message_and_hint(refused.value)


@pytest.mark.parametrize("key", ["two words", "new\nline", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ValueError, match="holds characters") as refused:
        CivitAI(policy=EgressPolicy([]), key=key)

    assert key not in str(refused.value)


def test_passing_failures_are_tried_again_until_there_is_a_link(service: sandbox.SandboxCivitAI) -> None:
    client = client_of(service)
    for fault in (sandbox.SERVER_ERROR, sandbox.RESET, sandbox.NOT_FOUND, sandbox.HTML_PAGE, sandbox.CLOUDFLARE_522):
        service.fail(fault, on="/api/download/")

    link = client.link(client.describe(LORA, Deadline()), Deadline())

    assert link.startswith(service.storage.url)
    assert service.links_given == 1


def test_a_version_that_the_first_origin_hides_is_asked_for_at_the_second_without_a_pause(
    service: sandbox.SandboxCivitAI,
) -> None:
    timings = dataclasses.replace(QUICK, shortest=60.0, longest=60.0)  # a wait would be noticed
    with sandbox.SandboxCivitAI(key=KEY) as com:
        client = client_of(com, service, timings=timings)

        remote = client.describe(LORA, Deadline())
        link = client.link(remote, Deadline())

        assert link.startswith(service.storage.url)
        assert asked_of(com) == asked_of(service)
        assert com.links_given == 0


def test_a_404_is_believed_after_every_origin_and_two_more_tries() -> None:
    with sandbox.SandboxCivitAI() as com, sandbox.SandboxCivitAI() as red:
        with pytest.raises(ModelNotFound, match=r"does not have CivitAI version 135867 \(404\)"):
            client_of(com, red).describe(LORA, Deadline())

        assert (len(com.asked), len(red.asked)) == (2, 2)


@pytest.mark.parametrize("fault", [sandbox.REGION_BLOCKED, sandbox.LOGIN_REQUIRED, sandbox.TOO_MANY, sandbox.ARCHIVED])
def test_a_refusal_that_is_the_same_everywhere_is_not_asked_elsewhere(
    fault: sandbox.ServerFault, service: sandbox.SandboxCivitAI
) -> None:
    with sandbox.SandboxCivitAI(key=KEY) as red:
        client = client_of(service, red)
        remote = client.describe(LORA, Deadline())
        service.fail(fault, times=None, on="/api/download/")

        with pytest.raises(ModelError):
            client.link(remote, Deadline())

        assert red.asked == []


def test_an_origin_that_is_down_is_passed_over(service: sandbox.SandboxCivitAI) -> None:
    with sandbox.SandboxCivitAI() as gone:
        pass
    client = client_of(gone, service)

    link = client.link(client.describe(LORA, Deadline()), Deadline())

    assert link.startswith(service.storage.url)


# -- 429 ---------------------------------------------------------------------------------------------------------------


# Retry-After of the first answer.
@pytest.mark.parametrize("retry_after", [None, "0", "Wed, 21 Oct 2015 07:28:00 GMT", "soon", "-5", ""])
def test_a_429_is_waited_out(retry_after: str | None, service: sandbox.SandboxCivitAI) -> None:
    client = client_of(service)
    remote = client.describe(LORA, Deadline())
    service.fail(
        sandbox.TOO_MANY if retry_after is None else sandbox.too_many(retry_after), times=2, on="/api/download/"
    )

    link = client.link(remote, Deadline())

    assert link.startswith(service.storage.url)
    assert service.links_given == 1


# Retry-After, the seconds of all pauses, the job's time left → how often it is asked.
@pytest.mark.parametrize(
    ("retry_after", "too_many", "left", "asks"),
    [
        ("3600", 60.0, 500.0, 1),  # longer than we wait for anything
        ("30", 60.0, 5.0, 1),  # longer than the job lasts
        ("Fri, 31 Dec 2100 23:59:59 GMT", 60.0, 500.0, 1),
        (None, 0.0, 500.0, 1),  # a pause of 10 ms, and none is allowed
        (None, 0.035, 500.0, 4),  # three pauses of 10 ms fit, a fourth does not
        (None, 500.0, 500.0, 11),  # never more often than that
    ],
)
def test_a_429_is_waited_out_within_bounds(
    retry_after: str | None, too_many: float, left: float, asks: int, service: sandbox.SandboxCivitAI
) -> None:
    client = client_of(service, timings=dataclasses.replace(QUICK, shortest=0.01, longest=0.01, too_many=too_many))
    remote = client.describe(LORA, Deadline())
    service.fail(
        sandbox.TOO_MANY if retry_after is None else sandbox.too_many(retry_after), times=None, on="/api/download/"
    )

    with pytest.raises(DownloadFailed, match=r"downloaded too much \(429\)") as refused:
        client.link(remote, Deadline(left))

    assert refused.value.retryable
    assert sum(asked.path.startswith("/api/download/") for asked in service.asked) == asks


def test_a_retry_after_of_a_server_error_is_honoured_within_bounds(service: sandbox.SandboxCivitAI) -> None:
    client = client_of(service)
    remote = client.describe(LORA, Deadline())
    service.fail(sandbox.json_fault(503, {}, **{"retry-after": "3600"}), times=None, on="/api/download/")

    with pytest.raises(DownloadFailed, match="503"):
        client.link(remote, Deadline())

    assert sum(asked.path.startswith("/api/download/") for asked in service.asked) == 1


# -- time --------------------------------------------------------------------------------------------------------------


class NegativeChunk(Server):
    """Sends a chunk that says that its size is negative."""

    def answer(self, exchange: Exchange) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        exchange.write(head + b"-5\r\n{}")
        exchange.cut()


def test_a_chunk_of_a_negative_size_is_a_broken_answer() -> None:
    with NegativeChunk() as server:
        client = CivitAI(policy=EgressPolicy([server.url]), urls=[server.url], timings=QUICK)

        with pytest.raises(DownloadFailed, match="no connection to CivitAI"):
            client.describe(ModelRef(ModelKind.LORA, model_id=5), Deadline())


class Trickle(Server):
    """Promises much and sends a byte now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.over = threading.Event()

    def answer(self, exchange: Exchange) -> None:
        exchange.begin(200, {"content-type": "application/json", "content-length": "100000"})
        while not self.over.wait(0.02):
            exchange.write(b" ")
            exchange._handler.wfile.flush()


def test_an_answer_that_trickles_is_given_up() -> None:
    with Trickle() as server:
        timings = dataclasses.replace(QUICK, answer=0.2)
        client = CivitAI(policy=EgressPolicy([server.url]), urls=[server.url], timings=timings)

        with pytest.raises(DownloadFailed, match="no connection to CivitAI"):
            client.describe(ModelRef(ModelKind.LORA, model_id=5), Deadline())

        server.over.set()
        assert len(server.asked) == 3


def test_silence_is_given_up(service: sandbox.SandboxCivitAI) -> None:
    service.fail(sandbox.SILENCE, times=None, on="/api/download/")
    client = client_of(service, timings=dataclasses.replace(QUICK, answer=0.1))
    remote = client.describe(LORA, Deadline())

    with pytest.raises(DownloadFailed, match="no connection to CivitAI"):
        client.link(remote, Deadline())


def test_the_job_s_time_ends_a_request(service: sandbox.SandboxCivitAI) -> None:
    service.fail(sandbox.SILENCE, times=None, on="/api/download/")
    client = client_of(service, timings=dataclasses.replace(QUICK, answer=60.0))
    remote = client.describe(LORA, Deadline())

    with pytest.raises(JobTimeout):
        client.link(remote, Deadline(0.2))


@pytest.mark.parametrize(
    ("fault", "timings"),
    [
        # while CivitAI is silent
        (sandbox.SILENCE, dataclasses.replace(QUICK, answer=1000.0)),
        # during a pause
        (sandbox.SERVER_ERROR, dataclasses.replace(QUICK, shortest=1000.0, longest=1000.0)),
    ],
)
def test_a_cancelled_job_waits_for_nothing(
    fault: sandbox.ServerFault, timings: SiteTimings, service: sandbox.SandboxCivitAI
) -> None:
    service.fail(fault, times=None, on="/api/download/")
    client = client_of(service, timings=timings)
    remote = client.describe(LORA, Deadline())
    deadline = Deadline()
    cancelling = threading.Timer(0.2, deadline.cancel)
    cancelling.start()

    with pytest.raises(JobCancelled):
        client.link(remote, deadline)

    cancelling.join()


def test_a_cancelled_job_sends_no_request(service: sandbox.SandboxCivitAI) -> None:
    deadline = Deadline()
    deadline.cancel()

    with pytest.raises(JobCancelled):
        client_of(service).describe(LORA, deadline)

    assert service.asked == []


# -- where links lead --------------------------------------------------------------------------------------------------


REFUSED_TARGETS = [
    "http://169.254.169.254/latest/meta-data/iam",
    "https://169.254.169.254/latest",
    "http://127.0.0.1:1/x",
    "https://10.0.0.1/x",
    "https://b2.civitai.com.evil.example/x",
    "https://user:secret@b2.civitai.com/x",
    "http://b2.civitai.com/file?Authorization=secret",  # not https
    "file:///etc/passwd",
    "//evil.example/x",
    "https://evil.example/?Signature=secret",
]


@pytest.mark.parametrize("target", REFUSED_TARGETS)
def test_a_link_to_where_nothing_may_be_fetched_is_refused(target: str, service: sandbox.SandboxCivitAI) -> None:
    client = CivitAI(
        policy=EgressPolicy([service.url, "https://b2.civitai.com"]), urls=[service.url], key=KEY, timings=QUICK
    )
    remote = client.describe(LORA, Deadline())
    service.fail(sandbox.redirect(target), times=None, on="/api/download/")

    with pytest.raises(DownloadFailed, match="to a place that this worker may not use") as refused:
        client.link(remote, Deadline())

    assert not re.search(r"secret|Authorization|passwd|latest|/x", message_and_hint(refused.value))
    assert sum(asked.path.startswith("/api/download/") for asked in service.asked) == 1


def test_a_circle_of_redirects_ends(service: sandbox.SandboxCivitAI) -> None:
    service.redirects = [-1]
    client = client_of(service)
    remote = client.describe(LORA, Deadline())

    with pytest.raises(DownloadFailed, match="go in a circle"):
        client.link(remote, Deadline())


def test_a_chain_of_20_redirects_ends(service: sandbox.SandboxCivitAI) -> None:
    service.redirects = [20]
    client = client_of(service)
    remote = client.describe(LORA, Deadline())

    with pytest.raises(DownloadFailed, match="more than 5 redirects"):
        client.link(remote, Deadline())


def test_the_key_is_not_sent_to_another_origin_that_may_be_reached(service: sandbox.SandboxCivitAI) -> None:
    with sandbox.SandboxCivitAI() as other:
        client = CivitAI(policy=EgressPolicy([service.url, other.url]), urls=[service.url], key=KEY, timings=QUICK)
        remote = client.describe(LORA, Deadline())
        service.fail(sandbox.redirect(f"{other.url}/file?sig=1"), on="/api/download/")

        link = client.link(remote, Deadline())

        assert link == f"{other.url}/file?sig=1"
        assert other.asked == []


def test_a_mirror_may_hand_out_the_file_itself(service: sandbox.SandboxCivitAI) -> None:
    client = client_of(service)
    remote = client.describe(LORA, Deadline())
    service.fail(
        sandbox.ServerFault(200, b"x" * 1_000_000, {"content-type": "application/octet-stream"}), on="/api/download/"
    )

    link = client.link(remote, Deadline())

    assert link == f"{service.url}/api/download/models/135867?fileId=99264"


def test_a_link_is_never_logged(service: sandbox.SandboxCivitAI, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="a1111_worker")
    service.fail(sandbox.SERVER_ERROR, on="/api/download/")
    client = client_of(service)

    link = client.link(client.describe(LORA, Deadline()), Deadline())

    assert f"the link leads to {service.storage.url}" in caplog.text
    assert "5xx for 'Detail Tweaker XL' (version 135867), tried again" in caplog.text
    assert not re.search(r"X-Amz|signature|fileId", caplog.text, re.IGNORECASE)
    assert KEY not in caplog.text
    assert link not in caplog.text


def test_sixteen_threads_share_a_client(service: sandbox.SandboxCivitAI, tmp_path: Path) -> None:
    for number in range(1, 17):
        service.add(number, sdxl_checkpoint(tmp_path / f"{number}.safetensors", seed=number), model_type="Checkpoint")
    client = client_of(service)
    found: dict[int, str] = {}

    def resolve(number: int) -> None:
        remote = client.describe(ModelRef(ModelKind.CHECKPOINT, version_id=number), Deadline())
        found[number] = client.link(remote, Deadline())

    threads = [threading.Thread(target=resolve, args=(number,)) for number in range(1, 17)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(found) == list(range(1, 17))
    assert all(f'filename="{number}.safetensors"' in unquote_plus(link) for number, link in found.items())

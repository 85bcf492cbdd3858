"""The client of Hugging Face: what it asks, what each answer means, and where the token goes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from a1111_worker.context import Deadline
from a1111_worker.domain import HubFile, ModelKind, ModelRef, RemoteFile
from a1111_worker.errors import (
    DownloadFailed,
    JobCancelled,
    ModelAccessDenied,
    ModelError,
    ModelNotFound,
    ModelRejected,
)
from a1111_worker.models.hub_files import HubAccess
from a1111_worker.models.huggingface import HuggingFace
from a1111_worker.models.sites import SiteTimings
from a1111_worker.transfer.egress import EgressPolicy
from sandbox.huggingface import SERVER_ERROR, TOO_MANY, SandboxHuggingFace
from sandbox.models import sdxl_lora, sha256_of
from sandbox.server import Exchange
from sandbox.storage import CUT, RESET, SILENCE, ServerFault, html_fault, redirect

TOKEN = "hf_0123456789"
REPO, NAME = "owner/Some.repo_1", "loras/My style #1.safetensors"
FILE = HubFile(REPO, NAME)
QUICK = SiteTimings(connect=2.0, answer=2.0, shortest=0.0, longest=0.0, too_many=1.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return sdxl_lora(tmp_path / "style.safetensors")


@pytest.fixture
def hub(path: Path) -> Iterator[SandboxHuggingFace]:
    with SandboxHuggingFace(token=TOKEN) as hub:
        hub.add(REPO, NAME, path)
        yield hub


def client_of(
    hub: SandboxHuggingFace, *, access: HubAccess = HubAccess(), token: str | None = TOKEN, answer: float = 2.0
) -> HuggingFace:
    timings = SiteTimings(QUICK.connect, answer, QUICK.shortest, QUICK.longest, QUICK.too_many)
    policy = EgressPolicy([hub.url, hub.storage.url])
    return HuggingFace(policy=policy, url=hub.url, token=token, access=access, timings=timings)


def ref_of(file: HubFile = FILE, sha256: str | None = None) -> ModelRef:
    return ModelRef(ModelKind.LORA, hub=file, sha256=sha256)


def tokens_of(hub: SandboxHuggingFace) -> list[str | None]:
    """The Authorization header of each request to the hub."""
    return [asked.headers.get("authorization") for asked in hub.asked]


def test_a_file_is_described_by_one_head_request(hub: SandboxHuggingFace, path: Path) -> None:
    commit = hub.repos[REPO].refs["main"]

    remote = client_of(hub).describe(ref_of(), Deadline())

    assert remote == RemoteFile(
        url=f"https://huggingface.co/{REPO}/resolve/{commit}/loras/My%20style%20%231.safetensors",
        name="My style #1",
        file_name="My style #1.safetensors",
        size=path.stat().st_size,
        size_at_most=path.stat().st_size,
        sha256=sha256_of(path),
        hub=HubFile(REPO, NAME, commit),
    )
    assert [asked.method for asked in hub.asked] == ["HEAD"]


def test_a_link_leads_to_the_storage_of_the_same_commit(hub: SandboxHuggingFace, path: Path, tmp_path: Path) -> None:
    client = client_of(hub)
    remote = client.describe(ref_of(), Deadline())
    hub.add(REPO, NAME, sdxl_lora(tmp_path / "newer.safetensors", 2))

    link = client.link(remote, Deadline())

    assert link.startswith(hub.storage.url) and "style" in link
    assert remote.hub is not None and hub.asked[-1].path.split("/")[4] == remote.hub.revision


@pytest.mark.parametrize(
    ("revision", "found"),
    [("main", "main"), ("v2", "v2"), ("refs/pr/3", "refs/pr/3")],
)
def test_a_revision_is_a_branch_a_tag_or_a_commit(
    hub: SandboxHuggingFace, path: Path, revision: str, found: str
) -> None:
    commit = hub.add(REPO, NAME, path, branch=revision)
    client = client_of(hub)

    by_name = client.describe(ref_of(HubFile(REPO, NAME, revision)), Deadline())
    by_commit = client.describe(ref_of(HubFile(REPO, NAME, commit)), Deadline())

    assert by_name == by_commit
    assert by_name.hub == HubFile(REPO, NAME, commit)


# -- the token

ACCESS = [
    # whom the token is for, whether it is sent
    (HubAccess(), False),
    (HubAccess(repos=frozenset({"owner/other"})), False),
    (HubAccess(repos=frozenset({"Owner/some.REPO_1"})), True),  # a name in another case is the same repository
    (HubAccess(files=frozenset({FILE})), True),
    (HubAccess(files=frozenset({HubFile(REPO, "another.safetensors")})), False),
]


@pytest.mark.parametrize(("access", "is_sent"), ACCESS)
def test_the_token_is_sent_for_the_operators_files_and_repositories_alone(
    hub: SandboxHuggingFace, access: HubAccess, is_sent: bool
) -> None:
    client = client_of(hub, access=access)

    remote = client.describe(ref_of(), Deadline())
    client.link(remote, Deadline())

    assert tokens_of(hub) == [f"Bearer {TOKEN}" if is_sent else None] * 2
    assert remote.restricted is is_sent
    assert hub.storage.asked == []


def test_the_token_follows_a_rename_inside_the_hub_and_never_leaves_it(hub: SandboxHuggingFace) -> None:
    hub.renamed["owner/old-name"] = REPO
    access = HubAccess(repos=frozenset({"owner/old-name"}))
    old = HubFile("owner/old-name", NAME)
    with SandboxHuggingFace() as elsewhere:
        client = client_of(hub, access=access)
        remote = client.describe(ref_of(old), Deadline())
        hub.fail(redirect(f"{elsewhere.url}/owner/repo"))

        with pytest.raises(DownloadFailed, match="to a place that this worker may not use"):
            client.link(remote, Deadline())

    assert tokens_of(hub) == [f"Bearer {TOKEN}"] * 3
    assert elsewhere.asked == []


# -- what is not shown


def denial(client: HuggingFace, file: HubFile) -> tuple[str, str | None]:
    with pytest.raises(ModelAccessDenied) as refused:
        client.describe(ref_of(file), Deadline())
    return refused.value.message.replace(file.repo, "REPO"), refused.value.hint


def test_a_private_a_gated_and_a_missing_repository_are_refused_in_the_same_words(
    hub: SandboxHuggingFace, path: Path
) -> None:
    for repo, about in (("owner/private", "private"), ("owner/gated", "gated")):
        hub.add(repo, NAME, path)
        setattr(hub.repos[repo], about, True)
    listed = HubAccess(repos=frozenset({"owner/gated", "owner/none"}))  # but the token's account may not read them

    refusals = {
        denial(client_of(hub, access=access), HubFile(repo, NAME))
        for access in (HubAccess(), listed)
        for repo in ("owner/private", "owner/gated", "owner/none")
    } | {denial(client_of(hub, access=listed, token="hf_wrong"), HubFile("owner/gated", NAME))}

    assert len(refusals) == 1
    assert len(hub.asked) == 7  # it does not help to ask again


def test_a_private_file_is_read_with_the_token(hub: SandboxHuggingFace, path: Path) -> None:
    hub.repos[REPO].private = True
    hub.repos[REPO].readers.add(TOKEN)
    client = client_of(hub, access=HubAccess(repos=frozenset({REPO})))

    remote = client.describe(ref_of(), Deadline())

    assert (remote.sha256, remote.restricted) == (sha256_of(path), True)
    assert client.link(remote, Deadline()).startswith(hub.storage.url)


FAILURES: list[tuple[str, HubFile, ServerFault | None, type[ModelError], str]] = [
    (
        "no such file",
        HubFile(REPO, "none.safetensors"),
        None,
        ModelNotFound,
        "a file that its repository does not have",
    ),
    ("no such branch", HubFile(REPO, NAME, "v9"), None, ModelNotFound, "a revision that its repository does not have"),
    ("a failure that stays", FILE, SERVER_ERROR, DownloadFailed, "failed when it was asked"),
    ("too many requests", FILE, TOO_MANY, DownloadFailed, "429"),
    ("no answer", FILE, CUT, DownloadFailed, "no connection"),
    ("half an answer", FILE, RESET, DownloadFailed, "no connection"),
    ("a circle", FILE, redirect(f"/{REPO}/resolve/main/x"), DownloadFailed, "not understood"),
    ("a page", FILE, html_fault(200, "Sign in"), DownloadFailed, "not understood"),
    ("a status that has no meaning here", FILE, ServerFault(418), DownloadFailed, "not understood"),
]


@pytest.mark.parametrize(
    ("file", "fault", "error", "words"), [row[1:] for row in FAILURES], ids=[f[0] for f in FAILURES]
)
def test_a_failure_of_the_hub_is_one_of_our_errors(
    hub: SandboxHuggingFace, file: HubFile, fault: ServerFault | None, error: type[ModelError], words: str
) -> None:
    if fault is not None:
        hub.fail(fault, times=None)

    with pytest.raises(ModelError) as failed:
        client_of(hub).describe(ref_of(file), Deadline())

    assert type(failed.value) is error
    assert words in failed.value.message


@pytest.mark.parametrize("fault", [SERVER_ERROR, TOO_MANY, CUT, RESET])
def test_a_failure_that_passes_is_not_seen(hub: SandboxHuggingFace, fault: ServerFault, path: Path) -> None:
    hub.fail(fault, times=2)

    remote = client_of(hub).describe(ref_of(), Deadline())

    assert remote.sha256 == sha256_of(path)


def test_a_silent_hub_is_given_up_on(hub: SandboxHuggingFace) -> None:
    hub.fail(SILENCE, times=None)

    with pytest.raises(DownloadFailed, match="no connection"):
        client_of(hub, answer=0.05).describe(ref_of(), Deadline())


def test_a_cancelled_job_does_not_wait_for_the_hub(hub: SandboxHuggingFace) -> None:
    deadline = Deadline()

    def cancel(_: Exchange) -> bool:
        deadline.cancel()
        return False  # the hub answers

    hub.before.append(cancel)
    hub.fail(SILENCE, times=None)

    with pytest.raises(JobCancelled):
        client_of(hub, answer=60.0).describe(ref_of(), deadline)


def test_another_hash_than_the_hubs_is_refused_before_the_download(hub: SandboxHuggingFace) -> None:
    with pytest.raises(ModelRejected, match="was asked for"):
        client_of(hub).describe(ref_of(sha256="0" * 64), Deadline())


# -- files that the hub serves itself


def test_a_small_file_of_the_hub_has_no_sha256_and_is_its_own_link(hub: SandboxHuggingFace, path: Path) -> None:
    commit = hub.add(REPO, "small.safetensors", path, is_large=False)
    client = client_of(hub)

    remote = client.describe(ref_of(HubFile(REPO, "small.safetensors")), Deadline())

    assert (remote.sha256, remote.size) == (None, path.stat().st_size)
    assert client.link(remote, Deadline()) == f"{hub.url}/{REPO}/resolve/{commit}/small.safetensors"


def test_a_small_file_that_only_the_token_may_read_is_refused(hub: SandboxHuggingFace, path: Path) -> None:
    hub.add(REPO, "small.safetensors", path, is_large=False)
    client = client_of(hub, access=HubAccess(repos=frozenset({REPO})))
    hub.repos[REPO].readers.add(TOKEN)
    remote = client.describe(ref_of(HubFile(REPO, "small.safetensors")), Deadline())

    with pytest.raises(ModelRejected, match="not stored as a large file"):
        client.link(remote, Deadline())

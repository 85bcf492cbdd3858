"""The sandbox's Hugging Face, asked as a client asks it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from sandbox.huggingface import SandboxHuggingFace
from tests.sandbox.client import BEARER, SIZE

URL = "/owner/repo/resolve/main/style.safetensors"


@pytest.fixture
def hub(lora: Path) -> Iterator[SandboxHuggingFace]:
    with SandboxHuggingFace(token="the-key") as hub:
        hub.add("owner/repo", "style.safetensors", lora)
        yield hub


def head(url: str, **headers: str) -> requests.Response:
    return requests.head(url, headers=headers, allow_redirects=False, timeout=10)


def test_a_large_file_is_a_redirect_with_its_size_and_sha256(hub: SandboxHuggingFace, lora: Path) -> None:
    answer = head(hub.url + URL)

    assert answer.status_code == 302
    assert answer.headers["x-repo-commit"] == hub.repos["owner/repo"].refs["main"]
    assert answer.headers["x-linked-size"] == str(SIZE)
    assert answer.headers["x-linked-etag"] == f'"{hashlib.sha256(lora.read_bytes()).hexdigest()}"'
    assert requests.get(answer.headers["location"], timeout=10).content == lora.read_bytes()


def test_a_token_that_is_sent_to_the_storage_is_refused_there(hub: SandboxHuggingFace) -> None:
    answer = requests.get(head(hub.url + URL).headers["location"], headers=BEARER, timeout=10)

    assert answer.status_code == 400
    assert hub.storage.keys_seen == ["Bearer the-key"]


def test_a_small_file_is_sent_by_the_hub_itself(hub: SandboxHuggingFace, lora: Path) -> None:
    hub.add("owner/repo", "small.safetensors", lora, is_large=False)

    answer = requests.get(hub.url + URL.replace("style", "small"), timeout=10)

    assert (answer.status_code, answer.content) == (200, lora.read_bytes())
    assert "x-linked-etag" not in answer.headers


SHOWN = [
    # what the repository is, the token, whether its owner may read it; the status and the code of the answer
    ("private", None, True, 401, "RepoNotFound"),
    ("private", "the-key", False, 404, "RepoNotFound"),
    ("private", "the-key", True, 302, None),
    ("gated", None, True, 401, "GatedRepo"),
    ("gated", "the-key", False, 403, "GatedRepo"),
    ("gated", "the-key", True, 302, None),
    ("public", "wrong", True, 401, None),
    ("missing", None, True, 401, "RepoNotFound"),
    ("missing", "the-key", True, 404, "RepoNotFound"),
]


@pytest.mark.parametrize(("repo", "token", "may_read", "status", "code"), SHOWN)
def test_who_may_see_a_repository(
    hub: SandboxHuggingFace, repo: str, token: str | None, may_read: bool, status: int, code: str | None
) -> None:
    hosted = hub.repos["owner/repo"]
    hosted.private, hosted.gated = repo == "private", repo == "gated"
    hosted.readers = {"the-key"} if may_read else set()
    headers = {"Authorization": f"Bearer {token}"} if token else {}

    answer = head(hub.url + (URL.replace("owner", "nobody") if repo == "missing" else URL), **headers)

    assert (answer.status_code, answer.headers.get("x-error-code")) == (status, code)


@pytest.mark.parametrize(
    ("url", "code"),
    [(URL.replace("style", "none"), "EntryNotFound"), (URL.replace("main", "v9"), "RevisionNotFound")],
)
def test_what_a_repository_does_not_have_is_404_with_a_code(hub: SandboxHuggingFace, url: str, code: str) -> None:
    answer = head(hub.url + url)

    assert (answer.status_code, answer.headers["x-error-code"]) == (404, code)


def test_a_renamed_repository_is_a_redirect_inside_the_hub(hub: SandboxHuggingFace) -> None:
    hub.renamed["old/name"] = "owner/repo"

    answer = head(hub.url + URL.replace("owner/repo", "old/name"))

    assert (answer.status_code, answer.headers["location"]) == (307, URL)

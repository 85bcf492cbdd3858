"""A small Hugging Face: what a file is on one origin, its bytes on another. It fails only on request.

    with SandboxHuggingFace(token="hf_sandbox") as hub:
        hub.add("owner/repo", "loras/style.safetensors", path)
        hub.repos["owner/repo"].private = True
        hub.fail(SERVER_ERROR)

Its headers and error codes are those that huggingface_hub 0.36 reads (file_download.py, utils/_http.py).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote

from sandbox.server import Exchange, ReceivedRequest
from sandbox.storage import FaultyServer, SandboxStorage, ServerFault, answer_fault, json_fault, redirect

__all__ = [
    "SERVER_ERROR",
    "TOO_MANY",
    "HostedRepo",
    "SandboxHuggingFace",
]

SERVER_ERROR = json_fault(500, {"error": "Internal Error - We're working hard to fix this as soon as possible!"})
TOO_MANY = json_fault(429, {"error": "Too Many Requests"})

# An anonymous caller is told the same of a private repository and of one that does not exist.
_NOT_SHOWN = json_fault(
    401,
    {"error": "Invalid username or password."},
    **{"x-error-code": "RepoNotFound", "x-error-message": "Repository not found"},
)
_NO_REPO = json_fault(
    404,
    {"error": "Repository not found"},
    **{"x-error-code": "RepoNotFound", "x-error-message": "Repository not found"},
)
_BAD_TOKEN = json_fault(
    401,
    {"error": "Invalid credentials in Authorization header"},
    **{"x-error-message": "Invalid credentials in Authorization header"},
)


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def _gated(status: int) -> ServerFault:
    message = "Access to model is restricted and you are not in the authorized list."
    return json_fault(status, {"error": message}, **{"x-error-code": "GatedRepo", "x-error-message": message})


def _missing(what: str) -> ServerFault:
    message = f"{what} not found"
    return json_fault(404, {"error": message}, **{"x-error-code": f"{what}NotFound", "x-error-message": message})


@dataclass
class HostedFile:
    """One file at one commit. `is_large`: it is in the storage (LFS). `sha256` is what the hub says; None: its own."""

    path: Path
    key: str
    is_large: bool = True
    sha256: str | None = None


@dataclass
class HostedRepo:
    """A repository. The answers follow its fields, which a test may change. `readers` may read it with their tokens."""

    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    refs: dict[str, str] = field(default_factory=dict)  # a branch or a tag, and its commit
    commits: dict[str, dict[str, HostedFile]] = field(default_factory=dict)


class SandboxHuggingFace(FaultyServer):
    """The hub's origin. It starts and stops its `storage` too.

    `token` is the one that the hub knows. `renamed`: repositories that have another name now.
    """

    def __init__(self, *, token: str | None = None, port: int = 0, storage_port: int = 0) -> None:
        super().__init__(port)
        self.token = token
        self.storage = SandboxStorage(port=storage_port)
        self.storage.secret = token
        self.repos: dict[str, HostedRepo] = {}
        self.renamed: dict[str, str] = {}

    def start(self) -> None:
        self.storage.start()
        super().start()

    def stop(self) -> None:
        super().stop()
        self.storage.stop()

    def add(self, repo: str, name: str, path: Path, *, branch: str = "main", is_large: bool = True) -> str:
        """Commit a file to a branch. The files that were there stay. Returns the commit."""
        hosted = self.repos.setdefault(repo, HostedRepo())
        files = dict(hosted.commits.get(hosted.refs.get(branch, ""), {}))
        files[name] = HostedFile(path, self.storage.put(path), is_large)
        commit = _git_hash(f"{repo}@{branch} {len(hosted.commits)}".encode())
        hosted.commits[commit] = files
        hosted.refs[branch] = commit
        return commit

    def answer(self, exchange: Exchange) -> None:
        asked = exchange.asked
        fault = self._next_fault(asked.path)
        if fault is not None and answer_fault(exchange, fault):
            return
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", asked.path)
        if asked.method not in ("HEAD", "GET") or found is None:
            answer_fault(exchange, json_fault(404, {"error": "Sorry, we can't find the page you are looking for."}))
            return
        repo, revision, name = unquote(found[1]), unquote(found[2]), unquote(found[3])
        if repo in self.renamed:
            answer_fault(exchange, redirect(f"/{self.renamed[repo]}/resolve/{found[2]}/{quote(name)}"))
            return
        self._resolve(exchange, repo, revision, name)

    def _resolve(self, exchange: Exchange, repo: str, revision: str, name: str) -> None:
        refusal = self._refusal(exchange.asked, repo)
        if refusal is not None:
            answer_fault(exchange, refusal)
            return
        hosted = self.repos[repo]
        commit = hosted.refs.get(revision, revision)
        if commit not in hosted.commits:
            answer_fault(exchange, _missing("Revision"))
            return
        file = hosted.commits[commit].get(name)
        if file is None:
            answer_fault(exchange, _missing("Entry"))
            return
        content = file.path.read_bytes()
        headers = {"x-repo-commit": commit, "accept-ranges": "bytes", "x-powered-by": "huggingface-moon SANDBOX"}
        if not file.is_large:
            blob = _git_hash(b"blob %d\0" % len(content) + content)
            exchange.send(200, content, {**headers, "etag": f'"{blob}"', "content-type": "application/octet-stream"})
            return
        sha256 = file.sha256 or hashlib.sha256(content).hexdigest()
        location = self.storage.sign(file.key)
        exchange.send(
            302,
            f"Found. Redirecting to {location}".encode(),
            {
                **headers,
                "location": location,
                "x-linked-size": str(len(content)),
                "x-linked-etag": f'"{sha256}"',
                "content-type": "text/plain; charset=utf-8",
            },
        )

    def _refusal(self, asked: ReceivedRequest, repo: str) -> ServerFault | None:
        """Why a repository is not shown to this request, None if it is."""
        header = asked.headers.get("authorization")
        token = None if header is None else header.removeprefix("Bearer ")
        if token is not None and token != self.token:
            return _BAD_TOKEN
        hosted = self.repos.get(repo)
        may_read = hosted is not None and token in hosted.readers
        if hosted is None or (hosted.private and not may_read):
            return _NOT_SHOWN if token is None else _NO_REPO
        if hosted.gated and not may_read:
            return _gated(401 if token is None else 403)
        return None

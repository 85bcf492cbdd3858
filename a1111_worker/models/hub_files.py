"""How a file of Hugging Face is named, and who may have it.

    hf:OWNER/REPO/path/file.safetensors        hf:OWNER/REPO/path/file.safetensors@REVISION
    https://huggingface.co/OWNER/REPO/blob/REVISION/path/file.safetensors            its page
    https://huggingface.co/OWNER/REPO/resolve/REVISION/path/file.safetensors         its download

REVISION is a branch, a tag or a commit of 40 hex digits; without one it is `main`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

from a1111_worker.domain import HubFile
from a1111_worker.models.names import SUFFIX

HUB_HOSTS = frozenset({"huggingface.co", "www.huggingface.co", "hf.co"})
SCHEME = "hf:"

_REPO = re.compile(r"(?!.*(?:--|\.\.))\w(?:[\w.-]{0,94}\w)?/\w(?:[\w.-]{0,94}\w)?", re.ASCII)
_UNUSABLE = re.compile("[\x00-\x1f\x7f-\x9f\\\\\u2028\u2029\ud800-\udfff]")
_WHY = "other formats may run code when they are loaded"
_MAX_PATH = 500  # characters
_MAX_REVISION = 100
_OTHER_TREES = ("datasets", "spaces", "docs", "models", "api", "collections")
_SPECIAL_REVISION = re.compile(r"refs/(?:convert|pr)/\w+")  # the only ones that a URL may write with a plain /


@dataclass(frozen=True)
class HubAccess:
    """Which repositories of the operator's callers may use. Names of repositories are compared in any case.

    `repos` are those of HF_REPOS: the token is sent for them, whoever asks. `files` are the operator's own checkpoints:
    the token is sent for exactly these, and callers may have what is already here of their repositories.
    """

    repos: frozenset[str] = frozenset()
    files: frozenset[HubFile] = frozenset()

    def may_send_token(self, file: HubFile) -> bool:
        return file in self.files or self._is_listed(file)

    def may_use_copy(self, file: HubFile) -> bool:
        """Whether a caller may have a copy that is here, without the hub's word that the file is public."""
        return self._is_listed(file) or file.repo.casefold() in {own.repo.casefold() for own in self.files}

    def _is_listed(self, file: HubFile) -> bool:
        return file.repo.casefold() in {repo.casefold() for repo in self.repos}


def parse_hub_text(text: str) -> HubFile:
    """The file that `hf:OWNER/REPO/path[@revision]` names. Raises ValueError, which says what is wrong."""
    found = re.fullmatch(r"([^/]+/[^/]+)/(.+?\.safetensors)(?:@(.*))?", text[len(SCHEME) :], re.IGNORECASE | re.DOTALL)
    if found is None:
        raise ValueError(f"must name a file that ends with .safetensors (hf:OWNER/REPO/path/file.safetensors): {_WHY}")
    return _checked(found[1], found[2], "main" if found[3] is None else found[3])


def parse_hub_path(path: str) -> HubFile:
    """The file that the path of a URL of the hub names. Raises ValueError, which says what is wrong."""
    owner, _, rest = path.lstrip("/").partition("/")
    repo, _, rest = rest.partition("/")
    view, _, rest = rest.partition("/")
    if owner in _OTHER_TREES or view not in ("blob", "resolve") or not rest:
        raise ValueError("must be the page of a model's file (/OWNER/REPO/blob/main/file.safetensors) or its download")
    special = _SPECIAL_REVISION.match(rest)
    revision, _, file = (special[0], "", rest[special.end() + 1 :]) if special else rest.partition("/")
    file = unquote(file)
    if not file.lower().endswith(SUFFIX):
        raise ValueError(f"must name a file that ends with .safetensors: {_WHY}")
    return _checked(f"{unquote(owner)}/{unquote(repo)}", file, unquote(revision))


def hub_file_of(url: str | None) -> HubFile | None:
    """The file whose `HubFile.url` this is, None if it is none."""
    origin = "https://huggingface.co/"
    if url is None or not url.startswith(origin):
        return None
    try:
        return parse_hub_path(url[len(origin) :])
    except ValueError:
        return None


def _checked(repo: str, path: str, revision: str) -> HubFile:
    """The file, if no part of its name could lead anywhere else: not in a URL, and not in a folder."""
    if not _REPO.fullmatch(repo):
        raise ValueError("must name its repository as OWNER/REPO")
    for what, text, longest in (("path", path, _MAX_PATH), ("revision", revision, _MAX_REVISION)):
        if not text or len(text) > longest or _UNUSABLE.search(text):
            raise ValueError(f"must have a {what} of 1 to {longest} plain characters")
        if any(part in ("", ".", "..") for part in text.split("/")):
            raise ValueError(f"must have a {what} without empty parts, . and ..")
    if any(character in revision for character in " ~^:?*[%#@"):  # git allows none of these but @ and %
        raise ValueError("must have a revision: a branch, a tag or a commit")
    return HubFile(repo, path, revision)

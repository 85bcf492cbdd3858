"""Names of model files: how a name is made from any text, and what the names in a folder say about the models."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field

from a1111_worker.webui_names import plain_stem

SUFFIX = ".safetensors"

SLUG_LENGTH = 80
MAX_NAME_BYTES = 255
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$)", re.IGNORECASE)  # devices, on Windows volumes
_VERSION = re.compile(r"_([1-9][0-9]{0,15})(?:_([1-9][0-9]{0,15}))?\.safetensors$", re.IGNORECASE)
_DIGEST = re.compile(r"_([0-9a-f]{16})\.safetensors$")


def slug(text: str, otherwise: str = "model") -> str:
    """The readable part of a file name: at most 80 of `[A-Za-z0-9._-]`, whatever the text is.

    It is never empty, never starts with a dot, is never a Windows device, and never ends like an id (`_12`). So the ids
    that our file names add after it can be read back.
    """
    plain = unicodedata.normalize("NFKD", text[:1000]).encode("ascii", "ignore").decode()
    plain = re.sub(r"\.safetensors$", "", plain.strip(), flags=re.IGNORECASE)
    plain = re.sub(r"[^A-Za-z0-9.-]+", "_", plain)
    plain = re.sub(r"\.{2,}", ".", plain)
    plain = plain.strip("._-")[:SLUG_LENGTH].rstrip("._-")
    plain = re.sub(r"_(?=[0-9]+$)", "-", plain)
    if not plain or _RESERVED.match(plain):
        plain = f"{otherwise}-{plain}".rstrip("-")[:SLUG_LENGTH]
    return plain


def short_name(file: str) -> str:
    """A file name to which an owner's name can be added: itself, or its beginning and a digest if it is too long.

    File systems take names of 255 bytes. What is added has at most 100.
    """
    encoded = os.fsencode(file)
    if len(encoded) <= MAX_NAME_BYTES - 100:
        return file
    return f"{os.fsdecode(encoded[:100])}~{hashlib.sha256(encoded).hexdigest()[:16]}"


def version_file(name: str, version_id: int, file_id: int | None = None) -> str:
    """The file name of a CivitAI version. `file_id` is given for a file that is not the version's primary file."""
    ids = f"{version_id}" if file_id is None else f"{version_id}_{file_id}"
    return f"{slug(name)}_{ids}{SUFFIX}"


def digest_file(name: str, sha256: str) -> str:
    """The file name of a model that has no other identity than its bytes."""
    return f"{slug(name)}_{sha256[:16]}{SUFFIX}"


def is_named(file: str, name: str) -> bool:
    """Whether a bare name may mean a model file: by its stem, in any case, or as the WebUI sees it."""
    stem, wanted = file.removesuffix(SUFFIX), name.removesuffix(SUFFIX).casefold()
    return wanted in (stem.casefold(), plain_stem(stem).casefold())


@dataclass(frozen=True)
class FileIndex:
    """The model files of a folder, by everything that their names say.

    The ids in a name are a claim: somebody may have put `my_12.safetensors` there by hand.
    """

    files: frozenset[str] = frozenset()
    by_stem: dict[str, tuple[str, ...]] = field(default_factory=dict)  # casefolded
    by_plain_stem: dict[str, tuple[str, ...]] = field(default_factory=dict)  # as the WebUI sees it, casefolded
    by_version: dict[int, tuple[str, ...]] = field(default_factory=dict)
    by_digest: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, listing: Iterable[str]) -> FileIndex:
        """The index of a folder's listing. Files that are no models, and names with a leading dot, are left out."""
        by_stem: dict[str, tuple[str, ...]] = {}
        by_plain_stem: dict[str, tuple[str, ...]] = {}
        by_version: dict[int, tuple[str, ...]] = {}
        by_digest: dict[str, tuple[str, ...]] = {}
        files = sorted(name for name in listing if name.endswith(SUFFIX) and not name.startswith("."))
        for file in files:
            stem = file[: -len(SUFFIX)]
            for index, key in ((by_stem, stem.casefold()), (by_plain_stem, plain_stem(stem).casefold())):
                index[key] = (*index.get(key, ()), file)
            if version := _VERSION.search(file):
                # `a_12_345` is file 345 of version 12, or version 345 of a model that somebody called `a_12`.
                for claimed in {int(digits) for digits in version.groups() if digits}:
                    by_version[claimed] = (*by_version.get(claimed, ()), file)
            if digest := _DIGEST.search(file):
                by_digest[digest[1]] = (*by_digest.get(digest[1], ()), file)
        return cls(frozenset(files), by_stem, by_plain_stem, by_version, by_digest)

    def files_named(self, name: str) -> tuple[str, ...]:
        """The files that a bare name means: the exact one, else those in any case, else those that the WebUI shows so.

        Several files: it is ambiguous.
        """
        stem = name.removesuffix(SUFFIX)
        if stem + SUFFIX in self.files:
            return (stem + SUFFIX,)
        return self.by_stem.get(stem.casefold(), ()) or self.files_shown_as(stem)

    def files_shown_as(self, stem: str) -> tuple[str, ...]:
        """The files that the WebUI sees under a name that begins with this stem."""
        return self.by_plain_stem.get(stem.casefold(), ())

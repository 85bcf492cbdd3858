"""Which file of a CivitAI version is meant, and what its metadata says about it. Pure functions of the API's JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any
from urllib.parse import urlencode

from a1111_worker.domain import ModelKind, ModelRef, RemoteFile
from a1111_worker.errors import ModelNotFound, ModelRejected
from a1111_worker.models.civitai_responses import CivitAIRefused, Refusal, as_dict, as_text, error_of
from a1111_worker.text import printable

ANY_MODEL_FILE = {"type": "Model", "format": "SafeTensor"}
"""The query of a download if no file is known: any file of the model itself that is safetensors."""

_LISTED_TYPES = {
    ModelKind.LORA: ("lora", "locon", "lycoris", "dora"),
    ModelKind.CHECKPOINT: ("checkpoint",),
    ModelKind.EMBEDDING: ("textualinversion",),
    ModelKind.VAE: ("vae",),
    ModelKind.CONTROLNET: ("controlnet",),
}
_MODEL_FILE_TYPES = ("Model", "Pruned Model")


def newest_version(model: Mapping[str, Any], ref: ModelRef) -> int:
    """The id of the version of a model that was published last."""
    published = [
        version
        for version in _dicts(model.get("modelVersions"))
        if _id(version) is not None and version.get("status", "Published") == "Published"
    ]
    if not published:
        raise ModelNotFound(f"{ref.label} has no published version on CivitAI")
    # The list is in the author's order. The dates are all in UTC and of one form, so that text sorts them.
    return int(max(published, key=lambda version: as_text(version.get("publishedAt")))["id"])


def remote_file(
    version: Mapping[str, Any],
    ref: ModelRef,
    api_url: str,
    warnings: Sequence[str] = (),
    show: Callable[[str], str] = printable,
) -> RemoteFile:
    """The file of a version that `ref` means, as its metadata describes it. A ModelError if it is not available.

    `show` makes a text of CivitAI fit to be shown.
    """
    version_id = int(version["id"])
    model = as_dict(version.get("model"))
    listed_type = as_text(model.get("type"))
    if listed_type and listed_type.casefold() not in _LISTED_TYPES[ref.kind]:
        raise ModelRejected(f"{ref.label} is no {ref.kind.label}: CivitAI lists it as {show(listed_type)}")
    if as_text(version.get("usageControl")) not in ("", "Download"):
        raise error_of(CivitAIRefused(Refusal.DISABLED), ref.label)
    file, doubts = choose_file(_dicts(version.get("files")), ref)
    file_id = _id(file)
    sha256 = _sha256(file)
    if ref.sha256 and sha256 and ref.sha256 != sha256:
        raise ModelRejected(f"CivitAI's file of {ref.label} has the SHA-256 {sha256}, and {ref.sha256} was asked for")
    size, size_at_most = size_of(file.get("sizeKB"))
    return RemoteFile(
        url=download_url(api_url, version_id, {"fileId": file_id} if file_id is not None else ANY_MODEL_FILE),
        name=show(as_text(model.get("name"))) or ref.name or f"CivitAI version {version_id}",
        version_id=version_id,
        file_id=file_id,
        primary=file.get("primary") is True,
        size=size,
        size_at_most=size_at_most,
        sha256=ref.sha256 or sha256,
        base_model=show(as_text(version.get("baseModel"))) or None,
        trained_words=_trained_words(version.get("trainedWords"), show),
        warnings=(*warnings, *doubts),
        file_name=show(as_text(file.get("name"))) or None,
    )


def remote_file_without_metadata(version_id: int, ref: ModelRef, api_url: str, warnings: Sequence[str]) -> RemoteFile:
    """The file of a version that `ref` means, if CivitAI tells nothing about it: only what `ref` says selects it."""
    variant_filter = {key: value for key, value in (("size", ref.size), ("fp", ref.fp)) if value}
    query = {"fileId": ref.file_id} if ref.file_id is not None else {**ANY_MODEL_FILE, **variant_filter}
    return RemoteFile(
        url=download_url(api_url, version_id, query),
        name=printable(ref.name or "") or f"CivitAI version {version_id}",
        version_id=version_id,
        file_id=ref.file_id,
        sha256=ref.sha256,
        warnings=(*warnings, f"CivitAI could not be asked about {ref.label}: only the file itself was checked"),
    )


def choose_file(files: Sequence[Mapping[str, Any]], ref: ModelRef) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The file of a version that `ref` means, and warnings if it may not be the right one.

    The file id decides. Without it the choice is among the safetensors files of the model itself: first by the SHA-256
    that was asked for, then by the variant filter (`size`, `fp`), then the primary file, then the first one.
    """
    if not files:
        raise ModelNotFound(f"{ref.label} is archived on CivitAI: it has no files any more")
    if ref.file_id is not None:
        named = next((file for file in files if _id(file) == ref.file_id), None)
        if named is None:
            raise ModelNotFound(f"{ref.label} has no file {ref.file_id} on CivitAI")
        if not _is_loadable(named):
            raise ModelRejected(f"file {ref.file_id} of {ref.label} is not the model as a safetensors file")
        return named, _scan_warnings(named, ref)
    loadable = [file for file in files if _is_loadable(file)]
    if not loadable:
        raise ModelRejected(
            f"{ref.label} has no safetensors file on CivitAI", hint="other formats are never loaded: they may run code"
        )

    def rank(file: Mapping[str, Any]) -> tuple[bool, int, bool]:
        has_the_hash = ref.sha256 is not None and _sha256(file) == ref.sha256
        return has_the_hash, sum(_matches(file, ref)), file.get("primary") is True

    best = max(loadable, key=rank)  # the first of equals
    warnings = _scan_warnings(best, ref)
    if not rank(best)[0] and not all(_matches(best, ref)):
        variant = " and ".join(f"{key}={value}" for key, value in (("size", ref.size), ("fp", ref.fp)) if value)
        warnings = (f"{ref.label} has no file of {variant} on CivitAI: another of its files was taken", *warnings)
    return best, warnings


def size_of(kib: object) -> tuple[int | None, int | None]:
    """A size that CivitAI gives in KiB, as exact bytes (None if unknown), and as bytes that the file does not exceed.

    CivitAI divides the bytes by 1024 and keeps all digits (`bytesToKB`), which a float holds exactly. If the result is
    no whole number of bytes, somebody has rounded it.
    """
    if isinstance(kib, bool) or not isinstance(kib, (int, float)) or not 0 < kib < 2**43:
        return None, None
    size = kib * 1024
    if size == int(size):
        return int(size), int(size)
    return None, math.ceil(size) + 1024


def download_path(version_id: int) -> str:
    return f"/api/download/models/{version_id}"


def download_url(api_url: str, version_id: int, query: Mapping[str, Any]) -> str:
    return f"{api_url}{download_path(version_id)}?{urlencode(query)}"


def _matches(file: Mapping[str, Any], ref: ModelRef) -> tuple[bool, bool]:
    """Whether a file has the size and the fp of the variant filter."""
    metadata = as_dict(file.get("metadata"))
    size = metadata.get("size") or ("pruned" if file.get("type") == "Pruned Model" else None)
    return ref.size in (None, size), ref.fp in (None, metadata.get("fp"))


def _is_loadable(file: Mapping[str, Any]) -> bool:
    """Whether a file is the model itself (no VAE, bare UNet or training data), and safetensors by format and name."""
    return (
        (file.get("type") or "Model") in _MODEL_FILE_TYPES
        and (as_dict(file.get("metadata")).get("format") or "SafeTensor") == "SafeTensor"
        and as_text(file.get("name")).lower().endswith(".safetensors")
    )


def _scan_warnings(file: Mapping[str, Any], ref: ModelRef) -> tuple[str, ...]:
    """A warning if CivitAI's scans of a file are not complete; ModelRejected if one found a danger.

    A safetensors file runs no code, but a file that is called a danger is not used.
    """
    scans = {as_text(file.get("pickleScanResult")), as_text(file.get("virusScanResult"))}
    if "Danger" in scans:
        raise ModelRejected(f"CivitAI's scan calls the file of {ref.label} a danger")
    if scans <= {"Success", ""}:
        return ()
    return (f"CivitAI's scan of {ref.label} is not finished, or failed",)


# Metadata is written by other people: it may hold any type and any length, and half characters.


def _dicts(value: object) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _id(value: Mapping[str, Any]) -> int | None:
    found = value.get("id")
    return found if type(found) is int and 0 < found < 2**53 else None


def _sha256(file: Mapping[str, Any]) -> str | None:
    value = as_text(as_dict(file.get("hashes")).get("SHA256")).lower()
    return value if re.fullmatch(r"[0-9a-f]{64}", value) else None


def _trained_words(value: object, show: Callable[[str], str]) -> tuple[str, ...]:
    words = (show(word) for word in value if isinstance(word, str)) if isinstance(value, list) else ()
    return tuple(islice((word for word in words if word), 100))

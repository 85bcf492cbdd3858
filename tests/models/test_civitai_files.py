"""Which file of a CivitAI version is meant, and what its metadata says about it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1111_worker.domain import ModelKind, ModelRef
from a1111_worker.errors import ModelError, ModelNotFound, ModelRejected
from a1111_worker.models.civitai_files import choose_file, newest_version, remote_file, size_of

LORA = ModelRef(ModelKind.LORA, version_id=135867)


def a_file(file_id: int, **about: Any) -> dict[str, Any]:
    """A file as /api/v1/model-versions/{id} shows it; `size`, `fp` and `format` are its metadata."""
    metadata = {
        "format": about.pop("format", "SafeTensor"),
        "size": about.pop("size", None),
        "fp": about.pop("fp", None),
    }
    return {
        "id": file_id,
        "name": f"{file_id}.safetensors",
        "type": "Model",
        "sizeKB": 1.5,
        "pickleScanResult": "Success",
        "virusScanResult": "Success",
        "metadata": metadata,
        "hashes": {"SHA256": f"{file_id:064X}"},
    } | about


FULL = a_file(1, size="full", fp="fp32")
PRUNED = a_file(2, size="pruned", fp="fp16", primary=True)
PRUNED_BF16 = a_file(3, size="pruned", fp="bf16")
PICKLE = a_file(4, format="PickleTensor", name="4.ckpt", primary=True)
VAE = a_file(5, type="VAE")
OLD_PRUNED = a_file(6, type="Pruned Model")
NAMED_CKPT = a_file(7, name="7.ckpt")
TRAINING = a_file(8, type="Training Data", format="Other", name="8.zip")

# Files, what the job says besides the version → the file, the beginning of a warning.
CHOICES: list[tuple[list[dict[str, Any]], dict[str, Any], int, str | None]] = [
    # no variant filter: the primary one, else the first
    ([FULL, PRUNED, PRUNED_BF16], {}, 2, None),
    ([FULL, PRUNED_BF16], {}, 1, None),
    # a pickle is not looked at, primary or not; a VAE and training data neither
    ([PICKLE, FULL], {}, 1, None),
    ([VAE, TRAINING, FULL], {}, 1, None),
    # the URL's variant filter
    ([FULL, PRUNED, PRUNED_BF16], {"size": "full"}, 1, None),
    ([FULL, PRUNED, PRUNED_BF16], {"size": "pruned"}, 2, None),
    ([FULL, PRUNED, PRUNED_BF16], {"size": "pruned", "fp": "bf16"}, 3, None),
    ([FULL, PRUNED], {"size": "pruned", "fp": "bf16"}, 2, "'x' has no file of size=pruned and fp=bf16"),
    ([FULL], {"fp": "fp8"}, 1, "'x' has no file of fp=fp8"),
    # an old upload that says it by its type alone
    ([FULL, OLD_PRUNED], {"size": "pruned"}, 6, None),
    # the hash that was asked for goes before the variant filter
    ([FULL, PRUNED, PRUNED_BF16], {"sha256": f"{3:064x}", "size": "full"}, 3, None),
    # the file id before everything
    ([FULL, PRUNED, PRUNED_BF16], {"file_id": 3, "size": "full"}, 3, None),
    # metadata that says nothing: the name decides
    ([a_file(9, metadata=None, type=None)], {}, 9, None),
    # scans
    ([a_file(9, pickleScanResult="Pending")], {}, 9, "CivitAI's scan of 'x' is not finished"),
    ([a_file(9, virusScanResult="Error")], {}, 9, "CivitAI's scan of 'x' is not finished"),
    ([a_file(9, pickleScanResult=None, virusScanResult=None)], {}, 9, None),
    ([FULL, a_file(9, pickleScanResult="Danger")], {}, 1, None),
]


@pytest.mark.parametrize(("files", "asked", "chosen", "warning"), CHOICES)
def test_the_right_file_of_a_version_is_chosen(
    files: list[dict[str, Any]], asked: dict[str, Any], chosen: int, warning: str | None
) -> None:
    file, doubts = choose_file(files, ModelRef(ModelKind.CHECKPOINT, version_id=5, name="x", **asked))

    assert file["id"] == chosen
    assert [doubt[: len(warning or "")] for doubt in doubts] == ([warning] if warning else [])


# Files, what the job says → the error.
NO_CHOICE: list[tuple[list[dict[str, Any]], dict[str, Any], type[ModelError], str]] = [
    ([], {}, ModelNotFound, "archived"),
    ([PICKLE, VAE, TRAINING], {}, ModelRejected, "no safetensors file"),
    ([NAMED_CKPT], {}, ModelRejected, "no safetensors file"),  # called safetensors, and named otherwise
    ([FULL], {"file_id": 99}, ModelNotFound, "has no file 99"),
    ([FULL, PICKLE], {"file_id": 4}, ModelRejected, "file 4 of 'x' is not the model as a safetensors file"),
    ([FULL, VAE], {"file_id": 5}, ModelRejected, "file 5 of 'x' is not the model as a safetensors file"),
    ([a_file(9, pickleScanResult="Danger")], {}, ModelRejected, "a danger"),
    ([a_file(9, virusScanResult="Danger")], {"file_id": 9}, ModelRejected, "a danger"),
]


@pytest.mark.parametrize(("files", "asked", "error", "sentence"), NO_CHOICE)
def test_a_version_without_a_file_to_load_is_refused(
    files: list[dict[str, Any]], asked: dict[str, Any], error: type[ModelError], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        choose_file(files, ModelRef(ModelKind.CHECKPOINT, version_id=5, name="x", **asked))


def test_another_hash_than_the_one_asked_for_is_refused_before_a_byte_is_fetched() -> None:
    version = {"id": 5, "model": {"type": "Checkpoint"}, "files": [FULL]}

    with pytest.raises(ModelRejected, match=f"{1:064x}, and {2:064x} was asked for"):
        remote_file(version, ModelRef(ModelKind.CHECKPOINT, version_id=5, sha256=f"{2:064x}"), "https://civitai.com")


# What CivitAI says in KiB → bytes, and bytes at most.
@pytest.mark.parametrize(
    ("kib", "size"),
    [
        (223097.9921875, (228452344, 228452344)),  # what CivitAI computes: bytes / 1024
        (6775430.353515625, (6938040682, 6938040682)),
        (1024, (1048576, 1048576)),
        (223097.99, (None, 228453366)),  # rounded by somebody
        (0, (None, None)),
        (-1.5, (None, None)),
        (float("nan"), (None, None)),
        (float("inf"), (None, None)),
        (1e300, (None, None)),
        (True, (None, None)),
        ("12", (None, None)),
        (None, (None, None)),
    ],
)
def test_a_size_is_exact_or_a_bound(kib: object, size: tuple[int | None, int | None]) -> None:
    assert size_of(kib) == size


def test_the_newest_version_was_published_last() -> None:
    versions = [
        {"id": 3, "status": "Draft", "publishedAt": "2026-01-01T00:00:00.000Z"},
        {"id": 1, "status": "Published", "publishedAt": "2024-01-01T00:00:00.000Z"},
        {"id": 2, "status": "Published", "publishedAt": "2025-01-01T00:00:00.000Z"},
        {"id": "4", "publishedAt": "2027-01-01T00:00:00.000Z"},
        None,
    ]

    assert newest_version({"modelVersions": versions}, LORA) == 2


@pytest.mark.parametrize("versions", [[], None, [{"id": 1, "status": "Draft"}], {"id": 1}])
def test_a_model_without_a_published_version_is_not_found(versions: object) -> None:
    with pytest.raises(ModelNotFound, match="no published version"):
        newest_version({"modelVersions": versions}, LORA)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FILE = st.fixed_dictionaries(
    {"name": st.just("a.safetensors") | JSON, "id": st.just(1) | JSON},
    optional=dict.fromkeys(("type", "sizeKB", "metadata", "hashes", "pickleScanResult", "primary"), JSON),
)


@settings(max_examples=200, deadline=None)
@given(
    version=st.fixed_dictionaries(
        {"id": st.just(5), "files": st.lists(FILE | JSON, max_size=3) | JSON},
        optional=dict.fromkeys(("model", "baseModel", "trainedWords", "usageControl"), JSON),
    )
)
def test_any_metadata_gives_a_file_or_an_error_of_ours(version: dict[str, Any]) -> None:
    try:
        remote = remote_file(version, LORA, "https://civitai.com")
    except ModelError:
        return

    assert re.fullmatch(r"https://civitai\.com/api/download/models/5\?[A-Za-z0-9=&]+", remote.url)
    for text in (remote.name, remote.base_model or "", *remote.trained_words):
        assert len(text) <= 120
        assert text.isprintable()
        text.encode()

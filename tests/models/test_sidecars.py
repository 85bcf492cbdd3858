"""What is known of models, however it is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from a1111_worker.context import Deadline
from a1111_worker.domain import ModelKind, ModelRef
from a1111_worker.errors import JobCancelled, ModelNotFound, ModelRejected
from a1111_worker.models.sidecars import ModelRecord, Sidecars, Uses
from a1111_worker.models.volume import CacheDirectory
from sandbox.models import sdxl_checkpoint, sdxl_lora, sha256_of, tensor_hash
from tests.disks import read_only


@pytest.fixture
def directory(tmp_path: Path) -> CacheDirectory:
    directory = CacheDirectory(tmp_path / "loras", ModelKind.LORA, is_writable=True)
    directory.prepare()
    return directory


@pytest.fixture
def sidecars(tmp_path: Path) -> Sidecars:
    return Sidecars(tmp_path / "notes")


def write(directory: CacheDirectory, sidecars: Sidecars, file: str = "a_12.safetensors", **facts: Any) -> ModelRecord:
    """A record of a real file."""
    path = sdxl_lora(directory.path(file), 1)
    record = ModelRecord(
        ModelKind.LORA,
        "Ä model",
        file,
        sha256_of(path),
        path.stat().st_size,
        url="https://civitai.com/api/download/models/12",
        version_id=12,
        variant_filters=("pruned/fp16",),
        trained_words=("snow", "“quoted”"),
    )
    return sidecars.write(directory, replace(record, **facts))


def sidecar(directory: CacheDirectory, file: str = "a_12.safetensors") -> Path:
    return directory.folder / f"{file}.json"


def test_a_written_record_is_found(directory: CacheDirectory, sidecars: Sidecars) -> None:
    record = write(directory, sidecars)

    assert sidecars.find(directory, "a_12.safetensors") == record
    assert (
        Sidecars(
            directory.folder,
        ).find(directory, "a_12.safetensors")
        == record
    )


def test_a_sidecar_cut_off_anywhere_is_not_believed(directory: CacheDirectory, sidecars: Sidecars) -> None:
    write(directory, sidecars)
    whole = sidecar(directory).read_bytes()

    for length in range(0, len(whole), 5):
        sidecar(directory).write_bytes(whole[:length])
        assert Sidecars(directory.folder).find(directory, "a_12.safetensors") is None, whole[:length]


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},  # from the future
        {"schema": None},
        {"schema": True},
        {"kind": "checkpoint"},
        {"kind": "hologram"},
        {"file": "b.safetensors"},
        {"size": 1},  # another file
        {"size": "1"},
        {"size": True},
        {"sha256": "0d9b"},
        {"sha256": None},
        {"version_id": "12"},
        {"version_id": 1.5},
        {"primary": 1},
        {"wishes": "pruned"},
        {"trained_words": [1]},
        {"name": 7},
    ],
)
def test_a_sidecar_that_says_something_else_is_not_believed(
    directory: CacheDirectory, sidecars: Sidecars, change: dict[str, Any]
) -> None:
    write(directory, sidecars)
    sidecar(directory).write_text(json.dumps(json.loads(sidecar(directory).read_bytes()) | change))

    assert sidecars.find(directory, "a_12.safetensors") is None


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff\xfe", b"{" * 100_000, b"[" * 100_000, b"\x00" * 4096])
def test_any_sidecar_is_survived(directory: CacheDirectory, sidecars: Sidecars, content: bytes) -> None:
    write(directory, sidecars)
    sidecar(directory).write_bytes(content)

    assert sidecars.find(directory, "a_12.safetensors") is None


def test_unknown_facts_of_the_same_schema_are_passed_over(directory: CacheDirectory, sidecars: Sidecars) -> None:
    record = write(directory, sidecars)
    sidecar(directory).write_text(json.dumps(json.loads(sidecar(directory).read_bytes()) | {"rating": 5}))

    assert sidecars.find(directory, "a_12.safetensors") == record


def test_a_model_is_known_again_by_reading_it(directory: CacheDirectory, sidecars: Sidecars) -> None:
    path = sdxl_lora(directory.path("mine.safetensors"), 3)
    reports: list[tuple[int, int]] = []

    record = sidecars.rebuild(
        directory, "mine.safetensors", Deadline(), on_progress=lambda done, total: reports.append((done, total))
    )

    assert record.sha256 == sha256_of(path)
    assert record.lora_hash == tensor_hash(path)[:12]
    assert (record.family, record.version_id, record.name) == ("sdxl", None, "mine")
    assert reports[-1] == (path.stat().st_size, path.stat().st_size)
    assert sidecars.find(directory, "mine.safetensors") == record


def test_a_file_that_somebody_replaced_by_hand_is_read_again(directory: CacheDirectory, sidecars: Sidecars) -> None:
    path = sdxl_lora(directory.path("mine.safetensors"), 1)
    sidecars.rebuild(directory, "mine.safetensors", Deadline())
    size = path.stat().st_size

    sdxl_lora(path, 2)
    os.utime(path, (1_000_000, 1_000_000))

    assert path.stat().st_size == size
    assert sidecars.find(directory, "mine.safetensors") is None


def test_a_downloaded_file_may_be_copied_with_another_time(directory: CacheDirectory, sidecars: Sidecars) -> None:
    record = write(directory, sidecars)

    os.utime(directory.path(record.file), (0, 0))  # as image layers do

    assert sidecars.find(directory, record.file) == record


def test_what_is_no_model_is_refused_and_what_is_gone_is_not_found(
    directory: CacheDirectory, sidecars: Sidecars
) -> None:
    directory.path("bad.safetensors").write_bytes(b"<html>not a model</html>" * 10)

    with pytest.raises(ModelRejected):
        sidecars.rebuild(directory, "bad.safetensors", Deadline())
    with pytest.raises(ModelNotFound):
        sidecars.rebuild(directory, "gone.safetensors", Deadline())

    assert not sidecar(directory, "bad.safetensors").exists()


def test_reading_a_model_ends_with_its_job(directory: CacheDirectory, sidecars: Sidecars) -> None:
    sdxl_lora(directory.path("big.safetensors"), 1, 9_000_000)
    deadline = Deadline()
    seen: list[int] = []

    def cancel(done: int, total: int) -> None:
        seen.append(done)
        deadline.cancel()

    with pytest.raises(JobCancelled):
        sidecars.rebuild(directory, "big.safetensors", deadline, on_progress=cancel)

    assert len(seen) == 1


def test_a_directory_that_cannot_be_written_is_known_by_notes_of_this_container(
    tmp_path: Path, sidecars: Sidecars
) -> None:
    source = CacheDirectory(tmp_path / "source", ModelKind.CHECKPOINT)
    sdxl_checkpoint(source.path("c.safetensors"))
    with read_only(source.folder):
        record = sidecars.rebuild(source, "c.safetensors", Deadline())
        known = sidecars.find(source, "c.safetensors")
        elsewhere = Sidecars(tmp_path / "other container").find(source, "c.safetensors")

    assert known == record
    assert elsewhere is None
    assert [path.name for path in source.folder.iterdir()] == ["c.safetensors"]


def test_a_sidecar_that_lies_beside_a_model_of_a_source_is_used(tmp_path: Path, sidecars: Sidecars) -> None:
    directory = CacheDirectory(tmp_path / "baked", ModelKind.LORA, is_writable=True)
    directory.prepare()
    record = write(directory, sidecars)
    source = CacheDirectory(directory.folder, ModelKind.LORA)

    assert sidecars.find(source, record.file) == record


def test_no_use_of_any_worker_is_lost(directory: CacheDirectory, sidecars: Sidecars) -> None:
    write(directory, sidecars)
    use = (
        "import sys; from pathlib import Path; from a1111_worker.domain import ModelKind;"
        "from a1111_worker.models.sidecars import Sidecars; from a1111_worker.models.volume import CacheDirectory;"
        "directory = CacheDirectory(Path(sys.argv[1]), ModelKind.LORA, is_writable=True);"
        "[Sidecars(directory.folder).count_use(directory, 'a_12.safetensors') for _ in range(100)]"
    )

    workers = [subprocess.Popen([sys.executable, "-c", use, str(directory.folder)]) for _ in range(3)]
    codes = [worker.wait() for worker in workers]

    uses = sidecars.uses(directory, "a_12.safetensors")
    assert codes == [0, 0, 0]
    assert uses.count == 300
    assert uses.last > 0


def test_a_model_that_was_never_used_counts_from_when_it_came(directory: CacheDirectory, sidecars: Sidecars) -> None:
    write(directory, sidecars)
    os.utime(directory.path("a_12.safetensors"), (1000, 1000))

    assert sidecars.uses(directory, "a_12.safetensors") == Uses(0, 1000.0)
    assert sidecars.uses(directory, "gone.safetensors") == Uses(0, 0.0)


def test_a_url_is_remembered_by_its_digest_as_long_as_its_file_is_there(
    directory: CacheDirectory, sidecars: Sidecars
) -> None:
    record = write(directory, sidecars)
    url = "https://models.example/x.safetensors?secret=1"

    sidecars.remember_url(directory, url, record.file)

    assert sidecars.file_of_url(directory, url) == record.file
    assert sidecars.file_of_url(directory, url + "0") is None
    assert not [path for path in directory.urls.iterdir() if "secret" in path.name or "secret" in path.read_text()]
    directory.path(record.file).unlink()
    assert sidecars.file_of_url(directory, url) is None


@pytest.mark.parametrize("content", ["../../etc/passwd", "", "\x00", "no.safetensors", "é"])
def test_a_url_never_leads_out_of_the_directory(directory: CacheDirectory, sidecars: Sidecars, content: str) -> None:
    sidecars.remember_url(directory, "https://x", "a.safetensors")
    (note,) = directory.urls.iterdir()
    note.write_text(content)

    assert sidecars.file_of_url(directory, "https://x") is None


@pytest.mark.parametrize(
    ("facts", "wanted", "expected"),
    [
        ({"primary": True}, {}, True),
        ({"primary": False}, {}, False),  # a version alone means its primary file
        ({"primary": False, "file_id": 7}, {"file_id": 7}, True),
        ({"primary": True, "file_id": 8}, {"file_id": 7}, False),
        ({"primary": True}, {"size": "pruned", "fp": "fp16"}, True),  # this filter is known to select the file
        ({"primary": True}, {"size": "full"}, False),  # CivitAI must be asked which file that is
        ({"version_id": None}, {}, False),  # nothing is verified
        ({"version_id": 13}, {}, False),
    ],
)
def test_which_record_is_of_the_file_that_a_reference_means(
    directory: CacheDirectory, sidecars: Sidecars, facts: dict[str, Any], wanted: dict[str, Any], expected: bool
) -> None:
    record = write(directory, sidecars, **facts)

    assert record.is_file_of(ModelRef(ModelKind.LORA, version_id=12, **wanted)) is expected

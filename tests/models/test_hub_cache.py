"""Models of Hugging Face in the cache: fetched, found again, taken from RunPod's copy, and only for whom they are."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from a1111_worker.context import JobContext
from a1111_worker.domain import HubFile, Model, ModelKind, ModelRef
from a1111_worker.errors import DownloadFailed, InvalidRequest, ModelAccessDenied, ModelNotFound, WorkerError
from a1111_worker.models.cache import CheckpointSpec
from a1111_worker.models.hub_files import HubAccess
from a1111_worker.models.manager import ModelManager
from sandbox.huggingface import SERVER_ERROR
from sandbox.models import sdxl_checkpoint, sdxl_lora, sha256_of
from tests.fleet import TOKEN, Fleet, fetch, named, soon

REPO, NAME = "owner/styles", "loras/Ink style.safetensors"
FILE = HubFile(REPO, NAME)
OPEN = HubAccess(repos=frozenset({REPO}))


def hub(file: HubFile = FILE, **more: Any) -> ModelRef:
    return ModelRef(ModelKind.LORA, hub=file, **more)


def publish(fleet: Fleet, seed: int = 1, *, private: bool = False) -> tuple[Path, HubFile]:
    """Have the hub offer a file. Returns its path, and its name with its commit."""
    path = sdxl_lora(fleet.folder / "served" / f"hub-{seed}.safetensors", seed)
    commit = fleet.hub.add(REPO, NAME, path)
    fleet.hub.repos[REPO].private = private
    fleet.hub.repos[REPO].readers = {TOKEN}
    return path, replace(FILE, revision=commit)


def give_copy(folder: Path, path: Path, file: HubFile, *, branch: str = "main", blob: str | None = None) -> Path:
    """Put a file where RunPod puts cached models, in huggingface_hub's layout. Returns the path of its bytes."""
    repo = folder / f"models--{file.repo.replace('/', '--')}"
    there = repo / "blobs" / (blob or sha256_of(path))
    there.parent.mkdir(parents=True, exist_ok=True)
    there.write_bytes(path.read_bytes())
    snapshot = repo / "snapshots" / file.revision / file.path
    snapshot.parent.mkdir(parents=True, exist_ok=True)
    snapshot.symlink_to(os.path.relpath(there, snapshot.parent))
    ref = repo / "refs" / branch
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(file.revision)
    return there


# -- fetched from the hub


def test_a_file_of_the_hub_is_fetched_verified_and_shown_to_the_webui(fleet: Fleet) -> None:
    path, _ = publish(fleet)

    model = fetch(fleet.start(), hub())

    assert (fleet.folder / "container1/webui/Lora" / model.shown_file).read_bytes() == path.read_bytes()
    assert model.file == f"Ink_style_{sha256_of(path)[:16]}.safetensors"
    assert (model.name, model.family, model.downloaded) == ("Ink style", "sdxl", True)
    assert fleet.debris() == []


def test_a_commit_that_is_in_the_cache_costs_no_request_and_a_branch_costs_one(fleet: Fleet) -> None:
    _, exact = publish(fleet)
    fetch(fleet.start(), hub())
    before = len(fleet.asked())

    fetch(fleet.start(), hub(exact))
    of_commit = len(fleet.asked()) - before
    again = fetch(fleet.start(), hub())

    assert (of_commit, len(fleet.asked()) - before) == (0, 1)
    assert not again.downloaded


def test_a_branch_that_moved_is_another_file_and_the_old_commit_stays(fleet: Fleet) -> None:
    _, old = publish(fleet)
    first = fetch(fleet.start(), hub())
    newer, _ = publish(fleet, 2)
    worker = fleet.start()

    second, third = fetch(worker, hub()), fetch(worker, hub(old))

    assert second.sha256 == sha256_of(newer) != first.sha256
    assert (third.sha256, third.downloaded) == (first.sha256, False)


def test_if_the_hub_is_down_the_last_known_file_of_a_branch_is_used_with_a_warning(fleet: Fleet) -> None:
    publish(fleet)
    known = fetch(fleet.start(), hub())
    fleet.hub.fail(SERVER_ERROR, times=None)
    worker = fleet.start()

    again = fetch(worker, hub())

    assert again.sha256 == known.sha256
    assert "may have changed since it was fetched" in again.warnings[0]
    with pytest.raises(DownloadFailed):
        fetch(worker, hub(replace(FILE, path="another.safetensors")))


def test_a_wrong_byte_of_the_storage_is_not_believed(fleet: Fleet) -> None:
    path, _ = publish(fleet)
    fleet.hub.storage.flip_at = [path.stat().st_size // 2]

    model = fetch(fleet.start(), hub())

    assert model.sha256 == sha256_of(path)


# -- private files that are in the cache

WAYS: list[tuple[str, Callable[[Model, HubFile], ModelRef], type[WorkerError]]] = [
    ("by its branch", lambda model, exact: hub(), ModelAccessDenied),
    ("by its commit", lambda model, exact: hub(exact), ModelAccessDenied),
    ("by its commit and hash", lambda model, exact: hub(exact, sha256=model.sha256), ModelAccessDenied),
    ("by its name", lambda model, exact: named(model.shown), ModelNotFound),
    # a caller who knows the hash and nothing else
    ("by its hash", lambda model, exact: _elsewhere(sha256=model.sha256), InvalidRequest),
]


def _elsewhere(**more: Any) -> ModelRef:
    return ModelRef(ModelKind.LORA, url="http://127.0.0.1:9/x.safetensors", **more)


@pytest.mark.parametrize(("how", "error"), [row[1:] for row in WAYS], ids=[row[0] for row in WAYS])
def test_a_file_that_was_fetched_with_the_token_is_for_the_callers_of_its_endpoint_alone(
    fleet: Fleet, how: Callable[[Model, HubFile], ModelRef], error: type[WorkerError]
) -> None:
    """Two endpoints share a volume, and only one of them names the repository in HF_REPOS."""
    _, exact = publish(fleet, private=True)
    model = fetch(fleet.start(hub_access=OPEN), hub())
    other = fleet.start()

    with pytest.raises(error):
        fetch(other, how(model, exact))

    for ref in (hub(), hub(exact), named(model.shown)):
        assert not fetch(fleet.start(hub_access=OPEN), ref).downloaded


def test_a_denied_file_and_a_repository_that_does_not_exist_have_the_same_words(fleet: Fleet) -> None:
    _, exact = publish(fleet, private=True)
    fetch(fleet.start(hub_access=OPEN), hub())
    worker = fleet.start()

    def words(file: HubFile) -> tuple[str, str | None]:
        with pytest.raises(ModelAccessDenied) as refused:
            fetch(worker, hub(file))
        return refused.value.message.replace(file.repo, "REPO"), refused.value.hint

    assert words(FILE) == words(exact) == words(HubFile("owner/none", NAME))


def test_a_file_that_the_hub_shows_to_everybody_by_now_is_everybodys(fleet: Fleet) -> None:
    _, exact = publish(fleet, private=True)
    fetch(fleet.start(hub_access=OPEN), hub())
    fleet.hub.repos[REPO].private = False
    other = fleet.start()

    by_branch = fetch(other, hub())
    asked = len(fleet.asked())
    by_commit = fetch(other, hub(exact))

    assert not by_branch.downloaded and not by_commit.downloaded
    assert len(fleet.asked()) == asked  # it is known now


# -- RunPod's copy


def is_same_file(model: Model, path: Path) -> bool:
    """Whether a model is a link to these very bytes, and no copy."""
    return model.path.samefile(path)


def test_runpods_copy_is_linked_and_not_copied_and_the_hub_is_not_asked(fleet: Fleet, tmp_path: Path) -> None:
    path, exact = publish(fleet, private=True)
    there = give_copy(tmp_path / "hub", path, exact)
    worker = fleet.start(hub_cache=tmp_path / "hub", hub_access=OPEN)

    models = [fetch(worker, ref) for ref in (hub(), hub(exact), hub(sha256=sha256_of(path)))]

    assert all(is_same_file(model, there) and not model.downloaded for model in models)
    assert (fleet.folder / "container1/webui/Lora" / models[0].shown_file).samefile(there)
    assert (models[0].name, models[0].sha256, models[0].family) == ("Ink style", sha256_of(path), "sdxl")
    assert fleet.asked() == []
    assert fleet.models_there() == []


def test_runpods_copy_that_has_other_bytes_than_its_name_says_is_not_used(fleet: Fleet, tmp_path: Path) -> None:
    path, exact = publish(fleet)
    other = sdxl_lora(tmp_path / "other.safetensors", 9)
    give_copy(tmp_path / "hub", other, exact, blob=sha256_of(path))
    worker = fleet.start(hub_cache=tmp_path / "hub", hub_access=OPEN)

    model = fetch(worker, hub())

    assert (model.sha256, model.downloaded) == (sha256_of(path), True)


def test_the_hub_says_what_a_copy_must_be_if_its_name_does_not(fleet: Fleet, tmp_path: Path) -> None:
    path, exact = publish(fleet)
    there = give_copy(tmp_path / "hub", path, exact, blob="0123456789")
    worker = fleet.start(hub_cache=tmp_path / "hub", hub_access=OPEN)

    model = fetch(worker, hub())

    assert is_same_file(model, there) and not model.downloaded
    assert len(fleet.asked()) == 1


def test_a_branch_that_moved_since_runpod_fetched_it_is_downloaded_if_the_hub_is_asked(
    fleet: Fleet, tmp_path: Path
) -> None:
    path, exact = publish(fleet)
    give_copy(tmp_path / "hub", path, exact)
    newer, _ = publish(fleet, 2)

    model = fetch(fleet.start(hub_cache=tmp_path / "hub"), hub())

    assert (model.sha256, model.downloaded) == (sha256_of(newer), True)


@pytest.mark.parametrize("private", [True, False])
def test_runpods_copy_of_another_repository_is_for_those_to_whom_the_hub_shows_it(
    fleet: Fleet, tmp_path: Path, private: bool
) -> None:
    path, exact = publish(fleet, private=private)
    there = give_copy(tmp_path / "hub", path, exact)
    worker = fleet.start(hub_cache=tmp_path / "hub")
    fetch(fleet.start(name="open", hub_cache=tmp_path / "hub", hub_access=OPEN), hub())  # and so it has a name

    if private:
        for ref in (hub(), hub(exact)):
            with pytest.raises(ModelAccessDenied):
                fetch(worker, ref)
    else:
        assert is_same_file(fetch(worker, hub()), there)
    assert {asked.headers.get("authorization") for asked in fleet.hub.asked} == {None}


@pytest.mark.parametrize("damage", ["no refs", "a ref that is no commit", "a dangling link", "a link out of the cache"])
def test_a_damaged_cache_of_runpod_is_as_good_as_none(fleet: Fleet, tmp_path: Path, damage: str) -> None:
    path, exact = publish(fleet)
    there = give_copy(tmp_path / "hub", path, exact)
    repo = tmp_path / "hub" / "models--owner--styles"
    if damage == "no refs":
        (repo / "refs/main").unlink()
    elif damage == "a ref that is no commit":
        (repo / "refs/main").write_text("../../x")
    elif damage == "a dangling link":
        there.unlink()
    else:
        (outside := tmp_path / sha256_of(path)).write_bytes(path.read_bytes())
        there.unlink()
        there.symlink_to(outside)

    model = fetch(fleet.start(hub_cache=tmp_path / "hub", hub_access=OPEN), hub())

    assert model.downloaded


def test_the_fixed_checkpoint_may_be_runpods_copy(fleet: Fleet, tmp_path: Path) -> None:
    path = sdxl_checkpoint(tmp_path / "served.safetensors", 1, 3_000_000)
    file = HubFile("owner/checkpoint", "sd.safetensors")
    exact = replace(file, revision=fleet.hub.add(file.repo, file.path, path))
    there = give_copy(tmp_path / "hub", path, exact)
    spec = CheckpointSpec(ModelRef(ModelKind.CHECKPOINT, hub=file), "my.safetensors", "Mine")
    access = HubAccess(files=frozenset({file}))

    def start() -> ModelManager:
        return fleet.start(name="1", checkpoint=spec, hub_cache=tmp_path / "hub", hub_access=access)

    first, again = (start().prepare_checkpoint(JobContext(soon())) for _ in range(2))

    assert is_same_file(first, there)
    assert (first.file, first.name, first.family) == ("my.safetensors", "Mine", "sdxl")
    assert again == first
    assert (fleet.folder / "container1/webui/Stable-diffusion" / first.shown_file).samefile(there)
    assert fleet.asked() == []


def test_a_checkpoint_of_a_private_repository_is_fetched_with_the_token(fleet: Fleet, tmp_path: Path) -> None:
    path = sdxl_checkpoint(tmp_path / "served.safetensors", 1, 3_000_000)
    file = HubFile("owner/checkpoint", "sd.safetensors")
    fleet.hub.add(file.repo, file.path, path)
    fleet.hub.repos[file.repo].private = True
    fleet.hub.repos[file.repo].readers = {TOKEN}
    spec = CheckpointSpec(ModelRef(ModelKind.CHECKPOINT, hub=file), "my.safetensors", "Mine")

    worker = fleet.start(checkpoint=spec, hub_access=HubAccess(files=frozenset({file})))

    assert worker.prepare_checkpoint(JobContext(soon())).sha256 == sha256_of(path)
    with pytest.raises(ModelAccessDenied):  # the token is for the checkpoint alone
        fetch(worker, hub(HubFile(file.repo, "secret.safetensors")))

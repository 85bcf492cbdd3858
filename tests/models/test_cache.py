"""The models on disk, in folders of all kinds: found, held, shown to the WebUI."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from a1111_worker.context import JobContext
from a1111_worker.domain import ModelKind, ModelRef
from a1111_worker.errors import DownloadFailed, ModelError, ModelNotFound, ModelRejected, VolumeFailed
from a1111_worker.models import care
from sandbox.civitai import NO_MODEL
from sandbox.models import sdxl_checkpoint, sdxl_lora, sha256_of, vae
from tests.disks import read_only
from tests.fleet import DETAIL, Fleet, fetch, lora, named, soon, timings

MB = 1_000_000


# -- files that somebody put there


def test_a_file_put_there_by_hand_is_known_by_its_stem(fleet: Fleet) -> None:
    path = fleet.put("My Style v2.safetensors", 4)
    worker = fleet.start()

    models = [fetch(worker, named(name)) for name in ("My Style v2", "my style V2", "My Style v2.safetensors")]

    assert {(model.file, model.sha256, model.version_id) for model in models} == {(path.name, sha256_of(path), None)}
    assert fleet.asked() == []


@pytest.mark.parametrize(
    ("there", "name", "outcome"),
    [
        (["foo", "Foo"], "foo", "foo"),
        (["foo", "Foo"], "FOO", ModelNotFound),  # either
        (["foo"], "fo", ModelNotFound),
        (["foo"], "../loras/foo", ModelNotFound),
        (["foo"], "", ModelNotFound),
        ([], "detail_tweaker_xl", ModelNotFound),  # the catalog's, and CivitAI does not have it
    ],
)
def test_a_bare_name_is_clear_or_not_found(
    fleet: Fleet, there: list[str], name: str, outcome: str | type[ModelError]
) -> None:
    for seed, stem in enumerate(there):
        fleet.put(f"{stem}.safetensors", seed)
    worker = fleet.start()

    if isinstance(outcome, str):
        assert fetch(worker, named(name)).file == f"{outcome}.safetensors"
    else:
        with pytest.raises(outcome):
            fetch(worker, named(name))


def test_a_name_that_is_almost_known_gets_a_hint(fleet: Fleet) -> None:
    fleet.put("watercolor.safetensors", 1)

    with pytest.raises(ModelNotFound) as raised:
        fetch(fleet.start(), named("watercolour"))

    assert raised.value.hint == "did you mean watercolor?"


def test_a_file_under_a_catalog_name_is_used_if_its_bytes_are_the_catalogs(fleet: Fleet) -> None:
    served = fleet.serve(DETAIL, trained_words=["x"])
    fleet.loras.mkdir(parents=True)
    shutil.copy(served, fleet.loras / "detail_tweaker_xl.safetensors")
    worker = fleet.start()

    model = fetch(worker, named("detail_tweaker_xl"))
    before = len(fleet.asked())
    again = fetch(fleet.start(), lora(DETAIL))

    assert (model.version_id, model.downloaded, model.trained_words) == (DETAIL, False, ("x",))
    assert fleet.civitai.links_given == 0
    assert again.version_id == DETAIL
    assert len(fleet.asked()) == before  # it was verified once, and not again


def test_a_different_file_under_a_catalog_name_is_renamed(fleet: Fleet) -> None:
    served = fleet.serve(DETAIL)
    other_file = fleet.put("detail_tweaker_xl.safetensors", 666)
    sha256 = sha256_of(other_file)

    model = fetch(fleet.start(), named("detail_tweaker_xl"))

    assert model.sha256 == sha256_of(served)
    new_name = f"detail_tweaker_xl_{sha256[:16]}.safetensors"
    assert fleet.models_there() == ["detail_tweaker_xl.safetensors", new_name]
    assert sha256_of(fleet.loras / new_name) == sha256  # nothing is lost


def test_a_file_of_other_bytes_that_another_worker_uses_stays(fleet: Fleet) -> None:
    other_file = fleet.put("detail_tweaker_xl.safetensors", 666, size_bytes=MB)
    one, other = fleet.start(), fleet.start()
    fleet.civitai.fail(NO_MODEL, times=None, on="/api/v1/")  # so that it is used, with a warning

    with one.hold([lora(DETAIL)], JobContext(soon())) as held:
        warned = held.models[lora(DETAIL)].warnings
        fleet.civitai.heal()
        fleet.serve(DETAIL, size=MB)
        with pytest.raises(DownloadFailed, match="another worker uses"):
            fetch(other, lora(DETAIL))

    assert "could not be verified" in warned[0]
    assert fleet.models_there() == [other_file.name]
    assert fleet.debris() == []


def test_a_file_that_is_no_model_never_stands_in_for_one(fleet: Fleet) -> None:
    served = fleet.serve(DETAIL)
    fleet.loras.mkdir(parents=True)
    (fleet.loras / "detail_tweaker_xl.safetensors").write_bytes(b"\x80\x04pickle" * 100)
    worker = fleet.start()

    model = fetch(worker, lora(DETAIL))

    assert model.sha256 == sha256_of(served)
    (fleet.loras / "bad.safetensors").write_text("<html>")
    with pytest.raises(ModelRejected):
        fetch(worker, named("bad"))


@pytest.mark.parametrize("right", [True, False], ids=["right", "other"])
def test_the_hash_that_a_job_gives_verifies_a_file_if_civitai_cannot_be_asked(fleet: Fleet, right: bool) -> None:
    path = fleet.put("mine_77.safetensors", 1)
    fleet.civitai.fail(NO_MODEL, times=None, on="/api/v1/")
    worker = fleet.start()
    ref = lora(77, sha256=sha256_of(path) if right else "0" * 64)

    if right:
        assert fetch(worker, ref).warnings == ()
    else:
        with pytest.raises(ModelNotFound):
            fetch(worker, ref)


def test_a_file_that_claims_to_be_another_file_of_a_version_is_passed_over(fleet: Fleet) -> None:
    fleet.serve(77, file_id=1)
    second = fleet.serve(77, sdxl_lora(fleet.folder / "second.safetensors", 5), file_id=2, sha256="")
    fleet.put("mine_77.safetensors", 6)

    model = fetch(fleet.start(), lora(77, file_id=2))

    assert model.sha256 == sha256_of(second)
    assert model.file == "Model-77_77_2.safetensors"


def test_a_lost_sidecar_is_found_again_from_civitai_without_fetching(fleet: Fleet) -> None:
    fleet.serve(77)
    before = fetch(fleet.start(), lora(77))
    (fleet.loras / f"{before.file}.json").unlink()

    after = fetch(fleet.start(), lora(77))

    assert replace(after, downloaded=True, path=before.path) == before
    assert fleet.civitai.links_given == 1


# -- what is no regular file, and names of any length


@pytest.fixture(params=["fifo", "device", "folder"])
def oddity(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    """Makes something that is no regular file. To read a FIFO takes until somebody writes; a device never ends."""

    def make(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if request.param == "fifo":
            os.mkfifo(path)
        elif request.param == "folder":
            path.mkdir()
        elif os.geteuid() == 0:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
        else:
            pytest.skip("to make a device takes root")

    return make


def test_what_is_no_regular_file_is_no_model(fleet: Fleet, oddity: Callable[[Path], None]) -> None:
    served = fleet.serve(DETAIL)
    for name in ("by hand.safetensors", "detail_tweaker_xl.safetensors", "x_77.safetensors"):
        oddity(fleet.loras / name)
    fleet.serve(77)
    worker = fleet.start()

    with pytest.raises(ModelRejected, match="not a regular file"):
        fetch(worker, named("by hand"))
    model, other = fetch(worker, named("detail_tweaker_xl")), fetch(worker, lora(77))

    assert model.sha256 == sha256_of(served)
    assert other.file == "Model-77_77.safetensors"
    assert (fleet.loras / "detail_tweaker_xl.safetensors.not-a-model").exists()
    assert [result.ok for result in care.verify(worker, soon(), repair=True)] == [True, True]
    assert (fleet.loras / "by hand.safetensors").exists()


def test_what_is_no_regular_file_is_no_checkpoint_and_no_vae(fleet: Fleet, oddity: Callable[[Path], None]) -> None:
    served = fleet.serve_checkpoint()
    oddity(fleet.models / "checkpoints/jib_mix.safetensors")
    oddity(fleet.models / "vae/odd.safetensors")

    model = fleet.start().prepare_checkpoint(JobContext(soon()))

    assert model.sha256 == sha256_of(served)
    assert list((fleet.folder / "container1/webui/VAE").iterdir()) == []


def test_what_is_no_regular_file_is_no_sidecar(fleet: Fleet, oddity: Callable[[Path], None]) -> None:
    path = fleet.put("by hand.safetensors", 1)
    sha256 = sha256_of(path)
    for suffix in (".json", ".uses"):
        oddity(Path(f"{path}{suffix}"))
    (fleet.loras / ".leases").mkdir()
    oddity(fleet.loras / ".leases/v77")
    fleet.serve(77)
    worker = fleet.start(timings=timings(stale_after=0.3))

    model = fetch(worker, named("by hand"))
    worker.cache.list_entries()
    removed = care.remove(worker.cache, "by hand")

    assert model.sha256 == sha256
    assert [entry.path for entry in removed] == [path]


def test_a_sidecar_of_gigabytes_is_not_read(fleet: Fleet) -> None:
    path = fleet.put("by hand.safetensors", 1)
    sidecar = Path(f"{path}.json")
    with sidecar.open("wb") as file:
        file.truncate(3 * 1000 * MB)

    model = fetch(fleet.start(), named("by hand"))

    assert model.sha256 == sha256_of(path)
    assert sidecar.stat().st_size < 10_000  # it was written anew


@pytest.mark.parametrize("length", [229, 230, 231, 250, 255])
@pytest.mark.parametrize("letter", ["x", "é"])
def test_a_name_of_any_length_is_a_name(fleet: Fleet, length: int, letter: str) -> None:
    room = length - len(".safetensors")
    stem = letter * (room // len(letter.encode()))
    path = fleet.put(f"{stem}.safetensors", 1)
    one, other = fleet.start(), fleet.start()

    with one.hold([named(stem)], JobContext(soon())) as held:
        (model,) = held.models.values()
        link = fleet.folder / "container1/webui/Lora" / model.shown_file
        linked = link.read_bytes() == path.read_bytes()
        (entry,) = other.cache.list_entries()
        was_evicted = other.cache.evict(entry, "a test")
    again = other.cache.find(named(stem))
    removed = care.remove(other.cache, stem)

    assert model.sha256 == held.models[named(stem)].sha256
    assert linked
    assert (entry.keep, was_evicted) == ("in use", False)
    assert again is not None  # its sidecar could be written
    assert [entry.path for entry in removed] == [path]
    assert fleet.debris() == []


# -- folders that cannot be written, and sources


def test_a_cache_that_cannot_be_written_is_used_for_what_it_has(fleet: Fleet) -> None:
    fleet.serve(1)
    fleet.serve(2)
    fetch(fleet.start(), lora(1))
    with read_only(fleet.models):
        worker = fleet.start()

        with worker.hold([lora(1), lora(2)], JobContext(soon())) as held:
            there, fetched = held.models[lora(1)], held.models[lora(2)]
            link = fleet.folder / "container2/webui/Lora" / fetched.shown_file
            linked = link.read_bytes() == fetched.path.read_bytes()
        again = fetch(worker, lora(2))

    assert (there.downloaded, there.warnings) == (False, ())
    assert fetched.downloaded
    assert fetched.path.is_relative_to(fleet.folder / "container2/local")
    assert "cannot be written" in fetched.warnings[0]
    assert linked
    assert not again.downloaded
    assert again.warnings == fetched.warnings
    assert fleet.civitai.resolves == {1: 1, 2: 1}


def test_without_a_writable_folder_a_missing_model_is_volume_failed(fleet: Fleet) -> None:
    fleet.serve(1)
    (fleet.folder / "file").touch()
    (fleet.folder / "container1").mkdir()
    (fleet.folder / "container1/local").touch()
    worker = fleet.start(models_dir=fleet.folder / "file/models")

    with pytest.raises(VolumeFailed):
        fetch(worker, lora(1))


@pytest.mark.parametrize("layout", ["loras", "Lora", "."])
def test_a_source_that_has_the_file_is_used_before_anything_is_fetched(fleet: Fleet, layout: str) -> None:
    served = fleet.serve(DETAIL)
    source = fleet.folder / "source"
    (source / layout).mkdir(parents=True, exist_ok=True)
    path = source / layout / "detail_tweaker_xl.safetensors"
    shutil.copy(served, path)
    with read_only(source):
        worker = fleet.start(sources=[source])

        model = fetch(worker, lora(DETAIL))
        before = len(fleet.asked())
        again = fetch(worker, lora(DETAIL))

    assert (model.path, model.downloaded, model.version_id) == (path, False, DETAIL)
    assert fleet.civitai.links_given == 0
    assert (again.path, len(fleet.asked())) == (path, before)
    assert fleet.models_there() == []


def test_a_file_of_a_source_with_other_bytes_is_passed_over(fleet: Fleet) -> None:
    served = fleet.serve(DETAIL)
    source = fleet.folder / "source"
    for name in ("detail_tweaker_xl.safetensors", "other_135867.safetensors"):
        sdxl_lora(source / name, 5)

    model = fetch(fleet.start(sources=[source]), lora(DETAIL))

    assert model.sha256 == sha256_of(served)
    assert model.downloaded
    assert len(list(source.iterdir())) == 2


def test_a_checkpoint_in_the_image_is_used_without_asking(fleet: Fleet) -> None:
    path = sdxl_checkpoint(fleet.folder / "source/checkpoints/jib_mix.safetensors", 3)

    model = fleet.start(sources=[fleet.folder / "source"]).prepare_checkpoint(JobContext(soon()))

    assert model.path == path
    assert fleet.asked() == []


def test_vaes_of_the_cache_and_of_sources_are_found_by_their_names(fleet: Fleet) -> None:
    vae(fleet.models / "vae/fine.safetensors", 1)
    vae(fleet.models / "vaes/own.safetensors", 2)
    vae(fleet.folder / "source/VAE/baked.safetensors", 3)
    (fleet.models / "vae/bad.safetensors").write_text("<html>")
    worker = fleet.start(sources=[fleet.folder / "source"])

    models = [fetch(worker, ModelRef(ModelKind.VAE, name=name)) for name in ("fine", "own.safetensors", "BAKED")]

    shown = sorted(path.name for path in (fleet.folder / "container1/webui/VAE").iterdir())
    assert shown == sorted(model.shown_file for model in models)
    assert all(re.fullmatch(r"~(fine|own|baked)_[0-9a-f]{8}\.safetensors", name) for name in shown)
    assert fetch(worker, ModelRef(ModelKind.VAE, name=models[0].shown)).path == models[0].path
    with pytest.raises(ModelRejected):
        fetch(worker, ModelRef(ModelKind.VAE, name="bad"))


def test_a_model_that_is_gone_between_find_and_hold_is_not_held(fleet: Fleet) -> None:
    fleet.serve(77)
    worker = fleet.start()
    fetch(worker, lora(77))
    found = worker.cache.find(lora(77), fresh=True)
    assert found is not None

    (fleet.loras / found.record.file).unlink()
    held = worker.cache.hold(found, soon())

    assert held is None
    assert list((fleet.loras / ".holds").iterdir()) == []

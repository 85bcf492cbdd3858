"""A worker's models, held for jobs: real managers, the sandbox's CivitAI, real folders."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace

import pytest

from a1111_worker.context import JobContext
from a1111_worker.domain import ModelKind, ModelRef, Progress
from a1111_worker.errors import ModelNotFound, ModelRejected
from a1111_worker.models import care
from a1111_worker.models.manager import ModelManager
from sandbox.civitai import NOT_FOUND
from sandbox.models import sd15_lora, sdxl_checkpoint, sdxl_lora, sha256_of, tensor_hash
from tests.fleet import CHECKPOINT, SPEC, Fleet, fetch, lora, named, soon, timings
from tests.support import wait_until

MB = 1_000_000


# -- a job's models


def test_a_lora_is_fetched_verified_and_shown_to_the_webui(fleet: Fleet) -> None:
    served = fleet.serve(77, name="Snow & Ice", base_model="SDXL 1.0", trained_words=["snow"])
    worker = fleet.start()

    with worker.hold([lora(77)], JobContext(soon())) as held:
        model = held.models[lora(77)]

        assert (fleet.folder / "container1/webui/Lora" / model.shown_file).read_bytes() == served.read_bytes()
    assert model.file == "Snow_Ice_77.safetensors"
    assert (model.name, model.base_model, model.family) == ("Snow & Ice", "SDXL 1.0", "sdxl")
    assert (model.sha256, model.size) == (sha256_of(served), served.stat().st_size)
    assert model.lora_hash == tensor_hash(served)[:12]
    assert model.trained_words == ("snow",)
    assert model.downloaded
    assert fleet.debris() == []


def test_a_model_in_the_cache_costs_no_request(fleet: Fleet) -> None:
    fleet.serve(77)
    fetch(fleet.start(), lora(77))
    before = len(fleet.asked())

    again = fetch(fleet.start(), lora(77))

    assert not again.downloaded
    assert len(fleet.asked()) == before


def test_a_model_in_the_cache_is_refused_if_the_job_names_another_hash(fleet: Fleet) -> None:
    fleet.serve(77)
    worker = fleet.start()
    fetch(worker, lora(77))

    with pytest.raises(ModelRejected, match=r"0{12}.* was asked for"):
        fetch(worker, lora(77, sha256="0" * 64))


def test_the_files_of_a_job_are_fetched_at_once_and_returned_in_the_order_of_its_references(fleet: Fleet) -> None:
    refs = [lora(number) for number in (5, 3, 9, 1)]
    for ref in refs:
        fleet.serve(ref.version_id or 0, size=MB)
    fleet.civitai.storage.rate = 2 * MB
    worker = fleet.start()

    with worker.hold([*refs, refs[0]], JobContext(soon())) as held:
        order = list(held.models)

    assert order == refs
    assert fleet.civitai.storage.peak_connections >= 2


def test_the_first_failure_ends_the_others_and_nothing_is_held(fleet: Fleet) -> None:
    fleet.serve(1, size=5 * MB)
    fleet.civitai.storage.rate = 500_000
    worker = fleet.start()

    with pytest.raises(ModelNotFound), worker.hold([lora(1), lora(404)], JobContext(soon())):
        pass

    assert fleet.models_there() == []
    assert list((fleet.loras / ".holds").iterdir()) == []


def test_failures_are_returned_if_they_are_tolerated(fleet: Fleet) -> None:
    fleet.serve(1)
    worker = fleet.start()

    with worker.hold([lora(404), lora(1), named("nobody")], JobContext(soon()), tolerate=True) as held:
        there, failures = list(held.models), held.failures

    assert there == [lora(1)]
    assert {ref: type(error) for ref, error in failures.items()} == {
        lora(404): ModelNotFound,
        named("nobody"): ModelNotFound,
    }


def test_the_progress_of_all_files_is_reported_as_one(fleet: Fleet) -> None:
    for number in (1, 2):
        fleet.serve(number, size=2 * MB)
    fleet.civitai.storage.rate = 4 * MB
    seen: list[Progress] = []

    with fleet.start().hold([lora(1), lora(2)], JobContext(soon(), seen.append)):
        pass

    assert seen[-1].percent == 100.0
    assert seen[-1].facts["total"] == 4 * MB
    assert any(0 < (progress.percent or 0) < 100 and (progress.eta_s or 0) > 0 for progress in seen)
    assert {progress.stage.value for progress in seen} == {"models"}


# -- models that are gone while they are held


def evict(worker: ModelManager) -> list[bool]:
    return [worker.cache.evict(entry, "a test") for entry in worker.cache.list_entries()]


@pytest.mark.parametrize("name", ["Snow", "Rain"])
def test_a_model_that_was_evicted_while_its_worker_was_paused_is_held_again(fleet: Fleet, name: str) -> None:
    fleet.serve(77, name="Snow")
    fleet.serve(78)
    paused, other = fleet.start(timings=timings(heartbeat=3600)), fleet.start(timings=timings(stale_after=0.1))

    with paused.hold([lora(77), lora(78)], JobContext(soon())) as held:
        wait_until(lambda: not evict(other), "the eviction of both")
        fetch(other, lora(77, name=name))  # one of them came back, perhaps under another name
        again = paused.hold_again(held, JobContext(soon()))
        files = [model.file for model in again.models.values()]
        links = [path.name for path in (fleet.folder / "container1/webui/Lora").iterdir() if path.exists()]
        answers = evict(fleet.start())

    assert files == [f"{name}_77.safetensors", "Model-78_78.safetensors"]
    assert fleet.civitai.resolves == {77: 2, 78: 2}
    assert sorted(links) == sorted(model.shown_file for model in again.models.values())
    assert answers == [False, False]
    assert list((fleet.loras / ".holds").iterdir()) == []  # what was held again is released too
    assert fleet.models_there() == sorted(files)


def test_what_is_still_there_is_held_again_without_a_request(fleet: Fleet) -> None:
    fleet.serve(77)
    paused, other = fleet.start(timings=timings(heartbeat=3600)), fleet.start()

    with paused.hold([lora(77)], JobContext(soon())) as held:
        for hold in (fleet.loras / ".holds").iterdir():  # as a worker does that thinks this one dead
            hold.unlink()
        asked = len(fleet.asked())
        again = paused.hold_again(held, JobContext(soon()))
        answers = evict(other)

    assert again == held
    assert answers == [False]
    assert len(fleet.asked()) == asked


def test_a_model_that_cannot_be_fetched_again_fails_its_job_unless_that_is_tolerated(fleet: Fleet) -> None:
    worker = fleet.start()
    for tolerate in (False, True):
        fleet.serve(77)
        with worker.hold([lora(77)], JobContext(soon()), tolerate=tolerate) as held:
            held.models[lora(77)].path.unlink()
            fleet.civitai.fail(NOT_FOUND, times=None, on="/77")

            if tolerate:
                again = worker.hold_again(held, JobContext(soon()))
                assert (list(again.models), list(again.failures)) == ([], [lora(77)])
            else:
                with pytest.raises(ModelNotFound):
                    worker.hold_again(held, JobContext(soon()))
        fleet.civitai.heal()


# -- the checkpoint


def test_the_checkpoint_is_fetched_once_and_kept_under_its_name(fleet: Fleet) -> None:
    served = fleet.serve_checkpoint()
    worker = fleet.start()

    first = worker.prepare_checkpoint(JobContext(soon()))
    second = worker.prepare_checkpoint(JobContext(soon()))

    assert (first.file, first.name, first.sha256) == ("jib_mix.safetensors", "Jib Mix v2", sha256_of(served))
    assert (fleet.folder / "container1/webui/Stable-diffusion/jib_mix.safetensors").read_bytes() == served.read_bytes()
    assert second is first
    assert fleet.civitai.links_given == 1


def test_a_checkpoint_on_disk_is_used_without_asking_anybody_and_read_once(fleet: Fleet) -> None:
    path = sdxl_checkpoint(fleet.models / "checkpoints/jib_mix.safetensors", 5)

    first = fleet.start().prepare_checkpoint(JobContext(soon()))
    sidecar = (fleet.models / "checkpoints/jib_mix.safetensors.json").read_bytes()
    second = fleet.start().prepare_checkpoint(JobContext(soon()))

    assert first.sha256 == second.sha256 == sha256_of(path)
    assert json.loads(sidecar)["sha256"] == first.sha256
    assert fleet.asked() == []


@pytest.mark.parametrize(
    ("known", "fetched"),
    [("its own", False), ("another", True)],
)
def test_a_checkpoint_on_disk_is_compared_if_its_hash_is_known(fleet: Fleet, known: str, fetched: bool) -> None:
    there = sdxl_checkpoint(fleet.models / "checkpoints/jib_mix.safetensors", 5)
    served = fleet.serve_checkpoint()
    sha256 = sha256_of(there if known == "its own" else served)

    model = fleet.start(checkpoint=replace(SPEC, sha256=sha256)).prepare_checkpoint(JobContext(soon()))

    assert model.downloaded is fetched
    assert model.sha256 == sha256


def test_a_checkpoint_of_another_hash_than_configured_is_refused(fleet: Fleet) -> None:
    fleet.serve_checkpoint()
    spec = replace(SPEC, sha256="ab" * 32, ref=replace(SPEC.ref, sha256="ab" * 32))

    with pytest.raises(ModelRejected):
        fleet.start(checkpoint=spec).prepare_checkpoint(JobContext(soon()))

    assert fleet.debris() == []


def test_a_checkpoint_that_was_removed_under_a_worker_is_fetched_again(fleet: Fleet) -> None:
    fleet.serve_checkpoint()
    worker = fleet.start()
    worker.prepare_checkpoint(JobContext(soon())).path.unlink()

    again = worker.prepare_checkpoint(JobContext(soon()))

    assert again.path.exists()
    assert fleet.civitai.resolves[CHECKPOINT] == 2


def test_the_fixed_checkpoint_is_its_version_too(fleet: Fleet) -> None:
    fleet.serve_checkpoint()
    worker = fleet.start()
    fixed = worker.prepare_checkpoint(JobContext(soon()))

    model = fetch(worker, ModelRef(ModelKind.CHECKPOINT, version_id=CHECKPOINT))

    assert model.file == fixed.file
    assert fleet.civitai.resolves[CHECKPOINT] == 1


def findings(worker: ModelManager) -> list[tuple[str, bool]]:
    return [(result.finding.split(":")[0], result.ok) for result in care.verify(worker, soon(), repair=True)]


def test_a_damaged_checkpoint_is_fetched_again_though_it_was_put_there_by_hand(fleet: Fleet) -> None:
    served = fleet.serve_checkpoint()
    path = fleet.models / "checkpoints/jib_mix.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(served.read_bytes()[:MB])

    found = findings(fleet.start())

    assert found == [("damaged", True)]
    assert sha256_of(path) == sha256_of(served)


def test_another_checkpoint_than_the_configured_one_is_renamed(fleet: Fleet) -> None:
    served = fleet.serve_checkpoint()
    path = sdxl_checkpoint(fleet.models / "checkpoints/jib_mix.safetensors", 5)
    other = sha256_of(path)

    found = findings(fleet.start(checkpoint=replace(SPEC, sha256=sha256_of(served))))

    assert found == [("another model", True)]
    assert {sha256_of(file) for file in path.parent.glob("*.safetensors")} == {sha256_of(served), other}
    assert sha256_of(path) == sha256_of(served)


@pytest.mark.parametrize("harm", ["cut short", "other bytes"])
def test_a_damaged_file_from_a_url_is_fetched_again(fleet: Fleet, harm: str) -> None:
    served = sdxl_lora(fleet.folder / "served/own.safetensors", 8)
    worker = fleet.start(checkpoint=None)
    model = fetch(worker, ModelRef(ModelKind.LORA, url=fleet.civitai.storage.publish(served), name="My own"))
    with model.path.open("r+b") as file:
        if harm == "cut short":
            file.truncate(1000)
        else:
            file.seek(-5, os.SEEK_END)
            file.write(b"xxxxx")

    found = findings(worker)

    assert found == [("damaged", True)]
    assert sha256_of(model.path) == sha256_of(served)


def test_a_lora_of_another_family_is_refused_and_an_unknown_one_comes_with_a_warning(fleet: Fleet) -> None:
    fleet.serve_checkpoint()
    fleet.serve(15, sd15_lora(fleet.folder / "sd15.safetensors", 1), base_model="SD 1.5")
    fleet.serve(16, base_model="Pony")
    odd = fleet.folder / "odd.safetensors"
    odd.write_bytes(
        (header := b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}').__len__().to_bytes(8, "little")
        + header
        + b"1"
    )
    fleet.serve(17, odd, base_model="Other")
    worker = fleet.start()
    worker.prepare_checkpoint(JobContext(soon()))

    with worker.hold([lora(15), lora(16), lora(17)], JobContext(soon()), tolerate=True) as held:
        models, failures = held.models, held.failures

    assert isinstance(failures[lora(15)], ModelRejected)
    assert "SD 1.5" in failures[lora(15)].message
    assert models[lora(16)].warnings == ()
    assert "fits the checkpoint" in models[lora(17)].warnings[0]


# -- housekeeping


def test_slow_housekeeping_delays_no_sign_of_life(fleet: Fleet) -> None:
    fleet.serve(77)
    worker = fleet.start(timings=timings(stale_after=0.2))
    hangs, may_go_on = threading.Event(), threading.Event()

    def hang() -> None:
        hangs.set()
        may_go_on.wait(30)

    worker._housekeeping.add_listener(hang)
    with worker.hold([lora(77)], JobContext(soon())):
        (hold,) = (fleet.loras / ".holds").iterdir()
        assert hangs.wait(10)

        os.utime(hold, (1, 1))

        wait_until(lambda: hold.stat().st_mtime != 1, "a touch")
        may_go_on.set()


def test_old_partial_files_are_removed_again_and_again(fleet: Fleet) -> None:
    fleet.start(timings=timings(sweep=0.05))
    partial_file = fleet.loras / ".parts/v9.dead.part"
    for _ in range(2):
        partial_file.touch()
        os.utime(partial_file, (partial_file.stat().st_mtime - 2 * 24 * 3600,) * 2)

        wait_until(lambda: not partial_file.exists(), "the sweep")

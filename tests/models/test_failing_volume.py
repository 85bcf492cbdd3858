"""Volumes that fail: whole managers on a real file system (FUSE) whose calls fail on request."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import model_manager
from a1111_worker.config import Config
from a1111_worker.context import JobContext
from a1111_worker.domain import ModelRef
from a1111_worker.errors import DownloadFailed, ModelError, VolumeFailed
from a1111_worker.models import care
from a1111_worker.models.manager import ModelManager
from sandbox.models import sdxl_lora, sha256_of
from tests.fleet import Fleet, fetch, lora, soon, timings
from tests.fuse import FaultyVolume, faulty_volume

MB = 1_000_000
PARTS = "loras/.parts/*.part"


@pytest.fixture
def volume(fleet: Fleet) -> Iterator[FaultyVolume]:
    with faulty_volume(fleet.models) as volume:
        yield volume


def serve(fleet: Fleet, *numbers: int, size: int = MB) -> list[ModelRef]:
    for number in numbers:
        fleet.serve(number, size=size)
    return [lora(number) for number in numbers]


def outcome(worker: ModelManager, *refs: ModelRef) -> str:
    """The code that a job ends with, or the file that it was given."""
    try:
        return fetch(worker, *refs).file
    except ModelError as caught:
        error = caught
    assert error.retryable and not error.refresh_worker
    assert "/" not in error.message
    return error.code


# -- broken: nothing is evicted, nothing is deleted, and the job may be tried again


@pytest.mark.parametrize(
    ("call", "number", "on"),
    [
        ("create", errno.EACCES, PARTS),
        ("create", errno.EROFS, PARTS),
        ("write", errno.EIO, PARTS),
        ("write", errno.ESTALE, PARTS),
        ("write", errno.EROFS, PARTS),
        ("truncate", errno.EIO, PARTS),
        ("stat", errno.EIO, PARTS),
        ("fsync", errno.EIO, PARTS),
        ("close", errno.EIO, PARTS),
        ("read", errno.EIO, PARTS),
        ("rename", errno.EIO, PARTS),
        ("statvfs", errno.EIO, "*"),
        ("statvfs", errno.ESTALE, "*"),
        ("listdir", errno.EIO, "loras"),
        ("listdir", errno.ESTALE, "loras/.holds"),
        ("listdir", errno.EIO, "loras/.parts"),
        ("stat", errno.ENOTCONN, "loras/Model-3*"),
    ],
)
def test_a_broken_volume_fails_the_job_and_harms_no_model(
    fleet: Fleet, volume: FaultyVolume, call: str, number: int, on: str
) -> None:
    old, older, new = serve(fleet, 1, 2, 3)
    worker = fleet.start(checkpoint=None, limit=int(2.5 * MB))  # so that one has to be evicted for the new one
    for ref in (older, old):
        fetch(worker, ref)

    volume.fail(call, number, on=on)
    failed = outcome(worker, new)
    there = fleet.backing_models()
    volume.heal()
    done = outcome(worker, new)

    assert failed == "VOLUME_FAILED"
    assert "Model-1_1.safetensors" in there  # the older one had to go, or not even that one
    assert done == "Model-3_3.safetensors"
    assert sha256_of(fleet.loras / done) == sha256_of(fleet.folder / "served/3.safetensors")


def test_a_volume_that_cannot_be_written_makes_nothing_go(fleet: Fleet, volume: FaultyVolume) -> None:
    refs = serve(fleet, 1, 2, 3, size=4 * MB)
    worker = fleet.start(checkpoint=None)
    for ref in refs[:2]:
        fetch(worker, ref)

    volume.fail("write", errno.EIO, on=PARTS, skip=12)  # of 128 KiB each
    failed = outcome(worker, refs[2])
    left = [path.name.split(".")[0] for path in (fleet.loras / ".parts").glob("*.part")]
    volume.heal()
    sent = fleet.civitai.storage.bytes_sent
    fetch(worker, refs[2])

    assert failed == "VOLUME_FAILED"
    assert left == ["v3"]
    assert len(fleet.models_there()) == 3
    assert fleet.civitai.storage.bytes_sent - sent < 4 * MB  # it went on with what was there
    assert fleet.debris() == []


def test_a_volume_that_is_gone_altogether_fails_the_job(fleet: Fleet, volume: FaultyVolume) -> None:
    (ref,) = serve(fleet, 1)
    worker = fleet.start(checkpoint=None)
    fetch(worker, ref)

    volume.die()

    assert outcome(worker, ref) == "VOLUME_FAILED"


@pytest.mark.parametrize("call", ["stat", "open", "read"])
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_model_that_could_not_be_read_is_not_repaired(
    fleet: Fleet, volume: FaultyVolume, call: str, number: int
) -> None:
    path = fleet.put("by hand.safetensors", 1)
    served = fleet.serve(2)
    worker = fleet.start(checkpoint=None)
    fetch(worker, lora(2))
    before = [(result.entry.file, result.ok) for result in care.verify(worker, soon())]

    volume.fail(call, number, on="loras/*.safetensors")
    during = list(care.verify(worker, soon(), repair=True))
    volume.heal()
    after = [(result.entry.file, result.ok) for result in care.verify(worker, soon())]

    assert sorted(before) == sorted(after) == [("Model-2_2.safetensors", True), ("by hand.safetensors", True)]
    assert [result.ok for result in during] == [False, False]
    assert all("failed" in result.finding for result in during)
    assert path.exists()
    assert fleet.civitai.links_given == 1
    assert sha256_of(fleet.loras / "Model-2_2.safetensors") == sha256_of(served)


def test_a_model_that_is_gone_is_fetched_again(fleet: Fleet, volume: FaultyVolume) -> None:
    (ref,) = serve(fleet, 1)
    worker = fleet.start(checkpoint=None)
    model = fetch(worker, ref)

    volume.fail("stat", errno.ENOENT, on=f"loras/{model.file}", times=3)
    again = fetch(worker, ref)

    assert again.sha256 == model.sha256


# -- leases that cannot be made


def test_workers_without_leases_leave_each_others_partial_files_alone(fleet: Fleet, volume: FaultyVolume) -> None:
    (ref,) = serve(fleet, 1, size=3 * MB)
    fleet.civitai.storage.rate = 3 * MB
    workers = [fleet.start(checkpoint=None, timings=timings(stale_after=0.2)) for _ in range(2)]
    volume.fail("create", errno.EACCES, on="loras/.leases/*")

    with ThreadPoolExecutor(2) as threads:
        models = list(threads.map(lambda worker: fetch(worker, ref), workers))

    fleet.civitai.storage.wait_until_idle()
    assert fleet.civitai.storage.bytes_sent <= 2 * 3 * MB
    assert len({model.sha256 for model in models}) == 1
    assert fleet.debris() == []


def test_a_worker_with_a_lease_leaves_the_file_of_one_without_alone(fleet: Fleet, volume: FaultyVolume) -> None:
    (ref,) = serve(fleet, 1, size=3 * MB)
    fleet.civitai.storage.rate = 3 * MB
    one, other = (fleet.start(checkpoint=None, timings=timings(stale_after=0.2)) for _ in range(2))
    begun = threading.Event()
    volume.fail("create", errno.EACCES, on="loras/.leases/*", times=1)

    def hold() -> bool:
        with one.hold([ref], JobContext(soon(), lambda progress: begun.set())) as held:
            return held.models[ref].downloaded

    with ThreadPoolExecutor(1) as threads:
        without_lease = threads.submit(hold)
        assert begun.wait(10)
        fetch(other, ref)
        without_lease.result()

    fleet.civitai.storage.wait_until_idle()
    assert fleet.civitai.storage.bytes_sent <= 2 * 3 * MB
    assert fleet.debris() == []


# -- full: room is made, and the bytes that are there count


def test_after_a_quota_that_does_not_show_what_is_missing_is_evicted(fleet: Fleet, volume: FaultyVolume) -> None:
    # As on MooseFS: a file of which a byte was written counts its whole length in st_blocks.
    volume.behave(has_apparent_blocks=True)
    refs = serve(fleet, 1, 2, 3, size=70 * MB)
    (new,) = serve(fleet, 4, size=180 * MB)
    worker = fleet.start(checkpoint=None)
    for ref in refs:
        fetch(worker, ref)
    volume.behave(quota=230 * MB)  # the new one needs the room of all three, and more than 64 MiB of it at once

    model = fetch(worker, new)

    assert model.downloaded
    assert fleet.models_there() == ["Model-4_4.safetensors"]


@pytest.mark.parametrize("has_apparent_blocks", [True, False])
def test_a_partial_file_that_is_gone_on_with_has_its_room_planned(
    fleet: Fleet, volume: FaultyVolume, has_apparent_blocks: bool
) -> None:
    volume.behave(has_apparent_blocks=has_apparent_blocks)
    old, new = serve(fleet, 1, 2, size=4 * MB)
    worker = fleet.start(checkpoint=None)
    volume.fail("write", errno.EIO, on=PARTS, skip=12)
    assert outcome(worker, new) == "VOLUME_FAILED"
    volume.heal()
    (left,) = (fleet.loras / ".parts").glob("*.part")
    fetch(worker, old)
    sent = fleet.civitai.storage.bytes_sent
    volume.behave(free=68 * MB)  # 64 MiB must stay free: that is not enough for what is missing

    fetch(worker, new)

    assert left.name.startswith("v2.")
    assert fleet.civitai.storage.bytes_sent - sent < 4 * MB
    assert fleet.models_there() == ["Model-2_2.safetensors"]


@pytest.mark.parametrize("call", ["fsync", "close"])
@pytest.mark.parametrize("is_lost", [False, True], ids=["kept", "lost"])
@pytest.mark.parametrize("sha256", ["known", "unknown"])
def test_a_volume_that_is_full_only_at_the_end_gets_its_room(
    fleet: Fleet, volume: FaultyVolume, call: str, is_lost: bool, sha256: str
) -> None:
    (old,) = serve(fleet, 1)
    served = fleet.serve(2, size=MB, sha256=None if sha256 == "known" else "")
    worker = fleet.start(checkpoint=None)
    fetch(worker, old)
    volume.fail(call, errno.EDQUOT, on=PARTS, times=1, is_lost=is_lost)

    model = fetch(worker, lora(2))

    assert sha256_of(model.path) == sha256_of(served)
    assert fleet.models_there() == ["Model-2_2.safetensors"]
    assert fleet.debris() == []


@pytest.mark.parametrize("call", ["fsync", "close"])
def test_if_nothing_more_can_go_the_bytes_are_kept(fleet: Fleet, volume: FaultyVolume, call: str) -> None:
    (ref,) = serve(fleet, 1)
    worker = fleet.start(checkpoint=None)
    volume.fail(call, errno.EDQUOT, on=PARTS)

    full = outcome(worker, ref)
    volume.heal()
    sent = fleet.civitai.storage.bytes_sent
    fetch(worker, ref)

    assert full == "VOLUME_FULL"
    assert fleet.civitai.storage.bytes_sent == sent
    assert fleet.debris() == []


def test_a_file_of_unknown_hash_is_not_believed_after_the_volume_failed(fleet: Fleet, volume: FaultyVolume) -> None:
    served = fleet.serve(1, size=MB, sha256="")
    worker = fleet.start(checkpoint=None)
    volume.fail("fsync", errno.EIO, on=PARTS, times=1, is_lost=True)

    failed = outcome(worker, lora(1))
    model = fetch(worker, lora(1))

    assert failed == "VOLUME_FAILED"
    assert sha256_of(model.path) == sha256_of(served)


# -- so full that not even an empty file can be made


@pytest.fixture
def full(fleet: Fleet, volume: FaultyVolume) -> FaultyVolume:
    """A volume with two models, one of them in use by another worker. It takes no new file until something goes."""
    used, free = serve(fleet, 1, 2)
    holder = fleet.start(checkpoint=None)
    fetch(holder, free)
    context = holder.hold([used], JobContext(soon()))
    context.__enter__()
    fleet.on_exit(lambda: context.__exit__(None, None, None))
    volume.behave(quota=sum(path.lstat().st_blocks * 512 for path in volume.backing.rglob("*") if path.is_file()))
    volume.behave(takes_no_files_when_full=True)
    return volume


def test_models_can_be_removed_by_hand_from_a_volume_that_takes_no_new_file(fleet: Fleet, full: FaultyVolume) -> None:
    worker = fleet.start(checkpoint=None)

    removed = care.remove(worker.cache, "Model-2_2")
    with pytest.raises(ModelError, match="in use"):
        care.remove(worker.cache, "Model-1_1")

    assert [entry.file for entry in removed] == ["Model-2_2.safetensors"]
    assert fleet.models_there() == ["Model-1_1.safetensors"]
    assert list((fleet.loras / ".trash").iterdir()) == []


def test_models_can_be_removed_though_not_even_a_rename_is_possible(fleet: Fleet, full: FaultyVolume) -> None:
    full.fail("rename", errno.EDQUOT)

    removed = care.shrink(fleet.start(checkpoint=None).cache, MB)

    assert [entry.file for entry in removed] == ["Model-2_2.safetensors"]
    assert fleet.models_there() == ["Model-1_1.safetensors"]


def test_a_job_evicts_on_a_volume_that_takes_no_new_file(fleet: Fleet, full: FaultyVolume) -> None:
    (ref,) = serve(fleet, 3, size=MB // 2)

    model = fetch(fleet.start(checkpoint=None), ref)

    assert model.downloaded
    assert fleet.models_there() == ["Model-1_1.safetensors", "Model-3_3.safetensors"]


def test_a_cache_without_our_folders_is_used_though_they_cannot_be_made(fleet: Fleet, volume: FaultyVolume) -> None:
    path = fleet.put("by hand.safetensors", 1)
    for call in ("create", "mkdir"):
        volume.fail(call, errno.EDQUOT)
    worker = fleet.start(checkpoint=None)

    removed = care.remove(worker.cache, "by hand")

    assert [entry.path for entry in removed] == [path]
    assert not path.exists()


# -- what dead workers left


def test_a_dead_claim_blocks_nobody_on_a_full_volume(fleet: Fleet, full: FaultyVolume) -> None:
    (full.backing / "loras/.holds/Model-2_2.safetensors.evicting").touch()
    worker = fleet.start(checkpoint=None, timings=timings(stale_after=0.1))
    soon_dead = soon()
    removed: list[str] = []

    while not removed:
        soon_dead.wait(0.02)
        with contextlib.suppress(DownloadFailed):  # it seems in use
            removed = [entry.file for entry in care.remove(worker.cache, "Model-2_2")]

    assert removed == ["Model-2_2.safetensors"]


def test_a_volume_that_fails_a_listing_makes_no_model_disappear(fleet: Fleet, volume: FaultyVolume) -> None:
    (ref,) = serve(fleet, 1)
    still = timings(heartbeat=3600)  # else the housekeeping meets the fault
    fetch(fleet.start(checkpoint=None, timings=still), ref)
    worker = fleet.start(checkpoint=None, timings=still)
    volume.fail("listdir", errno.EIO, on="loras", times=1)

    failed = outcome(worker, ref)
    again = fetch(worker, ref)

    assert failed == "VOLUME_FAILED"
    assert not again.downloaded


def test_links_to_models_stay_while_the_volume_does_not_answer(fleet: Fleet, volume: FaultyVolume) -> None:
    (ref,) = serve(fleet, 1)
    worker = fleet.start(checkpoint=None, timings=timings(heartbeat=3600))
    model = fetch(worker, ref)
    link = fleet.folder / "container1/webui/Lora" / model.shown_file
    volume.fail("stat", errno.EIO, on=f"loras/{model.file}")

    worker.cache.look_after()

    assert link.is_symlink()


def test_a_sidecar_that_cannot_be_read_is_not_taken_for_a_missing_one(fleet: Fleet, volume: FaultyVolume) -> None:
    path = sdxl_lora(fleet.loras / "by hand.safetensors", 1)
    worker = fleet.start(checkpoint=None)
    care.verify(worker, soon())
    list(care.verify(worker, soon()))
    before = Path(f"{path}.json").read_bytes()
    volume.fail("open", errno.EIO, on="*.json")

    results = list(care.verify(fleet.start(checkpoint=None), soon(), repair=True))
    volume.heal()

    assert [result.ok for result in results] == [False]
    assert Path(f"{path}.json").read_bytes() == before


def test_a_worker_starts_though_a_folder_of_vaes_cannot_be_listed(fleet: Fleet, volume: FaultyVolume) -> None:
    (ref,) = serve(fleet, 1)
    (fleet.models / "vae").mkdir()
    volume.fail("listdir", errno.EIO, on="vae")

    assert outcome(fleet.start(checkpoint=None), ref) == "Model-1_1.safetensors"


def test_a_file_that_cannot_be_read_is_listed_and_can_be_removed(
    fleet: Fleet, volume: FaultyVolume, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(fleet.start(checkpoint=None), *serve(fleet, 1, 2))
    fault = volume.fail("stat", errno.EIO, on="loras/Model-1*")
    manager = fleet.start(checkpoint=None)
    options = model_manager._parser().parse_args(["list"])

    status = model_manager._Command(manager, Config.from_env({}), options, soon()).run()
    listed = capsys.readouterr().out
    with pytest.raises(VolumeFailed):
        care.remove(manager.cache, "Model-1_1")
    volume.heal(fault)
    volume.fail("read", errno.EIO, on="loras/Model-1*")
    care.remove(manager.cache, "Model-1_1")

    assert status == 0
    assert "Model-1_1.safetensors  (cannot be read)" in listed
    assert fleet.models_there() == ["Model-2_2.safetensors"]


def test_a_damaged_file_that_cannot_be_removed_ends_no_verification(fleet: Fleet, volume: FaultyVolume) -> None:
    worker = fleet.start(checkpoint=None)
    fetch(worker, *serve(fleet, 1, 2))
    (fleet.loras / "Model-1_1.safetensors").write_bytes(b"<html>")
    volume.fail("rename", errno.EIO, on="loras/Model-1*")

    results = {result.entry.file: result for result in care.verify(worker, soon(), repair=True)}

    assert results["Model-2_2.safetensors"].ok
    assert "left alone" in results["Model-1_1.safetensors"].finding

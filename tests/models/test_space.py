"""Room for what is downloaded: reserved, made, refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from a1111_worker.context import JobContext
from a1111_worker.domain import ModelKind, ModelRef, Progress
from a1111_worker.errors import RoomInUse, VolumeFull
from a1111_worker.models import care
from a1111_worker.models.space import CacheSpace, RoomRequest
from tests.disks import small_disk
from tests.fleet import Fleet, fetch, lora, soon, timings
from tests.support import wait_until

MB = 1_000_000


def sizes(fleet: Fleet, *numbers: int, size: int = MB) -> list[ModelRef]:
    for number in numbers:
        fleet.serve(number, size=size)
    return [lora(number) for number in numbers]


def last_used(fleet: Fleet, number: int, seconds: float) -> None:
    (uses,) = fleet.loras.glob(f"*_{number}.safetensors.uses")
    os.utime(uses, (seconds, seconds))


def test_the_least_recently_used_model_is_evicted_when_the_cache_is_full(fleet: Fleet) -> None:
    refs = sizes(fleet, 1, 2, 3, 4)
    worker = fleet.start(limit=3 * MB)
    first, _, third = (fetch(worker, ref) for ref in refs[:3])
    for when, number in enumerate([2, 3, 1]):
        last_used(fleet, number, 1000 + when)

    fourth = fetch(worker, refs[3])

    assert fleet.models_there() == ["Model-1_1.safetensors", "Model-3_3.safetensors", "Model-4_4.safetensors"]
    links = sorted(path.name for path in (fleet.folder / "container1/webui/Lora").iterdir())
    assert links == [model.shown_file for model in (first, third, fourth)]
    assert fleet.debris() == []


def test_a_model_that_any_worker_uses_is_not_evicted(fleet: Fleet) -> None:
    first, second, third = sizes(fleet, 1, 2, 3)
    one, other = fleet.start(limit=2 * MB), fleet.start(limit=2 * MB)
    fetch(one, second)

    with one.hold([first], JobContext(soon())) as held:
        last_used(fleet, 1, 1000)  # by age it would go first
        fetch(other, third)
        still_there = held.models[first].path.exists()
    fetch(other, second)

    assert still_there
    assert fleet.models_there() == ["Model-2_2.safetensors", "Model-3_3.safetensors"]


def test_the_checkpoint_is_never_evicted_and_never_kept_out_by_the_limit(fleet: Fleet) -> None:
    fleet.serve_checkpoint(size=3 * MB)
    (ref,) = sizes(fleet, 1)
    worker = fleet.start(limit=2 * MB)
    worker.prepare_checkpoint(JobContext(soon()))
    before = len(fleet.civitai.storage.asked)

    with pytest.raises(VolumeFull) as raised:
        fetch(worker, ref)

    assert "Model 1" in raised.value.message
    assert len(fleet.civitai.storage.asked) == before  # not a byte was fetched
    assert (fleet.models / "checkpoints/jib_mix.safetensors").exists()


def test_for_a_file_that_never_fits_nothing_is_evicted(fleet: Fleet) -> None:
    small = sizes(fleet, 1, 2)
    (big,) = sizes(fleet, 3, size=9 * MB)
    worker = fleet.start(limit=3 * MB)
    for ref in small:
        fetch(worker, ref)

    with pytest.raises(VolumeFull):
        fetch(worker, big)

    assert len(fleet.models_there()) == 2
    assert fleet.debris() == []


@pytest.mark.parametrize(("limit", "fits"), [(4 * MB + 50_000, True), (5 * MB // 2, False)])
def test_files_that_are_fetched_at_once_keep_the_limit_together(fleet: Fleet, limit: int, fits: bool) -> None:
    refs = sizes(fleet, 1, 2, 3, 4)
    fleet.civitai.storage.latency = 0.3  # room was found for all of them before a byte of any is there
    worker = fleet.start(checkpoint=None, limit=limit)

    with worker.hold(refs, JobContext(soon()), tolerate=True) as held:
        failures = {type(error) for error in held.failures.values()}
        size = sum((fleet.loras / file).stat().st_size for file in fleet.models_there())

    assert failures == (set() if fits else {VolumeFull})
    assert size == (4 * MB if fits else 2 * MB)


def test_room_stays_reserved_until_the_last_job_that_needs_it_ends(fleet: Fleet) -> None:
    cache = fleet.start(checkpoint=None).cache
    space, loras = CacheSpace(cache), cache.directories.for_new(ModelKind.LORA)
    shared, other = (RoomRequest(key, key, loras, 2 * MB) for key in ("shared", "other"))

    with space.reserve([shared], 3 * MB):
        with space.reserve([shared], 3 * MB):
            pass  # another job needs the same file, and ends first
        with pytest.raises(RoomInUse), space.reserve([other], 3 * MB):
            pass
    with space.reserve([other], 3 * MB):
        pass


def test_files_that_can_never_fit_together_evict_nothing(fleet: Fleet) -> None:
    old = sizes(fleet, 1, 2, 3)
    new = sizes(fleet, 4, 5, 6, 7)
    worker = fleet.start(checkpoint=None, limit=int(3.5 * MB), timings=timings(room_wait=60))
    for ref in old:
        fetch(worker, ref)
    links = fleet.civitai.links_given

    with pytest.raises(VolumeFull) as raised:
        fetch(worker, *new)

    assert type(raised.value) is VolumeFull  # so it has not waited for anybody
    assert len(fleet.models_there()) == 3
    assert fleet.civitai.links_given == links


def test_room_for_what_the_job_holds_already_is_counted(fleet: Fleet) -> None:
    refs = sizes(fleet, 1, 2, 3)
    worker = fleet.start(checkpoint=None, limit=int(2.5 * MB), timings=timings(room_wait=60))
    for ref in refs[:2]:
        fetch(worker, ref)

    with pytest.raises(VolumeFull) as raised:
        fetch(worker, *refs)

    assert type(raised.value) is VolumeFull  # nobody else could release anything
    assert len(fleet.models_there()) == 2


# -- room that others use


def test_a_job_waits_until_others_release_their_models(fleet: Fleet) -> None:
    used, wanted = sizes(fleet, 1, 2)
    one, other = (fleet.start(checkpoint=None, limit=MB, timings=timings(room_wait=30)) for _ in range(2))
    waits = threading.Event()
    seen: list[str] = []

    def report(progress: Progress) -> None:
        seen.append(progress.detail)
        waits.set()

    def job() -> list[str]:
        with other.hold([wanted], JobContext(soon(), report)):
            return fleet.models_there()

    with ThreadPoolExecutor(1) as threads:
        with one.hold([used], JobContext(soon())):
            waiting = threads.submit(job)
            assert waits.wait(10)
        there = waiting.result()

    assert seen[0] == "waiting for room until other jobs release their models, 30 s at most"
    assert there == ["Model-2_2.safetensors"]
    assert fleet.debris() == []


def test_a_job_that_waits_for_room_holds_nothing_itself(fleet: Fleet) -> None:
    has, used, wanted = sizes(fleet, 1, 2, 3)
    one, other = (fleet.start(checkpoint=None, limit=2 * MB, timings=timings(room_wait=1.0)) for _ in range(2))
    fetch(one, has)
    evicted: list[bool] = []

    def report(progress: Progress) -> None:
        if "waiting for room" in progress.detail and not any(evicted):
            entries = [entry for entry in one.cache.list_entries() if entry.file == "Model-1_1.safetensors"]
            evicted.extend(one.cache.evict(entry, "somebody else's job needs the room") for entry in entries)

    with (
        one.hold([used], JobContext(soon())),
        pytest.raises(VolumeFull, match="while other jobs use their models"),
        other.hold([has, wanted], JobContext(soon(), report)),
    ):
        pass

    assert any(evicted)


def test_two_jobs_that_need_each_others_room_never_wait_for_each_other(fleet: Fleet) -> None:
    refs = sizes(fleet, 1, 2, 3, 4)
    worker = fleet.start(checkpoint=None, limit=3 * MB, timings=timings(room_wait=30))
    for ref in refs[:2]:
        fetch(worker, ref)
    fleet.civitai.storage.rate = 4 * MB  # so that each has its first model when it needs room for the second

    def job(number: int) -> int:
        done = 0
        for _ in range(5):
            # one model that is there, one that is not; a third one would be too much for both jobs together
            with worker.hold([refs[number], refs[number + 2]], JobContext(soon(60))) as held:
                done += len(held.models)
        return done

    with ThreadPoolExecutor(2) as threads:
        done = list(threads.map(job, range(2)))

    assert done == [10, 10]
    assert fleet.debris() == []


def test_a_job_that_does_without_loras_waits_before_it_goes_on_without_them(fleet: Fleet) -> None:
    used, wanted = sizes(fleet, 1, 2)
    one, other = (fleet.start(checkpoint=None, limit=MB, timings=timings(room_wait=0.3)) for _ in range(2))
    seen: list[str] = []

    with (
        one.hold([used], JobContext(soon())),
        other.hold([wanted], JobContext(soon(), lambda p: seen.append(p.detail)), tolerate=True) as held,
    ):
        failures = [error.code for error in held.failures.values()]

    assert failures == ["VOLUME_FULL"]
    assert any("waiting for room" in detail for detail in seen)


# -- what takes room besides models


@pytest.mark.parametrize(
    "name",
    [
        ".trash/dead-1-Model-9_9.safetensors",  # it evicted a model
        ".parts/alone-v9-unknown.other.part",  # it downloaded a model, without a lease
    ],
)
def test_what_a_killed_worker_was_doing_takes_room_until_it_is_known_to_be_dead(fleet: Fleet, name: str) -> None:
    (ref,) = sizes(fleet, 1)
    worker = fleet.start(
        checkpoint=None, limit=int(1.5 * MB), timings=timings(heartbeat=3600, stale_after=0.3, room_wait=0)
    )
    left = fleet.loras / name
    left.write_bytes(bytes(MB))

    with pytest.raises(VolumeFull):  # it may be a living worker's
        fetch(worker, ref)
    was_kept = left.exists()
    wait_until(lambda: all(entry.keep is None for entry in worker.cache.list_entries()), "its owner's death")
    model = fetch(worker, ref)

    assert was_kept
    assert model.downloaded and not left.exists()


def test_what_a_killed_evictor_left_in_the_trash_is_removed_by_those_who_live(fleet: Fleet) -> None:
    fleet.start(timings=timings(stale_after=0.2))
    trashed = fleet.loras / ".trash/dead-1-Model-9_9.safetensors"
    trashed.write_bytes(bytes(MB))

    wait_until(lambda: not trashed.exists(), "its removal")


def test_what_another_worker_is_still_downloading_counts_towards_the_limit(fleet: Fleet) -> None:
    first, second = sizes(fleet, 1, 2)
    worker = fleet.start(checkpoint=None, limit=3 * MB + 200_000)
    fetch(worker, first)
    (fleet.loras / ".parts/v9.another.part").write_bytes(bytes(100_000))
    (fleet.loras / ".leases/v9").write_text(json.dumps({"owner": "another", "done": 100_000, "total": 2 * MB}))

    fetch(worker, second)

    assert fleet.models_there() == ["Model-2_2.safetensors"]  # with all three the cache would be too large


# -- disks that are full


def test_a_full_disk_is_noticed_before_a_byte_is_fetched(fleet: Fleet) -> None:
    (big,) = sizes(fleet, 1, size=9 * MB)
    with small_disk(fleet.folder / "small", 8 << 20):
        worker = fleet.start(models_dir=fleet.folder / "small/models")

        with pytest.raises(VolumeFull):
            fetch(worker, big)

        assert fleet.civitai.storage.asked == []


def test_on_a_disk_that_turns_out_to_be_full_room_is_made_once(fleet: Fleet) -> None:
    # As with a quota that statvfs does not show: there was room when it was looked for.
    old, new = sizes(fleet, 1, 2, size=40 * MB)
    with small_disk(fleet.folder / "small", 160 << 20):
        models = fleet.folder / "small/models"
        worker = fleet.start(models_dir=models)
        fetch(worker, old)
        ballast = fleet.folder / "small/ballast"

        def fill() -> None:
            free = shutil.disk_usage(fleet.folder / "small").free
            ballast.write_bytes(bytes(max(0, free - 10 * MB)))
            fleet.civitai.before_a_link = None

        # after the room was reserved, and before the first byte
        fleet.civitai.before_a_link = fill
        model = fetch(worker, new)

        assert model.downloaded
        assert [path.name for path in (models / "loras").glob("*.safetensors")] == ["Model-2_2.safetensors"]


def test_a_cache_whose_own_folders_were_deleted_goes_on(fleet: Fleet) -> None:
    first, second = sizes(fleet, 1, 2)
    worker = fleet.start()
    fetch(worker, first)
    dots = [path for path in fleet.loras.iterdir() if path.name.startswith(".")]
    for folder in dots:
        shutil.rmtree(folder)

    model = fetch(worker, second)
    shutil.rmtree(fleet.loras / ".trash")
    removed = care.remove(worker.cache, model.file)

    assert model.downloaded
    assert [entry.file for entry in removed] == [model.file]
    assert fleet.models_there() == ["Model-1_1.safetensors"]


def test_on_a_full_disk_without_enough_to_evict_nothing_is_evicted(fleet: Fleet) -> None:
    (old,) = sizes(fleet, 1, size=20 * MB)
    (new,) = sizes(fleet, 2, size=60 * MB)
    with small_disk(fleet.folder / "small", 160 << 20):
        models = fleet.folder / "small/models"
        worker = fleet.start(models_dir=models)
        fetch(worker, old)

        def fill() -> None:
            free = shutil.disk_usage(fleet.folder / "small").free
            (fleet.folder / "small/ballast").write_bytes(bytes(free - 10 * MB))
            fleet.civitai.before_a_link = None

        fleet.civitai.before_a_link = fill
        with pytest.raises(VolumeFull):
            fetch(worker, new)

        assert [path.name for path in (models / "loras").glob("*.safetensors")] == ["Model-1_1.safetensors"]


NO_LONG_FILES = """
import resource, sys
from pathlib import Path
from a1111_worker.context import Deadline, JobContext
from a1111_worker.errors import VolumeFull
from tests.fleet import lora, manager

with manager(Path(sys.argv[1]), *sys.argv[2:], name="1", checkpoint=None) as worker:
    with worker.hold([lora(1)], JobContext(Deadline(30))):
        pass
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    try:
        with worker.hold([lora(2)], JobContext(Deadline(30))):
            pass
    except VolumeFull as error:
        print(error.message)
"""


def test_nothing_is_evicted_for_a_file_that_is_longer_than_the_volume_takes(fleet: Fleet) -> None:
    sizes(fleet, 1, size=MB // 2)
    sizes(fleet, 2, size=2 * MB)
    command = [sys.executable, "-c", NO_LONG_FILES, str(fleet.folder), fleet.civitai.url, fleet.civitai.storage.url]

    done = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert "in one file" in done.stdout, done.stderr
    assert fleet.models_there() == ["Model-1_1.safetensors"]
    assert fleet.debris() == []

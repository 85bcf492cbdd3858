"""Room for what is downloaded: reserved, made, refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from a1111_worker.context import JobContext
from a1111_worker.domain import ModelRef
from a1111_worker.errors import (
    VolumeFull,
)
from tests.disks import small_disk
from tests.fleet import Fleet, fetch, lora, soon

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
    for ref in refs[:3]:
        fetch(worker, ref)
    for when, number in enumerate([2, 3, 1]):
        last_used(fleet, number, 1000 + when)

    fetch(worker, refs[3])

    assert fleet.models_there() == ["Model-1_1.safetensors", "Model-3_3.safetensors", "Model-4_4.safetensors"]
    links = sorted(path.name for path in (fleet.folder / "container1/webui/Lora").iterdir())
    assert links == fleet.models_there()
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

        # after the room was reserved, and before the partial file is allocated
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
    removed = worker.remove(model.stem)

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

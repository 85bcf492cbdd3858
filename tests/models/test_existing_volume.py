"""A volume that an earlier version of the worker filled is used as it is.

Every text here is what that version wrote. Do not change one of them to make a test pass.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from a1111_worker.context import JobContext
from a1111_worker.domain import ModelKind, ModelRef, Progress
from a1111_worker.models import care
from sandbox.models import sha256_of
from sandbox.storage import ServerFault
from tests.fleet import Fleet, fetch, lora, named, soon, timings
from tests.support import wait_until

MB = 1_000_000

SIDECAR = """{"schema": 1, "kind": "lora", "name": "Snow & Ice", "file": "Snow_Ice_1.safetensors", "sha256": "SHA256",
"size": SIZE, "mtime": 1795282160, "url": "https://civitai.com/api/download/models/1", "version_id": 1, "file_id": 10,
"primary": true, "wishes": [], "base_model": "SDXL 1.0", "family": "sdxl", "lora_hash": "08bf7b1e76e0",
"trained_words": ["snow"], "downloaded_at": "2026-11-21T17:29:20Z"}"""

SIDECAR_OF_A_VARIANT = """{"schema": 1, "kind": "lora", "name": "Snow & Ice", "file": "Snow_Ice_1_2.safetensors",
"sha256": "SHA256", "size": SIZE, "mtime": 1795282160, "url": "https://civitai.com/api/download/models/1",
"version_id": 1, "file_id": 2, "primary": false, "wishes": ["pruned/fp16"], "base_model": "SDXL 1.0", "family": "sdxl",
"lora_hash": "e40d1f6130b7", "trained_words": ["snow"], "downloaded_at": "2026-11-21T17:29:20Z"}"""

SIDECAR_OF_A_URL = """{"schema": 1, "kind": "lora", "name": "My own", "file": "My_own_d661abd2d3b41e03.safetensors",
"sha256": "SHA256", "size": SIZE, "mtime": 1795282160, "url": "https://models.example/own.safetensors",
"version_id": null, "file_id": null, "primary": true, "wishes": [], "base_model": null, "family": "sdxl",
"lora_hash": "c99c27acb051", "trained_words": [], "downloaded_at": "2026-11-21T17:29:20Z"}"""

SIDECAR_BY_HAND = """{"schema": 1, "kind": "lora", "name": "my own", "file": "my own.safetensors", "sha256": "SHA256",
"size": SIZE, "mtime": 1795282160, "url": null, "version_id": null, "file_id": null, "primary": true, "wishes": [],
"base_model": null, "family": "sdxl", "lora_hash": "5a1f0e4c2b77", "trained_words": [], "downloaded_at": null}"""

URL, DIGEST_OF_URL = "https://models.example/own.safetensors", "a1195b8489ba29a7a83fd7b5bf92951d"

LEASE = '{"owner": "worker-19836-a3981f90", "done": 1120000, "total": 2000000}'

RANGES = """{"version": 1, "size": 2000000, "etag": "\\"c0a6c67f1ce6562078d96348d1ab9a3d\\"", "sha256": "SHA256",
"boot": "52471d64-172d-419f-9513-0cfb0e20689e", "done": [[0, 1120000]]}"""


def put(fleet: Fleet, name: str, seed: int, sidecar: str) -> Path:
    """A model with the sidecar that an earlier version wrote."""
    path = fleet.put(name, seed)
    text = sidecar.replace("SHA256", sha256_of(path)).replace("SIZE", str(path.stat().st_size))
    (fleet.loras / f"{name}.json").write_text(text)
    return path


def test_models_are_known_by_their_sidecars(fleet: Fleet) -> None:
    put(fleet, "Snow_Ice_1.safetensors", 1, SIDECAR)
    put(fleet, "Snow_Ice_1_2.safetensors", 2, SIDECAR_OF_A_VARIANT)
    worker = fleet.start()

    refs = [lora(1), named("snow_ice_1"), lora(1, size="pruned", fp="fp16"), lora(1, file_id=2)]
    models = [fetch(worker, ref) for ref in refs]

    assert [model.file for model in models] == ["Snow_Ice_1.safetensors"] * 2 + ["Snow_Ice_1_2.safetensors"] * 2
    snow = models[0]
    assert (snow.name, snow.version_id, snow.base_model, snow.family) == ("Snow & Ice", 1, "SDXL 1.0", "sdxl")
    assert (snow.lora_hash, snow.trained_words, snow.downloaded) == ("08bf7b1e76e0", ("snow",), False)
    assert fleet.asked() == []


def test_what_was_put_there_by_hand_is_not_read_again_and_has_a_name_of_its_content(fleet: Fleet) -> None:
    path = put(fleet, "my own.safetensors", 3, SIDECAR_BY_HAND)
    os.utime(path, (1795282160, 1795282160))

    with fleet.start(name="1").hold([named("my own")], JobContext(soon())) as held:
        (model,) = held.models.values()
        links = [link.name for link in (fleet.folder / "container1/webui/Lora").iterdir()]

    assert model.lora_hash == "5a1f0e4c2b77"  # as the sidecar says: the file has another one
    assert links == [f"my own_{sha256_of(path)[:8]}.safetensors"]


def test_a_sidecar_that_is_written_again_has_the_same_keys_and_new_ones(fleet: Fleet) -> None:
    path = put(fleet, "Snow_Ice_1.safetensors", 1, SIDECAR)
    before = json.loads(Path(f"{path}.json").read_text())
    cache = fleet.start().cache
    hit = cache.find(lora(1), fresh=True)
    assert hit is not None

    cache.sidecars.write(hit.directory, replace(hit.record, variant_filters=("full/fp32",)))

    after = json.loads(Path(f"{path}.json").read_text())
    assert after == before | {
        "wishes": ["full/fp32"],
        "mtime": int(path.stat().st_mtime),
        "restricted": False,
        "source_stem": None,
    }


def test_uses_are_counted_on(fleet: Fleet) -> None:
    path = put(fleet, "Snow_Ice_1.safetensors", 1, SIDECAR)
    Path(f"{path}.uses").write_bytes(b"...")
    worker = fleet.start()

    fetch(worker, lora(1))

    (directory, *_) = worker.cache.directories.of(ModelKind.LORA)
    assert worker.cache.sidecars.uses(directory, path.name).count == 4


def test_the_file_of_a_url_is_found_by_the_urls_digest(fleet: Fleet) -> None:
    file = "My_own_d661abd2d3b41e03.safetensors"
    put(fleet, file, 8, SIDECAR_OF_A_URL)
    (fleet.loras / ".urls").mkdir()
    (fleet.loras / ".urls" / DIGEST_OF_URL).write_text(file)

    model = fetch(fleet.start(), ModelRef(ModelKind.LORA, url=URL))

    assert (model.file, model.name, model.version_id) == (file, "My own", None)
    assert fleet.asked() == []


def test_a_dead_workers_lease_is_waited_for_and_its_partial_file_is_completed(fleet: Fleet) -> None:
    served = fleet.serve(2, size=2 * MB)
    content = served.read_bytes()
    for folder in (".parts", ".leases"):
        (fleet.loras / folder).mkdir(parents=True)
    (fleet.loras / ".leases/v2").write_text(LEASE.ljust(200))
    partial_file = fleet.loras / ".parts/v2.worker-19836-a3981f90.part"
    partial_file.write_bytes(content[:1_120_000] + bytes(880_000))
    Path(f"{partial_file}.ranges").write_text(RANGES.replace("SHA256", sha256_of(served)))
    fleet.civitai.storage.fail(ServerFault(etag='"c0a6c67f1ce6562078d96348d1ab9a3d"'), times=None)
    reports: list[Progress] = []

    with fleet.start(timings=timings(stale_after=0.3)).hold([lora(2)], JobContext(soon(), reports.append)) as held:
        model = held.models[lora(2)]

    assert reports[0].detail == "another worker is fetching Model 2, 56 %; 0 of 1 ready, 1 of 2 MB"
    assert model.sha256 == sha256_of(served)
    fleet.civitai.storage.wait_until_idle()
    assert fleet.civitai.storage.bytes_sent == 880_000
    assert fleet.debris() == []


def test_a_hold_keeps_its_model_until_its_owner_is_dead(fleet: Fleet) -> None:
    path = put(fleet, "Snow_Ice_1.safetensors", 1, SIDECAR)
    hold = fleet.loras / ".holds/Snow_Ice_1.safetensors.worker-19836-a3981f90"
    hold.parent.mkdir()
    hold.touch()
    worker = fleet.start(timings=timings(stale_after=0.5))

    (entry,) = worker.cache.list_entries()
    was_evicted_at_once = worker.cache.evict(entry, "test")
    wait_until(lambda: not hold.exists(), "the end of the hold")
    is_evicted = worker.cache.evict(entry, "test")

    assert entry.keep == "in use"
    assert not was_evicted_at_once
    assert is_evicted and not path.exists()


def test_what_an_evictor_left_is_cleared_away(fleet: Fleet) -> None:
    path = put(fleet, "Snow_Ice_1.safetensors", 1, SIDECAR)
    for folder in (".holds", ".trash", ".leases"):
        (fleet.loras / folder).mkdir()
    left = [
        ".holds/Snow_Ice_1.safetensors.evicting",
        ".trash/worker-19836-a3981f90-139942-Rain_2.safetensors",
        ".leases/v9.2115.dead",  # it was removing a dead owner's lease
        ".trash/.clock-19836-139942",
    ]
    for name in left:
        (fleet.loras / name).touch()
    worker = fleet.start(checkpoint=None, timings=timings(stale_after=0.3))

    wait_until(lambda: not any((fleet.loras / name).exists() for name in left[1:]), "the removal")
    model = fetch(worker, lora(1))
    removed = care.remove(worker.cache, "Snow_Ice_1")

    assert (model.file, model.downloaded) == (path.name, False)
    assert [entry.path for entry in removed] == [path]
    assert fleet.debris() == []


def test_a_half_filled_partial_file_has_its_room_planned(fleet: Fleet) -> None:
    served = fleet.serve(2, size=2 * MB)
    put(fleet, "Snow_Ice_1.safetensors", 1, SIDECAR)
    (fleet.loras / ".parts").mkdir()
    partial_file = fleet.loras / ".parts/v2.worker-19836-a3981f90.part"
    partial_file.write_bytes(served.read_bytes()[:1_120_000] + bytes(880_000))
    Path(f"{partial_file}.ranges").write_text(RANGES.replace("SHA256", sha256_of(served)))
    worker = fleet.start(checkpoint=None, limit=2 * MB + 20_000)

    sizes = {entry.file: entry.size for entry in worker.cache.list_entries()}
    fetch(worker, lora(2))

    assert sizes[partial_file.name] == 1_120_000
    assert fleet.models_there() == ["Model-2_2.safetensors"]  # the other one had to go, and nothing else
    assert fleet.debris() == []

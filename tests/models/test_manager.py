"""Models on disk, proven, held, evicted: real managers, a real CivitAI in miniature, real folders."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from a1111_worker.context import Deadline, JobContext
from a1111_worker.domain import HeldModels, Model, ModelKind, ModelRef, Progress
from a1111_worker.errors import (
    DownloadFailed,
    JobCancelled,
    JobTimeout,
    ModelAccessDenied,
    ModelError,
    ModelNotFound,
    ModelRejected,
    VolumeFull,
)
from a1111_worker.models.manager import ModelManager
from sandbox.civitai import NO_MODEL, SERVER_ERROR
from sandbox.models import sd15_lora, sdxl_checkpoint, sdxl_lora, sha256_of, tensor_hash
from sandbox.storage import Fault
from tests.disks import read_only, small_disk
from tests.fleet import CHECKPOINT, DETAIL, SPEC, TUNING, Fleet, lora, named, soon

MB = 1_000_000


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with Fleet(tmp_path) as fleet:
        yield fleet


def fetch(manager: ModelManager, *refs: ModelRef) -> Model:
    """Hold models for a moment; the first of them."""
    with manager.hold(refs, JobContext(soon())) as held:
        return held.models[refs[0]]


# -- a job's models


def test_a_lora_is_fetched_proven_and_shown_to_the_webui(fleet: Fleet) -> None:
    served = fleet.serve(77, name="Snow & Ice", base_model="SDXL 1.0", trained_words=["snow"])
    worker = fleet.start()

    with worker.hold([lora(77)], JobContext(soon())) as held:
        model = held.models[lora(77)]

        assert (fleet.folder / "container1/webui/Lora" / model.file).read_bytes() == served.read_bytes()
    assert model.file == "Snow_Ice_77.safetensors"
    assert (model.name, model.base_model, model.family) == ("Snow & Ice", "SDXL 1.0", "sdxl")
    assert (model.sha256, model.size) == (sha256_of(served), served.stat().st_size)
    assert model.lora_hash == tensor_hash(served)[:12]
    assert model.trained_words == ("snow",)
    assert model.downloaded
    assert fleet.debris() == []


def test_what_is_in_the_cache_costs_no_request(fleet: Fleet) -> None:
    fleet.serve(77)
    fetch(fleet.start(), lora(77))
    before = len(fleet.asked())

    again = fetch(fleet.start(), lora(77))

    assert not again.downloaded
    assert len(fleet.asked()) == before


def test_the_files_of_a_job_come_together_and_in_the_order_of_its_references(fleet: Fleet) -> None:
    refs = [lora(number) for number in (5, 3, 9, 1)]
    for ref in refs:
        fleet.serve(ref.version_id or 0, size=MB)
    fleet.civitai.storage.rate = 2 * MB
    worker = fleet.start()

    with worker.hold([*refs, refs[0]], JobContext(soon())) as held:
        there = list(held.models)

    assert there == refs
    assert fleet.civitai.storage.peak_connections >= 2


def test_the_first_failure_ends_the_others_and_nothing_is_held(fleet: Fleet) -> None:
    fleet.serve(1, size=5 * MB)
    fleet.civitai.storage.rate = 500_000
    worker = fleet.start()

    with pytest.raises(ModelNotFound), worker.hold([lora(1), lora(404)], JobContext(soon())):
        pass

    assert fleet.models_there() == []
    assert list((fleet.loras / ".holds").iterdir()) == []


def test_failures_are_told_where_they_are_tolerated(fleet: Fleet) -> None:
    fleet.serve(1)
    worker = fleet.start()

    with worker.hold([lora(404), lora(1), named("nobody")], JobContext(soon()), tolerate=True) as held:
        there, failures = list(held.models), held.failures

    assert there == [lora(1)]
    assert {ref: type(error) for ref, error in failures.items()} == {
        lora(404): ModelNotFound,
        named("nobody"): ModelNotFound,
    }


def test_progress_is_told_of_all_files_as_one(fleet: Fleet) -> None:
    for number in (1, 2):
        fleet.serve(number, size=2 * MB)
    fleet.civitai.storage.rate = 4 * MB
    seen: list[Progress] = []

    with fleet.start().hold([lora(1), lora(2)], JobContext(soon(), seen.append)):
        pass

    assert seen[-1].percent == 100.0
    assert seen[-1].facts["total"] == 4 * MB
    assert any(0 < (look.percent or 0) < 100 and (look.eta_s or 0) > 0 for look in seen)
    assert {look.stage.value for look in seen} == {"models"}


# -- names and identity


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("My LoRA", "My_LoRA_77.safetensors"),
        ("../../../etc/cron.d/x", "etc_cron.d_x_77.safetensors"),
        ("detail_tweaker_xl", "detail_tweaker_xl_77.safetensors"),  # the catalog's name stays the catalog's
        ("x" * 300, "x" * 80 + "_77.safetensors"),
        ("🦊🦊", "model_77.safetensors"),
        ("a\x00b/c", "a_b_c_77.safetensors"),
        ("CON", "model-CON_77.safetensors"),
        ("name_12", "name-12_77.safetensors"),
    ],
)
def test_a_job_may_call_a_model_anything(fleet: Fleet, name: str, file: str) -> None:
    fleet.serve(77)

    model = fetch(fleet.start(), lora(77, name=name))

    assert model.file == file
    assert fleet.models_there() == [file]


def test_a_version_is_one_file_whatever_jobs_call_it(fleet: Fleet) -> None:
    fleet.serve(77)
    worker = fleet.start()
    first = fetch(worker, lora(77, name="first"))

    others = [fetch(worker, ref) for ref in (lora(77, name="second"), lora(77), named("first_77"), named("FIRST_77"))]

    assert {other.file for other in others} == {first.file}
    assert fleet.civitai.resolves == {77: 1}


def test_two_models_of_one_file_name_are_two_files(fleet: Fleet) -> None:
    for number in (1, 2):
        fleet.serve(number, name="The same", file_name="same.safetensors")
    worker = fleet.start()

    with worker.hold([lora(1), lora(2)], JobContext(soon())) as held:
        files = {model.file: model.sha256 for model in held.models.values()}

    assert sorted(files) == ["The_same_1.safetensors", "The_same_2.safetensors"]
    assert len(set(files.values())) == 2


def test_a_version_of_the_catalog_has_the_catalogs_name(fleet: Fleet) -> None:
    fleet.serve(DETAIL, name="Something else entirely")
    worker = fleet.start()

    models = [
        fetch(worker, ref)
        for ref in (lora(DETAIL, name="mine"), named("detail_tweaker_xl"), named("Detail Tweaker XL"), lora(DETAIL))
    ]

    assert {(model.file, model.name) for model in models} == {("detail_tweaker_xl.safetensors", "Detail Tweaker XL")}
    assert fleet.civitai.links_given == 1


def test_another_file_of_a_version_is_another_model(fleet: Fleet) -> None:
    full = fleet.serve(77, file_id=1, size=None)
    pruned = fleet.serve(77, sdxl_lora(fleet.folder / "pruned.safetensors", 5), file_id=2, fp="fp16")
    fleet.civitai.versions[77].files[1].size = "pruned"
    worker = fleet.start()
    wish = lora(77, size="pruned", fp="fp16")

    models = [fetch(worker, ref) for ref in (lora(77), lora(77, file_id=2), wish, lora(77, file_id=1))]
    before = len(fleet.asked())
    again = [fetch(worker, ref) for ref in (lora(77), lora(77, file_id=2), wish, lora(77, file_id=1))]

    assert [model.sha256 for model in models] == [sha256_of(path) for path in (full, pruned, pruned, full)]
    assert fleet.models_there() == ["Model-77_77.safetensors", "Model-77_77_2.safetensors"]
    assert [model.file for model in again] == [model.file for model in models]
    assert len(fleet.asked()) == before  # a wish that was found to mean a file is remembered


def test_a_url_outside_civitai_is_known_by_its_bytes(fleet: Fleet) -> None:
    served = sdxl_lora(fleet.folder / "served/own style.safetensors", 8)
    urls = [fleet.civitai.storage.publish(served), fleet.civitai.storage.publish(served, "/other/place")]
    refs = [ModelRef(ModelKind.LORA, url=url) for url in urls]
    worker = fleet.start()

    first, second = [fetch(worker, ref) for ref in refs]
    before = len(fleet.asked())
    again = fetch(worker, refs[0])
    by_hash = fetch(worker, replace(refs[0], url=urls[0] + "?never=seen", sha256=first.sha256))

    assert first.file.endswith(f"_{sha256_of(served)[:16]}.safetensors")
    assert [model.file for model in (second, again, by_hash)] == [first.file] * 3
    assert len(fleet.asked()) == before
    assert fleet.debris() == []


def test_a_page_without_a_version_is_its_newest_one(fleet: Fleet) -> None:
    fleet.serve(77)
    ref = ModelRef(ModelKind.LORA, model_id=fleet.civitai.versions[77].model_id)

    model = fetch(fleet.start(), ref)

    assert model.version_id == 77
    assert "newest" in model.warnings[0]


def test_a_warning_is_told_to_every_job_that_it_concerns_and_to_no_other(fleet: Fleet) -> None:
    fleet.serve(77, size=MB)
    fleet.civitai.storage.rate = 2 * MB
    page = ModelRef(ModelKind.LORA, model_id=fleet.civitai.versions[77].model_id)
    worker = fleet.start()

    with ThreadPoolExecutor(2) as threads:  # one of them fetches, the other one waits
        at_once = list(threads.map(lambda ref: fetch(worker, ref).warnings, (page, lora(77))))
    again = [fetch(worker, ref).warnings for ref in (page, lora(77), lora(77, size="full", fp="fp32"))]

    assert [[warning.split(":")[0] for warning in warnings] for warnings in (*at_once, *again)] == [
        [f"{page.label} was named without a version"],
        [],
        [f"{page.label} was named without a version"],
        [],
        [f"{lora(77).label} has no file of size=full and fp=fp32 on CivitAI"],
    ]


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
        assert fetch(worker, named(name)).stem == outcome
    else:
        with pytest.raises(outcome):
            fetch(worker, named(name))


def test_a_name_that_is_almost_known_gets_a_hint(fleet: Fleet) -> None:
    fleet.put("watercolor.safetensors", 1)

    with pytest.raises(ModelNotFound) as raised:
        fetch(fleet.start(), named("watercolour"))

    assert raised.value.hint == "did you mean watercolor?"


def test_a_file_on_a_catalog_name_is_used_when_its_bytes_are_the_catalogs(fleet: Fleet) -> None:
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
    assert len(fleet.asked()) == before  # proven once


def test_a_file_on_a_catalog_name_with_other_bytes_is_set_aside(fleet: Fleet) -> None:
    served = fleet.serve(DETAIL)
    foreign = fleet.put("detail_tweaker_xl.safetensors", 666)
    sha256 = sha256_of(foreign)

    model = fetch(fleet.start(), named("detail_tweaker_xl"))

    assert model.sha256 == sha256_of(served)
    aside = f"detail_tweaker_xl_{sha256[:16]}.safetensors"
    assert fleet.models_there() == ["detail_tweaker_xl.safetensors", aside]
    assert sha256_of(fleet.loras / aside) == sha256  # nothing is lost


def test_a_file_of_other_bytes_that_another_worker_uses_stays(fleet: Fleet) -> None:
    foreign = fleet.put("detail_tweaker_xl.safetensors", 666, size_bytes=MB)
    one, other = fleet.start(), fleet.start()
    fleet.civitai.fail(NO_MODEL, times=None, on="/api/v1/")  # so that it is used, with a warning

    with one.hold([lora(DETAIL)], JobContext(soon())) as held:
        warned = held.models[lora(DETAIL)].warnings
        fleet.civitai.heal()
        fleet.serve(DETAIL, size=MB)
        with pytest.raises(DownloadFailed, match="another worker uses"):
            fetch(other, lora(DETAIL))

    assert "without a proof" in warned[0]
    assert fleet.models_there() == [foreign.name]
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
def test_the_hash_a_job_gives_is_a_proof_where_civitai_cannot_be_asked(fleet: Fleet, right: bool) -> None:
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


# -- proof


def test_a_wrong_hash_is_tried_once_more_with_a_fresh_link(fleet: Fleet) -> None:
    served = fleet.serve(77)
    fleet.civitai.storage.flip_at = [1000]

    model = fetch(fleet.start(), lora(77))

    assert model.sha256 == sha256_of(served)
    assert fleet.civitai.links_given == 2
    assert fleet.debris() == []


def test_a_wrong_hash_twice_is_refused_and_nothing_is_left(fleet: Fleet) -> None:
    served = fleet.serve(77, sha256="ab" * 32)

    with pytest.raises(ModelRejected) as raised:
        fetch(fleet.start(), lora(77))

    assert "abababababab" in raised.value.message
    assert sha256_of(served)[:12] in raised.value.message
    assert fleet.civitai.links_given == 2
    assert fleet.models_there() == []
    assert fleet.debris() == []


@pytest.mark.parametrize("ref_hash", ["ab" * 32])
def test_a_hash_that_the_job_wants_and_nobody_has_is_refused(fleet: Fleet, ref_hash: str) -> None:
    fleet.serve(77)
    worker = fleet.start()

    for _ in ("before it is there", "when it is there"):
        with pytest.raises(ModelRejected):
            fetch(worker, lora(77, sha256=ref_hash))
        fetch(worker, lora(77))

    assert fleet.debris() == []


@pytest.mark.parametrize(
    "content",
    [b"<!DOCTYPE html><html>login</html>", b"\x80\x04pickle" * 50, b"PK\x03\x04zip" * 50, b"\xff" * 400, b""],
    ids=["html", "pickle", "zip", "noise", "empty"],
)
def test_the_right_hash_of_something_else_is_refused_and_nothing_is_left(fleet: Fleet, content: bytes) -> None:
    path = fleet.folder / "bad.safetensors"
    path.write_bytes(content)
    fleet.serve(77, path)

    with pytest.raises(ModelError):
        fetch(fleet.start(), lora(77))

    assert fleet.models_there() == []
    assert fleet.debris() == []


def test_a_refusal_of_civitai_reaches_the_job_as_it_is(fleet: Fleet) -> None:
    fleet.serve(77)
    fleet.civitai.versions[77].usage_control = "Generation"

    with pytest.raises(ModelAccessDenied):
        fetch(fleet.start(), lora(77))

    assert fleet.debris() == []


def test_a_file_without_metadata_is_tried_unseen(fleet: Fleet) -> None:
    served = fleet.serve(77)
    fleet.civitai.fail(SERVER_ERROR, times=None, on="/api/v1/")

    model = fetch(fleet.start(), lora(77))

    assert model.sha256 == sha256_of(served)
    assert "could not be asked" in model.warnings[0]


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
def test_a_checkpoint_on_disk_is_compared_where_its_hash_is_known(fleet: Fleet, known: str, fetched: bool) -> None:
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


def verdicts(worker: ModelManager) -> list[tuple[str, bool]]:
    return [(verdict.finding.split(":")[0], verdict.ok) for verdict in worker.verify(soon(), repair=True)]


def test_a_damaged_checkpoint_is_had_again_though_it_came_by_hand(fleet: Fleet) -> None:
    served = fleet.serve_checkpoint()
    path = fleet.models / "checkpoints/jib_mix.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(served.read_bytes()[:MB])

    found = verdicts(fleet.start())

    assert found == [("damaged", True)]
    assert sha256_of(path) == sha256_of(served)


def test_another_checkpoint_than_the_configured_one_is_set_aside(fleet: Fleet) -> None:
    served = fleet.serve_checkpoint()
    path = sdxl_checkpoint(fleet.models / "checkpoints/jib_mix.safetensors", 5)
    stranger = sha256_of(path)

    found = verdicts(fleet.start(checkpoint=replace(SPEC, sha256=sha256_of(served))))

    assert found == [("another model", True)]
    assert {sha256_of(file) for file in path.parent.glob("*.safetensors")} == {sha256_of(served), stranger}
    assert sha256_of(path) == sha256_of(served)


@pytest.mark.parametrize("harm", ["cut short", "other bytes"])
def test_a_damaged_file_from_a_url_is_had_again(fleet: Fleet, harm: str) -> None:
    served = sdxl_lora(fleet.folder / "served/own.safetensors", 8)
    worker = fleet.start(checkpoint=None)
    model = fetch(worker, ModelRef(ModelKind.LORA, url=fleet.civitai.storage.publish(served), name="My own"))
    with model.path.open("r+b") as file:
        if harm == "cut short":
            file.truncate(1000)
        else:
            file.seek(-5, os.SEEK_END)
            file.write(b"xxxxx")

    found = verdicts(worker)

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


# -- once for everybody


def test_many_jobs_and_workers_that_want_one_file_fetch_it_once(fleet: Fleet) -> None:
    fleet.serve(77, size=3 * MB)
    fleet.civitai.storage.rate = 6 * MB
    workers = [fleet.start() for _ in range(3)]
    seen: list[Progress] = []

    def job(number: int) -> bool:
        with workers[number % 3].hold([lora(77)], JobContext(soon(), seen.append)) as held:
            return held.models[lora(77)].downloaded

    with ThreadPoolExecutor(9) as threads:
        downloaded = list(threads.map(job, range(9)))

    assert sum(downloaded) == 1
    assert fleet.civitai.resolves == {77: 1}
    fleet.civitai.storage.settle()
    assert fleet.civitai.storage.bytes_sent == 3 * MB
    assert any("another worker is fetching Model 77" in look.detail for look in seen)
    assert any("another job is fetching Model 77" in look.detail for look in seen)
    assert fleet.debris() == []


def test_what_another_worker_fetched_is_seen_though_the_folders_time_says_nothing(fleet: Fleet) -> None:
    # Some volumes keep times in whole seconds: two changes in one second look like one.
    fleet.serve(77)
    one, other = fleet.start(heartbeat=3600), fleet.start(heartbeat=3600)
    os.utime(fleet.loras, (1000, 1000))
    with pytest.raises(ModelNotFound):
        fetch(other, named("nobody"))  # so that it has listed the folder
    fetch(one, lora(77))
    os.utime(fleet.loras, (1000, 1000))

    model = fetch(other, lora(77))

    assert not model.downloaded
    assert fleet.civitai.resolves == {77: 1}


def test_a_name_that_another_worker_brought_is_found_though_the_folders_time_says_nothing(fleet: Fleet) -> None:
    fleet.serve(77)
    one, other = fleet.start(heartbeat=3600), fleet.start(heartbeat=3600)
    os.utime(fleet.loras, (1000, 1000))
    with pytest.raises(ModelNotFound):
        fetch(other, named("nobody"))
    fetch(one, lora(77))
    os.utime(fleet.loras, (1000, 1000))

    model = fetch(other, named("Model-77_77"))

    assert model.version_id == 77


def test_a_cancelled_job_ends_at_once_and_one_that_waits_goes_on_with_its_part(fleet: Fleet) -> None:
    fleet.serve(77, size=2 * MB)
    fleet.civitai.storage.rate = 2 * MB
    worker = fleet.start()
    first, second = soon(), soon()
    waiting = threading.Event()

    def hold(deadline: Deadline, told: Any = None) -> HeldModels:
        with worker.hold([lora(77)], JobContext(deadline, told or (lambda look: None))) as held:
            return held

    def told(look: Progress) -> None:
        if "another job" in look.detail:
            waiting.set()

    def cancel() -> None:
        waiting.wait(10)
        first.cancel()

    fleet.civitai.storage.at(MB, cancel)
    with ThreadPoolExecutor(2) as threads:
        cancelled = threads.submit(hold, first)
        while not worker.library.shelves.home(ModelKind.LORA).part("v77", worker.owner).exists():
            second.wait(0.005)
        taken_over = threads.submit(hold, second, told)

        with pytest.raises(JobCancelled):
            cancelled.result()
        model = taken_over.result().models[lora(77)]

    assert model.downloaded
    assert fleet.civitai.storage.bytes_sent < 3 * MB
    assert fleet.debris() == []


def test_the_failure_of_one_is_told_to_those_who_waited(fleet: Fleet) -> None:
    fleet.serve(77, size=300_000, sha256="ab" * 32)
    fleet.civitai.storage.latency = 0.3
    worker = fleet.start()

    def job(number: int) -> str:
        try:
            fetch(worker, lora(77))
        except ModelRejected as error:
            return error.message
        return "fetched"

    with ThreadPoolExecutor(3) as threads:
        sentences = list(threads.map(job, range(3)))

    assert len(set(sentences)) == 1
    assert "abababababab" in sentences[0]
    assert fleet.civitai.links_given == 2


@pytest.mark.parametrize(
    ("another_waits", "order"),
    [
        (False, ["urgent", "prepared"]),
        (True, ["prepared", "urgent"]),  # it was begun for a job that only prepares, and is not for that one alone
    ],
)
def test_what_the_gpu_waits_for_comes_before_what_is_only_prepared(
    fleet: Fleet, another_waits: bool, order: list[str]
) -> None:
    fleet.serve(1, size=MB)
    fleet.serve(2, size=MB)
    fleet.civitai.storage.rate = MB
    tuning = replace(TUNING, connections=1, min_speed=1.0)
    worker = fleet.start(tuning=tuning)
    begun, waits = threading.Event(), threading.Event()
    finished: list[str] = []

    def job(version_id: int, told: Any, foreground: bool) -> None:
        with worker.hold([lora(version_id)], JobContext(soon(), told, is_next=lambda: foreground)):
            finished.append("prepared" if version_id == 1 else "urgent")

    def told(look: Progress) -> None:
        if look.facts["bytes"]:
            begun.set()

    with ThreadPoolExecutor(3) as threads:
        jobs = [threads.submit(job, 1, told, False)]
        begun.wait(10)
        if another_waits:
            jobs.append(threads.submit(job, 1, lambda look: waits.set(), True))
            waits.wait(10)
        jobs.append(threads.submit(job, 2, lambda look: None, True))
        for one in jobs:
            one.result()

    assert list(dict.fromkeys(finished)) == order


def test_a_wrong_hash_is_the_failure_of_whoever_named_it(fleet: Fleet) -> None:
    served = fleet.serve(77, size=MB, sha256="")  # CivitAI has not computed it yet
    fleet.civitai.storage.rate = 4 * MB
    worker = fleet.start()
    begun = threading.Event()

    def wrong() -> None:
        with worker.hold([lora(77, sha256="ab" * 32)], JobContext(soon(), lambda look: begun.set())):
            pass

    with ThreadPoolExecutor(1) as threads:
        failing = threads.submit(wrong)
        begun.wait(10)
        models = [fetch(worker, ref) for ref in (lora(77), lora(77, sha256=sha256_of(served)))]

        with pytest.raises(ModelRejected):
            failing.result()

    assert {model.sha256 for model in models} == {sha256_of(served)}
    assert fleet.debris() == []


def test_a_job_without_time_says_so_and_its_part_stays(fleet: Fleet) -> None:
    fleet.serve(77, size=2 * MB)
    fleet.civitai.storage.rate = MB
    worker = fleet.start()

    with pytest.raises(JobTimeout), worker.hold([lora(77)], JobContext(Deadline(0.7))):
        pass
    fleet.civitai.storage.rate = None
    fetch(worker, lora(77))

    assert fleet.civitai.storage.bytes_sent < 2 * MB + 500_000


KILLED = """
import os, sys
from pathlib import Path
from a1111_worker.context import Deadline, JobContext
from tests.fleet import lora, manager

def told(look):
    if look.facts["bytes"] > 600_000:
        os.kill(os.getpid(), 9)

with manager(Path(sys.argv[1]), sys.argv[2], sys.argv[3], name="dead", checkpoint=None) as worker:
    with worker.hold([lora(77)], JobContext(Deadline(30), told)):
        pass
"""


def test_a_killed_workers_lease_is_taken_over_and_its_part_goes_on(fleet: Fleet) -> None:
    served = fleet.serve(77, size=2 * MB)
    fleet.civitai.storage.rate = 2 * MB
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(fleet.folder), fleet.civitai.url, fleet.civitai.storage.url]
    )
    sent = fleet.civitai.storage.bytes_sent
    left = [path.name for path in (fleet.loras / ".leases").iterdir()]
    worker = fleet.start(stale_after=0.3)

    model = fetch(worker, lora(77))

    assert killed.returncode == -9
    assert left == ["v77"]
    assert model.sha256 == sha256_of(served)
    assert fleet.civitai.storage.bytes_sent - sent < 1_900_000  # it went on where the dead one stopped
    assert fleet.debris() == []


PAUSED = """
import sys
from dataclasses import replace
from pathlib import Path
from a1111_worker.context import Deadline, JobContext
from tests.fleet import TUNING, lora, manager

tuning = replace(TUNING, connections=1, min_range_bytes=100_000, max_range_bytes=100_000)
with manager(Path(sys.argv[1]), *sys.argv[2:], name="paused", checkpoint=None, tuning=tuning) as worker:
    with worker.hold([lora(77)], JobContext(Deadline(30))) as held:
        print(held.models[lora(77)].downloaded)
"""


@pytest.mark.parametrize(
    "fault",
    [
        Fault(),  # it goes on where it was paused
        Fault(etag='"another"'),  # it starts over
        Fault(whole=True),  # it starts over, in one stream
    ],
    ids=["goes on", "starts over", "one stream"],
)
def test_a_worker_that_was_paused_leaves_the_model_alone_that_another_made_of_its_part(
    fleet: Fleet, fault: Fault
) -> None:
    served, storage = fleet.serve(77, size=4 * MB), fleet.civitai.storage
    storage.rate = 4 * MB
    stopped = threading.Event()
    command = [sys.executable, "-c", PAUSED, str(fleet.folder), fleet.civitai.url, storage.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as paused:

        def pause() -> None:
            paused.send_signal(signal.SIGSTOP)
            stopped.set()

        storage.at(MB, pause)
        stopped.wait(30)
        storage.rate = None
        model = fetch(fleet.start(stale_after=0.3), lora(77))
        written = model.path.stat().st_mtime_ns
        storage.fail(fault, times=None)

        paused.send_signal(signal.SIGCONT)
        said, _ = paused.communicate(timeout=30)

    assert model.path.stat().st_mtime_ns == written
    assert sha256_of(model.path) == sha256_of(served)
    assert said == "False\n"  # it looked again, and the model was there
    assert fleet.debris() == []


def test_a_worker_that_lost_its_lease_goes_on_with_whoever_took_over(fleet: Fleet) -> None:
    fleet.serve(77, size=2 * MB)
    storage = fleet.civitai.storage
    storage.rate = 2 * MB
    one, other = fleet.start(), fleet.start()
    waits = threading.Event()

    def job(worker: ModelManager, told: Any) -> str:
        with worker.hold([lora(77)], JobContext(soon(), told)) as held:
            return held.models[lora(77)].file

    def lose() -> None:
        waits.wait(10)
        (fleet.loras / ".leases/v77").unlink()

    storage.at(MB // 2, lose)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(job, one, lambda look: None)
        while not (fleet.loras / ".leases/v77").exists():
            soon().wait(0.005)
        second = threads.submit(job, other, lambda look: waits.set() if "another worker" in look.detail else None)

        files = {first.result(), second.result()}

    assert files == {"Model-77_77.safetensors"}
    assert fleet.debris() == []


# -- room


def sizes(fleet: Fleet, *numbers: int, size: int = MB) -> list[ModelRef]:
    for number in numbers:
        fleet.serve(number, size=size)
    return [lora(number) for number in numbers]


def last_used(fleet: Fleet, number: int, seconds: float) -> None:
    (uses,) = fleet.loras.glob(f"*_{number}.safetensors.uses")
    os.utime(uses, (seconds, seconds))


def test_the_least_recently_used_goes_when_the_cache_is_full(fleet: Fleet) -> None:
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


def test_what_any_worker_uses_is_not_evicted(fleet: Fleet) -> None:
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


def test_a_file_bigger_than_all_that_could_go_makes_nothing_go(fleet: Fleet) -> None:
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
def test_the_files_that_come_together_keep_the_limit_together(fleet: Fleet, limit: int, fits: bool) -> None:
    refs = sizes(fleet, 1, 2, 3, 4)
    fleet.civitai.storage.latency = 0.3  # room was found for all of them before a byte of any is there
    worker = fleet.start(checkpoint=None, limit=limit)

    with worker.hold(refs, JobContext(soon()), tolerate=True) as held:
        failures = {type(error) for error in held.failures.values()}
        taken = sum((fleet.loras / file).stat().st_size for file in fleet.models_there())

    assert failures == (set() if fits else {VolumeFull})
    assert taken == (4 * MB if fits else 2 * MB)


def test_a_full_disk_is_noticed_before_a_byte_is_fetched(fleet: Fleet) -> None:
    (big,) = sizes(fleet, 1, size=9 * MB)
    with small_disk(fleet.folder / "small", 8 << 20):
        worker = fleet.start(models=fleet.folder / "small/models")

        with pytest.raises(VolumeFull):
            fetch(worker, big)

        assert fleet.civitai.storage.asked == []


def test_a_disk_that_turns_out_to_be_full_is_cleared_once(fleet: Fleet) -> None:
    # As with a quota that statvfs does not show: there was room when it was looked for.
    old, new = sizes(fleet, 1, 2, size=40 * MB)
    with small_disk(fleet.folder / "small", 160 << 20):
        models = fleet.folder / "small/models"
        worker = fleet.start(models=models)
        fetch(worker, old)
        ballast = fleet.folder / "small/ballast"

        def fill() -> None:
            free = shutil.disk_usage(fleet.folder / "small").free
            ballast.write_bytes(bytes(max(0, free - 10 * MB)))
            fleet.civitai.before_a_link = None

        # after room was looked for, and before the part is allocated
        fleet.civitai.before_a_link = fill
        model = fetch(worker, new)

        assert model.downloaded
        assert [path.name for path in (models / "loras").glob("*.safetensors")] == ["Model-2_2.safetensors"]


def test_a_cache_that_was_tidied_up_under_a_worker_goes_on(fleet: Fleet) -> None:
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


def test_a_full_disk_that_cannot_be_made_large_enough_keeps_what_it_has(fleet: Fleet) -> None:
    (old,) = sizes(fleet, 1, size=20 * MB)
    (new,) = sizes(fleet, 2, size=60 * MB)
    with small_disk(fleet.folder / "small", 160 << 20):
        models = fleet.folder / "small/models"
        worker = fleet.start(models=models)
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


# -- folders that cannot be written, and sources


def test_a_cache_that_cannot_be_written_is_used_for_what_it_has(fleet: Fleet) -> None:
    fleet.serve(1)
    fleet.serve(2)
    fetch(fleet.start(), lora(1))
    with read_only(fleet.models):
        worker = fleet.start()

        with worker.hold([lora(1), lora(2)], JobContext(soon())) as held:
            there, fetched = held.models[lora(1)], held.models[lora(2)]
            link = fleet.folder / "container2/webui/Lora" / fetched.file
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


def test_without_any_folder_to_write_to_what_is_missing_is_volume_full(fleet: Fleet) -> None:
    fleet.serve(1)
    (fleet.folder / "file").touch()
    (fleet.folder / "container1").mkdir()
    (fleet.folder / "container1/local").touch()
    worker = fleet.start(models=fleet.folder / "file/models")

    with pytest.raises(VolumeFull):
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


def test_a_source_that_is_the_cache_or_is_not_there_is_no_source(fleet: Fleet) -> None:
    worker = fleet.start(sources=[fleet.models, fleet.folder / "missing"])

    assert worker.library.shelves.sources == ()


def test_vaes_of_the_cache_and_of_sources_are_shown_to_the_webui(fleet: Fleet) -> None:
    sdxl_lora(fleet.models / "vae/fine.safetensors", 1)
    sdxl_lora(fleet.folder / "source/VAE/baked.safetensors", 1)
    (fleet.models / "vae/bad.safetensors").write_text("<html>")

    fleet.start(sources=[fleet.folder / "source"])

    shown = sorted(path.name for path in (fleet.folder / "container1/webui/VAE").iterdir())
    assert shown == ["baked.safetensors", "fine.safetensors"]


def test_a_model_that_goes_between_being_found_and_being_taken_is_not_there(fleet: Fleet) -> None:
    fleet.serve(77)
    worker = fleet.start()
    fetch(worker, lora(77))
    found = worker.library.find(lora(77), fresh=True)
    assert found is not None

    (fleet.loras / found.record.file).unlink()
    taken = worker.library.take(found, soon())

    assert taken is None
    assert list((fleet.loras / ".holds").iterdir()) == []

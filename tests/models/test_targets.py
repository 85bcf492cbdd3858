"""What is fetched, and what its file is called: whole managers, the sandbox's CivitAI, real folders."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from a1111_worker.context import JobContext
from a1111_worker.domain import ModelKind, ModelRef
from sandbox.models import sdxl_lora, sha256_of
from tests.fleet import DETAIL, Fleet, fetch, lora, named, soon

MB = 1_000_000


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
    variant = lora(77, size="pruned", fp="fp16")

    models = [fetch(worker, ref) for ref in (lora(77), lora(77, file_id=2), variant, lora(77, file_id=1))]
    before = len(fleet.asked())
    again = [fetch(worker, ref) for ref in (lora(77), lora(77, file_id=2), variant, lora(77, file_id=1))]

    assert [model.sha256 for model in models] == [sha256_of(path) for path in (full, pruned, pruned, full)]
    assert fleet.models_there() == ["Model-77_77.safetensors", "Model-77_77_2.safetensors"]
    assert [model.file for model in again] == [model.file for model in models]
    assert len(fleet.asked()) == before  # which file the filter selects is remembered


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


def test_a_warning_reaches_every_job_that_it_concerns_and_no_other(fleet: Fleet) -> None:
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

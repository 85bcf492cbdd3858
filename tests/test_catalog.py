"""The models that this worker knows by name."""

from __future__ import annotations

import re
from typing import Any

import pytest

from a1111_worker import catalog
from a1111_worker.domain import ModelKind, ModelRef


def lora(**ref: Any) -> ModelRef:
    return ModelRef(kind=ModelKind.LORA, **ref)


@pytest.mark.parametrize(
    ("ref", "resolved"),
    [
        # a title or a file's stem, in any case; the name stays what the caller calls it
        (lora(name="Detail Tweaker XL"), lora(name="Detail Tweaker XL", version_id=135867)),
        (lora(name="REAL_SKIN_SLIDER"), lora(name="REAL_SKIN_SLIDER", version_id=1681921)),
        (lora(name=" real_skin_slider.safetensors"), lora(name=" real_skin_slider.safetensors", version_id=1681921)),
        # a hash beside the name stays
        (lora(name="real_skin_slider", sha256="ab"), lora(name="real_skin_slider", sha256="ab", version_id=1681921)),
        # any other bare name only loses its ending
        (lora(name="my_own"), lora(name="my_own")),
        (lora(name="my_own.safetensors"), lora(name="my_own")),
        (lora(name=".safetensors"), lora(name=".safetensors")),
        # beside an id or a URL, a name means nothing
        (lora(name="real_skin_slider", version_id=5), lora(name="real_skin_slider", version_id=5)),
        (lora(name="real_skin_slider", model_id=5), lora(name="real_skin_slider", model_id=5)),
        (
            lora(name="own.safetensors", url="https://x.example/a"),
            lora(name="own.safetensors", url="https://x.example/a"),
        ),
        # the catalog's names are LoRAs
        (
            ModelRef(ModelKind.CHECKPOINT, name="real_skin_slider"),
            ModelRef(ModelKind.CHECKPOINT, name="real_skin_slider"),
        ),
    ],
)
def test_a_bare_name_of_the_catalog_means_its_version(ref: ModelRef, resolved: ModelRef) -> None:
    assert catalog.resolve(ref) == resolved
    assert catalog.resolve(resolved) == resolved


def test_every_lora_is_found_by_its_version_its_title_and_its_stem() -> None:
    for known in catalog.LORAS:
        assert catalog.lora_of_version(known.version_id) is known
        assert catalog.lora_named(known.title) is known
        assert catalog.lora_named(known.stem) is known
    assert catalog.lora_of_version(1) is None
    assert catalog.lora_named("nothing like it") is None


def test_names_and_files_of_the_catalog_are_unique_and_plain() -> None:
    names = [name.casefold() for known in catalog.LORAS for name in {known.title, known.stem}]

    assert len(set(names)) == len(names)
    for file in (catalog.CHECKPOINT_FILE, *(known.file for known in catalog.LORAS)):
        assert re.fullmatch(r"[a-z0-9_]+\.safetensors", file)

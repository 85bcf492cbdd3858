"""The few things that the nouns compute."""

from __future__ import annotations

from pathlib import Path

import pytest

from a1111_worker.domain import BucketSettings, Model, ModelKind, ModelRef


@pytest.mark.parametrize(
    ("ref", "label", "is_bare_name"),
    [
        (ModelRef(ModelKind.LORA, name="x"), "'x'", True),
        (ModelRef(ModelKind.LORA, name="x", version_id=5), "'x'", False),
        (ModelRef(ModelKind.LORA, version_id=5), "CivitAI version 5", False),
        (ModelRef(ModelKind.LORA, model_id=7), "CivitAI model 7", False),
        (ModelRef(ModelKind.LORA, url="https://cdn.example.com/a?sig=secret"), "the file of its URL", False),
    ],
)
def test_a_message_names_a_model_and_never_its_url(ref: ModelRef, label: str, is_bare_name: bool) -> None:
    assert (ref.label, ref.is_bare_name) == (label, is_bare_name)


def test_each_kind_of_model_has_its_folder() -> None:
    assert [kind.folder for kind in ModelKind] == ["checkpoints", "loras", "embeddings", "vaes", "controlnet"]


@pytest.mark.parametrize(
    ("kind", "version_id", "file", "shown"),
    [
        (ModelKind.LORA, None, "a_file.safetensors", "a_file_01234567"),
        (ModelKind.LORA, 7, "a_file_7.safetensors", "a_file_7_01234567"),
        (ModelKind.LORA, None, "é #<=>:,(1).v2 -.safetensors", "_ _______1_.v2 -_01234567"),
        (ModelKind.LORA, None, f"{'x' * 243}.safetensors", f"{'x' * 200}_01234567"),
        (ModelKind.CHECKPOINT, 7, "a_file_7.safetensors", "a_file_7"),  # a version never changes
        (ModelKind.CHECKPOINT, None, "a file.safetensors", "a file_01234567"),  # put there by hand
    ],
)
def test_the_webui_calls_a_model_by_a_name_of_its_content(
    kind: ModelKind, version_id: int | None, file: str, shown: str
) -> None:
    model = Model(kind, "A title", file, Path("x"), "0123456789abcdef" * 4, 1, version_id=version_id)

    assert (model.shown, model.shown_file) == (shown, f"{shown}.safetensors")


def test_the_keys_of_a_bucket_are_never_printed() -> None:
    settings = BucketSettings("https://s3.example.com", "results", "key-id-1", "secret-1")

    assert "key-id-1" not in repr(settings) and "secret-1" not in repr(settings)

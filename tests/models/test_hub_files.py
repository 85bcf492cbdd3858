"""The names of files of Hugging Face: every form that is one, and every form that is refused."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from a1111_worker.domain import HubFile, ModelKind, ModelRef
from a1111_worker.models.hub_files import hub_file_of
from a1111_worker.models.references import BadReference, parse_reference

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PINNED = HubFile("a/b", "x.safetensors", COMMIT)


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("hf:a/b/x.safetensors", HubFile("a/b", "x.safetensors", "main")),
        ("HF:a/b/sub/x y.safetensors", HubFile("a/b", "sub/x y.safetensors")),
        (f"hf:a/b/x.safetensors@{COMMIT}", PINNED),
        ("hf:a/b/x.safetensors@refs/pr/3", HubFile("a/b", "x.safetensors", "refs/pr/3")),
        ("hf:a/b/x@2.safetensors@v1.0", HubFile("a/b", "x@2.safetensors", "v1.0")),
        ("hf:0-a.B_c/d_E.f-1/x.safetensors", HubFile("0-a.B_c/d_E.f-1", "x.safetensors")),
        # pages and downloads, under every name of the hub
        ("https://huggingface.co/a/b/blob/main/x.safetensors", HubFile("a/b", "x.safetensors")),
        ("https://huggingface.co/a/b/resolve/main/x.safetensors?download=true", HubFile("a/b", "x.safetensors")),
        (f"https://hf.co/a/b/resolve/{COMMIT}/x.safetensors", PINNED),
        (
            "HTTPS://www.HuggingFace.co/a/b/blob/v1/sub/x%20y%231.safetensors",
            HubFile("a/b", "sub/x y#1.safetensors", "v1"),
        ),
        # a branch with a slash in it: as the hub writes it, and the two forms that it takes unescaped
        ("https://huggingface.co/a/b/blob/some%2Fbranch/x.safetensors", HubFile("a/b", "x.safetensors", "some/branch")),
        ("https://huggingface.co/a/b/blob/refs/pr/3/x.safetensors", HubFile("a/b", "x.safetensors", "refs/pr/3")),
        (
            "https://huggingface.co/a/b/resolve/refs%2Fpr%2F3/x.safetensors",
            HubFile("a/b", "x.safetensors", "refs/pr/3"),
        ),
    ],
)
def test_every_form_of_a_file_is_reduced_to_its_repository_path_and_revision(text: str, file: HubFile) -> None:
    for value in (text, {"url": text}):
        assert parse_reference(value, kind=ModelKind.LORA) == ModelRef(ModelKind.LORA, hub=file)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("hf:a/b", "ends with .safetensors"),
        ("hf:a/x.safetensors", "ends with .safetensors"),
        ("hf:a/b/x.ckpt", "may run code"),
        ("hf:a/b/x.pt@main", "may run code"),
        ("hf:a/b/x.safetensors@", "revision"),
        ("hf:a/b/x.safetensors@a..b/../c", "revision"),
        ("hf:a/b/x.safetensors@a b", "revision"),
        ("hf:a/b/../x.safetensors", "path"),
        ("hf:a/b//x.safetensors", "path"),
        ("hf:a/b/x\\y.safetensors", "path"),
        (f"hf:a/b/{'x' * 600}.safetensors", "path"),
        ("hf:../b/x.safetensors", "OWNER/REPO"),
        ("hf:a/b--c/x.safetensors", "OWNER/REPO"),  # it would be another folder of the cache
        ("hf:a/-b/x.safetensors", "OWNER/REPO"),
        ("hf:a b/c/x.safetensors", "OWNER/REPO"),
        ("https://huggingface.co/a/b", "page of a model's file"),
        ("https://huggingface.co/a/b/tree/main", "page of a model's file"),
        ("https://huggingface.co/datasets/a/b/blob/main/x.safetensors", "page of a model's file"),
        ("https://huggingface.co/a/b/blob/main/x.bin", "may run code"),
        ("https://huggingface.co/a/b/blob/main/..%2F..%2Fx.safetensors", "path"),
        ("https://huggingface.co/a/b/blob/..%2F../x.safetensors", "revision"),
        ("https://huggingface.co/a%2Fc/b/blob/main/x.safetensors", "OWNER/REPO"),
        ("https://user:pw@huggingface.co/a/b/blob/main/x.safetensors", "password"),
        ("http://huggingface.co/a/b/blob/main/x.safetensors", "https://"),
        ("https://huggingface.co.example.com/a/b/blob/main/x.safetensors", "MODEL_HOSTS"),
    ],
)
def test_what_is_no_file_of_a_repository_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(BadReference) as refused:
        parse_reference(text, kind=ModelKind.LORA)

    assert reason in str(refused.value)


def test_a_version_id_beside_a_file_of_the_hub_is_a_contradiction() -> None:
    with pytest.raises(BadReference, match="contradicts url"):
        parse_reference({"url": "hf:a/b/x.safetensors", "version_id": 1}, kind=ModelKind.LORA)


@given(st.text(alphabet="ab./@%2F-_ \\\n\x00:é", max_size=40))
@example("a/b/x.safetensors")
@example("a/b/é %.safetensors@refs/pr/1")
def test_any_text_is_refused_or_names_a_file_that_cannot_lead_elsewhere(text: str) -> None:
    for form in (f"hf:{text}.safetensors", f"https://huggingface.co/{text}.safetensors"):
        try:
            file = parse_reference(form, kind=ModelKind.LORA).hub
        except BadReference:
            continue

        assert file is not None
        assert hub_file_of(file.url) == file
        assert not {"", ".", ".."} & {*file.path.split("/"), *file.revision.split("/"), *file.repo.split("/")}
        assert file.url.isascii() and " " not in file.url


@pytest.mark.parametrize("url", [None, "", "https://civitai.com/x", "https://huggingface.co/a/b/tree/main"])
def test_other_urls_are_no_files_of_the_hub(url: str | None) -> None:
    assert hub_file_of(url) is None

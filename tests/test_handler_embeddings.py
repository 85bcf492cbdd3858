"""Whole jobs with embeddings and VAEs: the real worker, the sandbox's WebUI and CivitAI."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox.models import sd15_embedding, sdxl_embedding, sha256_of, vae
from tests.support import World, world

EASY, FINE = 9208, 333245


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    with world(folder) as it:
        path = sdxl_embedding(folder / "EasyNegative.safetensors", 1)
        it.civitai.add(EASY, path, name="Easy Negative XL", base_model="SDXL 1.0", model_type="TextualInversion")
        it.civitai.add(FINE, vae(folder / "fine.safetensors"), name="Fine", base_model="SDXL 1.0", model_type="VAE")
        it.civitai.add(
            7, sd15_embedding(folder / "old.safetensors"), base_model="SD 1.5", model_type="TextualInversion"
        )
        it.civitai.add(8, vae(folder / "old-vae.safetensors", 2), base_model="SD 1.5", model_type="VAE")
        yield it


def word_of(it: World) -> str:
    """The WebUI's word for the embedding. The first job that fetches it has named its file."""
    (file,) = (it.models_dir / "embeddings").glob(f"*_{EASY}.safetensors")
    return f"{file.stem}_{sha256_of(file)[:8]}"


def sent(it: World, field: str) -> Any:
    return it.generations()[-1].get(field)


def test_a_listed_embedding_is_named_by_its_plain_names_in_every_prompt(shared: World) -> None:
    answer = shared.ask(
        prompt="a dog, (my own:1.2) <lora:detail_tweaker_xl:1>",
        negative_prompt="EASYNEGATIVE, uneasynegative",
        embeddings=[{"version_id": EASY, "name": "My own"}],
    )

    word = word_of(shared)
    assert sent(shared, "prompt").startswith(f"a dog, ({word}:1.2) <lora:")
    assert sent(shared, "negative_prompt") == f"{word}, uneasynegative"
    (embedding,) = answer["worker"]["embeddings"]
    assert (embedding["version_id"], embedding["word"], embedding["loaded"]) == (EASY, word, True)
    assert embedding["sha256"] == sha256_of(shared.folder / "EasyNegative.safetensors")
    listed = json.loads(answer["info"])["extra_generation_params"]["TI hashes"]
    assert listed.split(", ") == [f"{word}: {embedding['sha256'][:12]}"] * 2
    assert answer["worker"]["warnings"] == []


def test_a_constant_negative_prompt_is_proven_by_the_job_that_had_it_before(shared: World) -> None:
    first = shared.ask(prompt="one", negative_prompt="easynegative, bad", embeddings=[{"version_id": EASY}])
    second = shared.ask(prompt="two", negative_prompt="easynegative, bad", embeddings=[{"version_id": EASY}])

    assert "TI hashes" not in json.loads(second["info"])["extra_generation_params"]  # A1111 did not read it again
    assert [answer["worker"]["embeddings"][0]["loaded"] for answer in (first, second)] == [True, True]


def test_a_prompt_that_was_never_proven_is_not_proven_by_its_repetition(tmp_path: Path) -> None:
    with world(tmp_path) as it:
        path = sdxl_embedding(tmp_path / "EasyNegative.safetensors", 1)
        it.civitai.add(EASY, path, name="Easy Negative XL", base_model="SDXL 1.0", model_type="TextualInversion")
        named: dict[str, Any] = {"negative_prompt": "easynegative", "embeddings": [{"version_id": EASY}]}
        it.ask(prompt="one", **named)
        it.stop()
        it.boot()  # another worker: A1111 still has the negative prompt in memory, and this worker has seen no proof

        answers = [it.ask(prompt=prompt, **named) for prompt in ("two", "three")]

    assert [answer["worker"]["embeddings"][0]["loaded"] for answer in answers] == [False, False]


def test_the_plain_name_of_a_fetched_embedding_is_a_word_in_other_jobs(shared: World) -> None:
    shared.ask(prompt="easynegative", embeddings=[{"version_id": EASY}])

    plain = shared.ask(prompt="easynegative")
    by_word = shared.ask(prompt=f"a {word_of(shared)} dog")

    assert plain["worker"]["embeddings"] == []
    assert [embedding["version_id"] for embedding in by_word["worker"]["embeddings"]] == [EASY]
    assert by_word["worker"]["embeddings"][0]["loaded"]


def test_the_stem_of_an_operators_embedding_is_its_name_in_every_job(shared: World) -> None:
    path = sdxl_embedding(shared.models_dir / "embeddings/House Style.safetensors", 5)

    answer = shared.ask(prompt="a dog in house style")

    (embedding,) = answer["worker"]["embeddings"]
    assert embedding["word"] == f"House_Style_{sha256_of(path)[:8]}"
    assert (embedding["file"], embedding["loaded"]) == ("House Style.safetensors", True)
    assert sent(shared, "prompt") == f"a dog in {embedding['word']}"


def test_the_texts_of_a_script_and_of_styles_have_the_webuis_word_too(shared: World) -> None:
    script: dict[str, Any] = {
        "script_name": "prompts from file or textbox",
        "script_args": [False, False, "start", "easynegative\nb"],
    }

    answer = shared.ask(embeddings=[{"version_id": EASY}], **script)

    assert sent(shared, "script_args")[3] == f"{word_of(shared)}\nb"
    assert answer["worker"]["embeddings"][0]["loaded"]


def test_an_embedding_that_no_prompt_names_is_a_warning(shared: World) -> None:
    answer = shared.ask(prompt="a dog", embeddings=[{"version_id": EASY}])

    assert not answer["worker"]["embeddings"][0]["loaded"]
    assert "no prompt of the job names the embedding" in answer["worker"]["warnings"][0]


def test_a_vae_is_fetched_used_and_proven_by_its_name_and_undone_after_the_job(shared: World) -> None:
    answer = shared.ask(vae={"version_id": FINE})
    plain = shared.ask()

    shown = f"~Fine_{FINE}_{sha256_of(shared.folder / 'fine.safetensors')[:8]}.safetensors"
    assert json.loads(answer["info"])["sd_vae_name"] == shown
    vae = answer["worker"]["vae"]
    assert (vae["version_id"], vae["sha256"]) == (FINE, sha256_of(shared.folder / "fine.safetensors"))
    assert (json.loads(plain["info"])["sd_vae_name"], plain["worker"]["vae"]) == (None, None)
    for name in (f"Fine_{FINE}", shown, "fine_333245.safetensors"):
        assert shared.ask(vae=name)["worker"]["vae"]["version_id"] == FINE
        assert shared.ask(override_settings={"sd_vae": name})["worker"]["vae"]["version_id"] == FINE


REFUSED = [
    # what another family made, what nobody has, what is no such file
    ({"embeddings": [{"version_id": 7}], "prompt": "old"}, "MODEL_REJECTED", "SD 1.5"),
    ({"vae": {"version_id": 8}}, "MODEL_REJECTED", "SD 1.5"),
    ({"vae": "nobodys"}, "MODEL_NOT_FOUND", "nobodys"),
    ({"vae": {"version_id": EASY}}, "MODEL_REJECTED", "no VAE"),
    ({"embeddings": [{"version_id": FINE}]}, "MODEL_REJECTED", "no embedding"),
    ({"embeddings": ["hf:a/b/bad.pt", {"version_id": 0}, 5]}, "INVALID_REQUEST", "may run code"),
    ({"embeddings": [{"version_id": 7}, {"version_id": 7}]}, "INVALID_REQUEST", "the same embedding"),
    ({"vae": {"name": "../x"}}, "INVALID_REQUEST", "vae.name"),
    ({"vae": 5}, "INVALID_REQUEST", "vae"),
]


@pytest.mark.parametrize(("given", "code", "words"), REFUSED)
@pytest.mark.parametrize("on_lora_error", ["fail", "warn"])
def test_what_does_not_fit_is_refused_before_the_gpu_is_asked(
    shared: World, given: dict[str, Any], code: str, words: str, on_lora_error: str
) -> None:
    before = len(shared.generations())

    answer = shared.ask(on_lora_error=on_lora_error, **given)

    assert answer["code"] == code
    assert words in answer["error"]
    assert len(shared.generations()) == before


def test_embeddings_and_vaes_are_prefetched(shared: World) -> None:
    job = {"task": "prefetch", "embeddings": [{"version_id": EASY}, "nobodys"], "vaes": [{"version_id": FINE}]}

    found = shared.run({"id": "job-1", "input": job})["prefetch"]

    assert [entry.get("tag", entry.get("code")) for entry in found["embeddings"]] == [
        word_of(shared),
        "MODEL_NOT_FOUND",
    ]
    assert found["vaes"][0]["file"].endswith(f"_{FINE}.safetensors")

"""The sandbox's WebUI against recorded answers: embeddings and VAEs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import models
from sandbox.webui import SandboxWebUI
from tests.sandbox.webui_client import VERSIONS, get, pixels, post, recordings, switch

# What was asked before a recorded request, by its name: the prompt, the negative prompt.
BEFORE = {"emb_constant_negative": ("one", "tinyemb"), "emb_space": ("a My Emb thing", "")}


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small versions of the files with which the recordings were made."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("tiny_a", "tiny_b")):
        models.sd15_checkpoint(folder / f"Stable-diffusion/{name}.safetensors", seed)
    for seed, (name, vectors) in enumerate({"tinyemb": 3, "ptemb": 2, "My Emb": 2}.items()):
        tensors: models.Tensors = {"emb_params": ("F32", (vectors, 768))}
        models.write_safetensors(folder / f"embeddings/{name}.safetensors", tensors, seed=seed)
    models.write_safetensors(folder / "embeddings/emb_sd2.safetensors", {"emb_params": ("F32", (2, 1024))})
    models.sdxl_embedding(folder / "embeddings/emb_sdxl.safetensors")
    models.sd15_lora(folder / "embeddings/no_embedding.safetensors")
    for seed, name in enumerate(("tiny_vae", "second", "tiny_b.vae")):
        models.vae(folder / f"VAE/{name}.safetensors", seed)
    os.utime(folder / "VAE/second.safetensors", (1, 1))
    (folder / "VAE/bad.safetensors").write_bytes(b"\xff" * 64)
    models.sd15_lora(folder / "VAE/partial.safetensors")
    return folder


@pytest.fixture
def embeddings(model_files: Path) -> Iterator[Path]:
    """The folder of embeddings. What a test puts there is gone after it."""
    folder = model_files / "embeddings"
    before = set(folder.iterdir())
    yield folder
    for path in set(folder.iterdir()) - before:
        path.unlink()


@pytest.fixture
def servers(model_files: Path) -> Iterator[dict[str, SandboxWebUI]]:
    running = {version: SandboxWebUI(model_files, version=version) for version in VERSIONS}
    for server in running.values():
        server.start()
    yield running
    for server in running.values():
        server.stop()


def masked(value: object) -> object:
    """Digits of hashes are those of other files."""
    return re.sub(r"(?<=: )[0-9a-f]{12}", "H", value) if isinstance(value, str) else value


def facts(answer: dict[str, Any]) -> tuple[Any, Any, Any]:
    info = json.loads(answer["info"])
    params = {key: masked(value) for key, value in info["extra_generation_params"].items() if key != "Schedule type"}
    return params, info["sd_vae_name"], info["sd_model_name"]


@pytest.mark.parametrize(("version", "path"), recordings("embeddings", "emb_*"))
def test_embeddings_are_used_and_reported_as_recorded(
    servers: dict[str, SandboxWebUI], embeddings: Path, version: str, path: Path
) -> None:
    recorded, webui = json.loads(path.read_text(encoding="utf-8")), servers[version]
    if path.stem in ("emb_word_collision", "emb_list_after_refresh"):
        models.write_safetensors(embeddings / "dog.safetensors", {"emb_params": ("F32", (1, 768))})
    switch(webui, "tiny_a")
    if path.stem == "emb_list_after_refresh":
        post(webui, "refresh-embeddings", {})
        listed = get(webui, "embeddings")
        expected = recorded["response"]["body"]
        expected["loaded"]["ptemb"]["step"] = None  # the recorded one was a .pt
        assert listed == expected
        return
    body = recorded["request"]["body"]
    if path.stem in BEFORE:
        prompt, negative = BEFORE[path.stem]
        post(webui, "txt2img", {**body, "prompt": prompt, "negative_prompt": negative})

    answer = post(webui, "txt2img", body)

    assert facts(answer.json()) == facts(recorded["response"]["body"])


def test_an_embedding_acts_though_a_prompt_is_not_read_again(servers: dict[str, SandboxWebUI]) -> None:
    webui = servers["1.10.1"]
    switch(webui, "tiny_a")
    body = {"prompt": "a dog", "steps": 2, "seed": 3, "width": 64, "height": 64}

    first, again, without = (
        post(webui, "txt2img", {**body, "negative_prompt": negative}).json()
        for negative in ("tinyemb", "tinyemb", "tiny-emb")
    )

    assert [("TI hashes" in facts(answer)[0]) for answer in (first, again, without)] == [True, False, False]
    drawn = [pixels(answer["images"][0]) for answer in (first, again, without)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(("version", "path"), recordings("embeddings", "vae_*"))
def test_vaes_are_used_and_reported_as_recorded(servers: dict[str, SandboxWebUI], version: str, path: Path) -> None:
    recorded, webui = json.loads(path.read_text(encoding="utf-8")), servers[version]
    near = path.stem == "vae_near_checkpoint"
    switch(webui, "tiny_b" if near else "tiny_a")
    body = recorded["request"]["body"]
    if path.stem in ("vae_after_override", "vae_second_older_mtime"):
        post(webui, "txt2img", {**body, "override_settings": {"sd_vae": "tiny_vae.safetensors"}})
    names = {"vae_bad_override": "bad.safetensors", "vae_partial_override": "partial.safetensors"}
    if path.stem in names:
        body["override_settings"]["sd_vae"] = names[path.stem]

    answer = post(webui, "txt2img", body)

    assert answer.status_code == recorded["response"]["status"]
    expected = recorded["response"]["body"]
    if answer.status_code != 200:
        assert answer.json()["error"] == expected["error"]
        assert answer.json()["errors"].partition("\n")[0] == expected["errors"].partition("\n")[0]
        return
    assert facts(answer.json())[1:] == facts(expected)[1:]


def test_the_hash_of_a_vae_may_be_another_vaes(servers: dict[str, SandboxWebUI]) -> None:
    webui = servers["1.10.1"]
    body = {"prompt": "a dog", "steps": 2, "width": 64, "height": 64}

    hashes = [
        json.loads(post(webui, "txt2img", {**body, "override_settings": {"sd_vae": name}}).json()["info"])[
            "sd_vae_hash"
        ]
        for name in ("tiny_vae.safetensors", "second.safetensors")
    ]

    assert hashes[0] == hashes[1]

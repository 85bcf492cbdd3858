"""What an answer must show before it is believed, with answers in the recorded form of A1111 1.10.1."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from a1111_worker.domain import AppliedLora, Model, ModelKind, OnLoraError
from a1111_worker.errors import CheckpointNotLoaded, GenerationFailed, LoraNotApplied, WebUILost, WorkerError
from a1111_worker.webui.verification import GenerationPlan, lora_hashes, verify
from tests.images import a1111_png, gradient
from tests.support import DATA

CHECKPOINT = Model(
    kind=ModelKind.CHECKPOINT,
    name="The Model",
    file="the_model.safetensors",
    path=Path("x"),
    sha256="ab" * 32,
    size=1,
    version_id=1,
)


def lora(stem: str = "detail", digits: str = "eb0b8ef669e5") -> AppliedLora:
    model = Model(
        kind=ModelKind.LORA,
        name=stem.title(),
        file=f"{stem}.safetensors",
        path=Path("x"),
        sha256="cd" * 32,
        size=1,
        lora_hash=digits,
    )
    return AppliedLora(name=stem.title(), scale=1.0, model=model, loaded=False)


def answer(**changes: Any) -> dict[str, Any]:
    info = {
        "all_seeds": [42],
        "sampler_name": "Euler a",
        "sd_model_name": "the_model",
        "sd_model_hash": "abababababab"[:10],
        "extra_generation_params": {"Lora hashes": "detail_cdcdcdcd: eb0b8ef669e5"},
        "infotexts": ["a cat\nSteps: 3, Seed: 42, Model hash: ababababab, Model: the_model, Version: v1.10.1"],
        "version": "v1.10.1",
        **changes.pop("info", {}),
    }
    return {"images": [picture()], "parameters": {}, "info": json.dumps(info), **changes}


def picture(text: str | None = None) -> str:
    """An image whose own text is this; None: it has none."""
    return a1111_png(gradient(), text)


def test_an_answer_that_shows_everything_is_returned_unchanged() -> None:
    found = answer()

    generation = verify(found, GenerationPlan({"sampler_name": "Euler a"}, (lora(),)), CHECKPOINT)

    assert generation.answer is found
    assert generation.seeds == (42,)
    assert generation.webui_version == "v1.10.1"
    assert [applied.loaded for applied in generation.loras] == [True]


OTHER = replace(CHECKPOINT, name="Other", file="other.safetensors", sha256="ef" * 32)
HIRES = 'a cat\nSteps: 3, Model hash: ababababab, Hires prompt: "a, Refiner: x [0123456789]"'
REFINED = "a cat\nSteps: 3, Model hash: ababababab, Refiner: {}, Refiner switch at: 0.5"


# what A1111 names (None: nothing), and whether that is proof that the refiner has drawn
@pytest.mark.parametrize(
    ("named", "proven"),
    [("other [efefefefef]", True), ("other", True), (None, False), ("other [0123456789]", None), ("x", None)],
)
def test_a_refiner_is_proven_by_its_name_and_its_hash(named: str | None, proven: bool | None) -> None:
    found = answer(info={"infotexts": [REFINED.format(named) if named else HIRES]})
    plan = GenerationPlan({"refiner_switch_at": 0.5}, (lora(),), refiner=OTHER)

    if proven is None:
        with pytest.raises(CheckpointNotLoaded, match="another checkpoint than Other"):
            verify(found, plan, CHECKPOINT)
        return
    generation = verify(found, plan, CHECKPOINT)
    assert generation.refiner == (OTHER if proven else None)
    assert len(generation.warnings) == (0 if proven else 1)


@pytest.mark.parametrize("named", [None, "Hires checkpoint: other [0123456789]", "Hires checkpoint: x [efefefefef]"])
def test_an_answer_that_does_not_name_the_hires_checkpoint_is_refused(named: str | None) -> None:
    found = answer(info={"infotexts": [HIRES if named is None else f"{HIRES}, {named}"]})

    with pytest.raises(CheckpointNotLoaded):
        verify(found, GenerationPlan({}, (lora(),), hires_checkpoint=OTHER), CHECKPOINT)


# the answer with what is wrong with it, the body that was sent, and the error
REFUSED: list[tuple[Any, dict[str, Any], type[WorkerError]]] = [
    (None, {}, WebUILost),  # `null` is no answer of txt2img
    ([], {}, WebUILost),
    (answer(images="no list"), {}, WebUILost),
    (answer(info={}) | {"info": "not JSON"}, {}, WebUILost),
    (answer(info={}) | {"info": "[]"}, {}, WebUILost),
    (answer(images=[]), {}, GenerationFailed),  # send_images was false, or an extension took them
    (answer(images=["PHNjcmlwdD4="]), {}, GenerationFailed),  # no PNG
    (answer(images=["iVBORw0KGgoAAAA"]), {}, GenerationFailed),  # only its beginning
    (answer(images=[None]), {}, GenerationFailed),
    (answer(), {"n_iter": 3}, GenerationFailed),  # interrupted by somebody else: fewer than asked for
    (answer(info={"sampler_name": "DPM++ 2M"}), {"sampler_name": "Euler a"}, GenerationFailed),  # 1.10.1's fallback
    (answer(info={"sd_model_name": "another"}), {}, CheckpointNotLoaded),
    (answer(info={"sd_model_hash": "0123456789"}), {}, CheckpointNotLoaded),
    (answer(info={"sd_model_hash": None}), {}, CheckpointNotLoaded),  # --no-hashing: nothing can be verified
    (  # an X/Y/Z plot over checkpoints: info names the first one alone
        answer(info={"infotexts": ["a\nModel hash: ababababab, Model: x", "a\nModel hash: 0123456789, Model: y"]}),
        {"script_name": "x/y/z plot"},
        CheckpointNotLoaded,
    ),
    (  # text in quotes that is no JSON: not written by A1111
        answer(info={"infotexts": ['a\nModel hash: ababababab, Lora hashes: "\\q: 1"']}),
        {"script_name": "x/y/z plot"},
        WebUILost,
    ),
    (answer(info={}) | {"info": "[" * 100_000}, {}, WebUILost),  # nested deeper than JSON is read
]


@pytest.mark.parametrize(("found", "body", "error"), REFUSED)
def test_an_answer_that_shows_less_is_refused(found: Any, body: dict[str, Any], error: type[WorkerError]) -> None:
    with pytest.raises(error):
        verify(found, GenerationPlan(body), CHECKPOINT)


def test_a_model_hash_in_a_prompt_is_ignored() -> None:
    found = answer(info={"infotexts": ["Model hash: 0123456789, a cat\nSteps: 1, Model hash: ababababab, Model: x"]})

    verify(found, GenerationPlan({}), CHECKPOINT)


def test_a_model_hash_in_the_prompt_of_the_second_pass_is_ignored() -> None:
    facts = 'Steps: 1, Model hash: ababababab, Model: x, Hires prompt: "a cat, Model hash: 0123456789, \\"x\\""'

    verify(answer(info={"infotexts": [f"a cat\n{facts}"]}), GenerationPlan({}), CHECKPOINT)


def answer_of_script(*infotexts: str, **info: Any) -> dict[str, Any]:
    return answer(images=[picture(text) for text in infotexts], info={"infotexts": list(infotexts), **info})


OURS = "a cat\nSteps: 3, Seed: 7, Model hash: ababababab, Model: the_model"
NAMED = OURS.replace("a cat", "a cat <lora:detail_cdcdcdcd:1>")
WITH_LORA = f'{NAMED}, Lora hashes: "detail_cdcdcdcd: eb0b8ef669e5, style_a_v3: 50ad9ef0eac1", Version: v1.10.1'
NO_IMAGES_INFO: dict[str, Any] = {
    "sd_model_name": None,
    "sd_model_hash": None,
    "extra_generation_params": {},
}  # the answer of Prompts from file


def test_an_info_of_no_image_is_replaced_by_the_infotext_of_each_image() -> None:
    plan = GenerationPlan({"script_name": "prompts from file or textbox"}, (lora(),))

    generation = verify(answer_of_script(WITH_LORA, WITH_LORA, **NO_IMAGES_INFO), plan, CHECKPOINT)

    assert [applied.loaded for applied in generation.loras] == [True]


@pytest.mark.parametrize("infotexts", [(), (OURS, "a cat\nSteps: 3"), (OURS, OURS.replace("ababababab", "0123456789"))])
def test_a_script_whose_images_do_not_all_name_the_checkpoint_is_refused(infotexts: tuple[str, ...]) -> None:
    found = answer_of_script(*infotexts, **NO_IMAGES_INFO) | {"images": [picture()]}

    with pytest.raises(CheckpointNotLoaded):
        verify(found, GenerationPlan({"script_name": "prompts from file or textbox"}), CHECKPOINT)


def test_without_a_script_the_answer_itself_must_name_the_checkpoint() -> None:
    with pytest.raises(CheckpointNotLoaded):
        verify(answer_of_script(OURS, **NO_IMAGES_INFO), GenerationPlan({}), CHECKPOINT)


# the texts of a script's images, and what the answer says of the LoRA: loaded, and for how many images
LEAKED = WITH_LORA.replace("a cat <lora:detail_cdcdcdcd:1>", "a dog")  # A1111 leaves the hash of an image before it
UNPROVEN = f"{NAMED}, Version: v1.10.1"
OTHER_FILE = WITH_LORA.replace("eb0b8ef669e5", "000000000000")
SCRIPTS = [
    ((WITH_LORA, WITH_LORA), (True, 2)),
    ((WITH_LORA, OURS), (True, 1)),
    ((WITH_LORA, LEAKED), (True, 1)),
    ((WITH_LORA, UNPROVEN), (False, 1)),
    ((WITH_LORA, OTHER_FILE), (False, 1)),
    ((LEAKED, OURS), (False, 0)),
    ((OURS, OURS), (False, 0)),
]


@pytest.mark.parametrize(("texts", "expected"), SCRIPTS)
def test_a_lora_of_a_script_is_proven_for_each_image_that_names_it(
    texts: tuple[str, ...], expected: tuple[bool, int]
) -> None:
    plan = GenerationPlan({"script_name": "x/y/z plot"}, (lora(),), OnLoraError.WARN)

    generation = verify(answer_of_script(*texts), plan, CHECKPOINT)

    (applied,) = generation.loras
    assert (applied.loaded, applied.pictures) == expected
    assert ("the WebUI did not apply the LoRA 'Detail'" in generation.warnings) is not expected[0]


def test_a_script_that_leaves_a_lora_of_the_prompt_out_of_some_images_is_a_warning() -> None:
    plan = GenerationPlan({"script_name": "x/y/z plot", "prompt": "a cat <lora:detail_cdcdcdcd:1>"}, (lora(),))

    generation = verify(answer_of_script(WITH_LORA, OURS), plan, CHECKPOINT)

    assert generation.warnings == ("the script used the LoRA 'Detail' for 1 of 2 pictures",)


def test_the_cells_of_a_grid_without_their_images_prove_a_lora_too() -> None:
    of_grid = WITH_LORA.replace(", Version", ", Script: X/Y/Z plot, X Type: Seed, Version")
    found = answer(images=[picture()], info={"infotexts": [of_grid, of_grid, WITH_LORA, OURS]})

    generation = verify(found, GenerationPlan({"script_name": "x/y/z plot"}, (lora(),)), CHECKPOINT)

    assert [(applied.loaded, applied.pictures) for applied in generation.loras] == [(True, 1)]
    assert generation.seeds == (None,)


def test_a_script_that_uses_a_lora_nowhere_has_not_applied_it() -> None:
    with pytest.raises(LoraNotApplied):
        verify(answer_of_script(OURS, OURS), GenerationPlan({"script_name": "x/y/z plot"}, (lora(),)), CHECKPOINT)


@pytest.mark.parametrize(
    "info", [{"all_seeds": 42}, {"infotexts": "text"}, {"extra_generation_params": ["Lora hashes"]}]
)
def test_an_info_in_another_form_is_a_lost_webui(info: dict[str, Any]) -> None:
    with pytest.raises(WebUILost):
        verify(answer(info=info), GenerationPlan({}), CHECKPOINT)


@pytest.mark.parametrize(
    "applied",
    [
        lora("unknown"),  # silently ignored: absent
        lora("detail", digits="000000000000"),  # another file of that name was read
    ],
)
def test_a_lora_that_was_not_loaded_ends_the_job(applied: AppliedLora) -> None:
    with pytest.raises(LoraNotApplied, match=applied.name):
        verify(answer(), GenerationPlan({}, (applied,)), CHECKPOINT)


def test_a_lora_that_was_not_loaded_is_a_warning_if_the_job_wants_that() -> None:
    plan = GenerationPlan({}, (lora("unknown"), lora()), OnLoraError.WARN)

    generation = verify(answer(), plan, CHECKPOINT)

    assert [applied.loaded for applied in generation.loras] == [False, True]
    assert generation.warnings == ("the WebUI did not apply the LoRA 'Unknown'",)


def test_without_loras_there_are_no_hashes() -> None:
    assert lora_hashes({"extra_generation_params": {}}) == {}
    assert lora_hashes({}) == {}


def test_a_script_may_change_the_sampler_and_the_number_of_images_but_there_must_be_one() -> None:
    plot = {"script_name": "x/y/z plot", "sampler_name": "Euler a"}
    found = answer(images=[picture()] * 3, info={"sampler_name": "DPM++ 2M"})

    assert verify(found, GenerationPlan(plot), CHECKPOINT).answer is found
    with pytest.raises(GenerationFailed, match="without a picture"):
        verify(answer(images=[]), GenerationPlan(plot), CHECKPOINT)


def test_more_images_than_requested_are_refused() -> None:
    with pytest.raises(GenerationFailed):
        verify(answer(images=[picture()] * 2), GenerationPlan({}), CHECKPOINT)


def test_a_lora_that_could_not_be_had_is_not_reported_as_unapplied_too() -> None:
    gone = AppliedLora(name="gone", scale=1.0, model=None, loaded=False)

    plan = GenerationPlan({}, (gone,), OnLoraError.WARN, ("it was left out",))

    generation = verify(answer(info={"extra_generation_params": {}}), plan, CHECKPOINT)

    assert generation.warnings == ("it was left out",)


@pytest.mark.parametrize("picture", ["iVBORw0KGgoÄ", "iVBORw0KGgo\u2028"])
def test_an_image_that_is_no_base64_is_refused(picture: str) -> None:
    with pytest.raises(GenerationFailed, match="no PNG"):
        verify(answer(images=[picture]), GenerationPlan({}), CHECKPOINT)


# --- Against the recorded answers ---------------------------------------------------------------------------------


def recorded(version: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A recorded answer whose pictures are made anew, with the recorded texts and sizes; and its request's body."""
    text = (DATA / f"webui-{version}" / "scripts" / f"{name}.json").read_text()
    case = json.loads(re.sub(r"\b(lora_one|lora_two)\b", r"\1_cdcdcdcd", text))  # as this worker calls them
    images = [
        a1111_png(Image.new("RGB", tuple(about["size"])), text)
        for text, about in zip(case["png_infotexts"], case["png_pictures"], strict=True)
    ]
    return {**case["response"]["body"], "images": images}, case["request"]["body"]


TINY_A = Model(ModelKind.CHECKPOINT, "Tiny", "tiny_a.safetensors", Path("x"), "92e79e2e23" + "0" * 54, 1, 1)

# the seeds of each picture (None: a grid), of recordings whose `all_seeds` say something else
SEEDS: dict[str, list[int | None]] = {
    "file_iterate_false": [5, 5, 9],  # [5]
    "file_iterate_true": [5, 6, 9],  # [8]
    "file_iterate_true_batch2": [5, 6, 7, 8, 9, 10],  # [11]
    "file_iterate_true_niter2": [5, 6, 7, 8, 9, 10],  # [11]
    "file_line_n_iter": [5, 6, 6],  # [7]
    "matrix_different_seeds_true": [None, 5, 6, 7, 8],  # four
    "matrix_batch2": [None, 5, 6, 7, 8],
    "xyz_seed": [None, 11, 22],  # two
    "xyz_seed_by_sr": [None, None, 11, 22, 11, 22],  # five
    "xyz_seed_no_lone": [None],  # two
}


@pytest.mark.parametrize("version", ["1.9.3", "1.10.1"])
@pytest.mark.parametrize("name", SEEDS)
def test_every_picture_of_a_script_has_its_own_seed(version: str, name: str) -> None:
    found, body = recorded(version, name)

    generation = verify(found, GenerationPlan(body), TINY_A)

    assert list(generation.seeds) == SEEDS[name]
    assert [picture.seed for picture in generation.pictures] == SEEDS[name]


@pytest.mark.parametrize("version", ["1.9.3", "1.10.1"])
def test_a_line_with_its_own_steps_and_width_is_reported_with_them(version: str) -> None:
    found, body = recorded(version, "file_iterate_true")

    generation = verify(found, GenerationPlan(body), TINY_A)

    sizes = [(picture.width, picture.height, picture.steps) for picture in generation.pictures]
    assert sizes == [(128, 64, 2), (128, 64, 2), (64, 64, 3)]


LORAS = {"lora_one": "f210665ad516", "lora_two": "abababababab"}

# which LoRAs were drawn in how many pictures of a recording, and whether each picture that names one has it
RECORDED_LORAS: dict[str, dict[str, tuple[bool, int]]] = {
    "file_iterate_true": {"lora_one": (True, 1)},  # the hash leaks into the second line
    "file_lora_in_prompt": {"lora_one": (True, 1), "lora_two": (True, 2)},
    "matrix_different_seeds_false": {"lora_one": (True, 2)},
    "xyz_sr_lora": {"lora_one": (True, 1), "lora_two": (True, 1)},  # `info` names the second alone
    "xyz_sr_lora_no_lone": {"lora_one": (True, 1), "lora_two": (True, 1)},  # there is only the grid
    "xyz_seed_by_sr": {"lora_one": (True, 2), "lora_two": (True, 2)},
    "xyz_sr_unknown_lora": {"lora_one": (True, 1), "lora_two": (False, 0)},
}


@pytest.mark.parametrize("version", ["1.9.3", "1.10.1"])
@pytest.mark.parametrize("name", RECORDED_LORAS)
def test_a_lora_of_a_script_is_counted_where_it_was_drawn(version: str, name: str) -> None:
    found, body = recorded(version, name)
    loras = tuple(lora(stem, LORAS[stem]) for stem in RECORDED_LORAS[name])

    generation = verify(found, GenerationPlan(body, loras, OnLoraError.WARN), TINY_A)

    counted = {
        applied.model.file.removesuffix(".safetensors"): (applied.loaded, applied.pictures)
        for applied in generation.loras
        if applied.model
    }
    assert counted == RECORDED_LORAS[name]


def test_a_script_that_switched_to_another_checkpoint_is_refused() -> None:
    found, body = recorded("1.10.1", "file_line_model")

    with pytest.raises(CheckpointNotLoaded):
        verify(found, GenerationPlan(body), TINY_A)


def test_without_texts_in_its_pictures_the_infotexts_have_the_seeds() -> None:
    second = OURS.replace("Seed: 7", "Seed: 8")
    found = answer(images=[picture(), picture()], info={"infotexts": [OURS, second], "all_seeds": [1, 2]})

    generation = verify(found, GenerationPlan({"n_iter": 2}), CHECKPOINT)

    assert generation.seeds == (7, 8)
    assert verify(answer_of_script(OURS), GenerationPlan({"script_name": "x"}), CHECKPOINT).seeds == (7,)

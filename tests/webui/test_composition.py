"""From a request to the body the WebUI gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from a1111_worker.domain import GenerationRequest, HeldModels, Model, ModelKind, ModelRef, Task
from a1111_worker.errors import InvalidRequest, ModelNotFound
from a1111_worker.request.fields import Limits
from a1111_worker.webui.composition import compose
from a1111_worker.webui.resolution import WebUILists, resolve
from a1111_worker.webui.responses import Style, parse_samplers, parse_schedulers, parse_scripts
from tests.support import DATA, parse_generation


def lists(**changes: Any) -> WebUILists:
    def recorded(name: str) -> Any:
        return json.loads((DATA / "webui-1.10.1" / f"full_{name}.json").read_text())

    return WebUILists(
        **{
            "samplers": parse_samplers(recorded("samplers")),
            "schedulers": parse_schedulers(recorded("schedulers")),
            "latent_upscalers": ("Latent",),
            "upscalers": ("Lanczos", "R-ESRGAN 4x+"),
            "scripts": parse_scripts(recorded("scripts"))[Task.TXT2IMG],
            "styles": {},
            "vaes": ("Automatic", "None", "sdxl_vae.safetensors"),
            **changes,
        }
    )


def parse(**raw: Any) -> GenerationRequest:
    return parse_generation({"prompt": "a lighthouse", **raw}, Limits())


def model(stem: str, version_id: int | None = None, name: str | None = None, **changes: Any) -> Model:
    return Model(
        kind=ModelKind.LORA,
        name=name or stem,
        file=f"{stem}.safetensors",
        path=Path("x"),
        sha256="ab" * 32,
        size=1,
        version_id=version_id,
        lora_hash="0" * 12,
        **changes,
    )


def composed(request: GenerationRequest, *found: Model) -> dict[str, Any]:
    models = {lora.ref: held for lora, held in zip(request.loras, found, strict=True)}
    return dict(compose(request, HeldModels(models)).body)


# what the job asks for, and what the WebUI gets
SAMPLERS = [
    ({}, ("DPM++ 2M", "Karras")),  # our defaults
    ({"sampler_name": "dpm++ 2m sde exponential"}, ("DPM++ 2M SDE", "Exponential")),
    ({"sampler_name": "k_euler_a"}, ("Euler a", None)),
    ({"sampler_name": "Euler", "scheduler": "sgm_uniform"}, ("Euler", "SGM Uniform")),
    ({"scheduler": "exponential"}, ("DPM++ 2M", "Exponential")),
]


@pytest.mark.parametrize(("raw", "sent"), SAMPLERS)
def test_samplers_are_sent_as_the_webui_spells_them(raw: dict[str, Any], sent: tuple[str, str | None]) -> None:
    body = resolve(parse(**raw), lists()).body

    assert (body["sampler_name"], body.get("scheduler")) == sent


def test_all_unknown_names_are_reported_at_once() -> None:
    hires = {"enable_hr": True, "denoising_strength": 0.5, "hr_scale": 1.5, "hr_upscaler": "Lanczoss"}
    request = parse(
        sampler_name="Eulerr",
        script_name="prompt matrx",
        styles=["cinematic"],
        alwayson_scripts={"ControlNet": {"args": [{"enabled": True}]}},
        hr_sampler_name="Eulr",
        **hires,
    )

    with pytest.raises(InvalidRequest) as raised:
        resolve(request, lists())

    complaints = {complaint.path: complaint.message for complaint in raised.value.complaints}
    assert set(complaints) == {
        "sampler_name",
        "hr_sampler_name",
        "hr_upscaler",
        "script_name",
        "alwayson_scripts.ControlNet",
        "styles[0]",
    }
    assert "'Euler'" in complaints["sampler_name"] and "'Lanczos'" in complaints["hr_upscaler"]


AXES = ("Nothing", "Seed", "Steps", "Checkpoint name")


def plot(x_type: int, x_values: str) -> dict[str, Any]:
    args = [x_type, x_values, ["x"], 0, "", [], 0, "", [], True, False, False, False, False, False, False, 0, False]
    return {"script_name": "x/y/z plot", "script_args": args}


@pytest.mark.parametrize(
    ("x_type", "x_values", "message"),
    [
        (1, "1-17", "Seed has more than 16 values, and that is the limit of pictures"),
        (2, "500", "Steps must be a whole number from 1 to 150, not 500"),
        (3, "", "is the axis 'Checkpoint name', which is refused: the checkpoint is this worker's, not the job's"),
    ],
)
def test_a_plot_is_held_to_the_limits_by_the_webuis_own_list_of_axes(x_type: int, x_values: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        resolve(parse(**plot(x_type, x_values)), lists(script_axes=AXES))

    (complaint,) = refused.value.complaints
    assert complaint.message == message
    assert resolve(parse(**plot(2, "20,30")), lists(script_axes=AXES)).body["script_args"][1] == "20,30"


def test_a_style_with_a_lora_can_make_a_matrix_too_large() -> None:
    many = {"many": Style("many", "a|b|c|d|e|f <lora:x:1>")}
    request = parse(styles=["many"], script_name="prompt matrix", script_args=[False, False, "positive", "comma", 0])

    with pytest.raises(InvalidRequest, match="2 to the power of 5 pictures"):
        resolve(request, lists(styles=many))


@pytest.mark.parametrize("name", ["SwinIR 4x", "swinir 4X", "LDSR"])
def test_an_upscaler_without_its_file_is_refused_and_those_that_are_there_are_named(name: str) -> None:
    request = parse(enable_hr=True, denoising_strength=0.5, hr_scale=1.5, hr_upscaler=name)

    with pytest.raises(InvalidRequest) as raised:
        resolve(request, lists(missing_upscalers=("SwinIR 4x", "LDSR")))

    (complaint,) = raised.value.complaints
    assert complaint.path == "hr_upscaler"
    assert "is not there" in complaint.message
    assert complaint.message.endswith("these are there: 'Latent', 'Lanczos', 'R-ESRGAN 4x+'")


@pytest.mark.parametrize(("able", "warnings"), [(("GFPGAN",), 0), (None, 1)])
def test_faces_that_may_not_be_restored_are_a_warning(able: tuple[str, ...] | None, warnings: int) -> None:
    request = resolve(parse(restore_faces=True), lists(face_restorers=able))

    assert len(request.warnings) == warnings


def test_faces_that_cannot_be_restored_are_refused_with_everything_else() -> None:
    with pytest.raises(InvalidRequest) as raised:
        resolve(parse(restore_faces=True, sampler_name="Eulerr"), lists(face_restorers=()))

    assert [complaint.path for complaint in raised.value.complaints] == ["sampler_name", "restore_faces"]


def test_names_are_sent_in_the_webuis_case() -> None:
    matrix = {"script_name": "Prompt Matrix", "script_args": [False, False, "positive", "comma", 0]}
    request = parse(vae="SDXL_VAE.safetensors", alwayson_scripts={"hypertile": {"args": []}}, **matrix)

    body = resolve(request, lists()).body

    assert body["script_name"] == "prompt matrix"
    assert body["override_settings"]["sd_vae"] == "sdxl_vae.safetensors"
    assert list(body["alwayson_scripts"]) == ["Hypertile"]


def test_loras_become_tags_in_the_callers_order_with_their_scale() -> None:
    request = parse(loras=[{"version_id": 135867}, {"version_id": 7, "scale": -0.5}])

    body = composed(request, model("detail_tweaker_xl", 135867), model("x_7", 7))

    assert body["prompt"] == "a lighthouse <lora:detail_tweaker_xl_abababab:1.5> <lora:x_7_abababab:-0.5>"


def test_a_tag_of_the_caller_is_not_doubled_and_the_scale_of_the_list_wins() -> None:
    request = parse(prompt="a <lora:Detail Tweaker XL:0.3> lighthouse", loras=[{"version_id": 135867, "scale": 0.8}])

    body = composed(request, model("detail_tweaker_xl", 135867, "Detail Tweaker XL"))

    assert body["prompt"] == "a <lora:detail_tweaker_xl_abababab:0.8> lighthouse"
    assert any("0.8 counts" in warning for warning in request.warnings)


def test_a_tag_alone_is_a_lora_of_the_job() -> None:
    request = parse(prompt="a <lora:detail_tweaker_xl:0.3> lighthouse")

    plan = compose(request, HeldModels({request.loras[0].ref: model("detail_tweaker_xl", 135867)}))

    assert plan.body["prompt"] == "a <lora:detail_tweaker_xl_abababab:0.3> lighthouse"
    assert [(lora.name, lora.scale) for lora in plan.loras] == [("detail_tweaker_xl", 0.3)]


def test_the_second_pass_has_the_loras_too() -> None:
    request = parse(hr_prompt="the same, sharper", loras=[{"version_id": 7}])

    assert composed(request, model("x_7", 7))["hr_prompt"] == "the same, sharper <lora:x_7_abababab:1>"


def test_a_list_entry_without_a_scale_keeps_the_weights_of_its_tag() -> None:
    request = parse(prompt="a <lora:x_7:0.5:1> lighthouse", loras=["x_7"])

    plan = compose(request, HeldModels({request.loras[0].ref: model("x_7")}))

    assert plan.body["prompt"] == "a <lora:x_7_abababab:0.5:1> lighthouse"
    assert [lora.scale for lora in plan.loras] == [1.0]  # the U-Net's


def test_a_second_pass_with_its_own_loras_names_those_of_the_first_without_effect() -> None:
    hires = {"enable_hr": True, "denoising_strength": 0.5}
    request = parse(prompt="a <lora:first:1> lighthouse", hr_prompt="sharper <lora:second:1>", **hires)

    body = composed(request, model("first"), model("second"))

    assert body["hr_prompt"] == "sharper <lora:second_abababab:1> <lora:first_abababab:0>"


def test_a_lora_that_could_not_be_had_is_left_out_with_a_warning() -> None:
    request = parse(prompt="a <lora:gone:1> lighthouse", on_lora_error="warn")
    ref = request.loras[0].ref

    plan = compose(request, HeldModels(failures={ref: ModelNotFound("nobody knows it")}))

    assert "lora" not in plan.body["prompt"]
    assert plan.loras[0].model is None
    assert plan.warnings == ("the LoRA 'gone' was left out: MODEL_NOT_FOUND: nobody knows it",)


def test_two_names_for_one_file_are_one_lora() -> None:
    request = parse(prompt="a <lora:by_hand:0.5> lighthouse", loras=[{"version_id": 7, "scale": 0.8}])
    same = model("by_hand", 7)

    plan = compose(request, HeldModels({lora.ref: same for lora in request.loras}))

    assert plan.body["prompt"] == "a <lora:by_hand_abababab:0.8> lighthouse"
    assert len(plan.loras) == 1


def test_a_warning_about_a_model_is_a_warning_of_the_job() -> None:
    request = parse(loras=[{"version_id": 7}])

    plan = compose(request, HeldModels({request.loras[0].ref: model("x_7", 7, warnings=("it cannot be told",))}))

    assert plan.warnings == ("it cannot be told",)


STYLES = {
    "plain": Style("plain", "photo of {prompt}, film grain", "blurry"),
    "detailed": Style("detailed", "<lora:detail_tweaker_xl:0.4>", "flat"),
}


def test_a_style_without_a_lora_is_left_to_the_webui() -> None:
    body = resolve(parse(styles=["Plain"]), lists(styles=STYLES)).body

    assert (body["prompt"], body["styles"]) == ("a lighthouse", ["plain"])


def test_a_style_with_a_lora_is_written_into_the_prompt() -> None:
    request = resolve(parse(styles=["plain", "detailed"], negative_prompt="dark"), lists(styles=STYLES))

    assert "styles" not in request.body
    assert request.body["prompt"] == "photo of a lighthouse, film grain, <lora:detail_tweaker_xl:0.4>"
    assert request.body["negative_prompt"] == "dark, blurry, flat"
    assert [lora.ref for lora in request.loras] == [
        ModelRef(ModelKind.LORA, version_id=135867, name="detail_tweaker_xl")
    ]


def test_a_style_with_a_lora_is_written_into_the_negative_prompt_of_the_second_pass() -> None:
    request = resolve(parse(styles=["detailed"], hr_negative_prompt="noisy"), lists(styles=STYLES))

    assert request.body["hr_negative_prompt"] == "noisy, flat"
    assert "hr_prompt" not in request.body


def test_a_request_is_never_changed() -> None:
    request = parse(loras=[{"version_id": 7}], vae="automatic")
    before = json.dumps(dict(request.body))

    resolve(request, lists())
    composed(request, model("x_7", 7))

    assert json.dumps(dict(request.body)) == before


HIRES = {"enable_hr": True, "denoising_strength": 0.5, "hr_scale": 1.5}


def test_a_hires_scheduler_is_sent_as_the_webui_spells_it_with_and_without_a_sampler() -> None:
    alone = resolve(parse(hr_scheduler="karras", **HIRES), lists()).body
    combined = resolve(parse(hr_sampler_name="dpm++ 2m exponential", **HIRES), lists()).body

    assert alone["hr_scheduler"] == "Karras"
    assert (combined["hr_sampler_name"], combined["hr_scheduler"]) == ("DPM++ 2M", "Exponential")


def test_a_style_with_a_lora_keeps_the_loras_of_the_job() -> None:
    request = resolve(parse(styles=["detailed"], loras=[{"version_id": 7, "scale": 0.5}]), lists(styles=STYLES))

    assert [(lora.ref.version_id, lora.scale) for lora in request.loras] == [(7, 0.5), (135867, 0.4)]
    assert any("detailed" in warning for warning in request.warnings)


def test_a_style_with_a_lora_is_written_into_the_prompt_of_the_second_pass_only_if_there_is_one() -> None:
    own = resolve(parse(styles=["plain", "detailed"], hr_prompt="sharper", **HIRES), lists(styles=STYLES)).body
    same = resolve(parse(styles=["plain", "detailed"], **HIRES), lists(styles=STYLES)).body

    assert own["hr_prompt"] == "photo of sharper, film grain, <lora:detail_tweaker_xl:0.4>"
    assert "hr_prompt" not in same  # the WebUI takes the first pass's prompt


def test_a_tag_of_a_style_that_cannot_be_used_is_a_complaint() -> None:
    bad = {"bad": Style("bad", "<lora:fine:1> <lora:x:much>")}

    with pytest.raises(InvalidRequest, match="its weight must be a number"):
        resolve(parse(styles=["bad"]), lists(styles=bad))


def test_the_weights_of_a_tag_stay_as_the_caller_wrote_them() -> None:
    request = parse(prompt="a <lora:some_style_7:0.3:0.8> lighthouse")

    assert composed(request, model("some_style_7", 7))["prompt"] == "a <lora:some_style_7_abababab:0.3:0.8> lighthouse"


def test_a_tag_in_another_case_of_a_listed_file_is_not_doubled() -> None:
    request = parse(prompt="a <lora:My Style:0.5> lighthouse", loras=[{"name": "my style", "scale": 0.8}])

    body = composed(request, *(model("my style") for _ in request.loras))

    assert body["prompt"] == "a <lora:my style_abababab:0.8> lighthouse"


def test_two_loras_of_urls_that_cannot_be_had_are_both_reported() -> None:
    limits = Limits(model_hosts=("https://cdn.example.com",))
    urls = [{"url": f"https://cdn.example.com/{name}"} for name in "ab"]
    request = parse_generation({"prompt": "x", "loras": urls, "on_lora_error": "warn"}, limits)
    failures = {lora.ref: ModelNotFound("it is gone") for lora in request.loras}

    assert len(compose(request, HeldModels(failures=failures)).loras) == 2


def test_the_trained_words_that_a_prompt_lacks_are_appended_and_reported() -> None:
    request = parse(
        prompt="an Ink Wash lighthouse",
        hr_prompt="sharper",
        loras=[{"version_id": 7}, {"version_id": 8}, {"version_id": 9}],
        trigger_words=True,
    )
    models = (
        model("x_7", 7, trained_words=("ohwx, ink wash",)),
        model("x_8", 8, trained_words=("OHWX", "soft light <lora:other:1>")),
        model("x_9", 9),
    )

    plan = compose(request, HeldModels({lora.ref: held for lora, held in zip(request.loras, models, strict=True)}))

    tags = "<lora:x_7_abababab:1> <lora:x_8_abababab:1> <lora:x_9_abababab:1>"
    assert plan.body["prompt"] == f"an Ink Wash lighthouse, ohwx, soft light {tags}"
    assert plan.body["hr_prompt"] == f"sharper, ohwx, ink wash, soft light {tags}"
    assert [lora.trigger_words for lora in plan.loras] == [("ohwx",), ("soft light",), ()]


def test_without_being_asked_no_words_are_appended() -> None:
    request = parse(loras=[{"version_id": 7}])

    plan = compose(request, HeldModels({request.loras[0].ref: model("x_7", 7, trained_words=("ohwx",))}))

    assert plan.body["prompt"] == "a lighthouse <lora:x_7_abababab:1>"
    assert plan.loras[0].trigger_words == ()


def test_a_creator_who_lists_hundreds_of_words_does_not_fill_the_prompt() -> None:
    request = parse(loras=[{"version_id": 7}], trigger_words=True)

    plan = compose(
        request, HeldModels({request.loras[0].ref: model("x_7", 7, trained_words=tuple(f"w{n}" for n in range(100)))})
    )

    assert len(plan.loras[0].trigger_words) == 30

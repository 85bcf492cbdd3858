"""What an answer of txt2img or img2img must show before it is believed. Pure: it is decided from the answer alone.

`info` is a JSON string in the answer. Its `sd_model_name` and `sd_model_hash` (the first 10 digits of the file's
SHA-256) are the checkpoint that made the images. "Lora hashes" in `extra_generation_params` holds `name: 12 digits` for
every LoRA whose file was read, and nothing for one that was not (A1111 1.9.3 and 1.10.1, measured). The digits are
A1111's hash of the tensor data, or the file's own `sshs_model_hash`: never the file's SHA-256.

A script may change all of it from image to image, and its `info` is that of one image, or of none. Its `all_seeds` may
hold seeds that no image has, and its "Lora hashes" are those of the last prompt that had any. Then each image's own
text counts. An image without a text is a grid. The hashes of one image leak into the text of the next: so a LoRA is
proven for an image if the image's prompt names it, and its hash is there under its name; more hashes mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from a1111_worker import prompt
from a1111_worker.domain import AppliedEmbedding, AppliedLora, Generation, Model, OnLoraError, PictureFacts, Task
from a1111_worker.errors import CheckpointNotLoaded, GenerationFailed, LoraNotApplied, WebUILost
from a1111_worker.images import read_infotext, read_size
from a1111_worker.request.extensions import detected_maps, without_pictures
from a1111_worker.text import quoted, quoted_list
from a1111_worker.webui.infotext import Infotext, parse_infotext, parse_lora_hashes

PNG_IN_BASE64 = "iVBORw0KGgo"
INTERRUPTED = "it was interrupted by somebody else; send the job again"


@dataclass(frozen=True)
class GenerationPlan:
    """A job's body as the WebUI gets it, and what its answer must show.

    `controlnet_models` are the names under which models of ControlNet's units are shown; ControlNet adds hashes.
    """

    body: Mapping[str, Any] = field(repr=False)  # it may hold pictures
    loras: tuple[AppliedLora, ...] = ()
    on_lora_error: OnLoraError = OnLoraError.FAIL
    warnings: tuple[str, ...] = ()
    allow_blank: bool = False
    preview: bool = False
    task: Task = Task.TXT2IMG
    controlnet_models: tuple[str, ...] = ()
    embeddings: tuple[AppliedEmbedding, ...] = ()
    vae: Model | None = None
    refiner: Model | None = None
    hires_checkpoint: Model | None = None

    @property
    def loaded_meanwhile(self) -> dict[str, Model]:
        """The checkpoints that the WebUI loads during the job, by the field of the body that names each."""
        fields = {"refiner_checkpoint": self.refiner, "hr_checkpoint_name": self.hires_checkpoint}
        return {field: model for field, model in fields.items() if model is not None}


PromptUse = tuple[str, str]
"""The WebUI's word for an embedding, and a prompt in which A1111 was seen to use it."""


def verify(
    answer: Any,
    plan: GenerationPlan,
    checkpoint: Model,
    *,
    interrupted_job: str | None = None,
    known_uses: Collection[PromptUse] = (),
) -> Generation:
    """The generation, if the answer shows everything the plan asks for.

    `interrupted_job` is the `job_timestamp` of a job that somebody has interrupted. `known_uses` were proven earlier in
    this WebUI's life. Raises WebUILost (no answer of txt2img), GenerationFailed (no images, too few, cut short, another
    sampler or VAE), CheckpointNotLoaded, or LoraNotApplied unless the job wants only a warning for that.
    """
    info = _parse_info(answer)
    images = answer["images"]
    _check_images(images, plan.body)
    if interrupted_job is not None and info.get("job_timestamp") == interrupted_job:
        raise GenerationFailed("the WebUI did not finish the pictures", hint=INTERRUPTED)
    texts = _read_texts(images, info, plan.body)
    _check_checkpoint(info, plan.body, checkpoint)
    settings = [parse_infotext(str(text)) for text in info.get("infotexts") or ()]
    refiner, unreached = _verify_refiner({text.refiner for text in settings if text.refiner}, plan)
    _check_hires_checkpoint({text.hires_checkpoint for text in settings if text.hires_checkpoint}, plan)
    _check_sampler(info, plan.body)
    _check_vae(info, plan)
    embeddings, unproven = _verify_embeddings(info, plan, known_uses)
    loras, warnings = _verify_loras(info, texts, plan)
    pictures = tuple(_describe(image, text) for image, text in zip(images, texts, strict=True))
    return Generation(
        answer=_without_pictures(answer),
        checkpoint=checkpoint,
        loras=loras,
        seeds=tuple(picture.seed for picture in pictures),
        webui_version=str(info.get("version", "unknown")),
        warnings=(*plan.warnings, *warnings, *unproven, *unreached, *_size_warnings(pictures, plan.body)),
        pictures=pictures,
        embeddings=embeddings,
        vae=plan.vae,
        refiner=refiner,
        hires_checkpoint=plan.hires_checkpoint,
    )


def _without_pictures(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer, whose `parameters` repeat no picture of the job."""
    parameters = answer.get("parameters")
    shown = without_pictures(parameters)
    return answer if shown is parameters else {**answer, "parameters": shown}


def lora_hashes(info: Mapping[str, Any]) -> dict[str, str]:
    """The LoRAs that the WebUI read for a generation: name → 12 hex digits. A comma in a name is left out (A1111)."""
    return parse_lora_hashes((info.get("extra_generation_params") or {}).get("Lora hashes", ""))


def _parse_info(answer: Any) -> dict[str, Any]:
    if not isinstance(answer, dict) or not isinstance(answer.get("images"), list):
        raise WebUILost("what answers at the WebUI's address does not speak A1111's API")
    try:
        info = json.loads(answer.get("info") or "")
    except (TypeError, ValueError, RecursionError) as error:
        raise WebUILost("the WebUI's answer has no info about its pictures") from error
    forms = {"all_seeds": list, "infotexts": list, "extra_generation_params": dict}
    if not isinstance(info, dict) or not all(isinstance(info.get(key) or form(), form) for key, form in forms.items()):
        raise WebUILost("the WebUI's answer has no info about its pictures")
    return info


def _check_images(images: Sequence[Any], body: Mapping[str, Any]) -> None:
    if not images:
        raise GenerationFailed("the WebUI answered without a picture")
    for image in images:
        if not (isinstance(image, str) and image.isascii() and image.startswith(PNG_IN_BASE64)):
            raise GenerationFailed("the WebUI answered with something that is no PNG")
    # Of several init_images one is taken for each picture of a batch, and the batch is as large as they are many.
    given = len(body.get("init_images", ()))
    expected = (given if given > 1 else int(body.get("batch_size", 1))) * int(body.get("n_iter", 1))
    # A script (X/Y/Z plot, Prompts from file) decides for itself how many images there are.
    most = expected + detected_maps(body)
    if not body.get("script_name") and not expected <= len(images) <= most:
        raise GenerationFailed(f"the WebUI made {len(images)} of {expected} pictures", hint=INTERRUPTED)


def _read_texts(images: Sequence[str], info: Mapping[str, Any], body: Mapping[str, Any]) -> list[Infotext | None]:
    """What each image's own text says; None for one without a text."""
    try:
        texts = [read_infotext(image) for image in images]
    except ValueError as error:
        raise GenerationFailed("the WebUI answered with something that is no PNG") from error
    infotexts = info.get("infotexts") or []
    if not any(texts) and not body.get("script_name") and len(infotexts) == len(images):
        texts = infotexts  # a WebUI that writes no text into its PNGs; without a script it describes them in order
    return [None if text is None else parse_infotext(str(text)) for text in texts]


def _describe(image: str, text: Infotext | None) -> PictureFacts:
    try:
        width, height = read_size(image)
    except ValueError as error:
        raise GenerationFailed("the WebUI answered with something that is no PNG") from error
    return PictureFacts(width, height, text.seed if text else None, text.steps if text else None)


def _size_warnings(pictures: Sequence[PictureFacts], body: Mapping[str, Any]) -> list[str]:
    """That pictures of an img2img have another size than asked for. (A grid among them has none that was asked for.)"""
    if "init_images" not in body:
        return []
    asked = body["width"], body["height"]
    with_text = [picture for picture in pictures if picture.seed is not None]
    sizes = {(picture.width, picture.height): None for picture in with_text or pictures}
    others = [f"{width}×{height}" for width, height in sizes if (width, height) != asked]
    if not others:
        return []
    reason = "a script decides the size of its pictures" if body.get("script_name") else _PAINTED_INTO_PICTURE
    return [f"the answer has pictures of {', '.join(others)}, and not of {asked[0]}×{asked[1]}: {reason}"]


_PAINTED_INTO_PICTURE = "with inpaint_full_res the masked area is painted in that size, and put back into the picture"


def _check_checkpoint(info: Mapping[str, Any], body: Mapping[str, Any], checkpoint: Model) -> None:
    expected = checkpoint.sha256[:10]
    name, digits = info.get("sd_model_name"), info.get("sd_model_hash")
    by_image = [parse_infotext(str(text)).model_hash for text in info.get("infotexts") or ()]
    if body.get("script_name") and name is None and digits is None:
        is_ours = bool(by_image) and all(found == expected for found in by_image)
    else:
        is_ours = name == checkpoint.shown and digits == expected
    if not is_ours:
        raise CheckpointNotLoaded(
            f"the WebUI used another checkpoint than {checkpoint.name}",
            hint="somebody else uses this WebUI, or it was restarted with another checkpoint",
        )
    if any(found not in (None, expected) for found in by_image):
        raise CheckpointNotLoaded(
            f"a picture of this job was made by another checkpoint than {checkpoint.name}",
            hint="a script of the job names another checkpoint; use the field checkpoint",
        )


def _verify_refiner(named: Collection[str], plan: GenerationPlan) -> tuple[Model | None, list[str]]:
    """The refiner if it has drawn. If not, no step was left for it (1.9.3 and 1.10.1): None, and a warning.

    `named` is what A1111 names as the refiner.
    """
    if plan.refiner is None:
        return None, []
    _check_named(plan.refiner, named)
    if named:
        return plan.refiner, []
    switch_at = plan.body.get("refiner_switch_at")
    name = quoted(plan.refiner.name)
    return None, [f"the refiner {name} did not draw: no step came after refiner_switch_at {switch_at}"]


def _check_hires_checkpoint(named: Collection[str], plan: GenerationPlan) -> None:
    if plan.hires_checkpoint is None:
        return
    _check_named(plan.hires_checkpoint, named)
    if not named:
        raise CheckpointNotLoaded(f"the WebUI did not use {plan.hires_checkpoint.name} for the second pass")


def _check_named(model: Model, named: Collection[str]) -> None:
    if set(named) - {model.shown, f"{model.shown} [{model.sha256[:10]}]"}:
        raise CheckpointNotLoaded(f"the WebUI used another checkpoint than {model.name}")


def _check_sampler(info: Mapping[str, Any], body: Mapping[str, Any]) -> None:
    requested, used = body.get("sampler_name"), info.get("sampler_name")
    # 1.10.1 silently uses another sampler in place of an unknown one.
    if requested and used != requested and not body.get("script_name"):
        raise GenerationFailed(f"the WebUI used the sampler {quoted(used)} instead of {quoted(requested)}")


def _check_vae(info: Mapping[str, Any], plan: GenerationPlan) -> None:
    """By its name, never by its hash: all VAEs share one entry in A1111's cache of hashes (1.9.3 and 1.10.1)."""
    if plan.vae is None:
        return
    named = f"VAE: {plan.vae.shown_file}"
    is_named = info.get("sd_vae_name") == plan.vae.shown_file
    if plan.body.get("script_name") and info.get("sd_vae_name") is None:
        texts = [str(text).rpartition("\n")[2].split(", ") for text in info.get("infotexts") or ()]
        is_named = bool(texts) and all(named in text for text in texts)
    if not is_named:
        raise GenerationFailed(
            f"the WebUI drew without the VAE {plan.vae.name}", hint="send the job again; the WebUI's log says why"
        )


def _verify_embeddings(
    info: Mapping[str, Any], plan: GenerationPlan, known_uses: Collection[PromptUse]
) -> tuple[tuple[AppliedEmbedding, ...], list[str]]:
    """Which embeddings are proven, and a warning for each of the others that a prompt names.

    "TI hashes" holds `word: 12 digits of the file's SHA-256`, once for each prompt that A1111 has read for this answer.
    A prompt that equals that of the request before is not read again (1.9.3 and 1.10.1, measured): then a proof of the
    same prompt counts. A word never means another file, so it stays true.
    """
    listed = str((info.get("extra_generation_params") or {}).get("TI hashes", "")).split(", ")
    embeddings, warnings = [], []
    for embedding in plan.embeddings:
        model = embedding.model
        proofs = listed.count(f"{model.shown}: {model.sha256[:12]}")
        unread = sum((model.shown, text) in known_uses for text in embedding.prompts)
        is_loaded = bool(embedding.prompts) and proofs + unread >= (1 if _is_script(plan) else len(embedding.prompts))
        embeddings.append(replace(embedding, loaded=is_loaded))
        if embedding.prompts and not is_loaded:
            warnings.append(f"nothing in the WebUI's answer proves that it used the embedding {quoted(model.name)}")
    return tuple(embeddings), warnings


def _is_script(plan: GenerationPlan) -> bool:
    return bool(plan.body.get("script_name"))


def _verify_loras(
    info: Mapping[str, Any], texts: Sequence[Infotext | None], plan: GenerationPlan
) -> tuple[tuple[AppliedLora, ...], list[str]]:
    """The plan's LoRAs, each with the images that were made with it, and the warnings about the others."""
    unasked: list[str] = []
    if not plan.body.get("script_name"):
        hashes = lora_hashes(info)
        applied = [_count(lora, [hashes] * len(texts)) for lora in plan.loras]
        total = len(texts)
        unasked = sorted(hashes.keys() - {_tag_name(lora) for lora in plan.loras})
    else:
        prompts = _prompts_of_script(info, texts)
        total = len(prompts)
        applied = [
            _count(lora, [text.lora_hashes for text in prompts if _tag_name(lora) in text.lora_tags])
            for lora in plan.loras
        ]
    missing = [lora.name for lora in applied if lora.model is not None and not lora.loaded]
    if missing and plan.on_lora_error is OnLoraError.FAIL:
        raise LoraNotApplied(
            f"the WebUI did not apply {quoted_list(missing, 16)}",
            hint='set "on_lora_error": "warn" to have the picture without it',
        )
    in_prompt = {tag.name for tag in prompt.find_tags(plan.body.get("prompt") or "")}
    partly = [lora for lora in applied if lora.loaded and lora.pictures < total and _tag_name(lora) in in_prompt]
    return tuple(applied), [
        *(f"the script used the LoRA {quoted(lora.name)} for {lora.pictures} of {total} pictures" for lora in partly),
        *(f"the WebUI did not apply the LoRA {quoted(name)}" for name in missing),
        *(f"the WebUI also applied {quoted(name)}, a LoRA that the job does not name" for name in unasked),
    ]


def _prompts_of_script(info: Mapping[str, Any], texts: Sequence[Infotext | None]) -> list[Infotext]:
    """The prompts that a script has drawn: those of its images, or those of the cells if it sends only a grid."""
    of_images = [text for text in texts if text is not None]
    cells = [parse_infotext(str(text)) for text in info.get("infotexts") or ()]
    return of_images or [cell for cell in cells if not cell.is_of_grid]


def _count(lora: AppliedLora, by_image: Sequence[Mapping[str, str]]) -> AppliedLora:
    """The LoRA with the images that were made with it. `by_image` are the hashes of those whose prompt names it."""
    proven = sum(_is_applied(lora, hashes) for hashes in by_image)
    return replace(lora, loaded=0 < proven == len(by_image), pictures=proven)


def _tag_name(lora: AppliedLora) -> str | None:
    return lora.model.shown if lora.model else None


def _is_applied(lora: AppliedLora, hashes: Mapping[str, str]) -> bool:
    return lora.model is not None and hashes.get(_tag_name(lora) or "") == lora.model.lora_hash

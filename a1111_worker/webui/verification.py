"""What an answer of txt2img must show before it is believed. Pure: it is decided from the answer alone.

`info` is a JSON string in the answer. Its `sd_model_name` and `sd_model_hash` (the first 10 digits of the file's
SHA-256) are the checkpoint that made the images. "Lora hashes" in `extra_generation_params` holds `name: 12 digits` for
every LoRA whose file was read, and nothing for one that was not (A1111 1.9.3 and 1.10.1, measured). The digits are
A1111's hash of the tensor data, or the file's own `sshs_model_hash`: never the file's SHA-256.

A script may change all of it from image to image, and its `info` is that of the first one, or of none (X/Y/Z plot,
Prompts from file). Then each image's infotext is read. The last line of an infotext holds what A1111 writes about the
image, with callers' texts in quotes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from a1111_worker.domain import AppliedLora, Generation, Model, OnLoraError
from a1111_worker.errors import CheckpointNotLoaded, GenerationFailed, LoraNotApplied, WebUILost
from a1111_worker.text import quoted, quoted_list

PNG_IN_BASE64 = "iVBORw0KGgo"
INTERRUPTED = "it was interrupted by somebody else; send the job again"


@dataclass(frozen=True)
class GenerationPlan:
    """A job's body as the WebUI gets it, and what its answer must show."""

    body: Mapping[str, Any]
    loras: tuple[AppliedLora, ...] = ()
    on_lora_error: OnLoraError = OnLoraError.FAIL
    warnings: tuple[str, ...] = ()
    allow_blank: bool = False


def verify(answer: Any, plan: GenerationPlan, checkpoint: Model, *, interrupted_job: str | None = None) -> Generation:
    """The generation, if the answer shows everything the plan asks for.

    `interrupted_job` is the `job_timestamp` of a job that somebody has interrupted. Raises WebUILost (no answer of
    txt2img), GenerationFailed (no images, too few, cut short, another sampler), CheckpointNotLoaded, or LoraNotApplied
    unless the job wants only a warning for that.
    """
    info = _parse_info(answer)
    _check_images(answer["images"], plan.body)
    if interrupted_job is not None and info.get("job_timestamp") == interrupted_job:
        raise GenerationFailed("the WebUI did not finish the pictures", hint=INTERRUPTED)
    _check_checkpoint(info, plan.body, checkpoint)
    _check_sampler(info, plan.body)
    loras, warnings = _verify_loras(info, plan)
    return Generation(
        answer=answer,
        checkpoint=checkpoint,
        loras=loras,
        seeds=tuple(seed for seed in info.get("all_seeds") or () if isinstance(seed, int)),
        webui_version=str(info.get("version", "unknown")),
        warnings=(*plan.warnings, *warnings),
    )


def lora_hashes(info: Mapping[str, Any]) -> dict[str, str]:
    """The LoRAs that the WebUI read for a generation: name → 12 hex digits. A comma in a name is left out (A1111)."""
    return _parse_hashes((info.get("extra_generation_params") or {}).get("Lora hashes", ""))


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
    expected = int(body.get("batch_size", 1)) * int(body.get("n_iter", 1))
    # A script (X/Y/Z plot, Prompts from file) decides for itself how many images there are.
    if not body.get("script_name") and len(images) != expected:
        raise GenerationFailed(f"the WebUI made {len(images)} of {expected} pictures", hint=INTERRUPTED)


def _check_checkpoint(info: Mapping[str, Any], body: Mapping[str, Any], checkpoint: Model) -> None:
    expected = checkpoint.sha256[:10]
    name, digits = info.get("sd_model_name"), info.get("sd_model_hash")
    by_image = [_find_model_hash(infotext) for infotext in info.get("infotexts") or ()]
    if body.get("script_name") and name is None and digits is None:
        is_ours = bool(by_image) and all(found == expected for found in by_image)
    else:
        is_ours = name == checkpoint.stem and digits == expected
    if not is_ours:
        raise CheckpointNotLoaded(
            f"the WebUI used another checkpoint than {checkpoint.name}",
            hint="somebody else uses this WebUI, or it was restarted with another checkpoint",
        )
    if any(found not in (None, expected) for found in by_image):
        raise CheckpointNotLoaded(
            f"a picture of this job was made by another checkpoint than {checkpoint.name}",
            hint="a script of the job names another checkpoint; this worker has only one",
        )


def _check_sampler(info: Mapping[str, Any], body: Mapping[str, Any]) -> None:
    requested, used = body.get("sampler_name"), info.get("sampler_name")
    # 1.10.1 silently uses another sampler in place of an unknown one.
    if requested and used != requested and not body.get("script_name"):
        raise GenerationFailed(f"the WebUI used the sampler {quoted(used)} instead of {quoted(requested)}")


def _verify_loras(info: Mapping[str, Any], plan: GenerationPlan) -> tuple[tuple[AppliedLora, ...], list[str]]:
    """The plan's LoRAs, each with whether every image was made with it, and the warnings about the others."""
    by_image = [lora_hashes(info)]
    if plan.body.get("script_name") and info.get("infotexts"):
        by_image = [_find_lora_hashes(infotext) for infotext in info["infotexts"]]
    verified: list[AppliedLora] = []
    missing: list[str] = []
    warnings: list[str] = []
    for lora in plan.loras:
        count = sum(_is_applied(lora, hashes) for hashes in by_image)
        verified.append(replace(lora, loaded=count == len(by_image)))
        if lora.model is not None and not count:
            missing.append(lora.name)
        elif 0 < count < len(by_image):
            warnings.append(f"the script used the LoRA {quoted(lora.name)} for {count} of {len(by_image)} pictures")
    if missing and plan.on_lora_error is OnLoraError.FAIL:
        raise LoraNotApplied(
            f"the WebUI did not apply {quoted_list(missing, 16)}",
            hint='set "on_lora_error": "warn" to have the picture without it',
        )
    return tuple(verified), [*warnings, *(f"the WebUI did not apply the LoRA {quoted(name)}" for name in missing)]


def _is_applied(lora: AppliedLora, hashes: Mapping[str, str]) -> bool:
    return lora.model is not None and hashes.get(lora.model.stem.replace(",", "")) == lora.model.lora_hash


def _find_model_hash(infotext: object) -> str | None:
    found = re.search(r"\bModel hash: ([0-9a-f]{10})\b", _last_line(infotext))
    return found[1] if found else None


def _find_lora_hashes(infotext: object) -> dict[str, str]:
    found = re.search(r'\bLora hashes: ("(?:[^"\\]|\\.)*")', _last_line(infotext))
    if not found:
        return {}
    try:
        return _parse_hashes(json.loads(found[1]))
    except ValueError as error:
        raise WebUILost("the WebUI's answer has an infotext in another form than A1111's") from error


def _last_line(infotext: object) -> str:
    return str(infotext).rpartition("\n")[2]


def _parse_hashes(text: object) -> dict[str, str]:
    """The pairs in `name: digits, name: digits`."""
    pairs = (pair.partition(": ") for pair in str(text).split(", ") if pair)
    return {name: digits for name, _, digits in pairs}

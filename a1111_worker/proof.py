"""What an answer of txt2img must show before it is believed: pure, from `info` alone.

`info` is a JSON string. Its `sd_model_name` and `sd_model_hash` (the first 10 digits of the file's SHA-256) are the
checkpoint that made the pictures; "Lora hashes" in `extra_generation_params` holds `name: 12 digits` for every LoRA
whose file was read, and nothing for one that was not (A1111 1.9.3 and 1.10.1, measured). The digits are A1111's hash of
the tensor data, or the file's own `sshs_model_hash`: never the file's SHA-256.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from a1111_worker.domain import AppliedLora, Generation, Model, OnLoraError
from a1111_worker.errors import CheckpointNotLoaded, GenerationFailed, LoraNotApplied, WebUILost

PNG_IN_BASE64 = "iVBORw0KGgo"


@dataclass(frozen=True)
class Plan:
    """A job's body as the WebUI gets it, and what its answer must show."""

    body: Mapping[str, Any]
    loras: tuple[AppliedLora, ...] = ()
    on_lora_error: OnLoraError = OnLoraError.FAIL
    warnings: tuple[str, ...] = ()
    allow_blank: bool = False


def prove(answer: Any, plan: Plan, checkpoint: Model) -> Generation:
    """The generation, if the answer shows everything the plan asks for.

    Raises WebUILost (no answer of txt2img), GenerationFailed (no pictures, too few, another sampler),
    CheckpointNotLoaded, or LoraNotApplied where the job does not only want to be warned.
    """
    info = _info_of(answer)
    _check_pictures(answer["images"], plan.body)
    _check_checkpoint(info, checkpoint)
    _check_sampler(info, plan.body)
    loras, warnings = _proven_loras(info, plan)
    return Generation(
        answer=answer,
        checkpoint=checkpoint,
        loras=loras,
        seeds=tuple(seed for seed in info.get("all_seeds", ()) if isinstance(seed, int)),
        webui_version=str(info.get("version", "unknown")),
        warnings=(*plan.warnings, *warnings),
    )


def lora_hashes(info: Mapping[str, Any]) -> dict[str, str]:
    """The LoRAs that the WebUI read for a generation: name → 12 hex digits."""
    said = (info.get("extra_generation_params") or {}).get("Lora hashes", "")
    pairs = (entry.partition(": ") for entry in str(said).split(", ") if entry)
    return {name: digits for name, _, digits in pairs}


def _info_of(answer: Any) -> dict[str, Any]:
    if not isinstance(answer, dict) or not isinstance(answer.get("images"), list):
        raise WebUILost("what answers at the WebUI's address does not speak A1111's API")
    try:
        info = json.loads(answer.get("info") or "")
    except (TypeError, ValueError) as error:
        raise WebUILost("the WebUI's answer has no info about its pictures") from error
    if not isinstance(info, dict):
        raise WebUILost("the WebUI's answer has no info about its pictures")
    return info


def _check_pictures(images: Sequence[Any], body: Mapping[str, Any]) -> None:
    if not images:
        raise GenerationFailed("the WebUI answered without a picture")
    for image in images:
        if not (isinstance(image, str) and image.isascii() and image.startswith(PNG_IN_BASE64)):
            raise GenerationFailed("the WebUI answered with something that is no PNG")
    expected = int(body.get("batch_size", 1)) * int(body.get("n_iter", 1))
    # A script (X/Y/Z plot, prompts from file) decides for itself how many pictures there are.
    if not body.get("script_name") and len(images) != expected:
        raise GenerationFailed(
            f"the WebUI made {len(images)} of {expected} pictures", hint="it was interrupted by somebody else"
        )


def _check_checkpoint(info: Mapping[str, Any], checkpoint: Model) -> None:
    name, digits = info.get("sd_model_name"), info.get("sd_model_hash")
    if name != checkpoint.stem or digits != checkpoint.sha256[:10]:
        raise CheckpointNotLoaded(
            f"the WebUI used another checkpoint than {checkpoint.name}",
            hint="somebody else uses this WebUI, or it was restarted with another checkpoint",
        )
    # A script can switch checkpoints between its pictures: each infotext names the one that made it.
    for infotext in info.get("infotexts", ()):
        used = re.search(r"\bModel hash: ([0-9a-f]{10})\b(?!.*\bModel hash: )", str(infotext), re.DOTALL)
        if used and used[1] != checkpoint.sha256[:10]:
            raise CheckpointNotLoaded(
                f"a picture of this job was made by another checkpoint than {checkpoint.name}",
                hint="a script of the job names another checkpoint; this worker has one",
            )


def _check_sampler(info: Mapping[str, Any], body: Mapping[str, Any]) -> None:
    asked, used = body.get("sampler_name"), info.get("sampler_name")
    # 1.10.1 silently takes another sampler for one it does not know.
    if asked and used != asked and not body.get("script_name"):
        raise GenerationFailed(f"the WebUI used the sampler {used!r} where {asked!r} was asked for")


def _proven_loras(info: Mapping[str, Any], plan: Plan) -> tuple[tuple[AppliedLora, ...], list[str]]:
    used = lora_hashes(info)
    proven: list[AppliedLora] = []
    missing: list[str] = []
    for lora in plan.loras:
        loaded = lora.model is not None and used.get(lora.model.stem) == lora.model.lora_hash
        proven.append(replace(lora, loaded=loaded))
        if lora.model is not None and not loaded:
            missing.append(lora.name)
    if missing and plan.on_lora_error is OnLoraError.FAIL:
        raise LoraNotApplied(
            f"the WebUI did not apply {', '.join(repr(name) for name in missing)}",
            hint='set "on_lora_error": "warn" to have the picture without it',
        )
    return tuple(proven), [f"the WebUI did not apply the LoRA {name!r}" for name in missing]

"""The table of txt2img: what generating tasks share, and hires."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from a1111_worker.request.fields import (
    MAX_NAME,
    MAX_PROMPT,
    MAX_SIDE,
    MIN_SIDE,
    Field,
    FieldClass,
    Limits,
    checkpoint_field,
    generation_fields,
)
from a1111_worker.request.values import anything, boolean, integer, multiple_of_8, number, text


@lru_cache(maxsize=8)
def txt2img_fields(limits: Limits) -> Mapping[str, Field]:
    """Every field that a txt2img job may contain, and every refused field with its reason."""
    passed, checked = FieldClass.PASSED, FieldClass.CHECKED
    first_side = multiple_of_8(MIN_SIDE, MAX_SIDE, or_else=(0,))
    hires_side = multiple_of_8(MIN_SIDE, limits.max_pixels // MIN_SIDE // 8 * 8, or_else=(0,))
    prompt = text(MAX_PROMPT, blank=True)
    name = text(MAX_NAME, blank=True)
    return {
        **generation_fields(limits),
        "mask_blur": Field(FieldClass.DROPPED, anything(), "there is no mask in txt2img", is_webui_field=False),
        "enable_hr": Field(passed, boolean()),
        "firstphase_width": Field(passed, first_side),
        "firstphase_height": Field(passed, first_side),
        "hr_scale": Field(passed, number(1, 8)),
        "hr_upscaler": Field(checked, name, only_with="enable_hr"),
        "hr_second_pass_steps": Field(passed, integer(0, limits.max_steps)),
        "hr_resize_x": Field(passed, hires_side),
        "hr_resize_y": Field(passed, hires_side),
        "hr_sampler_name": Field(checked, name, only_with="enable_hr"),
        "hr_scheduler": Field(checked, name, only_with="enable_hr"),
        "hr_prompt": Field(passed, prompt),
        "hr_negative_prompt": Field(passed, prompt),
        "hr_checkpoint_name": checkpoint_field(limits, "", "Use same checkpoint", only_with="enable_hr"),
    }

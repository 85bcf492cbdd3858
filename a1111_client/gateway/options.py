"""The settings that clients post, remembered for their next jobs. Nothing is ever posted to the worker's WebUI.

A1111 keeps the form in which a checkpoint was posted ("foo", a hash), and clients that compare it with the titles of
the list then find none. Here whatever was posted is shown as the title of the list.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from a1111_client.gateway.errors import Failed
from a1111_client.snapshot import Checkpoint, Snapshot

log = logging.getLogger(__name__)

CHECKPOINT = "sd_model_checkpoint"
_SHOWN_ONLY = (CHECKPOINT, "sd_checkpoint_hash")

CHANGES_THE_PICTURE = frozenset(
    """
    CLIP_stop_at_last_layers DAT_tile DAT_tile_overlap ESRGAN_tile ESRGAN_tile_overlap always_discard_next_to_last_sigma
    beta_dist_alpha beta_dist_beta code_former_weight comma_padding_backtrack ddim_discretize disable_all_extensions
    disabled_extensions emphasis enable_batch_seeds enable_prompt_comments eta_ancestral eta_ddim eta_noise_seed_delta
    extra_networks_default_multiplier face_restoration face_restoration_model fp8_storage hires_fix_refiner_pass
    hires_fix_use_firstpass_conds img2img_background_color img2img_color_correction img2img_extra_noise
    img2img_fix_steps initial_noise_multiplier inpainting_mask_weight no_dpmpp_sde_batch_determinism overlay_inpaint
    pad_cond_uncond pad_cond_uncond_v0 postprocessing_operation_order randn_source refiner_switch_by_sample_steps
    return_mask return_mask_composite rho s_churn s_min_uncond s_min_uncond_all s_noise s_tmax s_tmin sd3_enable_t5
    sd_hypernetwork sd_lora sd_noise_schedule sd_unet sd_vae sd_vae_decode_method sd_vae_encode_method
    sdxl_clip_l_skip sdxl_crop_left sdxl_crop_top sdxl_refiner_high_aesthetic_score sdxl_refiner_low_aesthetic_score
    sgm_noise_multiplier sigma_max sigma_min skip_early_cond tiling token_merging_ratio token_merging_ratio_hr
    token_merging_ratio_img2img uni_pc_lower_order_final uni_pc_order uni_pc_skip_type uni_pc_variant upcast_attn
    upscaler_for_img2img use_downcasted_alpha_bar use_old_emphasis_implementation use_old_hires_fix_width_height
    use_old_karras_scheduler_sigmas use_old_scheduling
    """.split()  # noqa: SIM905 - a hundred names read better as words
)
"""Settings of A1111 1.10.1 that change a picture. The others are about files, menus and the look of its page."""


@cache
def webui_defaults() -> Mapping[str, Any]:
    """What an unused A1111 1.10.1 answers beside its lists: options, cmd-flags, realesrgan-models."""
    found: Mapping[str, Any] = json.loads(
        resources.files(__package__).joinpath("webui.json").read_text(encoding="utf-8")
    )
    return found


class OptionsStore:
    """What clients posted. It lasts as long as the gateway runs, and all clients share it, as they share A1111's."""

    def __init__(self) -> None:
        self._posted: dict[str, Any] = {}
        self._checkpoint = ""  # its file

    def show(self, snapshot: Snapshot) -> dict[str, Any]:
        """All settings, as A1111's GET /options."""
        checkpoint = self.checkpoint(snapshot)
        return {
            **webui_defaults()["options"],
            **self._posted,
            CHECKPOINT: checkpoint.title,
            "sd_checkpoint_hash": checkpoint.sha256,
        }

    def post(self, body: Mapping[str, Any], snapshot: Snapshot) -> None:
        """Remember them. A checkpoint that is not there is A1111's error; unknown names are dropped."""
        if CHECKPOINT in body:
            self._choose(body[CHECKPOINT], snapshot)
        known = webui_defaults()["options"]
        for name, value in body.items():
            if name in _SHOWN_ONLY or name not in known:
                continue
            if value == known[name] or value is None:
                self._posted.pop(name, None)
            elif self._posted.get(name) != value:
                self._posted[name] = value
                if name in CHANGES_THE_PICTURE and name not in snapshot.options:
                    log.warning("the setting %s is remembered, but no job of this endpoint may change it", name)

    def checkpoint(self, snapshot: Snapshot) -> Checkpoint:
        """The checkpoint of the next job: the one that was posted last, else the endpoint's own."""
        chosen = snapshot.find_checkpoint(self._checkpoint) if self._checkpoint else None
        return chosen or snapshot.default_checkpoint

    def settings(self, snapshot: Snapshot) -> dict[str, Any]:
        """What was posted and a job may override."""
        return {name: value for name, value in self._posted.items() if name in snapshot.options}

    def samples_format(self) -> Any:
        """The format of pictures that was posted; None: nobody did."""
        return self._posted.get("samples_format")

    def _choose(self, name: Any, snapshot: Snapshot) -> None:
        if name is None:
            self._checkpoint = ""
            return
        found = snapshot.find_checkpoint(str(name))
        if found is None:
            there = ", ".join(checkpoint.title for checkpoint in snapshot.checkpoints[:8])
            raise Failed(
                500,
                "RuntimeError",
                f"model {str(name)[:200]!r} not found; this endpoint has {there}",
                f"model {str(name)[:200]!r} not found",
            )
        self._checkpoint = found.file

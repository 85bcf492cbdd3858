"""The models that this worker knows by name. Their file names are reserved for these CivitAI versions."""

from __future__ import annotations

from dataclasses import dataclass, replace

from a1111_worker.domain import ModelKind, ModelRef
from a1111_worker.webui_names import split_hash


@dataclass(frozen=True)
class KnownLora:
    """A LoRA of the catalog. `scale` is used if a job gives none."""

    title: str
    version_id: int
    scale: float
    file: str

    @property
    def stem(self) -> str:
        return self.file.removesuffix(".safetensors")


LORAS = (
    KnownLora("Detail Tweaker XL", 135867, 1.5, "detail_tweaker_xl.safetensors"),
    KnownLora("Hand Detail FLUX & XL", 294259, 1.0, "hand_detail_flux_xl.safetensors"),
    KnownLora("Boring Reality primaryV3.0", 348625, 0.3, "boring_reality_v3.safetensors"),
    KnownLora("Boring Reality primaryV4.0", 348837, 0.4, "boring_reality_v4.safetensors"),
    KnownLora("epiCRealismXL-KiSS Enhancer", 1051156, 1.0, "epicrealism_xl_kiss.safetensors"),
    KnownLora("Dramatic Lighting Slider", 1242203, 1.0, "dramatic_lighting_slider.safetensors"),
    KnownLora("Pony Realism Slider", 1253021, 3.0, "pony_realism_slider.safetensors"),
    KnownLora("Amateur style - slider (Pony)", 1594293, 1.0, "amateur_style_slider.safetensors"),
    KnownLora("Real Skin Slider", 1681921, 1.0, "real_skin_slider.safetensors"),
)

CHECKPOINT_URL = "https://civitai.com/api/download/models/1590699?type=Model&format=SafeTensor&size=pruned&fp=fp16"
CHECKPOINT_FILE = "jib_mix_illustrious_realistic_v2.safetensors"
CHECKPOINT_NAME = "Jib Mix Illustrious Realistic"


_BY_VERSION = {lora.version_id: lora for lora in LORAS}
_BY_NAME = {name.casefold(): lora for lora in LORAS for name in (lora.title, lora.stem)}


def lora_of_version(version_id: int) -> KnownLora | None:
    """The catalog's LoRA of a CivitAI version, None if the catalog has none."""
    return _BY_VERSION.get(version_id)


def lora_named(name: str) -> KnownLora | None:
    """The catalog's LoRA that a bare name means: its title or its file's stem, in any case, also if a hash follows."""
    name = name.strip().removesuffix(".safetensors")
    stem, _ = split_hash(name) or (name, "")
    return _BY_NAME.get(name.casefold()) or _BY_NAME.get(stem.casefold())


def resolve(ref: ModelRef) -> ModelRef:
    """If `ref` is a bare name of the catalog, the CivitAI version that it means, under the name that the caller gave.

    Any other bare name loses `.safetensors`. Any other reference is returned as it is.
    """
    if not ref.is_bare_name or ref.name is None:
        return ref
    known = lora_named(ref.name) if ref.kind is ModelKind.LORA else None
    if known is not None:
        return replace(ref, version_id=known.version_id)
    return replace(ref, name=ref.name.removesuffix(".safetensors") or ref.name)

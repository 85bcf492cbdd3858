"""The model files the sandbox's WebUI sees, and what A1111 makes of them: names, titles, hashes, contents."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sandbox.webui_errors import WebUIError

# Shapes a checkpoint must have to be loaded (checked where the tensor is there); the rest is not looked at.
_SHAPES: Mapping[str, tuple[tuple[int, ...], ...]] = {
    "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight": ((77, 768),),
    "conditioner.embedders.1.model.ln_final.weight": ((1280,),),
    "conditioner.embedders.1.model.positional_embedding": ((77, 1280),),
    "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": ((77, 768),),
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": ((768,),),
    "model.diffusion_model.input_blocks.0.0.weight": ((320, 4, 3, 3), (320, 9, 3, 3), (320, 8, 3, 3)),
}


@dataclass(frozen=True)
class Contents:
    """A safetensors file's header."""

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    data_start: int

    @property
    def architecture(self) -> str:
        """As `guess_model_config_from_state_dict` tells them apart: what it does not know is SD 1."""
        return "sdxl" if "conditioner.embedders.1.model.ln_final.weight" in self.shapes else "v1"

    @property
    def has_unet(self) -> bool:
        return any(name.startswith("model.diffusion_model.") for name in self.shapes)

    def misshapen(self) -> str | None:
        """The first tensor that does not fit its place in the model."""
        for name, right in _SHAPES.items():
            if name in self.shapes and self.shapes[name] not in right:
                return name
        return None

    @property
    def lora_architecture(self) -> str | None:
        """What a LoRA was trained for, from its layers' names and widths; None where they do not say."""
        for name, shape in self.shapes.items():
            if name.startswith(("lora_te1_", "lora_te2_")):
                return "sdxl"
            if name.startswith("lora_te_"):
                return "v1"
            if "attn2_to_k.lora_down" in name and len(shape) > 1:
                return {2048: "sdxl", 768: "v1"}.get(shape[1])
        return None


def open_safetensors(path: Path) -> Contents:
    """Read the header as the safetensors library does; WebUIError SafetensorError with its words where that refuses."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise _unreadable("HeaderTooSmall")
        (length,) = struct.unpack("<Q", start)
        if length > 100_000_000:
            raise _unreadable("HeaderTooLarge")
        if 8 + length > size:
            raise _unreadable("InvalidHeaderLength")
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        raise _unreadable("InvalidHeaderDeserialization") from None
    if 8 + length + end != size:
        raise _unreadable("MetadataIncompleteBuffer")
    return Contents(shapes, metadata, 8 + length)


def open_model(path: Path) -> Contents:
    """`read_state_dict`: what is not safetensors is unpickled, which the sandbox never does."""
    if path.suffix.lower() == ".safetensors":
        return open_safetensors(path)
    raise WebUIError("UnpicklingError", "invalid load key")


class Hashes:
    """SHA-256 by title, valid as long as the file is not newer (A1111's cache.json, which outlives the process)."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._known: dict[str, tuple[float, str]] = {}

    def known(self, title: str, path: Path) -> str | None:
        entry = self._known.get(title)
        return entry[1] if entry and path.exists() and path.stat().st_mtime <= entry[0] else None

    def of(self, title: str, path: Path, *, skip_header: bool = False) -> str | None:
        """From the cache, else computed; None where hashing is switched off. `skip_header`: as for LoRAs."""
        known = self.known(title, path)
        if known or not self.enabled:
            return known
        digest = hashlib.sha256()
        with path.open("rb") as file:
            if skip_header:
                (length,) = struct.unpack("<Q", file.read(8))
                file.seek(8 + length)
            while piece := file.read(1 << 20):
                digest.update(piece)
        self._known[title] = (path.stat().st_mtime, digest.hexdigest())
        return digest.hexdigest()

    def forget(self) -> None:
        self._known.clear()


@dataclass(eq=False)
class Checkpoint:
    """A1111's CheckpointInfo. `name` is the path inside the folder."""

    path: Path
    name: str
    sha256: str | None

    @property
    def model_name(self) -> str:
        return Path(self.name.replace("/", "_")).stem

    @property
    def bare_name(self) -> str:
        return self.path.stem

    @property
    def short_hash(self) -> str | None:
        return self.sha256[:10] if self.sha256 else None

    @property
    def title(self) -> str:
        return f"{self.name} [{self.short_hash}]" if self.sha256 else self.name

    @property
    def ids(self) -> tuple[str, ...]:
        """Everything that POST /options accepts for it."""
        ids: tuple[str, ...] = (self.model_name, self.title, self.name, self.bare_name)
        if self.sha256 and self.short_hash:
            ids += (self.short_hash, self.sha256, f"{self.bare_name} [{self.short_hash}]")
        return ids

    @property
    def config(self) -> Path | None:
        """The .yaml beside it."""
        config = self.path.with_suffix(".yaml")
        return config if config.exists() else None

    def item(self) -> dict[str, str | None]:
        return {
            "title": self.title,
            "model_name": self.model_name,
            "hash": self.short_hash,
            "sha256": self.sha256,
            "filename": str(self.path),
            "config": str(self.config) if self.config else None,
        }


class Checkpoints:
    """The list as it was when last refreshed."""

    def __init__(self, folder: Path, hashes: Hashes) -> None:
        self._folder = folder
        self._hashes = hashes
        self.listed: list[Checkpoint] = []
        self.refresh()

    def refresh(self) -> None:
        found = [path for path in _walk(self._folder, (".ckpt", ".safetensors")) if path.exists()]  # no broken links
        self.listed = [
            Checkpoint(path, name, self._hashes.known(f"checkpoint/{name}", path))
            for path, name in sorted(
                ((path, path.relative_to(self._folder).as_posix()) for path in found), key=lambda pair: pair[1].lower()
            )
        ]

    def called(self, value: object) -> Checkpoint | None:
        """Exact names alone: no other case, no part of a name, no path."""
        return next((each for each in reversed(self.listed) if value in each.ids), None)

    def closest(self, value: str) -> Checkpoint | None:
        """`get_closet_checkpoint_match`, which refiner and hires checkpoints go through."""
        return self.called(value) or next((each for each in self.listed if value in each.title), None)

    def hash(self, checkpoint: Checkpoint) -> str | None:
        checkpoint.sha256 = self._hashes.of(f"checkpoint/{checkpoint.name}", checkpoint.path)
        return checkpoint.sha256


@dataclass(eq=False)
class LoraFile:
    """A1111's NetworkOnDisk."""

    name: str
    path: Path
    metadata: dict[str, object]
    digest: str = ""

    @property
    def alias(self) -> str:
        return str(self.metadata.get("ss_output_name", self.name))

    def item(self) -> dict[str, object]:
        return {"name": self.name, "alias": self.alias, "path": str(self.path), "metadata": self.metadata}


@dataclass(frozen=True)
class ActiveLora:
    """A LoRA in use for a prompt. `digest` is the 12 digits of "Lora hashes", empty where there are none."""

    mentioned: str
    digest: str
    te: float
    unet: float
    contents: Contents = field(repr=False, compare=False)


class Loras:
    """The LoRA folder, as extensions-builtin/Lora/networks.py keeps it."""

    def __init__(self, folder: Path, hashes: Hashes) -> None:
        self._folder = folder
        self._hashes = hashes
        self.files: dict[str, LoraFile] = {}
        self._aliases: dict[str, LoraFile] = {}
        self._forbidden: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        """Of one name the folder walked later wins; an alias that two files have is nobody's."""
        self.files.clear()
        self._aliases.clear()
        self._forbidden = {"none", "addams"}
        for path in _walk(self._folder, (".pt", ".ckpt", ".safetensors")):
            file = LoraFile(path.stem, path, _lora_metadata(path))
            file.digest = self._hash(file, compute=False)
            self.files[file.name] = file
            if file.alias in self._aliases:
                self._forbidden.add(file.alias.lower())
            self._aliases[file.name] = file
            self._aliases[file.alias] = file

    def activate(self, wanted: list[tuple[str, float, float]]) -> list[ActiveLora]:
        """Load them; a name nobody has rescans the folder. What cannot be found or opened is left out in silence."""
        if any(self._called(name) is None for name, _, _ in wanted):
            self.refresh()
        active = []
        for name, te, unet in wanted:
            file = self._called(name)
            if file is None:
                continue
            try:
                contents = open_model(file.path)
                file.digest = self._hash(file, compute=True)
            except (WebUIError, OSError):
                continue
            active.append(ActiveLora(name, file.digest[:12], te, unet, contents))
        return active

    def _called(self, name: str) -> LoraFile | None:
        return self.files.get(name) if name.lower() in self._forbidden else self._aliases.get(name)

    def _hash(self, file: LoraFile, *, compute: bool) -> str:
        if stated := file.metadata.get("sshs_model_hash"):
            return str(stated)
        title = f"lora/{file.name}"
        if not compute:
            return self._hashes.known(title, file.path) or ""
        return self._hashes.of(title, file.path, skip_header=file.path.suffix == ".safetensors") or ""


class Vaes:
    """The VAE folder, as it was when last refreshed: file name → path."""

    def __init__(self, folder: Path, hashes: Hashes) -> None:
        self._folder = folder
        self._hashes = hashes
        self.listed: dict[str, Path] = {}
        self.refresh()

    def refresh(self) -> None:
        self.listed = {path.name: path for path in _walk(self._folder, (".ckpt", ".pt", ".safetensors"))}

    def hash(self, name: str) -> str | None:
        digest = self._hashes.of(f"vae/{name}", self.listed[name]) if name in self.listed else None
        return digest[:10] if digest else None


def _walk(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Every such file, folders in order, links followed."""
    for root, _, names in sorted(os.walk(folder, followlinks=True)):
        for name in sorted(names, key=str.lower):
            if name.lower().endswith(suffixes):
                yield Path(root, name)


def _lora_metadata(path: Path) -> dict[str, object]:
    if path.suffix.lower() != ".safetensors":
        return {}
    try:
        stated = open_safetensors(path).metadata
    except (WebUIError, OSError):
        return {}
    return {key: _decoded(value) for key, value in sorted(stated.items(), key=_as_shown) if key != "ssmd_cover_images"}


def _decoded(value: str) -> object:
    """A1111 shows what looks like a JSON object as one."""
    if value.startswith("{"):
        try:
            decoded: object = json.loads(value)
            return decoded
        except ValueError:
            pass
    return value


def _as_shown(entry: tuple[str, str]) -> int:
    order = ("ss_sd_model_name", "ss_resolution", "ss_clip_skip", "ss_num_train_images", "ss_tag_frequency")
    return order.index(entry[0]) if entry[0] in order else 999


def _unreadable(why: str) -> WebUIError:
    return WebUIError("SafetensorError", f"Error while deserializing header: {why}")

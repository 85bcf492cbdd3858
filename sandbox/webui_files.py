"""The model files that the sandbox's WebUI finds, as A1111 describes them: names, titles, hashes, headers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandbox.webui_errors import WebUIError

# Shapes that a checkpoint must have to be loaded. Only tensors that exist are checked, and only these.
_SHAPES: Mapping[str, tuple[tuple[int, ...], ...]] = {
    "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight": ((77, 768),),
    "conditioner.embedders.1.model.ln_final.weight": ((1280,),),
    "conditioner.embedders.1.model.positional_embedding": ((77, 1280),),
    "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": ((77, 768),),
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": ((768,),),
    "model.diffusion_model.input_blocks.0.0.weight": ((320, 4, 3, 3), (320, 9, 3, 3), (320, 8, 3, 3)),
}


@dataclass(frozen=True)
class SafetensorsHeader:
    """The header of a safetensors file. `content` stands for its tensors' bytes: it is a digest of the first ones."""

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    data_start: int
    content: str

    @property
    def architecture(self) -> str:
        """As `guess_model_config_from_state_dict` decides: a model that it does not know is SD 1."""
        return "sdxl" if "conditioner.embedders.1.model.ln_final.weight" in self.shapes else "v1"

    @property
    def has_unet(self) -> bool:
        return any(name.startswith("model.diffusion_model.") for name in self.shapes)

    def misshapen(self) -> str | None:
        """The first tensor with a shape that does not fit the model; None if all fit."""
        for name, possible in _SHAPES.items():
            if name in self.shapes and self.shapes[name] not in possible:
                return name
        return None

    @property
    def lora_architecture(self) -> str | None:
        """The architecture that a LoRA was trained for, by its layers' names and widths. None: they do not show it."""
        for name, shape in self.shapes.items():
            if name.startswith(("lora_te1_", "lora_te2_")):
                return "sdxl"
            if name.startswith("lora_te_"):
                return "v1"
            if "attn2_to_k.lora_down" in name and len(shape) > 1:
                return {2048: "sdxl", 768: "v1"}.get(shape[1])
        return None


def open_safetensors(path: Path) -> SafetensorsHeader:
    """Read the header. If the safetensors library would refuse it: WebUIError `SafetensorError` with its text."""
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
        content = hashlib.sha256(file.read(1 << 16)).hexdigest()
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        raise _unreadable("InvalidHeaderDeserialization") from None
    if 8 + length + end != size:
        raise _unreadable("MetadataIncompleteBuffer")
    return SafetensorsHeader(shapes, metadata, 8 + length, content)


def open_model(path: Path) -> SafetensorsHeader:
    """`read_state_dict`. It unpickles every other format; the sandbox never does that and fails instead."""
    if path.suffix.lower() == ".safetensors":
        return open_safetensors(path)
    raise WebUIError("UnpicklingError", "invalid load key")


class HashCache:
    """A1111's cache.json: SHA-256 by title, valid until the file is newer. It outlives the process."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._cached: dict[str, tuple[float, str]] = {}

    def cached(self, title: str, path: Path) -> str | None:
        entry = self._cached.get(title)
        return entry[1] if entry and path.exists() and path.stat().st_mtime <= entry[0] else None

    def compute(self, title: str, path: Path, *, skip_header: bool = False) -> str | None:
        """From the cache, otherwise from the file; None if hashing is switched off. `skip_header`: as for LoRAs."""
        cached = self.cached(title, path)
        if cached or not self.enabled:
            return cached
        digest = hashlib.sha256()
        with path.open("rb") as file:
            if skip_header:
                (length,) = struct.unpack("<Q", file.read(8))
                file.seek(8 + length)
            while piece := file.read(1 << 20):
                digest.update(piece)
        self._cached[title] = (path.stat().st_mtime, digest.hexdigest())
        return digest.hexdigest()

    def forget(self) -> None:
        self._cached.clear()


@dataclass(eq=False)
class CheckpointInfo:
    """A1111's `CheckpointInfo`. `name` is the path inside the folder."""

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
    def short_title(self) -> str:
        return f"{self.bare_name} [{self.short_hash}]" if self.sha256 else self.bare_name

    @property
    def ids(self) -> tuple[str, ...]:
        """Every name by which POST /options accepts it."""
        ids: tuple[str, ...] = (self.model_name, self.title, self.name, self.bare_name)
        if self.sha256 and self.short_hash:
            ids += (self.short_hash, self.sha256, f"{self.bare_name} [{self.short_hash}]")
        return ids

    @property
    def config(self) -> Path | None:
        """The .yaml file next to it."""
        config = self.path.with_suffix(".yaml")
        return config if config.exists() else None

    def as_listed(self) -> dict[str, str | None]:
        """Its entry in /sd-models."""
        return {
            "title": self.title,
            "model_name": self.model_name,
            "hash": self.short_hash,
            "sha256": self.sha256,
            "filename": str(self.path),
            "config": str(self.config) if self.config else None,
        }


class CheckpointList:
    """The checkpoints that the last refresh found."""

    def __init__(self, folder: Path, hashes: HashCache) -> None:
        self._folder = folder
        self._hashes = hashes
        self.listed: list[CheckpointInfo] = []
        self.refresh()

    def refresh(self) -> None:
        found = [
            path for path in _walk(self._folder, (".ckpt", ".safetensors")) if path.exists()
        ]  # leaves out broken links
        self.listed = [
            CheckpointInfo(path, name, self._hashes.cached(f"checkpoint/{name}", path))
            for path, name in sorted(
                ((path, path.relative_to(self._folder).as_posix()) for path in found), key=lambda pair: pair[1].lower()
            )
        ]

    def find(self, name: object) -> CheckpointInfo | None:
        """By an exact name only: the case matters; a part of a name or a path is not accepted."""
        return next((each for each in reversed(self.listed) if name in each.ids), None)

    def find_closest(self, name: str) -> CheckpointInfo | None:
        """`get_closet_checkpoint_match`, which A1111 uses for the refiner's and the hires checkpoint.

        Else the shortest title counts that the text is a part of, with or without the hash at its end.
        """
        if (exact := self.find(name)) is not None:
            return exact
        for part in (name, re.sub(r"\s*\[[0-9a-f]+\]\s*$", "", name)):
            if found := [each for each in self.listed if part in each.title]:
                return min(found, key=lambda each: len(each.title))
        return None

    def hash(self, checkpoint: CheckpointInfo) -> str | None:
        digest = self._hashes.compute(f"checkpoint/{checkpoint.name}", checkpoint.path)
        for each in (checkpoint, *self.listed):  # the list may be a newer one than the checkpoint's
            if each.name == checkpoint.name:
                each.sha256 = digest
        return digest


@dataclass(eq=False)
class LoraFile:
    """A1111's `NetworkOnDisk`."""

    name: str
    path: Path
    metadata: dict[str, object]
    digest: str = ""

    @property
    def alias(self) -> str:
        return str(self.metadata.get("ss_output_name", self.name))

    def as_listed(self) -> dict[str, object]:
        """Its entry in /loras."""
        return {"name": self.name, "alias": self.alias, "path": str(self.path), "metadata": self.metadata}


@dataclass(frozen=True)
class ActiveLora:
    """A LoRA that a prompt uses. `digest` is its 12 digits in "Lora hashes"; empty if it has none."""

    name_in_tag: str
    digest: str
    te: float
    unet: float
    header: SafetensorsHeader = field(repr=False, compare=False)


class LoraList:
    """The LoRA folder, as extensions-builtin/Lora/networks.py lists it.

    What is loaded stays as it is while the names and weights of prompts stay the same, whatever the files are by then.
    """

    def __init__(self, folder: Path, hashes: HashCache) -> None:
        self._folder = folder
        self._hashes = hashes
        self.files: dict[str, LoraFile] = {}
        self._aliases: dict[str, LoraFile] = {}
        self._forbidden: set[str] = set()
        self._loaded: list[ActiveLora] = []
        self._loaded_tags: list[tuple[str, float, float]] = []
        self.refresh()

    def refresh(self) -> None:
        """Of two files with one name the later folder counts. An alias that two files have is not valid for either."""
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

    def activate(self, tags: list[tuple[str, float, float]]) -> list[ActiveLora]:
        """Load the LoRAs of these tags (name, te weight, unet weight).

        An unknown name triggers a refresh. A LoRA that is not found or cannot be opened is left out without an error.
        A hash that was computed once is believed until the next refresh.
        """
        files = [self._find(name) for name, _, _ in tags]
        if tags == self._loaded_tags and all(file is not None and file.path.exists() for file in files):
            return self._loaded
        if any(self._find(name) is None for name, _, _ in tags):
            self.refresh()
        active = []
        for name, te, unet in tags:
            file = self._find(name)
            if file is None:
                continue
            try:
                header = open_model(file.path)
                file.digest = file.digest or self._hash(file, compute=True)
            except (WebUIError, OSError):
                continue
            active.append(ActiveLora(name, file.digest[:12], te, unet, header))
        self._loaded, self._loaded_tags = active, tags
        return active

    def _find(self, name: str) -> LoraFile | None:
        return self.files.get(name) if name.lower() in self._forbidden else self._aliases.get(name)

    def _hash(self, file: LoraFile, *, compute: bool) -> str:
        if own_hash := file.metadata.get("sshs_model_hash"):
            return str(own_hash)
        title = f"lora/{file.name}"
        if not compute:
            return self._hashes.cached(title, file.path) or ""
        return self._hashes.compute(title, file.path, skip_header=file.path.suffix == ".safetensors") or ""


@dataclass(frozen=True)
class Embedding:
    """A1111's `Embedding`. `shape` is the width of its vectors; SDXL's two widths are added."""

    path: Path
    shape: int
    vectors: int

    def as_listed(self) -> dict[str, object]:
        """Its entry in /embeddings."""
        return {
            "step": None,
            "sd_checkpoint": None,
            "sd_checkpoint_name": None,
            "shape": self.shape,
            "vectors": self.vectors,
        }


class EmbeddingList:
    """The embeddings folder, as modules/textual_inversion lists it. A changed folder is seen at the next generation."""

    _WIDTHS: Mapping[str, int] = {"v1": 768, "sdxl": 2048}

    def __init__(self, folder: Path, hashes: HashCache) -> None:
        self._folder = folder
        self._hashes = hashes
        self._names: tuple[str, ...] | None = None
        self.files: dict[str, Embedding] = {}

    def refresh(self) -> None:
        """List the folder. A file that is no embedding is left out; only A1111's log says so."""
        self._names = self._listing()
        self.files = {}
        for path in _walk(self._folder, (".safetensors",)):
            with contextlib.suppress(WebUIError, OSError):
                shapes = open_safetensors(path).shapes
                if {"clip_g", "clip_l"} <= shapes.keys():
                    width = shapes["clip_g"][-1] + shapes["clip_l"][-1]
                    self.files[path.stem] = Embedding(path, width, shapes["clip_g"][0])
                elif len(shapes) == 1:
                    (shape,) = shapes.values()
                    self.files[path.stem] = Embedding(path, shape[-1], shape[0] if len(shape) > 1 else 1)

    def refresh_if_changed(self) -> None:
        if self._listing() != self._names:
            self.refresh()

    def listed(self, architecture: str | None) -> dict[str, dict[str, object]]:
        """/embeddings: an embedding of another width than the model's is skipped. Its name is then a plain word."""
        found: dict[str, dict[str, object]] = {"loaded": {}, "skipped": {}}
        for name, embedding in self.files.items():
            fits = architecture is not None and embedding.shape == self._WIDTHS[architecture]
            found["loaded" if fits else "skipped"][name] = embedding.as_listed()
        return found

    def used(self, text: str, architecture: str) -> list[str]:
        """`name: 12 digits` of each embedding that a text names: as words in any case, not glued to letters."""
        found: dict[str, int] = {}  # where each is named first: A1111 lists them in that order
        for name, embedding in self.files.items():
            pattern = rf"(?<![A-Za-z0-9_]){re.escape(name)}(?![A-Za-z0-9_])"
            if embedding.shape == self._WIDTHS[architecture] and (match := re.search(pattern, text, re.IGNORECASE)):
                found[name] = match.start()
        return [
            f"{name}: {(self._hashes.compute(f'textual_inversion/{name}', self.files[name].path) or '')[:12]}"
            for name in sorted(found, key=lambda name: found[name])
        ]

    def _listing(self) -> tuple[str, ...]:
        return (
            tuple(path.name for path in _walk(self._folder, (".safetensors", ".pt"))) if self._folder.exists() else ()
        )


class VaeList:
    """The VAEs that the last refresh found: file name → path."""

    def __init__(self, folder: Path, hashes: HashCache) -> None:
        self._folder = folder
        self._hashes = hashes
        self.listed: dict[str, Path] = {}
        self.refresh()

    def refresh(self) -> None:
        self.listed = {path.name: path for path in _walk(self._folder, (".ckpt", ".pt", ".safetensors"))}

    def hash(self, name: str) -> str | None:
        # One entry for all VAEs: the second one with an older time gets the first one's hash (measured).
        digest = self._hashes.compute("vae", self.listed[name]) if name in self.listed else None
        return digest[:10] if digest else None


class ModelFiles:
    """`models_dir` with its folders, and A1111's own folder `models`, as A1111 lists them.

    `upscalers` is /upscalers without any file: an upscaler with a file has an address there from which A1111 would
    download it. The sandbox downloads nothing. Like A1111 it looks for upscalers only when it starts.
    """

    def __init__(
        self,
        models_dir: Path,
        hashes: HashCache,
        upscalers: Sequence[Mapping[str, Any]] = (),
        own_models_dir: Path | None = None,
    ) -> None:
        self.checkpoint_folder = models_dir / "Stable-diffusion"
        self.own_models_dir = own_models_dir or models_dir
        self.hashes = hashes
        self.upscalers = self._list_upscalers(models_dir / "ESRGAN", upscalers)
        self.checkpoints = CheckpointList(self.checkpoint_folder, hashes)
        self.loras = LoraList(models_dir / "Lora", hashes)
        self.vaes = VaeList(models_dir / "VAE", hashes)
        self.embeddings = EmbeddingList(models_dir / "embeddings", hashes)

    @property
    def face_folders(self) -> dict[str, str]:
        """Where A1111 looks for what restores faces, as /cmd-flags shows it."""
        folders = {"codeformer_models_path": "Codeformer", "gfpgan_models_path": "GFPGAN"}
        return {flag: str(self.own_models_dir / folder) for flag, folder in folders.items()}

    def has_face_restorer(self, name: str) -> bool:
        """Whether all its files are there. Without them A1111 leaves the picture as it is, and tells nobody."""
        restorers = {"CodeFormer": "Codeformer/codeformer-v0.1.0.pth", "GFPGAN": "GFPGAN/GFPGANv1.4.pth"}
        helpers = ("GFPGAN/detection_Resnet50_Final.pth", "GFPGAN/parsing_parsenet.pth")
        needed = (restorers[name], *helpers) if name in restorers else ("none",)
        return all((self.own_models_dir / path).exists() for path in needed)

    def effective_upscaler(self, name: str | None) -> str | None:
        """What really enlarges: Lanczos if the file is not there or is refused. A1111 tells nobody."""
        is_missing = name == "LDSR" or self._path_of(name).startswith("http")
        return "Lanczos" if is_missing or self.is_refused(name) else name

    def is_refused(self, name: str | None) -> bool:
        """Whether A1111's unpickler refuses the file of an upscaler."""
        path = self._path_of(name)
        return path.startswith("/") and _is_refused(Path(path))

    def _path_of(self, name: str | None) -> str:
        return next((str(each["model_path"]) for each in self.upscalers if each["name"] == name), "")

    def _list_upscalers(self, shown: Path, upscalers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Those of the table, with the paths of files that are there. Files of ESRGAN take the place of "ESRGAN_4x"."""
        folders = (self.own_models_dir / "ESRGAN", shown)
        files = {path.stem: path for folder in folders for path in _walk(folder, (".pt", ".pth"))}
        own = [
            {"name": name, "model_name": "ESRGAN_4x", "model_path": str(path), "model_url": None, "scale": 4.0}
            for name, path in files.items()
        ]
        others = [
            {**upscaler, "model_path": self._upscaler_path(upscaler)}
            for upscaler in upscalers
            if not (own and upscaler["name"] == "ESRGAN_4x")
        ]
        return others[:3] + sorted(others[3:] + own, key=lambda upscaler: str(upscaler["name"]).lower())

    def _upscaler_path(self, upscaler: Mapping[str, Any]) -> str | None:
        path: str | None = upscaler["model_path"]
        if path is None:
            return None
        found = next(self.own_models_dir.glob(f"*/{path.rpartition('/')[2]}"), None)
        return str(found) if found else path


REFUSED_PICKLE = b"PK\x03\x04"
"""How a zip begins. A1111's unpickler refuses those that torch 2.7 and later write, and in the sandbox all of them."""


def _is_refused(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(REFUSED_PICKLE)) == REFUSED_PICKLE


def _walk(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Every file with one of these suffixes, folder by folder. Links are followed."""
    for root, _, names in sorted(os.walk(folder, followlinks=True)):
        for name in sorted(names, key=str.lower):
            if name.lower().endswith(suffixes):
                yield Path(root, name)


def _lora_metadata(path: Path) -> dict[str, object]:
    if path.suffix.lower() != ".safetensors":
        return {}
    try:
        metadata = open_safetensors(path).metadata
    except (WebUIError, OSError):
        return {}
    return {key: _decode(value) for key, value in sorted(metadata.items(), key=_rank) if key != "ssmd_cover_images"}


def _decode(value: str) -> object:
    """A1111 decodes a value that looks like a JSON object."""
    if value.startswith("{"):
        try:
            decoded: object = json.loads(value)
            return decoded
        except ValueError:
            pass
    return value


def _rank(entry: tuple[str, str]) -> int:
    """A1111 lists these keys first."""
    order = ("ss_sd_model_name", "ss_resolution", "ss_clip_skip", "ss_num_train_images", "ss_tag_frequency")
    return order.index(entry[0]) if entry[0] in order else 999


def _unreadable(reason: str) -> WebUIError:
    return WebUIError("SafetensorError", f"Error while deserializing header: {reason}")

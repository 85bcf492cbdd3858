"""A1111's lists, from the snapshot of an endpoint. Paths are bare names: the worker's folders are nobody's business."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

from a1111_client.gateway.options import webui_defaults
from a1111_client.snapshot import Snapshot


def sd_models(snapshot: Snapshot) -> list[dict[str, Any]]:
    """The checkpoints. Titles keep their form: file, and the first ten digits of the hash once it is known."""
    return [
        {
            "title": checkpoint.title,
            "model_name": checkpoint.stem,
            "hash": checkpoint.sha256[:10] or None,
            "sha256": checkpoint.sha256 or None,
            "filename": checkpoint.file,
            "config": None,
        }
        for checkpoint in snapshot.checkpoints
    ]


def loras(snapshot: Snapshot) -> list[dict[str, Any]]:
    """What `<lora:NAME:1>` may name: what the WebUI and the cache have, and the catalog, fetched on demand.

    The alias is the name: some clients write the alias into the prompt, and a worker knows the names alone.
    """
    found = {str(entry["name"]): {**entry, "alias": entry["name"]} for entry in snapshot.webui("loras")}
    for entry in [*snapshot.cached("loras"), *snapshot.catalog]:
        file = str(entry.get("file") or "")
        name = str(entry.get("tag") or PurePosixPath(file).stem)
        if name and name not in found:
            found[name] = {"name": name, "alias": name, "path": file, "metadata": {}}
    return list(found.values())


def embeddings(snapshot: Snapshot) -> dict[str, Any]:
    """The embeddings that a prompt may name; those of other families are skipped, as A1111 sorts them."""
    lists = snapshot.webui("embeddings")
    loaded = dict(lists.get("loaded", {})) if isinstance(lists, dict) else {}
    skipped = dict(lists.get("skipped", {})) if isinstance(lists, dict) else {}
    unknown = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None, "shape": 0, "vectors": 0}
    for entry in snapshot.cached("embeddings"):
        name = str(entry.get("tag") or PurePosixPath(str(entry.get("file") or "")).stem)
        if name and name not in skipped:
            loaded.setdefault(name, unknown)
    return {"loaded": loaded, "skipped": skipped}


def sd_vae(snapshot: Snapshot) -> list[dict[str, Any]]:
    found = {str(entry["model_name"]): dict(entry) for entry in snapshot.webui("sd-vae") if "model_name" in entry}
    for entry in snapshot.cached("vaes"):
        file = str(entry.get("file") or "")
        found.setdefault(file, {"model_name": file, "filename": file})
    return list(found.values())


def _webui(name: str) -> Callable[[Snapshot], Any]:
    return lambda snapshot: snapshot.webui(name)


def _fixed(value: Any) -> Callable[[Snapshot], Any]:
    return lambda _snapshot: value


def _default(name: str) -> Callable[[Snapshot], Any]:
    return lambda _snapshot: webui_defaults()[name]


_UNKNOWN_MEMORY = {"ram": {"free": 0, "used": 0, "total": 0}, "cuda": {"error": "the worker may be asleep"}}

LISTS: Mapping[str, Callable[[Snapshot], Any]] = {
    "samplers": _webui("samplers"),
    "schedulers": _webui("schedulers"),
    "upscalers": _webui("upscalers"),
    "latent-upscale-modes": _webui("latent-upscale-modes"),
    "sd-models": sd_models,
    "sd-vae": sd_vae,
    "hypernetworks": _fixed([]),
    "face-restorers": _webui("face-restorers"),
    "realesrgan-models": _default("realesrgan-models"),
    "prompt-styles": _webui("prompt-styles"),
    "embeddings": embeddings,
    "loras": loras,
    "scripts": _webui("scripts"),
    "script-info": _webui("script-info"),
    "extensions": _fixed([]),
    "cmd-flags": _default("cmd-flags"),
    "memory": _fixed(_UNKNOWN_MEMORY),
}
"""What each GET answers, by the last part of its path."""

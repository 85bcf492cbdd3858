"""The names under which the WebUI sees model files: `STEM_HASH8`, a pure function of a file's content.

    my lora#2.safetensors, SHA-256 9f3c01aa…    →    my lora_2_9f3c01aa.safetensors

A1111 believes in names. It keeps a file's hash under its name as long as the file is not newer, and applies a LoRA anew
only if the list of names and weights has changed. If a name leads to another file, perhaps an older one, A1111 draws
with one of the two and reports the hash of the other (measured on 1.9.3 and 1.10.1). So other content gets another
name. Only characters that A1111's tags can hold are in it.
"""

from __future__ import annotations

import re

_STRANGE = re.compile(r"[^A-Za-z0-9._ -]")
_WITH_HASH = re.compile(r"(.+)_([0-9a-f]{8})")
_LONGEST_STEM = 200  # with the hash and the ending it fits into a file name of 255 bytes


def plain_stem(stem: str) -> str:
    """The stem of a file name with `_` in the place of every character that a tag may not be able to hold."""
    return _STRANGE.sub("_", stem)[:_LONGEST_STEM]


def stem_with_hash(stem: str, sha256: str) -> str:
    return f"{plain_stem(stem)}_{sha256[:8]}"


def embedding_word(stem: str, sha256: str) -> str:
    """What an embedding is called. A1111 takes the name for the embedding wherever it is a word of a prompt."""
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', stem)[:_LONGEST_STEM]}_{sha256[:8]}"


def vae_name(stem: str, sha256: str) -> str:
    """What a VAE is called. The setting "Automatic" takes a VAE whose name begins with the checkpoint's: none does.

    (1.9.3 and 1.10.1, modules/sd_vae.py, `find_vae_near_checkpoint`.) No checkpoint's name begins with `~`.
    """
    return f"~{stem_with_hash(stem, sha256)}"


def split_hash(name: str) -> tuple[str, str] | None:
    """STEM and HASH8 of a name; None if it has no such end. A file on disk may be called like that too."""
    found = _WITH_HASH.fullmatch(name.removeprefix("~"))
    return (found[1], found[2]) if found else None

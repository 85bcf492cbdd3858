"""Bake what A1111 reads of the Hugging Face hub at the first load of a model into HF_HOME; run by the Dockerfile.

Loaded with the calls that A1111 makes, so that exactly these find it again offline.
"""

from __future__ import annotations

import importlib
import sys

NAME = "openai/clip-vit-large-patch14"


def load() -> None:
    """The tokenizer and the text model's configuration (no weights: they are in the checkpoint)."""
    transformers = importlib.import_module("transformers")
    transformers.CLIPTextConfig.from_pretrained(NAME)
    transformers.CLIPTokenizer.from_pretrained(NAME)


if __name__ == "__main__":
    try:
        load()
    except OSError as error:
        sys.exit(f"{NAME} cannot be had from the Hugging Face hub (BAKE_TOKENIZER=0 builds without it): {error}")

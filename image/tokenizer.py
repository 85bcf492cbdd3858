"""Stores in HF_HOME what A1111 loads from the Hugging Face hub with its first model. Run by the Dockerfile.

It makes the same calls as A1111, so that these calls find the files again offline.
"""

from __future__ import annotations

import importlib
import sys

NAME = "openai/clip-vit-large-patch14"


def load() -> None:
    """The tokenizer and the text model's configuration (no weights: those are in the checkpoint)."""
    transformers = importlib.import_module("transformers")
    transformers.CLIPTextConfig.from_pretrained(NAME)
    transformers.CLIPTokenizer.from_pretrained(NAME)


if __name__ == "__main__":
    try:
        load()
    except OSError as error:
        sys.exit(f"{NAME} cannot be loaded from the Hugging Face hub (BAKE_TOKENIZER=0 builds without it): {error}")

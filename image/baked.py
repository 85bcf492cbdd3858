"""Prints what start.sh needs to know of a checkpoint that was baked into the image: its file, title and SHA-256.

    python baked.py FOLDER      in the build, with the settings that `model_manager.py prefetch checkpoint` had

With the hash, the worker takes the file for its checkpoint, wherever it came from.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from a1111_worker.config import Config

if __name__ == "__main__":
    config = Config.from_env(os.environ)
    known = json.loads((Path(sys.argv[1]) / f"{config.checkpoint_file}.json").read_bytes())
    sys.stdout.write(
        f"CHECKPOINT_FILE={config.checkpoint_file}\n"
        f"CHECKPOINT_NAME={config.checkpoint_name}\n"
        f"CHECKPOINT_SHA256={known['sha256']}\n"
    )

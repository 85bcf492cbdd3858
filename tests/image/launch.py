"""Replaces A1111's launch.py in the image that `make image-test` builds: the sandbox's WebUI with A1111's flags.

A flag that A1111 1.10.1 does not know is an error here too.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from sandbox.webui import SandboxWebUI

FLAGS = json.loads((Path(__file__).parent / "sandbox" / "data" / "1.10.1" / "cmd-flags.json").read_bytes())


def make_parser() -> argparse.ArgumentParser:
    """A parser of A1111's flags, as its own /cmd-flags lists them."""
    flags = argparse.ArgumentParser()
    for name, value in FLAGS.items():
        flag = "--" + name.replace("_", "-")
        if name == "use_cpu":
            flags.add_argument(flag, nargs="+")
        elif isinstance(value, bool):
            flags.add_argument(flag, action="store_true")
        else:
            flags.add_argument(flag)
    return flags


def main() -> None:
    options = make_parser().parse_args()
    if not (
        options.api and options.nowebui and options.server_name == "127.0.0.1" and options.skip_prepare_environment
    ):
        sys.exit("this is not how start.sh starts a WebUI")
    if importlib.util.find_spec("torch"):  # it takes as long as A1111's own imports
        log(f"torch {importlib.import_module('torch').__version__}")
    models = Path(options.ckpt_dir).parent
    initial = None if options.skip_load_model_at_start else Path(options.ckpt).name
    webui = SandboxWebUI(models, port=int(options.port), initial_checkpoint=initial, step_seconds=0.05)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with webui:
        log(f"listening on {webui.url}, LD_PRELOAD={os.environ.get('LD_PRELOAD', '')}, loading {initial}")
        try:
            signal.pause()
        except KeyboardInterrupt:
            log("shutting down")


def log(line: str) -> None:
    sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    main()

"""Stands where A1111's launch.py stands in the image that `make image-test` builds: the sandbox's WebUI, behind A1111's
flags. A flag that A1111 1.10.1 does not know is an error here too."""

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

from sandbox.webui import WebUI

FLAGS = json.loads((Path(__file__).parent / "sandbox" / "data" / "1.10.1" / "cmd-flags.json").read_bytes())


def parser() -> argparse.ArgumentParser:
    """A1111's, as its own /cmd-flags lists it."""
    made = argparse.ArgumentParser()
    for name, value in FLAGS.items():
        flag = "--" + name.replace("_", "-")
        if name == "use_cpu":
            made.add_argument(flag, nargs="+")
        elif isinstance(value, bool):
            made.add_argument(flag, action="store_true")
        else:
            made.add_argument(flag)
    return made


def main() -> None:
    asked = parser().parse_args()
    if not (asked.api and asked.nowebui and asked.server_name == "127.0.0.1" and asked.skip_prepare_environment):
        sys.exit("this is not how start.sh starts a WebUI")
    if importlib.util.find_spec("torch"):  # as long as A1111's own imports take
        say(f"torch {importlib.import_module('torch').__version__}")
    models = Path(asked.ckpt_dir).parent
    initial = None if asked.skip_load_model_at_start else Path(asked.ckpt).name
    webui = WebUI(models, port=int(asked.port), initial_checkpoint=initial, step_seconds=0.05)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with webui:
        say(f"listening on {webui.url}, LD_PRELOAD={os.environ.get('LD_PRELOAD', '')}, loading {initial}")
        try:
            signal.pause()
        except KeyboardInterrupt:
            say("shutting down")


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    main()

"""Replaces A1111's launch.py in the image that `make image-test` builds: the sandbox's WebUI with A1111's flags.

A flag that A1111 1.10.1 does not know is an error here too. So is a folder that it cannot write, and a key that is not
its business.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import runpy
import signal
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from sandbox.webui import SandboxWebUI  # noqa: E402 - it lies beside this file in the image

FLAGS = json.loads((HERE / "sandbox" / "data" / "1.10.1" / "cmd-flags.json").read_bytes())


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


def load_extensions(folder: Path, flags: argparse.ArgumentParser) -> list[str]:
    """Run the extensions' `preload.py` and scripts, as A1111 does. Returns those whose import has worked."""
    loaded = []
    for extension in sorted(folder.glob("*/")):
        runpy.run_path(str(extension / "preload.py"))["preload"](flags)
        for script in (extension / "scripts").glob("*.py"):
            try:
                runpy.run_path(str(script))
                loaded.append(script.stem)
            except ImportError as error:
                log(f"Error loading script: {script.name}: {error}")
    return loaded


def main() -> None:
    flags = make_parser()
    known, _ = flags.parse_known_args()
    extensions = load_extensions(Path(known.data_dir or HERE, "extensions"), flags)
    options = flags.parse_args()
    if not (
        options.api and options.nowebui and options.server_name == "127.0.0.1" and options.skip_prepare_environment
    ):
        sys.exit("this is not how start.sh starts a WebUI")
    if keys := [name for name in os.environ if "KEY" in name or "TOKEN" in name]:
        sys.exit(f"what are {keys} doing here?")
    data = Path(options.data_dir or HERE)
    for folder in (data / "cache", HERE / "config_states"):  # A1111 makes these at each start
        folder.mkdir(exist_ok=True)
        (folder / "written").touch()
    settings = data / "config.json"
    config = json.loads(settings.read_bytes()) if settings.exists() else None
    log(f"settings: {json.dumps(config)}")
    if importlib.util.find_spec("torch"):  # it takes as long as A1111's own imports
        log(f"torch {importlib.import_module('torch').__version__}")
    models = Path(options.ckpt_dir).parent
    initial = None if options.skip_load_model_at_start else Path(options.ckpt).name
    webui = SandboxWebUI(
        models,
        port=int(options.port),
        initial_checkpoint=initial,
        own_models_dir=data / "models",
        step_seconds=0.05,
        config_json=config,
        extensions=extensions,
    )
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

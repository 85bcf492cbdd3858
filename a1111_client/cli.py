"""The command `a1111`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from a1111_client import __version__
from a1111_client.infotext import NotAPicture, parse_infotext, read_infotext

app = typer.Typer(
    name="a1111",
    help="Pictures of Automatic1111 from a serverless endpoint on RunPod, or from one on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # its tracebacks show local variables, and one of them may be the key
)


def _show_version(shown: bool) -> None:
    if shown:
        print(__version__)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    """The options of the command itself."""


@app.command()
def info(
    file: Annotated[Path, typer.Argument(help="A picture that A1111 made: png, jpeg or webp.")],
    as_json: Annotated[bool, typer.Option("--json", help="The settings as JSON.")] = False,
) -> None:
    """Show the prompt and the settings that a picture carries. Nothing is sent anywhere."""
    try:
        text, _ = read_infotext(file.read_bytes())
    except OSError as error:
        _fail(f"{file}: {error.strerror}")
    except NotAPicture as error:
        _fail(f"{file}: {error}")
    if not text:
        _fail(f"{file}: carries no settings of A1111")
    print(json.dumps(parse_infotext(text), ensure_ascii=False, indent=2) if as_json else text)


def _fail(message: str) -> NoReturn:
    print(f"a1111: {message}", file=sys.stderr)
    raise typer.Exit(1)

"""The command `a1111`."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from a1111_client import __version__, commands, manage
from a1111_client.credentials import data_folder, key_file, save_key
from a1111_client.infotext import NotAPicture, parse_infotext, read_infotext
from a1111_client.terminal import STOPPED, WRONG_OPTIONS, EndpointId, Url, errors, fail, print_json, the_endpoint

app = typer.Typer(
    name="a1111",
    help="Pictures of Automatic1111 from a serverless endpoint on RunPod, or from one on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # its tracebacks show local variables, and one of them may be the key
)
commands.add_to(app)
manage.add_to(app)


def main() -> None:
    """The command, in a process of its own."""
    for name in ("SIGTERM", "SIGHUP"):  # a closed terminal, a script that ends: what was begun is cancelled or removed
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores it
            signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a file's name need not be Unicode
    logging.basicConfig(format="a1111: %(message)s")
    logging.getLogger("a1111_client").setLevel(logging.INFO)
    try:
        app(prog_name="a1111")
    except SystemExit as error:
        if error.code == STOPPED:
            sys.stdout.flush()
            os._exit(STOPPED)  # Python would wait for its threads, and one may send a part of a file for minutes
        raise


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
        fail(f"{file}: {error.strerror}", status=WRONG_OPTIONS)
    except NotAPicture as error:
        fail(f"{file}: {error}", status=WRONG_OPTIONS)
    if not text:
        fail(f"{file}: carries no settings of A1111")
    if as_json:
        print_json(parse_infotext(text))
    else:
        print(text)


@app.command()
def login() -> None:
    """Keep RunPod's API key in a file that only you can read. RUNPOD_API_KEY, if it is set, wins over it."""
    key = typer.prompt("RunPod's API key", hide_input=True) if sys.stdin.isatty() else sys.stdin.readline()
    try:
        with errors():
            save_key(key, key_file())
    except OSError as error:
        fail(f"{key_file()}: {error.strerror}")
    print(f"kept in {key_file()}")


@app.command()
def serve(
    endpoint: EndpointId = "",
    url: Url = "",
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen at.")] = 7860,
    api_auth: Annotated[
        str,
        typer.Option(
            envvar="A1111_API_AUTH", help="user:password[,…] that A1111's API asks for.", metavar="USER:PASSWORD"
        ),
    ] = "",
    api_key: Annotated[
        str,
        typer.Option(
            envvar="A1111_API_KEY", help="The key that OpenAI's API asks for; default: the password.", metavar="KEY"
        ),
    ] = "",
    cors_allow_origins: Annotated[
        str, typer.Option(help="Pages that may use it, such as https://lite.koboldai.net[,…].", metavar="ORIGINS")
    ] = "",
    allowed_hosts: Annotated[
        str, typer.Option(help="Further names under which it may be called.", metavar="NAMES")
    ] = "",
    refresh: Annotated[
        bool, typer.Option("--refresh", help="First ask a worker for its lists; it may have to start.")
    ] = False,
) -> None:
    """Answer A1111's API and OpenAI's Images API on this machine, with the endpoint's pictures."""
    from a1111_client.gateway import guard, runner, server  # FastAPI takes half a second, which others need not wait
    from a1111_client.snapshot import SnapshotStore

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    for noisy in ("httpx", "httpcore", "uvicorn", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        access = guard.parse_access(
            host=host,
            api_auth=api_auth,
            api_key=api_key,
            allowed_hosts=allowed_hosts,
            origins=cors_allow_origins,
        )
        chosen, store = the_endpoint(endpoint, url), SnapshotStore(data_folder() / "snapshots")
        if refresh:
            commands.ask_for_lists(the_endpoint(endpoint, url), store)
        listening = server.listen(host, port)
    except guard.BadAccess as error:
        fail(str(error), status=WRONG_OPTIONS)
    except OSError as error:
        fail(f"{host} port {port}: {error.strerror}")
    print(f"A1111's API is at {server.address(listening)}, in front of {chosen.url}", flush=True)
    server.serve(runner.Runner(chosen, store), access, listening)

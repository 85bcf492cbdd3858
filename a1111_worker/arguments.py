"""The arguments of handler.py, checked before the boot.

They are the SDK's own arguments (runpod 1.12, serverless/__init__.py), which the SDK reads itself when the worker is
ready. Reading them here too spares a caller a boot that ends with "Expecting value" or "address already in use". What
this module does not know is left to the SDK.
"""

from __future__ import annotations

import argparse
import errno
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

EXAMPLE = """--test_input '{"input": {"prompt": "a lighthouse"}}'"""
DESCRIPTION = """\
The worker. On RunPod it takes jobs from the queue. Elsewhere it runs one job, from --test_input or from
test_input.json in this folder, or serves jobs over HTTP (--rp_serve_api).
"""
EPILOG = f"""\
  python handler.py {EXAMPLE}
  python handler.py --rp_serve_api --rp_api_port 8001

Settings come from the environment: docs/subsystems/container-management.md.
"""


class BadArguments(Exception):
    """Arguments with which the worker cannot start. One line that says what is wrong, and what to write instead."""


@dataclass(frozen=True)
class Arguments:
    """What the arguments ask for. The local API has an address even if it is not asked for."""

    has_test_input: bool
    serves_api: bool
    api_host: str
    api_port: int
    wants_schema: bool = False


def parse_arguments(words: Sequence[str]) -> Arguments:
    """What follows `handler.py`. Raises BadArguments. For --help it prints a text, and ends the program with 0."""
    given, _ = build_parser().parse_known_args(words)
    if given.test_input is not None:
        _check_job(given.test_input, "--test_input")
    return Arguments(
        given.test_input is not None, given.rp_serve_api, given.rp_api_host, given.rp_api_port, given.schema
    )


def check_test_file(path: Path) -> None:
    """Raise BadArguments if the file that the SDK takes a local run's job from is missing, or holds no job."""
    try:
        content = path.read_bytes()
    except OSError:
        raise BadArguments(f"there is no {path.name} here; for example: {EXAMPLE}, or --rp_serve_api") from None
    _check_job(content, path.name)


def check_api_address(host: str, port: int) -> None:
    """Raise BadArguments if the local API cannot listen there. It listens at every address that the host has.

    It tries what asyncio does when it starts a server (base_events.py, create_server).
    """
    failures: list[int | None] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        found = []
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
        except OSError as error:
            failures.append(error.errno)
    if errno.EADDRINUSE in failures:
        raise BadArguments(
            f"port {port} of {host} is taken: end what listens there, or choose another one with --rp_api_port"
        )
    if errno.EACCES in failures:
        raise BadArguments(f"port {port} is not open to this user: choose one above 1023 with --rp_api_port")
    if len(failures) == len(found):
        raise BadArguments("--rp_api_host is no address of this machine; for example: --rp_api_host 127.0.0.1")


def build_parser() -> argparse.ArgumentParser:
    """The SDK's arguments with the SDK's defaults, and our own."""
    parser = _Parser(
        prog="python handler.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--test_input", metavar="JSON", help="run this job, and end with 0 if it succeeded")
    add("--schema", action="store_true", help="print the JSON Schema of the jobs and the answers, and end")
    add("--rp_serve_api", action="store_true", help="serve jobs over HTTP: POST /runsync")
    add("--rp_api_host", metavar="HOST", default="localhost", help="where to listen (localhost)")
    add("--rp_api_port", metavar="PORT", type=_port, default=8000, help="which port to listen on (8000)")
    add("--rp_api_concurrency", metavar="N", type=int, default=1, help="leave it at 1: more cannot start")
    add("--rp_log_level", metavar="LEVEL", help="of the SDK's own lines: ERROR, WARN, INFO or DEBUG")
    add("--rp_debugger", action="store_true", help="the SDK's debugger")
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadArguments(f"{message}; see {self.prog} --help")


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= 65535):
        raise argparse.ArgumentTypeError("takes a port from 0 to 65535, such as 8001")
    return int(text)


def _check_job(text: str | bytes, source: str) -> None:
    """Raise BadArguments if the text is no JSON object with an input. `source` is where it came from."""
    try:
        job = json.loads(text)
    except RecursionError:
        raise BadArguments(f"{source} is not JSON (it is nested too deeply); for example: {EXAMPLE}") from None
    except ValueError as error:
        raise BadArguments(f"{source} is not JSON ({error}); for example: {EXAMPLE}") from None
    if not isinstance(job, dict) or job.get("input") is None:
        raise BadArguments(f'{source} is no object with "input"; for example: {EXAMPLE}')

"""The arguments of handler.py: read as the SDK reads them, and refused before the boot if they cannot be used."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from a1111_worker.arguments import Arguments, BadArguments, check_api_address, check_test_file, parse_arguments
from tests.support import ROOT

JOB = '{"input": {"prompt": "a lighthouse"}}'


def test_without_arguments_everything_has_the_sdks_defaults() -> None:
    assert parse_arguments([]) == Arguments(has_test_input=False, serves_api=False, api_host="localhost", api_port=8000)


def test_arguments_are_read() -> None:
    words = ["--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port=8001"]

    assert parse_arguments(words) == Arguments(False, True, "127.0.0.1", 8001)
    assert parse_arguments(["--test_input", JOB]).has_test_input


def test_unknown_arguments_are_the_sdks_business() -> None:
    assert parse_arguments(["--new_option", "x", "--rp_serve_api"]).serves_api


# the arguments, and what the one line says
BAD = [
    (["--test_input", "{"], "--test_input is not JSON (Expecting property name"),
    (["--test_input", ""], "--test_input is not JSON (Expecting value"),
    (["--test_input", "test_input.json"], "--test_input is not JSON"),
    (["--test_input", "{'input': {}}"], "--test_input is not JSON"),  # Python's quotes
    (["--test_input", "[" * 100_000], "--test_input is not JSON (it is nested too deeply)"),
    (["--test_input", "1" * 10_000], "--test_input is"),  # Python 3.11 reads no number of so many digits
    (["--test_input", "[]"], '--test_input is no object with "input"'),
    (["--test_input", '"a lighthouse"'], '--test_input is no object with "input"'),
    (["--test_input", '{"prompt": "a lighthouse"}'], '--test_input is no object with "input"'),
    (["--test_input", '{"input": null}'], '--test_input is no object with "input"'),
    (["--test_input"], "argument --test_input: expected one argument"),
    (["--rp_api_port", "x"], "argument --rp_api_port: takes a port from 0 to 65535, such as 8001"),
    (["--rp_api_port", "65536"], "argument --rp_api_port: takes a port from 0 to 65535, such as 8001"),
    (["--rp_api_port", "-1"], "argument --rp_api_port: takes a port from 0 to 65535, such as 8001"),
]


@pytest.mark.parametrize(("words", "says"), BAD, ids=lambda value: str(value)[:60])
def test_arguments_that_cannot_be_used_are_refused_with_one_line(words: list[str], says: str) -> None:
    with pytest.raises(BadArguments) as raised:
        parse_arguments(words)

    line = str(raised.value)
    assert line.startswith(says)
    assert "\n" not in line and len(line) < 300
    if "test_input is" in says:
        assert f"--test_input '{JOB}'" in line


# the content of test_input.json, and what the one line says
TEST_FILES = [
    (None, "there is no test_input.json here"),
    (b"{", "test_input.json is not JSON"),
    (b"\xff", "test_input.json is not JSON"),
    (b"{}", 'test_input.json is no object with "input"'),
]


@pytest.mark.parametrize(("content", "says"), TEST_FILES)
def test_a_test_file_that_holds_no_job_is_refused_with_one_line(
    tmp_path: Path, content: bytes | None, says: str
) -> None:
    path = tmp_path / "test_input.json"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(BadArguments) as raised:
        check_test_file(path)

    assert str(raised.value).startswith(says)
    assert "--test_input" in str(raised.value) and str(tmp_path) not in str(raised.value)


def test_a_test_file_with_a_job_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "test_input.json"
    path.write_text(JOB)

    check_test_file(path)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_taken_port_is_refused_with_the_argument_that_chooses_another(listener: socket.socket, host: str) -> None:
    port = listener.getsockname()[1]
    try:
        socket.getaddrinfo(host, port)
    except OSError:
        pytest.skip(f"{host} has no address on this machine")

    with pytest.raises(BadArguments) as raised:
        check_api_address(host, port)

    assert str(raised.value) == (
        f"port {port} of {host} is taken: end what listens there, or choose another one with --rp_api_port"
    )


def test_a_free_port_is_free_even_a_moment_after_its_last_connection(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port)):
        accepted, _ = listener.accept()
        accepted.close()  # this side first: the port goes on waiting for packets that are late
    listener.close()

    check_api_address("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1", "x" * 300])
def test_a_host_that_is_not_this_machine_is_refused_with_its_argument(host: str) -> None:
    with pytest.raises(BadArguments, match="--rp_api_host"):
        check_api_address(host, 8000)


def test_the_sdk_has_the_same_arguments_with_the_same_defaults() -> None:
    script = """
import json
from a1111_worker.arguments import build_parser
from tests.support import ROOT
from runpod.serverless import parser
for each in (build_parser(), parser):
    print(json.dumps({action.option_strings[-1]: action.default for action in each._actions}))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)

    ours, theirs = map(json.loads, done.stdout.splitlines())
    del ours["--schema"]  # ours alone
    assert ours.keys() == theirs.keys()
    assert {name: value or None for name, value in ours.items()} == theirs  # a flag that is not given is None there

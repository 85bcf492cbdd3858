"""Which requests are a program's, and which may come from a page on the internet."""

from __future__ import annotations

import pytest

from local_queue.access import has_key, is_loopback, why_refused

HERE = {"host": "127.0.0.1:8000"}

ALLOWED = [
    # a program: neither Origin nor Sec-Fetch-Site
    HERE,
    {"host": "localhost:8000"},
    {"host": "LOCALHOST"},
    {"host": "host.docker.internal:8000"},
    {"host": "192.168.1.5:8000"},
    {"host": "[::1]:8000"},
    {"host": "gpu-box:8000"},  # one of --allowed-hosts
    {**HERE, "sec-fetch-site": "none"},  # typed into the address bar
    {**HERE, "sec-fetch-site": "same-origin"},
    {**HERE, "origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin"},
]

REFUSED = [
    ({}, "Host"),
    ({"host": "evil.example"}, "Host"),  # DNS rebinding: its own name leads to 127.0.0.1
    ({"host": "evil.example:8000", "origin": "http://evil.example:8000"}, "Host"),
    ({"host": "127.0.0.1.evil.example"}, "Host"),
    ({"host": "evil.example@127.0.0.1.evil.example"}, "Host"),
    ({"host": "[::1"}, "Host"),
    ({**HERE, "origin": "https://evil.example"}, "origin"),
    ({**HERE, "origin": "null"}, "origin"),  # a sandboxed frame, a file
    ({**HERE, "origin": "http://127.0.0.1:3000"}, "origin"),  # another program's page on this machine
    ({**HERE, "origin": "http://localhost:8000"}, "origin"),
    ({**HERE, "sec-fetch-site": "cross-site"}, "site"),  # an image, a link, a form of a page without Origin
    ({**HERE, "sec-fetch-site": "same-site"}, "site"),
]


@pytest.mark.parametrize("headers", ALLOWED)
def test_a_program_and_this_origin_may_ask(headers: dict[str, str]) -> None:
    assert why_refused(headers, {"gpu-box"}) is None


@pytest.mark.parametrize(("headers", "reason"), REFUSED)
def test_a_page_of_another_origin_may_not_ask(headers: dict[str, str], reason: str) -> None:
    assert reason in (why_refused(headers, {"gpu-box"}) or "")


@pytest.mark.parametrize(
    ("given", "expected", "fits"),
    [
        ({}, None, True),  # no key is needed
        ({"authorization": "Bearer k"}, "Bearer k", True),
        ({}, "Bearer k", False),
        ({"authorization": "k"}, "Bearer k", False),
        ({"authorization": "Bearer k "}, "Bearer k", False),
        ({"authorization": "Bearer \xe9\udce9"}, "Bearer k", False),  # no bytes of a header end the request with a 500
    ],
)
def test_a_key_must_be_exactly_the_expected_one(given: dict[str, str], expected: str | None, fits: bool) -> None:
    assert has_key(given, expected) is fits


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.5", False),
        ("gpu-box", False),
    ],
)
def test_only_loopback_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected

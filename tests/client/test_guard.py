"""Who may use the gateway: hosts, origins, users and keys."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from a1111_client.gateway.guard import BadAccess, parse_access
from tests.client.scripted import Desk, desk

LITE = "https://lite.koboldai.net"


@pytest.fixture(scope="module")
def open_desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """Without a secret; one foreign page is named."""
    access = parse_access(host="127.0.0.1", origins=f"{LITE}, http://tavern.lan:8000", allowed_hosts="desk.lan")
    with desk(tmp_path_factory.mktemp("open"), access=access, asleep=True) as made:
        yield made


HOSTS = [
    ("127.0.0.1:7860", 200),
    ("[::1]:7860", 200),
    ("192.168.1.5", 200),
    ("localhost:7860", 200),
    ("host.docker.internal:7860", 200),
    ("DESK.lan", 200),
    ("evil.example.com", 403),  # a name that its owner pointed at this machine
    ("127.0.0.1.evil.example.com", 403),
    ("", 403),
]


@pytest.mark.parametrize(("host", "status"), HOSTS)
def test_only_this_machines_own_names_are_answered(open_desk: Desk, host: str, status: int) -> None:
    assert open_desk.get("options", headers={"Host": host}).status_code == status


BROWSERS: list[tuple[dict[str, str], int]] = [
    ({}, 200),  # a program
    ({"Origin": "http://127.0.0.1:7860"}, 200),  # the page itself
    ({"Origin": "http://127.0.0.1:7860", "Sec-Fetch-Site": "same-origin"}, 200),
    ({"Sec-Fetch-Site": "none"}, 200),  # somebody typed the address
    ({"Origin": LITE}, 200),
    ({"Origin": LITE, "Sec-Fetch-Site": "cross-site"}, 200),
    ({"Origin": "null"}, 403),
    ({"Origin": "http://127.0.0.1:8000"}, 403),  # another port is another page
    ({"Origin": "https://evil.example.com"}, 403),
    ({"Sec-Fetch-Site": "cross-site"}, 403),  # an <img> of a page
    ({"Sec-Fetch-Site": "same-site"}, 403),
    ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 403),  # a link to a list, not to the page
]


@pytest.mark.parametrize(("headers", "status"), BROWSERS)
@pytest.mark.parametrize("path", ["/sdapi/v1/options", "/queue/status"])
def test_a_foreign_page_is_not_answered(open_desk: Desk, path: str, headers: dict[str, str], status: int) -> None:
    answer = open_desk.http.get(path, headers={"Host": "127.0.0.1:7860", **headers})

    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"] == "HTTPException"


def test_a_link_on_another_page_may_lead_to_the_page(open_desk: Desk) -> None:
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}

    assert open_desk.http.get("/", headers=link).status_code == 200
    assert open_desk.http.get("/", headers={**link, "Sec-Fetch-Mode": "no-cors"}).status_code == 403


def test_a_named_page_has_its_preflight_without_credentials_and_sees_errors_too(open_desk: Desk) -> None:
    asked = {
        "Origin": LITE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
        "Access-Control-Request-Private-Network": "true",
    }

    preflight = open_desk.http.options("/sdapi/v1/txt2img", headers=asked)
    failed = open_desk.post("txt2img", {"steps": "x"}, headers={"Origin": LITE})
    foreign = open_desk.http.options("/sdapi/v1/txt2img", headers={**asked, "Origin": "https://evil.example.com"})

    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, LITE)
    assert preflight.headers["access-control-allow-private-network"] == "true"
    assert (failed.status_code, failed.headers["access-control-allow-origin"]) == (422, LITE)
    assert foreign.status_code == 403
    assert "access-control-allow-origin" not in foreign.headers


def basic(text: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(text.encode()).decode()}"}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def closed_desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """With two users."""
    access = parse_access(host="127.0.0.1", api_auth="me:secret,you:se:cret")
    with desk(tmp_path_factory.mktemp("closed"), access=access) as made:
        yield made


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (basic("me:secret"), 200),
        (basic("you:se:cret"), 200),
        (bearer("secret"), 200),
        ({}, 401),
        (basic("me:wrong"), 401),
        (basic("me:se:cret"), 401),
        (basic(":"), 401),
        ({"Authorization": "Basic"}, 401),
        ({"Authorization": "Basic !!!"}, 401),
        ({"Authorization": "Bearer"}, 401),
    ],
)
def test_with_users_every_route_asks_who_it_is(closed_desk: Desk, headers: dict[str, str], status: int) -> None:
    calls: list[tuple[str, str, Any]] = [
        ("GET", "options", None),
        ("GET", "cmd-flags", None),
        ("GET", "loras", None),  # A1111 leaves this one open
        ("GET", "progress", None),
        ("POST", "interrupt", None),
        ("POST", "options", {}),
        ("POST", "txt2img", {"prompt": "x", "width": 64, "height": 64}),
    ]

    for method, path, body in calls:
        answer = closed_desk.http.request(method, f"/sdapi/v1/{path}", json=body, headers=headers)
        assert answer.status_code == status, path
        if status == 401:
            assert set(answer.json()) == {"error", "detail", "body", "errors"}


def test_what_shows_nothing_is_free(closed_desk: Desk) -> None:
    assert closed_desk.http.get("/queue/status").status_code == 200
    assert closed_desk.http.head("/").status_code == 200
    assert closed_desk.http.get("/page/index.html").status_code == 200
    assert closed_desk.http.get("/page/../app.py").status_code == 404


@pytest.mark.parametrize("header", ["", "Basic", "Basic !!!", "Bearer x", "senseless"])
def test_without_users_no_authorization_header_is_looked_at(open_desk: Desk, header: str) -> None:
    assert open_desk.get("options", headers={"Authorization": header}).status_code == 200


BAD: list[tuple[dict[str, str], str]] = [
    ({"host": "0.0.0.0"}, "spends your money"),
    ({"host": "192.168.1.5"}, "spends your money"),
    ({"host": "desk.lan"}, "spends your money"),
    ({"host": "127.0.0.1", "origins": "*"}, "name the page's own origin"),
    ({"host": "127.0.0.1", "origins": "lite.koboldai.net"}, "takes origins such as"),
    ({"host": "127.0.0.1", "api_auth": "me"}, "takes user:password"),
]


@pytest.mark.parametrize(("given", "reason"), BAD)
def test_what_cannot_be_meant_is_refused_with_what_to_do(given: dict[str, str], reason: str) -> None:
    with pytest.raises(BadAccess, match=reason):
        parse_access(**given)


@pytest.mark.parametrize("secret", [{"api_auth": "me:secret"}, {"api_key": "key"}])
def test_beyond_loopback_it_starts_with_a_secret(secret: dict[str, str]) -> None:
    assert parse_access(host="0.0.0.0", **secret).has_secret


def test_with_a_key_alone_any_user_has_it_as_password(tmp_path: Path) -> None:
    access = parse_access(host="127.0.0.1", api_key="key")

    assert access.prove(basic("anybody:key")["Authorization"], bearer=False)
    assert access.prove(bearer("key")["Authorization"], bearer=True)

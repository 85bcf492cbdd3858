"""Which origins may be reached, and that nothing else is."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from a1111_worker.origins import Origin, OriginRefused, origin_of
from a1111_worker.transfer.egress import (
    USER_AGENT,
    EgressPolicy,
    Route,
    may_connect,
    open_connection,
    open_session,
)
from sandbox.server import Exchange, Server


class RedirectingServer(Server):
    """Answers 200, or redirects a path to what `redirects` has for it."""

    def __init__(self) -> None:
        super().__init__()
        self.redirects: dict[str, str] = {}
        self.status = 307

    def answer(self, exchange: Exchange) -> None:
        if location := self.redirects.get(exchange.asked.path):
            exchange.send(self.status, headers={"location": location})
        else:
            exchange.send(200, b"here", {"set-cookie": "seen=1"})


@pytest.fixture
def server() -> Iterator[RedirectingServer]:
    with RedirectingServer() as server:
        yield server


@pytest.fixture
def other() -> Iterator[RedirectingServer]:
    with RedirectingServer() as server:
        yield server


POLICY = EgressPolicy(["civitai.com", "https://mirror.example:8443", "*.r2.example", "http://127.0.0.1:8081"])


@pytest.mark.parametrize(
    "url",
    [
        "https://civitai.com/api/download/models/1?type=Model#x",
        "https://CIVITAI.com:443/api",
        "https://civitai.com",
        "https://mirror.example:8443/file",
        "https://bucket.r2.example/key?X-Amz-Signature=ab%2Fc",
        "http://127.0.0.1:8081/file",
    ],
)
def test_a_listed_origin_may_be_reached(url: str) -> None:
    POLICY.check(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://civitai.com/",  # another scheme
        "https://civitai.com:8443/",  # another port
        "https://evil.example/",
        "https://b2.civitai.com/",  # never by suffix
        "https://civitai.com.evil.example/",
        "https://notcivitai.com/",
        "https://civitai.com@evil.example/",  # credentials
        "https://evil.example@civitai.com/",
        "https://civitai.com\\@evil.example/",  # read differently by different parsers
        "https://civitai.com /",
        "https://civitai%2ecom/",
        "https://civitai.com.",  # the same host, but not the same origin
        "https:///civitai.com",
        "https://r2.example/",  # `*.host` stands for the hosts below it only
        "https://evilr2.example/",
        "http://bucket.r2.example/",
        "http://127.0.0.1:8082/",  # exactly that origin
        "http://localhost:8081/",
        "https://127.0.0.1:8081/",
        "http://2130706433:8081/",  # 127.0.0.1 as one number
        "http://0x7f.1:8081/",
        "http://169.254.169.254/latest/meta-data",
        "file:///etc/passwd",
        "//civitai.com/x",
        "https://civitai.com/\n",
        "https://civitai.com/ä",
        "",
    ],
)
def test_anything_else_is_refused(url: str) -> None:
    with pytest.raises(OriginRefused):
        POLICY.check(url)


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("https://any.example/picture.png", True),
        ("https://any.example:8443/", False),  # port 443 alone
        ("http://any.example/", False),
        ("https://user@any.example/", False),
    ],
)
def test_a_star_stands_for_every_host_at_port_443(url: str, allowed: bool) -> None:
    policy = EgressPolicy(["*"])

    if allowed:
        policy.check(url)
    else:
        with pytest.raises(OriginRefused):
            policy.check(url)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "10.0.0.7", "169.254.169.254", "::1", "::ffff:10.0.0.7"])
def test_a_star_leads_to_no_private_address(host: str) -> None:
    with pytest.raises(OriginRefused, match="not public"):
        EgressPolicy(["*"]).connect(Origin("https", f"[{host}]" if ":" in host else host, 443), 1.0)


NAMED = Origin("https", "files.example", 443)


@pytest.mark.parametrize(
    ("origin", "address", "expected"),
    [
        (NAMED, "93.184.216.34", True),
        (NAMED, "2606:4700::6810:84e5", True),
        (NAMED, "127.0.0.1", False),
        (NAMED, "169.254.169.254", False),  # the cloud's metadata
        (NAMED, "fe80::1%eth0", False),
        (NAMED, "::10.0.0.1", False),
        (Origin("https", "10.0.0.7", 443), "10.0.0.7", True),  # listed as an address, on purpose
        (Origin("https", "10.0.0.7", 443), "10.0.0.8", False),
        (Origin("http", "localhost", 80), "127.0.0.1", True),
        (Origin("http", "localhost", 80), "::1", True),
        (Origin("http", "localhost", 80), "10.0.0.1", False),
        (Origin("http", "localhost", 80), "93.184.216.34", False),
        (Origin("https", "[fd00::1]", 443), "fd00::1", True),
        (Origin("https", "[fd00::1]", 443), "fd00::2", False),
    ],
)
def test_which_addresses_an_origin_may_lead_to(origin: Origin, address: str, expected: bool) -> None:
    assert may_connect(origin, address) is expected


def test_a_name_that_resolves_to_this_machine_is_refused_before_anything_is_sent(server: RedirectingServer) -> None:
    # This machine's own name: listed as a host, resolved by the real resolver, leads to a private address.
    name = socket.gethostname().lower()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        pytest.skip(f"the name of this machine, {name}, has no address")
    port = int(server.url.rpartition(":")[2])
    session = open_session(EgressPolicy([Origin("http", name, port)]))

    with pytest.raises(OriginRefused, match="not public"):
        session.get(f"http://{name}:{port}/")

    assert not server.asked


def test_a_session_reaches_what_is_listed_and_nothing_else(server: RedirectingServer, other: RedirectingServer) -> None:
    session = open_session(EgressPolicy([server.url]))

    answer = session.get(f"{server.url}/file", headers={"Authorization": "Bearer key"})
    with pytest.raises(OriginRefused):
        session.get(f"{other.url}/file")

    assert answer.content == b"here"
    assert server.asked[0].headers["authorization"] == "Bearer key"
    assert not other.asked


def test_a_session_refuses_credentials_in_a_url(server: RedirectingServer) -> None:
    with pytest.raises(OriginRefused):
        open_session(EgressPolicy([server.url])).get(server.url.replace("http://", "http://user:pass@"))

    assert not server.asked


def test_a_session_sends_no_headers_of_its_own_but_its_name(server: RedirectingServer) -> None:
    session = open_session(EgressPolicy([server.url]))

    session.get(server.url)
    session.get(server.url)  # the cookie of the first answer is not sent back

    sent = server.asked[1].headers
    assert set(sent) == {"host", "user-agent", "accept", "accept-encoding"}
    assert sent["user-agent"].startswith("a1111-worker/")
    assert sent["user-agent"] == USER_AGENT
    assert sent["accept-encoding"] == "identity"


def test_proxies_and_netrc_of_the_environment_are_ignored(
    server: RedirectingServer, other: RedirectingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, other.url)
    monkeypatch.setenv("no_proxy", "")

    open_session(EgressPolicy([server.url])).get(f"{server.url}/file")

    assert not other.asked
    assert "authorization" not in server.asked[0].headers


def test_a_session_never_follows_a_redirect(server: RedirectingServer, other: RedirectingServer) -> None:
    server.redirects["/a"] = f"{other.url}/b"

    answer = open_session(EgressPolicy([server.url, other.url])).get(f"{server.url}/a")

    assert answer.status_code == 307
    assert not other.asked


def follow(session: requests.Session, url: str) -> requests.Response:
    """GET with redirects, as every user of a `Route` does it."""
    route = Route(url)
    while True:
        origin_of(route.url)
        answer = session.get(route.url)
        if not route.follow(answer.status_code, answer.headers.get("Location")):
            return answer


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/latest/meta-data",
        "http://10.0.0.1/",
        "http://civitai.com/",  # from https to http
        "https://evil.example/",
        "file:///etc/passwd",
        "https://user:pass@civitai.com/",
        "//evil.example/",
        "http://[::1",
    ],
)
def test_a_redirect_to_any_other_origin_is_refused(server: RedirectingServer, location: str) -> None:
    server.redirects["/a"] = location
    session = open_session(EgressPolicy([server.url, "civitai.com"]))

    with pytest.raises(OriginRefused):
        follow(session, f"{server.url}/a")


def test_redirects_in_a_circle_end(server: RedirectingServer) -> None:
    server.redirects = {"/a": "/b", "/b": "/a"}

    with pytest.raises(OriginRefused, match="circle"):
        follow(open_session(EgressPolicy([server.url])), f"{server.url}/a")

    assert len(server.asked) == 2


@pytest.mark.parametrize(("redirects", "is_followed"), [(5, True), (6, False), (20, False)])
def test_redirects_are_followed_five_times(server: RedirectingServer, redirects: int, is_followed: bool) -> None:
    server.redirects = {f"/{number}": f"/{number + 1}" for number in range(redirects)}
    session = open_session(EgressPolicy([server.url]))

    if is_followed:
        assert follow(session, f"{server.url}/0").content == b"here"
    else:
        with pytest.raises(OriginRefused, match="more than 5 redirects"):
            follow(session, f"{server.url}/0")
        assert len(server.asked) == 6


def test_a_redirect_with_letters_beyond_ascii_is_escaped() -> None:
    route = Route("https://files.example/a")

    is_redirect = route.follow(302, "https://files.example/Ã¤ b?sig=%2Fx")

    assert is_redirect
    assert route.url == "https://files.example/%C3%A4%20b?sig=%2Fx"


def test_a_connection_of_the_engine_goes_through_the_same_checks(server: RedirectingServer) -> None:
    seen: list[socket.socket] = []
    connection = open_connection(EgressPolicy([server.url]), origin_of(server.url), timeout=5, on_socket=seen.append)
    with pytest.raises(OriginRefused):
        open_connection(EgressPolicy([]), origin_of(server.url), timeout=5, on_socket=seen.append)

    connection.request("GET", "/")

    assert connection.getresponse().read() == b"here"
    assert len(seen) == 1
    connection.close()


def test_a_connection_of_the_engine_that_was_closed_does_not_connect_by_itself(server: RedirectingServer) -> None:
    connection = open_connection(
        EgressPolicy([server.url]), origin_of(server.url), timeout=5, on_socket=lambda opening: None
    )
    connection.close()

    with pytest.raises(http.client.NotConnected):
        connection.request("GET", "/")

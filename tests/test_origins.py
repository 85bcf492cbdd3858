"""Origins: how a setting or a URL names one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a1111_worker.origins import STORAGE_HOSTS, Origin, OriginRefused, origin_of, parse_origin


@pytest.mark.parametrize(
    ("entry", "origin"),
    [
        ("civitai.com", Origin("https", "civitai.com", 443)),
        ("https://civitai.com", Origin("https", "civitai.com", 443)),
        ("https://civitai.com/", Origin("https", "civitai.com", 443)),  # as a browser writes it
        (" HTTPS://CivitAI.com:443 ", Origin("https", "civitai.com", 443)),  # one origin, however it is spelled
        ("mirror.example:8443", Origin("https", "mirror.example", 8443)),
        ("*.example.com", Origin("https", "*.example.com", 443)),
        ("http://127.0.0.1:8081", Origin("http", "127.0.0.1", 8081)),
        ("http://localhost:8081", Origin("http", "localhost", 8081)),
        ("https://[2001:db8::1]:444", Origin("https", "[2001:db8::1]", 444)),
    ],
)
def test_an_origin_is_read_from_a_setting(entry: str, origin: Origin) -> None:
    assert parse_origin(entry) == origin


@pytest.mark.parametrize(
    "entry",
    [
        "http://civitai.com",  # anyone on the network could read it
        "http://10.0.0.7:80",  # loopback only
        "https://user:pass@civitai.com",
        "https://civitai.com/models",  # a path would look like a limit, but is none
        "https://civitai.com?x",
        "ftp://civitai.com",
        "https://civitai.com:99999",
        "https://civitai.com:0",  # no port: never the scheme's own one
        "civitai.com:00000",
        "https://",
        "https://*",
        "https://a.*.com",
        "http://*.localhost:80",
        "",
        "two hosts",
    ],
)
def test_anything_that_is_no_origin_is_refused(entry: str) -> None:
    with pytest.raises(OriginRefused):
        parse_origin(entry)


@given(st.text())
def test_any_text_either_has_an_origin_or_is_refused(text: str) -> None:
    try:
        origin = origin_of(text)
    except OriginRefused:
        return
    assert origin.host in text.lower()


def test_storage_hosts_are_origins_and_not_civitais_api() -> None:
    origins = {parse_origin(host) for host in STORAGE_HOSTS}

    assert Origin("https", "b2.civitai.com", 443) in origins
    assert "civitai.com" not in {origin.host for origin in origins}
    assert [origin.host for origin in origins if origin.host.startswith("*.")] == ["*.hf.co"]


@pytest.mark.parametrize("text", ["https://files.example", "https://files.example:8443", "http://127.0.0.1:8081"])
def test_an_origin_is_printed_as_a_setting_names_it(text: str) -> None:
    assert str(parse_origin(text)) == text


@pytest.mark.parametrize("port", ["0", "00", "65536"])
def test_a_port_that_no_host_has_is_refused_in_words(port: str) -> None:
    with pytest.raises(OriginRefused, match="its port is not between 1 and 65535"):
        origin_of(f"https://files.example:{port}/")

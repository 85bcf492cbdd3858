"""Every way to name a model, and every way that is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from a1111_worker.domain import ModelKind, ModelRef
from a1111_worker.models.references import CIVITAI_HOSTS, MAX_ID, BadReference, parse_reference

LORA = ModelKind.LORA
SHA = "0D9BD1B873A7863E128B4672E3E245838858F71469A3CEC58123C16C06F83BD7"
ALLOWED = ("https://cdn.example.com", "mirror.example.org", "https://odd.example:8443", "http://127.0.0.1:8081")


def refused(value: Any, *, kind: ModelKind = LORA) -> BadReference:
    with pytest.raises(BadReference) as caught:
        parse_reference(value, kind=kind, allowed_hosts=ALLOWED)
    return caught.value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        # download URLs
        ("https://civitai.com/api/download/models/135867", {"version_id": 135867}),
        (
            "https://civitai.com/api/download/models/135867?type=Model&format=SafeTensor&size=pruned&fp=fp16",
            {"version_id": 135867, "format": "SafeTensor", "size": "pruned", "fp": "fp16"},
        ),
        ("https://civitai.com/api/download/models/135867?fileId=99264", {"version_id": 135867, "file_id": 99264}),
        # every host, with www., in any case, with a slash at the end, with https's own port
        ("https://civitai.red/api/download/models/1/", {"version_id": 1}),
        ("HTTPS://WWW.CivitAI.green/api/download/models/1", {"version_id": 1}),
        ("https://civitai.com:443/model-versions/1", {"version_id": 1}),
        ("  https://civitai.com/model-versions/1 ", {"version_id": 1}),
        # pages: the version if it is named, else the model
        ("https://civitai.com/models/122359?modelVersionId=135867", {"version_id": 135867}),
        ("https://civitai.com/models/122359/detail-tweaker-xl?modelVersionId=135867", {"version_id": 135867}),
        ("https://civitai.com/models/122359/detail-tweaker-xl", {"model_id": 122359}),
        ("https://civitai.com/models/122359?tab=gallery", {"model_id": 122359}),
        ("https://civitai.com/model-versions/135867", {"version_id": 135867}),
        # the API's own URLs
        ("https://civitai.com/api/v1/model-versions/135867", {"version_id": 135867}),
        ("https://civitai.com/api/v1/models/122359", {"model_id": 122359}),
        # AIR: whole, without urn: or air:, short, with file and format
        ("urn:air:sdxl:lora:civitai:122359@135867", {"version_id": 135867}),
        ("URN:AIR:SDXL:LoRA:CivitAI:122359@135867", {"version_id": 135867}),
        ("air:sdxl:lora:civitai:122359@135867", {"version_id": 135867}),
        ("sdxl:lycoris:civitai:122359@135867", {"version_id": 135867}),
        ("lora:civitai:122359@135867", {"version_id": 135867}),
        ("civitai:122359@135867", {"version_id": 135867}),
        ("civitai:122359", {"model_id": 122359}),
        ("urn:air:sdxl:dora:civitai:1@2+3.safetensors", {"version_id": 2, "file_id": 3}),
        # names: those of the catalog mean their version
        ("my_own", {"name": "my_own"}),
        ("detail_tweaker_xl", {"name": "detail_tweaker_xl", "version_id": 135867}),
        ("Amateur style - slider (Pony)", {"name": "Amateur style - slider (Pony)", "version_id": 1594293}),
        ("日本語 ✨", {"name": "日本語 ✨"}),
        # digits alone are a version id, also as text
        ("135867", {"version_id": 135867}),
        ({"version_id": "135867"}, {"version_id": 135867}),
        ({"version_id": "135867.0"}, {"version_id": 135867}),
        ({"name": "135867"}, {"name": "135867"}),
        # objects
        ({"version_id": 135867}, {"version_id": 135867}),
        ({"version_id": 135867.0}, {"version_id": 135867}),
        ({"name": "x", "scale": "the caller's business"}, {"name": "x"}),
        ({"version_id": 1, "name": "My Style: 2", "url": None}, {"version_id": 1, "name": "My Style: 2"}),
        ({"version_id": 1, "hash": SHA}, {"version_id": 1, "sha256": SHA.lower()}),
        ({"version_id": 1, "hash": f"sha256:{SHA}"}, {"version_id": 1, "sha256": SHA.lower()}),
        ({"url": "civitai:1@2", "name": "x"}, {"version_id": 2, "name": "x"}),
        ({"url": "https://civitai.com/models/9?modelVersionId=2", "version_id": 2}, {"version_id": 2}),
        ({"url": "https://civitai.com/models/9", "version_id": 2}, {"version_id": 2}),
        # other hosts keep their URL
        ("https://cdn.example.com/a%20b.safetensors?v=1", {"url": "https://cdn.example.com/a%20b.safetensors?v=1"}),
        ("https://MIRROR.example.org/a", {"url": "https://mirror.example.org/a"}),
        ("https://odd.example:8443/a", {"url": "https://odd.example:8443/a"}),
        ("http://127.0.0.1:8081/a", {"url": "http://127.0.0.1:8081/a"}),
    ],
)
def test_every_form_is_reduced_to_its_ids_or_its_name(value: Any, expected: dict[str, Any]) -> None:
    ref = parse_reference(value, kind=LORA, allowed_hosts=ALLOWED)

    assert ref == ModelRef(kind=LORA, **expected)


def test_a_checkpoint_is_named_in_the_same_ways() -> None:
    air = parse_reference("urn:air:sdxl:checkpoint:civitai:1@2", kind=ModelKind.CHECKPOINT)

    assert air == ModelRef(kind=ModelKind.CHECKPOINT, version_id=2)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        # schemes
        ("http://civitai.com/models/1", "https"),
        ("http://cdn.example.com/a", "https"),
        ("ftp://civitai.com/models/1", "https"),
        ("file:///etc/passwd", "https"),
        ("file:/etc/passwd", "must be a URL of CivitAI"),
        ("data:text/plain,x", "must be a URL of CivitAI"),
        ("javascript:alert(1)", "must be a URL of CivitAI"),
        ("//civitai.com/models/1", "starts with https://"),
        ("civitai.com/models/1", "starts with https://"),
        # hosts: compared whole, never by prefix or suffix
        ("https://evil.example/api/download/models/1", "MODEL_HOSTS"),
        ("https://civitai.com.evil.example/models/1", "MODEL_HOSTS"),
        ("https://notcivitai.com/models/1", "MODEL_HOSTS"),
        ("https://b2.civitai.com/models/1", "MODEL_HOSTS"),
        ("https://civitai.com./models/1", "MODEL_HOSTS"),
        ("https://sub.cdn.example.com/a", "MODEL_HOSTS"),
        ("https://civitai.com:8443/models/1", "MODEL_HOSTS"),
        ("https://odd.example/a", "MODEL_HOSTS"),
        ("http://127.0.0.1:8082/a", "https"),
        ("https://127.0.0.1:8081/a", "MODEL_HOSTS"),
        ("http://localhost:8081/a", "https"),
        # addresses in every notation
        ("https://169.254.169.254/latest", "MODEL_HOSTS"),
        ("http://2130706433:8081/a", "https"),
        ("https://0x7f000001/a", "MODEL_HOSTS"),
        ("https://0177.0.0.1/a", "MODEL_HOSTS"),
        ("https://[::1]/a", "letters"),
        ("https://[::ffff:127.0.0.1]:8081/a", "letters"),
        # things that look like a host
        ("https://user:pass@civitai.com/models/1", "password"),
        ("https://civitai.com@evil.example/models/1", "password"),
        ("https://evil.example#@civitai.com/models/1", "#"),
        ("https://civitai.com/models/1#x", "#"),
        ("https://civitai.com\\@evil.example/models/1", "plain characters"),
        ("https://civitai%2ecom/models/1", "letters"),
        ("https://сivitai.com/models/1", "plain characters"),  # a Cyrillic с
        ("https://civitai.com:/models/1", "letters"),
        ("https://civitai.com:99999999/models/1", "letters"),
        ("https://civitai.com:0/models/1", "not civitai.com:0"),
        ("https://civitai.com:70000/models/1", "MODEL_HOSTS"),
        ("https://-cdn.example.com/a", "MODEL_HOSTS"),
        ("https:///models/1", "letters"),
        ("https://", "letters"),
        # characters
        ("https://civitai.com/mod els/1", "plain characters"),
        ("https://civitai.com/models/1\n", "control"),
        ("https://civitai.com/\x00", "control"),
        ("https://civitai.com/models/1?x=\ud800", "control"),
        ("https://civitai.com/models/1?" + "x" * 2_000, "2,000 characters"),
        # keys
        ("https://civitai.com/api/download/models/1?token=abc", "CIVITAI_API_KEY"),
        ("https://civitai.com/api/download/models/1?type=Model&TOKEN=abc", "CIVITAI_API_KEY"),
        ("https://civitai.com/api/download/models/1?type=Model&amp;token=abc", "CIVITAI_API_KEY"),
        ("https://civitai.com/api/download/models/1?%74oken=abc", "CIVITAI_API_KEY"),
        ("https://cdn.example.com/a?token=abc", "CIVITAI_API_KEY"),
        # URLs of CivitAI that name no model
        ("https://civitai.com/", "page of a model"),
        ("https://civitai.com/user/somebody", "page of a model"),
        ("https://civitai.com/api/download/models/abc", "as a number"),
        ("https://civitai.com/api/download/models/0", "as a number"),
        ("https://civitai.com/api/download/models/-1", "as a number"),
        (f"https://civitai.com/api/download/models/{2**53}", "as a number"),
        ("https://civitai.com/api/download/models/१", "plain characters"),
        ("https://civitai.com/models/1?modelVersionId=", "as a number"),
        ("https://civitai.com/models/1?modelVersionId=1&modelVersionId=2", "twice"),
        ("https://civitai.com/api/download/models/1?format=PickleTensor", "SafeTensor"),
        ("https://civitai.com/api/download/models/1?type=VAE", "type=Model"),
        ("https://civitai.com/api/download/models/1?size=huge", "size"),
        ("https://civitai.com/api/download/models/1?fp=../..", "fp"),
        ("https://cdn.example.com", "no file"),
        # AIR
        ("urn:air:sdxl:embedding:civitai:1@2", "type is embedding"),
        ("urn:air:sdxl:checkpoint:civitai:1@2", "type is checkpoint"),
        ("checkpoint:civitai:1@2", "type is checkpoint"),
        ("urn:air:sdxl:lora:huggingface:1@2", "other sources"),
        ("urn:air:sdxl:lora:civitai:1@2.ckpt", "safetensors"),
        ("urn:air:sdxl:lora:civitai:1@latest", "as a number"),
        ("civitai:1+3", "version of its file"),
        ("civitai:", "must be a URL of CivitAI"),
        ("C:\\models\\x.safetensors", "must be a URL of CivitAI"),
        # names
        ("", "blank"),
        ("   ", "blank"),
        ("..", "dots"),
        ("../x", "/"),
        ("a\\b", "no / or"),
        ("a\x00b", "control"),
        ("a\u2028b", "control"),
        ("x" * 201, "200 characters"),
        # not even text
        (7, "text or an object"),
        (None, "text or an object"),
        (["x"], "text or an object"),
        # objects
        ({}, "names no model"),
        ({"hash": SHA}, "names no model"),
        ({"url": "detail_tweaker_xl"}, "https://"),
        ({"url": 5}, "must be text"),
        ({"version_id": "many"}, "whole number"),
        ({"version_id": ""}, "whole number"),
        ({"version_id": "-5"}, "whole number"),
        ("0", "whole number"),
        ("9" * 30, "whole number"),
        ({"version_id": True}, "whole number"),
        ({"version_id": 1.5}, "whole number"),
        ({"version_id": 0}, "whole number"),
        ({"version_id": MAX_ID}, "whole number"),
        ({"name": "../x"}, "no / or"),
        ({"name": ""}, "blank"),
        ({"name": "x", "hash": "0D9BD1B873"}, "AutoV2"),
        ({"name": "x", "hash": "nothing"}, "64 hex"),
        ({"name": "x", "hash": 5}, "must be text"),
        ({"url": "https://civitai.com/models/9?modelVersionId=2", "version_id": 3}, "contradicts"),
        ({"url": "https://cdn.example.com/a", "version_id": 3}, "contradicts"),
    ],
)
def test_a_reference_that_cannot_be_used_is_refused_with_the_reason(value: Any, reason: str) -> None:
    error = refused(value)

    assert reason in str(error)


def test_a_lora_does_not_pass_for_a_checkpoint() -> None:
    error = refused("urn:air:sdxl:lora:civitai:1@2", kind=ModelKind.CHECKPOINT)

    assert "of the kind checkpoint" in str(error)


def test_all_problems_of_an_object_are_reported_together_in_its_own_order() -> None:
    error = refused({"hash": "x", "name": "../x", "url": "http://x/", "version_id": -1})

    assert [key for key, _ in error.problems] == ["hash", "name", "url", "version_id"]


def test_a_contradiction_is_reported_at_its_place_too() -> None:
    error = refused({"version_id": 3, "hash": "x", "url": "https://cdn.example.com/a"})

    assert [key for key, _ in error.problems] == ["version_id", "hash"]


def test_a_pattern_or_plain_http_allows_no_url_of_a_job() -> None:
    hosts = ("https://*.example.com", "http://cdn.example.com", "http://127.0.0.1", "ftp://cdn.example.com", "")

    for url in ("https://a.example.com/x", "http://cdn.example.com/x", "http://127.0.0.1/x", "ftp://cdn.example.com/x"):
        with pytest.raises(BadReference):
            parse_reference(url, kind=LORA, allowed_hosts=hosts)


PIECES = st.sampled_from(
    ["api/download/models/", "models/", "model-versions/", "modelVersionId=", "token=", "lora"]
) | (
    st.sampled_from(
        [
            "https://",
            "http://",
            "civitai.com",
            "cdn.example.com",
            "evil.example",
            "@",
            ":",
            "/",
            "\\",
            "#",
            "?",
            "&",
            "%2f",
        ]
    )
)
ANY_TEXT = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=12).map("".join))


@settings(deadline=None, max_examples=300)
@given(ANY_TEXT)
@example("https://civitai.com/models/1?modelVersionId=2&\n")
@example("civitai:1@2+3")
def test_any_text_is_refused_or_gives_ids_a_name_or_an_allowed_url(text: str) -> None:
    try:
        ref = parse_reference(text, kind=LORA, allowed_hosts=ALLOWED)
    except BadReference:
        return

    assert [ref.version_id, ref.model_id, ref.url].count(None) == (3 if ref.is_bare_name else 2)
    assert ref.name or not ref.is_bare_name
    assert all(number is None or 0 < number < MAX_ID for number in (ref.version_id, ref.model_id, ref.file_id))
    if ref.url is not None:
        assert ref.url.startswith(
            (
                "https://cdn.example.com/",
                "https://mirror.example.org/",
                "https://odd.example:8443/",
                "http://127.0.0.1:8081/",
            )
        )
    if ref.name is not None:
        assert not set(ref.name) & set("/\\\0\n:") and 0 < len(ref.name) <= 200


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet="abcdefghij0123456789=&%", min_size=12, max_size=40), st.sampled_from(sorted(CIVITAI_HOSTS)))
def test_no_message_repeats_a_query(secret: str, host: str) -> None:
    error = refused(f"https://{host}/user/x?sig={secret}&token={secret}")

    assert secret not in str(error)

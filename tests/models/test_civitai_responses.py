"""What CivitAI's responses mean."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1111_worker.errors import ModelAccessDenied
from a1111_worker.models.civitai_responses import POLICY, CivitAIRefused, CivitAIResponse, Refusal, error_of, refusal_of


def test_every_refusal_has_a_rule() -> None:
    assert set(POLICY) == set(Refusal)
    for rule in POLICY.values():
        assert rule.message.format(model="M", detail="D")


@settings(deadline=None)
@given(status=st.integers(200, 599), body=st.binary(max_size=50), keyed=st.booleans(), after=st.text(max_size=12))
def test_any_answer_but_200_is_a_refusal(status: int, body: bytes, keyed: bool, after: str) -> None:
    refused = refusal_of(CivitAIResponse("https://civitai.com", status, body=body, retry_after=after), keyed=keyed)

    assert (refused is None) == (status == 200)
    assert refused is None or refused.retry_after is None or refused.retry_after >= 0


@pytest.mark.parametrize(
    ("status", "content", "keyed", "refusal"),
    [
        (400, {}, True, Refusal.BAD_REQUEST),
        (401, {}, True, Refusal.KEY_REFUSED),
        (401, {}, False, Refusal.NO_KEY),
        (401, {"message": "The creator has disabled downloads"}, True, Refusal.DISABLED),
        (403, {"error": "Early Access"}, True, Refusal.EARLY_ACCESS),
        (403, {"error": "You do not have access"}, True, Refusal.PRIVATE),
        (403, ["no object"], True, Refusal.FORBIDDEN),
        (404, {}, True, Refusal.NOT_FOUND),
        (408, {}, True, Refusal.SERVER),
        (410, {}, True, Refusal.GONE),
        (418, {}, True, Refusal.OTHER),
        (429, {}, True, Refusal.TOO_MANY),
        (451, {}, True, Refusal.REGION),
        (522, {}, True, Refusal.SERVER),
    ],
)
def test_a_status_and_its_explanation_say_why(status: int, content: object, keyed: bool, refusal: Refusal) -> None:
    response = CivitAIResponse("https://civitai.com", status, body=json.dumps(content).encode())

    refused = refusal_of(response, keyed=keyed)

    assert refused is not None and refused.refusal is refusal


def test_a_redirect_that_leaves_the_api_is_no_refusal() -> None:
    response = CivitAIResponse("https://civitai.com", 307, location="https://b2.civitai.com/x")

    assert refusal_of(response, keyed=True) is None


def test_an_error_names_the_model_and_what_the_response_adds() -> None:
    error = error_of(CivitAIRefused(Refusal.EARLY_ACCESS, " until 2027-01-31"), "'x'")

    assert type(error) is ModelAccessDenied
    assert error.message == "'x' is in early access until 2027-01-31"
    assert "CIVITAI_API_KEY" in (error.hint or "")

"""Names of other people, as messages, answers and the log show them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a1111_worker.domain import GenerationRequest
from a1111_worker.errors import Complaint, DownloadFailed, InvalidRequest
from a1111_worker.request.fields import Limits
from a1111_worker.request.parse import parse_request
from a1111_worker.text import printable, quoted, quoted_list
from a1111_worker.webui.client import without_paths
from a1111_worker.webui.resolution import WebUILists, resolve
from a1111_worker.webui.samplers import resolve_name
from tests.support import ROOT

MEGABYTES = "x" * 9_000_000
HOSTILE = "a\x1b[2J\r\nfake line\u202e\ud800"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Detail Tweaker XL", "Detail Tweaker XL"),
        ("  two\t\n words \u2028", "two words"),
        ("\x1b[31mred\x1b[0m", "?[31mred?[0m"),
        ("left\u202eright", "left?right"),
        ("half \ud83d", "half ?"),
        ("\U0001f600 é", "\U0001f600 é"),
        ("", ""),
        (5, "5"),
    ],
)
def test_a_name_becomes_one_printable_line(text: object, shown: str) -> None:
    assert printable(text) == shown


def test_a_long_name_is_cut_and_says_so() -> None:
    assert printable("x" * 60, 60) == "x" * 60
    assert printable("x" * 61, 60) == "x" * 59 + "…"
    assert printable("x" + " " * 100, 60) == "x…"


@given(st.text(), st.integers(2, 40))
def test_any_text_becomes_printable_and_stays_within_the_limit(text: str, limit: int) -> None:
    shown = printable(text, limit)

    assert len(shown) <= limit
    assert shown.isprintable()
    assert printable(shown, limit) == shown


def test_a_list_of_names_has_an_end() -> None:
    assert quoted("a\nb") == "'a b'"
    assert quoted_list(["a", "b"], 2) == "'a', 'b'"
    assert quoted_list((str(number) for number in range(10**9)), 2) == "'0', '1', …"


# -- wherever such a name is shown


@pytest.mark.parametrize("key", [MEGABYTES, HOSTILE, "\n" * 1000], ids=["9 MB", "escapes", "line breaks"])
@pytest.mark.parametrize(
    "job",
    [
        lambda key: {key: 1},
        lambda key: {"alwayson_scripts": {key: {"args": 5}}},
        lambda key: {"override_settings": {key: 1}},
        lambda key: {"loras": [{key: 1}]},
        lambda key: {"output": {key: 1}},
        lambda key: {"comments": {"a": {key: float("nan")}}},
    ],
    ids=["field", "always-on script", "setting", "LoRA", "output option", "comment"],
)
def test_a_callers_key_is_bounded_and_printable_in_a_complaint(job: Callable[[str], dict[str, Any]], key: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_request({"prompt": "x", **job(key)}, Limits())

    assert len(refused.value.message) < 2_000
    assert refused.value.message.isprintable()
    assert all(complaint.path.isprintable() and len(complaint.path) <= 200 for complaint in refused.value.complaints)


@pytest.mark.parametrize("key", [MEGABYTES, HOSTILE], ids=["9 MB", "escapes"])
def test_a_script_that_the_webui_does_not_have_is_bounded_and_printable_in_its_complaint(key: str) -> None:
    nothing = WebUILists(samplers=(), schedulers=(), upscalers=(), scripts=(HOSTILE,) * 50, styles={}, vaes=())
    request = GenerationRequest({"alwayson_scripts": {key.replace("\ud800", ""): {"args": []}}})

    with pytest.raises(InvalidRequest) as refused:
        resolve(request, nothing)

    (complaint,) = refused.value.complaints
    assert complaint.path.startswith("alwayson_scripts.") and len(complaint.path) < 100
    assert len(refused.value.message) < 2_000 and refused.value.message.isprintable()


def test_an_error_is_bounded_and_printable_whatever_it_is_made_of() -> None:
    error = DownloadFailed(f"no {HOSTILE}{MEGABYTES}", hint=f"see {HOSTILE}{MEGABYTES}")
    invalid = InvalidRequest([Complaint(f"alwayson_scripts.{HOSTILE}{MEGABYTES}", MEGABYTES)] * 101)

    for text in (error.message, error.hint, invalid.message, *error.answer().values(), *invalid.answer().values()):
        assert not isinstance(text, str) or (len(text) <= 4_000 and text.isprintable())
    assert all(len(complaint.path) <= 200 and len(complaint.message) <= 600 for complaint in invalid.complaints)


def test_a_name_that_the_webui_does_not_have_is_bounded_and_printable_in_its_complaint() -> None:
    with pytest.raises(InvalidRequest) as refused:
        resolve_name(HOSTILE + MEGABYTES, [HOSTILE + str(number) for number in range(500)], "script", path=HOSTILE)

    (complaint,) = refused.value.complaints
    assert len(complaint.message) < 1_500
    assert complaint.message.isprintable() and complaint.path.isprintable()


def test_a_text_of_the_webui_is_bounded_before_it_is_searched_for_paths() -> None:
    shown = without_paths("'/" * 4_500_000 + HOSTILE)

    assert len(shown) <= 300
    assert shown.isprintable()


LOG = """
import logging
from a1111_worker import logs
logs.configure("INFO", {form!r})
logging.getLogger("worker").warning("the job failed: %s", "a\\x1b[2J\\r\\nfake line\\u202e" + "x" * 9_000_000)
"""


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_log_line_is_one_line_of_bounded_length(form: str) -> None:
    command = [sys.executable, "-c", LOG.format(form=form)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()

    assert len(line) < 10_000
    assert line.isprintable()

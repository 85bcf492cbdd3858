"""The table of what a job may contain, compared with A1111's own descriptions of its API."""

from __future__ import annotations

import json
from typing import Any

import pytest

from a1111_worker.request.fields import OVERRIDABLE_OPTIONS, FieldClass, is_unset
from a1111_worker.request.txt2img import txt2img_fields
from tests.request.helpers import LIMITS, complaints
from tests.support import DATA

VERSIONS = ("1.9.3", "1.10.1")


def schema(version: str, name: str) -> dict[str, dict[str, Any]]:
    document = json.loads((DATA / f"webui-{version}" / "openapi.json").read_text())
    properties: dict[str, dict[str, Any]] = document["components"]["schemas"][name]["properties"]
    return properties


@pytest.mark.parametrize("version", VERSIONS)
def test_every_field_of_a1111_is_in_the_table_with_its_type(version: str) -> None:
    table = {name: field.value.type for name, field in txt2img_fields(LIMITS).items() if field.is_webui_field}

    assert table == {name: field["type"] for name, field in schema(version, "StableDiffusionProcessingTxt2Img").items()}


def test_every_refused_or_dropped_field_has_a_reason_and_every_field_says_what_it_takes() -> None:
    for field in txt2img_fields(LIMITS).values():
        assert bool(field.reason) == (field.kind in (FieldClass.REFUSED, FieldClass.DROPPED))
        assert field.value.expected


@pytest.mark.parametrize("version", VERSIONS)
def test_the_options_that_a_job_may_override_have_the_defaults_of_a1111(version: str) -> None:
    options = schema(version, "Options")

    for name, option in OVERRIDABLE_OPTIONS.items():
        assert options[name]["default"] == option.default
        assert options[name].get("type") in (None, option.value.type, "number")  # A1111 calls whole numbers numbers
        assert option.value.check(option.default) == option.default


@pytest.mark.parametrize(
    ("name", "value", "unset"),
    [
        ("sampler_name", " ", True),
        ("sampler_name", "Euler", False),
        ("hr_sampler_name", "Use same sampler", True),
        ("hr_scheduler", "", True),
        ("hr_scheduler", "Karras", False),
        ("negative_prompt", "", False),
    ],
)
def test_a_field_is_unset_in_the_words_of_a1111(name: str, value: str, unset: bool) -> None:
    assert is_unset(name, value) is unset


@pytest.mark.parametrize(
    ("name", "value", "ignored"),
    [
        ("disable_extra_networks", False, True),
        ("disable_extra_networks", 0, False),  # 0 == False to Python, and not to JSON
        ("infotext", "", True),
        ("hr_checkpoint_name", "Use same checkpoint", True),
        ("hr_checkpoint_name", "other", False),
        ("checkpoint", "", False),
    ],
)
def test_a_refused_field_ignores_only_what_changes_nothing(name: str, value: object, ignored: bool) -> None:
    assert txt2img_fields(LIMITS)[name].ignores(value) is ignored


def test_a_refused_field_is_never_suggested() -> None:
    (complaint,) = complaints({"prompt": "x", "hr_checkpoint_nam": 1})

    assert "hr_checkpoint_name" not in complaint.message

"""Spellings of samplers and schedulers, against the lists recorded from both versions of A1111."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a1111_worker.errors import InvalidRequest
from a1111_worker.webui.responses import Sampler, Scheduler, parse_samplers, parse_schedulers
from a1111_worker.webui.samplers import resolve_name, resolve_sampler, resolve_scheduler
from tests.support import DATA

Lists = tuple[Sequence[Sampler], Sequence[Scheduler]]


def recorded(version: str, name: str) -> Any:
    answer = json.loads((DATA / f"webui-{version}" / name).read_text())
    return answer["response"]["body"] if isinstance(answer, dict) else answer


LISTS: dict[str, Lists] = {
    version: (
        parse_samplers(recorded(version, f"{prefix}samplers.json")),
        parse_schedulers(recorded(version, f"{prefix}schedulers.json")),
    )
    for version, prefix in (("1.9.3", ""), ("1.10.1", "full_"))
}


@pytest.fixture(params=sorted(LISTS))
def lists(request: pytest.FixtureRequest) -> Lists:
    return LISTS[request.param]


def complaints(*args: Any, **more: Any) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        resolve_sampler(*args, **more)
    return {complaint.path: complaint.message for complaint in caught.value.complaints}


@pytest.mark.parametrize(
    ("sampler", "scheduler", "expected"),
    [
        # as the list has it
        ("DPM++ 2M", None, ("DPM++ 2M", None)),
        ("Euler a", "Karras", ("Euler a", "Karras")),
        # case, alias, alias without its k_
        ("euler A", None, ("Euler a", None)),
        ("k_euler_a", None, ("Euler a", None)),
        ("k_euler_ancestral", None, ("Euler a", None)),
        ("euler_ancestral", None, ("Euler a", None)),
        ("restart", None, ("Restart", None)),
        ("dpmpp_2m", None, ("DPM++ 2M", None)),
        ("dpm_2_a", None, ("DPM2 a", None)),
        ("UNIPC", None, ("UniPC", None)),
        # both in one
        ("DPM++ 2M Karras", None, ("DPM++ 2M", "Karras")),
        ("dpm++ 2m karras", None, ("DPM++ 2M", "Karras")),
        ("dpm++ 2m  KARRAS ", None, ("DPM++ 2M", "Karras")),
        ("DPM++2M Karras", None, ("DPM++ 2M", "Karras")),
        ("dpmpp_2m_karras", None, ("DPM++ 2M", "Karras")),
        ("k_dpmpp_2m-karras", None, ("DPM++ 2M", "Karras")),
        ("Euler a SGM Uniform", None, ("Euler a", "SGM Uniform")),
        ("euler sgm_uniform", None, ("Euler", "SGM Uniform")),
        ("Euler SGMUniform", None, ("Euler", "SGM Uniform")),
        # the longest sampler wins
        ("DPM++ 2M SDE Karras", None, ("DPM++ 2M SDE", "Karras")),
        ("DPM++ 2M SDE Exponential", None, ("DPM++ 2M SDE", "Exponential")),
        ("DPM++ 2M SDE Heun Karras", None, ("DPM++ 2M SDE Heun", "Karras")),
        ("DPM++ 3M SDE Exponential", None, ("DPM++ 3M SDE", "Exponential")),
        ("DPM2 a Karras", None, ("DPM2 a", "Karras")),
        ("DPM2 Karras", None, ("DPM2", "Karras")),
        ("LMS Karras", None, ("LMS", "Karras")),
        ("DPM++ 2S a Karras", None, ("DPM++ 2S a", "Karras")),
        # A1111's old aliases of both in one
        ("k_dpmpp_2m_ka", None, ("DPM++ 2M", "Karras")),
        ("k_dpmpp_2m_sde_ka", None, ("DPM++ 2M SDE", "Karras")),
        ("k_dpmpp_2m_sde_heun_exp", None, ("DPM++ 2M SDE Heun", "Exponential")),
        ("k_dpmpp_3m_sde_exp", None, ("DPM++ 3M SDE", "Exponential")),
        ("k_lms_ka", None, ("LMS", "Karras")),
        ("dpm_2_a_ka", None, ("DPM2 a", "Karras")),
        ("k_dpm_ad", None, ("DPM adaptive", None)),
        # both at once, and they agree
        ("DPM++ 2M Karras", "karras", ("DPM++ 2M", "Karras")),
        ("DPM++ 2M Karras", "Automatic", ("DPM++ 2M", "Karras")),
        ("DPM++ 2M", "automatic", ("DPM++ 2M", "Automatic")),
        ("DPM++ 2M", "AUTOMATIC", ("DPM++ 2M", "Automatic")),
        ("k_dpmpp_2m_ka", "automatic", ("DPM++ 2M", "Karras")),
        ("DPM++ 2M", "sgm_uniform", ("DPM++ 2M", "SGM Uniform")),
    ],
)
def test_every_usual_spelling_of_a_sampler_is_known_on_both_versions(
    lists: Lists, sampler: str, scheduler: str | None, expected: tuple[str, str | None]
) -> None:
    resolved = resolve_sampler(sampler, scheduler, *lists)

    assert resolved == expected


def test_the_longest_sampler_wins_if_there_are_two_readings() -> None:
    samplers = [Sampler("Euler"), Sampler("Euler Beta")]
    schedulers = [Scheduler("beta_two", "Beta Two"), Scheduler("two", "Two")]

    assert resolve_sampler("euler beta two", None, samplers, schedulers) == ("Euler Beta", "Two")


@pytest.mark.parametrize("sampler", ["DDIM CFG++", "ddim_cfgpp", "Euler Align Your Steps", "Euler beta", "DDIM DDIM"])
def test_a_sampler_of_the_newer_version_alone_is_unknown_to_the_older(sampler: str) -> None:
    resolve_sampler(sampler, None, *LISTS["1.10.1"])

    assert "sampler_name" in complaints(sampler, None, *LISTS["1.9.3"])


def test_names_of_the_lists_resolve_to_themselves(lists: Lists) -> None:
    for sampler in lists[0]:
        for scheduler in lists[1]:
            expected: tuple[str, str] = sampler.name, scheduler.label

            assert resolve_sampler(*expected, *lists) == expected
            assert resolve_sampler(" ".join(expected), None, *lists) == expected


@pytest.mark.parametrize(
    ("sampler", "scheduler", "path", "names"),
    [
        ("Eular a", None, "sampler_name", "'Euler a'"),
        ("DPM++ 2M Karas", None, "sampler_name", "'DPM++ 2M Karras'"),
        ("DPM++ 2M", "Karas", "scheduler", "'Karras'"),
        ("zzzzzz", None, "sampler_name", "this WebUI has 'DPM++ 2M'"),
        ("Karras", None, "sampler_name", "unknown sampler 'Karras'"),
        ("x" * 10_000, None, "sampler_name", "…"),
    ],
)
def test_the_complaint_about_an_unknown_name_has_the_nearest(
    lists: Lists, sampler: str, scheduler: str | None, path: str, names: str
) -> None:
    found = complaints(sampler, scheduler, *lists)

    assert list(found) == [path]
    assert names in found[path]
    assert len(found[path]) < 500


def test_an_unknown_sampler_and_an_unknown_scheduler_are_two_complaints(lists: Lists) -> None:
    found = complaints("Eular", "Karas", *lists, prefix="hr_")

    assert sorted(found) == ["hr_sampler_name", "hr_scheduler"]


def test_a_scheduler_that_contradicts_the_combined_name_is_a_complaint(lists: Lists) -> None:
    found = complaints("DPM++ 2M Karras", "exponential", *lists)

    assert found == {"scheduler": "'Exponential' contradicts sampler_name ('Karras')"}


def test_a_scheduler_alone_is_resolved_too(lists: Lists) -> None:
    label = resolve_scheduler("sgm uniform", lists[1], path="hr_scheduler")

    assert label == "SGM Uniform"
    with pytest.raises(InvalidRequest, match=r"hr_scheduler: unknown scheduler 'nope'"):
        resolve_scheduler("nope", lists[1], path="hr_scheduler")


def test_a_name_is_found_exactly_first_then_in_any_case() -> None:
    names = ["latent", "Latent", "R-ESRGAN 4x+"]

    assert resolve_name("Latent", names, "upscaler") == "Latent"
    assert resolve_name("LATENT", names, "upscaler") == "latent"
    assert resolve_name(" r-esrgan 4x+", names, "upscaler") == "R-ESRGAN 4x+"
    with pytest.raises(InvalidRequest, match=r"hr_upscaler: unknown upscaler 'R-ESRGAN 4x'; the nearest: 'R-ESRGAN 4x"):
        resolve_name("R-ESRGAN 4x", names, "upscaler", path="hr_upscaler")
    with pytest.raises(InvalidRequest, match="this WebUI has none"):
        resolve_name("x", [], "style")


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=40), st.none() | st.text(max_size=20))
def test_any_text_gives_names_of_the_lists_or_a_complaint(sampler: str, scheduler: str | None) -> None:
    samplers, schedulers = LISTS["1.10.1"]
    try:
        name, label = resolve_sampler(sampler, scheduler, samplers, schedulers)
    except InvalidRequest:
        return

    assert name in {sampler.name for sampler in samplers}
    assert label is None or label in {scheduler.label for scheduler in schedulers}

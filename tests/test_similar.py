"""What a complaint suggests in place of an unknown name."""

from __future__ import annotations

import pytest

from a1111_worker.similar import nearest

SAMPLERS = ("Euler", "Euler a", "DPM++ 2M", "DPM++ 2M SDE", "DDIM")


@pytest.mark.parametrize(
    ("name", "suggestions"),
    [
        ("Eulr", ["Euler", "Euler a"]),
        ("DPM++2M", ["DPM++ 2M", "DPM++ 2M SDE"]),
        # case and blanks around a name do not matter
        ("  ddim ", ["DDIM"]),
        ("zzzz", []),
        ("", []),
        # a long name is compared by its beginning
        ("euler" + " " * 100_000, ["Euler", "Euler a"]),
    ],
)
def test_the_nearest_names_are_suggested_the_likeliest_first(name: str, suggestions: list[str]) -> None:
    assert nearest(name, SAMPLERS) == suggestions


def test_no_more_names_are_suggested_than_asked_for() -> None:
    assert nearest("Eulr", SAMPLERS, 1) == ["Euler"]


def test_names_below_the_cutoff_are_not_suggested() -> None:
    assert nearest("Eulr", SAMPLERS, cutoff=0.85) == ["Euler"]

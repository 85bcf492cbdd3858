"""The extensions ControlNet (v1.1.455) and ADetailer (25.3.0), as far as callers of the API see them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

SCRIPTS: Mapping[str, tuple[str, ...]] = {"adetailer": ("adetailer",), "controlnet": ("controlnet", "controlnet m2m")}
"""The scripts of each extension, in A1111's order: that of the extensions' folders."""


def add_scripts(scripts: Mapping[str, list[str]], extensions: Collection[str]) -> dict[str, list[str]]:
    """The answer of /scripts with those of the extensions, which stand before A1111's own `refiner`."""
    added = [title for name, titles in SCRIPTS.items() if name in extensions for title in titles]
    return {tab: [*names[:-3], *added, *names[-3:]] for tab, names in scripts.items()}


def add_to_tables(tables: Mapping[str, Any], extensions: Collection[str]) -> Mapping[str, Any]:
    """The tables of a version, with what the extensions add."""
    return {**tables, "scripts": add_scripts(tables["scripts"], extensions)} if extensions else tables

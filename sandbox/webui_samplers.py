"""The sampler and scheduler that A1111 really uses for the names in a request: 1.9.3 refuses, 1.10.1 guesses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sandbox.webui_errors import HTTPException

Table = Sequence[Mapping[str, Any]]

# Samplers without sigmas. The infotext has no "Schedule type" for them.
TIMESTEPS = frozenset({"DDIM", "DDIM CFG++", "PLMS", "UniPC"})


def resolve(
    version: str, name: str | None, scheduler: str | None, samplers: Table, schedulers: Table
) -> tuple[str, str | None]:
    """(sampler, scheduler) as the infotext has them, before the sampler's own default scheduler is known.

    1.9.3 accepts only exact names, otherwise 404, and passes any scheduler on. 1.10.1 understands "DPM++ 2M Karras"; a
    scheduler in its own field takes precedence. For every name that it does not know, it uses DPM++ 2M; these include
    aliases and names in another case.
    """
    by_name = {sampler["name"]: sampler for sampler in samplers}
    if version == "1.9.3":
        if name is None or name not in by_name:
            raise HTTPException(404, "Sampler not found")
        return name, scheduler
    chosen = find_scheduler(scheduler, schedulers) or schedulers[0]
    sampler_name: str = name or samplers[0]["name"]
    for each in schedulers:
        for spelling in (each["label"], each["name"], *(each["aliases"] or ())):
            if sampler_name.endswith(f" {spelling}"):
                chosen = chosen if scheduler else each
                sampler_name = sampler_name[: -len(spelling) - 1]
                break
    used: str = by_name.get(sampler_name, samplers[0])["name"]
    return used, chosen["label"]


def schedule_type(sampler: str, scheduler: str | None, samplers: Table, schedulers: Table) -> str | None:
    """The "Schedule type" in the infotext: the scheduler's label; if it is automatic, that of the sampler's default."""
    if sampler in TIMESTEPS:
        return None
    name: str | None = scheduler or "Automatic"
    if name == "Automatic":
        name = next((each["options"].get("scheduler") for each in samplers if each["name"] == sampler), None)
    found = find_scheduler(name, schedulers)
    return found["label"] if found and found["name"] != "automatic" else None


def find_scheduler(name: str | None, schedulers: Table) -> Mapping[str, Any] | None:
    return next((each for each in schedulers if name in (each["name"], each["label"])), None)

"""Which sampler and scheduler A1111 really takes for what a request names: 1.9.3 refuses, 1.10.1 guesses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sandbox.webui_errors import HTTPException

Table = Sequence[Mapping[str, Any]]

# Samplers that take no sigmas: no "Schedule type" is noted for them.
TIMESTEPS = frozenset({"DDIM", "DDIM CFG++", "PLMS", "UniPC"})


def resolve(
    version: str, name: str | None, scheduler: str | None, samplers: Table, schedulers: Table
) -> tuple[str, str | None]:
    """(sampler, scheduler) as the job's infotext prints them, before the sampler's own default is known.

    1.9.3 takes exact names alone, else 404, and hands any scheduler on. 1.10.1 understands "DPM++ 2M Karras" (a
    scheduler named beside it wins) and takes DPM++ 2M for what it does not know, aliases and other cases among it.
    """
    by_name = {sampler["name"]: sampler for sampler in samplers}
    if version == "1.9.3":
        if name is None or name not in by_name:
            raise HTTPException(404, "Sampler not found")
        return name, scheduler
    found = scheduler_called(scheduler, schedulers) or schedulers[0]
    wanted: str = name or samplers[0]["name"]
    for each in schedulers:
        for spelling in (each["label"], each["name"], *(each["aliases"] or ())):
            if wanted.endswith(f" {spelling}"):
                found = found if scheduler else each
                wanted = wanted[: -len(spelling) - 1]
                break
    taken: str = by_name.get(wanted, samplers[0])["name"]
    return taken, found["label"]


def schedule_type(sampler: str, scheduler: str | None, samplers: Table, schedulers: Table) -> str | None:
    """What k-diffusion notes as "Schedule type": the scheduler's label, the sampler's own where it is automatic."""
    if sampler in TIMESTEPS:
        return None
    name: str | None = scheduler or "Automatic"
    if name == "Automatic":
        name = next((each["options"].get("scheduler") for each in samplers if each["name"] == sampler), None)
    found = scheduler_called(name, schedulers)
    return found["label"] if found and found["name"] != "automatic" else None


def scheduler_called(name: str | None, schedulers: Table) -> Mapping[str, Any] | None:
    return next((each for each in schedulers if name in (each["name"], each["label"])), None)

"""Sampler and scheduler as people write them, resolved against the lists of the WebUI that runs.

1.9.3 answers 404 to "DPM++ 2M Karras", "euler a" and "k_euler_a"; 1.10.1 understands the first and silently samples
with DPM++ 2M for the others. So the worker knows the spellings, and the WebUI is only sent names of its own lists.

    DPM++ 2M Karras · dpm++ 2m karras · dpmpp_2m_karras · k_dpmpp_2m + Karras        all mean ("DPM++ 2M", "Karras")
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from a1111_worker.errors import Complaint, InvalidRequest
from a1111_worker.similar import nearest

AUTOMATIC = "Automatic"  # the scheduler a sampler brings along; A1111's own default

Listed = Mapping[str, Any]  # an entry of /sdapi/v1/samplers or /sdapi/v1/schedulers


def resolve_sampler(
    sampler_name: str,
    scheduler: str | None,
    samplers: Sequence[Listed],
    schedulers: Sequence[Listed],
    *,
    prefix: str = "",
) -> tuple[str, str | None]:
    """The WebUI's own names for a sampler and its scheduler (None: not said). InvalidRequest names the nearest ones.

    `prefix` stands before the fields' names in complaints ("hr_").
    """
    complaints = []
    label: str | None = None
    if scheduler is not None:
        label = _find_scheduler(scheduler, schedulers)
        if label is None:
            complaints.append(unknown(f"{prefix}scheduler", "scheduler", scheduler, _labels(schedulers)))
    found = _find_sampler(sampler_name, samplers, schedulers)
    if found is None:
        names = [str(sampler["name"]) for sampler in samplers]
        combined = [f"{name} {other}" for name in names for other in _labels(schedulers) if other != AUTOMATIC]
        complaints.append(unknown(f"{prefix}sampler_name", "sampler", sampler_name, names, combined))
        raise InvalidRequest(complaints)
    name, suffix = found
    if suffix is not None and label not in (None, AUTOMATIC, suffix):
        complaints.append(Complaint(f"{prefix}scheduler", f"{label!r} contradicts {prefix}sampler_name ({suffix!r})"))
    if complaints:
        raise InvalidRequest(complaints)
    return name, label if suffix is None else suffix


def resolve_scheduler(scheduler: str, schedulers: Sequence[Listed], *, path: str = "scheduler") -> str:
    """The WebUI's own label of a scheduler."""
    label = _find_scheduler(scheduler, schedulers)
    if label is None:
        raise InvalidRequest([unknown(path, "scheduler", scheduler, _labels(schedulers))])
    return label


def resolve_one(name: str, known: Iterable[str], what: str, *, path: str = "") -> str:
    """`name` as the list spells it: exact, else in any case; InvalidRequest with the nearest names otherwise."""
    names = list(known)
    if name in names:
        return name
    wanted = name.strip().casefold()
    for candidate in names:
        if candidate.casefold() == wanted:
            return candidate
    raise InvalidRequest([unknown(path, what, name, names)])


def unknown(path: str, what: str, name: str, known: Sequence[str], further: Sequence[str] = ()) -> Complaint:
    """The complaint about a name that is in no list; `further` are names that may only be suggested."""
    said = repr(name if len(name) <= 60 else f"{name[:60]}…")
    near = nearest(name, [*known, *further])
    if near:
        return Complaint(path, f"unknown {what} {said}; the nearest: {_list(near)}")
    if not known:
        return Complaint(path, f"unknown {what} {said}; this WebUI has none")
    rest = " …" if len(known) > 12 else ""
    return Complaint(path, f"unknown {what} {said}; this WebUI has {_list(known[:12])}{rest}")


def _find_sampler(
    wanted: str, samplers: Sequence[Listed], schedulers: Sequence[Listed]
) -> tuple[str, str | None] | None:
    for sampler in samplers:
        if sampler["name"] == wanted:
            return str(sampler["name"]), None
    keys = _sampler_keys(samplers)
    key = _key(wanted)
    if key in keys:
        return keys[key], None
    labels = _scheduler_keys(schedulers)
    for length in range(len(key) - 1, 0, -1):  # the longest sampler wins where two readings fit
        if key[:length] in keys and key[length:] in labels:
            return keys[key[:length]], labels[key[length:]]
    return None


def _find_scheduler(wanted: str, schedulers: Sequence[Listed]) -> str | None:
    return _scheduler_keys(schedulers).get(_key(wanted))


def _sampler_keys(samplers: Sequence[Listed]) -> dict[str, str]:
    """Every spelling of every sampler; names before aliases, aliases before aliases without their `k_`."""
    keys: dict[str, str] = {}
    for sampler in samplers:
        keys.setdefault(_key(sampler["name"]), str(sampler["name"]))
    for sampler in samplers:
        for alias in sampler.get("aliases") or ():
            keys.setdefault(_key(alias), str(sampler["name"]))
    for sampler in samplers:
        for alias in sampler.get("aliases") or ():
            if str(alias).startswith("k_"):
                keys.setdefault(_key(alias)[1:], str(sampler["name"]))
    return keys


def _scheduler_keys(schedulers: Sequence[Listed]) -> dict[str, str]:
    keys: dict[str, str] = {}
    for scheduler in schedulers:
        for spelling in (scheduler["label"], scheduler["name"], *(scheduler.get("aliases") or ())):
            keys.setdefault(_key(spelling), str(scheduler["label"]))
    return keys


def _labels(schedulers: Sequence[Listed]) -> list[str]:
    return [str(scheduler["label"]) for scheduler in schedulers]


def _key(text: object) -> str:
    """What of a spelling counts: neither case nor spaces, underscores and hyphens."""
    return re.sub(r"[\s_-]+", "", str(text).casefold())


def _list(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)

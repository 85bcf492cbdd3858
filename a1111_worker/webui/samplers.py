"""Sampler and scheduler as people write them, resolved against the lists of the WebUI that runs.

1.9.3 answers 404 to "DPM++ 2M Karras", "euler a" and "k_euler_a"; 1.10.1 understands the first and silently samples
with DPM++ 2M for the others. So the worker knows the spellings, and sends the WebUI only names of its own lists.

    DPM++ 2M Karras · dpm++ 2m karras · dpmpp_2m_karras · k_dpmpp_2m_ka · k_dpmpp_2m + Karras
                                                                                     all mean ("DPM++ 2M", "Karras")
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from a1111_worker.errors import Complaint, InvalidRequest
from a1111_worker.similar import nearest
from a1111_worker.text import quoted, quoted_list
from a1111_worker.webui.responses import Sampler, Scheduler

AUTOMATIC = "Automatic"  # the label of a sampler's own scheduler; A1111's default

OLD_SUFFIXES = {"ka": "karras", "exp": "exponential"}
"""How the aliases of A1111 until 1.8 end, if they name a scheduler too: `k_dpmpp_2m_ka`, `k_dpmpp_3m_sde_exp` (1.8.0,
modules/sd_samplers_kdiffusion.py). 1.9.3 answers 404 to them, 1.10.1 samples with DPM++ 2M."""


def resolve_sampler(
    sampler_name: str,
    scheduler: str | None,
    samplers: Sequence[Sampler],
    schedulers: Sequence[Scheduler],
    *,
    prefix: str = "",
) -> tuple[str, str | None]:
    """The WebUI's own names for a sampler and its scheduler. The scheduler is None if neither argument names it.

    InvalidRequest names the nearest ones. `prefix` stands before the fields' names in complaints ("hr_").
    """
    complaints = []
    label: str | None = None
    if scheduler is not None:
        label = _find_scheduler(scheduler, schedulers)
        if label is None:
            complaints.append(_complain_scheduler(f"{prefix}scheduler", scheduler, schedulers))
    found = _find_sampler(sampler_name, samplers, schedulers)
    if found is None:
        names = [sampler.name for sampler in samplers]
        combined = [f"{name} {other}" for name in names for other in _labels(schedulers) if other != AUTOMATIC]
        complaints.append(complain_unknown(f"{prefix}sampler_name", "sampler", sampler_name, names, combined))
        raise InvalidRequest(complaints)
    name, suffix = found
    if suffix is not None and label not in (None, AUTOMATIC, suffix):
        complaints.append(Complaint(f"{prefix}scheduler", f"{label!r} contradicts {prefix}sampler_name ({suffix!r})"))
    if complaints:
        raise InvalidRequest(complaints)
    return name, label if suffix is None else suffix


def resolve_scheduler(scheduler: str, schedulers: Sequence[Scheduler], *, path: str = "scheduler") -> str:
    """The WebUI's own label of a scheduler. `path` is the field that a complaint names."""
    label = _find_scheduler(scheduler, schedulers)
    if label is None:
        raise InvalidRequest([_complain_scheduler(path, scheduler, schedulers)])
    return label


def resolve_name(name: str, known: Iterable[str], kind: str, *, path: str = "") -> str:
    """`name` as the list spells it: exact, else in any case; InvalidRequest with the nearest names otherwise.

    `kind` is what the name is a name of ("upscaler"), and `path` its field: a complaint contains both.
    """
    names = list(known)
    if name in names:
        return name
    key = name.strip().casefold()
    for candidate in names:
        if candidate.casefold() == key:
            return candidate
    raise InvalidRequest([complain_unknown(path, kind, name, names)])


def complain_unknown(
    path: str, kind: str, name: str, known: Sequence[str], also_suggested: Sequence[str] = ()
) -> Complaint:
    """The complaint about a name that is in no list. `also_suggested` are suggested if near, but never listed."""
    near = nearest(name, [*known, *also_suggested])
    if near:
        return Complaint(path, f"unknown {kind} {quoted(name)}; the nearest: {quoted_list(near)}")
    if not known:
        return Complaint(path, f"unknown {kind} {quoted(name)}; this WebUI has none")
    return Complaint(path, f"unknown {kind} {quoted(name)}; this WebUI has {quoted_list(known)}")


def _complain_scheduler(path: str, scheduler: str, schedulers: Sequence[Scheduler]) -> Complaint:
    return complain_unknown(path, "scheduler", scheduler, _labels(schedulers))


def _find_sampler(
    text: str, samplers: Sequence[Sampler], schedulers: Sequence[Scheduler]
) -> tuple[str, str | None] | None:
    """The sampler that a text names, and the scheduler's label if the text names that too."""
    if any(sampler.name == text for sampler in samplers):
        return text, None
    names = _sampler_names(samplers)
    key = _key(text)
    if key in names:
        return names[key], None
    labels = _scheduler_labels(schedulers)
    labels |= {suffix: labels[name] for suffix, name in OLD_SUFFIXES.items() if name in labels}
    for length in range(len(key) - 1, 0, -1):  # if there are two readings, the longest sampler wins
        if key[:length] in names and key[length:] in labels:
            return names[key[:length]], labels[key[length:]]
    return None


def _find_scheduler(text: str, schedulers: Sequence[Scheduler]) -> str | None:
    return _scheduler_labels(schedulers).get(_key(text))


def _sampler_names(samplers: Sequence[Sampler]) -> dict[str, str]:
    """Every sampler by the keys of its spellings: names before aliases, aliases before aliases without their `k_`."""
    names: dict[str, str] = {}
    for sampler in samplers:
        names.setdefault(_key(sampler.name), sampler.name)
    for sampler in samplers:
        for alias in sampler.aliases:
            names.setdefault(_key(alias), sampler.name)
    for sampler in samplers:
        for alias in sampler.aliases:
            if alias.startswith("k_"):
                names.setdefault(_key(alias)[1:], sampler.name)
    return names


def _scheduler_labels(schedulers: Sequence[Scheduler]) -> dict[str, str]:
    """Every scheduler's label by the keys of its spellings."""
    labels: dict[str, str] = {}
    for scheduler in schedulers:
        for spelling in (scheduler.label, scheduler.name, *scheduler.aliases):
            labels.setdefault(_key(spelling), scheduler.label)
    return labels


def _labels(schedulers: Sequence[Scheduler]) -> list[str]:
    return [scheduler.label for scheduler in schedulers]


def _key(spelling: str) -> str:
    """A spelling without what makes no difference: case, spaces, underscores and hyphens."""
    return re.sub(r"[\s_-]+", "", spelling.casefold())

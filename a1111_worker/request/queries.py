"""The tables of the tasks that generate nothing: each is asked as it is, or with a few words."""

from __future__ import annotations

from collections.abc import Mapping

from a1111_worker.request.fields import TASK, Field, Limits


def no_fields(_limits: Limits) -> Mapping[str, Field]:
    """The table of a task that takes nothing but its name."""
    return {"task": TASK}

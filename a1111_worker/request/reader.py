"""A raw input, read against the table of its task: the values that are valid, and every complaint about the others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from a1111_worker.domain import ModelRef, PictureSource
from a1111_worker.errors import Complaint, InvalidRequest
from a1111_worker.request.fields import Field, FieldClass, Limits, is_unset
from a1111_worker.request.unknown import unknown_field
from a1111_worker.request.values import InvalidValue, ValueBudget, has_lone_surrogate, json_problems, shown

MAX_VALUES = 100_000
MAX_COMPLAINTS = 100

_NEVER_SUGGESTED = (FieldClass.DROPPED, FieldClass.REFUSED)


class InputReader:
    """One raw input. Every step adds to its lists, and goes on with those values that are valid.

    `given` holds the valid fields, as checked values, without those that are unset. `dropped` are the paths of what was
    taken and does nothing. `pictures` are those inside of fields, under their paths.
    `controlnet_models` are those of ControlNet's units.
    """

    def __init__(self, raw: dict[Any, Any], table: Mapping[str, Field], limits: Limits) -> None:
        self.complaints: list[Complaint] = []
        self.warnings: list[str] = []
        self.dropped: list[str] = []
        self.pictures: dict[str, PictureSource] = {}
        self.controlnet_models: dict[int, ModelRef] = {}
        self.raw = raw
        self.table = table
        self.limits = limits
        self.given = self._known_fields(self._json_fields())

    def complain(self, path: str, message: str) -> None:
        """Note what is wrong. After MAX_COMPLAINTS only that there is more."""
        if len(self.complaints) < MAX_COMPLAINTS:
            self.complaints.append(Complaint(path, message))
        elif not self._is_full:
            self.complaints.append(Complaint("input", "has more problems than are listed here"))

    def has_complaint(self, *names: str) -> bool:
        """Whether there is a complaint about one of these fields."""
        return any(_field_of(complaint.path) in names for complaint in self.complaints)

    def raise_complaints(self) -> None:
        """Raise InvalidRequest if there are complaints. They come in the order of the input's fields."""
        if self.complaints:
            raise InvalidRequest(_in_input_order(self.complaints, self.raw))

    @property
    def _is_full(self) -> bool:
        return len(self.complaints) > MAX_COMPLAINTS

    def _json_fields(self) -> dict[str, Any]:
        """The fields that are strict JSON at every depth."""
        valid = {}
        budget = ValueBudget(MAX_VALUES)
        for name, value in self.raw.items():
            if not isinstance(name, str) or has_lone_surrogate(name):
                self.complain("input", "must have field names of valid text")
                continue
            problems = json_problems(value, budget)
            for path, message in problems:
                self.complain(shown(name) + path, message)
            if budget.is_exceeded or self._is_full:
                break
            if not problems or (name == "loras" and isinstance(value, list)):  # its valid items are still checked
                valid[name] = value
        return valid

    def _known_fields(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that fit the table, as checked values. null means absent: A1111's own clients send it."""
        checked: dict[str, Any] = {}
        usable = [name for name, field in self.table.items() if field.kind not in _NEVER_SUGGESTED]
        for name, value in given.items():
            if self._is_full:
                break
            field = self.table.get(name)
            if value is None and not (field and field.is_required):
                continue
            if field is None:
                self.complain(shown(name), unknown_field(name, usable))
            elif field.kind is FieldClass.REFUSED:
                if field.ignores(value):
                    continue
                if self._is_idle(field):
                    self.dropped.append(name)
                else:
                    self.complain(name, f"is refused: {field.reason}")
            else:
                try:
                    checked[name] = field.value.check(value)
                except InvalidValue as error:
                    for path, message in error.problems:
                        self.complain(name + path, message)
        for name, field in self.table.items():
            if field.is_required and name not in self.raw:
                self.complain(name, "is required")
        used = {name: value for name, value in checked.items() if not is_unset(name, value)}
        idle = [name for name in used if self._is_idle(self.table[name])]
        self.dropped.extend(idle)
        return {name: value for name, value in used.items() if name not in idle}

    def _is_idle(self, field: Field) -> bool:
        """Whether a field cannot change the picture."""
        return field.kind is FieldClass.DROPPED or (
            field.only_with is not None and self.raw.get(field.only_with) in (None, False)
        )


def _in_input_order(complaints: Iterable[Complaint], raw: dict[Any, Any]) -> list[Complaint]:
    """Complaints in the order of the input's fields: missing fields first, complaints about the whole input last."""
    order = {shown(name): index for index, name in enumerate(raw)}

    def position(complaint: Complaint) -> int:
        if complaint.path == "input":
            return len(order)
        return order.get(complaint.path, order.get(_field_of(complaint.path), -1))

    return sorted(complaints, key=position)


def _field_of(path: str) -> str:
    return re.split(r"[.\[]", path, maxsplit=1)[0]

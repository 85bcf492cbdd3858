"""The failures as a caller sees them."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re

import pytest

import a1111_worker
from a1111_worker import errors
from a1111_worker.errors import Complaint, ConfigError, InvalidRequest, WorkerError


def every_error() -> list[type[WorkerError]]:
    found = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, WorkerError)]
    return [cls for cls in found if cls not in (WorkerError, errors.ModelError)]


# code: (retryable, refresh_worker), as callers and RunPod are promised
CODES = {
    "INVALID_REQUEST": (False, False),
    "MODEL_NOT_FOUND": (False, False),
    "MODEL_ACCESS_DENIED": (False, False),
    "MODEL_REJECTED": (False, False),
    "DOWNLOAD_FAILED": (True, False),
    "VOLUME_FULL": (True, False),
    "VOLUME_FAILED": (True, False),
    "WEBUI_NOT_READY": (True, True),
    "WEBUI_LOST": (True, False),
    "CHECKPOINT_NOT_LOADED": (True, True),
    "LORA_NOT_APPLIED": (False, False),
    "GENERATION_FAILED": (False, False),
    "OUT_OF_MEMORY": (False, False),
    "JOB_TIMEOUT": (True, False),
    "JOB_CANCELLED": (True, False),
    "RESULT_TOO_LARGE": (False, False),
    "DELIVERY_FAILED": (True, False),
    "INTERNAL": (True, True),
}


def test_every_code_says_whether_to_try_again_and_whether_to_replace_the_worker() -> None:
    found = {cls.code: (cls.retryable, cls.refresh_worker) for cls in every_error()}

    assert found == CODES


@pytest.mark.parametrize("cls", every_error(), ids=lambda cls: cls.code)
def test_an_answer_is_strict_json_with_an_error_that_is_text(cls: type[WorkerError]) -> None:
    answer = cls("it did not work", hint="try something else").answer()

    assert answer["error"] == f"{cls.code}: it did not work"
    assert answer["message"] == "it did not work"  # RunPod's Python client shows everything but `error`
    assert answer["hint"] == "try something else"
    assert answer.get("refresh_worker", False) is cls.refresh_worker
    json.dumps(answer, allow_nan=False).encode()


def test_all_complaints_come_at_once_each_with_its_path() -> None:
    error = InvalidRequest([Complaint("steps", "takes a number"), Complaint("", "no prompt")])

    assert error.answer()["error"] == "INVALID_REQUEST: steps: takes a number; no prompt"


def test_an_invalid_request_lists_its_complaints_for_programs_too() -> None:
    error = InvalidRequest([Complaint("loras[0].scale", "must be a number"), Complaint("", "no prompt")])

    assert error.answer()["complaints"] == [
        {"path": "loras[0].scale", "message": "must be a number"},
        {"path": "", "message": "no prompt"},
    ]


def test_only_an_invalid_request_has_complaints() -> None:
    answers = [cls("x") for cls in every_error() if not issubclass(cls, InvalidRequest)]

    assert [error.code for error in answers if "complaints" in error.answer()] == []


def test_a_message_with_a_lone_surrogate_can_be_sent() -> None:
    answer = InvalidRequest([Complaint("\ud800", "unknown field '\ud800'")]).answer()

    json.dumps(answer, ensure_ascii=False).encode()


def test_the_length_of_a_message_is_limited() -> None:
    answer = InvalidRequest([Complaint("x" * 100, "is unknown")] * 1000).answer()

    assert len(answer["error"]) <= 4000
    assert len(answer["message"]) <= 4000


def test_the_length_of_each_complaint_is_limited() -> None:
    (complaint,) = InvalidRequest([Complaint("x" * 1_000_000, "y" * 1_000_000)]).answer()["complaints"]

    assert len(complaint["path"]) <= 4000
    assert len(complaint["message"]) <= 4000


# The tree in the docstring of errors.py


def drawn_tree() -> dict[str, str | None]:
    """Every class in the tree with its parent. The classes at the left margin have none."""
    tree: dict[str, str | None] = {}
    branch: list[str] = []  # the path from the root to the class of the line before
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r" {4}(?P<lines>(?:[│ ] {3})*(?:[├└]── )?)(?P<name>[A-Z]\w+)(?: {2}|$)", line):
            depth = len(found["lines"]) // 4
            del branch[depth:]
            assert len(branch) == depth, f"{found['name']} hangs below nothing"
            tree[found["name"]] = branch[-1] if branch else None
            branch.append(found["name"])
    return tree


def class_tree() -> dict[str, str | None]:
    """The same of the classes themselves, wherever in the worker they are defined."""
    for module in pkgutil.walk_packages(a1111_worker.__path__, "a1111_worker."):
        importlib.import_module(module.name)
    tree: dict[str, str | None] = {"WorkerError": None, "ConfigError": None}
    rest: list[type[Exception]] = [WorkerError, ConfigError]
    while rest:
        parent = rest.pop()
        children = [child for child in parent.__subclasses__() if child.__module__.startswith("a1111_worker.")]
        tree |= {child.__name__: parent.__name__ for child in children}
        rest += children
    return tree


def test_the_tree_that_is_drawn_is_the_tree_of_classes() -> None:
    assert drawn_tree() == class_tree()

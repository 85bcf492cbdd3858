"""The failures as a caller sees them."""

from __future__ import annotations

import json

import pytest

from a1111_worker import errors
from a1111_worker.errors import Complaint, InvalidRequest, WorkerError


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


def test_every_code_says_whether_to_try_again_and_whether_the_worker_is_fit() -> None:
    found = {cls.code: (cls.retryable, cls.refresh_worker) for cls in every_error()}

    assert found == CODES


@pytest.mark.parametrize("cls", every_error(), ids=lambda cls: cls.code)
def test_an_answer_is_strict_json_with_an_error_that_is_text(cls: type[WorkerError]) -> None:
    answer = cls("it did not work", hint="try something else").answer()

    assert answer["error"] == f"{cls.code}: it did not work"
    assert answer["hint"] == "try something else"
    assert answer.get("refresh_worker", False) is cls.refresh_worker
    json.dumps(answer, allow_nan=False).encode()


def test_all_complaints_come_at_once_each_with_its_path() -> None:
    error = InvalidRequest([Complaint("steps", "takes a number"), Complaint("", "no prompt")])

    assert error.answer()["error"] == "INVALID_REQUEST: steps: takes a number; no prompt"


def test_a_sentence_with_a_lone_surrogate_can_still_leave() -> None:
    answer = InvalidRequest("unknown field '\ud800'").answer()

    json.dumps(answer, ensure_ascii=False).encode()


def test_a_sentence_is_never_endless() -> None:
    answer = InvalidRequest([Complaint("x" * 100, "is unknown")] * 1000).answer()

    assert len(answer["error"]) <= 4000

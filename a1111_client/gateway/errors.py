"""A1111's four kinds of error answers, and which of them a failed job becomes.

    {"detail": [{"loc": ["body", "steps"], "msg": "value is not a valid integer", "type": "type_error.integer"}]}   422
    {"error": "HTTPException", "detail": "Sampler not found", "body": "", "errors": ""}          on purpose
    {"error": "OutOfMemoryError", "detail": "…", "body": "", "errors": "CUDA out of memory. …"}  any other exception
    {"detail": "Not Found"}                                                                      the router's

A1111 leaves `detail` empty in the third kind. Here the reason is always in it, because clients show only `detail`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from a1111_client.errors import EndpointError


class ApiError(Exception):
    """An answer that is not a success."""

    def __init__(self, status: int, body: Mapping[str, Any]) -> None:
        super().__init__(body)
        self.status = status
        self.body = dict(body)


class InvalidFields(ApiError):
    """Pydantic's 422: each problem has the place, the sentence and the type that pydantic 1 gives it."""

    def __init__(self, problems: Sequence[tuple[Sequence[str | int], str, str]]) -> None:
        super().__init__(422, {"detail": [{"loc": list(loc), "msg": msg, "type": kind} for loc, msg, kind in problems]})


class Refused(ApiError):
    """A1111's HTTPException: the request cannot be done, and `detail` says why."""

    def __init__(self, status: int, detail: str, errors: str = "") -> None:
        super().__init__(status, {"error": "HTTPException", "detail": detail, "body": "", "errors": errors})


class Failed(ApiError):
    """Any other exception in A1111. `name` is its class."""

    def __init__(self, status: int, name: str, detail: str, errors: str) -> None:
        super().__init__(status, {"error": name, "detail": detail, "body": "", "errors": errors})


SAMPLER_NOT_FOUND = "Sampler not found"

_REFUSALS = {
    "INVALID_REQUEST": 422,
    "MODEL_NOT_FOUND": 404,
    "MODEL_ACCESS_DENIED": 403,
    "MODEL_REJECTED": 422,
    "REQUEST_TOO_LARGE": 413,
}
_NAMES = {"OUT_OF_MEMORY": "OutOfMemoryError", "GENERATION_FAILED": "RuntimeError"}
_UNAVAILABLE = ("ENDPOINT_", "WEBUI_", "NO_ENDPOINT")
_SAMPLER_PATHS = ("sampler_name", "sampler_index")


def from_job(error: EndpointError) -> ApiError:
    """The answer that says why a job failed."""
    sentence = f"{error.message} ({error.hint})" if error.hint else error.message
    if error.code == "INVALID_REQUEST" and any(
        complaint.get("path") in _SAMPLER_PATHS for complaint in error.complaints
    ):
        return Refused(404, SAMPLER_NOT_FOUND, sentence)  # the exact words: clients compare them
    if error.code in _REFUSALS:
        return Refused(_REFUSALS[error.code], sentence, error.code)
    status = 503 if error.code.startswith(_UNAVAILABLE) else 500
    return Failed(status, _NAMES.get(error.code, error.code), sentence, str(error))

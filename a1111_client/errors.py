"""What can go wrong between here and a picture: a code for programs, a sentence and a hint for people.

Codes of the worker pass through unchanged (MODEL_NOT_FOUND, OUT_OF_MEMORY, …). These are added here:

    NO_ENDPOINT            nobody said which endpoint to use
    NO_KEY                 there is no key for RunPod, or for a volume
    BAD_OPTION             an option or a file makes no sense; nothing was asked or sent
    ENDPOINT_UNREACHABLE   no answer, or only errors of the platform
    ENDPOINT_REFUSED       the key is wrong
    ENDPOINT_NOT_FOUND     there is no endpoint of that name
    REQUEST_TOO_LARGE      more than RunPod takes, and nothing in it can be made smaller
    JOB_LOST               RunPod does not know the job, or has no result of it
    JOB_CANCELLED          somebody cancelled it
    JOB_TIMED_OUT          RunPod's own limit ended it, or its worker died
    JOB_FAILED             it failed, and the reason has no code
    NOT_SAVED              a file could not be written here

and by the commands that manage what is on RunPod (manage.py):

    NOT_CONFIRMED          nobody could be asked, and there was no --yes
    CANNOT_DEPLOY          what is wanted cannot be created: every reason
    RUNPOD_REFUSED         RunPod refused a request; the sentence is its own
    UPLOAD_CONFLICT        files on the volume are in the way; nothing was sent
    UPLOAD_FAILED          the volume did not take a file, or has another one afterwards
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class EndpointError(Exception):
    """A job, or a request to an endpoint, that failed. `complaints` are those of the worker, each with its path."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        hint: str = "",
        retryable: bool = False,
        complaints: Sequence[Mapping[str, str]] = (),
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.hint = hint
        self.retryable = retryable
        self.complaints = tuple(complaints)

    def as_json(self) -> dict[str, Any]:
        """For scripts: the same keys as a failed job of the worker."""
        return {
            "error": str(self),
            "code": self.code,
            "message": self.message,
            **({"hint": self.hint} if self.hint else {}),
            "retryable": self.retryable,
            **({"complaints": [dict(complaint) for complaint in self.complaints]} if self.complaints else {}),
        }

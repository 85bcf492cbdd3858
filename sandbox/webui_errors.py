"""The four shapes in which A1111 says no."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class Refusal(Exception):
    """An answer that is no success. `timed`: carries x-process-time, as all do but the shape of `WebUIError`."""

    timed = True

    def __init__(self, status: int, body: Mapping[str, Any], allow: str | None = None) -> None:
        super().__init__(body)
        self.status = status
        self.body = body
        self.headers = {"allow": allow} if allow else {}


class NoRoute(Refusal):
    """The router's 404: wrong flags, not mounted yet, a foreign process."""

    def __init__(self) -> None:
        super().__init__(404, {"detail": "Not Found"})


class NoMethod(Refusal):
    def __init__(self, allow: str) -> None:
        super().__init__(405, {"detail": "Method Not Allowed"}, allow)


class Invalid(Refusal):
    """Pydantic's 422."""

    def __init__(self, problems: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(422, {"detail": list(problems)})


class HTTPException(Refusal):
    """Raised by A1111 on purpose: `detail` filled."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(status, {"error": "HTTPException", "detail": detail, "body": "", "errors": ""})


class WebUIError(Refusal):
    """Any other exception: its class's name, and `errors` filled."""

    timed = False

    def __init__(self, name: str, message: str) -> None:
        super().__init__(500, {"error": name, "detail": "", "body": "", "errors": message})

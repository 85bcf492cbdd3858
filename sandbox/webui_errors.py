"""The error answers of A1111 and of the framework under it. There are four shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class ErrorAnswer(Exception):
    """An answer that is not a success. `timed`: it has x-process-time, as all have except `WebUIError`."""

    timed = True

    def __init__(self, status: int, body: Mapping[str, Any], allow: str | None = None) -> None:
        super().__init__(body)
        self.status = status
        self.body = body
        self.headers = {"allow": allow} if allow else {}


class RouteNotFound(ErrorAnswer):
    """The router's 404: wrong flags, routes that are not mounted yet, another program on the port."""

    def __init__(self) -> None:
        super().__init__(404, {"detail": "Not Found"})


class MethodNotAllowed(ErrorAnswer):
    def __init__(self, allow: str) -> None:
        super().__init__(405, {"detail": "Method Not Allowed"}, allow)


class InvalidFields(ErrorAnswer):
    """Pydantic's 422."""

    def __init__(self, problems: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(422, {"detail": list(problems)})


class HTTPException(ErrorAnswer):
    """A1111 raises it on purpose: `detail` has the text."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(status, {"error": "HTTPException", "detail": detail, "body": "", "errors": ""})


class WebUIError(ErrorAnswer):
    """Any other exception: `error` has its class's name, `errors` has the text."""

    timed = False

    def __init__(self, name: str, message: str) -> None:
        super().__init__(500, {"error": name, "detail": "", "body": "", "errors": message})

"""Errors as an OpenAI client expects them: one exception, one JSON shape.

Knows no route and no model.
"""

from __future__ import annotations

from typing import Any

TYPES = {
    401: "authentication_error",
    404: "invalid_request_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
}
"""Error type by status; any other 4xx is an invalid_request_error."""


class ApiError(Exception):
    """An answer that is an error: status, message, the field it is about, a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self, request_id: str) -> dict[str, Any]:
        """{"error": {message, type, param, code}, "request_id": the id to ask about}"""
        return {
            "error": {
                "message": self.message,
                "type": TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            },
            "request_id": request_id,
        }

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After, in whole seconds, where coming back may help."""
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}


def invalid(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400: the request itself must change."""
    return ApiError(400, message, param=param, code=code)

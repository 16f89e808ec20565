"""Failures in the shape of OpenAI's API, with DeepSeek's status codes."""

from __future__ import annotations

from typing import Any

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """A failure that the client is told about.

    Attributes:
      status: 400 no JSON, or a text that does not fit; 401 key; 403 origin; 404 model or path; 413
        body; 422 a field; 429 queue; 500 ours; 503 not ready, draining, or waited too long.
      param: the field at fault, such as `messages[0].role`.
      retry_after: seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or _TYPES[status].removesuffix("_error")
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """Returns the JSON object to send."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES[self.status],
                "param": self.param,
                "code": self.code,
            }
        }

"""Errors that clients see.

A message says what the server expects. It never quotes the request, because it may be logged.
"""

from __future__ import annotations

OPENAI_PREFIXES = ("/openai/", "/v1/chat/")


class ApiError(Exception):
    """The error response to a request that is not answered.

    status: HTTP status. code: a word for programs to test. param: the field in question. retry_after_s: seconds until
    the client should try again (429).
    """

    def __init__(self, status: int, code: str, message: str, *, param: str = "", retry_after_s: int = 0) -> None:
        super().__init__(message)
        self.challenge = "Bearer"  # how a client may authenticate (401)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.retry_after_s = retry_after_s

    def with_message(self, message: str) -> ApiError:
        """The same error with another message."""
        return ApiError(self.status, self.code, message, param=self.param, retry_after_s=self.retry_after_s)

    def build_body(self, path: str) -> dict[str, object]:
        """Build the body in the format of the path's protocol."""
        if not path.startswith(OPENAI_PREFIXES):
            return {"error": self.message, "code": self.code}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": self.message, "type": kind, "param": self.param or None, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that the status requires: WWW-Authenticate or Retry-After."""
        if self.status == 401:
            return {"WWW-Authenticate": self.challenge}
        return {"Retry-After": str(self.retry_after_s)} if self.retry_after_s else {}


class RequestCancelled(Exception):
    """The client has disconnected, so the answer is no longer needed."""


def build_deadline_error() -> ApiError:
    """The error of a request that passed its deadline (504)."""
    return ApiError(504, "deadline_exceeded", "the answer was not ready before the server's deadline")

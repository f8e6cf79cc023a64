"""Why a request is not answered. The message is for the client: it says what is expected, and quotes no content."""

from __future__ import annotations


class ApiError(Exception):
    """A request that is not answered, with its HTTP status.

    code: a word that programs can test. param: the field it is about. retry_after_s: when to try again (429).
    """

    def __init__(self, status: int, code: str, message: str, *, param: str = "", retry_after_s: int = 0) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.retry_after_s = retry_after_s

    def build_body(self, path: str) -> dict[str, object]:
        """As the protocol of the path has its errors."""
        if not path.startswith("/openai/"):
            return {"error": self.message, "code": self.code}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": self.message, "type": kind, "param": self.param or None, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(self.retry_after_s)} if self.retry_after_s else {}


class RequestCancelled(Exception):
    """The client went away; nobody waits for the answer."""


def build_deadline_error() -> ApiError:
    return ApiError(504, "deadline_exceeded", "the answer was not ready within the server's deadline")

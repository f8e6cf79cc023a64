"""Errors that clients see.

A message says what the server expects. It never quotes the request, because it may be logged.
"""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from clincot.clients.http import HttpFailure
from clincot.errors import ModelFailed
from clincot.jsonl import strip_prefix

if TYPE_CHECKING:
    from fastapi.exceptions import RequestValidationError
    from pydantic import ValidationError

_LOG = logging.getLogger("clincot.serve")
# The beginnings of HttpFailure.summary that quote nothing of a reply (clients/http.py).
_REPLY_KIND = re.compile(
    r"HTTP \d{3}( with a body that is not JSON)?|no complete reply within [\d.]+ s|no reply: \w+|JSON of another shape"
)
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


@contextmanager
def number_errors(what: str, number: int, count: int) -> Iterator[None]:
    """Begin the message of an ApiError with the number of the item that it is about, unless that is the only one."""
    try:
        yield
    except ApiError as error:
        if count == 1:
            raise
        raise error.with_message(f"{what} {number}: {error.message}") from None


class RequestCancelled(Exception):
    """The client has disconnected, so the answer is no longer needed."""


def build_deadline_error() -> ApiError:
    """The error of a request that passed its deadline (504)."""
    return ApiError(504, "deadline_exceeded", "the answer was not ready before the server's deadline")


def build_internal_error() -> ApiError:
    """The error of a request that met a bug of the server (500)."""
    return ApiError(500, "internal_error", "the server failed; its log says where")


def convert_error(error: Exception) -> ApiError:
    """The error that a client sees for any exception; an error of the server or its model is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestCancelled):  # the client is gone
        return ApiError(503, "cancelled", "the request was cancelled")
    if isinstance(error, ModelFailed):
        _LOG.error("the model gave no usable answer: %s", _redact_failure(error))
        return ApiError(502, "model_failed", "the model behind this server gave no usable answer")
    log_unexpected_error(error)
    return build_internal_error()


def describe_validation_error(error: ValidationError | RequestValidationError) -> str:
    """Name the wrong fields (at most five), without quoting their values."""
    problems = []
    for problem in error.errors()[:5]:
        field = ".".join(map(str, problem["loc"])) or "body"
        problems.append(f"{field}: {strip_prefix(problem['msg'])}")
    return "; ".join(problems)


def log_unexpected_error(error: BaseException) -> None:
    """Log the type and the place of an unexpected error, without its message.

    The message may quote the request.
    """
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    places = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in frames]
    _LOG.error("unexpected %s at %s", type(error).__name__, " < ".join(places))


def _redact_failure(error: ModelFailed) -> str:
    """The part of a failure's message that may be logged.

    It says what was expected, and of a predictor's failure what kind of reply came. The rest of the part after ", got "
    is dropped, because a reply may quote the request.
    """
    expected = str(error).partition(", got ")[0]
    kind = _REPLY_KIND.match(error.summary) if isinstance(error, HttpFailure) else None
    return expected if kind is None else f"{expected}, got {kind[0]}"

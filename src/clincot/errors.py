"""Errors whose message is written for the user: what is wrong, where, and how to fix it.

The command line prints a UserError as one line. Any other exception is a bug in the program or in a library and keeps
its traceback, which shows the developer where to look.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class UserError(Exception):
    """Base class of errors that the command line prints without a traceback.

    It can be pickled whatever its constructor takes, and so reach the user from another process.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_error, (type(self), self.args, self.__dict__)


def _restore_error(kind: type[UserError], args: tuple[Any, ...], state: Mapping[str, Any]) -> UserError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class InvalidInput(UserError, ValueError):
    """An unusable file, setting or checkpoint."""


@contextmanager
def require_extra(name: str, what: str) -> Iterator[None]:
    """Wrap the imports of an optional extra. Raises InvalidInput if it is not installed; `what` names who needs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise InvalidInput(f"{what} needs the extra {name!r}: pip install 'clincot[{name}]' ({error})") from None


class PromptTooLong(UserError, ValueError):
    """A conversation with more tokens than the model's limit."""

    def __init__(self, tokens: int, new_tokens: int, limit: int) -> None:
        super().__init__(
            f"the model's limit is {limit} tokens, and the request needs {tokens + new_tokens}: {tokens} for the "
            f"question with its images and {new_tokens} for the answer"
        )


class ModelFailed(UserError, RuntimeError):
    """A model or endpoint gave no usable reply: unreachable, timeout, HTTP error, or no log-probabilities."""


class EngineFailed(UserError, RuntimeError):
    """The server that runs a stage's models has ended, or does not serve what it should.

    It is no ModelFailed: a panel would go on without the judge, and its scores would be those of another panel.
    """

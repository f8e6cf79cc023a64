"""Errors whose message is for the user: it names what is wrong, where, and how to mend it.

The command line prints these in one line. Everything else is a fault of the program (or of a library) and keeps its
traceback, whatever its type: a bare ValueError or KeyError tells a user nothing and its developer where to look.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Marks the errors that the command line tells without a traceback."""


class InvalidInput(UserError, ValueError):
    """A file, a setting or a checkpoint that cannot be worked with."""


@contextmanager
def require_extra(name: str, what: str) -> Iterator[None]:
    """Around imports of what an optional extra of the package brings: BadInput says which one `what` needs."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise InvalidInput(f"{what} needs the extra {name!r}: pip install 'clincot[{name}]' ({error})") from None


class ModelFailed(UserError, RuntimeError):
    """A model or endpoint gave no usable reply at all (unreachable, timeout, HTTP error, no log-probs)."""

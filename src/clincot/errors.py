"""Errors whose message is for the user: it names what is wrong, where, and how to mend it.

The command line prints these in one line. Everything else is a fault of the program (or of a library) and keeps its
traceback, whatever its type: a bare ValueError or KeyError tells a user nothing and its developer where to look.
"""

from __future__ import annotations


class ForTheUser(Exception):
    """Marks the errors that the command line tells without a traceback."""


class BadInput(ForTheUser, ValueError):
    """A file, a setting or a checkpoint that cannot be worked with."""

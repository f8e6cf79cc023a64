"""The command line: arguments, output and exit codes. The work itself is done in the packages below."""

from __future__ import annotations

from clincot.cli.app import main

__all__ = ["main"]

"""`clincot preflight`: the stage, with its table on the terminal whether it passes or not."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from clincot.stages.base import Metrics


def print_preflight(args: argparse.Namespace, run_stage: Callable[[argparse.Namespace], Metrics]) -> int:
    """Run the stage and print its table. Raises PreflightFailed after the table was printed."""
    from clincot.preflight.preflight_report import PreflightFailed

    try:
        run_stage(args)
    except PreflightFailed:
        print(args.table.read_text(encoding="utf-8"))
        raise
    print(args.table.read_text(encoding="utf-8"))
    print(args.champion.read_text(encoding="utf-8").strip())
    return 0

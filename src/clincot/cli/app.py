"""`clincot`: one program, a command for each stage, and what surrounds them.

Exit codes: 0 done; 1 an error for the user, in one line (or a fault of the program, with a traceback); 2 wrong usage;
`decide --exit-code`: 0 promote, 3 keep, 4 blocked; 141 if the reader of the output ended (`clincot params | head -1`).
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Annotated, Any

import typer

from clincot.cli.all_commands import build_lazy_commands
from clincot.cli.framework import Invocation, build_group, parse_command_line
from clincot.errors import UserError

PROGRAM = "clincot"
# Somebody waits for the answer of a short command, and its address may be mistyped. These commands work for hours, so
# they wait as long as the tasks of a pipeline.
LONG_COMMANDS = frozenset(
    {
        "prepare",
        "propose",
        "answer",
        "judge",
        "pair",
        "version",
        "train",
        "evaluate",
        "decide",
        "publish",
        "rounds",
        "compare",
        "serve",
        "deploy",
    }
)
COMMAND_WAIT_S = 30.0
BROKEN_PIPE_CODE = 141  # what a shell reports for a program that SIGPIPE ended: 128 + 13
ABOUT = "Teach medical vision-language models to look before they answer."
GUIDE = """\
A first round (without --recipe, a command reads ./params.yaml if it exists):

  clincot demo --short                                   everything once, on a few rendered images
  clincot ingest vqa-rad DIR --out data/vqa-rad          a published data set
  clincot render --out data/train --warps 0:24 --images 400     or the controlled benchmark
  clincot render --out data/test --warps 100:124 --images 100   and its held-out patients
  clincot rounds --recipe small-model --policy shipped:policy --data data/train --benchmark data/test \\
      --run runs/mine --count 2 --set decide.max_near_duplicates=1
  clincot show pair-1a2b --run runs/mine                 a record with everything it was made from
  clincot publish --checkpoint runs/mine/round-01/policy --store DIR_OR_S3 --published published.json
  clincot deploy --store DIR_OR_S3 --target local        an endpoint, checked before it gets traffic
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code. Raises SystemExit after --help and after wrong usage."""
    invocation = parse(argv)
    from clincot.processes import heed_sigterm  # not needed for the help, which is to be quick

    try:
        with _limit_waiting(invocation.command), heed_sigterm():
            code = invocation.run()
        sys.stdout.flush()
        return code
    except (UserError, OSError) as error:  # OSError: a full disk, a missing file, no permission
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return BROKEN_PIPE_CODE
        print(f"{PROGRAM} {invocation.command}: {error}", file=sys.stderr)
        return 1


@contextmanager
def _limit_waiting(command: str) -> Iterator[None]:
    """Let short commands wait only COMMAND_WAIT_S for a service that is away, unless the environment sets a budget."""
    from clincot.waiting import WAIT_ENV, ServiceWaiting, use_waiting

    if command in LONG_COMMANDS or os.environ.get(WAIT_ENV):
        yield
        return
    with use_waiting(ServiceWaiting(COMMAND_WAIT_S)):
        yield


def _reader_is_gone() -> bool:
    """Whether the program that reads standard output has ended, as in `clincot params | head -1`.

    Standard output then goes to os.devnull, so that Python does not fail again when it flushes it at exit.
    """
    try:
        output = sys.stdout.fileno()
    except OSError:  # not a file, as in tests
        return False
    poll = select.poll()
    poll.register(output, 0)
    if not any(state & (select.POLLERR | select.POLLHUP) for _, state in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def parse(argv: Sequence[str] | None = None) -> Invocation:
    """Parse a command line without running it."""
    return parse_command_line(get_command(), argv, PROGRAM)


@cache
def get_command() -> Any:
    """The tree of commands, in the order of `clincot --help`."""
    return build_group(build_lazy_commands(), ABOUT, epilog=GUIDE, callback=_program, completion=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        from clincot import __version__

        print(f"{PROGRAM} {__version__}")
        raise typer.Exit


def _program(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the program itself; typer calls this before every command."""


if __name__ == "__main__":
    raise SystemExit(main())

"""`clincot`: one program, a command for each stage, and what surrounds them.

Exit codes: 0 done; 1 an error for the user, in one line (or a fault of the program, with a traceback); 2 wrong usage;
`decide --exit-code`: 0 promote, 3 keep, 4 blocked.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any

import typer

from clincot import __version__
from clincot.cli.convert_commands import add_convert_commands
from clincot.cli.data_commands import add_data_commands
from clincot.cli.deploy_commands import add_deploy_commands
from clincot.cli.doctor_command import add_doctor_command
from clincot.cli.framework import Commands, Invocation, build_group, parse_command_line
from clincot.cli.model_commands import add_model_commands
from clincot.cli.pipeline_commands import add_pipeline_commands
from clincot.cli.registry_commands import add_registry_commands
from clincot.cli.round_commands import add_round_commands
from clincot.cli.serve_command import add_serve_command
from clincot.cli.stage_commands import add_stage_commands
from clincot.cli.store_commands import add_store_commands
from clincot.cli.version_commands import add_version_commands
from clincot.errors import UserError

PROGRAM = "clincot"
ABOUT = "Teach medical vision-language models to look before they answer."
GUIDE = """\
A first round (every stage reads ./params.yaml and prints what it wrote):

  clincot demo --short                                   everything once, on a few rendered images
  clincot ingest vqa-rad DIR --out data/vqa-rad          a published data set
  clincot render --out data/train --warps 0:24 --images 400     or the controlled benchmark
  clincot rounds --run runs/mine --data data/train --benchmark data/test --policy assets/policy --count 2
  clincot show pair-1a2b --run runs/mine                 a record with everything it was made from
  clincot publish --checkpoint runs/mine/round-01/policy --store DIR_OR_S3 --published published.json
  clincot deploy --store DIR_OR_S3 --target local        an endpoint, checked before it gets traffic
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code. Raises SystemExit after --help and after wrong usage."""
    invocation = parse(argv)
    try:
        return invocation.run()
    except (UserError, OSError) as error:  # OSError: a full disk, a missing file, no permission
        print(f"{PROGRAM} {invocation.command}: {error}", file=sys.stderr)
        return 1


def parse(argv: Sequence[str] | None = None) -> Invocation:
    """Parse a command line without running it."""
    return parse_command_line(get_command(), argv, PROGRAM)


@cache
def get_command() -> Any:
    """The tree of commands, in the order of `clincot --help`."""
    commands = Commands()
    add_stage_commands(commands)
    add_round_commands(commands)
    add_data_commands(commands)
    add_version_commands(commands)
    add_model_commands(commands)
    add_convert_commands(commands)
    add_doctor_command(commands)
    add_registry_commands(commands)
    add_serve_command(commands)
    add_deploy_commands(commands)
    add_store_commands(commands)
    add_pipeline_commands(commands)
    return build_group(commands, ABOUT, epilog=GUIDE, callback=_program, completion=True)


def _print_version(wanted: bool) -> None:
    if wanted:
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

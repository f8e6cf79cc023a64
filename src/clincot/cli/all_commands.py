"""All commands, from the modules that define them, and the table from which `clincot` starts.

Importing every command's module takes longer than most commands run. The program therefore reads names, headings and
sentences from command_table.json and imports the module of the command that is asked for. The table is generated
(`make docs-reference`), and a test compares it with what `list_commands` finds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.resources import files
from typing import Any, NamedTuple

from clincot.cli.framework import Commands, Entry

TABLE = "command_table.json"
# Modules of commands in the order of `clincot --help`, each with its function `add_<module>`.
MODULES = (
    "stage_commands",
    "round_commands",
    "compare_command",
    "plan_command",
    "data_commands",
    "export_commands",
    "version_commands",
    "review_commands",
    "model_commands",
    "convert_commands",
    "doctor_command",
    "registry_commands",
    "serve_command",
    "deploy_commands",
    "store_commands",
    "pipeline_commands",
)


class CommandRow(NamedTuple):
    """A command of the table: the module that defines it, its name, the heading in the help, and its help."""

    module: str
    name: str
    panel: str
    about: str


def list_commands() -> list[CommandRow]:
    """The commands as their modules define them; imports all of them."""
    rows = []
    for module in MODULES:
        rows += [CommandRow(module, name, entry.panel, entry.about) for name, entry in _load_module(module).items()]
    return rows


def read_command_table() -> list[CommandRow]:
    """The commands by the table; imports none of them."""
    text = files("clincot.cli").joinpath(TABLE).read_text(encoding="utf-8")
    return [CommandRow(**row) for row in json.loads(text)]


def render_command_table() -> str:
    """The content of the table."""
    return json.dumps([row._asdict() for row in list_commands()], ensure_ascii=False, indent=1) + "\n"


def build_lazy_commands() -> Commands:
    """Every command by name; its module is imported when it is built."""
    return {row.name: Entry(row.panel, row.about, partial(_build_command, row)) for row in read_command_table()}


def _build_command(row: CommandRow) -> Any:
    return _load_module(row.module)[row.name].build()


def _load_module(name: str) -> Commands:
    add: Callable[[Commands], None] = getattr(import_module(f"clincot.cli.{name}"), f"add_{name}")
    commands: Commands = {}
    add(commands)
    return commands

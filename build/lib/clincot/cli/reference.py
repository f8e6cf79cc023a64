"""The command-line reference in Markdown, generated from the tree of commands."""

from __future__ import annotations

from typing import Any

from clincot.cli.app import ABOUT, PROGRAM, get_command
from clincot.cli.help_text import describe_parameter, group_commands, name_parameter


def render_cli_reference() -> str:
    """Every command with its sentence and its arguments; the same text whenever and wherever it is made."""
    root = get_command()
    lines = ["# Command line", "", ABOUT, "", f"`{PROGRAM} COMMAND --help` prints the same for one command.", ""]
    for title, commands in group_commands(root).items():
        lines += [f"## {title}", ""]
        for name in commands:
            lines += _render_command(f"{PROGRAM} {name}", root.commands[name], level=3)
    return "\n".join(lines).rstrip("\n") + "\n"


def _render_command(path: str, command: Any, level: int) -> list[str]:
    """A section about one command, then those of its subcommands, one level deeper."""
    lines = [f"{'#' * level} `{path}`", ""]
    for paragraph in (command.help or "").split("\n\n"):
        lines += [" ".join(paragraph.split()), ""]
    parameters = [one for one in command.params if not getattr(one, "hidden", False)]
    if parameters:
        lines += ["| Argument | Meaning |", "| --- | --- |"]
        lines += [f"| `{_escape(name_parameter(one))}` | {_escape(describe_parameter(one))} |" for one in parameters]
        lines.append("")
    if command.epilog:
        lines += ["```text", *command.epilog.rstrip("\n").splitlines(), "```", ""]
    for commands in group_commands(command).values():
        for name in commands:
            lines += _render_command(f"{path} {name}", command.commands[name], level + 1)
    return lines


def _escape(text: str) -> str:
    """A bar would end the table's cell."""
    return text.replace("|", "\\|")

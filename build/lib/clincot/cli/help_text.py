"""Help of a command in plain text: usage, description, arguments and subcommands under headings.

There is no markup, since descriptions contain brackets such as [ClinCoT]. The width is fixed unless the text is written
to a terminal, so that what a pipe receives does not depend on the window.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

PLAIN_WIDTH = 100  # columns where the output is no terminal
NAME_WIDTH = 26
INDENT = " " * 4
ARGUMENTS, OPTIONS, COMMANDS = "Arguments", "Options", "Commands"


def render_usage(context: Any, command: Any, more: Sequence[str]) -> str:
    """One line of usage: required options by name, the others as [OPTIONS], then what is positional."""
    positional, required = [], []
    for parameter in command.params:
        metavar = get_metavar(parameter)
        if parameter.param_type_name == "argument":
            positional.append(metavar if parameter.required else f"[{metavar}]")
        elif parameter.required:
            required.append(f"{parameter.opts[0]} {metavar}")
    start = f"usage: {context.command_path} "
    words = " ".join([*positional, *required, "[OPTIONS]", *more])
    return textwrap.fill(
        words,
        get_width(),
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )


def render_help(context: Any, command: Any, appendix: str) -> str:
    """Usage, description, arguments and options by panel, subcommands by panel, and an appendix as it is."""
    blocks = [command.get_usage(context)]
    blocks += [wrap_text(paragraph) for paragraph in (command.help or "").split("\n\n") if paragraph]
    for title, parameters in group_parameters(command, context).items():
        blocks.append(_render_rows(title, [(name_parameter(one), describe_parameter(one)) for one in parameters]))
    for title, commands in group_commands(command).items():
        blocks.append(_render_rows(title, [(name, get_summary(about)) for name, about in commands.items()]))
    if appendix:
        blocks.append(appendix.rstrip())
    return "\n\n".join(blocks)


def group_parameters(command: Any, context: Any) -> dict[str, list[Any]]:
    """{heading: arguments and options}, both in the order of the signature; --help is the last of the options."""
    panels: dict[str, list[Any]] = {}
    for parameter in command.get_params(context):
        other = ARGUMENTS if parameter.param_type_name == "argument" else OPTIONS
        if not getattr(parameter, "hidden", False):
            panels.setdefault(getattr(parameter, "rich_help_panel", None) or other, []).append(parameter)
    return panels


def group_commands(command: Any) -> dict[str, dict[str, str]]:
    """{heading: {name of a subcommand: its help}}, both in the order in which they were added."""
    panels: dict[str, dict[str, str]] = {}
    for name, entry in getattr(command, "entries", {}).items():
        panels.setdefault(entry.panel, {})[name] = entry.about
    return panels


def get_summary(about: str) -> str:
    """The first paragraph of a command's help, in one line."""
    return " ".join(about.partition("\n\n")[0].split())


def get_metavar(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def name_parameter(parameter: Any) -> str:
    """As it is typed: every spelling of an option with its metavar, or an argument's metavar."""
    if parameter.param_type_name == "argument":
        return get_metavar(parameter)
    spellings = ", ".join(sorted(parameter.opts, key=len))
    return spellings if getattr(parameter, "is_flag", False) else f"{spellings} {get_metavar(parameter)}"


def describe_parameter(parameter: Any) -> str:
    """Its sentence, and what applies if it is left out."""
    about = " ".join((parameter.help or "").split())
    default = parameter.default
    if parameter.required:
        return f"{about} (required)" if parameter.param_type_name == "option" else about
    if default is None or default == "" or isinstance(default, (bool, list)) or "(default: " in about:
        return about
    return f"{about} (default: {default})"


def get_width() -> int:
    """Columns of the text: the terminal's within reason, or a fixed number in a pipe."""
    if not sys.stdout.isatty():
        return PLAIN_WIDTH
    return max(60, min(shutil.get_terminal_size().columns - 2, 110))


def wrap_text(text: str, indent: str = "") -> str:
    """Text as lines of the current width; words are never broken, so that paths and flags stay whole."""
    return textwrap.fill(
        " ".join(text.split()),
        get_width(),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _render_rows(title: str, rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"{title}:"]
    for name, about in rows:
        lines += _render_row(name, about)
    return "\n".join(lines)


def _render_row(name: str, about: str) -> Iterator[str]:
    lines = wrap_text(about, INDENT + " " * NAME_WIDTH).splitlines() or [""]
    if len(name) > NAME_WIDTH - 2:
        yield INDENT + name
    else:
        yield (INDENT + name.ljust(NAME_WIDTH) + lines.pop(0).strip()).rstrip()
    yield from lines

"""Commands on typer: arguments as frozen dataclasses, plain-text help, and parsing apart from running.

A command is a function of one frozen dataclass whose fields are `Annotated[..., typer.Option(...)]`. Arguments that
several commands share are base classes of theirs. Help is plain text without markup, since descriptions contain
brackets such as [ClinCoT], and has a fixed width unless it is written to a terminal.
"""

from __future__ import annotations

import inspect
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from enum import Enum
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import OptionInfo, ParameterInfo

A = TypeVar("A")
PLAIN_WIDTH = 100  # columns where the output is no terminal
NAME_WIDTH = 26
INDENT = " " * 4
ARGUMENTS, OPTIONS, COMMANDS = "Arguments", "Options", "Commands"
RAW_ARGUMENTS = "clincot.raw_arguments"  # key of a context's meta: what was typed after the command


@dataclass(frozen=True)
class Invocation:
    """A parsed command line: the name of the top-level command, and the call that runs it."""

    command: str
    run: Callable[[], int]


def record_invocation(context: Any, function: Callable[[], int]) -> None:
    """Note what a command line calls, for parse_command_line, which hands in the list as the context's object."""
    context.find_root().obj.append(Invocation(context.command_path.split()[1], function))


def parse_command_line(command: Any, arguments: Sequence[str] | None, program: str) -> Invocation:
    """Parse without running anything.

    Raises SystemExit with 0 after `--help` and its like, and with 2 after wrong usage. The command runs outside typer,
    so that its exceptions, a broken pipe and Ctrl-C are handled in one place, the entry point.
    """
    parsed: list[Invocation] = []
    try:
        command.main(args=None if arguments is None else list(arguments), prog_name=program, obj=parsed)
    except SystemExit:
        if not parsed:
            raise
    return parsed[0]


class PlainCommand(TyperCommand):
    """A command that records its call instead of running, and explains itself in plain text."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[RAW_ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> None:
        callback, values = self.callback, dict(ctx.params)
        assert callback is not None
        record_invocation(ctx, lambda: callback(**values))

    def get_usage(self, ctx: Any) -> str:
        return render_usage(ctx, self, [])

    def get_help(self, ctx: Any) -> str:
        return render_help(ctx, self, self.get_appendix(ctx))

    def get_appendix(self, ctx: Any) -> str:
        """Text after the options; a subclass may compute it."""
        return self.epilog or ""


@dataclass(frozen=True)
class Entry:
    """A command in the list of its group; it is built when it is needed, since building all of them takes a while."""

    panel: str  # heading in the help of the group
    about: str
    build: Callable[[], Any]


Commands = dict[str, Entry]


class LazyCommands(dict[str, Any]):
    """The commands of a group by name, each built at its first use."""

    def __init__(self, entries: Commands) -> None:
        super().__init__(dict.fromkeys(entries))
        self.entries = entries

    def __getitem__(self, name: str) -> Any:
        if super().__getitem__(name) is None:
            self[name] = self.entries[name].build()
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name, default) if name not in self else self[name]


class PlainGroup(TyperGroup):
    """A group of commands that explains itself in plain text, its commands under the headings of their panels."""

    def get_usage(self, ctx: Any) -> str:
        return render_usage(ctx, self, ["COMMAND [ARGS]..."])

    def get_help(self, ctx: Any) -> str:
        return render_help(ctx, self, self.epilog or "")


def build_group(
    commands: Commands,
    about: str,
    *,
    epilog: str = "",
    callback: Callable[..., None] | None = None,
    completion: bool = False,
    runs_alone: bool = False,
) -> Any:
    """Build a group with typer; runs_alone: the callback is also called if no command is named."""
    app = typer.Typer(
        cls=PlainGroup,
        help=about,
        epilog=epilog,
        invoke_without_command=runs_alone,
        add_completion=completion,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback()(callback or _do_nothing)
    group = typer.main.get_command(app)
    assert isinstance(group, PlainGroup)
    group.commands = LazyCommands(commands)
    return group


def _do_nothing() -> None:
    """Callback of a group without options of its own."""


def build_command(
    name: str, call: Callable[..., int], about: str, epilog: str = "", kind: type[PlainCommand] = PlainCommand
) -> Any:
    """Build one command with typer, from a function whose signature has been set."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name, cls=kind, help=about, epilog=epilog)(call)
    return typer.main.get_command(app)


def add_command(
    commands: Commands,
    name: str,
    function: Callable[[A], int],
    arguments: type[A],
    *,
    panel: str = COMMANDS,
    epilog: str = "",
) -> None:
    """Add a function of an arguments class as a command; the function's docstring is the command's help."""
    about = inspect.getdoc(function) or ""

    def call(**values: Any) -> int:
        return function(arguments(**values))

    def build() -> Any:
        set_parameters(call, list_parameters(arguments))
        return build_command(name, call, about, epilog)

    commands[name] = Entry(panel, about, build)


def set_parameters(call: Callable[..., int], parameters: Sequence[inspect.Parameter]) -> None:
    """Give a function of keyword arguments the signature that typer reads."""
    call.__signature__ = inspect.Signature(list(parameters))  # type: ignore[attr-defined]


def list_parameters(arguments: type[Any]) -> list[inspect.Parameter]:
    """The fields of an arguments class as parameters: its own first, then those of its base classes in their order."""
    known = {field.name: field for field in fields(arguments)}
    hints = get_type_hints(arguments, include_extras=True)
    names: dict[str, None] = {}  # an ordered set
    for base in arguments.__mro__:
        names |= dict.fromkeys(inspect.get_annotations(base))
    return [make_parameter(name, hints[name], _get_default(known[name])) for name in names]


def make_parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    """A keyword parameter for typer; an option without a metavar shows its choices, or its name in capitals."""
    kind, info = get_args(annotation)[:2]
    assert isinstance(info, ParameterInfo)
    if info.metavar is None:
        info.metavar = _build_metavar(name, kind)
    if isinstance(info, OptionInfo):
        info.show_default = False  # render_help shows it
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _get_default(field: Field[Any]) -> Any:
    if field.default is not MISSING:
        return field.default
    return inspect.Parameter.empty if field.default_factory is MISSING else field.default_factory()


def _build_metavar(name: str, kind: Any) -> str:
    element = get_args(kind)[0] if get_origin(kind) in (list, Union, UnionType) else kind
    if get_origin(element) is Literal:
        return "{" + ",".join(str(choice) for choice in get_args(element)) + "}"
    if isinstance(element, type) and issubclass(element, Enum):
        return "{" + ",".join(str(choice.value) for choice in element) + "}"
    return name.upper()


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
    commands = getattr(command, "commands", None)
    panels: dict[str, dict[str, str]] = {}
    if isinstance(commands, LazyCommands):
        for name, entry in commands.entries.items():
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
    return "\n".join([f"{title}:", *(line for name, about in rows for line in _render_row(name, about))])


def _render_row(name: str, about: str) -> Iterator[str]:
    lines = wrap_text(about, INDENT + " " * NAME_WIDTH).splitlines() or [""]
    if len(name) > NAME_WIDTH - 2:
        yield INDENT + name
    else:
        yield (INDENT + name.ljust(NAME_WIDTH) + lines.pop(0).strip()).rstrip()
    yield from lines

"""Commands on typer: arguments as frozen dataclasses, plain-text help, and parsing apart from running.

A command is a function of one frozen dataclass whose fields are `Annotated[..., typer.Option(...)]`. Arguments that
several commands share are base classes of theirs. Commands are built when they are needed: building all of them takes
longer than starting Python.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from enum import Enum
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import OptionInfo, ParameterInfo

from clincot.cli.help_text import COMMANDS, render_help, render_usage

A = TypeVar("A")
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
    """A command in the list of its group."""

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

    entries: Commands

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
    group.entries, group.commands = commands, LazyCommands(commands)
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

"""One command for each stage, generated from the list of stages, with the parameters that would run in its help."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from clincot.cli.framework import (
    RAW_ARGUMENTS,
    Commands,
    Entry,
    PlainCommand,
    build_command,
    make_parameter,
    set_parameters,
)
from clincot.cli.help_text import INDENT, wrap_text
from clincot.cli.options import (
    ParamsArguments,
    ParamsOption,
    RecipeOption,
    SetOption,
    describe_sources,
    find_params_file,
    read_params,
)
from clincot.config import FrozenConfig, Params, load_params
from clincot.config.params_yaml import render_value
from clincot.errors import UserError
from clincot.records import Decision
from clincot.stages.base import Metrics, Stage
from clincot.stages.catalog import STAGES, describe_artifact, get_stage
from clincot.stages.runner import run_stage

STAGE_PANEL = "Stages"
MAX_VALUE = 160  # characters of a value in the help; `clincot params` prints all of it
INPUTS, OUTPUTS = "Inputs", "Outputs"
VERDICT_CODES = {"promote": 0, "keep": 3, "blocked": 4}
ExitCodeOption = Annotated[
    bool, typer.Option("--exit-code", help="End with 0 for promote, 3 for keep and 4 for blocked.")
]
ExplainOption = Annotated[bool, typer.Option("--explain", help="Explain what would have to change for a promotion.")]


def add_stage_commands(commands: Commands) -> None:
    """Add a command for every stage."""
    for stage in STAGES:
        commands[stage.name] = Entry(STAGE_PANEL, stage.about, partial(build_stage_command, stage))


def build_stage_command(stage: Stage) -> Any:
    """Build the command of a stage: a path for every input and output, a flag for some fields of its section."""

    def call(**values: Any) -> int:
        if stage.name == "decide":
            return run_decide(stage, values)
        if stage.name == "preflight":
            return run_preflight(stage, values)
        print(json.dumps(run_with(stage, values), indent=2, sort_keys=True))
        return 0

    set_parameters(call, list_stage_parameters(stage))
    return build_command(stage.name, call, stage.about, kind=StageCommand)


def list_stage_parameters(stage: Stage) -> list[inspect.Parameter]:
    """The stage's inputs, outputs and flags, then where its parameters come from."""
    parameters = [make_path_parameter(stage, name, INPUTS, required=True) for name in stage.inputs]
    parameters += [make_path_parameter(stage, name, INPUTS, required=False) for name in stage.optional]
    parameters += [make_path_parameter(stage, name, OUTPUTS, required=True) for name in stage.outputs]
    if stage.name == "decide":
        parameters.append(make_parameter("exit_code", ExitCodeOption, False))
        parameters.append(make_parameter("explain", ExplainOption, False))
    parameters += [make_flag_parameter(stage, name) for name in stage.flags]
    parameters.append(make_parameter("params", ParamsOption, None))
    parameters.append(make_parameter("recipe", RecipeOption, ""))
    parameters.append(make_parameter("overrides", SetOption, []))
    return parameters


def make_path_parameter(stage: Stage, name: str, panel: str, *, required: bool) -> inspect.Parameter:
    about = describe_artifact(stage.name, name)
    about = about if required else f"Optional. {about}"
    option = typer.Option(f"--{_to_dashes(name)}", metavar="PATH", help=about, rich_help_panel=panel)
    if required:
        return make_parameter(name, Annotated[Path, option])
    return make_parameter(name, Annotated[Path | None, option], None)


def make_flag_parameter(stage: Stage, name: str) -> inspect.Parameter:
    """A field of the stage's section as an option of its own."""
    description = stage.config.model_fields[name].description
    about = f"The same as --set {stage.name}.{name}=VALUE" + (f" ({description})." if description else ".")
    return make_parameter(
        f"flag_{name}", Annotated[str, typer.Option(f"--{_to_dashes(name)}", metavar="VALUE", help=about)], ""
    )


def run_with(stage: Stage, values: Mapping[str, Any]) -> Metrics:
    """Run a stage with what was typed."""
    arguments = ParamsArguments(params=values["params"], recipe=values["recipe"], overrides=values["overrides"])
    flags = [f"{stage.name}.{name}={values[f'flag_{name}']}" for name in stage.flags if values[f"flag_{name}"]]
    config = read_params(arguments, flags).get_stage_config(stage.name)
    inputs = {name: values[name] for name in (*stage.inputs, *stage.optional) if values[name] is not None}
    return run_stage(stage.name, config, inputs, {name: values[name] for name in stage.outputs})


def run_decide(stage: Stage, values: Mapping[str, Any]) -> int:
    """Decide; on demand print the decision or its explanation instead of metrics, and return the verdict's code."""
    metrics = run_with(stage, values)
    if not values["explain"] and not values["exit_code"]:
        print(json.dumps(metrics, indent=2, sort_keys=True))
        return 0
    from clincot.jsonl import read_json_model
    from clincot.promotion.explain import explain_decision, render_decision

    decision = read_json_model(values["decision"], Decision)
    print(explain_decision(decision) if values["explain"] else render_decision(decision))
    return VERDICT_CODES[decision.verdict] if values["exit_code"] else 0


def run_preflight(stage: Stage, values: Mapping[str, Any]) -> int:
    """Check and print the table. Raises PreflightFailed after the table was printed."""
    from clincot.preflight.preflight_report import PreflightFailed

    table: Path = values["table"]
    try:
        run_with(stage, values)
    except PreflightFailed:
        print(table.read_text(encoding="utf-8"))
        raise
    print(table.read_text(encoding="utf-8"))
    print(values["champion"].read_text(encoding="utf-8").strip())
    return 0


class StageCommand(PlainCommand):
    """The command of a stage; its help ends with the parameters that would run."""

    def get_appendix(self, ctx: Any) -> str:
        return render_parameters(get_stage(str(self.name)), ctx.meta.get(RAW_ARGUMENTS, []))


def render_parameters(stage: Stage, arguments: Sequence[str]) -> str:
    """Every parameter of the stage with its effective value, and where the values come from.

    arguments: what was typed besides `--help`; of it, --params, --recipe and --set count.
    """
    typed = find_typed_params(arguments)
    path = find_params_file(typed.params, typed.recipe)
    try:
        params = load_params(path, typed.overrides, typed.recipe)
        sources = describe_sources(params, path, typed.recipe, typed.overrides)
    except UserError as error:
        params = Params()
        sources = f"the defaults only, because of an error: {error}"
    heading = wrap_text(f"Parameters of {stage.name} ({stage.device}) as they would run, from {sources}:")
    return "\n".join([heading, *_render_fields(stage.name, getattr(params, stage.name), params)])


def _render_fields(section: str, config: FrozenConfig, params: Params) -> list[str]:
    """A line for each field, as in `clincot params`; a section that is another stage's own is named only."""
    lines = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, FrozenConfig):
            if section == "preflight" or value == getattr(params, name, None):
                lines.append(f"{INDENT}{section}.{name}: see `clincot {name} --help`")
            else:
                lines += _render_fields(f"{section}.{name}", value, params)
            continue
        text = render_value(config, name)
        lines.append(f"{INDENT}{section}.{name} = {textwrap.shorten(text, MAX_VALUE, placeholder=' …')}")
        if field.description:
            lines.append(wrap_text(field.description, INDENT * 2))
    return lines


def find_typed_params(arguments: Sequence[str]) -> ParamsArguments:
    """--params, --recipe and --set of a command line that was not parsed, since --help ends parsing early."""
    values: dict[str, list[str]] = {"--params": [], "--recipe": [], "--set": []}
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("-r"):
            name, equals, value = "--recipe", word[2:], word[2:]
        if name in values and (equals or (value := next(words, ""))):
            values[name].append(value)
    return ParamsArguments(
        params=Path(values["--params"][-1]) if values["--params"] else None,
        recipe=values["--recipe"][-1] if values["--recipe"] else "",
        overrides=values["--set"],
    )


def _to_dashes(name: str) -> str:
    return name.replace("_", "-")

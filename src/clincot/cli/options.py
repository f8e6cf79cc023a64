"""Arguments that several commands share: where the parameters come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from clincot.config import Params, PolicyFacts, find_recipe, list_recipes, load_params
from clincot.errors import InvalidInput

CONFIGURATION = "Configuration"
PARAMS_FILE = Path("params.yaml")


def complete_recipe(incomplete: str) -> list[str]:
    """Names of shipped recipes, for the shell's completion."""
    return [recipe.name for recipe in list_recipes() if recipe.name.startswith(incomplete)]


ParamsOption = Annotated[
    Path | None,
    typer.Option(
        "--params",
        metavar="PATH",
        help="File of parameters by section (YAML). Without it, ./params.yaml is read if it exists and no --recipe is "
        "given.",
        rich_help_panel=CONFIGURATION,
    ),
]
RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe",
        "-r",
        metavar="NAME|PATH",
        help="A shipped recipe (see `clincot recipes`) or a file like one, as the basis of the parameters. "
        "With it, ./params.yaml is read only if --params names it.",
        autocompletion=complete_recipe,
        rich_help_panel=CONFIGURATION,
    ),
]
SetOption = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="SECTION.FIELD=VALUE",
        help="Set one parameter; may be repeated. It overrides the recipe and the file: --set train.margin_lambda=0",
        rich_help_panel=CONFIGURATION,
    ),
]


@dataclass(frozen=True, kw_only=True)
class ParamsArguments:
    """Where the parameters come from: defaults < recipe < file < --set."""

    params: ParamsOption = None
    recipe: RecipeOption = ""
    overrides: SetOption = field(default_factory=list)


def read_params(arguments: ParamsArguments, more: Sequence[str] = ()) -> Params:
    """The effective parameters; `more` are further overrides, from flags that stand for one field."""
    path = find_params_file(arguments.params, arguments.recipe)
    return load_params(path, (*arguments.overrides, *more), arguments.recipe)


def find_params_file(path: Path | None, recipe: str) -> Path | None:
    """The file that is read: the one named, or ./params.yaml if there is one and no recipe was chosen."""
    if path is None and not recipe and PARAMS_FILE.is_file():
        return PARAMS_FILE
    return path


def find_policy_facts(recipe: str) -> PolicyFacts | None:
    """What a recipe says about its policy; None without a recipe, or for one that is not found by its name."""
    try:
        return find_recipe(recipe).policy if recipe else None
    except InvalidInput:
        return None


def describe_sources(params: Params, path: Path | None, recipe: str, overrides: Sequence[str]) -> str:
    """Where effective values come from, in the order in which they override one another.

    recipe: what --recipe names. Without it, the parameter file may name one, which `params` then does too.
    """
    sources = ["the defaults"]
    if recipe:
        sources.append(f"the recipe {params.recipe.name} ({find_recipe(recipe).path})")
    elif params.recipe.name:
        sources.append(f"the recipe {params.recipe.name}, which {path} names")
    if path is not None:
        sources.append(str(path) if path.is_absolute() else f"./{path}")
    if overrides:
        sources.append("--set")
    return ", then ".join(sources)


SplitFoldersOption = Annotated[
    Path | None,
    typer.Option("--data", metavar="DIR", help="Folder written by `clincot ingest`, with train/ and test/ in it."),
]


def find_split_folders(data: Path | None, train: Path | None, test: Path | None) -> tuple[Path, Path]:
    """The training and the test folder: both inside `data`, or named one by one. Raises InvalidInput."""
    if data is None:
        if train is not None and test is not None:
            return train, test
    elif train is None and test is None:
        train, test = data / "train", data / "test"
        if train.is_dir() and test.is_dir():
            return train, test
        raise InvalidInput(
            f"{data}: expected the folders train and test in it. Ingest it with a split (--split by-row or"
            " patient-disjoint), or name --train and --test"
        )
    raise InvalidInput("expected either --data or both --train and --test")

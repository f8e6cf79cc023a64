"""Recipes: complete sets of parameters for a kind of model and data, each with a name and what it is for.

The shipped ones are `recipes/*.yaml`. A recipe is a YAML file with `recipe: {name, about, policy}` and the
sections of Params.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from clincot.config.sections import SECTION_NAMES, FrozenConfig, Params
from clincot.config.settings_file import parse_config, parse_parameters, read_settings
from clincot.config.shipped import find_data_folder
from clincot.errors import InvalidInput
from clincot.fields import NonEmptyStr, PositiveInt
from clincot.jsonl import InvalidRecord


class PolicyFacts(FrozenConfig):
    """The policy that a recipe was written for: how it is had, and the sizes that its costs depend on."""

    title: NonEmptyStr = Field(description="Name of the model, as tables of results have it.")
    family: NonEmptyStr = Field(description="Its family in docs/reference/models.md.")
    obtain: NonEmptyStr = Field(description="Command that puts the checkpoint into the folder preflight.base.")
    parameters: PositiveInt = Field(description="Number of weights, tied ones once.")
    image_tokens: PositiveInt = Field(description="Tokens of a whole film of 1024 x 1024 pixels.")
    crop_tokens: PositiveInt = Field(description="Tokens of a crop of 512 x 512 pixels.")


class RecipeHead(FrozenConfig):
    """What a recipe file says about itself."""

    name: NonEmptyStr = Field(description="Name, as given to --recipe.")
    about: NonEmptyStr = Field(description="What the recipe is for: models, data and hardware.")
    policy: PolicyFacts | None = Field(default=None, description="The policy that the recipe was written for.")


@dataclass(frozen=True)
class Recipe:
    """A named, complete set of parameters."""

    name: str
    about: str
    path: Path
    values: dict[str, Any]  # the sections as the file has them
    params: Params  # the same, validated over the neutral defaults
    policy: PolicyFacts | None = None  # the model that the recipe was written for

    @property
    def digest(self) -> str:
        """Hash of the values. Comments and the order of keys do not change it."""
        return self.params.digest


def list_recipes() -> list[Recipe]:
    """The shipped recipes, sorted by name."""
    return [read_recipe(path) for path in sorted(find_data_folder("recipes").glob("*.yaml"))]


def find_recipe(name_or_path: str | Path) -> Recipe:
    """Return the shipped recipe of a name, or read the one in a file (a path that ends in .yaml or .yml).

    Raises InvalidInput for an unknown name, and InvalidRecord for a file that is not a recipe.
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        return read_recipe(path)
    shipped = find_data_folder("recipes") / f"{name_or_path}.yaml"
    if len(path.parts) != 1 or not shipped.is_file():
        names = ", ".join(recipe.name for recipe in list_recipes())
        raise InvalidInput(
            f"no recipe is called {str(name_or_path)!r}; the shipped recipes are: {names}. "
            "A recipe of your own is given as the path of its file (….yaml)"
        )
    return read_recipe(shipped)


def read_recipe(path: Path) -> Recipe:
    """Read and validate a recipe file. Raises InvalidRecord naming the file and the key."""
    content = read_settings(path, "a recipe: `recipe: {name, about}` and parameters by section")
    if _is_params_file(content):
        raise InvalidRecord(f"{path}: this is a parameters file; use --params")
    if "recipe" not in content:
        raise InvalidRecord(f"{path}: not a recipe; expected `recipe: {{name: …, about: …}}` at its top")
    head = content.pop("recipe")
    if not isinstance(head, dict):
        raise InvalidRecord(f"{path}: recipe: expected {{name: …, about: …}}, got {head!r}")
    parsed = parse_config(RecipeHead, head, where=f"{path}: recipe")
    params = parse_parameters(Params, content, where=str(path))
    return Recipe(name=parsed.name, about=parsed.about, path=path, values=content, params=params, policy=parsed.policy)


def _is_params_file(content: dict[str, Any]) -> bool:
    """Whether this is what `clincot params` writes: every section, and no sentence about a recipe."""
    head = content.get("recipe")
    return {*SECTION_NAMES} <= {*content} and not (isinstance(head, dict) and "about" in head)

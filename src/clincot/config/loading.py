"""Loading of parameters: neutral defaults < recipe < params file < overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from clincot.config.recipes import Recipe, find_recipe
from clincot.config.sections import FrozenConfig, Params, RecipeReference
from clincot.config.settings_file import parse_config, parse_override_value, parse_parameters, read_settings
from clincot.errors import InvalidInput
from clincot.jsonl import InvalidRecord


def load_params(path: Path | None, overrides: Sequence[str] = (), recipe: str = "") -> Params:
    """Load the parameters of a round.

    path: a params file (params.yaml), or None. overrides: `section.field=value`, as given to --set. recipe: a recipe's
    name or file; a params file can name its recipe too (`recipe: {name: small-model}`).

    Later sources win: neutral defaults, recipe, params file, overrides. A section of the file changes only the fields
    that it has; lists and `grounders` are replaced as a whole. The result names its recipe and the fields that differ
    from it (Params.recipe). Raises InvalidRecord for unknown keys and wrong values, InvalidInput for an unknown recipe.
    """
    content = {} if path is None else read_settings(path, "the parameters (params.yaml)", "parameters by section")
    where = str(path or recipe or "parameters")
    reference = _take_reference(content, where)
    base = _find_base(reference, recipe, where)
    values = merge_values(Params, {} if base is None else base.values, content)
    apply_overrides(values, overrides)
    params = parse_parameters(Params, values, where=where, overrides=overrides)
    return params.model_copy(update={"recipe": _describe_recipe(params, base, reference, overrides)})


def merge_values(kind: type[BaseModel], below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay the values of one source over those of another; returns a copy that shares no mapping or list with them."""
    merged = {name: _copy_tree(value) for name, value in below.items()}
    for name, value in above.items():
        nested = kind.model_fields[name].annotation if name in kind.model_fields else None
        is_section = isinstance(nested, type) and issubclass(nested, FrozenConfig)
        if is_section and isinstance(value, dict) and isinstance(merged.get(name), dict):
            merged[name] = merge_values(nested, merged[name], value)  # type: ignore[arg-type]
        else:
            merged[name] = _copy_tree(value)
    return merged


def _copy_tree(value: Any) -> Any:
    """A deep copy. Unlike copy.deepcopy it also separates what a YAML alias (`*propose`) shares."""
    if isinstance(value, dict):
        return {key: _copy_tree(item) for key, item in value.items()}
    return [_copy_tree(item) for item in value] if isinstance(value, list) else value


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set `section.field=value` in place.

    As long as `evaluate.propose` equals `propose` (a file writes it as an alias), an override of `propose` holds for
    both, so that the benchmark is looked at with the grounders of the round.
    """
    evaluate = values.get("evaluate")
    follows = isinstance(evaluate, dict) and "propose" in values and evaluate.get("propose") == values["propose"]
    for override in overrides:
        name, equals, text = override.partition("=")
        keys = name.split(".")
        if not equals or len(keys) < 2:
            raise InvalidRecord(f"--set {override!r}: expected section.field=value, for instance train.lr=1e-5")
        if keys[0] == "recipe":
            raise InvalidRecord(f"--set {override!r}: a recipe is chosen with --recipe")
        value = parse_override_value(text, where=f"--set {override!r}")
        _set_value(values, keys, value, override)
        if follows and keys[0] == "propose":
            _set_value(values, ["evaluate", *keys], _copy_tree(value), override)


def _set_value(values: dict[str, Any], keys: Sequence[str], value: Any, override: str) -> None:
    section = values
    for key in keys[:-1]:
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            raise InvalidRecord(f"--set {override!r}: {key!r} is not a section")
    section[keys[-1]] = value


def _take_reference(content: dict[str, Any], where: str) -> RecipeReference:
    """Remove `recipe` from a params file's content and parse it.

    A recipe file, given as a params file, says more about itself: `about` and `policy`.
    """
    head = content.pop("recipe", None) or {}
    if not isinstance(head, dict):
        raise InvalidRecord(f"{where}: recipe: expected {{name: …}}, got {head!r}")
    head = {key: value for key, value in head.items() if key not in ("about", "policy")}
    return parse_config(RecipeReference, head, where=f"{where}: recipe")


def _find_base(reference: RecipeReference, recipe: str, where: str) -> Recipe | None:
    """The recipe that the values are based on.

    A reference with a digest comes from a finished load (params.yaml of a run): all values are in that file, so it also
    loads where the recipe is unknown or has changed since.
    """
    if recipe:
        chosen = find_recipe(recipe)
        if reference.name and reference.name != chosen.name:
            raise InvalidRecord(
                f"{where}: is based on the recipe {reference.name!r}, but --recipe asks for {chosen.name!r}; "
                "give one of the two"
            )
        return chosen
    if not reference.name:
        return None
    try:
        named = find_recipe(reference.name)
    except InvalidInput as error:
        if reference.digest:
            return None
        raise InvalidRecord(f"{where}: {error}") from None
    return None if reference.digest and reference.digest != named.digest else named


def _describe_recipe(
    params: Params, base: Recipe | None, reference: RecipeReference, overrides: Sequence[str]
) -> RecipeReference:
    """The recipe's name and digest, and the fields in which the parameters differ from it."""
    if base is not None:
        return RecipeReference(name=base.name, digest=base.digest, changed=params.list_changes(base.params))
    if not reference.name:
        return RecipeReference()
    overridden = {".".join(override.partition("=")[0].split(".")[:2]) for override in overrides}
    return reference.model_copy(update={"changed": tuple(sorted({*reference.changed} | overridden))})

"""Parameters as YAML, with the description of every field as a comment."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic_core import to_jsonable_python

from clincot.config.recipes import list_recipes
from clincot.config.sections import (
    INHERITED_BY_PREFLIGHT,
    SECTION_NAMES,
    SERVE_INHERITORS,
    FrozenConfig,
    Params,
    RecipeReference,
)

_WIDTH = 120  # columns; a comment that would reach further goes above its key
_HEAD = (
    "`clincot params` writes this file; every key may be left out and then keeps the value of the recipe.",
    "Sources: [ClinCoT] arXiv 2603.01124, [UV-CoT] arXiv 2504.18397, [MMedPO] arXiv 2412.06141, [ODPO] arXiv "
    "2402.10571, [mDPO] arXiv 2406.11839.",
)


def render_params(params: Params) -> str:
    """Render every section and field as YAML that load_params reads back to the same parameters.

    `evaluate.propose` is an alias of `propose` if both are equal. Judges are written without the fields that have their
    defaults. Sections are written without what they take from others.
    """
    lines = [f"# Parameters of a round: {_describe_source(params.recipe)}."]
    for sentence in _HEAD:
        lines += _comment(sentence, "")
    reference = _trim_reference(params.recipe)
    if reference:
        lines += ["", f"recipe: {_dump(reference)}"]
    for name in SECTION_NAMES:
        section: FrozenConfig = getattr(params, name)
        anchor = " &propose" if name == "propose" and params.evaluate.propose == params.propose else ""
        lines += ["", *_comment(_first_paragraph(section), ""), f"{name}:{anchor}"]
        lines += _render_fields(section, params, name, indent="  ")
    return "\n".join(lines) + "\n"


def _describe_source(reference: RecipeReference) -> str:
    return f"the recipe {reference.name}" if reference.name else "neutral defaults"


def _trim_reference(reference: RecipeReference) -> dict[str, Any]:
    """`name` is enough for a shipped recipe. Another one cannot be found by its name, so its digest is written too."""
    if not reference.name:
        return {}
    if reference.name in {recipe.name for recipe in list_recipes()}:
        return {"name": reference.name}
    return reference.model_dump(mode="json")


def _render_fields(config: FrozenConfig, params: Params, path: str, *, indent: str) -> Iterator[str]:
    for name, field in type(config).model_fields.items():
        if is_inherited(path, name):
            continue
        value = getattr(config, name)
        description = field.description or ""
        if path == "evaluate" and name == "propose" and value == params.propose:
            yield from _describe_line(f"{indent}{name}: *propose", description, indent)
        elif isinstance(value, FrozenConfig):
            yield from _describe_line(f"{indent}{name}:", description, indent)
            yield from _render_fields(value, params, f"{path}.{name}", indent=f"{indent}  ")
        elif isinstance(value, dict) and value:
            yield from _describe_line(f"{indent}{name}:", description, indent)
            yield from (f"{indent}  {key}: {_dump(item)}" for key, item in value.items())
        elif isinstance(value, tuple) and value and isinstance(value[0], FrozenConfig):
            yield from _describe_line(f"{indent}{name}:", description, indent)
            yield from (f"{indent}  - {_dump(item.model_dump(mode='json', exclude_defaults=True))}" for item in value)
        else:
            yield from _describe_line(f"{indent}{name}: {_dump(_to_json(config, name))}", description, indent)


def is_inherited(section: str, field: str) -> bool:
    """Whether a section takes this field from others of the round's parameters, so that nobody sets it there."""
    if field == "engine":
        return section != "models"
    return (section == "preflight" and field in INHERITED_BY_PREFLIGHT) or (
        section in SERVE_INHERITORS and field == "serve"
    )


def render_value(config: FrozenConfig, name: str) -> str:
    """The value of a field as YAML on one line; of a list of sections, only what differs from their defaults."""
    value = getattr(config, name)
    if isinstance(value, tuple) and value and isinstance(value[0], FrozenConfig):
        return _dump([item.model_dump(mode="json", exclude_defaults=True) for item in value])
    return _dump(_to_json(config, name))


def _to_json(config: FrozenConfig, name: str) -> Any:
    dumped = config.model_dump(mode="json", include={name})
    return dumped.get(name, to_jsonable_python(getattr(config, name)))  # a field may be left out at its default


def _dump(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.safe_dump([value], default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)[1:-2]


def _describe_line(line: str, description: str, indent: str) -> Iterator[str]:
    """The line with its description: at its end if it fits, otherwise above it."""
    if not description:
        yield line
    elif len(line) + 4 + len(description) <= _WIDTH:
        yield f"{line}  # {description}"
    else:
        yield from _comment(description, indent)
        yield line


def _comment(text: str, indent: str) -> list[str]:
    prefix = f"{indent}# "
    return textwrap.wrap(text, _WIDTH, initial_indent=prefix, subsequent_indent=prefix, break_on_hyphens=False)


def _first_paragraph(config: FrozenConfig) -> str:
    return " ".join((type(config).__doc__ or "").partition("\n\n")[0].split())

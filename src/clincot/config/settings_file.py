"""Reading YAML files of settings. Errors name the file and the key."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from clincot.jsonl import InvalidRecord, format_problem, format_validation_error

ConfigT = TypeVar("ConfigT", bound=BaseModel)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML forbids a key twice in one mapping (1.2, section 3.2.1.1); PyYAML would keep the last value in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if key in lines and key != "<<":
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key!r} is in line {lines[key]} and again in line {line}; expected it once"
                )
            lines[key] = line
        return super().construct_mapping(node, deep=deep)


def read_settings(path: Path, expected: str, shape: str = "settings by name") -> dict[str, Any]:
    """Read a YAML file that holds a mapping. Raises InvalidRecord if the file is missing or holds anything else."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader) or {}  # a SafeLoader
    except FileNotFoundError:
        raise InvalidRecord(f"{path}: no such file; expected {expected}") from None
    except IsADirectoryError:
        raise InvalidRecord(f"{path} is a directory; expected a YAML file") from None
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise InvalidRecord(f"{path}: not UTF-8 text ({where}); expected {expected}") from None
    except yaml.YAMLError as error:
        raise InvalidRecord(f"{path}: not YAML: {error}") from None
    if not isinstance(content, dict):
        raise InvalidRecord(f"{path}: expected {shape}, got a {type(content).__name__}")
    return content


def parse_config(kind: type[ConfigT], content: dict[str, Any], *, where: str) -> ConfigT:
    """Validate settings as `kind`. Raises InvalidRecord that names `where` and every wrong key."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise InvalidRecord(f"{where}: {format_validation_error(error)}") from None


def parse_parameters(
    kind: type[ConfigT], content: dict[str, Any], *, where: str, overrides: Sequence[str] = ()
) -> ConfigT:
    """Validate parameters by section.

    Raises InvalidRecord that names every wrong parameter with its source, the file `where` or one of the `overrides`
    (`section.field=value`), and for an unknown name the known one that is most like it.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        sources: dict[str, list[str]] = {}
        for item in error.errors(include_url=False):
            path = item["loc"]
            override = _find_override(".".join(map(str, path)), overrides)
            source = where if override is None else f"--set {override!r}"
            problem = format_problem(item) if item["type"] != "extra_forbidden" else _describe_unknown(kind, path)
            sources.setdefault(source, []).append(problem)
        raise InvalidRecord(
            "; ".join(f"{source}: {'; '.join(problems)}" for source, problems in sources.items())
        ) from None


def _find_override(name: str, overrides: Sequence[str]) -> str | None:
    """The last override that sets this parameter, a part of it, or all of the section that it names."""
    if name.startswith("evaluate.propose."):
        name = name.removeprefix("evaluate.")  # it follows `propose` (apply_overrides)
    for override in reversed(overrides):
        target = override.partition("=")[0]
        if f"{name}.".startswith(f"{target}.") or f"{target}.".startswith(f"{name}."):
            return override
    return None


def _describe_unknown(kind: type[BaseModel], path: tuple[int | str, ...]) -> str:
    """Say that a parameter is unknown, and which known one its name is most like."""
    *sections, name = path
    parent: Any = kind
    for step in sections:
        if isinstance(step, str) and _is_model(parent) and step in parent.model_fields:
            parent = parent.model_fields[step].annotation
        elif isinstance(step, int) and get_args(parent):
            parent = get_args(parent)[0]
    message = f"unknown parameter {'.'.join(map(str, path))}"
    known = list(parent.model_fields) if _is_model(parent) else []
    alike = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"{message}; did you mean {'.'.join(map(str, (*sections, alike[0])))}?" if alike else message


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def parse_override_value(value: str, *, where: str) -> Any:
    """Parse the value of a `--set` option as YAML. Raises InvalidRecord, naming `where`, if it is not YAML.

    Two cases differ from YAML 1.1: `1e-5` is a number (YAML wants 1.0e-5), and an empty value is the empty text, not
    null.
    """
    if not value.strip():
        return ""
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InvalidRecord(f"{where}: the value is not YAML: {error}") from None
    if isinstance(parsed, str):
        try:
            return float(parsed)
        except ValueError:
            return parsed
    return parsed

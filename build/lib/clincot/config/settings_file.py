"""Reading YAML files of settings. Errors name the file and the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from clincot.jsonl import InvalidRecord, format_validation_error

ConfigT = TypeVar("ConfigT", bound=BaseModel)


def read_settings(path: Path, expected: str, shape: str = "settings by name") -> dict[str, Any]:
    """Read a YAML file that holds a mapping. Raises InvalidRecord if the file is missing or holds anything else."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise InvalidRecord(f"{path}: no such file; expected {expected}") from None
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

"""The form of a run: fields with a type of their own for what people change, and the other settings by section.

A field of the form replaces a key of a section (`FIELD_KEYS`), so the section must not contain that key as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clincot.config import FrozenConfig, Params, parse_config
from clincot.config.sections import INHERITED_BY_PREFLIGHT
from clincot.deployment.service_settings import ServiceSettings
from clincot.errors import InvalidInput
from clincot.pipelines.params import JsonObject, decode_params
from clincot.training.launch_settings import LaunchSettings

# Sections of params.yaml that are parameters of a run, each a JSON object.
SECTIONS = (
    "preflight",
    "prepare",
    "propose",
    "answer",
    "judge",
    "pair",
    "version",
    "train",
    "evaluate",
    "decide",
    "publish",
    "deploy",
)
# {field of the form: (section, key) that it sets}
FIELD_KEYS: Mapping[str, tuple[str, str]] = {
    "store": ("publish", "store"),
    "model": ("publish", "name"),
    "base": ("preflight", "base"),
    "questions": ("prepare", "limit"),
    "data": ("preflight", "data"),
    "benchmark": ("preflight", "benchmark"),
    "calibrated_on": ("preflight", "calibration"),
}
# Fields without a default, unless the pipeline was compiled with one: {field: what to type}.
REQUIRED_FIELDS: Mapping[str, str] = {
    "data": "the address of the training data set, as `clincot pipeline put` prints it",
    "benchmark": "the address of the benchmark, as `clincot pipeline put` prints it",
    "store": "a folder or s3://bucket/prefix for checkpoints, champion and records",
}


@dataclass(frozen=True)
class RunForm:
    """The fields of the form that have a type of their own. code: stands for the source of the tasks; no field."""

    data: str
    benchmark: str
    store: str
    model: str
    base: str
    questions: int
    recipe: str = ""
    blind_from: str = ""
    calibrated_on: str = ""
    code: str = ""


def split_sections(params: Params) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return parameters as {field of FIELD_KEYS: value} and {section: its other keys}."""
    sections = {name: params.get_stage_config(name).model_dump(mode="json") for name in SECTIONS}
    for name in INHERITED_BY_PREFLIGHT:  # preflight checks the sections of the round, not its own copies
        del sections["preflight"][name]
    return {field: sections[section].pop(key) for field, (section, key) in FIELD_KEYS.items()}, sections


def parse_run(form: RunForm, sections: Mapping[str, JsonObject]) -> tuple[Params, ServiceSettings, LaunchSettings]:
    """Parse the form and every section, as Kubeflow Pipelines passes them.

    sections: those of SECTIONS, `service` and `launch`. Raises what `parse_section` raises.
    """
    parsed = {name: parse_section(form, name, content) for name, content in sections.items()}
    service, launch = parsed.pop("service"), parsed.pop("launch")
    assert isinstance(service, ServiceSettings)
    assert isinstance(launch, LaunchSettings)
    values = {name: section.model_dump(mode="json") for name, section in parsed.items()}
    return parse_config(Params, values, where="pipeline parameters"), service, launch


def parse_section(form: RunForm, name: str, content: JsonObject) -> FrozenConfig:
    """Parse a section with the keys that are fields of the form.

    Raises InvalidInput for a key that is a field of the form, and InvalidRecord, naming section and key, for unknown
    keys and bad values.
    """
    decoded = decode_params(content)
    for field, (section, key) in FIELD_KEYS.items():
        if section != name:
            continue
        if key in decoded:
            raise InvalidInput(
                f"the section `{section}` contains `{key}`, which is the parameter `{field}` of the run; remove it "
                "from the section"
            )
        decoded[key] = getattr(form, field)
    kinds: dict[str, type[FrozenConfig]] = {"service": ServiceSettings, "launch": LaunchSettings}
    kind = kinds.get(name) or type(getattr(Params(), name))
    parsed: FrozenConfig = parse_config(kind, decoded, where=f"pipeline parameter {name!r}")
    return parsed

"""The form of a run: fields with a type of their own for what people change, and the other settings by section.

A field of the form replaces a key of a section (`FIELD_KEYS`), so the section must not contain that key as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clincot.config import Params, parse_config
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

    sections: those of SECTIONS, `service` and `launch`. Raises InvalidInput for an empty required field and for a key
    that is a field of the form, and InvalidRecord, naming section and key, for unknown keys and bad values.
    """
    for field, what in REQUIRED_FIELDS.items():
        if not getattr(form, field):
            raise InvalidInput(f"the parameter `{field}` is empty; expected {what}")
    decoded = {name: decode_params(section) for name, section in sections.items()}
    for field, (section, key) in FIELD_KEYS.items():
        if key in decoded.get(section, {}):
            raise InvalidInput(
                f"the section `{section}` contains `{key}`, which is the parameter `{field}` of the run; remove it "
                "from the section"
            )
        decoded.setdefault(section, {})[key] = getattr(form, field)
    service = parse_config(ServiceSettings, decoded.pop("service"), where="pipeline parameter 'service'")
    launch = parse_config(LaunchSettings, decoded.pop("launch"), where="pipeline parameter 'launch'")
    return parse_config(Params, decoded, where="pipeline parameters"), service, launch

"""Builds kfp pipelines from dataclasses of their inputs, with a description for each input and output.

kfp reads the interface of a pipeline from the signature and the docstring of a function. Here the fields of dataclasses
become the signature, and the tables of clincot.pipelines.params become the docstring, so the tasks of a pipeline
receive objects with named fields. Pipelines inside pipelines (subpipelines) are built in the same way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

from kfp import dsl

from clincot.pipelines.argo_workflow import read_kubernetes_configs
from clincot.pipelines.params import describe
from clincot.records import hash_json


def build_pipeline(  # noqa: PLR0913 (the parts of a kfp pipeline)
    name: str,
    summary: str,
    inputs: Sequence[type],
    outputs: Any,
    body: Callable[..., Any],
    *,
    optional: bool = False,
    defaults: Mapping[str, Any] | None = None,
    config: dsl.PipelineConfig | None = None,
) -> Any:
    """Build a pipeline, or a subpipeline that can be called as a task.

    inputs: dataclasses whose fields, taken together, are the inputs, annotated with the types of kfp. `body` receives
    an instance of each and returns an instance of `outputs`, a NamedTuple, or None.
    optional: also take the fields that have a default. kfp has no optional artifacts as inputs of a pipeline, so
    callers that need both build one pipeline with them and one without.
    defaults: default values of parameters, by name.
    """
    taken = [_taken_fields(kind, optional=optional) for kind in inputs]

    def pipeline(*args: Any, **kwargs: Any) -> Any:
        values = inspect.signature(pipeline).bind(*args, **kwargs).arguments
        instances = []
        for kind, names in zip(inputs, taken, strict=True):
            instances.append(kind(**{one.name: values[one.name] for one in names}))
        return body(*instances)

    flat: list[Field[Any]] = []
    for names in taken:
        flat += names
    flat.sort(key=lambda one: one.name in (defaults or {}))  # Python wants parameters without a default first
    pipeline.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [_make_parameter(one, defaults or {}) for one in flat], return_annotation=outputs
    )
    described = {one.name: describe(name, one.name) for one in flat}
    pipeline.__doc__ = build_docstring(summary, described, _describe_outputs(name, outputs))
    return dsl.pipeline(name=name, pipeline_config=config)(pipeline)


def build_docstring(summary: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> str:
    """Return a docstring from which kfp reads the descriptions: inputs below "Args:", outputs below "Returns:"."""
    lines = [summary, "", "Args:", *(f"    {name}: {text}" for name, text in inputs.items())]
    if outputs:
        lines += ["", "Returns:", *(f"    {name}: {text}" for name, text in outputs.items())]
    return "\n".join(lines)


def shorten_specs(spec: Mapping[str, Any]) -> None:
    """Leave out of a compiled pipeline what Argo would keep in eight places for each task (workflow_size.py).

    These are the source of each component, with a script that writes it to a file: the images contain the components
    anyway, and run_component.py runs them. And the descriptions of inputs and outputs of tasks, which no UI shows;
    those of the run's parameters stay.
    """
    for executor in spec["deploymentSpec"]["executors"].values():
        container = executor["container"]
        if f"def {container['args'][-1]}(" not in container["command"][-1]:
            raise ValueError(f"not the command of a component: {container['args']}")
        container["command"] = ["python3", "-m", "clincot.pipelines.run_component"]
    for component in spec["components"].values():
        for definitions in (component.get("inputDefinitions", {}), component.get("outputDefinitions", {})):
            for one in (*definitions.get("parameters", {}).values(), *definitions.get("artifacts", {}).values()):
                one.pop("description", None)


def share_components(spec: dict[str, Any], platform: dict[str, Any]) -> None:
    """Let equal components of a compiled pipeline share one definition.

    kfp gives every call of a pipeline inside a pipeline copies of its components, with numbers behind their names. The
    copies of a run of several rounds would fill a third of the Workflow object (workflow_size.py).
    """
    executors, components = spec["deploymentSpec"]["executors"], spec["components"]
    placed = read_kubernetes_configs(platform)
    labels = _name_equal_ones({name: [one, placed.get(name)] for name, one in executors.items()})
    for component in components.values():
        if "executorLabel" in component:
            component["executorLabel"] = labels[component["executorLabel"]]
    for name in [name for name, kept in labels.items() if name != kept]:
        del executors[name]
        placed.pop(name, None)
    while True:  # components that contain equal components are equal themselves once these have one name
        names = _name_equal_ones(components)
        for part in (spec["root"], *components.values()):
            for task in part.get("dag", {}).get("tasks", {}).values():
                task["componentRef"]["name"] = names[task["componentRef"]["name"]]
        duplicates = [name for name, kept in names.items() if name != kept]
        if not duplicates:
            return
        for name in duplicates:
            del components[name]


def _name_equal_ones(definitions: Mapping[str, Any]) -> dict[str, str]:
    """Return {name: the first name with the same content}; shorter names come first."""
    first: dict[str, str] = {}
    names = {}
    for name in sorted(definitions, key=lambda name: (len(name), name)):
        names[name] = first.setdefault(hash_json(definitions[name]), name)
    return names


def _taken_fields(kind: type, *, optional: bool) -> list[Field[Any]]:
    return [one for one in fields(kind) if optional or one.default is MISSING]


def _make_parameter(one: Field[Any], defaults: Mapping[str, Any]) -> inspect.Parameter:
    default = defaults.get(one.name, inspect.Parameter.empty)
    return inspect.Parameter(one.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=one.type)


def _describe_outputs(pipeline: str, outputs: Any) -> dict[str, str]:
    if outputs is None:
        return {}
    return {name: describe(pipeline, name) for name in outputs.__annotations__}

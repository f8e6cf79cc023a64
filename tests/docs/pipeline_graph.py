"""The page about the graph and the form of the pipeline, drawn from the compiled pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

import clincot.pipelines
from clincot.pipelines.cluster_settings import GPU_TASKS, TASK_STAGES
from clincot.pipelines.placement import DISPLAY_NAMES, NEVER_CACHED_TASKS
from clincot.pipelines.run_form import REQUIRED_FIELDS
from clincot.text import markdown_table

Json = Mapping[str, Any]
_TYPES = {"STRING": "text", "NUMBER_INTEGER": "whole number", "STRUCT": "JSON object"}
# The graphs that the UI shows, from the one of a run to those that a click on a pipeline inside it opens.
_GRAPHS = {
    "comp-exit-handler-1": "The run",
    "comp-round": "The round",
    "comp-generation": "Generate preferences",
    "comp-for-loop-1": "Each group of shards",
    "comp-promotion": "Record and promote",
    "comp-condition-1": "If promoted",
}


def render_graph_page(introduction: str) -> str:
    """Return the page in Markdown. introduction: a sentence that says that the page is generated."""
    folder = Path(next(iter(clincot.pipelines.__path__)))
    with (folder / "compiled" / "round.yaml").open(encoding="utf-8") as file:
        spec = next(yaml.load_all(file, Loader=yaml.CSafeLoader))
    lines = [
        "# Graph and form",
        "",
        introduction,
        "",
        "The pictures show `pipelines/compiled/round.yaml` as the UI of Kubeflow Pipelines draws it: tasks as",
        "rectangles, their artifacts as rounded boxes. A run shows two nodes, *run* and *record run status*, which",
        "comes last however the run ends. A double click on a node with a graph inside opens it.",
        "",
    ]
    for name, title in _GRAPHS.items():
        lines += [f"## {title}", "", "```mermaid", *_draw_graph(spec, spec["components"][name]), "```", ""]
    lines += [
        "## Tasks",
        "",
        *markdown_table(["task", "in the graph", "stages", "device", "cached"], list(_list_tasks())).splitlines(),
        "",
        "A cached task does not run again while its settings, its inputs and its image are the same.",
        "",
        "## Form",
        "",
        "Fields without a default are required. The other settings are sections of `params.yaml` as JSON, with the",
        "values that were compiled in. Preflight refuses an unknown key or a bad value of any of them before anything",
        "is computed.",
        "",
        *markdown_table(["field", "type", "required", "description"], list(_list_fields(spec))).splitlines(),
        "",
    ]
    return "\n".join(lines)


def _draw_graph(spec: Json, dag: Json) -> Iterator[str]:
    tasks = dag["dag"]["tasks"]
    yield "flowchart TD"
    for name, task in tasks.items():
        yield f'  {_id(name)}["{task["taskInfo"]["name"]}"]'
        for artifact in _list_outputs(spec, task):
            yield f"  {_id(name)} --> {_id(name, artifact)}([{artifact}])"
    for name, task in tasks.items():
        producers = set()
        for wired in task.get("inputs", {}).get("artifacts", {}).values():
            made = wired.get("taskOutputArtifact")
            if made is not None:
                producers.add(made["producerTask"])
                yield f"  {_id(made['producerTask'], made['outputArtifactKey'])} --> {_id(name)}"
        for before in task.get("dependentTasks", []):
            if before not in producers:
                yield f"  {_id(before)} --> {_id(name)}"


def _id(task: str, artifact: str = "") -> str:
    """Name of a node in Mermaid, where `end` is a keyword and a hyphen can be part of an arrow."""
    return "_".join(["task", task.replace("-", "_"), *([artifact] if artifact else [])])


def _list_outputs(spec: Json, task: Json) -> list[str]:
    component = spec["components"][task["componentRef"]["name"]]
    return list(component.get("outputDefinitions", {}).get("artifacts", {}))


def _list_tasks() -> Iterator[list[str]]:
    for task, stages in TASK_STAGES.items():
        named = ", ".join(f"`{stage}`" for stage in stages) or "–"
        device = "GPU" if task in GPU_TASKS else "CPU"
        yield [f"`{task}`", DISPLAY_NAMES[task], named, device, "no" if task in NEVER_CACHED_TASKS else "yes"]


def _list_fields(spec: Json) -> Iterator[list[str]]:
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    kinds = {name: about["parameterType"] == "STRUCT" for name, about in parameters.items()}
    ordered = sorted(parameters, key=lambda name: (kinds[name], name not in REQUIRED_FIELDS, name))
    for name in ordered:
        about = parameters[name]
        required = "" if "defaultValue" in about else "yes"
        yield [f"`{name}`", _TYPES[about["parameterType"]], required, " ".join(about["description"].split())]

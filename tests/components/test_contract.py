"""Every component is its stage: the same inputs, outputs and section, whatever way they take in a pipeline."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler

import clincot.components
from clincot.components import IMAGE
from clincot.pipelines import tasks
from clincot.pipelines.cluster_settings import TASK_NAMES
from clincot.stages.base import Stage
from clincot.stages.catalog import STAGES

FOLDER = Path(clincot.components.__file__).parent
MOST_LINES = 25  # of a body
ADDRESSES = {"data", "benchmark", "policy", "blind", "calibration"}  # of data sets and policies: parameters
SECTIONS = {"answer": {"steps"}}  # inputs that are made from a section, by its parameter
# What a component calls otherwise than its stage, and why.
RENAMED = {
    ("version", "version"): "version_record",  # its section has the name
    ("publish", "golden"): "benchmark",  # where its questions are from
    ("evaluate", "train_reports"): "data",  # in the data set's folder
}
NOT_IN_A_PIPELINE = {
    ("decide", "ledger"),  # the store's, see promotion/ledger.py
}


def component(name: str) -> Any:
    return getattr(importlib.import_module(f"clincot.components.{name}.component"), name)


def interface(name: str) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """({kind: inputs}, {kind: outputs}) of the component as compiled; kind: parameters or artifacts."""
    spec = component(name).component_spec
    inputs = {"parameters": set(), "artifacts": set()}
    for one, about in (spec.inputs or {}).items():
        inputs["artifacts" if "@" in about.type else "parameters"].add(one)
    outputs = {"parameters": set(), "artifacts": set()}
    for one, about in (spec.outputs or {}).items():
        outputs["artifacts" if "@" in about.type else "parameters"].add(one)
    return inputs, outputs


def test_there_is_a_component_a_task() -> None:
    found = {path.parent.name for path in FOLDER.glob("*/component.py")}
    assert found == set(TASK_NAMES)
    assert {stage.name for stage in STAGES} <= found


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_component_has_its_stages_inputs_outputs_and_section(stage: Stage) -> None:
    inputs, outputs = interface(stage.name)
    given = inputs["parameters"] | inputs["artifacts"]
    assert stage.name in inputs["parameters"], "the section is a parameter of the stage's name"
    wanted = {
        RENAMED.get((stage.name, one), one)
        for one in (*stage.inputs, *stage.optional)
        if (stage.name, one) not in NOT_IN_A_PIPELINE
    }
    for name in wanted:
        made_from = next((config for config, made in SECTIONS.items() if name in made), name)
        assert made_from in given, f"{stage.name} takes no {name}"
        if name in ADDRESSES:
            assert name in inputs["parameters"]
    extra = inputs["artifacts"] - wanted
    assert extra <= {"trained"}, f"{stage.name} is given {extra}, which its stage does not know"
    written = {RENAMED.get((stage.name, one), one) for one in stage.outputs}
    assert outputs["artifacts"] == written | {"metrics"}


@pytest.mark.parametrize("name", sorted({*TASK_NAMES} - {"preflight"}))  # preflight is never cached
def test_digests_travel_beside_what_they_are_of(name: str) -> None:
    """Else Kubeflow's cache would take another data set at the same address for the same work."""
    inputs, _ = interface(name)
    for address in {"data", "benchmark"} & inputs["parameters"]:
        assert f"{address}_digest" in inputs["parameters"]
    if name in {stage.name for stage in STAGES if stage.device == "gpu"}:
        assert "image" in inputs["parameters"]
        assert ("policy" in inputs["parameters"]) == ("policy_digest" in inputs["parameters"])


@pytest.mark.parametrize("name", sorted(TASK_NAMES))
def test_a_body_only_calls_the_library(name: str) -> None:
    text = (FOLDER / name / "component.py").read_text(encoding="utf-8")
    (function,) = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    lines = function.body[-1].end_lineno - function.body[0].lineno + 1  # type: ignore[operator]
    assert lines <= MOST_LINES
    imported = {
        (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported <= {"clincot", "json", "pathlib"}
    assert not [node for node in ast.walk(function) if isinstance(node, ast.Try | ast.While)]


def test_deploy_is_the_librarys_function() -> None:
    """A rollout is no stage: it is held to what it calls."""
    inputs, outputs = interface("deploy")
    parameters = {"deploy" if name == "config" else name for name in inspect.signature(tasks.deploy).parameters}
    assert inputs == {"parameters": parameters, "artifacts": set()}
    assert outputs["artifacts"] == set()


@pytest.mark.parametrize("name", ["train", "record_run_status"])
def test_a_component_installs_nothing_when_it_runs(name: str, tmp_path: Path) -> None:
    compiler.Compiler().compile(component(name), str(tmp_path / "one.yaml"))
    spec = yaml.safe_load((tmp_path / "one.yaml").read_text(encoding="utf-8"))
    (executor,) = spec["deploymentSpec"]["executors"].values()
    assert executor["container"]["image"] == IMAGE
    assert "pip install" not in " ".join(executor["container"]["command"])

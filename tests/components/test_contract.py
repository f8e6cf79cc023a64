"""A component of a stage has the inputs, outputs and section of the stage, and hands them to the library."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from kfp import compiler

import clincot.components
from clincot.components import IMAGE
from clincot.config import Params, parse_config
from clincot.config.sections import INHERITED_BY_PREFLIGHT, SECTION_NAMES
from clincot.pipelines import sharding, tasks
from clincot.pipelines.cluster_settings import TASK_NAMES
from clincot.pipelines.params import decode_params
from clincot.pipelines.round_plan import RoundPlan
from clincot.stages.base import Stage
from clincot.stages.catalog import STAGES

FOLDER = Path(clincot.components.__file__).parent
MAX_STATEMENTS = 10  # of a body, its nested ones included
ADDRESSES = {"data", "benchmark", "policy", "blind", "calibration"}  # of data sets and policies: parameters
SECTIONS = {"answer": {"steps"}, "publish": {"origin"}}  # inputs that are made from a section, by its parameter
# What a component calls otherwise than its stage, and why.
RENAMED = {
    ("version", "version"): "version_record",  # its section has the name
    ("publish", "golden"): "benchmark",  # where its questions are from
    ("evaluate", "train_reports"): "data",  # in the data set's folder
}
NOT_IN_A_PIPELINE = {
    ("decide", "ledger"),  # the store's, see promotion/ledger.py
}
# Inputs that a body does not use: they are part of the key of Kubeflow's cache.
CACHE_KEYS = {"data_digest", "benchmark_digest", "policy_digest", "panel_digest", "pairs_digest", "image"}
# What a component calls, and what the call returns to it.
CALLED = {
    "run_stage_task": "digest",
    "describe_data_origin": {"line": "nodules", "round": 1, "run": "run"},
    "find_training_reports": "reports",
    "preflight": ("data", "benchmark", "panel"),
    "start_round": ("policy", "digest", 1, 2),
    "merge": "digest",
    "decide": "keep",
    "record_round": None,
    "page": None,
    "deploy": "live",
    "select_champion": None,
    "end_round": "ended",
    "record_run_status": "recorded",
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
def test_a_component_has_the_interface_of_its_stage(stage: Stage) -> None:
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
    statements = [node for part in function.body for node in ast.walk(part) if isinstance(node, ast.stmt)]
    assert len(statements) - 1 <= MAX_STATEMENTS  # without the docstring
    imported = {
        (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported <= {"clincot", "json", "pathlib"}
    assert not [node for node in ast.walk(function) if isinstance(node, ast.Try | ast.While | ast.For | ast.If)]
    assert not [node for node in ast.walk(function) if isinstance(node, ast.AugAssign)]


class FakeArtifact:
    """An artifact as a body sees it: a path, and the log of metrics."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def log_metric(self, metric: str, value: float) -> None:
        raise AssertionError("only the library logs metrics")


class Recorder:
    """Stands for the functions that bodies call: checks each call against the real signature, and keeps it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        for name, result in CALLED.items():
            monkeypatch.setattr(tasks, name, self._stand_in(getattr(tasks, name), result))
        monkeypatch.setattr(sharding, "list_shard_names", self._stand_in(sharding.list_shard_names, ["1/1"]))

    def _stand_in(self, real: Any, result: Any) -> Any:
        signature = inspect.signature(real)

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            self.calls.append((real.__name__, bound.arguments))
            if real.__name__ == "run_stage_task":  # publish and version read what their stage wrote
                for path in bound.arguments["outputs"].values():
                    Path(path).write_text('{"sha256": "published"}', encoding="utf-8")
            return result

        return call

    def arguments(self, name: str) -> dict[str, Any]:
        (found,) = [arguments for called, arguments in self.calls if called == name]
        return found


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def run_body(name: str, folder: Path, *, optional: bool) -> tuple[Any, dict[str, Any]]:
    """Run a body as a pod runs it, from the source in the compiled pipeline; returns its result and its arguments."""
    spec = component(name).component_spec
    arguments: dict[str, Any] = {}
    for one, about in (spec.inputs or {}).items():
        if "@" not in about.type:
            arguments[one] = sample_parameter(one, about.type)
        elif about.is_artifact_list:
            arguments[one] = [FakeArtifact(folder / f"{one}-{number}") for number in (1, 2)]
        elif optional or not about.optional:
            arguments[one] = FakeArtifact(folder / one)
    for one, about in (spec.outputs or {}).items():
        if "@" in about.type:
            arguments[one] = FakeArtifact(folder / one)
    namespace: dict[str, Any] = {}
    exec(spec.implementation.container.command[-1], namespace)
    return namespace[name](**arguments), arguments


def sample_parameter(name: str, kind: str) -> Any:
    defaults = RoundPlan().arguments
    samples = {
        "Dict": defaults.get(name),
        "Integer": {"number": 3.0, "ahead": 2.0, "champion_round": 0.0}.get(name, 1.0),  # as Kubeflow passes them
        "String": f"{name} as text",
        "PipelineTaskFinalStatus": SimpleNamespace(state="SUCCEEDED", error_message=None),
    }
    return samples[kind]


def flatten(value: Any) -> Iterator[Any]:
    """All values inside a recorded argument."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from flatten(one)
    else:
        yield str(value)


@pytest.mark.parametrize("optional", [False, True], ids=["required", "all"])
@pytest.mark.parametrize("name", sorted(TASK_NAMES))
def test_a_body_hands_on_everything_it_receives(name: str, optional: bool, recorder: Recorder, tmp_path: Path) -> None:
    """Each file and each text reaches a function of the library, unless it only is part of the cache key."""
    result, arguments = run_body(name, tmp_path, optional=optional)
    recorded = {*flatten([call for _, call in recorder.calls])}
    replaced = {"policy"} if "trained" in arguments else set()
    for one, value in arguments.items():
        if one in CACHE_KEYS | replaced:
            continue
        if isinstance(value, FakeArtifact):
            assert value.path in recorded or str(value) in recorded, one
        elif isinstance(value, list):
            assert {artifact.path for artifact in value} <= recorded, one
        elif isinstance(value, str):
            assert value in recorded, one
    expected = {one for one, about in (component(name).component_spec.outputs or {}).items() if "@" not in about.type}
    assert len(expected) == (len(result) if isinstance(result, tuple) else int(result is not None))


@pytest.mark.parametrize("optional", [False, True], ids=["required", "all"])
@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage.name != "preflight"], ids=lambda one: one.name)
def test_a_body_calls_its_stage_with_the_stages_names(
    stage: Stage, optional: bool, recorder: Recorder, tmp_path: Path
) -> None:
    _, arguments = run_body(stage.name, tmp_path, optional=optional)
    call = recorder.arguments("decide" if stage.name == "decide" else "run_stage_task")
    assert call.get("stage", stage.name) == stage.name
    inputs = {one for one, path in call["inputs"].items() if path} | {*(call.get("documents") or {})}
    if call.get("answer"):
        inputs.add("steps")
    known = {one for one in (*stage.inputs, *stage.optional) if (stage.name, one) not in NOT_IN_A_PIPELINE}
    if optional:
        assert inputs | {"steps"} >= known
    assert {*stage.inputs} <= inputs <= known
    assert set(call["outputs"]) == set(stage.outputs)
    for one, path in (*call["inputs"].items(), *call["outputs"].items()):
        source = arguments.get(RENAMED.get((stage.name, one), one))
        if isinstance(source, FakeArtifact) and path:
            assert path == source.path, one
    config = call["config"]
    assert config == arguments[stage.name] or isinstance(config, stage.config)
    if optional and "trained" in arguments:
        assert call["inputs"]["policy"] == arguments["trained"].path


def test_the_number_of_a_round_counts_on_within_a_run(recorder: Recorder, tmp_path: Path) -> None:
    """The third round of a line starts the run: the round after the next one is the fifth."""
    for name in ("record_round", "page", "publish"):
        run_body(name, tmp_path, optional=False)
    assert recorder.arguments("record_round")["number"] == 5
    assert recorder.arguments("page")["context"].number == 5
    assert recorder.arguments("run_stage_task")["config"].round == 5


def test_preflight_receives_the_sections_that_it_checks() -> None:
    """Each once: as the parameter that the round itself uses, not as a copy inside the section of preflight."""
    inputs, _ = interface("preflight")
    assert {*SECTION_NAMES} - {"models"} <= inputs["parameters"]  # all of them, so that a wrong key is told first
    assert {*INHERITED_BY_PREFLIGHT} <= inputs["parameters"]
    params = Params.model_validate({"propose": {"relevance_quantile": 0.5}, "train": {"lr": 0.001}})
    arguments = RoundPlan(params=params).arguments
    sections = {name: decode_params(arguments[name]) for name in ("preflight", *INHERITED_BY_PREFLIGHT)}
    checked = parse_config(Params, sections, where="pipeline parameters").get_stage_config("preflight")
    assert (checked.propose.relevance_quantile, checked.train.lr) == (0.5, 0.001)


def test_deploy_is_the_librarys_function() -> None:
    """A rollout is no stage: it is held to what it calls."""
    inputs, outputs = interface("deploy")
    parameters = {"deploy" if name == "config" else name for name in inspect.signature(tasks.deploy).parameters}
    assert inputs == {"parameters": parameters, "artifacts": set()}
    assert outputs["artifacts"] == set()


@pytest.mark.parametrize("name", ["train", "end_round", "record_run_status"])
def test_a_component_installs_nothing_when_it_runs(name: str, tmp_path: Path) -> None:
    compiler.Compiler().compile(component(name), str(tmp_path / "one.yaml"))
    spec = yaml.safe_load((tmp_path / "one.yaml").read_text(encoding="utf-8"))
    (executor,) = spec["deploymentSpec"]["executors"].values()
    assert executor["container"]["image"] == IMAGE
    assert "pip install" not in " ".join(executor["container"]["command"])

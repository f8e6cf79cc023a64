"""A component takes the address of its settings and the artifacts of other tasks, and hands them to the library."""

from __future__ import annotations

import ast
import inspect
import json
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
from clincot.config import FrozenConfig, Params
from clincot.jsonl import write_records
from clincot.pipelines import tasks
from clincot.pipelines.cluster_settings import COMPARISON_TASKS, GPU_TASKS, TASK_NAMES, TASK_STAGES
from clincot.pipelines.round_files import PREFERENCE_FILES, RESULT_FILES, DecisionFiles, RoundOrder, name_files
from clincot.pipelines.round_plan import RoundPlan
from clincot.pipelines.run_component import load_component
from clincot.pipelines.run_form import RunForm, parse_run
from clincot.pipelines.run_settings import TASK_INPUTS, TASK_SECTIONS, write_settings, write_task_settings
from clincot.pipelines.shard_generation import QUESTIONS_FOLDER, VERSIONS_FOLDER, store_file
from clincot.records import Question
from clincot.runs.layout import ROUND_FILES
from clincot.stages.catalog import STAGES, get_stage
from clincot.storage.folder_store import FolderStore

FOLDER = Path(clincot.components.__file__).parent
MAX_STATEMENTS = 10  # of a body, its nested ones included
# What a component calls, and what the call returns to it.
CHECKED = tasks.CheckedRun(*(f"{name} of preflight" for name in tasks.CheckedRun._fields))
CALLED = {
    "preflight": CHECKED,
    "read_section": {"store": "store", "name": "model"},
    "start_round": ("policy", "digest", 1, 2),
    "prepare": ("work", "questions", ["1-1/1"], 0),
    "generate": "digests",
    "judge": "digests",
    "pair": {"pairs": 3.0},
    "version": tasks.VersionedData({"tag": "preferences/m/round-0001"}, "digest"),
    "train": "digest",
    "evaluate": None,
    "decide": "keep",
    "locate_round_files": "files",
    "record_round": None,
    "publish": "digest",
    "page": None,
    "deploy": "live",
    "select_champion": None,
    "end_round": "ended",
    "record_run_status": "recorded",
}
# Parameters that a body hands on as a sum: the number of a round is that of the first one and the position in the run.
COMBINED = {"number", "ahead"}


def interface(name: str) -> tuple[dict[str, str], dict[str, str]]:
    """({input: type}, {output: type}) of the component as compiled; the type of an artifact contains an @."""
    spec = load_component(name).component_spec
    inputs = {one: about.type for one, about in (spec.inputs or {}).items()}
    return inputs, {one: about.type for one, about in (spec.outputs or {}).items()}


def test_there_is_a_component_a_task() -> None:
    found = {path.parent.name for path in FOLDER.glob("*/component.py")}
    assert found == {*TASK_NAMES, *COMPARISON_TASKS}


def test_every_stage_runs_in_a_task() -> None:
    run = [stage for stages in TASK_STAGES.values() for stage in stages]
    assert {*run} == {stage.name for stage in STAGES}
    assert {"generate", "train", "evaluate_champion", "evaluate_challenger", "publish"} == GPU_TASKS


def test_only_the_first_task_receives_sections() -> None:
    """Elsewhere a section would stand in eight places of the Workflow object for each task."""
    for name in (*TASK_NAMES, *COMPARISON_TASKS):
        inputs, _ = interface(name)
        assert ("Dict" in inputs.values()) == (name in ("preflight", "start_comparison")), name
    inputs, _ = interface("preflight")
    assert {one for one, kind in inputs.items() if kind == "Dict"} == {
        *Params.model_fields,
        "service",
        "launch",
    } - {"models", "recipe", "serve", "tracking"}  # sections carry what `models` and `serve` say


def test_every_other_task_of_a_round_gets_the_address_of_its_settings() -> None:
    """Its digest is the key by which Kubeflow recognizes the same work."""
    without = {"preflight", "select_champion", "record_run_status"}
    for name in {*TASK_NAMES} - without:
        assert interface(name)[0].get("work" if name in ("generate", "judge") else "settings") == "String", name


def test_settings_contain_the_sections_of_the_stages() -> None:
    for task, stages in TASK_STAGES.items():
        known = TASK_SECTIONS.get(task.replace("evaluate_champion", "evaluate"), ())
        if task not in ("preflight", "evaluate_challenger") and stages:
            assert {*stages} <= {*known}, task


def test_data_sets_travel_with_their_digests() -> None:
    """Else the cache would take another data set at the same address for the same work."""
    for task, names in TASK_INPUTS.items():
        for address in {"data", "benchmark"} & {*names}:
            assert f"{address}_digest" in names, task
    for task in ("generate", "train", "evaluate", "publish"):
        assert "code" in TASK_INPUTS[task], task


def test_a_task_has_few_artifacts() -> None:
    """Each one takes some 5 kB of the Workflow object for each task that receives it."""
    for name in TASK_NAMES:
        inputs, outputs = interface(name)
        received = [one for one, kind in inputs.items() if "@" in kind]
        written = [one for one, kind in outputs.items() if "@" in kind]
        assert len(received) <= 5, name
        assert len(written) <= 3, name


@pytest.mark.parametrize("name", sorted([*TASK_NAMES, *COMPARISON_TASKS]))
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
    assert imported <= {"clincot"}
    assert not [node for node in ast.walk(function) if isinstance(node, ast.Try | ast.While | ast.For | ast.If)]
    assert not [node for node in ast.walk(function) if isinstance(node, ast.AugAssign)]


class FakeArtifact:
    """An artifact as a body sees it: a path, its metadata, and the log of metrics."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.metadata: dict[str, Any] = {}

    def log_metric(self, metric: str, value: float) -> None:
        raise AssertionError("only the library logs metrics")


class Recorder:
    """Stands for the functions that bodies call: checks each call against the real signature, and keeps it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        for name, result in CALLED.items():
            monkeypatch.setattr(tasks, name, self._stand_in(getattr(tasks, name), result))

    def _stand_in(self, real: Any, result: Any) -> Any:
        signature = inspect.signature(real)

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            self.calls.append((real.__name__, bound.arguments))
            return result

        return call

    def arguments(self, name: str) -> dict[str, Any]:
        (found,) = [arguments for called, arguments in self.calls if called == name]
        return found


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def run_body(name: str, folder: Path, *, optional: bool) -> tuple[Any, dict[str, Any]]:
    """Run a body as kfp.local runs it, from a copy of its source; returns its result and its arguments."""
    spec = load_component(name).component_spec
    arguments: dict[str, Any] = {}
    for one, about in (spec.inputs or {}).items():
        if "@" not in about.type:
            arguments[one] = sample_parameter(one, about.type)
        elif optional or not about.optional:
            arguments[one] = FakeArtifact(folder / one)
    for one, about in (spec.outputs or {}).items():
        if "@" in about.type:
            arguments[one] = FakeArtifact(folder / one)
    namespace: dict[str, Any] = {}
    exec(spec.implementation.container.command[-1], namespace)
    return namespace[name](**arguments), arguments


def sample_parameter(name: str, kind: str) -> Any:
    samples = {
        "Dict": RoundPlan().arguments.get(name),
        "List": [f"{name} as text"],
        "Integer": {"number": 3.0, "ahead": 2.0, "policy_round": 0.0}.get(name, 17.0),  # as Kubeflow passes them
        "String": f"{name} as text",
        "Boolean": True,
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
    """Each file, text and number reaches a function of the library, or the metadata of an artifact."""
    result, arguments = run_body(name, tmp_path, optional=optional)
    artifacts = [one for one in arguments.values() if isinstance(one, FakeArtifact)]
    recorded = {*flatten([call for _, call in recorder.calls]), *flatten([one.metadata for one in artifacts])}
    replaced = {"policy"} if "trained" in arguments else set()
    for one, value in arguments.items():
        if one in COMBINED | replaced or isinstance(value, dict | SimpleNamespace):
            continue
        if isinstance(value, FakeArtifact):
            assert value.path in recorded or str(value) in recorded, one
        elif isinstance(value, list):
            assert {*value} <= recorded, one
        elif one != "policy_round":
            assert str(int(value) if isinstance(value, float) else value) in recorded, one
    expected = {one for one, kind in interface(name)[1].items() if "@" not in kind}
    assert len(expected) == (len(result) if isinstance(result, tuple) else int(result is not None))


def test_the_number_of_a_round_counts_on_within_a_run(recorder: Recorder, tmp_path: Path) -> None:
    """The third round of a line starts the run: the round after the next one is the fifth."""
    for name in ("prepare", "version", "record_round", "page", "publish"):
        run_body(name, tmp_path, optional=False)
    assert recorder.arguments("prepare")["order"] == RoundOrder(number=5, rounds=17)
    assert recorder.arguments("version")["number"] == 5
    assert recorder.arguments("record_round")["number"] == 5
    assert recorder.arguments("page")["context"].number == 5
    assert recorder.arguments("publish")["number"] == 5


def test_the_base_is_compared_only_if_the_run_starts_from_it(recorder: Recorder, tmp_path: Path) -> None:
    """`policy_round` is 0 in the sample: the base policy. In a later round of a run its results are an artifact."""
    run_body("decide", tmp_path, optional=False)
    assert recorder.arguments("decide")["files"].base_results == str(tmp_path / "champion_results")
    recorder.calls.clear()
    run_body("decide", tmp_path, optional=True)
    assert recorder.arguments("decide")["files"].base_results == str(tmp_path / "base_results")


def test_a_run_can_be_followed_from_its_artifacts(recorder: Recorder, tmp_path: Path) -> None:
    """The UI shows the metadata of an artifact: where the data version, the champion and the challenger are."""
    for name, artifact, shown in [
        ("version", "data_version", {"tag": "preferences/m/round-0001"}),
        ("train", "challenger", {"sha256": "digest", "trained from": "policy_digest as text"}),
        ("evaluate_champion", "champion_results", {"champion": "policy as text", "sha256": "policy_digest as text"}),
        ("page", "round_page", {"champion": "policy as text", "round": "5"}),
        ("pair", "preferences", {"pairs": 3.0}),
    ]:
        _, arguments = run_body(name, tmp_path, optional=False)
        assert arguments[artifact].metadata == shown, name


class StageRecorder:
    """Stands for run_stage: keeps stage, section and names of each call, after the checks of the real one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.called: dict[str, tuple[FrozenConfig, set[str]]] = {}
        monkeypatch.setattr(tasks, "run_stage", self._run)
        monkeypatch.setattr(tasks, "hash_path", lambda path: "digest")

    def _run(
        self, name: str, config: FrozenConfig, inputs: Mapping[str, Path], outputs: Mapping[str, Path]
    ) -> dict[str, float]:
        stage = get_stage(name)
        assert isinstance(config, stage.config)
        assert {*stage.inputs} <= {*inputs} <= {*stage.inputs, *stage.optional}, name
        assert {*outputs} == {*stage.outputs}, name
        self.called[name] = (config, {*inputs})
        for path in outputs.values():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}", encoding="utf-8")
        if name == "prepare":
            write_records(outputs["questions"], [Question(study="study-1", text="Normal?", kind="closed")])
        raise StopStageError(name)


class StopStageError(Exception):
    """A stage was called as it must be; its task need not go on."""


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, str]:
    """{task: address of its settings}, stored as preflight stores them."""
    store = FolderStore(tmp_path / "store")
    plan = RoundPlan(params=Params.model_validate({"answer": {"steps": ["Where?", "{question}"]}}))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "questions.jsonl").write_text("", encoding="utf-8")
    form = RunForm(
        data=str(tmp_path / "data"), benchmark=str(tmp_path / "data"), store=store.url, model="m", base="", questions=0
    )
    sections = {name: value for name, value in plan.arguments.items() if isinstance(value, dict)}
    params, service, launch = parse_run(form, sections)
    checked = params.model_dump(mode="json") | {"service": service.model_dump(mode="json")}
    checked["launch"] = launch.model_dump(mode="json")
    inputs = dict.fromkeys(("data_digest", "benchmark_digest", "panel_digest", "recipe", "code"), "x")
    inputs |= dict.fromkeys(("data", "benchmark", "blind_from", "calibrated_on"), form.data)
    return write_task_settings(store.url, checked, inputs)


def test_a_task_calls_its_stage_with_the_stages_names(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every input that a stage knows and a pipeline has is handed to it, under the stage's own name."""
    recorder = StageRecorder(monkeypatch)
    preferences, results, made = (str(tmp_path / name) for name in ("preferences", "results", "round_files"))
    for folder, names in ((preferences, PREFERENCE_FILES), (results, RESULT_FILES), (made, tuple(ROUND_FILES))):
        for path in name_files(folder, names).values():
            Path(path).write_text("{}", encoding="utf-8")
    order = RoundOrder(number=1, rounds=1)
    versioned = store_file(FolderStore(tmp_path / "store"), VERSIONS_FOLDER, Path(preferences) / "pairs.jsonl")
    out = str(tmp_path / "out")
    files = DecisionFiles(results, results, preferences, made, out, results, preferences)
    for call in (
        lambda: tasks.prepare(settings["prepare"], settings["generate"], ("p", "d"), order, shards=1, groups=1),
        lambda: tasks.version(settings["version"], preferences, out, number=1, run_id="run"),
        lambda: tasks.train(settings["train"], preferences, versioned, out, policy=out, lap=0),
        lambda: tasks.evaluate(settings["evaluate"], str(tmp_path), results),
        lambda: tasks.decide(settings["decide"], files),
        lambda: tasks.publish(settings["publish"], out, made, number=1),
    ):
        with pytest.raises(StopStageError):
            call()
    assert {*recorder.called} == {"prepare", "version", "train", "evaluate", "decide", "publish"}
    for stage in ("version", "train", "decide"):
        assert recorder.called[stage][1] == {*get_stage(stage).inputs, *get_stage(stage).optional}, stage
    assert recorder.called["publish"][0].model_dump()["round"] == 1


def test_a_shard_calls_its_stages_with_the_stages_names(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = tasks.read_task_settings(settings["generate"])
    store = FolderStore(tmp_path / "store")
    path = tmp_path / "questions.jsonl"
    write_records(path, [Question(study="study-1", text="Normal?", kind="closed")])
    inputs = {
        **given.inputs,
        "questions": store_file(store, QUESTIONS_FOLDER, path),
        "policy": str(tmp_path),
        "lap": "0",
    }
    work = write_settings(store.url, given.sections, inputs)
    recorder = StageRecorder(monkeypatch)
    with pytest.raises(StopStageError, match="propose"):
        tasks.generate(work, "1-1/1")
    for stage, taken in (
        ("answer", {"data", "questions", "regions", "policy", "candidates_before", "scores_before"}),
        ("judge", {"data", "questions", "regions", "candidates"}),
    ):
        with pytest.raises(StopStageError):
            tasks._run_shard_stage(
                given,
                0,
                stage,
                {name: str(path) for name in taken},
                {name: str(tmp_path / name) for name in get_stage(stage).outputs},
            )
        assert recorder.called[stage][1] == {*get_stage(stage).inputs, *get_stage(stage).optional}


def test_deploy_is_the_librarys_function() -> None:
    """A rollout is no stage: it is held to what it calls."""
    inputs, outputs = interface("deploy")
    assert {*inputs} == {*inspect.signature(tasks.deploy).parameters}
    assert outputs == {"Output": "String"}


@pytest.mark.parametrize("name", ["train", "end_round", "record_run_status"])
def test_a_component_installs_nothing_when_it_runs(name: str, tmp_path: Path) -> None:
    compiler.Compiler().compile(load_component(name), str(tmp_path / "one.yaml"))
    spec = yaml.safe_load((tmp_path / "one.yaml").read_text(encoding="utf-8"))
    (executor,) = spec["deploymentSpec"]["executors"].values()
    assert executor["container"]["image"] == IMAGE
    assert "pip install" not in " ".join(executor["container"]["command"])
    assert json.dumps(spec)

"""What the UI of Kubeflow Pipelines shows of a pipeline: descriptions of inputs and outputs, names of tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import docstring_parser
import pytest
import yaml

from clincot.config import Params
from clincot.pipelines.cluster_settings import COMPARISON_TASKS, TASK_NAMES
from clincot.pipelines.component_docs import FOLDER, expected_docstring, render_readme
from clincot.pipelines.params import DESCRIPTIONS, describe
from clincot.pipelines.placement import DISPLAY_NAMES, NEVER_CACHED_TASKS
from clincot.pipelines.round import compile_round
from clincot.pipelines.round_plan import RoundPlan
from clincot.pipelines.run_component import load_component
from clincot.pipelines.run_form import FIELD_KEYS, REQUIRED_FIELDS


def compiled(plan: RoundPlan, folder: Path) -> dict[str, Any]:
    compile_round(plan, folder / "round.yaml")
    spec: dict[str, Any] = next(yaml.safe_load_all((folder / "round.yaml").read_text(encoding="utf-8")))
    return spec


@pytest.fixture(scope="module")
def one_round(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return compiled(RoundPlan(), tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def three_rounds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return compiled(RoundPlan(rounds=3), tmp_path_factory.mktemp("three"))


def test_parameters_of_the_run_form_are_described(one_round: dict[str, Any]) -> None:
    parameters = one_round["root"]["inputDefinitions"]["parameters"]
    assert {name: " ".join(about["description"].split()) for name, about in parameters.items()} == {
        name: describe("round", name) for name in parameters
    }
    assert set(parameters) == {*RoundPlan().arguments, *REQUIRED_FIELDS}
    assert {*Params.model_fields} - {"models", "serve", "tracking"} <= set(parameters)  # sections carry what these say
    assert one_round["pipelineInfo"]["description"].startswith("Look before you answer")


def test_the_form_asks_for_what_a_run_cannot_guess(one_round: dict[str, Any]) -> None:
    """Fields without a default: Kubeflow Pipelines refuses a run without them."""
    parameters = one_round["root"]["inputDefinitions"]["parameters"]
    assert {name for name, about in parameters.items() if "defaultValue" not in about} == {"data", "benchmark", "store"}
    for name in REQUIRED_FIELDS:
        assert parameters[name]["description"].startswith("Required.")


def test_what_people_change_is_a_typed_field_and_the_rest_are_sections(one_round: dict[str, Any]) -> None:
    parameters = one_round["root"]["inputDefinitions"]["parameters"]
    kinds = {name: about["parameterType"] for name, about in parameters.items()}
    assert {name: kind for name, kind in kinds.items() if kind != "STRUCT"} == {
        "data": "STRING",
        "benchmark": "STRING",
        "store": "STRING",
        "model": "STRING",
        "base": "STRING",
        "recipe": "STRING",
        "blind_from": "STRING",
        "calibrated_on": "STRING",
        "number": "NUMBER_INTEGER",
        "questions": "NUMBER_INTEGER",
        "shards": "NUMBER_INTEGER",
    }
    for field, (section, key) in FIELD_KEYS.items():
        assert key not in parameters[section]["defaultValue"], field


@pytest.mark.parametrize("pipeline", ["one_round", "three_rounds"])
def test_tasks_carry_no_descriptions(pipeline: str, request: pytest.FixtureRequest) -> None:
    """No UI shows them, and Argo would keep each in eight places."""
    for name, component in request.getfixturevalue(pipeline)["components"].items():
        assert "description" not in str(component), name


def test_every_description_is_a_short_sentence() -> None:
    for name, text in DESCRIPTIONS.items():
        assert text.endswith("."), name
        assert text == " ".join(text.split()), name
        assert len(text) <= 100, name


@pytest.mark.parametrize("name", [*TASK_NAMES, *COMPARISON_TASKS])
def test_docstrings_and_readmes_are_up_to_date(name: str) -> None:
    """`make pipelines` writes them again."""
    docstring = load_component(name).python_func.__doc__
    assert docstring_parser.parse(docstring).short_description.endswith(".")
    actual = [line.removeprefix("    ") for line in docstring.rstrip().splitlines()]
    assert actual == expected_docstring(name).splitlines()
    assert (FOLDER / name / "README.md").read_text(encoding="utf-8") == render_readme(name)


def test_a_pod_runs_the_component_of_its_image(one_round: dict[str, Any]) -> None:
    """No source stands in the pipeline. The image is part of the key of Kubeflow's cache."""
    for executor in one_round["deploymentSpec"]["executors"].values():
        assert executor["container"]["command"] == ["python3", "-m", "clincot.pipelines.run_component"]
        assert executor["container"]["args"][-1] in TASK_NAMES


def task_names(spec: dict[str, Any]) -> dict[str, str]:
    """{task: display name} of all tasks and groups."""
    names: dict[str, str] = {}
    for part in (spec["root"], *spec["components"].values()):
        for task, about in part.get("dag", {}).get("tasks", {}).items():
            names[task] = about["taskInfo"]["name"]
    return names


def test_tasks_have_display_names(one_round: dict[str, Any]) -> None:
    assert task_names(one_round) == {
        "exit-handler-1": "run",
        "round": "round",
        "preflight": "preflight checks",
        "start-round": "start round",
        "evaluate-champion": "evaluate: champion",
        "prepare": "prepare questions",
        "generation": "generate preferences",
        "for-loop-1": "each group of shards",
        "generate": "generate candidates",
        "pair": "pair candidates",
        "version": "version data",
        "train": "train challenger",
        "evaluate-challenger": "evaluate: challenger",
        "decide": "decide",
        "promotion": "record and promote",
        "record-round": "record round",
        "condition-1": "if promoted",
        "publish": "publish checkpoint",
        "deploy": "deploy checkpoint",
        "end-round": "end round",
        "page": "page of the round",
        "record-run-status": "record run status",
    }


def list_artifacts(spec: dict[str, Any], dag: dict[str, Any]) -> list[str]:
    """Artifacts that the UI draws in a graph: the outputs of its tasks."""
    found: list[str] = []
    for task in dag["dag"]["tasks"].values():
        component = spec["components"][task["componentRef"]["name"]]
        found += component.get("outputDefinitions", {}).get("artifacts", {})
    return found


def test_the_graph_of_a_round_can_be_read(one_round: dict[str, Any], three_rounds: dict[str, Any]) -> None:
    """At most 12 tasks and 12 artifacts, each name once; the decision and the page come last."""
    dags = [part for spec in (one_round, three_rounds) for part in spec["components"].values() if "dag" in part]
    for spec in (one_round, three_rounds):
        for part in (part for part in spec["components"].values() if "dag" in part):
            titles = [task["taskInfo"]["name"] for task in part["dag"]["tasks"].values()]
            assert len(titles) <= 12
            assert len({*titles}) == len(titles)
            artifacts = list_artifacts(spec, part)
            if not any(name.startswith("later-round") for name in part["dag"]["tasks"]):
                assert len({*artifacts}) == len(artifacts) <= 12
    assert len(dags) > 10
    round_dag = one_round["components"]["comp-round"]
    tasks = round_dag["dag"]["tasks"]
    assert len(tasks) == 10
    assert sorted(list_artifacts(one_round, round_dag)) == [
        "benchmark_table",
        "challenger",
        "challenger_results",
        "champion_results",
        "data_version",
        "decision",
        "figures",
        "preferences",
        "round_files",
        "round_page",
        "round_questions",
    ]
    followed = {name for task in tasks.values() for name in task.get("dependentTasks", [])}
    assert {*tasks} - followed == {"page"}
    after_decide = {name for name, task in tasks.items() if "decide" in task.get("dependentTasks", [])}
    assert after_decide == {"promotion", "page"}
    settings = [one for task in tasks.values() for one in task["inputs"].get("parameters", {}).items()]
    assert not [one for one in settings if "settings" in one[0] and "taskOutputParameter" in one[1]]


def test_several_rounds_are_told_apart(three_rounds: dict[str, Any]) -> None:
    names = task_names(three_rounds)
    titles = [names[task] for task in ("first-round", "later-round", "later-round-2")]
    assert titles == [f"round {number} of 3" for number in (1, 2, 3)]
    assert names["select-champion"] == "select champion"


def test_every_task_has_a_display_name() -> None:
    assert set(DISPLAY_NAMES) == {*TASK_NAMES, *COMPARISON_TASKS}
    assert set(NEVER_CACHED_TASKS) <= set(TASK_NAMES)

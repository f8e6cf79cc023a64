"""What the UI of Kubeflow Pipelines shows of a pipeline: descriptions of inputs and outputs, names of tasks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docstring_parser
import pytest
import yaml

from clincot.config import Params
from clincot.pipelines.cluster_settings import TASK_NAMES
from clincot.pipelines.component_docs import FOLDER, expected_docstring, load_component, render_readme
from clincot.pipelines.params import DESCRIPTIONS, describe
from clincot.pipelines.placement import DISPLAY_NAMES, NEVER_CACHED_TASKS
from clincot.pipelines.round import compile_round
from clincot.pipelines.round_plan import RoundPlan

KINDS = ("parameters", "artifacts")


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


def component_name(label: str) -> str:
    """comp-record-round -> record_round, comp-evaluate-2 -> evaluate; subpipelines keep their hyphens."""
    name = label.removeprefix("comp-")
    stem, _, number = name.rpartition("-")
    if number.isdigit() and stem != "round":
        name = stem
    return name.replace("-", "_") if name.replace("-", "_") in TASK_NAMES else name


def described(spec: dict[str, Any]) -> Iterator[tuple[str, str, str, bool, str]]:
    """(where, component, name, whether it is an artifact, description) of each input and output of a pipeline.

    Groups that kfp adds (exit handler, condition, loop) are left out: their inputs are channels, not a person's.
    """
    parts = {"clincot-round": spec["root"], **spec["components"]}
    for label, part in parts.items():
        name = component_name(label)
        if name.startswith(("exit-handler", "condition", "for-loop")):
            continue
        for where in ("inputDefinitions", "outputDefinitions"):
            for kind in KINDS:
                for one, about in part.get(where, {}).get(kind, {}).items():
                    yield where, name, one, kind == "artifacts", about.get("description", "")


@pytest.mark.parametrize("pipeline", ["one_round", "three_rounds"])
def test_every_input_and_output_is_described(pipeline: str, request: pytest.FixtureRequest) -> None:
    rows = list(described(request.getfixturevalue(pipeline)))
    assert {name for _, name, *_ in rows} >= {*TASK_NAMES} - {"select_champion"} | {"clincot-round"}
    assert len(rows) > 250
    wrong = []
    for where, name, one, artifact, text in rows:
        if " ".join(text.split()) != describe(name, one, artifact=artifact):
            wrong.append((where, name, one, text))
    assert wrong == []


def test_parameters_of_the_run_form_are_described(one_round: dict[str, Any]) -> None:
    parameters = one_round["root"]["inputDefinitions"]["parameters"]
    assert set(parameters) == set(RoundPlan().arguments)
    assert {*Params.model_fields} - {"models"} <= set(parameters)  # the sections carry what `models` says
    assert parameters["data"]["description"] == DESCRIPTIONS["data"]
    assert one_round["pipelineInfo"]["description"].startswith("Look before you answer")


def test_every_description_is_a_short_sentence() -> None:
    for name, text in DESCRIPTIONS.items():
        assert text.endswith("."), name
        assert text == " ".join(text.split()), name
        assert len(text) <= 100, name


@pytest.mark.parametrize("name", TASK_NAMES)
def test_docstrings_and_readmes_are_up_to_date(name: str) -> None:
    """`make pipelines` writes them again."""
    docstring = load_component(name).python_func.__doc__
    assert docstring_parser.parse(docstring).short_description.endswith(".")
    actual = [line.removeprefix("    ") for line in docstring.rstrip().splitlines()]
    assert actual == expected_docstring(name).splitlines()
    assert (FOLDER / name / "README.md").read_text(encoding="utf-8") == render_readme(name)


def test_the_source_in_a_pod_carries_no_docstring(one_round: dict[str, Any]) -> None:
    """The source is part of the cache key: another description must not repeat finished work."""
    for executor in one_round["deploymentSpec"]["executors"].values():
        source = executor["container"]["command"][-1]
        assert '"""' not in source
        compile(source, "component", "exec")


def task_names(spec: dict[str, Any]) -> dict[str, str]:
    """{task: display name} of all tasks and groups."""
    names: dict[str, str] = {}
    for part in (spec["root"], *spec["components"].values()):
        for task, about in part.get("dag", {}).get("tasks", {}).items():
            names[task] = about["taskInfo"]["name"]
    return names


def test_tasks_have_display_names(one_round: dict[str, Any]) -> None:
    assert task_names(one_round) == {
        "exit-handler-1": "round",
        "preflight": "preflight checks",
        "start-round": "start round",
        "evaluate": "evaluate: champion",
        "prepare": "prepare questions",
        "generation": "generate (all shards)",
        "for-loop-1": "generate (one shard)",
        "propose": "propose regions",
        "answer": "answer questions",
        "judge": "judge candidates",
        "merge": "merge shards",
        "pair": "pair candidates",
        "version": "version data",
        "train": "train challenger",
        "evaluate-2": "evaluate: challenger",
        "decide": "decide",
        "record-round": "record round",
        "page": "page of the round",
        "promotion": "promote",
        "condition-1": "if promoted",
        "publish": "publish checkpoint",
        "deploy": "deploy checkpoint",
        "end-round": "end round",
        "record-run-status": "record run status",
    }


def test_several_rounds_and_steps_are_told_apart(three_rounds: dict[str, Any], tmp_path: Path) -> None:
    names = task_names(three_rounds)
    assert [names[f"round-{number}"] for number in (1, 2, 3)] == [f"round {number} of 3" for number in (1, 2, 3)]
    assert names["select-champion"] == "select champion"
    chain = Params.model_validate({"answer": {"steps": ["Where?", "{question}"]}})
    names = task_names(compiled(RoundPlan(params=chain), tmp_path))
    assert [names["answer"], names["answer-2"]] == ["answer questions: step 1 of 2", "answer questions: step 2 of 2"]
    assert names["judge-2"] == "judge candidates: step 2 of 2"


def test_every_task_has_a_display_name() -> None:
    assert set(DISPLAY_NAMES) == set(TASK_NAMES)
    assert set(NEVER_CACHED_TASKS) <= set(TASK_NAMES)

"""The comparison as a pipeline: its graph and places, and its tasks one after the other on the tiny models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from clincot.cli.app import main
from clincot.comparison.comparison_results import collect_comparison, read_table
from clincot.pipelines import comparison_tasks
from clincot.pipelines.cluster_settings import load_cluster_settings
from clincot.pipelines.comparison_pipeline import compile_comparison
from clincot.pipelines.comparison_tasks import ComparisonForm
from clincot.pipelines.params import encode_params
from tests.support import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """(specification, Kubernetes settings) of the pipeline as `make pipelines` compiles it."""
    path = tmp_path_factory.mktemp("compiled") / "comparison.yaml"
    cluster = ROOT / "pipelines" / "cluster.yaml"
    assert main(["pipeline", "compile", "--comparison", "--cluster", str(cluster), "--out", str(path)]) == 0
    assert path.read_bytes() == (ROOT / "pipelines" / "compiled" / "comparison.yaml").read_bytes()
    spec, platform = yaml.safe_load_all(path.read_text())
    return spec, platform


def test_a_seed_is_a_task_on_a_gpu_and_the_table_follows_all(compiled: Any) -> None:
    spec, platform = compiled
    root, loop = spec["root"]["dag"]["tasks"], spec["components"]["comp-for-loop-1"]["dag"]["tasks"]
    assert set(root) == {"start-comparison", "for-loop-1", "compare-table"}
    assert set(loop) == {"compare-seed"}
    assert set(root["compare-table"]["dependentTasks"]) == {"start-comparison", "for-loop-1"}
    assert root["for-loop-1"]["iteratorPolicy"]["parallelismLimit"] == 4
    containers = {name: one["container"] for name, one in spec["deploymentSpec"]["executors"].items()}
    gpus = {name: "accelerator" in one["resources"] for name, one in containers.items()}
    assert gpus == {"exec-start-comparison": False, "exec-compare-seed": True, "exec-compare-table": False}
    for one in containers.values():
        assert one["command"] == ["python3", "-m", "clincot.pipelines.run_component"]
    settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert set(settings) == set(containers)


def test_a_seed_has_the_place_of_train(tmp_path: Path) -> None:
    """The resources that cluster.yaml gives `train`, its secrets and its time limit."""
    content = {"stages": {"train": {"count": 4, "timeout_s": 172800}}}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(content))
    cluster = load_cluster_settings(tmp_path / "cluster.yaml")
    compile_comparison(tiny.params([]), cluster, tmp_path / "out.yaml", seeds=(0, 1, 2))
    spec, platform = yaml.safe_load_all((tmp_path / "out.yaml").read_text())
    container = spec["deploymentSpec"]["executors"]["exec-compare-seed"]["container"]
    assert container["resources"]["accelerator"]["resourceCount"] == "4"
    settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-compare-seed"]
    assert settings["activeDeadlineSeconds"] == "172800"
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert parameters["seeds"]["defaultValue"] == [0, 1, 2]
    required = {name for name, one in parameters.items() if "defaultValue" not in one}
    assert required == {"data", "benchmark", "store"}
    assert all(one["description"].endswith(".") for one in parameters.values())


@pytest.fixture
def form(tmp_path: Path) -> tuple[ComparisonForm, dict[str, Any]]:
    """Two seeds of one round on the tiny models."""
    policy, *judges = (tiny.write_model(tmp_path / name, seed) for seed, name in enumerate(("policy", "a", "b")))
    params = tiny.params(judges)
    data = tiny.write_set(tmp_path / "data")
    benchmark = tiny.write_set(tmp_path / "benchmark", seed=1, studies=3)
    store = str(tmp_path / "store")
    filled = ComparisonForm(str(data), str(benchmark), store, str(policy), "", "slake", 1, (0,))
    return filled, encode_params(params.model_dump(mode="json", exclude={"recipe"}))


@pytest.mark.slow
def test_the_tasks_give_the_table_of_the_command(
    form: tuple[ComparisonForm, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """start -> seed -> table; the table is byte by byte that of `clincot compare` over the same run folder."""
    monkeypatch.setenv("CLINCOT_CACHE", str(tmp_path / "cache"))
    filled, params = form
    settings, seeds = comparison_tasks.start_comparison(filled, params)
    assert seeds == ["0"]
    address = comparison_tasks.compare_seed(settings, "0")
    assert not list(Path(address).rglob("*.safetensors"))
    assert comparison_tasks.compare_seed(settings, "0") == address  # resumed: nothing is run again
    table, results = tmp_path / "table.md", tmp_path / "results.json"
    comparison_tasks.write_table(settings, [address], table=str(table), results=str(results))
    (run,) = (tmp_path / "cache" / "comparisons").iterdir()
    plan = comparison_tasks._build_plan(comparison_tasks.read_task_settings(settings), run)
    collect_comparison(plan)
    assert table.read_text().rstrip("\n") == read_table(run)
    rows = json.loads(results.read_text())["rows"]
    assert [row["row"] for row in rows] == [
        "base",
        "SFT on chosen, round 1",
        "plain DPO, round 1",
        "margin-DPO, round 1",
    ]


def test_a_seed_that_is_missing_is_named(
    form: tuple[ComparisonForm, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled, params = form
    settings, _ = comparison_tasks.start_comparison(replace(filled, seeds=(0, 7)), params)
    comparison_tasks.write_table(settings, [], table=str(tmp_path / "t.md"), results=str(tmp_path / "r.json"))
    assert "base was not measured" in (tmp_path / "t.md").read_text()
    assert "seed-7/base/outcomes.jsonl" in (tmp_path / "t.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ""}, "the parameter `data` is empty"),
        ({"base": ""}, "the parameter `base` is empty"),
        ({"seeds": ()}, "expected different seeds, got none"),
        ({"seeds": (1, "1")}, "expected different seeds, got 1, 1"),
        ({"recipe": "no-such"}, "no recipe is called 'no-such'"),
    ],
)
def test_a_form_that_cannot_work_ends_before_any_gpu(
    form: tuple[ComparisonForm, dict[str, Any]], changes: dict[str, Any], message: str
) -> None:
    filled, params = form
    with pytest.raises(SystemExit, match="clincot start_comparison") as failure:
        comparison_tasks.start_comparison(replace(filled, **changes), params)
    assert message in str(failure.value)

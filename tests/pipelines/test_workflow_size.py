"""How large the Workflow object of a run becomes: the estimate against a recorded run, and today's pipelines.

recorded/node_sizes.csv holds the sizes of all nodes of a run on Kubeflow Pipelines 2.17.0 with Argo 4.0.5: one round,
one shard, kept. Its specification had 174 kB. recorded/compiled_round.yaml.gz is the pipeline that was run, as compiled
then (its settings of the cluster are the defaults; the run had three labels, a Secret and a cache volume).
"""

from __future__ import annotations

import csv
import gzip
from pathlib import Path
from typing import Any

import pytest
import yaml

from clincot.errors import InvalidInput
from clincot.pipelines.cluster_settings import ClusterSettings
from clincot.pipelines.round import PIPELINE_NAME, compile_round
from clincot.pipelines.round_plan import RoundPlan
from clincot.pipelines.workflow_size import ARGO_LIMIT, check_workflow_size, estimate_workflow_size

RECORDED = Path(__file__).parent / "recorded"
RECORDED_SPEC = 174_000  # bytes
CHART_LIKE: dict[str, Any] = {  # what the chart's production values set for every task
    "labels": {
        "app.kubernetes.io/component": "run",
        "app.kubernetes.io/instance": "clincot",
        "app.kubernetes.io/part-of": "clincot",
    },
    "cache": {"claim": "clincot-cache"},
    "env": {
        "AWS_ENDPOINT_URL_S3": "http://clincot-seaweedfs.clincot.svc.cluster.local:8333",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    },
    "secrets": [{"name": "clincot-store", "env": {"AWS_ACCESS_KEY_ID": "AWS_ACCESS_KEY_ID"}}],
}


@pytest.fixture(scope="module")
def recorded_nodes() -> list[dict[str, str]]:
    with (RECORDED / "node_sizes.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def recorded_pipeline() -> tuple[dict[str, Any], dict[str, Any]]:
    with gzip.open(RECORDED / "compiled_round.yaml.gz", "rt", encoding="utf-8") as file:
        spec, platform = yaml.load_all(file, Loader=yaml.CSafeLoader)
        return spec, platform


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple[dict[str, Any], dict[str, Any]]]:
    """{(settings of the cluster, rounds): documents of the compiled pipeline}."""
    path = tmp_path_factory.mktemp("compiled") / "round.yaml"
    found = {}
    for name, cluster in (("default", ClusterSettings()), ("chart", ClusterSettings.model_validate(CHART_LIKE))):
        for rounds in (1, 3):
            compile_round(RoundPlan(cluster=cluster, rounds=rounds, shards=64), path)
            with path.open(encoding="utf-8") as file:
                spec, platform = yaml.load_all(file, Loader=yaml.CSafeLoader)
            found[name, rounds] = (spec, platform)
    return found


def test_a_task_is_six_nodes_and_a_shard_was_24(recorded_nodes: list[dict[str, str]]) -> None:
    """The rules by which the estimate writes nodes, in the recorded run."""
    assert len(recorded_nodes) == 114
    assert sum(int(node["bytes"]) for node in recorded_nodes) == 1_290_732
    propose = [node for node in recorded_nodes if ".propose" in node["name"]]
    assert [node["type"] for node in propose].count("Retry") == 3
    assert len(propose) == 6
    shard = [node for node in recorded_nodes if "iteration-iterations(" in node["name"]]
    assert (len(shard), sum(int(node["bytes"]) for node in shard)) == (24, 229_743)


def test_the_estimate_of_the_recorded_run_is_what_was_recorded(
    recorded_nodes: list[dict[str, str]], recorded_pipeline: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    estimate = estimate_workflow_size(*recorded_pipeline, groups=1, promoted=False)
    assert estimate.nodes == len(recorded_nodes)
    assert estimate.status == pytest.approx(1_290_732, rel=0.05)
    assert estimate.spec == pytest.approx(RECORDED_SPEC, rel=0.05)


@pytest.mark.parametrize(("shards", "measured"), [(8, 490_000), (16, 680_000), (32, 1_040_000)])
def test_more_shards_of_the_recorded_run_are_estimated_as_they_were_measured(
    shards: int, measured: int, recorded_pipeline: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    """Measured on the recorded Workflow with its shard multiplied out, and compressed as Argo does it."""
    estimate = estimate_workflow_size(*recorded_pipeline, groups=shards, promoted=False)
    assert estimate.compressed_total == pytest.approx(measured, rel=0.06)
    one = estimate_workflow_size(*recorded_pipeline, groups=1, promoted=False)
    assert estimate.nodes - one.nodes == 24 * (shards - 1)
    assert estimate.status - one.status == pytest.approx(229_743 * (shards - 1), rel=0.05)


def test_a_run_that_argo_would_end_is_refused_with_the_numbers(
    recorded_pipeline: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    """32 shards of the recorded pipeline are 1.04 of 1.05 MB, which leaves no margin; 8 shards are 0.49."""
    large = estimate_workflow_size(*recorded_pipeline, groups=32)
    assert large.compressed_total > 0.95 * ARGO_LIMIT
    with pytest.raises(
        InvalidInput, match=r"1 round with 32 tasks .* would not finish: .* 1\.0\d MB .* limit is 1\.05"
    ):
        check_workflow_size(large, groups=32, rounds=1)
    check_workflow_size(estimate_workflow_size(*recorded_pipeline, groups=8), groups=8, rounds=1)


def test_64_shards_in_three_rounds_take_less_than_half_of_the_limit(compiled: Any) -> None:
    """The shards of a round are divided among 5 tasks: 16 for a run of three rounds. Their number does not matter."""
    groups = ClusterSettings().count_shard_tasks(3)
    assert groups == 5
    for name in ("default", "chart"):
        size = estimate_workflow_size(*compiled[name, 3], groups=groups)
        assert size.compressed_total < 0.5 * ARGO_LIMIT, name


def test_64_tasks_at_the_same_time_fit_into_a_run_of_one_round(compiled: Any, tmp_path: Path) -> None:
    """Who asks for more pods than the default gets them as long as the run can end."""
    for name in ("default", "chart"):
        assert estimate_workflow_size(*compiled[name, 1], groups=64).compressed_total < 0.5 * ARGO_LIMIT
    plan = RoundPlan(cluster=ClusterSettings.model_validate({"parallel_shards": 64}), rounds=3)
    with pytest.raises(InvalidInput, match=r"a run of 3 rounds with 64 tasks for shards in each would not finish"):
        compile_round(plan, tmp_path / "round.yaml")
    assert not (tmp_path / "round.yaml").exists()


def test_the_default_run_is_not_compressed(compiled: Any) -> None:
    """Below 1 MB Argo leaves the status as it is, and Kubeflow's record of the tasks is whole.

    One shard is the default of the command line. A run whose challenger is kept may have several tasks for shards.
    """
    for name in ("default", "chart"):
        assert estimate_workflow_size(*compiled[name, 1], groups=1).uncompressed_total < ARGO_LIMIT, name
    for name, groups in (("default", 6), ("chart", 3)):
        kept = estimate_workflow_size(*compiled[name, 1], groups=groups, promoted=False)
        assert kept.uncompressed_total < ARGO_LIMIT, name


def test_names_of_pods_are_host_names(tmp_path: Path) -> None:
    """Kubernetes cuts a host name at 63 characters and warns at every pod.

    A Workflow is called <pipeline>-<5 characters>, and its pods <workflow>-<template>-<10 digits>; the template of a
    task with labels and retries is metadata-<annotations>-<labels>-retry-system-container-impl (argocompiler/
    container.go at 2.17.0).
    """
    pod = f"{PIPELINE_NAME}-abcde-metadata-0-4-retry-system-container-impl-1234567890"
    assert len(pod) == 63

"""The compiled pipelines under strict parsing with the messages of each release of Kubeflow Pipelines.

The API server parses both documents of a compiled pipeline strictly. It refuses a pipeline spec with an unknown field,
and ignores a platform spec with one, without a word (kubeflow/pipelines, backend/src/apiserver/template/v2_template.go
at 2.15.0, 2.16.1 and 2.17.0).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from kfp.kubernetes import kubernetes_executor_config_pb2

from clincot.pipelines.cluster_settings import load_cluster_settings
from clincot.pipelines.round import compile_round
from clincot.pipelines.round_plan import RoundPlan
from clincot.pipelines.submit import MIN_SERVER_VERSION
from tests.support.kfp_specs import INSTALLED, RELEASES, load_message, parse_strictly

ROOT = Path(__file__).resolve().parents[2]
COMPILED = ("pipelines/compiled/round.yaml", "pipelines/compiled/three-rounds.yaml")


def version_of(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")[:2]))


SUPPORTED = [*(one for one in RELEASES if version_of(one) >= MIN_SERVER_VERSION), INSTALLED]
OLDER = [one for one in RELEASES if version_of(one) < MIN_SERVER_VERSION]


@cache
def read_documents(path: Path) -> tuple[Any, Any]:
    pipeline, platform = yaml.load_all(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    return pipeline, platform


@pytest.fixture(scope="module")
def every_setting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline with every setting of the commented example, pipelines/cluster.yaml."""
    path = tmp_path_factory.mktemp("compiled") / "round.yaml"
    compile_round(RoundPlan(cluster=load_cluster_settings(ROOT / "pipelines/cluster.yaml")), path)
    return path


@pytest.mark.parametrize("release", SUPPORTED)
@pytest.mark.parametrize("compiled", COMPILED)
def test_supported_releases_understand_both_documents(release: str, compiled: str) -> None:
    pipeline, platform = read_documents(ROOT / compiled)
    parse_strictly(release, "PipelineSpec", pipeline)
    assert "kubernetes" in parse_strictly(release, "PlatformSpec", platform).platforms


@pytest.mark.parametrize("release", SUPPORTED)
def test_supported_releases_understand_every_setting(release: str, every_setting: Path) -> None:
    pipeline, platform = read_documents(every_setting)
    parse_strictly(release, "PipelineSpec", pipeline)
    parsed = parse_strictly(release, "PlatformSpec", platform)
    assert len(parsed.platforms["kubernetes"].deployment_spec.executors) == len(pipeline["deploymentSpec"]["executors"])


@pytest.mark.parametrize("release", OLDER)
@pytest.mark.parametrize("compiled", COMPILED)
def test_older_releases_ignore_the_platform_spec(release: str, compiled: str) -> None:
    """So submit, upload and schedule refuse their servers: the run would have no Secrets, tolerations and volumes."""
    pipeline, platform = read_documents(ROOT / compiled)
    parse_strictly(release, "PipelineSpec", pipeline)
    with pytest.raises(ParseError, match=r'"ml_pipelines.PipelineConfig" has no field named'):
        parse_strictly(release, "PlatformSpec", platform)


def test_the_driver_understands_the_settings_of_each_pod(every_setting: Path) -> None:
    """backend/src/v2/driver reads KubernetesExecutorConfig of kubernetes_platform's proto, strictly, too."""
    _, platform = read_documents(every_setting)
    for name, settings in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].items():
        parsed = ParseDict(settings, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
        assert MessageToDict(parsed), name


def test_the_newest_kept_release_is_that_of_the_environment() -> None:
    """If pip brings another minor release, its descriptor belongs to those in tests/support/kfp_protos, too."""
    fields = [field.name for field in load_message(INSTALLED, "PipelineConfig").DESCRIPTOR.fields]
    assert fields == [field.name for field in load_message(RELEASES[-1], "PipelineConfig").DESCRIPTOR.fields]

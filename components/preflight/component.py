"""Kubeflow component of the preflight stage."""

from typing import NamedTuple

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def preflight(
    preflight: dict,
    judge: dict,
    publish: dict,
    version: dict,
    service: dict,
    launch: dict,
    data: str,
    benchmark: str,
    report: dsl.Output[dsl.Artifact],
    table: dsl.Output[dsl.Markdown],
    champion: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> NamedTuple("InputDigests", [("data_digest", str), ("benchmark_digest", str), ("panel_digest", str)]):
    """Check everything that the round needs, and compute the digests of its inputs."""
    from clincot.pipelines import tasks

    sections = {"preflight": preflight, "judge": judge, "publish": publish, "version": version}
    outputs = {"report": report.path, "table": table.path, "champion": champion.path}
    return tasks.preflight(sections, service, launch, outputs, data=data, benchmark=benchmark, metrics=metrics)

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
    propose: dict,
    train: dict,
    service: dict,
    launch: dict,
    data: str,
    benchmark: str,
    report: dsl.Output[dsl.Artifact],
    table: dsl.Output[dsl.Markdown],
    champion: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> NamedTuple("InputDigests", [("data_digest", str), ("benchmark_digest", str), ("panel_digest", str)]):
    """Check everything that the round needs, and compute the digests of its inputs.

    Args:
        preflight: Settings of the checks before the round: base policy, time limits, free disk space.
        judge: Settings of the judge panel: judges, calibration, quorum, retries.
        publish: Settings of the model registry: store, name of the model, golden questions.
        version: Settings of the data repository: git address, branch, number of the version.
        propose: Settings of the regions: grounders and their counts, hypotheses, sampling.
        train: Settings of the training: loss, margin, learning rate, batch size, adapters.
        service: Settings of the InferenceService: name, namespace, engine, images, resources.
        launch: How training is started: in the task, with torchrun, or as a TrainJob.
        data: Address of the training data set: a folder or `s3://bucket/prefix/<sha256>`.
        benchmark: Address of the held-out data set with its answer key.

    Returns:
        report: Result and remedy of every check (JSON).
        table: Markdown table of all checks with their remedies, which `preflight` writes.
        champion: Policy from which the round would start (JSONL, one StartingPolicy).
        metrics: Figures of the task for the Kubeflow UI.
        data_digest: sha256 of the data set, part of the cache key.
        benchmark_digest: sha256 of the benchmark, part of the cache key.
        panel_digest: sha256 over the files of the judges, part of the cache key.
    """
    from clincot.pipelines import tasks

    sections = {
        "preflight": preflight,
        "judge": judge,
        "publish": publish,
        "version": version,
        "propose": propose,
        "train": train,
    }
    outputs = {"report": report.path, "table": table.path, "champion": champion.path}
    return tasks.preflight(sections, service, launch, outputs, data=data, benchmark=benchmark, metrics=metrics)

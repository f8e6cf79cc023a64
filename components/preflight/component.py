"""Kubeflow component of the preflight stage."""

from typing import NamedTuple

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def preflight(
    preflight: dict,
    prepare: dict,
    propose: dict,
    answer: dict,
    judge: dict,
    pair: dict,
    version: dict,
    train: dict,
    evaluate: dict,
    decide: dict,
    publish: dict,
    deploy: dict,
    service: dict,
    launch: dict,
    data: str,
    benchmark: str,
    calibrated_on: str,
    report: dsl.Output[dsl.Artifact],
    table: dsl.Output[dsl.Markdown],
    champion: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> NamedTuple("InputDigests", [("data_digest", str), ("benchmark_digest", str), ("panel_digest", str)]):
    """Check everything that the round needs, and compute the digests of its inputs.

    Args:
        preflight: Settings of the checks before the round: base policy, time limits, free disk space.
        prepare: Settings of the question split: number of subsets, limit, seed.
        propose: Settings of the regions: grounders and their counts, hypotheses, sampling.
        answer: Settings of the answers: sampling, length, steps of a chain.
        judge: Settings of the judge panel: judges, calibration, quorum, retries.
        pair: Settings of the preference pairs: smallest score gap, pairs per question.
        version: Settings of the data repository: git address, branch, number of the version.
        train: Settings of the training: loss, margin, learning rate, batch size, adapters.
        evaluate: Settings of the evaluation: kinds of regions, answer length, resamples.
        decide: Settings of the promotion gate: error budget, smallest gain, floors, leak limits.
        publish: Settings of the model registry: store, name of the model, golden questions.
        deploy: Settings of the rollout: traffic steps, time limits, smoke tests, approval.
        service: Settings of the InferenceService: name, namespace, engine, images, resources.
        launch: How training is started: in the task, with torchrun, or as a TrainJob.
        data: Address of the training data set: a folder or `s3://bucket/prefix/<sha256>`.
        benchmark: Address of the held-out data set with its answer key.
        calibrated_on: Address of the data set on which the judges were calibrated, for the leak check.

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
        "prepare": prepare,
        "propose": propose,
        "answer": answer,
        "judge": judge,
        "pair": pair,
        "version": version,
        "train": train,
        "evaluate": evaluate,
        "decide": decide,
        "publish": publish,
        "deploy": deploy,
    }
    outputs = {"report": report.path, "table": table.path, "champion": champion.path}
    addresses = {"data": data, "benchmark": benchmark, "calibration": calibrated_on}
    return tasks.preflight(sections, service, launch, outputs, addresses=addresses, metrics=metrics)

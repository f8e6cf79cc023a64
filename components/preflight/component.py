"""Kubeflow component of the preflight stage."""

from typing import NamedTuple

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def preflight(
    data: str,
    benchmark: str,
    store: str,
    model: str,
    base: str,
    recipe: str,
    blind_from: str,
    calibrated_on: str,
    questions: int,
    code: str,
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
    checks: dsl.Output[dsl.Markdown],
) -> NamedTuple(
    "CheckedRun",
    [
        ("champion", str),
        ("round_settings", str),
        ("prepare_settings", str),
        ("generate_settings", str),
        ("pair_settings", str),
        ("version_settings", str),
        ("train_settings", str),
        ("evaluate_settings", str),
        ("decide_settings", str),
        ("publish_settings", str),
        ("deploy_settings", str),
        ("page_settings", str),
    ],
):
    """Check everything that the run needs, and store the settings of its tasks.

    Args:
        data: Required. Address of the training data set: a folder or `s3://bucket/prefix/<sha256>`.
        benchmark: Required. Address of the held-out data set with its answer key.
        store: Required. Folder or `s3://bucket/prefix` for checkpoints, champion and records.
        model: Name of the model whose checkpoints succeed one another.
        base: Starting policy of a model without a champion: a checkpoint's address; empty: none.
        recipe: Name of the recipe that the settings come from, for the round's page; empty: neutral.
        blind_from: Address of a data set whose answers the blind baseline may use; empty: no baseline.
        calibrated_on: Address of the data set on which the judges were calibrated, for the leak check.
        questions: Maximum number of questions of a round; 0: the whole subset.
        code: Stands for the source in local caches.
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

    Returns:
        checks: All checks with their remedies (Markdown).
        champion: Policy from which the round would start (JSON).
        round_settings: Settings of the records of the round.
        prepare_settings: Settings of prepare.
        generate_settings: Settings of generate.
        pair_settings: Settings of pair.
        version_settings: Settings of version.
        train_settings: Settings of train.
        evaluate_settings: Settings of both evaluations.
        decide_settings: Settings of decide.
        publish_settings: Settings of publish.
        deploy_settings: Settings of deploy.
        page_settings: Settings of page.
    """
    from clincot.pipelines import run_form, tasks

    form = run_form.RunForm(
        data=data,
        benchmark=benchmark,
        store=store,
        model=model,
        base=base,
        questions=int(questions),
        recipe=recipe,
        blind_from=blind_from,
        calibrated_on=calibrated_on,
        code=code,
    )
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
        "service": service,
        "launch": launch,
    }
    return tasks.preflight(form, sections, {"table": checks.path})

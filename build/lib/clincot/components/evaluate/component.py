"""Kubeflow component of the evaluate stage."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    evaluate: dict,
    propose: dict,
    data: str,
    data_digest: str,
    benchmark: str,
    benchmark_digest: str,
    policy: str,
    policy_digest: str,
    image: str,
    outcomes: dsl.Output[dsl.Dataset],
    report: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    trained: dsl.Input[dsl.Model] = None,
) -> str:
    """Answer the benchmark with a policy from each kind of region, and measure the answers.

    Args:
        evaluate: Settings of the evaluation: kinds of regions, answer length, resamples.
        propose: Settings of the regions: grounders and their counts, hypotheses, sampling.
        data: Address of the training data set: a folder or `s3://bucket/prefix/<sha256>`.
        data_digest: sha256 of the data set, part of the cache key.
        benchmark: Address of the held-out data set with its answer key.
        benchmark_digest: sha256 of the benchmark, part of the cache key.
        policy: Address of the checkpoint from which the run starts.
        policy_digest: sha256 of the checkpoint that the task uses, part of the cache key.
        image: Image or source version, which stands for the code in the cache key.
        trained: Checkpoint that the previous round of this run trained; replaces `policy`.

    Returns:
        outcomes: JSON Lines of a policy's answers to the benchmark, one per question and arm, which `evaluate` writes.
        report: JSON report of the stage: all checks from `preflight`, the benchmark's metrics from `evaluate`.
        metrics: Figures of the task for the Kubeflow UI.
        Output: sha256 of the outcomes.
    """
    from clincot.pipelines import params, tasks

    with tasks.user_errors("evaluate"):
        config = params.build_evaluate_config(evaluate, propose)
        reports = tasks.find_training_reports(data, benchmark)
    inputs = {"benchmark": benchmark, "policy": trained.path if trained else policy, "train_reports": reports}
    outputs = {"outcomes": outcomes.path, "report": report.path}
    return tasks.run_stage_task("evaluate", config, inputs, outputs, metrics=metrics)

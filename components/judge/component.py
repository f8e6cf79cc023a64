"""Kubeflow component of the judge stage."""

from kfp import dsl

from clincot.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def judge(
    judge: dict,
    answer: dict,
    data: str,
    data_digest: str,
    panel_digest: str,
    image: str,
    shard: str,
    questions: dsl.Input[dsl.Dataset],
    regions: dsl.Input[dsl.Dataset],
    candidates: dsl.Input[dsl.Dataset],
    judgements: dsl.Output[dsl.Dataset],
    scores: dsl.Output[dsl.Dataset],
    panel_report: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    """Let every judge score every candidate of a shard.

    Args:
        judge: Settings of the judge panel: judges, calibration, quorum, retries.
        answer: Settings of the answers: sampling, length, steps of a chain.
        data: Address of the training data set: a folder or `s3://bucket/prefix/<sha256>`.
        data_digest: sha256 of the data set, part of the cache key.
        panel_digest: sha256 over the files of the judges, part of the cache key.
        image: Image or source version, which stands for the code in the cache key.
        shard: Shard of the questions to process, such as 1/2.
        questions: JSON Lines of the questions of this round, which `prepare` writes.
        regions: JSON Lines of the proposed regions of every question, which `propose` writes.
        candidates: JSON Lines of the policy's answers, one per region and step, which `answer` writes.

    Returns:
        judgements: JSON Lines of every judge's score of every candidate, which `judge` writes.
        scores: JSON Lines of the panel's calibrated score of every candidate, which `judge` writes.
        panel_report: JSON report of the judges: who scored, who was left out, how far they agree; `judge` writes it.
        metrics: Figures of the task for the Kubeflow UI.
        Output: sha256 of the judgements.
    """
    from clincot.pipelines import tasks

    inputs = {"data": data, "questions": questions.path, "regions": regions.path, "candidates": candidates.path}
    outputs = {"judgements": judgements.path, "scores": scores.path, "panel_report": panel_report.path}
    return tasks.run_stage_task("judge", judge, inputs, outputs, metrics=metrics, shard=shard, answer=answer)
